package testhost

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	socketName = "init.sock" // where relays reach PID 1
	logName    = "init.log"  // what PID 1 had to say
)

// bootTimeout is far above what a boot takes (some 20 ms).
const bootTimeout = 30 * time.Second

// box is the creator's side of one PID 1: new namespaces that live exactly as
// long as it does. Hosts are boxes with a root file system; a pool is one
// without.
type box struct {
	dir     string
	control *net.UnixConn
	cmd     *exec.Cmd
	done    chan struct{} // closed once PID 1 was waited for: then nothing runs in its PID namespace
}

type boxSpec struct {
	dir       string // of the socket and the log; exists
	namespace uintptr
	config    bootConfig
	// prepare runs while the new process does nothing yet.
	prepare func(pid int) error
}

func startBox(ctx context.Context, spec boxSpec) (_ *box, err error) {
	if !mainCalled.Load() {
		return nil, errors.New("this program does not call testhost.Main: make that the first statement of main or TestMain")
	}
	ours, theirs, err := packetPair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	listener, err := listenIn(spec.dir)
	if err != nil {
		_ = ours.Close()
		return nil, err
	}
	defer listener.Close()
	log, err := os.OpenFile(filepath.Join(spec.dir, logName), os.O_CREATE|os.O_WRONLY|os.O_APPEND|unix.O_CLOEXEC, 0o600)
	if err != nil {
		_ = ours.Close()
		return nil, err
	}
	defer log.Close()

	b := &box{dir: spec.dir, control: ours, done: make(chan struct{})}
	b.cmd = exec.Command(self)
	b.cmd.Args = []string{roleEnter}
	b.cmd.Env = []string{"PATH=" + defaultPath}
	b.cmd.Stdout, b.cmd.Stderr = log, log
	b.cmd.ExtraFiles = []*os.File{theirs, listener}
	b.cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | spec.namespace&^unix.CLONE_NEWCGROUP,
		Setsid:     true, // the terminal's signals are not for PID 1
	}
	if err := b.cmd.Start(); err != nil {
		_ = ours.Close()
		return nil, fmt.Errorf("cannot start a PID 1 in new namespaces: %w: root is needed, and a kernel that allows it (sysctl user.max_*_namespaces)", err)
	}
	go func() {
		_ = b.cmd.Wait()
		close(b.done)
	}()
	if err := b.boot(ctx, spec); err != nil {
		text, _ := os.ReadFile(filepath.Join(spec.dir, logName))
		_ = b.stop(ctx)
		return nil, fmt.Errorf("%s: %w\n%s", filepath.Base(spec.dir), err, strings.TrimSpace(string(text)))
	}
	return b, nil
}

func (b *box) boot(ctx context.Context, spec boxSpec) error {
	if spec.prepare != nil {
		if err := spec.prepare(b.pid()); err != nil {
			return err
		}
	}
	deadline := time.Now().Add(bootTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	_ = b.control.SetDeadline(deadline)
	defer context.AfterFunc(ctx, func() { _ = b.control.SetDeadline(time.Unix(1, 0)) })()
	start := []byte("n")
	if spec.namespace&unix.CLONE_NEWCGROUP != 0 {
		start = []byte("c")
	}
	if _, err := b.control.Write(start); err != nil {
		return fmt.Errorf("PID 1 left before it was told to start: %w", err)
	}
	if err := sendPacket(b.control, spec.config); err != nil {
		return fmt.Errorf("PID 1 left before it was configured: %w", err)
	}
	var rep reply
	if _, err := receivePacket(b.control, &rep); err != nil {
		return fmt.Errorf("PID 1 did not come up: %w", errors.Join(err, ctx.Err()))
	}
	if rep.Error != "" {
		return errors.New(rep.Error)
	}
	return b.control.SetDeadline(time.Time{})
}

func (b *box) pid() int { return b.cmd.Process.Pid }

// stop kills PID 1, and so everything in its PID namespace, and returns when
// all of it is gone. It may be called again.
func (b *box) stop(ctx context.Context, cgroups ...string) error {
	defer b.control.Close()
	_ = b.cmd.Process.Kill() // fails only when it was waited for
	return until(ctx, func() error {
		select {
		case <-b.done:
			return nil
		default:
		}
		for _, dir := range cgroups {
			emptyCgroup(dir) // the exit of PID 1 waits for frozen processes
		}
		return fmt.Errorf("PID 1 of %s (process %d) does not end: one of its processes is stuck in the kernel", filepath.Base(b.dir), b.pid())
	})
}

// ask sends PID 1 one request and returns its answer.
func (b *box) ask(req request, fds ...int) (reply, []*os.File, error) {
	var rep reply
	c, err := dialInit(b.dir)
	if err != nil {
		return rep, nil, err
	}
	defer c.Close()
	if err := sendPacket(c, req, fds...); err != nil {
		return rep, nil, fmt.Errorf("PID 1 of %s is gone: %w", filepath.Base(b.dir), err)
	}
	files, err := receivePacket(c, &rep)
	if err != nil {
		return rep, nil, fmt.Errorf("PID 1 of %s is gone: %w", filepath.Base(b.dir), err)
	}
	if rep.Error != "" {
		closeAll(files)
		return rep, nil, errors.New(rep.Error)
	}
	return rep, files, nil
}

func packetPair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot make a socket pair: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "control")
	ours, err := packetConn(os.NewFile(uintptr(fds[0]), "control"))
	if err != nil {
		_ = theirs.Close()
		return nil, nil, err
	}
	return ours, theirs, nil
}

// listenIn makes PID 1's socket before PID 1 exists: whoever connects early
// waits in its backlog.
func listenIn(dir string) (*os.File, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	if err := os.Remove(filepath.Join(dir, socketName)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	// See dialInit for the detour.
	addr := &net.UnixAddr{Net: "unixpacket", Name: fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), socketName)}
	l, err := net.ListenUnix("unixpacket", addr)
	if err != nil {
		return nil, fmt.Errorf("cannot listen in %s: %w: NSALLOC_CACHE must be on a file system with unix sockets", dir, err)
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	return l.File()
}
