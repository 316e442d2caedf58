package agent

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// What a restore that nobody remembers has left: its record is lost, its CRIU is gone, and no pid of its tree
// is known. The pool's claim is all there is to know it by: when its CRIU began, and what file that executed.

// restoreOf is what the pool knows of the restore that made, or is making, a sandbox's tree on this boot.
func (a *Agent) restoreOf(s *alloc.Sandbox) (criu task, exe string, ok bool) {
	boot, run := "", ""
	if c := s.Claim; c != nil {
		boot, run, exe = c.BootID, c.Run, c.Exe
	} else if f := strings.Split(s.Labels[labelRestoredBy], " "); len(f) == 3 {
		boot, run, exe = f[0], f[1], f[2]
	}
	pid, start, ok := parseRunKey(run)
	return task{pid, start}, exe, ok && boot == a.bootID()
}

// labelRestoredBy says of a sandbox that a restore registered, as a clone or as an adopted one, which restore
// that was: it has no claim to say so. Its value is the boot id, the run's key and CRIU's executable.
const labelRestoredBy = "restored_by"

func restoredBy(rec runRecord) string {
	return strings.Join([]string{rec.BootID, runKey(rec.CRIUPID, rec.CRIUStart), rec.CRIUExe}, " ")
}

// halfBuiltBy is halfBuilt for a task of which nobody remembers which CRIU made it; exe is what that one
// executed. CRIU executes the same file, and may be at work for somebody else, in namespaces of its own. But
// it was executed, and what it is making was only forked and waits in futex(2) for the next of its steps.
func halfBuiltBy(t task, exe string) fate {
	if exe == "" || fileID(fmt.Sprintf("/proc/%d/exe", t.PID)) != exe {
		return halfBuilt(t, "")
	}
	switch forked, err := onlyForked(t); {
	case err != nil:
		return unclear
	case !forked:
		return goesOn
	}
	calls, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", t.PID))
	if err != nil || len(calls) == 0 {
		return unclear
	}
	for _, path := range calls {
		call, err := os.ReadFile(path)
		if err != nil || !bytes.HasPrefix(call, []byte(strconv.Itoa(unix.SYS_FUTEX)+" ")) {
			return unclear
		}
	}
	return parked
}

// onlyForked reports whether a process has executed nothing since its parent forked it: PF_FORKNOEXEC
// (include/linux/sched.h).
func onlyForked(t task) (bool, error) {
	const pfForkNoExec = 0x40
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", t.PID))
	if err != nil {
		return false, err
	}
	flags, err := taskFlags(stat)
	return flags&pfForkNoExec != 0, err
}

// alienTrees lists what others that execute exe may be making now. It is not known whose it is: a restore
// without the hook, or one of which the record is lost as well.
func (a *Agent) alienTrees(procs []kernelns.Process, exe string) []tree {
	var trees []tree
	for _, p := range procs {
		if exe == "" || p.Ended || fileID(fmt.Sprintf("/proc/%d/exe", p.PID)) != exe {
			continue
		}
		criu := task{p.PID, p.StartTime}
		if forked, err := onlyForked(criu); forked || err != nil {
			continue
		}
		trees = append(trees, tree{pid: criu.PID, since: criu.Start})
		trees = append(trees, a.siblings(criu)...)
	}
	return trees
}

// leftBehind lists the trees, below a task each, that a restore whose claim stands has left half built, or may
// have: they are nobody's, until endHalfBuilt has ended them. What it is not sure of is a tree that CRIU's own
// program still makes: a restored one executes another.
func (a *Agent) leftBehind(procs []kernelns.Process) []tree {
	var trees []tree
	for _, s := range a.book.all() {
		if s.State != alloc.StateClaimed || a.runs.holds(s.Serial) {
			continue
		}
		criu, exe, ok := a.restoreOf(s)
		if !ok || !a.gone(criu) {
			continue
		}
		for _, p := range procs {
			t := task{p.PID, p.StartTime}
			if p.StartTime < criu.Start || p.Ended || !a.ownsNamespace(p) {
				continue
			}
			fate := halfBuiltBy(t, exe)
			if fate == parked || fate == unclear && exe != "" && fileID(fmt.Sprintf("/proc/%d/exe", p.PID)) == exe {
				trees = append(trees, tree{pid: p.PID, since: p.StartTime})
			}
		}
	}
	return trees
}
