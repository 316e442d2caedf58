package agent

import (
	"context"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// maxAgainBindings bounds the namespaces of one request that registers again; one sandbox may have more.
const maxAgainBindings = 4096

// owned reads the pool's records for this host. In a generation that the host has not been in before, it says first
// what the host has: what is read after that is what the pool has made of it. g is the generation in which the records
// say what lives here, 0 where nobody was asked in it: then they are believed. By the registrar's holder.
func (r *registrar) owned(ctx context.Context, host *alloc.Host, pool *alloc.Pool) (list []*alloc.Sandbox, g alloc.Generation, err error) {
	a := r.a
	var owned []*alloc.Sandbox
	r.lend(func() { owned, err = a.pool.Owned(ctx, a.cfg.Host) })
	if err != nil || pool.Generation <= 1 || host.Settled >= pool.Generation {
		return owned, pool.Generation, err
	}
	err = r.registerAgain(ctx, host, pool, owned)
	if status.Code(err) == codes.Unimplemented {
		a.log.Warn("the server is of a version that knows nothing of registering again: what its store has forgotten gets fresh serials", "generation", pool.Generation)
		return owned, 0, nil
	}
	if err != nil {
		return nil, 0, r.failed(err)
	}
	r.lend(func() { list, err = a.pool.Owned(ctx, a.cfg.Host) })
	return list, pool.Generation, err
}

// registerAgain says what lives on this host, until everything is said. Dying on any line of it leaves a host
// that is not settled: the next agent begins anew, with what the ledger has and the pool does not have yet.
func (r *registrar) registerAgain(ctx context.Context, host *alloc.Host, pool *alloc.Pool, owned []*alloc.Sandbox) error {
	items, places, err := r.a.toRegisterAgain(ctx, pool.Generation, owned)
	if err != nil {
		return err
	}
	r.a.log.Warn("the pool is in a generation that this host has not been in: it registers again what lives here", "generation", pool.Generation, "sandboxes", len(items))
	most, refused := alloc.MaxRegister, 0
	for {
		n, bindings := 0, 0
		for n < min(len(items), most) && (n == 0 || bindings+len(items[n].Bindings) <= maxAgainBindings) {
			if items[n].From, err = r.a.partedFrom(ctx, items[n], places); err != nil {
				return err
			}
			bindings += len(items[n].Bindings)
			n++
		}
		last := n == len(items)
		cmd := alloc.AgainCommand{Mutation: alloc.Mutation{Host: r.a.cfg.Host, Incarnation: host.Incarnation}, Items: items[:n], Last: last}
		var answers []alloc.AgainAnswer
		r.lend(func() { answers, err = r.a.pool.RegisterAgain(ctx, cmd) })
		if alloc.ReasonOf(err) == alloc.ReasonTooLarge && n > 1 {
			most = n / 2
			continue
		}
		if err != nil {
			return err
		}
		for i, a := range answers {
			switch it := items[i]; {
			case a.Err == nil:
			case it.Over || it.Dump != nil:
				r.a.log.Debug("what was done here with a sandbox is known, or has been overtaken", "sandbox", it.Sandbox, "epoch", it.Epoch, "cause", a.Err)
			default:
				refused++
				r.lost(it, a)
			}
		}
		if items = items[n:]; last {
			break
		}
	}
	if refused > 0 {
		r.a.tally.lost.Add(int64(refused))
	}
	return nil
}

// lost says that a sandbox of ours has gone on elsewhere, or is over: what lives of it here is a clone from now on.
// The next sweep gives that fresh serials.
func (r *registrar) lost(it alloc.AgainItem, a alloc.AgainAnswer) {
	now := "nowhere"
	if a.Sandbox != nil {
		now = string(a.Sandbox.State) + " on host " + a.Sandbox.Owner + " in epoch " + a.Sandbox.Epoch.String()
	}
	r.a.log.Error("a sandbox that lives here is another one's by the pool's records, or over: what lives here is a clone of it from now on, and gets fresh serials",
		"sandbox", it.Sandbox, "epoch", it.Epoch, "namespaces", len(it.Bindings), "command", it.Labels["command"], "now", now, "cause", a.Err)
	for _, b := range it.Bindings {
		r.replaced[b.Kernel.Key(b.Type)] = b.Serial
	}
}

// toRegisterAgain is what lives here of before generation g, as this agent has it. owned is what the pool says is
// here: what of it was registered again by an agent that died is left out, and where there is no ledger it tells
// what was here, as far as it is known. places says in which sandbox the pool's records for this host have a serial.
func (a *Agent) toRegisterAgain(ctx context.Context, g alloc.Generation, owned []*alloc.Sandbox) (items []alloc.AgainItem, places map[alloc.Serial]alloc.Serial, err error) {
	procs, err := a.kernel.Sweep(ctx)
	if err != nil {
		return nil, nil, err
	}
	l := newLiving(a, procs)
	var known []*alloc.Sandbox
	done := map[alloc.Serial]bool{}
	places = map[alloc.Serial]alloc.Serial{}
	for _, s := range owned {
		if s.Again >= g {
			done[s.Serial] = true
		}
		for _, b := range s.Bindings {
			places[b.Serial] = s.Serial
		}
	}
	for _, s := range a.book.all() {
		if !a.book.isProvisional(s.Serial) && !a.book.isAbsent(s) {
			known = append(known, s)
		}
	}
	if a.registrar.known {
		known = sinceLedger(known, owned, a.cfg.Host, a.registrar.seen.Spent)
	} else {
		known = append(known, owned...) // the state was lost
	}
	for _, s := range known {
		if done[s.Serial] || s.Epoch.Generation() >= g || s.State != alloc.StateRunning && s.State != alloc.StateDumped {
			continue
		}
		it := alloc.AgainItem{Sandbox: s.Serial, Epoch: s.Epoch, Labels: s.Labels, OfHost: s.OfHost, Checkpoint: s.Checkpoint, Parent: s.Parent, Created: s.Created}
		for _, b := range s.Bindings {
			if _, committed := places[b.Serial]; (committed || !a.book.isProvisional(b.Serial)) && b.Live() && l.take(b) {
				b.Extra = nil
				it.Bindings = append(it.Bindings, b)
			}
		}
		if len(it.Bindings) == 0 {
			continue
		}
		items = append(items, it)
	}
	return a.addDeeds(items, g, done), places, nil
}

// sinceLedger is known with what the pool has numbered here from what the ledger takes for unspent: the agent died, or
// its disk took nothing more, between that and the ledger. A host spends its serials in their order, so that of what began
// here those after spent are newer than the ledger; what is older and not in it is over, or elsewhere.
func sinceLedger(known, owned []*alloc.Sandbox, host string, spent alloc.Serial) []*alloc.Sandbox {
	at := map[alloc.Serial]int{}
	for i, s := range known {
		at[s.Serial] = i
	}
	for _, s := range owned {
		if len(s.Stints) != 1 || s.Stints[0].Host != host || s.Stints[0].Began == alloc.BeganAgain {
			continue // it may have serials of other hosts
		}
		i, ok := at[s.Serial]
		switch {
		case !ok && s.Serial > spent:
			known = append(known, s)
		case ok:
			more := *known[i]
			more.Bindings = slices.Clone(more.Bindings)
			for _, b := range s.Bindings {
				if _, has := more.Binding(b.Serial); !has && b.Serial > spent {
					more.Bindings = append(more.Bindings, b)
				}
			}
			known[i] = &more
		}
	}
	return known
}

// partedFrom are the sandboxes in whose records the pool has serials of an item: the namespaces parted from them, and
// the store has forgotten that. Only such a one has a serial before its sandbox's.
func (a *Agent) partedFrom(ctx context.Context, it alloc.AgainItem, places map[alloc.Serial]alloc.Serial) (from []alloc.Serial, err error) {
	for _, b := range it.Bindings {
		at := places[b.Serial]
		if at == 0 && b.Serial < it.Sandbox {
			var s *alloc.Sandbox
			a.registrar.lend(func() { s, _, err = a.pool.Sandbox(ctx, b.Serial) })
			switch {
			case notThere(err):
				continue
			case err != nil:
				return nil, err
			}
			at = s.Serial
		}
		if at != 0 && at != it.Sandbox && !slices.Contains(from, at) {
			from = append(from, at)
		}
	}
	return from, nil
}

// compare holds the book against what the pool says is ours, before that takes its place; by the holder. One that the
// pool has in an older epoch than we had it in shows a store that has lost history, and nobody may have noticed: the
// next Hello says so, and the book stays. One that the pool does not know any more was put aside by an operator: what
// lives of it is nobody's from here on, so that the next sweep registers it anew, and that is said loudly.
func (r *registrar) compare(ctx context.Context, owned []*alloc.Sandbox, pool *alloc.Pool) error {
	a := r.a
	now := map[alloc.Serial]*alloc.Sandbox{}
	for _, s := range owned {
		now[s.Serial] = s
	}
	for _, s := range a.book.all() {
		if a.book.isProvisional(s.Serial) || a.book.isAbsent(s) {
			continue
		}
		found := now[s.Serial]
		if found == nil {
			var err error
			r.lend(func() { found, _, err = a.pool.Sandbox(ctx, s.Serial) })
			// Its serial can be of another sandbox as well: a clash is what was mended.
			if notThere(err) || err == nil && found.Serial != s.Serial {
				a.log.Error("the pool does not know a sandbox of this host any more: it was put aside (nsalloc mend); what lives of it gets fresh serials",
					"sandbox", s.Serial, "namespaces", len(s.Bindings), "command", s.Labels["command"])
				continue
			}
			if unreached(err) {
				return err
			}
			if err != nil {
				continue // nobody can read it; check names it
			}
		}
		if found.Epoch < s.Epoch && pool.Generation == r.seen.Generation {
			r.seen.Sandbox, r.seen.Epoch = s.Serial, s.Epoch
			return &alloc.Error{Reason: alloc.ReasonRecovering, Subject: "sandbox " + s.Serial.String(),
				Msg: "this host has had it in epoch " + s.Epoch.String() + ", and the pool has it in epoch " + found.Epoch.String() + ": its store has lost history"}
		}
	}
	return nil
}

// living tells which namespaces live, each once: an identity may be used again by the kernel.
type living struct {
	a     *Agent
	seen  map[string]bool // alloc.KernelID.Key of all that a task is in
	taken map[string]bool
}

func newLiving(a *Agent, procs []kernelns.Process) *living {
	l := &living{a: a, seen: map[string]bool{}, taken: map[string]bool{}}
	for _, p := range procs {
		for t, k := range p.Namespaces {
			l.seen[k.Key(t)] = true
		}
	}
	return l
}

// take reports whether the namespace of a binding lives, as far as that can be told, and no other binding has it.
func (l *living) take(b alloc.Binding) bool {
	key := b.Kernel.Key(b.Type)
	if b.Kernel.BootID != l.a.bootID() || l.taken[key] {
		return false
	}
	alive := l.seen[key]
	if !alive && l.a.registrar.known {
		there, err := l.a.kernel.Alive(b.Type, b.Kernel)
		alive = there || err != nil // the sweep finds out
	}
	l.taken[key] = alive
	return alive
}

// sees notes what the pool says is left, before it is taken for what is left.
func (r *registrar) sees(left alloc.Ranges) {
	for _, x := range left {
		r.seen.Highest = max(r.seen.Highest, x.Last())
	}
	switch {
	case len(left) > 0 && left[0].First.Counter() > 1:
		r.seen.Spent = max(r.seen.Spent, left[0].First-1)
	case len(left) == 0 && len(r.ranges) > 0:
		r.seen.Spent = max(r.seen.Spent, r.ranges[len(r.ranges)-1].Last())
	}
}
