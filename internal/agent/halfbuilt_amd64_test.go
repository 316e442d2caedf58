package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// inRestorer has CRIU make a task that stands in the restorer.
func (c *criu) inRestorer() {
	c.t.Helper()
	made := c.order(order{Tree: containerFlags, Program: restorer(c.t)})
	if made.Err != "" {
		c.t.Fatal(made.Err)
	}
	c.t.Cleanup(func() { kill(made.PID) })
	p, err := c.h.kernel.Process(made.PID)
	if err != nil {
		c.t.Fatal(err)
	}
	c.root = task{p.PID, p.StartTime}
	c.h.eventually("it stands in the restorer", func() error {
		if halfBuilt(c.root, "") != parked {
			return errors.New("it does not yet")
		}
		return nil
	})
}

// committed restores a tree that was answered 0 and stands in the restorer still.
func (h *host) committed(images string) *criu {
	h.t.Helper()
	c := h.criu()
	c.passes(criuhook.PreRestore, 0, images)
	c.inRestorer()
	c.passes(criuhook.SetupNamespaces, c.root.PID, images)
	c.passes(criuhook.PostRestore, c.root.PID, images)
	return c
}

// copied copies the program of CRIU's stand-in: a CRIU of another version.
func copied(t *testing.T, name string) string {
	t.Helper()
	program, err := os.ReadFile(criuProgram)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, program, 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestAnotherVersion: the CRIU at work executes another file than the one that is gone.
func TestAnotherVersion(t *testing.T) {
	h := newHost(t)
	d := h.moved()
	c := h.parked(d, false)
	lost := c.root
	others := h.other(copied(t, "criu"), 0)
	others.inRestorer()
	h.forgets(c.end)
	h.ended(lost)
	h.keeps(d.sandbox, others.root, fmt.Sprintf("process %d may be a CRIU that is making it", others.pid))
	kill(others.root.PID)
	h.reaches(d.sandbox, alloc.StateInTransit)
	others.end()
	h.settled()
	h.consistent()
}

// TestClaimWithoutFile: an older agent or server has not said what CRIU executes. What a CRIU that lives, or is
// gone, has forked keeps the claim; it is not ended.
func TestClaimWithoutFile(t *testing.T) {
	h := newHost(t)
	d := h.moved()
	c := h.criu()
	h.pool.mu.Lock()
	h.pool.older = true
	h.pool.mu.Unlock()
	c.passes(criuhook.PreRestore, 0, d.images)
	c.passes(criuhook.SetupNamespaces, c.tree(containerFlags, true), d.images)
	others := h.other(criuProgram, 0)
	others.inRestorer()
	h.forgets(c.end)
	h.keeps(d.sandbox, c.root, "what it waits for is not a step of CRIU's")
	if h.gone(others.root) {
		t.Error("a tree under a CRIU that lives was ended")
	}
	kill(c.root.PID)
	h.logged(fmt.Sprintf("process %d may be a CRIU that is making it", others.pid))
	kill(others.root.PID)
	h.reaches(d.sandbox, alloc.StateInTransit)
	others.end()
	h.settled()
	h.consistent()
}

// TestLostUnderLiveCRIU: one restore's CRIU is gone and another's waits for the hook; of neither anything is
// remembered. The tree of the second is not ended.
func TestLostUnderLiveCRIU(t *testing.T) {
	h := newHost(t)
	first, second := h.moved(), h.moved()
	gone := h.parked(first, false)
	lost := gone.root
	h.other(criuProgram, 0).end() // so much later
	lives := h.committed(second.images)
	h.forgets(gone.end)
	h.reaches(first.sandbox, alloc.StateInTransit)
	kill(lost.PID)
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

// TestForgottenBesideCommitted: of two restores nobody remembers anything and both CRIUs are gone; one was only
// claimed, the other committed. Each is settled as itself, whichever is looked at first: both go back.
func TestForgottenBesideCommitted(t *testing.T) {
	for name, claimedFirst := range map[string]bool{"claimed first": true, "committed first": false} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			claimed, committed := h.moved(), h.moved()
			if !claimedFirst {
				claimed, committed = committed, claimed
			}
			one := h.parked(claimed, false)
			two := h.committed(committed.images)
			h.forgets(func() { one.end(); two.end() })
			h.ended(one.root)
			h.ended(two.root)
			for _, d := range []*dumped{claimed, committed} {
				if _, cp := h.reaches(d.sandbox, alloc.StateInTransit); cp.State != alloc.CheckpointOpen {
					t.Errorf("the images of %s are %s", d.sandbox, cp.State)
				}
			}
			h.settled()
			h.consistent()
			again, pid := h.restored(committed.images)
			again.end()
			h.reaches(committed.sandbox, alloc.StateRunning)
			same(t, committed.before, serialsOf(h.serials(pid)))
		})
	}
}

// TestCommittedExecutesCRIU: what was committed is past CRIU's own program. If it executes that, it is what was
// restored, and it runs.
func TestCommittedExecutesCRIU(t *testing.T) {
	h := newHost(t)
	clone, d := writeImages(t, "unknown", containerTypes...), h.moved()
	lost := h.parked(d, false)
	h.other(criuProgram, 0).end() // so much later
	c := h.criu()
	c.passes(criuhook.PreRestore, 0, clone)
	pid := c.tree(containerFlags, true)
	c.passes(criuhook.SetupNamespaces, pid, clone)
	c.passes(criuhook.PostRestore, pid, clone)
	sandbox := h.sandbox(pid)
	h.forgets(func() { c.end(); lost.end() })
	h.keeps(d.sandbox, c.root, "it may be a CRIU at work")
	h.ended(lost.root)
	h.is(sandbox, alloc.StateRunning)
	if h.gone(c.root) {
		t.Error("it was ended")
	}
	kill(pid)
	h.reaches(d.sandbox, alloc.StateInTransit)
	h.reaches(sandbox, alloc.StateEnded)
	h.settled()
	h.consistent()
}
