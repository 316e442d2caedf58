package agent

import (
	"context"
	"errors"
	"math"
	"slices"
	"time"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// sweepLoop sweeps at once when asked, and every interval.
func (a *Agent) sweepLoop(ctx context.Context) error {
	select {
	case <-a.joined:
	case <-a.alone:
	case <-ctx.Done():
		return nil
	}
	t := time.NewTicker(a.cfg.SweepInterval)
	defer t.Stop()
	unseen := map[alloc.Serial]int{}
	trouble := ""
	defer a.tally.tell(a.log)
	for {
		var err error
		unseen, err = a.sweep(ctx, unseen)
		switch {
		case ctx.Err() != nil:
		case err == nil:
			trouble = ""
		case trouble != err.Error(): // once, not every second
			trouble = err.Error()
			a.log.Warn("sweep: some namespaces have to wait for the next one", "cause", err)
		}
		a.tally.tell(a.log)
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		case <-a.kick:
		}
	}
}

// sweep numbers what it sees without a serial, and notes what is gone. One sandbox that the pool refuses
// does not keep the others waiting. What is gone while the pool is away is noted when it is back. unseen counts
// the sweeps that did not see a binding's namespace.
func (a *Agent) sweep(ctx context.Context, unseen map[alloc.Serial]int) (map[alloc.Serial]int, error) {
	procs, err := a.numberAll(ctx)
	if procs == nil {
		return unseen, err
	}
	if !a.away() {
		var goneErr error
		unseen, goneErr = a.noteGone(ctx, procs, unseen)
		err = errors.Join(err, goneErr)
	}
	if err == nil {
		now := time.Now()
		a.swept.Store(&now)
	}
	return unseen, err
}

// numberAll numbers what has no serial, and returns the processes that it saw. Mostly there is nothing to
// do, which a look tells that keeps nobody waiting.
func (a *Agent) numberAll(ctx context.Context) ([]kernelns.Process, error) {
	procs, err := a.kernel.Sweep(ctx)
	if err != nil || a.allNumbered(procs) {
		return procs, err
	}
	if !a.away() {
		try, cancel := a.whileReached(ctx, callTimeout)
		defer cancel()
		err := a.withNumberable(try, func(seen []kernelns.Process) error {
			err := a.numberGroups(try, a.groups(seen), alloc.MaxRegister, a.registerEach)
			if err == nil {
				a.registrar.forgetReplaced()
			}
			return err
		})
		if err == nil || ctx.Err() != nil || try.Err() == nil && !unreached(err) {
			return procs, err
		}
		if errors.Is(try.Err(), context.DeadlineExceeded) {
			a.noteTrouble(err) // nobody waits for that once more
		}
	}
	return procs, a.withNumberableAway(ctx, func(seen []kernelns.Process) error {
		return a.numberGroups(ctx, a.groups(seen), math.MaxInt, a.registrar.provide)
	})
}

// withNumberable calls do, as the registrar's holder, with the processes that may be numbered.
//
// The registrar is held from before the first process is looked at. So no restore can finish meanwhile:
// a tree that is seen half built belongs to a run that is still open when the runs are looked at.
func (a *Agent) withNumberable(ctx context.Context, do func([]kernelns.Process) error) error {
	done, err := a.registrar.hold(ctx)
	if err != nil {
		return err
	}
	defer done()
	return a.numberable(ctx, a.registerEach, do)
}

// withNumberableAway is withNumberable without the pool: what is numbered gets provisional serials.
func (a *Agent) withNumberableAway(ctx context.Context, do func([]kernelns.Process) error) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	done, err := a.registrar.holdBooks(ctx)
	if err != nil {
		return err
	}
	defer done()
	return a.numberable(ctx, a.registrar.provide, do)
}

// numberable numbers the host's own namespaces, and calls do with the processes that may be numbered.
func (a *Agent) numberable(ctx context.Context, commit func(context.Context, []wish) error, do func([]kernelns.Process) error) error {
	procs, err := a.kernel.Sweep(ctx)
	if err != nil {
		return err
	}
	if w := a.hostsWish(); w != nil {
		if err := commit(ctx, []wish{*w}); err != nil {
			return err
		}
	}
	return do(leaveOut(procs, slices.Concat(a.runs.building(), a.byClaims(alloc.StateClaimed), a.leftBehind(procs))))
}

