package agent

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// TestContainer: a new container is numbered once, and over when it is.
func TestContainer(t *testing.T) {
	h := newHost(t)
	c := container(t, containerFlags)
	places := h.serials(c.pid)
	sandbox := places[alloc.Mnt].sandbox
	own := 0
	for typ, p := range places {
		if p.sandbox == sandbox {
			own++
		} else if !h.book.sandbox(p.sandbox).OfHost {
			t.Errorf("%s is of sandbox %s", typ, p.sandbox)
		}
	}
	if own != 5 {
		t.Errorf("%d namespaces of its own, want 5", own)
	}
	h.consistent()
	c.end()
	h.reaches(sandbox, alloc.StateEnded)
	h.consistent()
}

// TestManyContainers: more than one transaction takes, born and dead at once.
func TestManyContainers(t *testing.T) {
	h := idleHost(t)
	var all []*proc
	for range alloc.MaxRegister + 10 {
		all = append(all, container(t, unix.CLONE_NEWUTS|unix.CLONE_NEWPID))
	}
	h.start()
	h.pool.mu.Lock()
	n := h.pool.calls["Register"]
	h.pool.mu.Unlock()
	if n > 4 {
		t.Errorf("%d registrations for %d containers", n, len(all))
	}
	for _, c := range all {
		h.serials(c.pid)
	}
	h.consistent()
	for _, c := range all {
		c.end()
	}
	h.consistent()
}

// TestRestart: neither an agent that starts again, nor one that lost its state, numbers anything anew.
func TestRestart(t *testing.T) {
	h := newHost(t)
	c := container(t, containerFlags)
	before := h.serials(c.pid)
	life := h.registrar.life.Load()
	same := func(what string) {
		t.Helper()
		if after := h.serials(c.pid); !maps.Equal(serialsOf(before), serialsOf(after)) {
			t.Errorf("%s: %v became %v", what, serialsOf(before), serialsOf(after))
		}
		h.consistent()
	}
	h.restart()
	same("restarted")
	if now := h.registrar.life.Load(); now != life {
		t.Errorf("incarnation %d became %d", life, now)
	}
	if err := h.stop(); err != nil {
		t.Fatal(err)
	}
	h.dir += "-lost" // no state
	t.Cleanup(func() { _ = os.RemoveAll(h.dir) })
	h.start()
	same("state lost")
	if now := h.registrar.life.Load(); now <= life {
		t.Errorf("incarnation %d after %d", now, life)
	}
}

func serialsOf(places map[alloc.NamespaceType]place) map[alloc.NamespaceType]alloc.Serial {
	m := map[alloc.NamespaceType]alloc.Serial{}
	for t, p := range places {
		m[t] = p.binding.Serial
	}
	return m
}

// inside starts a process that enters some of another's namespaces and makes others of its own.
func inside(t *testing.T, pid int, enter []string, flags uintptr) *proc {
	t.Helper()
	args := []string{"-t", fmt.Sprint(pid)}
	args = append(append(args, enter...), "cat")
	if _, err := exec.LookPath("nsenter"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("there is no nsenter (package util-linux); in CI this must work")
		}
		t.Skip("there is no nsenter")
	}
	c := exec.Command("nsenter", args...)
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	p := &proc{t: t, cmd: c, pid: c.Process.Pid, in: in}
	t.Cleanup(p.end)
	return p
}

// named waits until a process has become what it was started for.
func (h *host) named(pid int, comm string) {
	h.t.Helper()
	h.eventually(fmt.Sprintf("process %d is %s", pid, comm), func() error {
		p, err := h.kernel.Process(pid)
		if err == nil && p.Comm != comm {
			err = fmt.Errorf("it is %s", p.Comm)
		}
		return err
	})
}

// TestPod: containers of a pod share a network namespace; it has one serial, its first owner's.
func TestPod(t *testing.T) {
	h := idleHost(t)
	pause := container(t, unix.CLONE_NEWNET|unix.CLONE_NEWIPC|unix.CLONE_NEWUTS|unix.CLONE_NEWNS|unix.CLONE_NEWPID)
	app := withNet(t, fmt.Sprintf("/proc/%d/ns/net", pause.pid), unix.CLONE_NEWNS|unix.CLONE_NEWPID)
	h.start()
	first, second := h.serials(pause.pid), h.serials(app.pid)
	if serialsOf(first)[alloc.Net] != serialsOf(second)[alloc.Net] || first[alloc.Net].sandbox != first[alloc.Mnt].sandbox {
		t.Errorf("net: %+v and %+v", first[alloc.Net], second[alloc.Net])
	}
	if first[alloc.Mnt].sandbox == second[alloc.Mnt].sandbox {
		t.Error("both containers are one sandbox")
	}
	h.consistent()
	// The network lives on with the app; its serial stays.
	pause.end()
	h.eventually("the pause container's own namespaces are gone", func() error {
		s := h.book.sandbox(first[alloc.Mnt].sandbox)
		for _, b := range s.Bindings {
			if b.Live() != (b.Type == alloc.Net) {
				return fmt.Errorf("%s: live %v", b.Type, b.Live())
			}
		}
		return nil
	})
	if now := h.serials(app.pid); now[alloc.Net].binding.Serial != first[alloc.Net].binding.Serial {
		t.Errorf("net was %s and is %s", first[alloc.Net].binding.Serial, now[alloc.Net].binding.Serial)
	}
	h.consistent()
}

