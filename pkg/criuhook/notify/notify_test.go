//go:build linux

package notify

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	criu "github.com/checkpoint-restore/go-criu/v7"
	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"

	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// go-criu itself runs in these tests. It starts this test's binary as "criu swrk FD", which then speaks
// CRIU's side of the protocol.

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "swrk" {
		if err := swrk(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, "fake criu:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	// The race detector lets a process wait for a second before it ends; CRIU is one of ours.
	os.Setenv("GORACE", os.Getenv("GORACE")+" atexit_sleep_ms=0")
	os.Exit(m.Run())
}

var (
	dumping   = []criuhook.Action{criuhook.PreDump, criuhook.NetworkLock, criuhook.PostDump, criuhook.NetworkUnlock}
	restoring = []criuhook.Action{criuhook.PreRestore, criuhook.SetupNamespaces, criuhook.PostSetupNamespaces, criuhook.PostRestore, criuhook.NetworkUnlock, criuhook.PostResume}
)

// swrk is CRIU: it opens the image directory, notifies at each step, and stops when go-criu hangs up.
func swrk(arg string) error {
	sk, err := strconv.Atoi(arg)
	if err != nil {
		return err
	}
	b := make([]byte, 1<<16)
	n, err := syscall.Read(sk, b)
	if err != nil {
		return err
	}
	var req rpc.CriuReq
	if err := proto.Unmarshal(b[:n], &req); err != nil {
		return err
	}
	dir, err := os.Open(fmt.Sprintf("/proc/%d/fd/%d", os.Getppid(), req.GetOpts().GetImagesDirFd()))
	if err != nil {
		return err
	}
	defer dir.Close()
	actions := dumping
	if req.GetType() == rpc.CriuReqType_RESTORE {
		actions = restoring
	}
	for _, a := range actions {
		note := &rpc.CriuNotify{Script: proto.String(string(a))}
		if a == criuhook.SetupNamespaces || a == criuhook.PostRestore {
			note.Pid = proto.Int32(int32(os.Getpid())) // as good as any
		}
		if err := send(sk, &rpc.CriuResp{Type: rpc.CriuReqType_NOTIFY.Enum(), Success: proto.Bool(true), Notify: note}); err != nil {
			return err
		}
		if n, err = syscall.Read(sk, b); err != nil || n == 0 {
			return err // a veto
		}
		var ack rpc.CriuReq
		if err := proto.Unmarshal(b[:n], &ack); err != nil || !ack.GetNotifySuccess() {
			return fmt.Errorf("%v, %v", &ack, err)
		}
	}
	return send(sk, &rpc.CriuResp{Type: req.Type, Success: proto.Bool(true)})
}

func send(sk int, m proto.Message) error {
	b, err := proto.Marshal(m)
	if err == nil {
		_, err = syscall.Write(sk, b)
	}
	return err
}

// agent answers and remembers.
type agent struct {
	mu       sync.Mutex
	requests []criuhook.Request
	answer   func(a criuhook.Action) criuhook.Response
}

func (a *agent) actions() (list []criuhook.Action) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, r := range a.requests {
		list = append(list, r.Action)
	}
	return list
}

