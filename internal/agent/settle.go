package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// settlePause is the pause between two looks at what is not settled.
const settlePause = time.Second

// settleLoop looks at every open run again and again, so that what could not be told to the pool is
// told later, and what nobody watches is seen all the same.
func (a *Agent) settleLoop(ctx context.Context) error {
	if err := a.waitJoined(ctx); err != nil {
		return nil // ctx ended
	}
	t := time.NewTicker(settlePause)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case n := <-a.settleNow:
			a.settleSoon(ctx, n)
		case <-t.C:
			for _, n := range a.runs.open() {
				a.settleSoon(ctx, n)
			}
			a.settleOrphans(ctx)
			a.runs.forget()
		}
	}
}

// settleAsk has a run settled by the loop, soon.
func (a *Agent) settleAsk(n *run) {
	select {
	case a.settleNow <- n:
	default: // the loop comes by within its pause
	}
}

// settleSoon settles one run now; what fails is tried again by the loop.
func (a *Agent) settleSoon(ctx context.Context, n *run) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := a.settle(ctx, n); err != nil && ctx.Err() == nil {
		a.log.Warn("a run is not settled yet", "run", n.key, "cause", err)
	}
}

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
	case n.rec.Mode == modeNone || n.rec.Mode == "" || n.rec.Mode == modeAdopt || n.rec.Mode == modeClone:
		// Nothing was taken from the pool that could have to go back. The sweep sees whether it lives.
		if criuGone {
			outcome = "over"
		}
	case n.rec.Phase == criuhook.Dump:
		outcome, err = a.settleDump(ctx, n, criuGone, treeGone)
	default:
		outcome, err = a.settleRestore(ctx, n, criuGone, treeGone)
	}
	if alloc.ReasonOf(err) == alloc.ReasonStaleEpoch || alloc.ReasonOf(err) == alloc.ReasonNotOwner {
		// Somebody fenced this host, or took over: what we saw counts no more.
		outcome, err = "overtaken: "+err.Error(), nil
		a.registrar.stale.Store(true)
	}
	if err != nil || outcome == "" {
		return err
	}
	n.rec.Over, n.rec.Outcome = time.Now().UTC(), outcome
	a.log.Info("run settled", "run", n.key, "phase", n.rec.Phase, "sandbox", n.rec.Sandbox, "checkpoint", n.rec.Checkpoint, "outcome", outcome)
	a.sweepSoon()
	if n.rec.Mode == modeNone || n.rec.Mode == "" {
		a.runs.publish(n)
		return nil
	}
	return a.runs.save(n)
}

// lookAt says whether a run's CRIU and its tree are gone. known is false while the kernel has more to
// say on the order: what is seen by looking is not ahead of what was told.
func (a *Agent) lookAt(n *run) (criuGone, treeGone, known bool) {
	if n.rec.BootID != a.bootID() {
		return true, true, true
	}
	criuGone = a.gone(task{n.rec.CRIUPID, n.rec.CRIUStart})
	treeGone = a.treeGone(n)
	watched, toldGone, left, _ := n.deaths.look()
	if watched && (criuGone != toldGone || treeGone && left > 0) {
		return criuGone, treeGone, false
	}
	return criuGone, treeGone, true
}

