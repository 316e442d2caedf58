package agent

import (
	"fmt"
	"testing"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// TestFaults: the agent never learns what became of one call. Whatever it was, in the end every live
// namespace has one serial, the book is the store's, and the container lives in one place at most.
func TestFaults(t *testing.T) {
	if testing.Short() {
		t.Skip("goes through every call")
	}
	for _, method := range []string{"Hello", "Grant", "Register", "End", "Open", "Confirm", "Abort", "Claim", "Bind", "Release"} {
		for _, f := range []memstore.Fault{{Outcome: memstore.Stored}, {Outcome: memstore.Lost}, {Outcome: memstore.Delayed, After: 8}, {Outcome: memstore.Delayed, After: 1000}, {Outcome: memstore.Unavailable}} {
			t.Run(fmt.Sprintf("%s %s %d", method, f.Outcome, f.After), func(t *testing.T) {
				h := idleHost(t)
				if method == "Hello" || method == "Grant" {
					meets := h.pool.hitBy(method, 1, f)
					h.start()
					h.journey(nil)
					if !h.pool.wasHit(meets) {
						t.Error("the fault hit nothing")
					}
					return
				}
				h.start()
				h.journey(h.pool.hitBy(method, 1, f))
			})
		}
	}
}

// journey dumps and restores a container until both have gone through, as an operator would who tries
// again; then it ends. meets is the fault that one call on the way is to meet.
func (h *host) journey(meets *fault) {
	t := h.t
	tree := container(t, containerFlags)
	places := h.serials(tree.pid)
	sandbox, before := places[alloc.Mnt].sandbox, serialsOf(places)
	images := h.dumpUntilDone(tree, sandbox)
	pid := h.restoreUntilDone(sandbox, images)
	h.settled()
	h.consistent()
	after := serialsOf(h.serials(pid))
	for _, typ := range containerTypes {
		if after[typ] != before[typ] {
			t.Errorf("%s: %s became %s", typ, before[typ], after[typ])
		}
	}
	kill(pid)
	h.reaches(sandbox, alloc.StateEnded)
	h.settled()
	h.consistent()
	if meets != nil && !h.pool.wasHit(meets) {
		t.Error("the fault hit nothing")
	}
}

// dumpUntilDone first dumps and lets the tree go on, as CRIU with --leave-running, and then for good.
func (h *host) dumpUntilDone(tree *proc, sandbox alloc.Serial) string {
	h.t.Helper()
	left := false
	for try := range 6 {
		images := writeImages(h.t, fmt.Sprintf("run-%d", try), containerTypes...)
		c := h.criu()
		ok := c.bring(criuhook.PreDump, tree.pid, images).Verdict == criuhook.Pass && c.bring(criuhook.PostDump, tree.pid, images).Verdict == criuhook.Pass
		if !ok || !left {
			left = left || ok
			c.end() // the tree goes on
			h.reaches(sandbox, alloc.StateRunning)
			h.settled()
			continue
		}
		tree.end()
		h.reaches(sandbox, alloc.StateInTransit)
		c.end()
		return images
	}
	h.t.Fatal("no dump went through")
	return ""
}

// restoreUntilDone first has CRIU fail before its tree is complete, and then goes on.
func (h *host) restoreUntilDone(sandbox alloc.Serial, images string) int {
	h.t.Helper()
	failed := false
	for range 6 {
		c := h.criu()
		if c.bring(criuhook.PreRestore, 0, images).Verdict != criuhook.Pass || !failed {
			failed = true
			c.end()
			h.settled()
			h.reaches(sandbox, alloc.StateInTransit)
			continue
		}
		pid := c.tree(containerFlags, false)
		c.passes(criuhook.SetupNamespaces, pid, images)
		if c.bring(criuhook.PostRestore, pid, images).Verdict == criuhook.Pass {
			c.end()
			return pid
		}
		kill(pid) // as CRIU does
		c.end()
		h.reaches(sandbox, alloc.StateInTransit)
		h.settled()
	}
	h.t.Fatal("no restore went through")
	return 0
}