// byClaims lists the trees that a live CRIU may be building for a sandbox of the book, in one of some states,
// that no open run knows: its record was lost. The root task is not known, so that CRIU's siblings count.
func (a *Agent) byClaims(states ...alloc.SandboxState) []tree {
	var trees []tree
	for _, s := range a.book.all() {
		if !slices.Contains(states, s.State) || a.runs.holds(s.Serial) {
			continue
		}
		if criu, ok := a.restoreOf(s); ok && !a.gone(criu) {
			trees = append(trees, below(criu), beside(criu))
		}
	}
	return trees
}

func (a *Agent) allNumbered(procs []kernelns.Process) bool {
	if len(a.missingOfHost()) > 0 {
		return false
	}
	for _, g := range a.groups(procs) {
		if _, w := a.wishOf(g.root, g.procs, false); w != nil {
			return false
		}
	}
	return true
}

func (a *Agent) missingOfHost() []unnumbered {
	var add []unnumbered
	for _, t := range alloc.NamespaceTypes() {
		if k, ok := a.host[t]; ok {
			if _, ok := a.book.find(t, k); !ok {
				add = append(add, unnumbered{t, k})
			}
		}
	}
	return add
}

// numberHost makes sure that the host's own namespaces have serials on this boot.
func (a *Agent) numberHost(ctx context.Context) error {
	w := a.hostsWish()
	if w == nil {
		return nil
	}
	_, err := a.registerOne(ctx, *w)
	return err
}

// hostsWish is what the host's own sandbox needs; nil for nothing.
func (a *Agent) hostsWish() *wish {
	known, add := a.book.ofHost(a.bootID()), a.missingOfHost()
	if len(add) == 0 {
		return nil
	}
	item := alloc.RegisterItem{OfHost: known == nil}
	if known != nil {
		item.Sandbox, item.Epoch = known.Serial, known.Epoch
	} else {
		item.Labels = map[string]string{"command": "host " + a.cfg.Host}
	}
	return &wish{item: item, add: add, keeps: true}
}

// tree names processes to leave alone: below pid, itself among them, or beside it, those that were started at
// or after since.
type tree struct {
	pid    int
	since  uint64
	beside bool
}

// below is a process and everything below it.
func below(t task) tree { return tree{pid: t.PID, since: t.Start} }

// beside is what CRIU's parent has been given since CRIU was started, by a fork that nothing was executed after:
// under a runtime that wants the tree for itself, the root task is among it. Where the runtime is gone, both are
// its reaper's, PID 1 mostly. Nothing once CRIU itself is gone.
func beside(criu task) tree { return tree{pid: criu.PID, since: criu.Start, beside: true} }

// of lists what of procs is in the tree.
func (t tree) of(procs []kernelns.Process) (list []kernelns.Process) {
	roots := []int{t.pid}
	if t.beside {
		roots = roots[:0]
		i := slices.IndexFunc(procs, func(p kernelns.Process) bool { return p.PID == t.pid && p.StartTime == t.since })
		for _, p := range procs {
			if i < 0 || p.PID == t.pid || p.PPID != procs[i].PPID || p.StartTime < t.since {
				continue
			}
			if forked, err := onlyForked(task{p.PID, p.StartTime}); forked || err != nil {
				roots = append(roots, p.PID)
			}
		}
	}
	for _, root := range roots {
		for _, p := range kernelns.Descendants(procs, root) {
			if p.StartTime >= t.since {
				list = append(list, p)
			}
		}
	}
	return list
}

// leaveOut removes the trees that a live CRIU is building.
func leaveOut(procs []kernelns.Process, trees []tree) []kernelns.Process {
	if len(trees) == 0 {
		return procs
	}
	out := map[int]bool{}
	for _, t := range trees {
		for _, p := range t.of(procs) {
			out[p.PID] = true
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
