package agent

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// orphanLoop deals with hand-offs of ours that no open run knows: the agent's disk was lost, or a claim
// or a dump that had been given up got through late. What is not known counts as given: the tree may
// have gone on, but where it is seen parked.
func (a *Agent) orphanLoop(ctx context.Context) error {
	if err := a.waitJoined(ctx); err != nil {
		return nil // ctx ended
	}
	t := time.NewTimer(settlePause)
	defer t.Stop()
	trouble := ""
	for {
		for _, s := range a.book.all() {
			if !a.mayBeOrphan(s) {
				continue
			}
			try, cancel := context.WithTimeout(ctx, callTimeout)
			err := a.settleOrphan(try, s.Serial)
			cancel()
			if err != nil && ctx.Err() == nil && err.Error() != trouble {
				trouble = err.Error()
				a.log.Warn("a hand-off that no run on disk knows is not settled yet", "sandbox", s.Serial, "cause", err)
			}
		}
		over := func(s alloc.Serial, _ alloc.Epoch) bool { return a.book.sandbox(s) == nil }
		maps.DeleteFunc(a.stood, over)
		maps.DeleteFunc(a.ran, over)
		maps.DeleteFunc(a.left, func(s alloc.Serial, _ *leftTasks) bool {
			now := a.book.sandbox(s)
			return now == nil || now.State != alloc.StateClaimed
		})
		t.Reset(settlePause) // a whole pause, however long the looks took
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// mayBeOrphan reports whether a sandbox is in a hand-off that no open run knows; or was restored, and has
// not been seen to run since.
func (a *Agent) mayBeOrphan(s *alloc.Sandbox) bool {
	switch s.State {
	case alloc.StateDumped, alloc.StateClaimed:
		return !a.runs.holds(s.Serial)
	case alloc.StateRunning:
		_, ok := a.restoreOf(s)
		return ok && a.ran[s.Serial] != s.Epoch && !a.runs.holds(s.Serial) && !a.book.isAbsent(s)
	}
	return false
}

func (a *Agent) settleOrphan(ctx context.Context, serial alloc.Serial) error {
	done, err := a.registrar.hold(ctx)
	if err != nil {
		return err
	}
	defer done()
	s := a.book.sandbox(serial)
	if s == nil || !a.mayBeOrphan(s) {
		return nil // it changed since it was looked at
	}
	m := a.registrar.mutation()
	switch s.State {
	case alloc.StateDumped:
		zero := a.runs.gaveZero(s.Checkpoint)
		var h alloc.Handoff
		if seen := a.runs.seenOf(s.Checkpoint); seen != "" { // told before, and the store has forgotten it
			h, err = a.pool.Confirm(ctx, alloc.ConfirmCommand{Mutation: m, Sandbox: s.Serial, Epoch: s.Epoch, Checkpoint: s.Checkpoint, Evidence: seen})
		} else if !a.book.isAbsent(s) && a.anyAlive(s) {
			h, err = a.pool.Abort(ctx, alloc.AbortCommand{Mutation: m, Sandbox: s.Serial, Epoch: s.Epoch, Checkpoint: s.Checkpoint, ZeroGiven: zero})
		} else {
			evidence := alloc.InDoubt
			if !zero {
				evidence = alloc.NotGiven
			}
			h, err = a.pool.Confirm(ctx, alloc.ConfirmCommand{Mutation: m, Sandbox: s.Serial, Epoch: s.Epoch, Checkpoint: s.Checkpoint, Evidence: evidence})
		}
		err = a.registrar.moved(h, err)
		a.orphanSettled(h, err)
		return err
	case alloc.StateClaimed:
		if s.Claim.BootID == a.bootID() {
			criu, ok := a.restoreOf(s)
			if ok && !a.gone(criu) {
				return nil // its CRIU lives
			}
			left, err := a.endHalfBuilt(ctx, s, criu.Start)
			if err != nil || left {
				return err // given back when nothing of it is left
			}
		}
		h, err := a.pool.Release(ctx, alloc.ReleaseCommand{Mutation: m, Sandbox: s.Serial, Epoch: s.Epoch, BootID: s.Claim.BootID, Run: s.Claim.Run})
		err = a.registrar.moved(h, err)
		a.orphanSettled(h, err)
		return err
	case alloc.StateRunning:
		return a.endParked(ctx, s)
	}
	return nil
}

// endParked takes a restore back that was committed, that nobody remembers, and whose CRIU has left the tree
// parked: it is ended and seen dead before anything but us may look, because a dead tree says no more that
// it never ran. If we die in between, or the pool is away, it counts as one that ran and ended: its images
// stay consumed. A tree that was seen to run is not looked at again. A restore without a claim took nothing
// that could go back: the sweep ends its sandbox. By the registrar's holder.
func (a *Agent) endParked(ctx context.Context, s *alloc.Sandbox) error {
	criu, ok := a.restoreOf(s)
	if !ok || !a.gone(criu) {
		return nil // its CRIU lives
	}
	tasks, err := a.inhabitants(ctx, s)
	if err != nil || len(tasks) == 0 {
		return err // the sweep's
	}
	for _, t := range tasks {
		fate := halfBuilt(t, "")
		if fate == goesOn {
			a.ran[s.Serial] = s.Epoch
			return nil
		}
		if by, err := tracer(t); fate == unclear || err != nil || by != 0 {
			delete(a.stood, s.Serial)
			return nil
		}
	}
	if a.stood[s.Serial] != s.Epoch {
		a.stood[s.Serial] = s.Epoch // it has to be seen so twice, a pause apart
		return nil
	}
	delete(a.stood, s.Serial)
	a.log.Warn("a restore that no run on disk knows was committed and left a tree that never ran; ending it", "sandbox", s.Serial, "tasks", len(tasks))
	for _, t := range tasks {
		if err := a.kill(t); err != nil {
			return err
		}
	}
	if err := a.seeDead(ctx, tasks); err != nil {
		return err
	}
	if left, err := a.inhabited(ctx, s); err != nil || left {
		return err // somebody entered meanwhile: it is a sandbox in which something runs
	}
	if s.Claim == nil {
		a.sweepSoon()
		return nil
	}
	h, err := a.pool.Release(ctx, alloc.ReleaseCommand{Mutation: a.registrar.mutation(), Sandbox: s.Serial, Epoch: s.Epoch, BootID: s.Claim.BootID, Run: s.Claim.Run})
	err = a.registrar.moved(h, err)
	a.orphanSettled(h, err)
	return err
}

// seeDead waits until tasks that were killed are gone.
func (a *Agent) seeDead(ctx context.Context, tasks []task) error {
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for {
		i := slices.IndexFunc(tasks, func(t task) bool { return !a.gone(t) })
		if i < 0 {
			return nil
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("task %d was killed and is still there (see its state in /proc/%d/stack): %w", tasks[i].PID, tasks[i].PID, context.Cause(ctx))
		}
	}
}

// leftTasks is what the last looks for what a restore has left half built saw.
type leftTasks struct {
	looks map[task]looks
	told  string // what was said that keeps the claim
}

// looks counts in how many looks in a row, up to the last, a task was there, and was to be ended.
type looks struct{ there, clear int }

// tellAfter is in how many looks in a row a task has to keep a claim until that is said: most go by themselves.
const tellAfter = 5

// endHalfBuilt ends what the restore of a claim that nobody remembers has left half built: trees that no restore
// we know works on, begun since that restore's CRIU was. A tree that was answered 0 stands in the restorer
// too, until its CRIU lets it go. What is ended was seen so twice, a pause apart: a restore that we do not
// know, because the hook was not there for it, does not stand still. What may be somebody's is left alone, and
// the claim with it. It reports whether anything may be left.
func (a *Agent) endHalfBuilt(ctx context.Context, s *alloc.Sandbox, since uint64) (left bool, err error) {
	procs, err := a.kernel.Sweep(ctx)
	if err != nil {
		return true, err
	}
	before := a.left[s.Serial]
	if before == nil {
		before = &leftTasks{}
	}
	now := &leftTasks{looks: map[task]looks{}, told: before.told}
	a.left[s.Serial] = now
	known, besides := apart(append(a.runs.restoring(), a.byClaims(alloc.StateClaimed, alloc.StateRunning)...))
	around := a.lookAround(procs, known, besides, s.Claim.Exe)
	var ended []task
	keeps := ""
	for _, p := range leaveOut(procs, known) {
		t := task{p.PID, p.StartTime}
		if p.StartTime < since || p.Ended || !a.ownsNamespace(p) || isDying(t) {
			continue
		}
		doubt := "what it waits for is not a step of CRIU's"
		switch halfBuiltBy(p, s.Claim.Exe) {
		case goesOn:
			continue
		case parked:
			doubt = around.doubt(p)
		}
		left = true
		seen := looks{there: before.looks[t].there + 1}
		if doubt == "" {
			seen.clear = before.looks[t].clear + 1
		}
		now.looks[t] = seen
		if doubt != "" && seen.there >= tellAfter && keeps == "" {
			keeps = fmt.Sprintf("process %d (%s) may be left of it, and is not ended because %s", p.PID, p.Comm, doubt)
		}
		if seen.clear < 2 {
			continue
		}
		a.log.Warn("a restore that no run on disk knows left a task that never ran; ending it", "sandbox", s.Serial, "pid", p.PID, "command", p.Comm)
		if err := a.kill(t); err != nil {
			return true, err
		}
		ended = append(ended, t)
	}
	if keeps != "" && keeps != now.told {
		now.told = keeps
		a.log.Warn("the claim of a restore that no run on disk knows, and whose CRIU is gone, cannot be given back yet", "sandbox", s.Serial, "cause", keeps,
			"fix", "look who needs that process: ps -o pid,ppid,lstart,args -p PID; if nobody does, kill -KILL it, and the claim goes back; a reboot of the host gives it back too")
	}
	return left, a.seeDead(ctx, ended)
}

// apart parts what a CRIU certainly makes, what is below it or was named to us, from what it may.
func apart(trees []tree) (certain, possible []tree) {
	for _, t := range trees {
		if t.beside {
			possible = append(possible, t)
		} else {
			certain = append(certain, t)
		}
	}
	return certain, possible
}

func (a *Agent) orphanSettled(h alloc.Handoff, err error) {
	if err == nil {
		a.log.Warn("a hand-off that no open run knows was settled", "sandbox", h.Sandbox.Serial, "state", h.Sandbox.State, "images", h.Checkpoint.State)
		a.sweepSoon()
	}
}

// anyAlive reports whether a namespace of the sandbox still is there, or may be.
func (a *Agent) anyAlive(s *alloc.Sandbox) bool {
	for _, b := range s.Bindings {
		if !b.Live() || b.Kernel.BootID != a.bootID() {
			continue
		}
		if alive, err := a.kernel.Alive(b.Type, b.Kernel); alive || err != nil {
			return true
		}
	}
	return false
}
