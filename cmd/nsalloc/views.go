package main

import (
	"cmp"
	"slices"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

// The documents of -o json and -o yaml. They are written out here, apart from the wire and the domain, so
// that neither can change by accident what scripts read. Serials are strings, because 2^53 would cut a
// number; so are kernel ids and inodes, which are 64 bits wide as well. Times are RFC 3339 in UTC. What
// is not known or does not apply is absent.

type sandboxDoc struct {
	Serial           string            `json:"serial"`
	State            string            `json:"state"`
	Owner            string            `json:"owner"`
	Epoch            string            `json:"epoch"`
	OfHost           bool              `json:"of_host"`
	Checkpoint       string            `json:"checkpoint,omitempty"`
	Claimant         *claimantDoc      `json:"claimant,omitempty"`
	Parent           string            `json:"parent,omitempty"`
	ParentCheckpoint string            `json:"parent_checkpoint,omitempty"`
	Labels           map[string]string `json:"labels,omitempty"`
	Created          *string           `json:"created,omitempty"`
	Bindings         []bindingDoc      `json:"bindings"`
	Stints           []stintDoc        `json:"stints"`
}

type bindingDoc struct {
	Serial string     `json:"serial"`
	Type   string     `json:"type"`
	Kernel *kernelDoc `json:"kernel,omitempty"`
	Parent string     `json:"parent,omitempty"`
	Bound  *string    `json:"bound,omitempty"`
	Gone   *string    `json:"gone,omitempty"`
}

type kernelDoc struct {
	BootID string `json:"boot_id"`
	ID     uint64 `json:"id,string,omitempty"`
	Inode  uint64 `json:"inode,string"`
	Weak   bool   `json:"weak"`
}

type stintDoc struct {
	Host       string  `json:"host"`
	Epoch      string  `json:"epoch"`
	From       *string `json:"from,omitempty"`
	To         *string `json:"to,omitempty"`
	Began      string  `json:"began"`
	Over       string  `json:"over,omitempty"`
	Checkpoint string  `json:"checkpoint,omitempty"`
	Actor      string  `json:"actor"`
}

type claimantDoc struct {
	Host   string `json:"host"`
	BootID string `json:"boot_id"`
	Run    string `json:"run"`
}

type checkpointDoc struct {
	Serial   string       `json:"serial"`
	State    string       `json:"state"`
	Sandbox  string       `json:"sandbox"`
	Epoch    string       `json:"epoch"`
	Source   string       `json:"source"`
	RunID    string       `json:"run_id,omitempty"`
	Digest   string       `json:"digest"`
	Claimant *claimantDoc `json:"claimant,omitempty"`
	Created  *string      `json:"created,omitempty"`
	Consumed *string      `json:"consumed,omitempty"`
}

type hostDoc struct {
	Name        string            `json:"name"`
	Incarnation string            `json:"incarnation"`
	BootID      string            `json:"boot_id"`
	Granted     uint64            `json:"granted"`
	Ranges      []rangeDoc        `json:"ranges"`
	Labels      map[string]string `json:"labels,omitempty"`
	Hello       *string           `json:"hello,omitempty"`
	// QuotaUsed is what it was granted since QuotaSince, in a window of 24 hours.
	QuotaSince *string `json:"quota_since,omitempty"`
	QuotaUsed  uint64  `json:"quota_used"`
	// Settled is the generation in which it has last said what lives on it, Waived the one in which somebody has last
	// said that nobody waits for it; 0 for none.
	Settled uint64 `json:"settled"`
	Waived  uint64 `json:"waived"`
}

type rangeDoc struct {
	First string `json:"first"`
	Last  string `json:"last"`
	Count uint64 `json:"count"`
}

type liveDoc struct {
	bindingDoc
	Sandbox string `json:"sandbox"`
	OfHost  bool   `json:"of_host"`
	// Provisional and SandboxProvisional: the pool has not committed that serial yet, it may still change.
	Provisional        bool    `json:"provisional"`
	SandboxProvisional bool    `json:"sandbox_provisional"`
	Pids               []int32 `json:"pids"`
	Command            string  `json:"command"`
}

type poolDoc struct {
	UUID       string    `json:"uuid"`
	Generation uint64    `json:"generation"`
	State      string    `json:"state"`
	Format     int       `json:"format"`
	Policy     policyDoc `json:"policy"`
	Level      *levelDoc `json:"level"` // null while the server cannot read the counter
	// Settled is whether every host has said in this generation what lives on it, or was waived; WaitsFor are those
	// that have not.
	Settled  bool     `json:"settled"`
	WaitsFor []string `json:"waits_for"`
	// Standing is null from servers without a witness.
	Standing *standingDoc `json:"standing"`
}

// standingDoc is whether the server that was asked trusts its store.
type standingDoc struct {
	Server    string     `json:"server"`
	Trusts    bool       `json:"trusts"`
	Why       string     `json:"why"`
	NotBefore *string    `json:"not_before"` // when it may take a new generation by itself
	Others    []otherDoc `json:"others"`
}

type otherDoc struct {
	Name    string  `json:"name"`
	Address string  `json:"address"`
	Says    string  `json:"says"`
	Why     string  `json:"why"`
	Asked   *string `json:"asked"`
}

func standingView(s *alloc.Standing) *standingDoc {
	if s == nil {
		return nil
	}
	d := &standingDoc{Server: s.Server, Trusts: s.Trusts, Why: s.Why, NotBefore: rfc3339(s.NotBefore), Others: []otherDoc{}}
	for _, o := range s.Others {
		d.Others = append(d.Others, otherDoc{o.Server, o.Address, string(o.Says), o.Why, rfc3339(o.Asked)})
	}
	return d
}

// levelDoc is what a pool has left. Numbers of serials are up to 2^48, which JSON keeps.
type levelDoc struct {
	Left        uint64  `json:"serials_left"`
	Generations int     `json:"generations_left"`
	Burn        float64 `json:"burn_per_second"`
	Over        float64 `json:"measured_seconds"`
	RunsOut     *string `json:"runs_out"`
}

type policyDoc struct {
	Live    string `json:"live"`
	Over    string `json:"over"`
	Unknown string `json:"unknown"`
	// UnheardWitness is new-generation or wait.
	UnheardWitness string `json:"unheard_witness"`
	// HostQuota is the most serials that a host is granted in 24 hours; 0 for no limit.
	HostQuota uint64 `json:"host_quota"`
}

func policyView(p alloc.Policy) policyDoc {
	quota, _ := p.Quota()
	return policyDoc{Live: string(p.Live), Over: string(p.Over), Unknown: string(p.Unknown), UnheardWitness: string(cmp.Or(p.UnheardWitness, alloc.UnheardNewGeneration)), HostQuota: quota}
}

// serialText is a serial, or nothing for "none".
func serialText(s alloc.Serial) string {
	if s == 0 {
		return ""
	}
	return s.String()
}

func sandboxView(s *alloc.Sandbox) sandboxDoc {
	d := sandboxDoc{
		Serial: s.Serial.String(), State: string(s.State), Owner: s.Owner, Epoch: s.Epoch.String(), OfHost: s.OfHost,
		Checkpoint: serialText(s.Checkpoint), Labels: s.Labels, Created: rfc3339(s.Created),
		Bindings: []bindingDoc{}, Stints: []stintDoc{},
	}
	if s.Claim != nil {
		d.Claimant = claimantView(&s.Claim.Claimant)
	}
	if s.Parent != nil {
		d.Parent, d.ParentCheckpoint = serialText(s.Parent.Sandbox), serialText(s.Parent.Checkpoint)
	}
	for _, b := range s.Bindings {
		d.Bindings = append(d.Bindings, bindingView(b))
	}
	for _, st := range s.Stints {
		d.Stints = append(d.Stints, stintView(st))
	}
	return d
}

func bindingView(b alloc.Binding) bindingDoc {
	d := bindingDoc{
		Serial: b.Serial.String(), Type: string(b.Type), Parent: serialText(b.Parent),
		Bound: rfc3339(b.Bound), Gone: rfc3339(b.Gone),
	}
	if k := b.Kernel; !k.IsZero() {
		d.Kernel = &kernelDoc{BootID: k.BootID, ID: k.ID, Inode: k.Inode, Weak: k.Weak}
	}
	return d
}

func stintView(st alloc.Stint) stintDoc {
	return stintDoc{
		Host: st.Host, Epoch: st.Epoch.String(), From: rfc3339(st.From), To: rfc3339(st.To),
		Began: string(st.Began), Over: string(st.Over), Checkpoint: serialText(st.Checkpoint), Actor: st.Actor,
	}
}

func claimantView(c *alloc.Claimant) *claimantDoc {
	if c == nil {
		return nil
	}
	return &claimantDoc{Host: c.Host, BootID: c.BootID, Run: c.Run}
}

func checkpointView(c *alloc.Checkpoint) checkpointDoc {
	return checkpointDoc{
		Serial: c.Serial.String(), State: string(c.State), Sandbox: c.Sandbox.String(), Epoch: c.Epoch.String(),
		Source: c.Source, RunID: c.RunID, Digest: c.Digest.String(), Claimant: claimantView(c.Claimant),
		Created: rfc3339(c.Created), Consumed: rfc3339(c.Consumed),
	}
}

func hostView(h *alloc.Host) hostDoc {
	d := hostDoc{
		Name: h.Name, Incarnation: h.Incarnation.String(), BootID: h.BootID, Granted: h.Granted.Count(),
		Ranges: []rangeDoc{}, Labels: h.Labels, Hello: rfc3339(h.Hello),
		QuotaSince: rfc3339(h.Quota.Since), QuotaUsed: h.Quota.Used,
		Settled: uint64(h.Settled), Waived: uint64(h.Waived),
	}
	for _, r := range h.Granted {
		d.Ranges = append(d.Ranges, rangeDoc{First: r.First.String(), Last: r.Last().String(), Count: r.Count})
	}
	return d
}

func liveView(n *nsallocv1.LiveNamespace) liveDoc {
	d := liveDoc{
		bindingDoc: bindingView(wire.BindingFromWire(n.GetBinding())), Sandbox: serialText(alloc.Serial(n.GetSandbox())),
		OfHost: n.GetOfHost(), Provisional: n.GetProvisional(), SandboxProvisional: n.GetSandboxProvisional(), Pids: slices.Clone(n.GetPids()), Command: n.GetCommand(),
	}
	if d.Pids == nil {
		d.Pids = []int32{}
	}
	return d
}

func poolView(p *alloc.Pool, l *alloc.Level, s *alloc.Standing, waitsFor []string) poolDoc {
	var level *levelDoc
	if l != nil {
		level = &levelDoc{Left: l.Left, Generations: l.Generations, Burn: l.Burn, Over: l.Over.Seconds(), RunsOut: rfc3339(l.RunsOut)}
	}
	return poolDoc{
		Settled: p.IsSettled(), WaitsFor: append([]string{}, waitsFor...),
		Level: level, Standing: standingView(s),
		UUID: p.UUID, Generation: uint64(p.Generation), State: string(p.State), Format: p.Format,
		Policy: policyView(p.Policy),
	}
}
