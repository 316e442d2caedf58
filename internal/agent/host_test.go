package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// settledIn is how long agent and pool may take to agree (P14).
const settledIn = 10 * time.Second

// host is a host with an agent, over a pool of its own.
type host struct {
	t    *testing.T
	pool *testPool
	dir  string
	*Agent
	logs *lockedBuffer
	// quiet leaves sweeps to those who ask for one.
	quiet bool
	stop  func() error // ends the agent
	ends  func() error // waits for it to end by itself
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// newHost starts an agent that has joined and swept.
func newHost(t *testing.T) *host {
	t.Helper()
	h := idleHost(t)
	h.start()
	return h
}

// idleHost is a host whose agent is not started yet.
func idleHost(t *testing.T) *host {
	t.Helper()
	needHost(t)
	dir, err := os.MkdirTemp("", "agent") // short: a socket's path has 108 bytes
	if err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, pool: newTestPool(t), dir: dir, logs: &lockedBuffer{}, stop: func() error { return nil }}
	t.Cleanup(func() {
		if err := h.stop(); err != nil {
			t.Errorf("the agent ended: %v", err)
		}
		os.RemoveAll(dir)
		if t.Failed() {
			t.Log(h.logs.String())
		}
	})
	return h
}

func (h *host) config() Config {
	pause := 20 * time.Millisecond
	if h.quiet {
		pause = time.Hour
	}
	return Config{
		Host: "a", StateDir: filepath.Join(h.dir, "state"), HookSocket: filepath.Join(h.dir, "hook.sock"), AgentSocket: filepath.Join(h.dir, "agent.sock"),
		SweepInterval: pause, Version: "test", Log: slog.New(slog.NewTextHandler(h.logs, nil)),
	}
}

// start starts an agent on the state that is there.
func (h *host) start() {
	h.t.Helper()
	h.startOnly()
	began := time.Now()
	h.eventually("the agent joins and sweeps", func() error {
		if at := h.swept.Load(); !h.isJoined() || at == nil || at.Before(began) {
			return fmt.Errorf("joined %v, swept %v", h.isJoined(), at)
		}
		return nil
	})
}

// startOnly starts an agent and does not wait for its pool.
func (h *host) startOnly() {
	h.t.Helper()
	ready := make(chan struct{})
	cfg := h.config()
	cfg.Ready = func() { close(ready) }
	a, err := New(cfg, h.pool)
	if err != nil {
		h.t.Fatal(err)
	}
	h.Agent = a
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	h.stop = func() error {
		h.stop = func() error { return nil }
		cancel()
		return <-ended
	}
	h.ends = func() error {
		select {
		case err := <-ended:
			cancel()
			h.stop = func() error { return nil }
			return err
		case <-time.After(settledIn):
			h.t.Fatal("the agent goes on")
			return nil
		}
	}
	select {
	case <-ready:
	case err := <-ended:
		h.t.Fatal(err)
	}
}

func (h *host) restart() {
	h.t.Helper()
	if err := h.stop(); err != nil {
		h.t.Fatal(err)
	}
	h.start()
}

// eventually waits until try succeeds.
func (h *host) eventually(what string, try func() error) {
	h.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(settledIn); ; {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("%s: not within %v: %v", what, settledIn, err)
		}
		<-tick.C
	}
}

// proc is a process of the test's.
type proc struct {
	t   *testing.T
	cmd *exec.Cmd
	pid int
	in  io.WriteCloser
	out *bufio.Scanner
}

// containerFlags are the namespaces of a container.
const containerFlags = unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// spawn starts a process in new namespaces.
func spawn(t *testing.T, flags uintptr, name string, env ...string) *proc {
	t.Helper()
	c := exec.Command(name)
	c.Env = append(os.Environ(), env...)
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
	c.Stderr = os.Stderr
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	p := &proc{t: t, cmd: c, pid: c.Process.Pid, in: in, out: bufio.NewScanner(out)}
	t.Cleanup(p.end)
	return p
}

// container is a process with namespaces of its own that waits for its end.
func container(t *testing.T, flags uintptr) *proc { return spawn(t, flags, "cat") }

// end kills and reaps it; nothing the second time.
func (p *proc) end() {
	if p.cmd.ProcessState == nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	}
}

// tell sends a line and returns the answer.
func (p *proc) tell(line string) string {
	p.t.Helper()
	if _, err := io.WriteString(p.in, line+"\n"); err != nil {
		p.t.Fatal(err)
	}
	if !p.out.Scan() {
		p.t.Fatalf("process %d ended: %v", p.pid, p.out.Err())
	}
	return p.out.Text()
}

// criu is a process that stands in for CRIU.
type criu struct {
	*proc
	h    *host
	root task // of the last tree that it made
}

func (h *host) criu() *criu {
	h.t.Helper()
	return &criu{proc: spawn(h.t, 0, criuProgram, roleVar+"=criu"), h: h}
}

