//go:build linux

package kernelns

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Process is what was seen of one process. Slices and maps in it may be shared with what later sweeps
// return: do not change them.
type Process struct {
	PID, PPID int
	// StartTime is in clock ticks (10 ms) since boot, in the reader's time namespace. Together with the
	// pid it names a process, except among successors that a pid finds within one tick.
	StartTime uint64
	// State is the letter of proc_pid_stat(5); 'Z' is a zombie, or a process whose leader has ended while
	// other threads run on.
	State byte
	// Comm is the name of the program, at most 15 bytes, and anything the process likes to call itself.
	Comm string
	// VPIDs are the process's pids from the namespace of this proc file system inwards; the last is the
	// one it has in its own pid namespace. The first equals PID.
	VPIDs []int
	// Cgroup is the path in the unified hierarchy, or in a v1 one where that is "/"; for showing and for
	// finding a container's id in, never for decisions. Sweep reads it when a process is new or changed
	// its name, parent or namespaces; Process reads it always.
	Cgroup string
	// KernelThread marks a thread of the kernel. Namespaces is nil for it: its are the host's.
	KernelThread bool
	// Ended marks a process that has left its namespaces for good: a zombie, or one that is on its way
	// there, which its pidfd does not show yet.
	Ended bool
	// Namespaces is nil for kernel threads, where Ended, and where Err is set. Types that the kernel was
	// built without are missing.
	Namespaces map[alloc.NamespaceType]alloc.KernelID
	// Err says why the process's namespaces could not be read although it lives: mostly permission.
	Err error
}

// Process reads one process now. It returns ErrGone if there is none of that pid.
func (k *Kernel) Process(pid int) (Process, error) {
	p, err := k.read(pid, nil, nil)
	if err == nil {
		err = p.Err
	}
	return p, err
}

// openDir gives a descriptor that is bound to the process that has the pid now: what is opened below it
// later is that process's, or fails with ESRCH (fs/proc/base.c: the inode holds the struct pid). So no
// reading can mix two processes, whatever pids are reused meanwhile.
func (k *Kernel) openDir(pid int) (int, error) {
	dir, err := unix.Open(filepath.Join(k.proc, strconv.Itoa(pid)), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, processError(pid, err)
	}
	return dir, nil
}

func processError(pid int, err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("pid %d: %w", pid, ErrGone)
	}
	return fmt.Errorf("read process %d: %w", pid, err)
}

// read reads a process; known is what was seen of the pid before, or nil. An error means that nothing
// is known of the process; one that concerns its namespaces alone is in Process.Err.
func (k *Kernel) read(pid int, known *Process, buf []byte) (Process, error) {
	dir, err := k.openDir(pid)
	if err != nil {
		return Process{}, err
	}
	defer unix.Close(dir)
	p, err := k.readState(dir, pid, buf)
	if err != nil {
		return Process{}, err
	}
	same := known != nil && known.StartTime == p.StartTime
	if same {
		p.VPIDs = known.VPIDs
	} else if p.VPIDs, err = readVPIDs(dir, buf); err != nil {
		return Process{}, processError(pid, err)
	}
	if same && known.unchanged(p) {
		p.Cgroup = known.Cgroup
	} else if p.Cgroup, err = readCgroup(dir, buf); err != nil {
		return Process{}, processError(pid, err)
	}
	return p, nil
}

// readState reads what may change between two looks.
func (k *Kernel) readState(dir, pid int, buf []byte) (Process, error) {
	var p Process
	// A process that begins to end after its state was read, or whose leader does, makes the links fail;
	// its new state says which it was. It passes through two such changes at most.
	for range 3 {
		st, err := readStat(dir, buf)
		if err != nil {
			return Process{}, processError(pid, err)
		}
		p = Process{PID: pid, PPID: st.ppid, StartTime: st.start, State: st.state, Comm: st.comm, KernelThread: st.kernelThread}
		if st.kernelThread {
			return p, nil
		}
		p.Namespaces, err = k.namespaces(dir, "ns/")
		if err != nil && st.ending && st.threads > 1 {
			p.Namespaces, err = k.threadNamespaces(dir, pid)
		}
		if err == nil {
			return p, nil
		}
		if st.ending && (st.threads <= 1 || !errors.Is(err, fs.ErrPermission)) {
			p.Ended = true
			return p, nil
		}
		p.Err = fmt.Errorf("process %d (%s): %w", pid, p.Comm, err)
		if errors.Is(err, fs.ErrPermission) {
			p.Err = fmt.Errorf("%w (it takes root and CAP_SYS_PTRACE in the initial user namespace, and no security module that forbids it)", p.Err)
		}
	}
	return p, nil
}

// namespaces reads the links below prefix, which ends in "ns/".
func (k *Kernel) namespaces(dir int, prefix string) (map[alloc.NamespaceType]alloc.KernelID, error) {
	m := make(map[alloc.NamespaceType]alloc.KernelID, len(k.types))
	for _, t := range k.types {
		id, err := k.identify(dir, prefix+string(t))
		if err != nil {
			return nil, fmt.Errorf("read its %s namespace: %w", t, err)
		}
		m[t] = id
	}
	return m, nil
}

