package agent

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// fate is what a look at a tree tells whose CRIU is gone.
type fate int

const (
	// unclear: nothing of it can be told yet; some of it is on its way out.
	unclear fate = iota
	// goesOn: one of its tasks at least runs its own program.
	goesOn
	// parked: every task of it stands in CRIU's restorer, or before that in CRIU's own code, and waits for
	// a CRIU that is gone. It never ran and never will.
	parked
)

// gone reports whether a process has ended; an error other than that it cannot be found counts as alive.
func (a *Agent) gone(t task) bool {
	fd, err := a.kernel.OpenPID(t.PID, t.Start)
	if err != nil {
		return isGone(err)
	}
	defer fd.Close()
	over, err := kernelns.Exited(int(fd.Fd()))
	return err == nil && over
}

// lookAt says whether a run's CRIU and its tree are gone. known is false while the kernel has more to
// say on the order: what is seen by looking is not ahead of what was told.
func (a *Agent) lookAt(n *run) (criuGone, treeGone, known bool) {
	if n.rec.BootID != a.bootID() {
		return true, true, true
	}
	criuGone = a.gone(task{n.rec.CRIUPID, n.rec.CRIUStart})
	treeGone = a.treeGone(n)
	toldGone, left, watched := n.deaths.told()
	if watched && (criuGone != toldGone || treeGone && left > 0) {
		return criuGone, treeGone, false
	}
	return criuGone, treeGone, true
}

// treeGone reports whether every task of the tree is over. A tree that was never seen is gone: nothing
// was there.
func (a *Agent) treeGone(n *run) bool {
	for _, t := range n.rec.Tasks {
		if !a.gone(t) {
			return false
		}
	}
	return n.rec.Init.PID == 0 || a.gone(n.rec.Init)
}

// tasksOf is every task of a restored tree that is known: those that were seen complete, and what hangs
// below the root now.
func (a *Agent) tasksOf(ctx context.Context, n *run) ([]task, error) {
	seen := map[task]bool{}
	for _, t := range n.rec.Tasks {
		seen[t] = true
	}
	if root := n.rec.Init; root.PID != 0 && !a.gone(root) {
		procs, err := a.kernel.Sweep(ctx)
		if err != nil {
			return nil, err
		}
		for i, p := range kernelns.Descendants(procs, root.PID) {
			if i == 0 && p.StartTime != root.Start {
				break // the pid is another's by now
			}
			seen[task{p.PID, p.StartTime}] = true
		}
	}
	list := make([]task, 0, len(seen))
	for t := range seen {
		list = append(list, t)
	}
	return list, nil
}

// fateOf looks once at what is left of a tree that was being restored.
func (a *Agent) fateOf(n *run, tasks []task) fate {
	waits := false
	for _, t := range tasks {
		if a.gone(t) || isDying(t) {
			continue
		}
		switch halfBuilt(t, n.rec.CRIUExe) {
		case goesOn:
			return goesOn
		case parked:
			waits = true
		default:
			return unclear
		}
	}
	if waits {
		return parked
	}
	return unclear
}

// halfBuilt tells a task that CRIU is making from one that runs (tried with CRIU 4.1.1). Until it is in
// the restorer a task executes CRIU's own program. The restorer blocks all signals first (restorer.c,
// __export_restore_task), which else only a C library does, for a moment and never while it waits; it
// waits for each of CRIU's steps in futex(2), and is the only code around in a mapping that is anonymous, writable and
// executable. All of it must fit to call a task parked, for each of its threads.
func halfBuilt(t task, criu string) fate {
	dir := "/proc/" + strconv.Itoa(t.PID)
	if executes(t, criu) {
		return parked
	}
	threads, err := os.ReadDir(dir + "/task")
	if err != nil {
		return unclear
	}
	for _, thread := range threads {
		status, err := os.ReadFile(filepath.Join(dir, "task", thread.Name(), "status"))
		if err != nil {
			return unclear
		}
		if blocked, ok := signals(status, "SigBlk"); ok && blocked != allSignals {
			return goesOn
		}
		call, err := os.ReadFile(filepath.Join(dir, "task", thread.Name(), "syscall"))
		if err != nil {
			return unclear
		}
		maps, err := os.ReadFile(dir + "/maps")
		if err != nil || !inRestorer(call, maps) {
			return unclear
		}
	}
	return parked
}

// allSignals is what SigBlk shows when everything is blocked that can be.
const allSignals = ^uint64(1<<(unix.SIGKILL-1) | 1<<(unix.SIGSTOP-1))