// treeGone reports whether every task of the tree is over. A tree that was never seen is gone: nothing
// was there.
func (a *Agent) treeGone(n *run) bool {
	for _, t := range n.rec.Tasks {
		if !a.gone(t) {
			return false
		}
	}
	return n.rec.Init.PID == 0 || a.gone(n.rec.Init)
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
	evidence := a.evidence(n)
	h, err := a.pool.Confirm(ctx, alloc.ConfirmCommand{Mutation: m, Sandbox: n.rec.Sandbox, Epoch: n.rec.Epoch, Checkpoint: n.rec.Checkpoint, Evidence: evidence})
	if err := a.registrar.moved(h, err); err != nil {
		return "", err
	}
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
	if s := a.book.sandbox(n.rec.Sandbox); s != nil && s.State == alloc.StateRunning {
		a.registrar.burn(n.rec.Checkpoint)
		spend, _, err := a.registrar.take(ctx, 0)
		if err != nil {
			return "", err
		}
		if len(spend) == 0 {
			return "over before a checkpoint was committed", nil
		}
		if _, err := a.registrar.register(ctx, spend, alloc.RegisterItem{Sandbox: s.Serial, Epoch: s.Epoch}); err != nil {
			return "", err
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
	_, _, _, stoppedLive := n.deaths.look()
	switch {
	case !n.rec.ZeroGiven:
		return alloc.NotGiven
	case stoppedLive && !n.rec.Resumed:
		return alloc.SeenStopped
	default:
		return alloc.InDoubt
	}
}

// secondLook is the pause between the two looks that it takes to call a tree running: a task that was
// killed passes through a moment in which nothing shows it.
const secondLook = 200 * time.Millisecond

// runsOn reports whether a tree whose CRIU is gone goes on: twice, with a pause, one of its tasks was
// seen that is not on its way out.
func (a *Agent) runsOn(n *run) bool {
	for _, t := range n.rec.Tasks {
		if a.gone(t) || isDying(t) {
			continue
		}
		if n.ranSince.IsZero() {
			n.ranSince = time.Now()
			time.AfterFunc(secondLook, func() { a.settleAsk(n) })
		}
		return time.Since(n.ranSince) >= secondLook
	}
	n.ranSince = time.Time{}
	return false
}

// settleRestore: the target's part of the table.
func (a *Agent) settleRestore(ctx context.Context, n *run, criuGone, treeGone bool) (string, error) {
	if !criuGone {
		return "", nil // under way
	}
	if n.rec.ZeroGiven {
		// The tree may have run: its end is an end, which the sweep notes.
		return "restored", nil
	}
	if !treeGone {
		// No 0 was ever answered, so CRIU never let it go: it is parked and will never run.
		if err := a.killTree(n); err != nil {
			return "", err
		}
		return "", nil // settled when it is seen dead
	}
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

// killTree ends a tree that CRIU left parked in its restorer.
func (a *Agent) killTree(n *run) error {
	tasks := n.rec.Tasks
	if len(tasks) == 0 && n.rec.Init.PID != 0 {
		tasks = []task{n.rec.Init}
	}
	a.log.Warn("CRIU is gone and left a tree that never ran; ending it", "run", n.key, "tasks", len(tasks))
	for _, t := range tasks {
		fd, err := a.kernel.OpenPID(t.PID, t.Start)
		if err != nil {
			continue // it is gone
		}
		err = unix.PidfdSendSignal(int(fd.Fd()), unix.SIGKILL, nil, 0)
		fd.Close()
		if err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("end parked task %d: %w", t.PID, err)
		}
	}
	return nil
}

// settleOrphans deals with hand-offs of ours that no run on disk knows: the disk was lost. What is not
// known counts as given: the tree may have gone on.
func (a *Agent) settleOrphans(ctx context.Context) {
	for _, s := range a.book.all() {
		if s.State != alloc.StateDumped && s.State != alloc.StateClaimed || a.runs.holds(s.Serial) {
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		if err := a.settleOrphan(ctx, s.Serial); err != nil && ctx.Err() == nil {
			a.log.Warn("a hand-off that no run on disk knows is not settled yet", "sandbox", s.Serial, "cause", err)
		}
		cancel()
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
		if a.anyAlive(s) {
			h, err := a.pool.Abort(ctx, alloc.AbortCommand{Mutation: m, Sandbox: s.Serial, Epoch: s.Epoch, Checkpoint: s.Checkpoint, ZeroGiven: true})
			return a.registrar.moved(h, err)
		}
		h, err := a.pool.Confirm(ctx, alloc.ConfirmCommand{Mutation: m, Sandbox: s.Serial, Epoch: s.Epoch, Checkpoint: s.Checkpoint, Evidence: alloc.InDoubt})
		return a.registrar.moved(h, err)
	case alloc.StateClaimed:
		pid, start, ok := parseRunKey(s.Claim.Run)
		if ok && s.Claim.BootID == a.bootID() && !a.gone(task{pid, start}) {
			return nil // its CRIU lives
		}
		h, err := a.pool.Release(ctx, alloc.ReleaseCommand{Mutation: m, Sandbox: s.Serial, Epoch: s.Epoch, BootID: s.Claim.BootID, Run: s.Claim.Run})
		return a.registrar.moved(h, err)
	}
	return nil
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

// isDying reads from /proc whether a task has a SIGKILL pending or is on its way out: then it never
// runs a line of its program again.
func isDying(t task) bool {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", t.PID))
	if err != nil {
		return true
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", t.PID))
	return err != nil || pendingKill(status) || exiting(stat)
}

// pendingKill reads SigPnd and ShdPnd: bit 8 is SIGKILL (proc_pid_status(5)).
func pendingKill(status []byte) bool {
	for line := range bytes.Lines(status) {
		name, value, ok := bytes.Cut(line, []byte(":"))
		if !ok || string(name) != "SigPnd" && string(name) != "ShdPnd" {
			continue
		}
		mask, err := strconv.ParseUint(string(bytes.TrimSpace(value)), 16, 64)
		if err == nil && mask&(1<<(unix.SIGKILL-1)) != 0 {
			return true
		}
	}
	return false
}

// exiting reads the flags, the 9th field of /proc/PID/stat: PF_EXITING (include/linux/sched.h).
func exiting(stat []byte) bool {
	const pfExiting = 0x4
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 7 {
		return true
	}
	flags, err := strconv.ParseUint(string(fields[6]), 10, 64)
	return err == nil && flags&pfExiting != 0
}
