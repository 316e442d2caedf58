package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// other is a process that stands in for a CRIU that the agent is told nothing of. It began after whatever was
// there before, also by the clock that counts in ticks.
func (h *host) other(program string, flags uintptr) *criu {
	h.t.Helper()
	const tick = 10 * time.Millisecond
	ticks := func() int64 {
		var now unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
			h.t.Fatal(err)
		}
		return now.Nano() / int64(tick)
	}
	was := ticks()
	h.eventually("a tick has passed", func() error {
		if ticks() == was {
			return errors.New("it has not")
		}
		return nil
	})
	return &criu{proc: spawn(h.t, flags, program, roleVar+"=criu"), h: h}
}

// forgets has the agent lose what it remembers while all of do happens.
func (h *host) forgets(do func()) {
	h.t.Helper()
	h.mustStop()
	if err := os.RemoveAll(h.stateDir()); err != nil {
		h.t.Fatal(err)
	}
	do()
	h.start()
}

// ended waits until a task is gone.
func (h *host) ended(t task) {
	h.t.Helper()
	h.eventually("what was left is ended", func() error {
		if !h.gone(t) {
			return errors.New("it is not")
		}
		return nil
	})
	kill(t.PID) // it has become ours to reap: until then its PID namespace lives
}

// keeps waits until the agent has said, once, which process keeps a claim, and proves that the process lives and
// the claim stands.
func (h *host) keeps(claimed alloc.Serial, left task, why string) {
	h.t.Helper()
	h.logged(fmt.Sprintf("cannot be given back yet\" sandbox=%s cause=\"process %d (", claimed, left.PID))
	h.logged(why)
	if n := strings.Count(h.logs.String(), "cannot be given back yet"); n != 1 {
		h.t.Errorf("it was said %d times", n)
	}
	if h.gone(left) {
		h.t.Error("the process was ended")
	}
	if s := h.book.sandbox(claimed); s == nil || s.State != alloc.StateClaimed {
		h.t.Errorf("given back while it was not certain whose that process is: %+v", s)
	}
}

// TestOthersExecuteCRIU: while a restore that nobody remembers is cleared away, the same program is at work for
// others: in the host's namespaces or its own, and on a tree of which nobody knows either. Neither is touched. The claim is given back when it is certain that nothing of it is left.
func TestOthersExecuteCRIU(t *testing.T) {
	for name, flags := range map[string]uintptr{
		"on the host":    0,
		"in a container": unix.CLONE_NEWNS | unix.CLONE_NEWUTS,
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			d := h.moved()
			c := h.parked(d, false)
			lost := c.root
			others := h.other(criuProgram, flags)
			others.tree(unix.CLONE_NEWIPC, true)
			h.forgets(c.end)
			h.ended(lost)
			h.keeps(d.sandbox, others.root, fmt.Sprintf("process %d may be a CRIU that is making it", others.pid))
			again, err := h.kernel.Process(others.pid)
			if err != nil || h.gone(task{again.PID, again.StartTime}) {
				t.Fatalf("a restore at work was ended: %v", err)
			}
			kill(others.root.PID)
			h.reaches(d.sandbox, alloc.StateInTransit) // what it executes was not left by anybody
			others.end()
			h.settled()
			h.consistent()
		})
	}
}

// TestCRIUsService: a service in a container forks a CRIU for each request, which executes nothing and, as what
// it makes, may wait in futex(2). Neither is ended.
func TestCRIUsService(t *testing.T) {
	h := newHost(t)
	d := h.moved()
	c := h.parked(d, false)
	lost := c.root
	service := h.other(criuProgram, containerFlags&^unix.CLONE_NEWPID)
	service.tree(0, true)
	h.forgets(c.end)
	h.ended(lost)
	h.keeps(d.sandbox, service.root, "may be")
	kill(service.root.PID)
	service.end()
	h.reaches(d.sandbox, alloc.StateInTransit)
	h.settled()
	h.consistent()
}

// TestCRIUsDaemon: the service is gone that has forked a CRIU in its container, in which others live. That one
// waits for what it makes, or for requests.
func TestCRIUsDaemon(t *testing.T) {
	for name, c := range map[string]struct {
		serves bool
		why    string
	}{
		"makes":  {false, "it may be a CRIU at work"},
		"serves": {true, "what it waits for is not a step of CRIU's"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			d := h.moved()
			forgotten := h.parked(d, false)
			lost := forgotten.root
			service := h.other(criuProgram, unix.CLONE_NEWNS|unix.CLONE_NEWUTS)
			fork := func(o order) task {
				t.Helper()
				made := service.order(o)
				if made.Err != "" {
					t.Fatal(made.Err)
				}
				t.Cleanup(func() { kill(made.PID) })
				p, err := h.kernel.Process(made.PID)
				if err != nil {
					t.Fatal(err)
				}
				return task{p.PID, p.StartTime}
			}
			worker := fork(order{Parked: true, Serves: c.serves})
			lives := fork(order{Tree: unix.CLONE_NEWIPC}) // in the container
			before := serialsOf(h.serials(worker.PID))
			h.forgets(func() { forgotten.end(); service.end() })
			h.ended(lost)
			h.keeps(d.sandbox, worker, c.why)
			for typ, serial := range serialsOf(h.serials(worker.PID)) {
				if serial != before[typ] {
					t.Errorf("%s: %s became %s", typ, before[typ], serial)
				}
			}
			kill(worker.PID)
			h.reaches(d.sandbox, alloc.StateInTransit)
			kill(lives.PID)
			h.settled()
			h.consistent()
		})
	}
}