func listen(t *testing.T, answer func(a criuhook.Action) criuhook.Response) (*agent, paths) {
	t.Helper()
	dir := t.TempDir()
	p := paths{filepath.Join(dir, "agent.yaml"), filepath.Join(dir, "s"), filepath.Join(dir, "bypass")}
	if err := os.WriteFile(p.config, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	a := &agent{answer: answer}
	if answer == nil {
		return a, p // nobody listens
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: p.socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			if err := a.serve(c); err != nil {
				t.Error(err)
			}
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return a, p
}

func (a *agent) serve(c *net.UnixConn) error {
	b, oob := make([]byte, criuhook.MaxMessage), make([]byte, 1024)
	n, oobn, _, _, err := c.ReadMsgUnix(b, oob)
	if err != nil {
		return err
	}
	r, err := criuhook.DecodeRequest(b[:n])
	if err != nil {
		return err
	}
	messages, err := syscall.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(messages) != 1 {
		return fmt.Errorf("%d control messages, %v", len(messages), err)
	}
	fds, err := syscall.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != len(r.FDs) {
		return fmt.Errorf("%d descriptors for %v, %v", len(fds), r.FDs, err)
	}
	for i, fd := range fds {
		info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
		syscall.Close(fd)
		want := map[string]string{
			criuhook.FDCRIU:   fmt.Sprintf("\nPid:\t%d\n", r.CRIUPID),
			criuhook.FDInit:   fmt.Sprintf("\nPid:\t%d\n", r.InitPID),
			criuhook.FDImages: "\nflags:\t",
		}[r.FDs[i]]
		if err != nil || !strings.Contains(string(info), want) {
			return fmt.Errorf("descriptor %s of %+v:\n%s%v", r.FDs[i], r, info, err)
		}
	}
	a.mu.Lock()
	a.requests = append(a.requests, r)
	a.mu.Unlock()
	b, err = criuhook.EncodeResponse(a.answer(r.Action))
	if err == nil {
		_, err = c.Write(b)
	}
	return err
}

func pass(criuhook.Action) criuhook.Response { return criuhook.Response{Verdict: criuhook.Pass} }

func vetoAt(at criuhook.Action) func(criuhook.Action) criuhook.Response {
	return func(a criuhook.Action) criuhook.Response {
		if a == at {
			return criuhook.Response{Verdict: criuhook.Veto, Message: "because"}
		}
		return pass(a)
	}
}

// own is a program's Notify; it fails at one action.
type own struct {
	calls  []criuhook.Action
	failAt criuhook.Action
}

var errOwn = errors.New("the program's own")

func (o *own) call(a criuhook.Action) error {
	o.calls = append(o.calls, a)
	if a == o.failAt {
		return errOwn
	}
	return nil
}

func (o *own) PreDump() error              { return o.call(criuhook.PreDump) }
func (o *own) PostDump() error             { return o.call(criuhook.PostDump) }
func (o *own) PreRestore() error           { return o.call(criuhook.PreRestore) }
func (o *own) PostRestore(int32) error     { return o.call(criuhook.PostRestore) }
func (o *own) NetworkLock() error          { return o.call(criuhook.NetworkLock) }
func (o *own) NetworkUnlock() error        { return o.call(criuhook.NetworkUnlock) }
func (o *own) SetupNamespaces(int32) error { return o.call(criuhook.SetupNamespaces) }
func (o *own) PostSetupNamespaces() error  { return o.call(criuhook.PostSetupNamespaces) }
func (o *own) PostResume() error           { return o.call(criuhook.PostResume) }

// drive runs go-criu with a Notify.
func drive(t *testing.T, p paths, kind rpc.CriuReqType, o *own) (log []string, err error) {
	t.Helper()
	images, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer images.Close()
	config := Config{Images: images, Notify: o, Log: func(m string) { log = append(log, m) }}
	if kind == rpc.CriuReqType_DUMP {
		config.PID = os.Getppid()
	}
	n, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	n.paths = p
	c := criu.MakeCriu()
	c.SetCriuPath("/proc/self/exe")
	opts := &rpc.CriuOpts{ImagesDirFd: proto.Int32(int32(images.Fd()))}
	if kind == rpc.CriuReqType_DUMP {
		return log, c.Dump(opts, n)
	}
	return log, c.Restore(opts, n)
}

func TestStraight(t *testing.T) {
	for kind, want := range map[rpc.CriuReqType][]criuhook.Action{rpc.CriuReqType_DUMP: dumping, rpc.CriuReqType_RESTORE: restoring} {
		a, p := listen(t, pass)
		o := &own{}
		if _, err := drive(t, p, kind, o); err != nil {
			t.Fatal(kind, err)
		}
		if !slices.Equal(a.actions(), want) || !slices.Equal(o.calls, want) {
			t.Errorf("%s: the agent saw %v, the program %v, want %v", kind, a.actions(), o.calls, want)
		}
		for _, r := range a.requests {
			known := kind == rpc.CriuReqType_DUMP || r.Action != criuhook.PreRestore
			if r.Caller != criuhook.NotifyRPC || r.CRIUPID == 0 || r.CRIUPID != a.requests[0].CRIUPID || (r.InitPID != 0) != known || slices.Contains(r.FDs, criuhook.FDInit) != known {
				t.Errorf("%s: %+v", kind, r)
			}
		}
	}
}

func TestAgentVetoes(t *testing.T) {
	for kind, actions := range map[rpc.CriuReqType][]criuhook.Action{rpc.CriuReqType_DUMP: dumping, rpc.CriuReqType_RESTORE: restoring} {
		for i, at := range actions {
			a, p := listen(t, vetoAt(at))
			o := &own{}
			log, err := drive(t, p, kind, o)
			want := actions
			if s, _ := criuhook.StageOf(at); s.CanVeto {
				want = actions[:i+1]
				if err == nil || !strings.Contains(err.Error(), "because") {
					t.Errorf("veto at %s: %v", at, err)
				}
			} else if err != nil || len(log) != 1 {
				t.Errorf("veto at %s, which cannot: %v, log %q", at, err, log)
			}
			if !slices.Equal(a.actions(), want) || !slices.Equal(o.calls, want) {
				t.Errorf("veto at %s: the agent saw %v, the program %v, want %v", at, a.actions(), o.calls, want)
			}
		}
	}
}

// TestOwnVetoes: the agent is not asked what the program has refused, and is told where nothing can be.
func TestOwnVetoes(t *testing.T) {
	for kind, actions := range map[rpc.CriuReqType][]criuhook.Action{rpc.CriuReqType_DUMP: dumping, rpc.CriuReqType_RESTORE: restoring} {
		for i, at := range actions {
			a, p := listen(t, pass)
			_, err := drive(t, p, kind, &own{failAt: at})
			if !errors.Is(err, errOwn) {
				t.Errorf("%s: %v", at, err)
			}
			want := actions[:i]
			if s, _ := criuhook.StageOf(at); !s.CanVeto {
				want = actions[:i+1]
			}
			if !slices.Equal(a.actions(), want) {
				t.Errorf("the program failed at %s: the agent saw %v, want %v", at, a.actions(), want)
			}
		}
	}
}

func TestNoAgent(t *testing.T) {
	_, p := listen(t, nil)
	if _, err := drive(t, p, rpc.CriuReqType_DUMP, &own{}); err == nil {
		t.Error("dumped without an agent")
	}
	if err := os.WriteFile(p.bypass, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if log, err := drive(t, p, rpc.CriuReqType_RESTORE, &own{}); err != nil || len(log) != len(restoring) {
		t.Errorf("with a bypass: %v, log %q", err, log)
	}
	if err := errors.Join(os.Remove(p.bypass), os.Remove(p.config)); err != nil {
		t.Fatal(err)
	}
	if log, err := drive(t, p, rpc.CriuReqType_DUMP, &own{}); err != nil || len(log) != 0 {
		t.Errorf("on a host that is not set up: %v, log %q", err, log)
	}
}

func TestConfig(t *testing.T) {
	file, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for _, c := range []Config{{}, {Images: file}, {Images: dir, PID: 1 << 22}, {Images: dir, PID: -1}} {
		if n, err := New(c); err == nil {
			t.Errorf("%+v was taken", c)
			n.Close()
		}
	}
	_, p := listen(t, pass)
	n, err := New(Config{Images: dir})
	if err != nil {
		t.Fatal(err)
	}
	n.paths = p
	if err := n.PreDump(); err == nil {
		t.Error("no CRIU was found, and nothing said")
	}
	n.config.CRIU = os.Getppid()
	if err := n.PreDump(); err != nil {
		t.Errorf("CRIU's pid was given: %v", err)
	}
	if err := errors.Join(n.Close(), n.Close()); err != nil {
		t.Error(err)
	}
	if n.PreDump() == nil || n.PostResume() != nil {
		t.Error("after Close it must veto where it can")
	}
}

// TestFind: a child is CRIU by what it has open.
func TestFind(t *testing.T) {
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	start := func(extra ...*os.File) *exec.Cmd {
		c := exec.Command("sleep", "1000")
		c.ExtraFiles = extra
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = c.Process.Kill()
			_ = c.Wait() // says that it was killed
		})
		return c
	}
	start()
	n, err := New(Config{Images: dir})
	if err != nil {
		t.Fatal(err)
	}
	if p, err := n.find(); err == nil {
		t.Errorf("found %v", p)
	}
	want := start(dir).Process.Pid
	p, err := n.find()
	if err != nil || p.pid != want {
		t.Errorf("found %v, %v, want %d", p, err, want)
	}
	syscall.Close(p.fd)
	if list, err := childrenOfAll(); err != nil || !slices.Contains(list, want) {
		t.Errorf("children %v, %v", list, err)
	}
	start(dir)
	if p, err := n.find(); err == nil {
		t.Errorf("found %v among two", p)
	}
}
