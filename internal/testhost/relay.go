package testhost

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A command inside a host is a child of that host's PID 1, so that its
// namespaces, cgroups and parent are right without any setns. What the caller
// gets as *exec.Cmd is a relay on the machine: it hands PID 1 its own files,
// passes signals on, and ends as the command ends. The command dies with its
// relay.

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// sigCancel tells a relay that the context is over: kill the command and wait
// for its end, so that Wait's return means that it is gone.
const sigCancel = syscall.Signal(40)

// relayCommand is the *exec.Cmd of a command that the PID 1 behind the socket
// in dir will start.
func relayCommand(ctx context.Context, dir string, env []string, name string, args []string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, self)
	cmd.Args = append([]string{roleRelay, dir, name}, args...)
	cmd.Env = env
	cmd.Cancel = func() error { return cmd.Process.Signal(sigCancel) }
	// For when somebody else holds an output pipe open, or PID 1 is stuck.
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// dialInit connects to a PID 1. The path of a socket has 108 bytes at most,
// and a state directory may be deeper than that; /proc shortens it.
func dialInit(dir string) (*net.UnixConn, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("the host is closed: %w", err)
	}
	defer d.Close()
	addr := &net.UnixAddr{Net: "unixpacket", Name: fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), socketName)}
	c, err := net.DialUnix("unixpacket", nil, addr)
	if err != nil {
		return nil, fmt.Errorf("PID 1 behind %s does not answer (see %s): %w", filepath.Join(dir, socketName), filepath.Join(dir, logName), err)
	}
	return c, nil
}

func relayMain() {
	if len(os.Args) < 3 {
		die(errors.New("too few arguments: start this only through package testhost"))
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals)
	dir, args := os.Args[1], os.Args[2:]
	conn, err := dialInit(dir)
	if err != nil {
		die(err)
	}
	req := request{Op: "run", Args: args, Env: os.Environ()}
	if err := sendPacket(conn, req, inheritedFiles()...); err != nil {
		die(fmt.Errorf("cannot hand %q to PID 1: %w", args[0], err))
	}
	go forwardSignals(conn, signals)
	var rep reply
	if _, err := receivePacket(conn, &rep); err != nil {
		fmt.Fprintf(os.Stderr, "testhost: %s: PID 1 of the host is gone, and with it the command %q\n", filepath.Base(dir), args[0])
		endBySignal(unix.SIGKILL)
	}
	switch {
	case rep.NotFound:
		fmt.Fprintf(os.Stderr, "testhost: %s: %s\n", filepath.Base(dir), rep.Error)
		unix.Exit(127)
	case rep.Error != "":
		die(errors.New(rep.Error))
	case rep.Signal != 0:
		endBySignal(syscall.Signal(rep.Signal))
	}
	unix.Exit(rep.Code)
}

func forwardSignals(conn *net.UnixConn, signals <-chan os.Signal) {
	for s := range signals {
		sig := s.(syscall.Signal)
		switch sig {
		case unix.SIGCHLD, unix.SIGURG, unix.SIGPIPE:
			// About this process: SIGURG is the Go runtime's own.
			continue
		case sigCancel:
			sig = unix.SIGKILL
		}
		_ = sendPacket(conn, request{Signal: int(sig)})
	}
}

// inheritedFiles are 0, 1, 2 and what the caller put in ExtraFiles.
func inheritedFiles() []int {
	fds := []int{0, 1, 2}
	for fd := 3; ; fd++ {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC != 0 {
			return fds // ours, or nothing
		}
		fds = append(fds, fd)
	}
}

// endBySignal makes this process's wait status that of the command.
func endBySignal(sig syscall.Signal) {
	_ = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
	// signal.Reset gives most signals back to the runtime, which drops them.
	// An action of all zeros is SIG_DFL on every architecture.
	var action [8]uintptr
	_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&action)), 0, 8, 0, 0)
	runtime.LockOSThread()
	_ = unix.Tgkill(os.Getpid(), unix.Gettid(), sig) // a signal to oneself arrives before this returns
	unix.Exit(128 + int(sig))
}
