package testhost

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// creatorRole makes a copy of the test binary a program that makes a pool and
// waits to be killed.
const creatorRole = "TESTHOST_CREATOR"

func TestMain(m *testing.M) {
	Main()
	if os.Getenv(creatorRole) != "" {
		creatorMain()
	}
	os.Exit(m.Run())
}

// need skips a test on a machine that cannot make hosts; in CI that is a
// failure, or nobody would notice that nothing is tested.
func need(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("makes hosts")
	}
	if err := Check(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

func testContext(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func newPool(t *testing.T, hosts ...string) *Pool {
	t.Helper()
	need(t)
	rootfs, err := RootFS(testContext(t, 10*time.Minute), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	p, err := NewPool(testContext(t, time.Minute), Options{RootFS: rootfs, Hosts: hosts})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d hosts in %v", len(hosts), time.Since(start).Round(time.Millisecond))
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func output(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	out, err := cmd.Output()
	if err != nil {
		var e *exec.ExitError
		if errors.As(err, &e) {
			t.Fatalf("%v: %v: %s", cmd.Args, err, e.Stderr)
		}
		t.Fatalf("%v: %v", cmd.Args, err)
	}
	return strings.TrimSpace(string(out))
}

// eventually waits for a condition that nothing announces.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	if err := until(testContext(t, 20*time.Second), f); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func TestHost(t *testing.T) {
	p := newPool(t, "a", "b")
	ctx := testContext(t, time.Minute)
	a, b := p.Host("a"), p.Host("b")

	machine, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	bootA := output(t, a.Command(ctx, "cat", "/proc/sys/kernel/random/boot_id"))
	bootB := output(t, b.Command(ctx, "cat", "/proc/sys/kernel/random/boot_id"))
	if bootA != a.BootID() || bootB != b.BootID() || bootA == bootB || bootA == strings.TrimSpace(string(machine)) {
		t.Errorf("boot ids: a %s (want %s), b %s (want %s), machine %s", bootA, a.BootID(), bootB, b.BootID(), machine)
	}
	if got := output(t, a.Command(ctx, "hostname")); got != "a" {
		t.Errorf("host name %q, want a", got)
	}
	if got := output(t, a.Command(ctx, "sh", "-c", "echo $PPID; cat /proc/1/comm >/dev/null && echo ok")); got != "1\nok" {
		t.Errorf("parent of a command and /proc: %q", got)
	}
	for _, ns := range []string{"mnt", "pid", "net", "uts", "ipc", "cgroup"} {
		seen := map[string]string{}
		for who, cmd := range map[string]*exec.Cmd{
			"a": a.Command(ctx, "readlink", "/proc/self/ns/"+ns), "b": b.Command(ctx, "readlink", "/proc/self/ns/"+ns),
			"machine": exec.Command("readlink", "/proc/self/ns/"+ns),
		} {
			id := output(t, cmd)
			if other, ok := seen[id]; ok {
				t.Errorf("%s and %s share the %s namespace %s", who, other, ns, id)
			}
			seen[id] = who
		}
	}
	for line := range strings.Lines(output(t, a.Command(ctx, "cat", "/proc/self/cgroup"))) {
		if f := strings.SplitN(strings.TrimSpace(line), ":", 3); f[2] != "/" && f[2] != "/init" {
			t.Errorf("cgroup of a command: %s, want the namespace's root", line)
		}
	}
	// To each other, and to the bridge.
	for _, to := range []string{"b", "server"} {
		output(t, a.Command(ctx, "busybox", "ping", "-c1", "-W5", to))
	}
	if got := output(t, p.Command(ctx, "cat", "/proc/sys/kernel/hostname")); got == "a" || got == "b" {
		t.Errorf("a command of the pool is in host %s", got)
	}
}

// TestPoolNetwork reaches a server in the pool from a host and from here.
func TestPoolNetwork(t *testing.T) {
	p := newPool(t, "a")
	ctx := testContext(t, time.Minute)
	var l net.Listener
	err := inNetNS(p.box.pid(), func() (err error) {
		l, err = net.Listen("tcp4", netip.AddrPortFrom(p.Addr(), 0).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(c, "hello")
			_ = c.Close()
		}
	}()
	c, err := p.DialContext(ctx, "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if line, _ := bufio.NewReader(c).ReadString('\n'); line != "hello" {
		t.Errorf("the machine read %q", line)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	if got := output(t, p.Host("a").Command(ctx, "busybox", "nc", "server", port)); got != "hello" {
		t.Errorf("host a read %q", got)
	}
	if _, err := p.DialContext(ctx, "tcp", "server:1"); err == nil {
		t.Error("a name was dialled")
	}
}

func TestFiles(t *testing.T) {
	p := newPool(t, "a", "b")
	ctx := testContext(t, time.Minute)
	a, b := p.Host("a"), p.Host("b")
	src := filepath.Join(t.TempDir(), "prog")
	if err := os.WriteFile(src, []byte("#!/bin/sh\necho it runs\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := a.CopyIn(src, "/opt/x/prog", 0o755); err != nil {
		t.Fatal(err)
	}
	if got := output(t, a.Command(ctx, "/opt/x/prog")); got != "it runs" {
		t.Errorf("copied program says %q", got)
	}
	output(t, a.Command(ctx, "sh", "-c", "mkdir -p /images/sub; echo 1 >/images/sub/f; chown 100000:5 /images/sub/f; chmod 640 /images/sub/f; ln -s sub /images/l"))
	if err := b.CopyDir(a, "/images", "/var/lib/images"); err != nil {
		t.Fatal(err)
	}
	if got := output(t, b.Command(ctx, "stat", "-c", "%n %u %g %a %N", "/var/lib/images/sub/f", "/var/lib/images/l")); got !=
		"/var/lib/images/sub/f 100000 5 640 '/var/lib/images/sub/f'\n/var/lib/images/l 0 0 777 '/var/lib/images/l' -> 'sub'" {
		t.Errorf("copied: %s", got)
	}
	if got, err := os.ReadFile(b.Path("/etc/hostname")); err != nil || string(got) != "b\n" {
		t.Errorf("Path: %q, %v", got, err)
	}
	if err := a.WriteFile("/etc/criu/default.conf", []byte("tcp-close\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err := a.ReadFile("/etc/criu/default.conf"); err != nil || string(got) != "tcp-close\n" {
		t.Errorf("ReadFile: %q, %v", got, err)
	}
	if _, err := os.Stat(filepath.Join(p.rootfs, "etc/criu/default.conf")); err == nil {
		t.Error("a host's file went into the shared root file system")
	}
	// An absolute link must not lead out onto the machine.
	output(t, a.Command(ctx, "ln", "-s", "/tmp", "/out"))
	if err := a.WriteFile("/out/testhost-escaped", nil, 0o600); err == nil {
		t.Error("wrote through an absolute link")
	}
}

func TestPID(t *testing.T) {
	p := newPool(t, "a", "b")
	ctx := testContext(t, time.Minute)
	a := p.Host("a")
	inner := 0
	if _, err := fmt.Sscan(output(t, a.Command(ctx, "sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo $!")), &inner); err != nil {
		t.Fatal(err)
	}
	outer, err := a.OuterPID(inner)
	if err != nil {
		t.Fatal(err)
	}
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", outer))
	if err != nil || outer == inner {
		t.Errorf("outer pid %d of %d is %s (%v)", outer, inner, comm, err)
	}
	if got, err := a.InnerPID(outer); err != nil || got != inner {
		t.Errorf("InnerPID(%d) = %d, %v; want %d", outer, got, err, inner)
	}
	if got, err := a.OuterPID(1); err != nil || got != a.InitPID() {
		t.Errorf("OuterPID(1) = %d, %v; want %d", got, err, a.InitPID())
	}
	if got, err := p.Host("b").InnerPID(outer); err == nil {
		t.Errorf("host b has a process of host a as %d", got)
	}
	if _, err := a.OuterPID(1 << 21); err == nil {
		t.Error("a process that does not exist has a number")
	}
	// Its parent is gone: PID 1 has it now, and must reap it.
	if err := unix.Kill(outer, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "orphan reaped", func() error {
		if err := unix.Kill(outer, 0); err == nil {
			return fmt.Errorf("process %d is still there", outer)
		}
		return nil
	})
}

func TestReboot(t *testing.T) {
	p := newPool(t, "a", "b")
	ctx := testContext(t, time.Minute)
	a := p.Host("a")
	before := a.BootID()
	output(t, a.Command(ctx, "sh", "-c", "mkdir -p /var/lib/nsalloc /run/nsalloc; echo kept >/var/lib/nsalloc/f"))
	if err := a.Halt(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := a.ReadFile("/etc/hostname"); err == nil {
		t.Error("a halted host answers")
	}
	if err := a.Boot(ctx); err != nil {
		t.Fatal(err)
	}
	if a.BootID() == before {
		t.Error("the boot id survived")
	}
	if got := output(t, a.Command(ctx, "sh", "-c", "cat /var/lib/nsalloc/f; ls /run/nsalloc 2>&1 | grep -c such")); got != "kept\n1" {
		t.Errorf("after the boot: %q", got)
	}
	output(t, p.Host("b").Command(ctx, "busybox", "ping", "-c1", "-W5", "a"))
}

// traces lists what is left of pools: mounts, cgroups, links, directories. It
// compares with a listing before, because other programs may have pools.
func traces(t *testing.T) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		found["mount "+strings.TrimSpace(line)] = true
	}
	hierarchies, err := cgroupMounts()
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range hierarchies {
		_ = filepath.WalkDir(h.Own, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				found["cgroup "+p] = true
			}
			return nil
		})
	}
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		found["link "+l.Attrs().Name] = true
	}
	run, err := runDir()
	if err != nil {
		t.Fatal(err)
	}
	dirs, err := os.ReadDir(run)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		found["dir "+d.Name()] = true
	}
	return found
}

// compareTraces proves that nothing is left of pools that are over. What belongs to a pool whose creator
// lives is another program's; its pool may also end while we look, so what is left has a moment to go.
func compareTraces(t *testing.T, before, after map[string]bool) {
	t.Helper()
	eventually(t, "nothing is left over", func() error {
		for k := range after {
			if !before[k] && !ofLivePool(t, k) {
				after = traces(t)
				return fmt.Errorf("left over: %s", k)
			}
		}
		return nil
	})
}

// ofLivePool reports whether a trace names a pool whose creator holds its lock.
func ofLivePool(t *testing.T, trace string) bool {
	t.Helper()
	run, err := runDir()
	if err != nil {
		t.Fatal(err)
	}
	dirs, err := os.ReadDir(run)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		if !strings.Contains(trace, d.Name()) {
			continue
		}
		lock, err := lockFile(filepath.Join(run, d.Name(), lockName), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			return true
		}
		if err == nil {
			lock.Close()
		}
	}
	return false
}
