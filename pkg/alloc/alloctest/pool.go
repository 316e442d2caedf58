package alloctest

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Clock stands until it is moved. It is safe for concurrent use.
type Clock struct{ ns atomic.Int64 }

// NewClock is a clock at a fixed moment.
func NewClock() *Clock {
	c := new(Clock)
	c.ns.Store(time.Date(2026, 2, 3, 4, 5, 6, 7, time.UTC).UnixNano())
	return c
}

// Now is the clock's moment.
func (c *Clock) Now() time.Time { return time.Unix(0, c.ns.Load()).UTC() }

// Move moves the clock, also backwards.
func (c *Clock) Move(d time.Duration) { c.ns.Add(int64(d)) }

// RequestID is a UUIDv7 of a moment; n tells those of one moment apart.
func RequestID(at time.Time, n uint64) string {
	ms := fmt.Sprintf("%012x", at.UnixMilli())
	return fmt.Sprintf("%s-%s-7000-8000-%012x", ms[:8], ms[8:], n)
}

// Pool is a new pool with the use cases over its store.
type Pool struct {
	*alloc.Service
	Store alloc.Store
	Clock *Clock

	t   testing.TB
	ids atomic.Uint64 // requests and kernel identities that were made up

	seen alloc.Generation // the highest that it has had before it was put back
}

// NewPool makes a pool in an empty store. When the test ends, its records are checked.
func NewPool(t testing.TB, s alloc.Store, policy alloc.Policy) *Pool {
	t.Helper()
	p := poolOver(t, s, NewClock())
	if _, err := p.InitPool(t.Context(), policy); err != nil {
		t.Fatal(err)
	}
	return p
}

// poolOver is the use cases over a store, whose records are checked when the test ends.
func poolOver(t testing.TB, s alloc.Store, clock *Clock) *Pool {
	t.Helper()
	t.Cleanup(func() { Check(t, s) })
	return &Pool{Service: alloc.NewService(s, clock.Now), Store: s, Clock: clock, t: t}
}

// Request is a fresh request id.
func (p *Pool) Request() string { return RequestID(p.Clock.Now(), p.ids.Add(1)) }

// Agent is a host of the pool as its agent sees it.
type Agent struct {
	Pool        *Pool
	Name        string
	BootID      string
	Nonce       string
	Incarnation alloc.Incarnation
	t           testing.TB
}

// BootID is the n-th boot id of the tests.
func BootID(n int) string { return fmt.Sprintf("%08x-0000-4000-8000-000000000000", n) }

// Agent says Hello as a new host and gets a range.
func (p *Pool) Agent(name string) *Agent {
	p.t.Helper()
	a := &Agent{Pool: p, Name: name, BootID: BootID(int(p.ids.Add(1))), Nonce: name + "-0123456789abcdef", t: p.t}
	h, _, err := p.Hello(p.t.Context(), a.Hello())
	if err != nil {
		p.t.Fatal(err)
	}
	a.Incarnation = h.Incarnation
	if _, err := p.Grant(p.t.Context(), alloc.GrantCommand{Mutation: a.Mutation(), Count: 1000}); err != nil {
		p.t.Fatal(err)
	}
	return a
}

// Hello is what the agent says first.
func (a *Agent) Hello() alloc.HelloCommand {
	return alloc.HelloCommand{RequestID: a.Pool.Request(), Host: a.Name, BootID: a.BootID, Nonce: a.Nonce, Incarnation: a.Incarnation}
}

// Mutation is a fresh request of the agent's.
func (a *Agent) Mutation() alloc.Mutation {
	return alloc.Mutation{RequestID: a.Pool.Request(), Host: a.Name, Incarnation: a.Incarnation}
}

// Record is the host as the store has it.
func (a *Agent) Record() *alloc.Host {
	a.t.Helper()
	h, ok := get(a.t, a.Pool.Store, alloc.HostKey(a.Name))[0].Record.(*alloc.Host)
	if !ok {
		a.t.Fatalf("host %s is not there", a.Name)
	}
	return h
}

