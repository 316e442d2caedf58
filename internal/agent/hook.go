package agent

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/internal/killpoint"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// decide finds the run that a request belongs to, handles the action, once, and sends the answer. The
// run's turn is held until it is sent, so that nobody is told the answer of before while it is not sure
// that there is one. The error says that nobody took it.
func (a *Agent) decide(ctx context.Context, req *hookRequest, send func(criuhook.Response) error) error {
	stage, known := criuhook.StageOf(req.Action)
	if !known {
		return send(criuhook.Response{Verdict: criuhook.Pass, Message: "this release does not know the action " + string(req.Action)})
	}
	began := time.Now()
	n, err := a.runOf(req, stage)
	if err != nil {
		a.log.Warn("hook: a request was refused", "action", req.Action, "cause", err)
		return send(a.refuse(stage, err))
	}
	done, err := n.hold(ctx)
	if err != nil {
		return send(a.refuse(stage, err))
	}
	defer a.settleIfGone(n)
	defer done()
	if given, ok := n.rec.Answers[req.Action]; ok {
		a.log.Info("hook: an action came again and got the answer of before", "action", req.Action, "run", n.key, "verdict", given.Verdict)
		return send(given)
	}
	answer := a.settleAnswer(n, stage, a.answer(ctx, n, stage, req))
	a.log.Info("hook", "action", req.Action, "run", n.key, "verdict", answer.Verdict, "sandbox", n.rec.Sandbox, "message", answer.Message, "took", time.Since(began).Round(time.Microsecond))
	killpoint.At(killpoint.AgentAnswering.Of(string(req.Action)))
	if err := send(answer); err != nil {
		a.untaken(n, stage)
		return err
	}
	killpoint.At(killpoint.AgentAnswered.Of(string(req.Action)))
	return nil
}

// settleIfGone has a run settled whose CRIU ended while an action was being handled.
func (a *Agent) settleIfGone(n *run) {
	if gone, _, _ := n.deaths.told(); gone {
		a.settleAsk(n)
	}
}

// answer does an action's work; by the holder of the run's turn.
func (a *Agent) answer(ctx context.Context, n *run, stage criuhook.Stage, req *hookRequest) criuhook.Response {
	if n.rec.Phase == criuhook.Either {
		n.rec.Phase = stage.Phase
	}
	if stage.Phase != criuhook.Either && stage.Phase != n.rec.Phase {
		return a.refuse(stage, fmt.Errorf("CRIU %d began a %s and now brings %s; start a CRIU of its own for each", n.rec.CRIUPID, n.rec.Phase, stage.Action))
	}
	n.rec.Last = req.Action
	if n.lost != nil {
		return a.refuse(stage, n.lost)
	}
	pidfd := req.files[criuhook.FDCRIU]
	err := a.watchCRIU(n, pidfd)
	message := ""
	if err == nil {
		if message, err = a.handle(ctx, n, req); alloc.ReasonOf(err) == alloc.ReasonRange {
			// The pool knows other ranges than we did: an operator burned ours, say. Nothing of the
			// request that was refused was committed, and what it would have spent never will be; what the action
			// asked before may have been. So the whole action, for which the records are read anew now, looks
			// again at what is done and what has no serial. Once: who loses twice has a twin.
			a.log.Warn("hook: the pool knows other ranges than this agent; beginning the action again", "action", req.Action, "run", n.key, "cause", err)
			message, err = a.handle(ctx, n, req)
		}
	}
	if err == nil && isLast(stage) {
		// Whoever is told to go on must be there to do it. What ends after this is found by looking.
		if over, pollErr := kernelns.Exited(int(pidfd.Fd())); over || pollErr != nil {
			err = fmt.Errorf("the CRIU process %d is gone", n.rec.CRIUPID)
		}
	}
	if err != nil {
		return a.refuse(stage, err)
	}
	return criuhook.Response{Verdict: criuhook.Pass, Message: message}
}

// isLast reports whether a stage is the last that can veto: 0 there lets CRIU kill the source, or the
// tree run.
func isLast(stage criuhook.Stage) bool {
	return stage.Action == criuhook.PostDump || stage.Action == criuhook.PostRestore
}