// threadNamespaces serves a process whose leader has ended while other threads run on: its own links
// are dead, the process is not.
func (k *Kernel) threadNamespaces(dir, pid int) (map[alloc.NamespaceType]alloc.KernelID, error) {
	fd, err := unix.Openat(dir, "task", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "task")
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	err = unix.ESRCH
	for _, tid := range names {
		if tid == strconv.Itoa(pid) {
			continue
		}
		var m map[alloc.NamespaceType]alloc.KernelID
		if m, err = k.namespaces(dir, "task/"+tid+"/ns/"); err == nil {
			return m, nil
		}
	}
	return nil, err
}

// stat is what we need of /proc/PID/stat, proc_pid_stat(5).
type stat struct {
	comm         string
	state        byte
	ppid         int
	threads      int
	start        uint64
	kernelThread bool
	ending       bool // the leader is a zombie or on its way there
}

func readStat(dir int, buf []byte) (stat, error) {
	b, err := readAt(dir, "stat", buf)
	if err != nil {
		return stat{}, err
	}
	return parseStat(b)
}

// Task flags of include/linux/sched.h, which ps and systemd read too. A task gives its namespaces back
// when it is PF_EXITING and shows 'R' still.
const (
	pfExiting = 0x00000004
	pfKthread = 0x00200000
)

// parseStat takes the name from the first "(" to the last ")": a process may put both in its name.
func parseStat(b []byte) (stat, error) {
	bad := func() (stat, error) { return stat{}, fmt.Errorf("stat is not as proc_pid_stat(5) has it: %q", b) }
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 0 || end < open {
		return bad()
	}
	f := strings.Fields(string(b[end+1:])) // f[0] is field 3
	if len(f) < 20 || len(f[0]) != 1 {
		return bad()
	}
	s := stat{comm: string(b[open+1 : end]), state: f[0][0]}
	var errs [4]error
	var flags uint64
	s.ppid, errs[0] = strconv.Atoi(f[1])                // field 4
	flags, errs[1] = strconv.ParseUint(f[6], 10, 64)    // field 9
	s.threads, errs[2] = strconv.Atoi(f[17])            // field 20
	s.start, errs[3] = strconv.ParseUint(f[19], 10, 64) // field 22
	if errors.Join(errs[:]...) != nil {
		return bad()
	}
	s.kernelThread = flags&pfKthread != 0
	s.ending = flags&pfExiting != 0 || s.state == 'Z' || s.state == 'X'
	return s, nil
}

func readVPIDs(dir int, buf []byte) ([]int, error) {
	b, err := readAt(dir, "status", buf)
	if err != nil {
		return nil, err
	}
	return parseVPIDs(b)
}

func parseVPIDs(b []byte) ([]int, error) {
	_, rest, ok := bytes.Cut(b, []byte("\nNSpid:"))
	if !ok {
		return nil, errors.New("status has no line NSpid (the kernel needs CONFIG_PID_NS, Linux >= 4.1)")
	}
	line, _, _ := bytes.Cut(rest, []byte("\n"))
	var pids []int
	for _, f := range strings.Fields(string(line)) {
		pid, err := strconv.Atoi(f)
		if err != nil {
			return nil, fmt.Errorf("the line NSpid of status holds %q, which is no list of pids", line)
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

func readCgroup(dir int, buf []byte) (string, error) {
	b, err := readAt(dir, "cgroup", buf)
	if errors.Is(err, unix.ENOENT) {
		// Either the kernel has no cgroups or the process went. The latter shows in what the directory
		// itself answers.
		if _, again := readAt(dir, "stat", nil); again == nil {
			return "", nil
		}
	}
	if err != nil {
		return "", err
	}
	return parseCgroup(b), nil
}

// parseCgroup prefers the unified hierarchy. On hybrid hosts that says "/" for everybody, and a v1
// hierarchy in which every runtime places its containers says more.
func parseCgroup(b []byte) string {
	path, rank := "", -1
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3) // paths may hold ':', see cgroups(7)
		if len(f) != 3 {
			continue
		}
		r := 0
		switch {
		case f[2] == "/":
			// says nothing; better than no line at all
		case f[0] == "0" && f[1] == "":
			r = 5
		case f[1] == "pids":
			r = 4
		case f[1] == "devices":
			r = 3
		case f[1] == "name=systemd":
			r = 2
		default:
			r = 1
		}
		if r > rank {
			path, rank = f[2], r
		}
	}
	return path
}

// readAt reads a small file below dir into buf, which grows when it must.
func readAt(dir int, name string, buf []byte) ([]byte, error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if cap(buf) == 0 {
		buf = make([]byte, 0, 4096)
	}
	buf = buf[:0]
	for {
		if len(buf) == cap(buf) {
			buf = append(buf, 0)[:len(buf)]
		}
		n, err := unix.Read(fd, buf[len(buf):cap(buf)])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return nil, err
		case n == 0:
			return buf, nil
		}
		buf = buf[:len(buf)+n]
	}
}
