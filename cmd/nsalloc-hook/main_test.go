//go:build linux

package main

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
	"syscall"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// The tests run the binary as a release has it, but for its paths. This process plays CRIU.

var (
	bin  string // the hook
	dir  string // where its fixed paths point
	conf string
	sock string
)

func TestMain(m *testing.M) {
	var err error
	if dir, err = os.MkdirTemp("", "nsalloc-hook"); err != nil {
		panic(err)
	}
	bin, conf, sock = filepath.Join(dir, "hook"), filepath.Join(dir, "agent.yaml"), filepath.Join(dir, "s")
	build := exec.Command("go", "build", "-trimpath", "-o", bin, "-ldflags",
		fmt.Sprintf("-s -w -X main.version=v1 -X main.configPath=%s -X main.socketPath=%s -X main.bypassPath=%s", conf, sock, filepath.Join(dir, "bypass")), ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	if b, err := build.CombinedOutput(); err != nil {
		panic(fmt.Sprintf("%v\n%s", err, b))
	}
	if err := os.WriteFile(conf, nil, 0o600); err != nil {
		panic(err)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// agent answers each request with answer and hands over what it got.
type agent struct {
	l    *net.UnixListener
	seen chan seen
}

type seen struct {
	criuhook.Request
	files []*os.File // named as Request.FDs
}

func (s seen) file(name string) *os.File {
	if i := slices.Index(s.FDs, name); i >= 0 {
		return s.files[i]
	}
	return nil
}

// listen starts an agent; answer nil means silence until the hook hangs up.
func listen(t testing.TB, answer []byte) *agent {
	t.Helper()
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: sock, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	a := &agent{l, make(chan seen, 1000)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			if err := a.serve(c, answer); err != nil {
				t.Error(err)
			}
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return a
}

func (a *agent) serve(c *net.UnixConn, answer []byte) error {
	b, oob := make([]byte, criuhook.MaxMessage), make([]byte, 4096)
	n, oobn, _, _, err := c.ReadMsgUnix(b, oob)
	if err != nil {
		return err
	}
	r, err := criuhook.DecodeRequest(b[:n])
	if err != nil {
		return err
	}
	s := seen{Request: r}
	if oobn > 0 {
		messages, err := syscall.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			return err
		}
		fds, err := syscall.ParseUnixRights(&messages[0])
		if err != nil {
			return err
		}
		for i, fd := range fds {
			s.files = append(s.files, os.NewFile(uintptr(fd), r.FDs[i]))
		}
	}
	if len(s.files) != len(r.FDs) {
		return fmt.Errorf("%d descriptors came for %v", len(s.files), r.FDs)
	}
	a.seen <- s
	if answer == nil {
		_, err := c.Read(b)
		if err == nil || errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("hook said more: %v", err)
		}
		return nil
	}
	_, err = c.Write(answer)
	return err
}

func (a *agent) get(t *testing.T) seen {
	t.Helper()
	select {
	case s := <-a.seen:
		t.Cleanup(func() {
			for _, f := range s.files {
				f.Close()
			}
		})
		return s
	default:
		t.Fatal("the agent was not asked")
		panic("unreachable")
	}
}

func pass(t testing.TB, message string) []byte {
	return response(t, criuhook.Response{Verdict: criuhook.Pass, Message: message})
}

func response(t testing.TB, r criuhook.Response) []byte {
	t.Helper()
	b, err := criuhook.EncodeResponse(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// env is as CRIU sets it, with images at f.
func env(action criuhook.Action, images *os.File, init int) []string {
	e := []string{"CRTOOLS_SCRIPT_ACTION=" + string(action)}
	if images != nil {
		e = append(e, fmt.Sprintf("CRTOOLS_IMAGE_DIR=/proc/%d/fd/%d", os.Getpid(), images.Fd()))
	}
	if init != 0 {
		e = append(e, "CRTOOLS_INIT_PID="+strconv.Itoa(init))
	}
	return e
}

// hook runs it and returns its exit code and what it printed.
func hook(t testing.TB, env []string, args ...string) (int, string) {
	t.Helper()
	return start(t, exec.Command(bin, args...), env)
}

func start(t testing.TB, c *exec.Cmd, env []string) (int, string) {
	t.Helper()
	c.Env = append(env, "HOME=/", "PATH=/bin:/usr/bin") // not ours: the test's may hold anything
	b, err := c.CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return c.ProcessState.ExitCode(), string(b)
}

// hide makes this a host that is not set up, for the rest of the test.
func hide(t testing.TB) {
	t.Helper()
	if err := os.Rename(conf, conf+"~"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Rename(conf+"~", conf); err != nil {
			t.Error(err)
		}
	})
}

func imageDir(t testing.TB) *os.File {
	t.Helper()
	f, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// pidOf is the process of a pidfd.
func pidOf(t *testing.T, f *os.File) int {
	t.Helper()
	if f == nil {
		return 0
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "Pid:"); ok {
			pid, err := strconv.Atoi(strings.TrimSpace(rest))
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	t.Fatalf("%s is no pidfd:\n%s", f.Name(), b)
	return 0
}
