package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/internal/killpoint"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// settle tells the pool what became of a run, by what is seen of its processes and by nothing else. It
// is the one way out of a dump or a restore, also after this agent was killed in the middle.
func (a *Agent) settle(ctx context.Context, n *run) error {
	done, err := n.hold(ctx)
	if err != nil {
		return err
	}
	defer done()
	if !n.rec.Over.IsZero() {
		return nil
	}
	criuGone, treeGone, known := a.lookAt(n)
	if !known {
		return nil // the kernel's word on the order is on its way, and settles this again
	}
	outcome := ""
	switch {
	case n.rec.Mode == modeNone || n.rec.Mode == "":
		// Nothing was taken from the pool, and the tree is none of our business.
		if criuGone {
			outcome = "over"
		}
	case n.rec.Phase == criuhook.Dump:
		outcome, err = a.settleDump(ctx, n, criuGone, treeGone)
	default:
		outcome, err = a.settleRestore(ctx, n, criuGone, treeGone)
	}
	switch alloc.ReasonOf(err) {
	case alloc.ReasonStaleEpoch, alloc.ReasonNotOwner:
		// Somebody fenced this host, or took over: what we saw counts no more.
		outcome, err = "overtaken: "+err.Error(), nil
		a.registrar.stale.Store(true)
	case alloc.ReasonSandboxNotFound, alloc.ReasonSerialNotFound, alloc.ReasonCheckpointNotFound:
		outcome, err = "the pool does not know it: "+err.Error(), nil
		a.registrar.stale.Store(true)
	}
	if err != nil || outcome == "" {
		return err
	}
	return a.end(n, outcome)
}

// end closes a run that is settled. Where that cannot be written it stays open and is settled again.
func (a *Agent) end(n *run, outcome string) error {
	n.rec.Over, n.rec.Outcome = time.Now().UTC(), outcome
	if n.rec.Mode == modeNone || n.rec.Mode == "" {
		a.runs.publish(n)
	} else {
		killpoint.At(killpoint.AgentOutcomeRecording)
		if err := a.runs.save(n); err != nil {
			n.rec.Over, n.rec.Outcome = time.Time{}, ""
			return err
		}
		killpoint.At(killpoint.AgentOutcomeRecorded)
	}
	a.unwatch(n)
	a.log.Info("run settled", "run", n.key, "phase", n.rec.Phase, "sandbox", n.rec.Sandbox, "checkpoint", n.rec.Checkpoint, "outcome", outcome)
	a.sweepSoon()
	return nil
}

// settleDump: the source's part of the table in pkg/alloc.
func (a *Agent) settleDump(ctx context.Context, n *run, criuGone, treeGone bool) (string, error) {
	switch {
	case n.rec.Checkpoint == 0:
		// It never came to committing. If the tree died, the sweep ends its sandbox.
		if criuGone {
			return "over before a checkpoint was made", nil
		}
		return "", nil
	case !treeGone && !criuGone:
		return "", nil // under way
	case !treeGone && !a.runsOn(n):
		return "", nil // killed, and on its way out: what it is evidence of is known when it is gone
	}
	s, c, err := a.pool.Sandbox(ctx, n.rec.Sandbox)
	if err != nil {
		return "", err
	}
	if s.Checkpoint != n.rec.Checkpoint || c == nil {
		// The commit has not happened, and cannot any more once the next one spends its serials. Until then
		// it may still be on its way; its loser is found out by the guard on the host's ranges.
		return a.burnCheckpoint(ctx, n)
	}
	if s.State != alloc.StateDumped {
		// Told before, by an agent that died before it had written so: what was seen then stands, and what
		// is seen now is no evidence of the dump any more.
		a.registrar.stale.Store(true)
		return fmt.Sprintf("settled before: the sandbox is %s, the images are %s", s.State, c.State), nil
	}
	evidence := a.evidence(n)
	if treeGone && evidence != alloc.SeenStopped {
		// It may have gone on, and have left others behind when it died.
		in, err := a.inhabited(ctx, s)
		if err != nil {
			return "", err
		}
		treeGone = !in
	}
	done, err := a.registrar.hold(ctx)
	if err != nil {
		return "", err
	}
	defer done()
	m := a.registrar.mutation()
	if !treeGone {
		h, err := a.pool.Abort(ctx, alloc.AbortCommand{Mutation: m, Sandbox: n.rec.Sandbox, Epoch: n.rec.Epoch, Checkpoint: n.rec.Checkpoint, ZeroGiven: n.rec.ZeroGiven})
		if err := a.registrar.moved(h, err); err != nil {
			return "", err
		}
		return fmt.Sprintf("the tree runs on here; the images are %s", h.Checkpoint.State), nil
	}
	h, err := a.pool.Confirm(ctx, alloc.ConfirmCommand{Mutation: m, Sandbox: n.rec.Sandbox, Epoch: n.rec.Epoch, Checkpoint: n.rec.Checkpoint, Evidence: evidence})
	if err := a.registrar.moved(h, err); err != nil {
		return "", err
	}
	n.rec.Evidence = evidence
	return fmt.Sprintf("the tree is gone (%s): %s, images %s", evidence, h.Sandbox.State, h.Checkpoint.State), nil
}

