package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// The tests work on real namespaces of real processes. So that an agent under test sees no other
// processes than the test's, the test binary runs itself again as PID 1 of a PID namespace, which then
// is "the host". Other processes are this binary once more, in a role that the environment names.
const roleVar = "AGENT_TEST_ROLE"

// In init, because only that is sure to run on the process's first thread, whose namespaces are those
// that /proc shows.
func init() {
	// Nor may a goroutine that changes its thread's namespaces find itself on the first one.
	runtime.LockOSThread()
	if os.Getenv(roleVar) != "unsharer" {
		return
	}
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		var err error
		switch line := in.Text(); line {
		case "uts":
			err = unix.Unshare(unix.CLONE_NEWUTS)
		case "mnt":
			err = unix.Unshare(unix.CLONE_NEWNS)
		default: // what it calls itself
			err = os.WriteFile("/proc/self/comm", []byte(line), 0)
		}
		fmt.Println(err == nil)
	}
	os.Exit(0)
}

func TestMain(m *testing.M) {
	switch role := os.Getenv(roleVar); role {
	case "criu":
		fakeCRIU()
	case "hook":
		fakeHook()
	case "inner":
		os.Exit(inner(m))
	default:
		os.Exit(outer(m))
	}
}

// outer runs the tests in namespaces of their own; without root those that need none.
func outer(m *testing.M) int {
	fuzzing := slices.ContainsFunc(os.Args, func(arg string) bool { return strings.HasPrefix(arg, "-test.fuzz") })
	if os.Geteuid() != 0 || fuzzing { // a fuzzer talks to its workers, which are this binary, by inherited files
		return m.Run()
	}
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Env = append(os.Environ(), roleVar+"=inner")
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := c.Run() // the signal comes when this thread ends: it is locked
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit) && exit.ExitCode() > 0:
		return exit.ExitCode()
	}
	fmt.Fprintln(os.Stderr, "the tests' namespaces:", err)
	return 1
}

func inner(m *testing.M) int {
	os.Unsetenv(roleVar)
	os.Setenv("GORACE", "atexit_sleep_ms=0") // the race detector makes every process of ours wait a second
	err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	if err == nil {
		err = unix.Mount("proc", "/proc", "proc", 0, "")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "mount /proc:", err)
		return 1
	}
	// Most of what the tests would wait for. Not shorter: what they let CRIU do meanwhile has to be seen.
	settlePause, helloPause = settlePause/5, helloPause/5
	if criuProgram, err = copyOfSelf(); err != nil {
		fmt.Fprintln(os.Stderr, "a program for CRIU:", err)
		return 1
	}
	defer os.Remove(criuProgram)
	code := m.Run()
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// needHost leaves a test out where there is no host of its own; in CI every test must run.
func needHost(t *testing.T) {
	t.Helper()
	if os.Getpid() == 1 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("makes namespaces, for which it must be root; in CI this must work")
	}
	t.Skip("makes namespaces, for which it must be root")
}

// order is one line to the process that stands in for CRIU.
type order struct {
	// Tree is the clone flags of a task to make; Parked one that executes CRIU's program.
	Tree   uintptr `json:",omitempty"`
	Parked bool    `json:",omitempty"`
	// Serves has the parked task wait as a daemon does, not for CRIU's next step.
	Serves bool `json:",omitempty"`
	// Program is what the task executes otherwise; empty for sleep.
	Program string `json:",omitempty"`
	// Net is the network namespace for it to join.
	Net string `json:",omitempty"`
	// Action is to be brought by a hook, with what Without does not name.
	Action  criuhook.Action `json:",omitempty"`
	Images  string          `json:",omitempty"`
	Init    int             `json:",omitempty"`
	Without []string        `json:",omitempty"`
	// Claims names another CRIU than the hook's parent.
	Claims int    `json:",omitempty"`
	Socket string `json:",omitempty"`
}

// said is the answer to an order.
type said struct {
	PID     int
	Verdict criuhook.Verdict
	Message string
	Err     string
}