func (c *criu) order(o order) said {
	c.t.Helper()
	o.Socket = c.h.cfg.HookSocket
	b, err := json.Marshal(o)
	if err != nil {
		c.t.Fatal(err)
	}
	var s said
	if err := json.Unmarshal([]byte(c.tell(string(b))), &s); err != nil {
		c.t.Fatal(err)
	}
	return s
}

// tree has CRIU make a task.
func (c *criu) tree(flags uintptr, parked bool) int {
	c.t.Helper()
	s := c.order(order{Tree: flags, Parked: parked})
	if s.Err != "" {
		c.t.Fatal(s.Err)
	}
	c.t.Cleanup(func() { kill(s.PID) })
	p, err := c.h.kernel.Process(s.PID)
	if err != nil {
		c.t.Fatal(err)
	}
	c.root = task{p.PID, p.StartTime}
	return s.PID
}

// kill ends a process and reaps it where it has become ours.
func kill(pid int) {
	_ = unix.Kill(pid, unix.SIGKILL)
	var status unix.WaitStatus
	for {
		if _, err := unix.Wait4(pid, &status, 0, nil); err != unix.EINTR {
			return // its end, or it is CRIU's to reap
		}
	}
}

// namespaces reads what a process is in.
func (h *host) namespaces(pid int) map[alloc.NamespaceType]alloc.KernelID {
	h.t.Helper()
	p, err := h.kernel.Process(pid)
	if err != nil {
		h.t.Fatal(err)
	}
	return p.Namespaces
}

// serials waits until every namespace of a process has a serial, and returns them.
func (h *host) serials(pid int) map[alloc.NamespaceType]place {
	h.t.Helper()
	var places map[alloc.NamespaceType]place
	h.eventually(fmt.Sprintf("process %d is numbered", pid), func() error {
		places = map[alloc.NamespaceType]place{}
		for t, k := range h.namespaces(pid) {
			p, ok := h.book.find(t, k)
			if !ok {
				return fmt.Errorf("%s %d has no serial", t, k.ID)
			}
			places[t] = p
		}
		return nil
	})
	return places
}

// sandbox is the one that a process's mount namespace is of.
func (h *host) sandbox(pid int) alloc.Serial {
	h.t.Helper()
	return h.serials(pid)[alloc.Mnt].sandbox
}

// reaches waits for a sandbox's state in the store.
func (h *host) reaches(serial alloc.Serial, state alloc.SandboxState) (*alloc.Sandbox, *alloc.Checkpoint) {
	h.t.Helper()
	var s *alloc.Sandbox
	var c *alloc.Checkpoint
	h.eventually(fmt.Sprintf("sandbox %s is %s", serial, state), func() (err error) {
		if s, c, err = h.pool.Sandbox(context.Background(), serial); err == nil && s.State != state {
			err = fmt.Errorf("it is %s", s.State)
		}
		return err
	})
	return s, c
}

// consistent proves, once the agent has come to rest, that every namespace in which a process lives
// stands in the store under one serial, and that the agent's book is the store's.
func (h *host) consistent() {
	h.t.Helper()
	h.pool.store.Settle()
	if err := h.registrar.join(h.t.Context()); err != nil { // what got through late is found at the next reading
		h.t.Fatal(err)
	}
	h.eventually("the book is the store's, and every namespace has one serial", func() error {
		owned, err := h.pool.Owned(context.Background(), "a")
		if err != nil {
			return err
		}
		stands := map[string]int{}
		for _, s := range owned {
			mine := h.book.sandbox(s.Serial)
			if mine == nil || mine.State != s.State || mine.Epoch != s.Epoch || len(mine.Bindings) != len(s.Bindings) {
				return fmt.Errorf("the store has %+v, the book %+v", s, mine)
			}
			if s.State != alloc.StateRunning {
				return fmt.Errorf("sandbox %s is %s still", s.Serial, s.State)
			}
			for _, b := range s.Bindings {
				if b.Live() {
					stands[b.Kernel.Key(b.Type)]++
				}
			}
		}
		if n := len(h.book.all()); n != len(owned) {
			return fmt.Errorf("the store has %d sandboxes, the book %d", len(owned), n)
		}
		procs, err := h.kernel.Sweep(context.Background())
		if err != nil {
			return err
		}
		return oneEach(procs, stands)
	})
}

func oneEach(procs []kernelns.Process, stands map[string]int) error {
	lives := map[string]bool{}
	for _, p := range procs {
		for t, k := range p.Namespaces {
			lives[k.Key(t)] = true
			if n := stands[k.Key(t)]; n != 1 {
				return fmt.Errorf("%s of process %d (%s) stands under %d serials", k.Key(t), p.PID, p.Comm, n)
			}
		}
	}
	for key := range stands {
		if !lives[key] {
			return fmt.Errorf("%s has a serial and nobody lives in it", key)
		}
	}
	return nil
}

// asNobody does what takes a moment with another user's rights, as one thread of a process can.
func asNobody(do func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), 65534, ^uintptr(0)); e != 0 {
		return e
	}
	err := do()
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), 0, ^uintptr(0)); e != 0 {
		return e
	}
	return err
}
