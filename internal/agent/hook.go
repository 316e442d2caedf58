package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// maxHooks bounds the hook connections that are served at a time; more wait in the socket's backlog.
const maxHooks = 64

func isGone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) }

// listenHook opens the hook socket, for root only.
func listenHook(path string) (*net.UnixListener, error) {
	return listenUnix("unixpacket", path)
}

// listenUnix makes a socket at path that only root can use. A socket that nobody listens on any more
// is replaced; one that answers is another agent's.
func listenUnix(network, path string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("socket directory: %w", err)
	}
	if c, err := net.Dial(network, path); err == nil {
		c.Close()
		return nil, fmt.Errorf("socket %s: another agent answers on it; stop that one first", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("socket: %w", err)
	}
	// The mode is set before anybody can connect: between bind and listen there is nobody to talk to.
	old := unix.Umask(0o177)
	l, err := net.ListenUnix(network, &net.UnixAddr{Name: path, Net: network})
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	return l, nil
}

func (a *Agent) serveHook(ctx context.Context, l *net.UnixListener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	slots := make(chan struct{}, maxHooks)
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		slots <- struct{}{}
		go func() {
			defer func() { <-slots }()
			defer c.Close()
			a.serveOne(ctx, c)
		}()
	}
}

// serveOne reads one request, decides, and answers. A caller that is gone gets no answer, but what was
// decided for it stands: it is on disk.
func (a *Agent) serveOne(ctx context.Context, c *net.UnixConn) {
	ctx, cancel := context.WithTimeout(ctx, criuhook.AgentDeadline)
	defer cancel()
	_ = c.SetDeadline(time.Now().Add(criuhook.Deadline))
	var answer criuhook.Response
	req, err := receive(c)
	if err != nil {
		a.log.Warn("hook: a request was refused", "cause", err)
		answer = criuhook.Response{Verdict: criuhook.Veto, Message: err.Error()}
	} else {
		defer req.close()
		answer = a.decide(ctx, req)
	}
	packet, err := criuhook.EncodeResponse(answer)
	if err == nil {
		_, err = c.Write(packet)
	}
	if err != nil {
		a.log.Warn("hook: nobody took the answer", "action", req.Action, "criu", req.CRIUPID, "cause", err)
	}
}

// hookRequest is a request with what came along.
type hookRequest struct {
	criuhook.Request
	files map[string]*os.File
	peer  int // pid of who sent it, in the agent's PID namespace
}

func (r *hookRequest) close() {
	for _, f := range r.files {
		f.Close()
	}
}

func receive(c *net.UnixConn) (*hookRequest, error) {
	buf := make([]byte, criuhook.MaxMessage+1)
	oob := make([]byte, unix.CmsgSpace(8*4))
	n, oobn, flags, _, err := c.ReadMsgUnix(buf, oob)
	files, filesErr := filesOf(oob[:oobn])
	r := &hookRequest{files: map[string]*os.File{}}
	fail := func(err error) (*hookRequest, error) {
		for _, f := range files {
			f.Close()
		}
		return r, err
	}
	switch {
	case err != nil:
		return fail(fmt.Errorf("hook request: %w", err))
	case filesErr != nil:
		return fail(fmt.Errorf("hook request: descriptors: %w", filesErr))
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		return fail(errors.New("hook request: it is larger than a message may be"))
	}
	if r.Request, err = criuhook.DecodeRequest(buf[:n]); err != nil {
		return fail(err)
	}
	if len(files) != len(r.FDs) {
		return fail(fmt.Errorf("hook request: %d descriptors came along, %d are named", len(files), len(r.FDs)))
	}
	for i, name := range r.FDs {
		r.files[name] = files[i]
	}
	files = nil
	if r.peer, err = peerOf(c); err != nil {
		r.close()
		return r, err
	}
	return r, nil
}

func filesOf(oob []byte) ([]*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var files []*os.File
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return files, err
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "hook"))
		}
	}
	return files, nil
}

// peerOf is the pid of the process that connected, and proves that it is root.
func peerOf(c *net.UnixConn) (int, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, fmt.Errorf("hook request: who sent it: %w", credErr)
	}
	if cred.Uid != 0 {
		return 0, fmt.Errorf("hook request: it comes from user %d; CRIU runs as root", cred.Uid)
	}
	return int(cred.Pid), nil
}

// decide finds the run that a request belongs to and handles the action, once.
func (a *Agent) decide(ctx context.Context, req *hookRequest) criuhook.Response {
	stage, known := criuhook.StageOf(req.Action)
	if !known {
		return criuhook.Response{Verdict: criuhook.Pass, Message: "this release does not know the action " + string(req.Action)}
	}
	began := time.Now()
	n, err := a.runOf(req, stage)
	if err != nil {
		return a.refuse(stage, err)
	}
	done, err := n.hold(ctx)
	if err != nil {
		return a.refuse(stage, err)
	}
	defer done()
	if given, ok := n.rec.Answers[req.Action]; ok {
		a.log.Info("hook: an action came again and got the answer of before", "action", req.Action, "run", n.key, "verdict", given.Verdict)
		return given
	}
	if n.rec.Phase == criuhook.Either {
		n.rec.Phase = stage.Phase
	}
	n.rec.Last = req.Action
	answer := criuhook.Response{Verdict: criuhook.Pass}
	message, err := a.handle(ctx, n, req)
	if err != nil {
		answer = a.refuse(stage, err)
	} else {
		answer.Message = message
	}
	answer = a.settleAnswer(n, stage, answer)
	a.log.Info("hook", "action", req.Action, "run", n.key, "verdict", answer.Verdict, "sandbox", n.rec.Sandbox, "message", answer.Message, "took", time.Since(began).Round(time.Microsecond))
	return answer
}

// settleAnswer puts an answer on disk before it leaves. Where that fails, nothing was promised: a stage
// that can veto does.
func (a *Agent) settleAnswer(n *run, stage criuhook.Stage, answer criuhook.Response) criuhook.Response {
	if n.rec.Answers == nil {
		n.rec.Answers = map[criuhook.Action]criuhook.Response{}
	}
	last := stage.Action == criuhook.PostDump || stage.Action == criuhook.PostRestore
	if last {
		n.rec.ZeroGiven = answer.Verdict == criuhook.Pass
		n.rec.Closed = !n.rec.ZeroGiven
	}
	if answer.Verdict == criuhook.Veto && stage.CanVeto && !last {
		n.rec.Closed = true
	}
	n.rec.Answers[stage.Action] = answer
	if rests := last || answer.Verdict == criuhook.Veto || stage.Action == criuhook.PreRestore; !rests || n.rec.Mode == modeNone {
		a.runs.publish(n) // nothing rests on it: an agent that dies here decides again
		return answer
	}
	if err := a.runs.save(n); err != nil {
		answer = a.refuse(stage, err)
		if last {
			n.rec.ZeroGiven, n.rec.Closed = false, true
		}
		n.rec.Answers[stage.Action] = answer
		a.runs.publish(n)
	}
	return answer
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
	if pidfd == nil {
		return nil, errors.New("hook request: the descriptor of CRIU is missing; install nsalloc-hook and nsalloc-agent of one release")
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

// noteInit remembers the tree's root.
func (a *Agent) noteInit(n *run, req *hookRequest) error {
	p, err := a.initOf(req)
	if err != nil {
		return err
	}
	n.rec.Init = task{p.PID, p.StartTime}
	a.runs.publish(n)
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
