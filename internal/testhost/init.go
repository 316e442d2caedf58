package testhost

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Files a PID 1 inherits.
const (
	fdControl  = 3 // packet socket to the creator; its end is our end
	fdListener = 4 // where relays connect
)

// die ends a re-executed copy; its stderr is the log in the state directory.
// Copies end by unix.Exit: os.Exit takes a second under the race detector, and
// each command has a relay.
func die(err error) {
	fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[0], err)
	unix.Exit(125)
}

// enterMain waits until the creator has moved this process into its cgroups,
// makes a cgroup namespace rooted there, and executes the real PID 1. Go has
// threads by now and unshare changes only the calling one; execve makes it the
// only one, so that PID 1 and all its children are in the new namespace.
func enterMain() {
	runtime.LockOSThread()
	b := make([]byte, 1)
	if n, _, err := unix.Recvfrom(fdControl, b, 0); err != nil || n == 0 {
		die(fmt.Errorf("creator left before the cgroups were ready (%v)", err))
	}
	if b[0] == 'c' {
		if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
			die(fmt.Errorf("cannot make a cgroup namespace: %w: the kernel needs CONFIG_CGROUPS, and root", err))
		}
	}
	die(unix.Exec(self, []string{roleInit}, os.Environ()))
}

// reaper is PID 1's record of the processes it started.
type reaper struct {
	mu      sync.Mutex                        // held across fork, so that no exit is seen before its entry
	waiting map[int]chan<- syscall.WaitStatus // by PID; guarded by mu
}

func initMain() {
	unix.CloseOnExec(fdControl)
	unix.CloseOnExec(fdListener)
	// Caught and dropped, not ignored: children would inherit that.
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP, unix.SIGINT, unix.SIGTERM, unix.SIGQUIT)
	control, err := packetConn(os.NewFile(fdControl, "control"))
	if err != nil {
		die(err)
	}
	var cfg bootConfig
	if _, err := receivePacket(control, &cfg); err != nil {
		die(fmt.Errorf("creator left before it sent a configuration: %w", err))
	}
	unix.Umask(0o022)
	if err := bootUp(cfg); err != nil {
		_ = sendPacket(control, reply{Error: err.Error()})
		die(err)
	}
	f := os.NewFile(fdListener, "listener")
	l, err := net.FileListener(f)
	_ = f.Close()
	if err != nil {
		die(err)
	}
	r := &reaper{waiting: map[int]chan<- syscall.WaitStatus{}}
	go r.reap()
	go r.serve(l)
	if err := sendPacket(control, reply{}); err != nil {
		die(err)
	}
	// Blocks until the creator is gone or closed its end.
	_, err = receivePacket(control, &request{})
	lastBreath()
	fmt.Fprintf(os.Stderr, "%s: creator left (%v)\n", os.Args[0], err)
	unix.Exit(0)
}

// lastBreath kills everything else in this PID namespace, and then thaws it: a
// process in a frozen cgroup of version 1 (CRIU at work) does not even take
// SIGKILL, and this process's exit would wait for it for ever. In this order
// nothing thawed runs another instruction of its own.
func lastBreath() {
	_ = unix.Kill(-1, unix.SIGKILL)
	_ = filepath.WalkDir("/sys/fs/cgroup/freezer", func(p string, d os.DirEntry, err error) error {
		if err == nil && d.Name() == "freezer.state" {
			_ = os.WriteFile(p, []byte("THAWED"), 0)
		}
		return nil
	})
}

// reap collects every child, ours or an orphan that fell to PID 1.
func (r *reaper) reap() {
	sigchld := make(chan os.Signal, 1)
	signal.Notify(sigchld, unix.SIGCHLD)
	for {
		// Drain first: children may have gone before Notify.
		for {
			r.mu.Lock()
			var ws syscall.WaitStatus
			pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
			if ch, ok := r.waiting[pid]; ok && err == nil {
				delete(r.waiting, pid)
				ch <- ws // has room for one
			}
			r.mu.Unlock()
			if err == syscall.EINTR {
				continue
			}
			if err != nil || pid <= 0 {
				break
			}
		}
		<-sigchld
	}
}

func (r *reaper) start(path string, args []string, attr *syscall.ProcAttr) (int, <-chan syscall.WaitStatus, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := syscall.ForkExec(path, args, attr)
	if err != nil {
		return 0, nil, err
	}
	ch := make(chan syscall.WaitStatus, 1)
	r.waiting[pid] = ch
	return pid, ch, nil
}