// TestRuntimeGone: CRIU has made the root task its sibling, and the runtime that both were of is gone, so that
// PID 1 has them. The agent knows of CRIU by its claim or not at all.
func TestRuntimeGone(t *testing.T) {
	for name, claimed := range map[string]bool{"ours": true, "others'": false} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			d := h.moved()
			c := h.parked(d, false)
			lost := c.root
			lives := h.other(criuProgram, 0)
			var second *dumped
			if claimed {
				second = h.moved()
				lives.passes(criuhook.PreRestore, 0, second.images)
			}
			lives.tree(containerFlags|unix.CLONE_PARENT, true)
			h.forgets(c.end)
			h.ended(lost)
			h.keeps(d.sandbox, lives.root, fmt.Sprintf("process %d may be a CRIU that is making it", lives.pid))
			for typ, k := range h.namespaces(lives.root.PID) {
				if serial := h.pool.everBound(unnumbered{typ, k}); serial != 0 && claimed && !h.isHosts(typ, k) {
					t.Errorf("the %s namespace of the half-built tree got serial %s", typ, serial)
				}
			}
			lives.end()
			if !claimed { // it has serials: without the hook nobody knew that it was half built
				kill(lives.root.PID)
			}
			h.reaches(d.sandbox, alloc.StateInTransit)
			if claimed {
				h.ended(lives.root)
				h.reaches(second.sandbox, alloc.StateInTransit)
			}
			h.settled()
			h.consistent()
		})
	}
}

// tracing traces a task while the test goes on.
func tracing(t *testing.T, pid int) {
	t.Helper()
	attached, stop, stopped := make(chan error), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		runtime.LockOSThread() // for good: the thread, which traces, ends with this
		attached <- unix.PtraceSeize(pid)
		<-stop
	}()
	t.Cleanup(func() { close(stop); <-stopped })
	if err := <-attached; err != nil {
		t.Fatal(err)
	}
}

// TestTraced: who is traced is somebody's.
func TestTraced(t *testing.T) {
	h := newHost(t)
	d := h.moved()
	c := h.parked(d, false)
	lost := c.root
	h.forgets(func() {
		c.end()
		tracing(t, lost.PID)
	})
	h.keeps(d.sandbox, lost, "traces it")
	kill(lost.PID)
	h.reaches(d.sandbox, alloc.StateInTransit)
	h.settled()
	h.consistent()
}

// TestHelperLeft: a CRIU that is gone has left a helper too, forked as what it makes, which ends with the tree.
func TestHelperLeft(t *testing.T) {
	h := newHost(t)
	d := h.moved()
	c := h.criu()
	c.passes(criuhook.PreRestore, 0, d.images)
	helper := c.order(order{Parked: true, Serves: true})
	if helper.Err != "" {
		t.Fatal(helper.Err)
	}
	t.Cleanup(func() { kill(helper.PID) })
	c.passes(criuhook.SetupNamespaces, c.tree(containerFlags, true), d.images)
	h.forgets(c.end)
	h.ended(c.root)
	h.reaches(d.sandbox, alloc.StateInTransit)
	kill(helper.PID)
	h.settled()
	h.consistent()
}

// TestTwoForgotten: of two restores nobody remembers anything and both CRIUs are gone. Both claims go back, and
// what is ended for one is not what was only seen for the other.
func TestTwoForgotten(t *testing.T) {
	was := settlePause
	t.Cleanup(func() { settlePause = was }) // when the agent has ended
	settlePause = 5 * was
	h := newHost(t)
	first, second := h.moved(), h.moved()
	one := h.parked(second, false)
	two := h.parked(first, false)
	var began time.Time
	h.forgets(func() { one.end(); two.end(); began = time.Now() })
	for _, c := range []*criu{two, one} {
		h.ended(c.root)
		if took := time.Since(began); took < settlePause {
			t.Errorf("a task was ended %v after the first look could be", took)
		}
	}
	h.reaches(first.sandbox, alloc.StateInTransit)
	h.reaches(second.sandbox, alloc.StateInTransit)
	h.settled()
	h.consistent()
}

// TestFileID: another file in the same place is another one, also where it has the inode of the first.
func TestFileID(t *testing.T) {
	path := filepath.Join(t.TempDir(), "criu")
	if err := os.WriteFile(path, []byte("one"), 0o700); err != nil {
		t.Fatal(err)
	}
	was := fileID(path)
	if len(was) == 0 || len(was) > 64 || fileID(path) != was {
		t.Errorf("%q, then %q", was, fileID(path))
	}
	if err := os.WriteFile(path, []byte("two"), 0o700); err != nil { // the inode stays
		t.Fatal(err)
	}
	later := time.Now().Add(time.Second)
	if err := os.Chtimes(path, later, later); err != nil {
		t.Fatal(err)
	}
	if now := fileID(path); now == was {
		t.Errorf("both are %s", now)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	id := fileID(self)
	me := task{PID: os.Getpid()}
	older := strings.Join(strings.Split(id, ":")[:2], ":")
	for file, want := range map[string]bool{id: true, older: true, "": false, id[:len(id)-1]: false, older[:len(older)-1]: false} {
		if executes(me, file) != want {
			t.Errorf("executes %q: %v", file, !want)
		}
	}
}
