//go:build linux

package kernelns

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The tests use real namespaces of real processes. Some of those processes are this binary again, in a
// role that the environment names.
const roleVar = "KERNELNS_TEST_ROLE"

// In init, because only that is sure to run on the process's first thread.
func init() {
	if os.Getenv(roleVar) != "leaderless" {
		return
	}
	runtime.LockOSThread()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // until the test closes the pipe
		os.Exit(0)
	}()
	fmt.Println("ready")
	// Ends this thread, the leader, and not the process.
	_, _, _ = unix.Syscall(unix.SYS_EXIT, 0, 0, 0)
}

func TestMain(m *testing.M) {
	if os.Getenv(roleVar) == "pidreuse" {
		if err := reusePID(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// skip leaves a test out for a reason that lies in the machine; in CI every test must run.
func skip(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("in CI this must work: "+format, args...)
	}
	t.Skipf(format, args...)
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		skip(t, "makes namespaces, for which it must be root")
	}
}

// needKernel skips on kernels before major.minor, naming what they lack.
func needKernel(t testing.TB, major, minor int, what string) {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	var a, b int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &a, &b); err != nil {
		t.Fatal(err)
	}
	if a < major || a == major && b < minor {
		t.Skipf("Linux %d.%d has no %s, which came with %d.%d", a, b, what, major, minor)
	}
}

func openKernel(t testing.TB) *Kernel {
	t.Helper()
	k, err := Open("")
	if err != nil {
		t.Fatal(err)
	}
	return k
}

const allNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWPID |
	unix.CLONE_NEWNET | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUSER | unix.CLONE_NEWTIME

// command is a process that waits for the end of its input, so that it never outlives the test binary.
func command(t testing.TB, name string, flags uintptr) *exec.Cmd {
	t.Helper()
	c := exec.Command(name)
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
	if flags&unix.CLONE_NEWUSER != 0 {
		c.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}
		c.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}
	}
	return c
}

// spawn starts the command; when spawn returns, it has its namespaces and its name.
func spawn(t testing.TB, c *exec.Cmd) *exec.Cmd {
	t.Helper()
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatalf("start %s: %v", c.Path, err)
	}
	t.Cleanup(func() {
		in.Close()
		end(c)
	})
	return c
}

func spawnCat(t testing.TB, flags uintptr) *exec.Cmd {
	t.Helper()
	return spawn(t, command(t, "cat", flags))
}

// end kills and reaps; it does nothing the second time.
func end(c *exec.Cmd) {
	if c.ProcessState == nil {
		_ = c.Process.Kill()
		_ = c.Wait()
	}
}

// kill returns when the process is dead; it stays a zombie.
func kill(t testing.TB, c *exec.Cmd) {
	t.Helper()
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for {
		err := unix.Waitid(unix.P_PID, c.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			if err != nil {
				t.Fatal(err)
			}
			return
		}
	}
}

func pidfd(t testing.TB, pid int) *os.File {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	t.Cleanup(func() { f.Close() })
	return f
}

// eventually asks until the answer is yes. Between two tries it waits for an RCU grace period, which is
// what the kernel itself waits for before it lets go of most things.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	const membarrierCmdGlobal = 1
	for deadline := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("still not so after 20 s: %s", what)
		}
		_, _, _ = unix.Syscall(unix.SYS_MEMBARRIER, membarrierCmdGlobal, 0, 0)
	}
}

// leaderless starts a process whose first thread has ended while others run on.
func leaderless(t testing.TB, k *Kernel) *exec.Cmd {
	t.Helper()
	c := command(t, "/proc/self/exe", 0)
	c.Env = append(os.Environ(), roleVar+"=leaderless")
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	c.Stdout = w
	spawn(t, c)
	w.Close()
	if b := make([]byte, 5); !func() bool { _, err := io.ReadFull(out, b); return err == nil && strings.HasPrefix(string(b), "ready") }() {
		t.Fatalf("the helper said %q", b)
	}
	eventually(t, "the leader ends", func() bool {
		p, err := k.Process(c.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		return p.State == 'Z'
	})
	return c
}
