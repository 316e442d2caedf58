package agent

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// TestOthersExecuteCRIU: while a restore that nobody remembers is cleared away, the same program is at work for
// others: in namespaces of its own, and on a tree of which nobody knows either. Neither is touched. The claim
// is given back when it is certain that nothing of it is left.
func TestOthersExecuteCRIU(t *testing.T) {
	h := newHost(t)
	d := h.moved()
	c := h.parked(d, false)
	lost := c.root
	contained := &criu{proc: spawn(t, unix.CLONE_NEWNS|unix.CLONE_NEWUTS, criuProgram, roleVar+"=criu"), h: h}
	contained.tree(unix.CLONE_NEWIPC, true)
	h.mustStop()
	if err := os.RemoveAll(h.stateDir()); err != nil {
		t.Fatal(err)
	}
	c.end()
	h.start()
	h.eventually("what was left is ended", func() error {
		if !h.gone(lost) {
			return errors.New("it is not")
		}
		return nil
	})
	kill(lost.PID) // it has become ours to reap
	again, err := h.kernel.Process(contained.pid)
	if err != nil || h.gone(task{again.PID, again.StartTime}) || h.gone(contained.root) {
		t.Fatalf("a restore at work was ended: %v", err)
	}
	if s := h.book.sandbox(d.sandbox); s == nil || s.State != alloc.StateClaimed {
		t.Errorf("given back while it was not certain whose the other tree is: %+v", s)
	}
	kill(contained.root.PID)
	h.reaches(d.sandbox, alloc.StateInTransit) // what it executes was not left by anybody
	contained.end()
	h.settled()
	h.consistent()
}

// TestLostUnderLiveCRIU: one restore's CRIU is gone and another's waits for the hook; of neither anything is
// remembered. The tree of the second is not ended.
func TestLostUnderLiveCRIU(t *testing.T) {
	h := newHost(t)
	first, second := h.moved(), h.moved()
	gone, lives := h.parked(first, false), h.parked(second, true)
	h.mustStop()
	if err := os.RemoveAll(h.stateDir()); err != nil {
		t.Fatal(err)
	}
	gone.end()
	h.start()
	h.reaches(first.sandbox, alloc.StateInTransit)
	kill(gone.root.PID)
	lives.passes(criuhook.PreResume, lives.root.PID, second.images)
	if h.gone(lives.root) {
		t.Error("the tree was ended under a CRIU that lives")
	}
	lives.end()
	h.reaches(second.sandbox, alloc.StateInTransit) // it was parked for good: nothing of it ran
	kill(lives.root.PID)
	h.settled()
	h.consistent()
}
