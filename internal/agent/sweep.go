package agent

import (
	"context"
	"maps"
	"time"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// sweepLoop sweeps at once when asked, and every interval.
func (a *Agent) sweepLoop(ctx context.Context) error {
	if err := a.waitJoined(ctx); err != nil {
		return nil // ctx ended
	}
	t := time.NewTicker(a.cfg.SweepInterval)
	defer t.Stop()
	unseen := map[alloc.Serial]int{}
	for {
		if err := a.sweep(ctx, unseen); err != nil && ctx.Err() == nil {
			a.log.Warn("sweep: some namespaces have to wait for the next one", "cause", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		case <-a.kick:
		}
	}
}

// sweep numbers what it sees without a serial, and notes what is gone. unseen counts the sweeps that
// did not see a binding's namespace.
func (a *Agent) sweep(ctx context.Context, unseen map[alloc.Serial]int) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	// Runs are looked at before and after: what one of them builds is never ours to number, also when
	// it began or ended during the sweep.
	before := a.runs.building()
	procs, err := a.kernel.Sweep(ctx)
	if err != nil {
		return err
	}
	done, err := a.registrar.hold(ctx)
	if err != nil {
		return err
	}
	defer done()
	if err := a.numberHost(ctx); err != nil {
		return err
	}
	left := leaveOut(procs, append(before, a.runs.building()...))
	if err := a.numberGroups(ctx, a.groups(left)); err != nil {
		return err
	}
	if err := a.noteGone(ctx, procs, unseen); err != nil {
		return err
	}
	now := time.Now()
	a.swept.Store(&now)
	return nil
}

// numberHost makes sure that the host's own namespaces have serials on this boot.
func (a *Agent) numberHost(ctx context.Context) error {
	known := a.book.ofHost(a.bootID())
	host := kernelns.Process{Namespaces: a.host}
	var add []unnumbered
	for _, t := range alloc.NamespaceTypes() {
		if k, ok := host.Namespaces[t]; ok {
			if _, ok := a.book.find(t, k); !ok {
				add = append(add, unnumbered{t, k})
			}
		}
	}
	if len(add) == 0 {
		return nil
	}
	item := alloc.RegisterItem{OfHost: known == nil}
	if known != nil {
		item.Sandbox, item.Epoch = known.Serial, known.Epoch
	} else {
		item.Labels = map[string]string{"command": "host " + a.cfg.Host}
	}
	_, err := a.registerItem(ctx, item, add, nil)
	return err
}

// registerItem gives each namespace of add a serial and commits item with them; an item without a
// sandbox makes a new one. parents names what a clone's namespaces were cloned from.
func (a *Agent) registerItem(ctx context.Context, item alloc.RegisterItem, add []unnumbered, parents map[string]alloc.Serial) (*alloc.Sandbox, error) {
	n := len(add)
	if item.Sandbox == 0 {
		n++
	}
	spend, serials, err := a.registrar.take(ctx, n)
	if err != nil {
		return nil, err
	}
	if item.Sandbox == 0 {
		item.Sandbox, serials = serials[0], serials[1:]
	}
	for i, u := range add {
		item.Add = append(item.Add, alloc.Binding{Serial: serials[i], Type: u.t, Kernel: u.k, Parent: parents[u.k.Key(u.t)]})
	}
	out, err := a.registrar.register(ctx, spend, item)
	if err != nil {
		return nil, err
	}
	a.log.Info("registered", "sandbox", item.Sandbox, "namespaces", len(add), "command", out[0].Labels["command"])
	return out[0], nil
}

// numberGroups numbers trees, one transaction each.
func (a *Agent) numberGroups(ctx context.Context, groups []group) error {
	for _, g := range groups {
		if _, err := a.numberTree(ctx, g.root, g.procs, false); err != nil {
			return err
		}
	}
	return nil
}

// numberTree makes sure that every own namespace of a tree has a serial, and returns the tree's
// sandbox; by the registrar's holder. What another sandbox holds stays there. relabel also renews the
// labels of a sandbox that was registered before its tree had its final name.
func (a *Agent) numberTree(ctx context.Context, root kernelns.Process, procs []kernelns.Process, relabel bool) (*alloc.Sandbox, error) {
	add := a.missing(procs)
	known := a.sandboxOf(root)
	labels := labelsOf(root)
	if known != nil && (known.State != alloc.StateRunning || known.OfHost) {
		if len(add) > 0 && known.OfHost {
			known = nil
		} else {
			return known, nil // in a hand-off: whoever leads that decides
		}
	}
	if known == nil {
		if len(add) == 0 {
			return nil, nil // everything belongs to others: a process that entered their namespaces
		}
		return a.registerItem(ctx, alloc.RegisterItem{Labels: labels}, add, nil)
	}
	stale := relabel && !containsLabels(known.Labels, labels)
	if len(add) == 0 && !stale {
		return known, nil
	}
	item := alloc.RegisterItem{Sandbox: known.Serial, Epoch: known.Epoch}
	if stale {
		item.Labels = labels
	}
	if len(add) == 0 {
		out, err := a.registrar.register(ctx, nil, item)
		if err != nil {
			return nil, err
		}
		return out[0], nil
	}
	return a.registerItem(ctx, item, add, nil)
}

func containsLabels(have, want map[string]string) bool {
	merged := maps.Clone(have)
	if merged == nil {
		merged = map[string]string{}
	}
	maps.Copy(merged, want)
	return maps.Equal(have, merged)
}

// noteGone ends the sandboxes whose namespaces are all gone, and marks single ones that are.
func (a *Agent) noteGone(ctx context.Context, procs []kernelns.Process, unseen map[alloc.Serial]int) error {
	live := make(map[string]bool, len(procs))
	for _, p := range procs {
		for t, k := range p.Namespaces {
			live[k.Key(t)] = true
		}
	}
	for _, s := range a.book.all() {
		if s.State != alloc.StateRunning || s.OfHost && bootOf(s) == a.bootID() || a.runs.holds(s.Serial) {
			continue
		}
		var gone []alloc.Serial
		alive := 0
		for _, b := range s.Bindings {
			switch {
			case !b.Live():
			case live[b.Kernel.Key(b.Type)]:
				delete(unseen, b.Serial)
				alive++
			case a.provenGone(b, unseen):
				gone = append(gone, b.Serial)
			default:
				alive++
			}
		}
		if err := a.reportGone(ctx, s, gone, alive); err != nil {
			return err
		}
		for _, serial := range gone {
			delete(unseen, serial)
		}
	}
	return nil
}

// missedSweeps is after how many sweeps without a task a namespace counts as gone where the kernel
// cannot tell.
const missedSweeps = 3

// provenGone reports whether a namespace that no task was seen in is gone. A name that still opens (a
// bind mount, a descriptor) proves the contrary.
func (a *Agent) provenGone(b alloc.Binding, unseen map[alloc.Serial]int) bool {
	if b.Kernel.BootID != a.bootID() {
		return true
	}
	alive, err := a.kernel.Alive(b.Type, b.Kernel)
	if err == nil {
		return !alive
	}
	unseen[b.Serial]++
	return unseen[b.Serial] >= missedSweeps
}

func (a *Agent) reportGone(ctx context.Context, s *alloc.Sandbox, gone []alloc.Serial, alive int) error {
	switch {
	case len(gone) == 0 && alive > 0:
		return nil
	case alive > 0:
		_, err := a.registrar.register(ctx, nil, alloc.RegisterItem{Sandbox: s.Serial, Epoch: s.Epoch, Gone: gone})
		return err
	}
	ended, err := a.pool.End(ctx, alloc.EndCommand{Mutation: a.registrar.mutation(), Sandbox: s.Serial, Epoch: s.Epoch})
	if err != nil {
		return a.registrar.failed(err)
	}
	a.book.put(a.cfg.Host, ended)
	a.log.Info("ended", "sandbox", s.Serial, "command", s.Labels["command"])
	return nil
}

// tree names processes to leave alone: everything below pid that was started at or after since.
type tree struct {
	pid   int
	since uint64
}

// leaveOut removes the trees that a live CRIU is building.
func leaveOut(procs []kernelns.Process, trees []tree) []kernelns.Process {
	if len(trees) == 0 {
		return procs
	}
	out := map[int]bool{}
	for _, t := range trees {
		for _, p := range kernelns.Descendants(procs, t.pid) {
			if p.StartTime >= t.since {
				out[p.PID] = true
			}
		}
	}
	var left []kernelns.Process
	for _, p := range procs {
		if !out[p.PID] {
			left = append(left, p)
		}
	}
	return left
}
