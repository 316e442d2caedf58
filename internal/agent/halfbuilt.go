package agent

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// What a restore that nobody remembers has left: its record is lost, its CRIU is gone, and no pid of its tree
// is known. The pool's claim is all there is to know it by: when its CRIU began, and what file that executed.

// restoreOf is what the pool knows of the restore that made, or is making, a sandbox's tree on this boot.
func (a *Agent) restoreOf(s *alloc.Sandbox) (criu task, ok bool) {
	boot, run := "", ""
	if c := s.Claim; c != nil {
		boot, run = c.BootID, c.Run
	} else if f := strings.Fields(s.Labels[labelRestoredBy]); len(f) >= 2 {
		boot, run = f[0], f[1] // agents before this one wrote CRIU's executable too
	}
	pid, start, ok := parseRunKey(run)
	return task{pid, start}, ok && boot == a.bootID()
}

// labelRestoredBy says of a sandbox that a restore registered, as a clone or as an adopted one, which restore
// that was: it has no claim to say so. Its value is the boot id and the run's key.
const labelRestoredBy = "restored_by"

func restoredBy(rec runRecord) string {
	return rec.BootID + " " + runKey(rec.CRIUPID, rec.CRIUStart)
}

// halfBuiltBy is halfBuilt for a task that is not committed and of which nobody remembers which CRIU made it; exe
// is what that one executed, "" where nobody said. CRIU executes the same file, and may be at work for somebody
// else, in namespaces of its own. What it is making was only forked and waits in futex(2) for the next of its
// steps. So, for a moment, may a CRIU that was not executed itself: one that a service forked for a
// request, or that made itself a daemon. Which of both it is lookAround tells.
func halfBuiltBy(p kernelns.Process, exe string) fate {
	t := task{p.PID, p.StartTime}
	if !executes(t, exe) {
		fate := halfBuilt(t, "")
		forked, err := onlyForked(t)
		switch {
		case err != nil:
			return unclear
		case fate == unclear && !forked:
			return goesOn // it has blocked all signals itself, as some that start others do
		case fate == goesOn && forked && exe == "" && calledCRIU(p):
			return unclear
		}
		return fate
	}
	switch forked, err := onlyForked(t); {
	case err != nil:
		return unclear
	case !forked:
		return goesOn
	}
	calls, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", t.PID))
	if err != nil || len(calls) == 0 || !calledCRIU(p) {
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

// calledCRIU reports whether a process has the name that CRIU's have, and that it leaves to what it makes until
// that is in the restorer.
func calledCRIU(p kernelns.Process) bool { return strings.HasPrefix(p.Comm, "criu") }

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

// tracer is the process that traces a task; 0 for none.
func tracer(t task) (pid int, err error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", t.PID))
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(status) {
		if value, ok := bytes.CutPrefix(line, []byte("TracerPid:")); ok {
			return strconv.Atoi(string(bytes.TrimSpace(value)))
		}
	}
	return 0, nil
}

// surroundings are the processes among which a task stands that looks half built by a CRIU which executed exe.
type surroundings struct {
	a      *Agent
	procs  []kernelns.Process
	exe    string
	makers map[int]int // by pid, the CRIU that lives and may be making that process, or is it
}

// lookAround finds each CRIU that lives and of which it is not known what it makes: others', without the hook or
// of another version, and one of ours whose record is lost. known are the trees of which it is known, possible
// those that may be what some CRIU makes.
func (a *Agent) lookAround(procs []kernelns.Process, known, possible []tree, exe string) surroundings {
	s := surroundings{a, procs, exe, map[int]int{}}
	for _, p := range leaveOut(procs, known) {
		criu := task{p.PID, p.StartTime}
		if p.Ended || p.KernelThread || !(calledCRIU(p) || executes(criu, exe)) || s.isMade(p) {
			continue
		}
		possible = append(possible, below(criu))
		// A CRIU that was only forked, by a service, does not make siblings; it may be a helper that the one which is
		// gone has left, and that lives as long as the tree does.
		if forked, err := onlyForked(criu); !forked || err != nil {
			possible = append(possible, beside(criu))
		}
	}
	for _, t := range possible {
		for _, p := range t.of(procs) {
			if _, ok := s.makers[p.PID]; !ok {
				s.makers[p.PID] = t.pid
			}
		}
	}
	return s
}

// isMade tells what CRIU has forked to become a task of a tree from what it has forked to be CRIU: that lives in
// somebody's namespaces, or is making a tree that has others.
func (s surroundings) isMade(p kernelns.Process) bool {
	if !s.a.ownsNamespace(p) || halfBuiltBy(p, s.exe) != parked || s.company(p) != "" {
		return false
	}
	return !slices.ContainsFunc(s.procs, func(child kernelns.Process) bool {
		return child.PPID == p.PID && calledCRIU(child) && !child.Ended && slices.ContainsFunc(alloc.NamespaceTypes(), func(t alloc.NamespaceType) bool {
			return child.Namespaces[t].Key(t) != p.Namespaces[t].Key(t)
		})
	})
}

// company says who has a namespace of p that is not the host's: a sandbox that runs, or a process that does; ""
// for nobody but what looks half built too.
func (s surroundings) company(p kernelns.Process) string {
	for _, t := range alloc.NamespaceTypes() { // in an order, so that the same is said each time
		k, ok := p.Namespaces[t]
		if !ok || s.a.isHosts(t, k) {
			continue
		}
		if bound, ok := s.a.book.find(t, k); ok {
			return fmt.Sprintf("its %s namespace is of sandbox %s", t, bound.sandbox)
		}
		for _, q := range s.procs {
			if q.PID == p.PID || q.Ended || q.Namespaces[t].Key(t) != k.Key(t) {
				continue
			}
			if fate := halfBuiltBy(q, s.exe); fate == goesOn || fate == unclear && !executes(task{q.PID, q.StartTime}, s.exe) {
				return fmt.Sprintf("process %d (%s) runs in its %s namespace", q.PID, q.Comm, t)
			}
		}
	}
	return ""
}

// doubt says why a task that looks half built may be one that somebody needs; "" where nobody can.
func (s surroundings) doubt(p kernelns.Process) string {
	by, err := tracer(task{p.PID, p.StartTime})
	switch maker, ok := s.makers[p.PID]; {
	case err != nil:
		return "it cannot be read: " + err.Error()
	case by != 0:
		return fmt.Sprintf("process %d traces it", by)
	case ok && maker == p.PID:
		return "it may be a CRIU at work"
	case ok:
		return fmt.Sprintf("process %d may be a CRIU that is making it", maker)
	}
	return s.company(p)
}

// leftBehind lists the trees, below a task each, that a restore whose claim stands has left half built, or may
// have: they are nobody's, until endHalfBuilt has ended them.
func (a *Agent) leftBehind(procs []kernelns.Process) []tree {
	var trees []tree
	for _, s := range a.book.all() {
		if s.State != alloc.StateClaimed || a.runs.holds(s.Serial) {
			continue
		}
		criu, ok := a.restoreOf(s)
		if !ok || !a.gone(criu) {
			continue
		}
		for _, p := range procs {
			if p.StartTime < criu.Start || p.Ended || !a.ownsNamespace(p) {
				continue
			}
			if halfBuiltBy(p, s.Claim.Exe) != goesOn {
				trees = append(trees, below(task{p.PID, p.StartTime}))
			}
		}
	}
	return trees
}