// burnCheckpoint makes sure that a commit whose outcome was lost can happen no more: the serials that
// it spends are spent otherwise. Then the store is looked at once more.
func (a *Agent) burnCheckpoint(ctx context.Context, n *run) (string, error) {
	done, err := a.registrar.hold(ctx)
	if err != nil {
		return "", err
	}
	defer done()
	// Where the sandbox does not run any more, what changed it has already overtaken the commit.
	if s := a.book.sandbox(n.rec.Sandbox); s != nil && s.State == alloc.StateRunning {
		a.registrar.burn(n.rec.Checkpoint)
		spend, _, err := a.registrar.take(ctx, 0)
		if err != nil {
			return "", err
		}
		if len(spend) > 0 {
			if _, err := a.registrar.register(ctx, spend, nil, alloc.RegisterItem{Sandbox: s.Serial, Epoch: s.Epoch}); err != nil {
				return "", err
			}
		}
	}
	s, _, err := a.pool.Sandbox(ctx, n.rec.Sandbox)
	if err != nil {
		return "", err
	}
	if s.Checkpoint == n.rec.Checkpoint {
		a.registrar.stale.Store(true)
		return "", errors.New("the checkpoint was committed late; it is taken back next")
	}
	return "over before a checkpoint was committed", nil
}

// evidence is what was seen of a dumped tree that is gone. The strongest kind needs the kernel's own
// order of deaths, and no sign that the tree went on.
func (a *Agent) evidence(n *run) alloc.Evidence {
	switch {
	case !n.rec.ZeroGiven:
		return alloc.NotGiven
	case n.deaths.stoppedLive() && !n.rec.Resumed:
		return alloc.SeenStopped
	default:
		return alloc.InDoubt
	}
}

// runsOn reports whether a dumped tree whose CRIU is gone goes on: twice, with a pause, one of its tasks
// was seen that is not on its way out. A task that was killed passes through a moment in which nothing
// shows it.
func (a *Agent) runsOn(n *run) bool {
	for _, t := range n.rec.Tasks {
		if !a.gone(t) && !isDying(t) {
			return a.twice(n, goesOn)
		}
	}
	n.seen = unclear
	return false
}

// settleRestore: the target's part of the table.
func (a *Agent) settleRestore(ctx context.Context, n *run, criuGone, treeGone bool) (string, error) {
	if !criuGone {
		return "", nil // under way
	}
	if !treeGone {
		tasks, err := a.tasksOf(ctx, n)
		if err != nil {
			return "", err
		}
		switch a.fateOf(n, tasks) {
		case parked:
			if a.twice(n, parked) {
				a.lookAgain(n)
				err = a.killParked(n, tasks)
			}
			return "", err // settled when it is seen dead
		case unclear:
			n.seen = unclear
			a.lookAgain(n)
			return "", nil
		}
		if !n.rec.ZeroGiven && n.rec.Mode == modeOwn {
			if !a.twice(n, goesOn) {
				return "", nil // killed perhaps, in the moment in which nothing shows it
			}
			return a.ranUnasked(ctx, n)
		}
	}
	if n.rec.ZeroGiven || n.rec.Mode != modeOwn {
		// The tree may have run: its end is an end, which the sweep notes.
		return "restored", nil
	}
	return a.giveBack(ctx, n)
}

// giveBack releases the claim, or the binding, of a restore of which nothing ever ran and nothing is
// left.
func (a *Agent) giveBack(ctx context.Context, n *run) (string, error) {
	s, _, err := a.pool.Sandbox(ctx, n.rec.Sandbox)
	if err != nil {
		return "", err
	}
	me := alloc.Claimant{Host: a.cfg.Host, BootID: n.rec.BootID, Run: runKey(n.rec.CRIUPID, n.rec.CRIUStart)}
	if s.Claim == nil || s.Claim.Claimant != me {
		// A claim that was lost on its way and still gets through is found among the orphans.
		a.registrar.stale.Store(true)
		return "over without a claim", nil
	}
	done, err := a.registrar.hold(ctx)
	if err != nil {
		return "", err
	}
	defer done()
	h, err := a.pool.Release(ctx, alloc.ReleaseCommand{
		Mutation: a.registrar.mutation(), Sandbox: s.Serial, Epoch: s.Epoch, BootID: me.BootID, Run: me.Run,
	})
	if err := a.registrar.moved(h, err); err != nil {
		return "", err
	}
	return fmt.Sprintf("nothing ran: the sandbox is %s again", h.Sandbox.State), nil
}

// killParked ends a tree that CRIU left parked in its restorer. Whether 0 was answered does not matter:
// nobody was left to act on it. That is on disk before the tree is killed, or the agent that finds it
// dead would take it for one that ran.
func (a *Agent) killParked(n *run, tasks []task) error {
	if n.rec.ZeroGiven {
		n.rec.ZeroGiven, n.rec.Closed = false, true
		killpoint.At(killpoint.AgentParkedRecording)
		if err := a.runs.save(n); err != nil {
			n.rec.ZeroGiven = true
			return err
		}
		killpoint.At(killpoint.AgentParkedRecorded)
	}
	a.log.Warn("CRIU is gone and left a tree that never ran; ending it", "run", n.key, "tasks", len(tasks))
	killpoint.At(killpoint.AgentParkedEnding)
	for _, t := range tasks {
		if err := a.kill(t); err != nil {
			return err
		}
	}
	killpoint.At(killpoint.AgentParkedEnded)
	return nil
}

// kill ends one task, by a pidfd that was proven to be it.
func (a *Agent) kill(t task) error {
	fd, err := a.kernel.OpenPID(t.PID, t.Start)
	if err != nil {
		if isGone(err) {
			return nil
		}
		return err
	}
	defer fd.Close()
	if err := unix.PidfdSendSignal(int(fd.Fd()), unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("end parked task %d: %w", t.PID, err)
	}
	return nil
}
