package agent

import (
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// is checks what the store has of a sandbox now.
func (h *host) is(serial alloc.Serial, state alloc.SandboxState) *alloc.Sandbox {
	h.t.Helper()
	entries, _, err := h.pool.store.Get(h.t.Context(), alloc.SandboxKey(serial))
	if err != nil {
		h.t.Fatal(err)
	}
	s, ok := entries[0].Record.(*alloc.Sandbox)
	if !ok || s.State != state {
		h.t.Fatalf("sandbox %s is %+v, want %s", serial, s, state)
	}
	return s
}

// TestBoundAtPostRestoreOnly: while CRIU still makes namespaces nothing is bound; the claim stands.
func TestBoundAtPostRestoreOnly(t *testing.T) {
	h := newHost(t)
	d := h.moved()
	c := h.criu()
	c.passes(criuhook.PreRestore, 0, d.images)
	pid := c.tree(containerFlags, false)
	for _, action := range []criuhook.Action{criuhook.SetupNamespaces, criuhook.PostSetupNamespaces} {
		c.passes(action, pid, d.images)
		h.is(d.sandbox, alloc.StateClaimed)
	}
	c.passes(criuhook.PostRestore, pid, d.images)
	h.is(d.sandbox, alloc.StateRunning)
	c.end()
	h.settled()
	h.consistent()
}

// TestTwiceIsOnce: an action that comes again has its one effect and gets its one answer.
func TestTwiceIsOnce(t *testing.T) {
	h := newHost(t)
	d := h.dump()
	first := h.is(d.sandbox, alloc.StateDumped)
	d.passes(criuhook.PostDump, d.tree.pid, d.images)
	if again := h.is(d.sandbox, alloc.StateDumped); again.Checkpoint != first.Checkpoint || again.Epoch != first.Epoch {
		t.Errorf("post-dump again made checkpoint %s in epoch %s, before it was %s in %s", again.Checkpoint, again.Epoch, first.Checkpoint, first.Epoch)
	}
	d.tree.end()
	h.reaches(d.sandbox, alloc.StateInTransit)
	d.end()
	c := h.criu()
	c.passes(criuhook.PreRestore, 0, d.images)
	c.passes(criuhook.PreRestore, 0, d.images)
	if s := h.is(d.sandbox, alloc.StateClaimed); s.Epoch != first.Epoch+1 {
		t.Errorf("claimed twice: epoch %s after %s", s.Epoch, first.Epoch)
	}
	pid := c.tree(containerFlags, false)
	c.passes(criuhook.PostRestore, pid, d.images)
	bound := h.is(d.sandbox, alloc.StateRunning)
	c.passes(criuhook.PostRestore, pid, d.images)
	if again := h.is(d.sandbox, alloc.StateRunning); len(again.Bindings) != len(bound.Bindings) || len(again.Stints) != 2 {
		t.Errorf("bound twice: %+v", again)
	}
	c.end()
	h.settled()
	h.consistent()
}

// TestVetoIsFinal: a hook that comes after its run was vetoed commits nothing, whatever has changed since.
func TestVetoIsFinal(t *testing.T) {
	t.Run("dump", func(t *testing.T) {
		h := newHost(t)
		tree := container(t, containerFlags)
		sandbox := h.sandbox(tree.pid)
		images := writeImages(t, "run", containerTypes...)
		c := h.criu()
		h.pool.setAway(true)
		c.vetoed(criuhook.PreDump, tree.pid, images, "away")
		h.pool.setAway(false)
		c.vetoed(criuhook.PostDump, tree.pid, images, "refused before")
		h.is(sandbox, alloc.StateRunning)
		c.end()
		h.settled()
		h.consistent()
	})
	t.Run("restore", func(t *testing.T) {
		h := newHost(t)
		d := h.moved()
		h.pool.setAway(true)
		c := h.criu()
		c.vetoed(criuhook.PreRestore, 0, d.images, "away")
		h.pool.setAway(false)
		pid := c.tree(containerFlags, false)
		c.vetoed(criuhook.PostRestore, pid, d.images, "refused before")
		h.is(d.sandbox, alloc.StateInTransit)
		kill(pid)
		c.end()
		h.settled()
		h.consistent()
	})
}

// TestClaimWaitsForTheSource: a restore that is early waits until the dumped tree was seen dead.
func TestClaimWaitsForTheSource(t *testing.T) {
	h := newHost(t)
	d := h.dump()
	c := h.criu()
	answered := make(chan said, 1)
	go func() { answered <- c.bring(criuhook.PreRestore, 0, d.images) }()
	h.eventually("the restore asks again for its claim", func() error {
		select {
		case s := <-answered:
			t.Fatalf("the source is dumped, and the restore is answered %+v", s)
		default:
		}
		h.pool.mu.Lock()
		defer h.pool.mu.Unlock()
		if h.pool.calls["Claim"] < 2 {
			return errUnsettled
		}
		return nil
	})
	d.tree.end()
	d.end()
	if s := <-answered; s.Err != "" || s.Verdict != criuhook.Pass {
		t.Errorf("the source is gone, and the restore is answered %+v", s)
	}
	h.is(d.sandbox, alloc.StateClaimed)
	c.end()
	h.reaches(d.sandbox, alloc.StateInTransit)
	h.settled()
	h.consistent()
}