// signal reaches only a process that was not reaped: its number cannot have
// been given to another meanwhile. A negative pid is the process's group.
func (r *reaper) signal(pid int, sig syscall.Signal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.waiting[max(pid, -pid)]; ok {
		_ = syscall.Kill(pid, sig)
	}
}

func (r *reaper) serve(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			die(fmt.Errorf("cannot accept connections: %w", err))
		}
		go func() {
			defer c.Close()
			conn := c.(*net.UnixConn)
			var req request
			files, err := receivePacket(conn, &req)
			if err != nil {
				return
			}
			defer closeAll(files)
			switch req.Op {
			case "run":
				r.run(conn, req, files)
			case "open-pid":
				openPID(conn, req.PID)
			case "tell-pid":
				tellPID(conn, files)
			default:
				_ = sendPacket(conn, reply{Error: fmt.Sprintf("unknown request %q", req.Op)})
			}
		}()
	}
}

// run starts a command with the relay's files and stays until it is over. A
// relay that goes away takes the command's process group with it; what the
// command put into sessions of its own (containers, daemons) stays.
func (r *reaper) run(conn *net.UnixConn, req request, files []*os.File) {
	path, err := lookPath(req.Args[0], req.Env)
	if err != nil {
		_ = sendPacket(conn, reply{Error: err.Error(), NotFound: true})
		return
	}
	attr := &syscall.ProcAttr{Dir: "/", Env: req.Env, Sys: &syscall.SysProcAttr{Setsid: true}}
	for _, f := range files {
		attr.Files = append(attr.Files, f.Fd())
	}
	pid, exited, err := r.start(path, req.Args, attr)
	if err != nil {
		_ = sendPacket(conn, reply{Error: fmt.Sprintf("cannot execute %s: %v", path, err), NotFound: true})
		return
	}
	closeAll(files) // or a pipe's reader would wait for us
	go func() {
		for {
			var m request
			if _, err := receivePacket(conn, &m); err != nil {
				r.signal(-pid, unix.SIGKILL)
				return
			}
			if syscall.Signal(m.Signal) == unix.SIGKILL {
				r.signal(-pid, unix.SIGKILL)
			} else {
				r.signal(pid, syscall.Signal(m.Signal))
			}
		}
	}()
	ws := <-exited
	rep := reply{PID: pid, Exited: true}
	if ws.Signaled() {
		rep.Signal = int(ws.Signal())
	} else {
		rep.Code = ws.ExitStatus()
	}
	_ = sendPacket(conn, rep)
}

// lookPath searches the PATH that the command will have.
func lookPath(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	path := defaultPath
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			path = v
		}
	}
	for _, dir := range filepath.SplitList(path) {
		p := filepath.Join(dir, name)
		if st, err := os.Stat(p); err == nil && !st.IsDir() && st.Mode()&0o111 != 0 {
			return p, nil
		}
	}
	return "", fmt.Errorf("no executable %q in PATH=%s: install it in the host, or give its full path", name, path)
}

// openPID sends a pidfd, which the creator reads in its own PID namespace: the
// only translation of process numbers without a race.
func openPID(conn *net.UnixConn, pid int) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		_ = sendPacket(conn, reply{Error: fmt.Sprintf("no process %d: %v", pid, err)})
		return
	}
	defer unix.Close(fd)
	_ = sendPacket(conn, reply{PID: pid}, fd)
}

func tellPID(conn *net.UnixConn, files []*os.File) {
	if len(files) != 1 {
		_ = sendPacket(conn, reply{Error: "tell-pid needs one pidfd"})
		return
	}
	pid, err := pidOf(files[0])
	if err != nil {
		_ = sendPacket(conn, reply{Error: err.Error()})
		return
	}
	_ = sendPacket(conn, reply{PID: pid})
}

// pidOf reads a pidfd's process number in the PID namespace of /proc.
func pidOf(pidfd *os.File) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", pidfd.Fd()))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		var pid int
		if _, err := fmt.Sscanf(line, "Pid:\t%d", &pid); err != nil {
			continue
		}
		switch pid {
		case 0:
			return 0, errors.New("the process is in another PID namespace and not visible here")
		case -1:
			return 0, errors.New("the process is gone")
		}
		return pid, nil
	}
	return 0, errors.New("the file is no pidfd: it has no Pid in its fdinfo")
}