// inRestorer reports whether a thread waits in futex(2), called from an anonymous mapping that is
// writable and executable. The last field of /proc/PID/syscall is the program counter.
func inRestorer(call, maps []byte) bool {
	f := strings.Fields(string(call))
	if len(f) < 3 || f[0] != strconv.Itoa(unix.SYS_FUTEX) {
		return false
	}
	pc, err := strconv.ParseUint(strings.TrimPrefix(f[len(f)-1], "0x"), 16, 64)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(maps)) {
		m := strings.Fields(line)
		if len(m) != 5 || m[4] != "0" || !strings.HasPrefix(m[1], "rwx") {
			continue
		}
		first, end, _ := strings.Cut(m[0], "-")
		lo, err1 := strconv.ParseUint(first, 16, 64)
		hi, err2 := strconv.ParseUint(end, 16, 64)
		if err1 == nil && err2 == nil && lo <= pc && pc < hi {
			return true
		}
	}
	return false
}

// fileID names a file on this host, for one boot: DEVICE:INODE:SIZE:CHANGED, 64 bytes at most; "" when it cannot be
// read. An inode's number is another file's as soon as its own is removed, as by a package's update; so size and
// time of the last change of the content are in it.
func fileID(path string) string {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return ""
	}
	size, changed := strconv.FormatInt(st.Size, 36), strconv.FormatInt(st.Mtim.Nano(), 36)
	return fmt.Sprintf("%d:%d:%s:%s", st.Dev, st.Ino, size, changed)
}

// executes reports whether a task executes a file that fileID named; agents before this one named it
// DEVICE:INODE.
func executes(t task, file string) bool {
	return file != "" && strings.HasPrefix(fileID(fmt.Sprintf("/proc/%d/exe", t.PID))+":", file+":")
}

// inhabited reports whether a process lives in a namespace of the sandbox.
func (a *Agent) inhabited(ctx context.Context, s *alloc.Sandbox) (bool, error) {
	tasks, err := a.inhabitants(ctx, s)
	return len(tasks) > 0, err
}

// inhabitants lists the processes that live in a namespace of the sandbox and are not on their way out.
func (a *Agent) inhabitants(ctx context.Context, s *alloc.Sandbox) ([]task, error) {
	own := map[string]bool{}
	for _, b := range s.Bindings {
		if b.Live() && b.Kernel.BootID == a.bootID() {
			own[b.Kernel.Key(b.Type)] = true
		}
	}
	procs, err := a.kernel.Sweep(ctx)
	if err != nil {
		return nil, err
	}
	var list []task
	for _, p := range procs {
		lives := task{p.PID, p.StartTime}
		for t, k := range p.Namespaces {
			if own[k.Key(t)] && !isDying(lives) {
				list = append(list, lives)
				break
			}
		}
	}
	return list, nil
}

// isDying reads from /proc whether a task has a SIGKILL pending or is on its way out: then it never
// runs a line of its program again.
func isDying(t task) bool {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", t.PID))
	if err != nil {
		return true
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", t.PID))
	return err != nil || pendingKill(status) || exiting(stat)
}

// pendingKill looks for SIGKILL in SigPnd and ShdPnd.
func pendingKill(status []byte) bool {
	for _, name := range []string{"SigPnd", "ShdPnd"} {
		if mask, ok := signals(status, name); ok && mask&(1<<(unix.SIGKILL-1)) != 0 {
			return true
		}
	}
	return false
}

// signals reads a mask of /proc/PID/status (proc_pid_status(5)).
func signals(status []byte, field string) (uint64, bool) {
	for line := range bytes.Lines(status) {
		name, value, ok := bytes.Cut(line, []byte(":"))
		if !ok || string(name) != field {
			continue
		}
		mask, err := strconv.ParseUint(string(bytes.TrimSpace(value)), 16, 64)
		return mask, err == nil
	}
	return 0, false
}

// exiting reads the flags, the 9th field of /proc/PID/stat: PF_EXITING (include/linux/sched.h).
func exiting(stat []byte) bool {
	const pfExiting = 0x4
	flags, err := taskFlags(stat)
	return err != nil || flags&pfExiting != 0
}

func taskFlags(stat []byte) (uint64, error) {
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 7 {
		return 0, fmt.Errorf("stat has %d fields after the name, want 7 at least", len(fields))
	}
	return strconv.ParseUint(string(fields[6]), 10, 64)
}