// withNet starts a container in a network namespace that is handed in, as a runtime does.
func withNet(t *testing.T, path string, flags uintptr) *proc {
	t.Helper()
	var p *proc
	if err := inNet(path, func() { p = container(t, flags) }); err != nil {
		t.Fatal(err)
	}
	return p
}

// inNet does what it is given in a network namespace: a process inherits the namespaces of the thread that
// starts it.
func inNet(path string, do func()) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Setns(fd, unix.CLONE_NEWNET)
			unix.Close(fd)
		}
		if err == nil {
			do()
		}
		done <- err
	}()
	return <-done
}

// TestEntered: who enters a container is in its namespaces and makes no sandbox.
func TestEntered(t *testing.T) {
	h := newHost(t)
	c := container(t, containerFlags)
	places := h.serials(c.pid)
	guest := inside(t, c.pid, []string{"--net", "--uts", "--ipc"}, 0)
	h.named(guest.pid, "cat")
	seen := h.serials(guest.pid)
	for _, typ := range []alloc.NamespaceType{alloc.Net, alloc.UTS, alloc.IPC} {
		if seen[typ].binding.Serial != places[typ].binding.Serial {
			t.Errorf("%s: %+v, the container has %+v", typ, seen[typ], places[typ])
		}
	}
	h.consistent()
	if n := len(h.book.all()); n != 2 {
		t.Errorf("%d sandboxes, want the host's and the container's", n)
	}
}

// TestStepByStep: a process that makes its namespaces one after the other is one sandbox, whatever the
// sweeps saw in between.
func TestStepByStep(t *testing.T) {
	h := newHost(t)
	p := spawn(t, 0, "/proc/self/exe", roleVar+"=unsharer")
	for _, typ := range []string{"uts", "mnt"} {
		if p.tell(typ) != "true" {
			t.Fatalf("unshare %s failed", typ)
		}
		h.serials(p.pid)
	}
	places := h.serials(p.pid)
	if places[alloc.Mnt].sandbox != places[alloc.UTS].sandbox {
		t.Errorf("%+v and %+v", places[alloc.Mnt], places[alloc.UTS])
	}
	h.consistent()
	// Another mount namespace: the first is gone, the sandbox goes on.
	if p.tell("mnt") != "true" {
		t.Fatal("unshare mnt failed")
	}
	if again := h.serials(p.pid); again[alloc.Mnt].sandbox != places[alloc.Mnt].sandbox || again[alloc.Mnt].binding.Serial == places[alloc.Mnt].binding.Serial {
		t.Errorf("%+v became %+v", places[alloc.Mnt], again[alloc.Mnt])
	}
	h.consistent()
}

// TestHostileName: a process can call itself anything; that keeps nobody from being numbered.
func TestHostileName(t *testing.T) {
	h := newHost(t)
	p := spawn(t, 0, "/proc/self/exe", roleVar+"=unsharer")
	if p.tell("\xff\x1b[31m\u202e") != "true" || p.tell("uts") != "true" {
		t.Fatal("the process could not do it")
	}
	other := container(t, containerFlags)
	places := h.serials(p.pid)
	h.serials(other.pid)
	s := h.book.sandbox(places[alloc.UTS].sandbox)
	if name := s.Labels["command"]; !strings.HasPrefix(name, "??[31m") {
		t.Errorf("it is called %q", name)
	}
	h.consistent()
}

func TestClip(t *testing.T) {
	for in, want := range map[string]string{
		"":                                    "",
		"plain":                               "plain",
		"a\nb\x00\xff":                        "a?b??",
		strings.Repeat("ä", 200):              strings.Repeat("ä", 128),
		"/x" + strings.Repeat("y", 300) + "z": strings.Repeat("y", 255) + "z",
	} {
		if got := clip(in); got != want {
			t.Errorf("clip(%.20q) = %.20q (%d bytes), want %.20q", in, got, len(got), want)
		}
	}
}

// TestIdentify asks for processes of every sort.
func TestIdentify(t *testing.T) {
	h := newHost(t)
	l := &local{a: h.Agent}
	ask := func(pid int) (*nsallocv1.IdentifyResponse, error) {
		return l.Identify(t.Context(), &nsallocv1.IdentifyRequest{Pid: int32(pid)})
	}
	c := container(t, containerFlags)
	resp, err := ask(c.pid) // at once: it need not be swept
	if err != nil {
		t.Fatal(err)
	}
	if n := len(resp.GetNamespaces()); n != len(h.namespaces(c.pid)) {
		t.Errorf("%d namespaces", n)
	}
	for _, n := range resp.GetNamespaces() {
		if !n.GetOfHost() && !slices.Equal(n.GetPids(), []int32{int32(c.pid)}) {
			t.Errorf("%s: pids %v", n.GetBinding().GetType(), n.GetPids())
		}
	}
	zombie := container(t, 0)
	_ = zombie.cmd.Process.Kill()
	h.eventually("it is a zombie", func() error {
		if p, err := h.kernel.Process(zombie.pid); err != nil || !p.Ended {
			return fmt.Errorf("%+v, %v", p, err)
		}
		return nil
	})
	for _, pid := range []int{zombie.pid, 0, -1, 1 << 22} {
		if _, err := ask(pid); alloc.ReasonOf(err) != alloc.ReasonProcessNotFound {
			t.Errorf("pid %d: %v", pid, err)
		}
	}
}