// settleAnswer puts an answer on disk before it leaves. Where that fails, nothing was promised: a stage
// that can veto does.
func (a *Agent) settleAnswer(n *run, stage criuhook.Stage, answer criuhook.Response) criuhook.Response {
	if n.rec.Answers == nil {
		n.rec.Answers = map[criuhook.Action]criuhook.Response{}
	}
	last := isLast(stage)
	if last {
		n.rec.ZeroGiven = answer.Verdict == criuhook.Pass
		n.rec.Closed = !n.rec.ZeroGiven
	}
	if answer.Verdict == criuhook.Veto && stage.CanVeto && !last {
		n.rec.Closed = !n.rec.ZeroGiven // a 0 that CRIU was told stays told, whatever comes out of turn
	}
	n.rec.Answers[stage.Action] = answer
	rests := last || answer.Verdict == criuhook.Veto || stage.Action == criuhook.PreRestore
	if !rests || n.rec.Mode == modeNone || n.rec.Mode == "" {
		a.runs.publish(n) // nothing rests on it: an agent that dies here decides again
		return answer
	}
	killpoint.At(killpoint.AgentVerdictRecording.Of(string(stage.Action)))
	if err := a.runs.save(n); err != nil {
		answer = a.refuse(stage, err)
		if last {
			n.rec.ZeroGiven = false // it has not left
		}
		n.rec.Closed = !n.rec.ZeroGiven
		n.rec.Answers[stage.Action] = answer
		a.runs.publish(n)
	}
	killpoint.At(killpoint.AgentVerdictRecorded.Of(string(stage.Action)))
	return answer
}

// untaken takes 0 back that certainly nobody heard: a packet that could not be sent was not received,
// and CRIU takes a hook that ended without an answer for a veto. If the agent dies before that is on
// disk, the 0 counts as given.
func (a *Agent) untaken(n *run, stage criuhook.Stage) {
	if !isLast(stage) || !n.rec.ZeroGiven || n.rec.Mode == modeNone || n.rec.Mode == "" {
		return
	}
	given := n.rec.Answers[stage.Action]
	n.rec.ZeroGiven, n.rec.Closed = false, true
	n.rec.Answers[stage.Action] = a.refuse(stage, errors.New("the answer came too late: the hook was gone"))
	killpoint.At(killpoint.AgentUntakenRecording)
	if err := a.runs.save(n); err != nil {
		n.rec.ZeroGiven, n.rec.Closed = true, false
		n.rec.Answers[stage.Action] = given
		a.log.Warn("an answer that nobody took counts as given", "run", n.key, "cause", err)
	}
	killpoint.At(killpoint.AgentUntakenRecorded)
}

// refuse turns an error into an answer: a veto where there is one.
func (a *Agent) refuse(stage criuhook.Stage, err error) criuhook.Response {
	verdict := criuhook.Pass
	if stage.CanVeto {
		verdict = criuhook.Veto
	}
	return criuhook.Response{Verdict: verdict, Message: err.Error()}
}

// runOf proves who brings an action and finds its run. A hook whose CRIU is gone, or that was
// re-parented, came late: nobody waits for its answer, and nothing is done or watched through it.
func (a *Agent) runOf(req *hookRequest, stage criuhook.Stage) (*run, error) {
	pidfd := req.files[criuhook.FDCRIU]
	switch {
	case pidfd != nil:
	case req.ParentUnseen:
		// CRIU runs its scripts inside a PID namespace that it was told to join (CRIU 4.1.1): nothing that the
		// hook sees names the processes that we watch.
		return nil, errors.New("the tree is restored into a PID namespace given from outside (--external pid), which this release does not follow; restore it with a PID namespace of its own")
	default:
		return nil, fmt.Errorf("the hook came late, or through another program: its parent %d is not the CRIU process whose images %s are; let CRIU execute nsalloc-hook itself", req.CRIUPID, req.ImageDir)
	}
	pid, err := a.kernel.PIDOf(int(pidfd.Fd()))
	if err != nil {
		return nil, fmt.Errorf("the CRIU process that this action is of is gone: %w", err)
	}
	criu, err := a.kernel.Process(pid)
	if err != nil {
		return nil, fmt.Errorf("the CRIU process %d that this action is of is gone: %w", pid, err)
	}
	if over, err := kernelns.Exited(int(pidfd.Fd())); err != nil || over {
		return nil, fmt.Errorf("the CRIU process %d that this action is of is gone", pid)
	}
	if err := a.checkCaller(req, criu); err != nil {
		return nil, err
	}
	return a.runs.get(pid, criu.StartTime, stage.Phase), nil
}