// Next is the front of the host's ranges, as a spend and one by one.
func (a *Agent) Next(n uint64) (alloc.Ranges, []alloc.Serial) {
	a.t.Helper()
	spend, _, ok := a.Record().Granted.Take(n)
	if !ok {
		a.t.Fatalf("host %s has less than %d serials", a.Name, n)
	}
	var each []alloc.Serial
	for s := range spend.All() {
		each = append(each, s)
	}
	return spend, each
}

// Namespace is a new one, bound to a serial.
func (a *Agent) Namespace(s alloc.Serial, of alloc.NamespaceType) alloc.Binding {
	id := a.Pool.ids.Add(1)
	return alloc.Binding{Serial: s, Type: of, Kernel: alloc.KernelID{BootID: a.BootID, ID: id, Inode: 4026531840 + id}}
}

// New registers one sandbox with a PID and a network namespace.
func (a *Agent) New() alloc.RegisterCommand {
	a.t.Helper()
	spend, s := a.Next(3)
	return alloc.RegisterCommand{Mutation: a.Mutation(), Spend: spend, Items: []alloc.RegisterItem{{
		Sandbox: s[0], Add: []alloc.Binding{a.Namespace(s[1], alloc.PID), a.Namespace(s[2], alloc.Net)}}}}
}

// Sandbox is a new sandbox that runs on the host.
func (a *Agent) Sandbox() *alloc.Sandbox {
	a.t.Helper()
	sbs, _, err := a.Pool.Register(a.t.Context(), a.New())
	if err != nil {
		a.t.Fatal(err)
	}
	return sbs[0]
}

// Open records a dump of sb.
func (a *Agent) Open(sb *alloc.Sandbox) alloc.OpenCommand {
	a.t.Helper()
	spend, s := a.Next(1)
	return alloc.OpenCommand{Mutation: a.Mutation(), Spend: spend, Sandbox: sb.Serial, Epoch: sb.Epoch, Checkpoint: s[0],
		RunID: fmt.Sprintf("dump-%s", s[0]), Digest: alloc.Digest{1}}
}

// Confirm says what was seen of the tree that h was dumped from.
func (a *Agent) Confirm(h alloc.Handoff, e alloc.Evidence) alloc.ConfirmCommand {
	return alloc.ConfirmCommand{Mutation: a.Mutation(), Sandbox: h.Sandbox.Serial, Epoch: h.Sandbox.Epoch, Checkpoint: h.Sandbox.Checkpoint, Evidence: e}
}

// Abort says that the dumped tree of h runs on.
func (a *Agent) Abort(h alloc.Handoff, zeroGiven bool) alloc.AbortCommand {
	return alloc.AbortCommand{Mutation: a.Mutation(), Sandbox: h.Sandbox.Serial, Epoch: h.Sandbox.Epoch, Checkpoint: h.Sandbox.Checkpoint, ZeroGiven: zeroGiven}
}

// Claim asks to restore the images of h's checkpoint.
func (a *Agent) Claim(h alloc.Handoff, run string) alloc.ClaimCommand {
	return alloc.ClaimCommand{Mutation: a.Mutation(), Checkpoint: h.Checkpoint.Serial, Digest: h.Checkpoint.Digest, BootID: a.BootID, Run: run}
}

// Bind says that the claimed tree of h stands, with new namespaces for all that live.
func (a *Agent) Bind(h alloc.Handoff, run string) alloc.BindCommand {
	cmd := alloc.BindCommand{Mutation: a.Mutation(), Sandbox: h.Sandbox.Serial, Epoch: h.Sandbox.Epoch, BootID: a.BootID, Run: run}
	for _, b := range h.Sandbox.Bindings {
		if b.Live() {
			cmd.Bindings = append(cmd.Bindings, a.Namespace(b.Serial, b.Type))
		}
	}
	return cmd
}

// Release gives the claim of h back.
func (a *Agent) Release(h alloc.Handoff, run string) alloc.ReleaseCommand {
	return alloc.ReleaseCommand{Mutation: a.Mutation(), Sandbox: h.Sandbox.Serial, Epoch: h.Sandbox.Epoch, BootID: a.BootID, Run: run}
}

// End says that sb's processes are gone.
func (a *Agent) End(sb *alloc.Sandbox) alloc.EndCommand {
	return alloc.EndCommand{Mutation: a.Mutation(), Sandbox: sb.Serial, Epoch: sb.Epoch}
}
