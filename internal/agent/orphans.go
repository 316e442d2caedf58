package agent

import (
	"context"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// orphanLoop deals with hand-offs of ours that no open run knows: the agent's disk was lost, or a claim
// or a dump that had been given up got through late. What is not known counts as given: the tree may
// have gone on.
func (a *Agent) orphanLoop(ctx context.Context) error {
	if err := a.waitJoined(ctx); err != nil {
		return nil // ctx ended
	}
	t := time.NewTicker(settlePause)
	defer t.Stop()
	trouble := ""
	for {
		for _, s := range a.book.all() {
			if s.State != alloc.StateDumped && s.State != alloc.StateClaimed || a.runs.holds(s.Serial) {
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
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

func (a *Agent) settleOrphan(ctx context.Context, serial alloc.Serial) error {
	done, err := a.registrar.hold(ctx)
	if err != nil {
		return err
	}
	defer done()
	s := a.book.sandbox(serial)
	if s == nil || a.runs.holds(serial) {
		return nil
	}
	m := a.registrar.mutation()
	switch s.State {
	case alloc.StateDumped:
		zero := a.runs.gaveZero(s.Checkpoint)
		var h alloc.Handoff
		if a.anyAlive(s) {
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
		pid, start, ok := parseRunKey(s.Claim.Run)
		if ok && s.Claim.BootID == a.bootID() && !a.gone(task{pid, start}) {
			return nil // its CRIU lives
		}
		if s.Claim.BootID == a.bootID() {
			left, err := a.endHalfBuilt(ctx, start)
			if err != nil || left {
				return err // given back when nothing of it is left
			}
		}
		h, err := a.pool.Release(ctx, alloc.ReleaseCommand{Mutation: m, Sandbox: s.Serial, Epoch: s.Epoch, BootID: s.Claim.BootID, Run: s.Claim.Run})
		err = a.registrar.moved(h, err)
		a.orphanSettled(h, err)
		return err
	}
	return nil
}

// endHalfBuilt ends what a restore that nobody remembers has left in CRIU's restorer: trees that no
// restore we know works on, begun since that restore's CRIU was. A tree that was answered 0 stands in the
// restorer too, until its CRIU lets it go. What is ended was seen so twice, a pause apart: a restore that
// we do not know, because the hook was not there for it, does not stand still. It reports whether
// anything may be left.
func (a *Agent) endHalfBuilt(ctx context.Context, since uint64) (left bool, err error) {
	procs, err := a.kernel.Sweep(ctx)
	if err != nil {
		return true, err
	}
	before := a.parked
	a.parked = map[task]bool{}
	for _, p := range leaveOut(procs, a.runs.restoring()) {
		t := task{p.PID, p.StartTime}
		if p.StartTime < since || p.Ended || !a.ownsNamespace(p) || isDying(t) {
			continue
		}
		switch halfBuilt(t, "") {
		case goesOn:
		case unclear:
			left = true
		case parked:
			left = true
			if a.parked[t] = true; !before[t] {
				continue
			}
			a.log.Warn("a restore that no run on disk knows left a task that never ran; ending it", "pid", p.PID, "command", p.Comm)
			if err := a.kill(t); err != nil {
				return true, err
			}
		}
	}
	return left, nil
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