// fakeCRIU does what it is told, until its input ends.
func fakeCRIU() {
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		var o order
		if err := json.Unmarshal(in.Bytes(), &o); err != nil {
			os.Exit(1)
		}
		var s said
		if o.Action == "" {
			s = makeTree(o)
		} else {
			s = runHook(in.Bytes())
		}
		b, _ := json.Marshal(s)
		fmt.Println(string(b))
	}
	os.Exit(0)
}

func makeTree(o order) said {
	c := exec.Command("sleep", "3600")
	if o.Program != "" {
		c = exec.Command(o.Program)
	}
	if o.Parked {
		return forkParked(o.Tree, o.Serves)
	}
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: o.Tree}
	err := errors.New("not started")
	start := func() { err = c.Start() }
	if o.Net == "" {
		start()
	} else if e := inNet(o.Net, start); e != nil {
		err = e
	}
	if err != nil {
		return said{Err: err.Error()}
	}
	go func() { _ = c.Wait() }() // CRIU reaps what it kills
	return said{PID: c.Process.Pid}
}

// forkParked makes a task as CRIU does: forked, in namespaces of its own, executing nothing else, and waiting in
// futex(2) for a next step. One that serves waits in ppoll(2).
//
//go:norace
func forkParked(flags uintptr, serves bool) said {
	word := new(uint32)
	call, arg := uintptr(unix.SYS_FUTEX), uintptr(unsafe.Pointer(word))
	if serves {
		call, arg = unix.SYS_PPOLL, 0
	}
	// Nothing of the runtime works in the child: it makes system calls and nothing else.
	pid, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, flags|uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	for pid == 0 && errno == 0 {
		_, _, _ = syscall.RawSyscall6(call, arg, 0 /* FUTEX_WAIT */, 0, 0, 0, 0)
	}
	runtime.KeepAlive(word)
	if errno != 0 {
		return said{Err: errno.Error()}
	}
	go func() { // CRIU reaps what it kills
		var status unix.WaitStatus
		_, _ = unix.Wait4(int(pid), &status, 0, nil)
	}()
	return said{PID: int(pid)}
}

// criuProgram is what the process that stands in for CRIU executes: a file of its own, as CRIU's is.
var criuProgram string

func copyOfSelf() (path string, err error) {
	program, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return "", err
	}
	f, err := os.CreateTemp("", "criu-of-tests-")
	if err != nil {
		return "", err
	}
	_, err = f.Write(program)
	return f.Name(), errors.Join(err, f.Chmod(0o700), f.Close())
}

func runHook(line []byte) said {
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), roleVar+"=hook", "ORDER="+string(line))
	c.Stderr = os.Stderr
	out, err := c.Output()
	var s said
	if err == nil {
		err = json.Unmarshal(out, &s)
	}
	if err != nil {
		s.Err = err.Error()
	}
	return s
}

// fakeHook is nsalloc-hook on another socket.
func fakeHook() {
	var o order
	if err := json.Unmarshal([]byte(os.Getenv("ORDER")), &o); err != nil {
		os.Exit(1)
	}
	r := criuhook.Request{Action: o.Action, Caller: criuhook.Script, CRIUPID: os.Getppid(), InitPID: o.Init}
	if o.Claims != 0 {
		r.CRIUPID = o.Claims
	}
	r.ImageDir = fmt.Sprintf("/proc/%d/fd/7", r.CRIUPID)
	var fds []criuhook.Descriptor
	add := func(name string, fd int, err error) {
		for _, w := range o.Without {
			if w == name {
				return
			}
		}
		if err == nil {
			fds = append(fds, criuhook.Descriptor{Name: name, FD: fd})
		}
	}
	fd, err := unix.PidfdOpen(r.CRIUPID, 0)
	add(criuhook.FDCRIU, fd, err)
	if o.Init != 0 {
		fd, err = unix.PidfdOpen(o.Init, 0)
		add(criuhook.FDInit, fd, err)
	}
	if o.Images != "" {
		fd, err = unix.Open(o.Images, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		add(criuhook.FDImages, fd, err)
	}
	var s said
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	answer, err := criuhook.Ask(ctx, o.Socket, r, fds...)
	s.Verdict, s.Message = answer.Verdict, answer.Message
	if err != nil {
		s.Err = err.Error()
	}
	_ = json.NewEncoder(os.Stdout).Encode(s)
	os.Exit(0)
}
