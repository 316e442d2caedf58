package agent

import (
	"fmt"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// TestForgetsWhatMoved: a sandbox that was restored here after the snapshot stays under its serials and its epoch,
// its images are consumed, and what the store says lives here and does not is ended when every host has come.
func TestForgetsWhatMoved(t *testing.T) {
	h := newHost(t)
	h.otherHost()
	gone := container(t, containerFlags)
	over := h.sandbox(gone.pid)
	d := h.moved()
	h.consistent()
	then := h.snapshot()
	c, pid := h.restored(d.images)
	c.passes(criuhook.PreResume, pid, d.images)
	c.end()
	was, _ := h.reaches(d.sandbox, alloc.StateRunning)
	gone.end()
	h.reaches(over, alloc.StateEnded)
	h.settled()

	g := h.putBack(then)
	h.hasSettled(g)
	s, cp := h.reaches(d.sandbox, alloc.StateRunning)
	if s.Epoch != was.Epoch || cp == nil || cp.State != alloc.CheckpointConsumed || s.Again != g {
		t.Errorf("it is %+v, its checkpoint %+v", s, cp)
	}
	h.keepsSerials(pid, restoredSerials(h, pid, d.before))
	// The store says that the other one runs here, until the host that is missing is waived.
	if s, _, err := h.pool.Sandbox(t.Context(), over); err != nil || s.State != alloc.StateRunning {
		t.Errorf("what does not live here is %+v, %v", s, err)
	}
	if _, _, err := h.pool.svc.Waive(t.Context(), alloc.WaiveCommand{RequestID: client.NewRequestID(), Actor: "operator/ann", Host: "b"}); err != nil {
		t.Fatal(err)
	}
	h.reaches(over, alloc.StateEnded)
	h.consistent()
}

// TestForgetsHandoff: a restore that claimed before the store forgot is vetoed, the tree that it made is no sandbox, and
// what it claimed can be restored anew.
func TestForgetsHandoff(t *testing.T) {
	for _, knows := range []bool{true, false} { // the store, of the claim
		t.Run(fmt.Sprintf("knows=%t", knows), func(t *testing.T) {
			h := newHost(t)
			d := h.moved()
			h.consistent()
			then := h.snapshot()
			c := h.criu()
			c.passes(criuhook.PreRestore, 0, d.images)
			pid := c.tree(containerFlags, false)
			c.passes(criuhook.SetupNamespaces, pid, d.images)
			if knows {
				then = h.snapshot()
			}
			h.hasSettled(h.putBack(then))
			c.vetoed(criuhook.PostRestore, pid, d.images, "epoch")
			kill(pid)
			c.end()
			h.reaches(d.sandbox, alloc.StateInTransit)
			h.settled()
			again, pid := h.restored(d.images)
			again.passes(criuhook.PreResume, pid, d.images)
			again.end()
			h.reaches(d.sandbox, alloc.StateRunning)
			h.keepsSerials(pid, restoredSerials(h, pid, d.before))
			h.settled()
			h.consistent()
		})
	}
}

// TestForgetsDump: of a dump that the store has forgotten the images carry the sandbox on, whether its end was told
// before, or the tree is still there when the host comes back; and what was restored once is not restored again.
func TestForgetsDump(t *testing.T) {
	for _, ended := range []bool{true, false} {
		t.Run(fmt.Sprintf("ended=%t", ended), func(t *testing.T) {
			h := newHost(t)
			tree := container(t, containerFlags)
			places := h.serials(tree.pid)
			h.consistent()
			then := h.snapshot()
			d := &dumped{criu: h.criu(), tree: tree, sandbox: places[alloc.Mnt].sandbox, before: serialsOf(places), images: writeImages(t, "run", containerTypes...)}
			d.passes(criuhook.PreDump, tree.pid, d.images)
			d.passes(criuhook.PostDump, tree.pid, d.images)
			end := func() {
				d.tree.end()
				h.reaches(d.sandbox, alloc.StateInTransit)
				d.end()
			}
			if ended {
				end()
				h.settled()
			}
			h.hasSettled(h.putBack(then))
			if !ended {
				h.reaches(d.sandbox, alloc.StateDumped)
				end()
			}
			_, cp := h.reaches(d.sandbox, alloc.StateInTransit)
			if cp == nil || cp.State != alloc.CheckpointOpen || cp.RunID != "run" {
				t.Errorf("its images are %+v", cp)
			}
			h.settled()
			then = h.snapshot()
			c, pid := h.restored(d.images)
			c.passes(criuhook.PreResume, pid, d.images)
			c.end()
			h.reaches(d.sandbox, alloc.StateRunning)
			h.keepsSerials(pid, restoredSerials(h, pid, d.before))
			h.settled()
			kill(pid)
			h.reaches(d.sandbox, alloc.StateEnded)

			h.hasSettled(h.putBack(then))
			h.reaches(d.sandbox, alloc.StateEnded)
			again, pid := h.restored(d.images)
			again.end()
			for _, typ := range containerTypes {
				if b := h.serials(pid)[typ].binding; b.Serial == d.before[typ] || b.Parent != d.before[typ] {
					t.Errorf("restored once more, %s is %+v", typ, b)
				}
			}
			h.settled()
			h.consistent()
		})
	}
}

// restoredSerials is what a restored process has, with those of its own as before.
func restoredSerials(h *host, pid int, before map[alloc.NamespaceType]alloc.Serial) map[alloc.NamespaceType]alloc.Serial {
	all := serialsOf(h.serials(pid))
	for _, typ := range containerTypes {
		all[typ] = before[typ]
	}
	return all
}