// checkCaller proves that the sender belongs to the CRIU process that it names: its child, the script;
// or its parent, a program that drives CRIU over RPC.
func (a *Agent) checkCaller(req *hookRequest, criu kernelns.Process) error {
	peer, err := a.kernel.Process(req.peer)
	if err != nil {
		return fmt.Errorf("the process %d that brings this action is gone: %w", req.peer, err)
	}
	if req.Caller == criuhook.NotifyRPC {
		if criu.PPID != peer.PID {
			return fmt.Errorf("process %d is not the parent of CRIU %d", peer.PID, criu.PID)
		}
		return nil
	}
	if peer.PPID != criu.PID {
		return fmt.Errorf("the hook came late: its parent is %d, not CRIU %d", peer.PPID, criu.PID)
	}
	// CRTOOLS_IMAGE_DIR is /proc/<criu>/fd/N, in CRIU's PID namespace, as the hook's getppid is.
	if dir, ok := strings.CutPrefix(req.ImageDir, "/proc/"); ok {
		if named, _, ok := strings.Cut(dir, "/"); ok {
			if v, err := strconv.Atoi(named); err == nil && v != req.CRIUPID {
				return fmt.Errorf("the hook came late: the images are CRIU %d's, its parent is %d", v, req.CRIUPID)
			}
		}
	}
	return nil
}

// handle does an action's work. An error is a veto where there is one; a message is printed to CRIU's log.
func (a *Agent) handle(ctx context.Context, n *run, req *hookRequest) (string, error) {
	switch req.Action {
	case criuhook.PreDump:
		return a.preDump(ctx, n, req)
	case criuhook.PostDump:
		return a.postDump(ctx, n, req)
	case criuhook.PreRestore:
		return a.preRestore(ctx, n, req)
	case criuhook.SetupNamespaces, criuhook.PostSetupNamespaces:
		return "", a.noteInit(n, req)
	case criuhook.PostRestore:
		return a.postRestore(ctx, n, req)
	case criuhook.NetworkUnlock:
		// In a dump it comes only when the tree goes on.
		n.rec.Resumed = n.rec.Resumed || n.rec.Phase == criuhook.Dump
	case criuhook.PreResume, criuhook.PostResume:
		n.rec.Resumed = true
	}
	return "", nil
}

// noteInit remembers the tree's root, durably: should CRIU die from here on, and the agent with it, the
// tree that is left half built is found by it.
func (a *Agent) noteInit(n *run, req *hookRequest) error {
	if n.rec.Mode == modeNone || n.rec.Mode == "" {
		return nil
	}
	p, err := a.initOf(req)
	if err != nil {
		return err
	}
	if known := (task{p.PID, p.StartTime}); n.rec.Init != known {
		n.rec.Init = known
		killpoint.At(killpoint.AgentRootRecording)
		if err := a.runs.save(n); err != nil {
			return err
		}
		killpoint.At(killpoint.AgentRootRecorded)
	}
	return nil
}

func (a *Agent) initOf(req *hookRequest) (kernelns.Process, error) {
	pidfd := req.files[criuhook.FDInit]
	if pidfd == nil {
		return kernelns.Process{}, fmt.Errorf("CRIU named no root task (CRTOOLS_INIT_PID) at %s", req.Action)
	}
	pid, err := a.kernel.PIDOf(int(pidfd.Fd()))
	if err != nil {
		return kernelns.Process{}, fmt.Errorf("the root task is gone: %w", err)
	}
	return a.kernel.Process(pid)
}

// treeOf reads the tree below the request's root task.
func (a *Agent) treeOf(ctx context.Context, n *run, req *hookRequest) (kernelns.Process, []kernelns.Process, error) {
	init, err := a.initOf(req)
	if err != nil {
		return kernelns.Process{}, nil, err
	}
	n.rec.Init = task{init.PID, init.StartTime}
	procs, err := a.kernel.Sweep(ctx)
	if err != nil {
		return kernelns.Process{}, nil, err
	}
	procs = kernelns.Descendants(procs, init.PID)
	for _, p := range procs {
		if p.Err != nil {
			return kernelns.Process{}, nil, fmt.Errorf("task %d (%s): %w", p.PID, p.Comm, p.Err)
		}
	}
	if len(procs) == 0 {
		return kernelns.Process{}, nil, fmt.Errorf("the root task %d is gone", init.PID)
	}
	return procs[0], procs, nil
}
