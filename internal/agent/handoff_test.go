package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// containerTypes are the types of containerFlags.
var containerTypes = []alloc.NamespaceType{alloc.Mnt, alloc.UTS, alloc.IPC, alloc.PID, alloc.Net}

// bring has CRIU's hook bring an action and returns the answer.
func (c *criu) bring(a criuhook.Action, init int, images string) said {
	c.t.Helper()
	return c.order(order{Action: a, Init: init, Images: images})
}

// passes brings an action that is to pass.
func (c *criu) passes(a criuhook.Action, init int, images string) {
	c.t.Helper()
	if s := c.bring(a, init, images); s.Err != "" || s.Verdict != criuhook.Pass {
		c.t.Fatalf("%s: %+v", a, s)
	}
}

// vetoed brings an action that is to be vetoed for a reason.
func (c *criu) vetoed(a criuhook.Action, init int, images, reason string) {
	c.t.Helper()
	if s := c.bring(a, init, images); s.Err != "" || s.Verdict != criuhook.Veto || !strings.Contains(s.Message, reason) {
		c.t.Fatalf("%s: %+v, want a veto that says %q", a, s, reason)
	}
}

// dumped is a container after the post-dump of a dump that passed.
type dumped struct {
	*criu
	tree    *proc
	sandbox alloc.Serial
	before  map[alloc.NamespaceType]alloc.Serial
	images  string
}

// dump brings a container to the point where CRIU may kill it.
func (h *host) dump() *dumped {
	h.t.Helper()
	tree := container(h.t, containerFlags)
	places := h.serials(tree.pid)
	d := &dumped{criu: h.criu(), tree: tree, sandbox: places[alloc.Mnt].sandbox, before: serialsOf(places), images: writeImages(h.t, "run-"+places[alloc.Mnt].sandbox.String(), containerTypes...)}
	d.passes(criuhook.PreDump, tree.pid, d.images)
	d.passes(criuhook.PostDump, tree.pid, d.images)
	return d
}

// moved is a dump that has gone its straight way.
func (h *host) moved() *dumped {
	h.t.Helper()
	d := h.dump()
	d.tree.end()
	h.reaches(d.sandbox, alloc.StateInTransit)
	d.end()
	return d
}

// restored brings a restore of images to the point where CRIU may let the tree run.
func (h *host) restored(images string) (*criu, int) {
	h.t.Helper()
	c := h.criu()
	c.passes(criuhook.PreRestore, 0, images)
	pid := c.tree(containerFlags, false)
	c.passes(criuhook.SetupNamespaces, pid, images)
	c.passes(criuhook.PostRestore, pid, images)
	return c, pid
}

// TestHandoff is the straight way out and in again.
func TestHandoff(t *testing.T) {
	h := newHost(t)
	d := h.moved()
	s, cp := h.reaches(d.sandbox, alloc.StateInTransit)
	if cp.State != alloc.CheckpointOpen || s.Checkpoint != cp.Serial {
		t.Errorf("checkpoint %+v", cp)
	}
	c, pid := h.restored(d.images)
	c.passes(criuhook.PreResume, pid, d.images)
	c.end()
	s, cp = h.reaches(d.sandbox, alloc.StateRunning)
	if cp.State != alloc.CheckpointConsumed || len(s.Stints) != 2 || s.Stints[0].Epoch >= s.Epoch {
		t.Errorf("epoch %s, checkpoint %s", s.Epoch, cp.State)
	}
	after := serialsOf(h.serials(pid))
	for _, typ := range containerTypes {
		if after[typ] != d.before[typ] {
			t.Errorf("%s: %s became %s", typ, d.before[typ], after[typ])
		}
	}
	h.settled()
	h.consistent()

	// The same images once more: a clone.
	again, twin := h.restored(d.images)
	again.end()
	copies := h.serials(twin)
	for _, typ := range containerTypes {
		if b := copies[typ].binding; b.Serial == d.before[typ] || b.Parent != d.before[typ] {
			t.Errorf("%s: %+v, the original has %s", typ, b, d.before[typ])
		}
	}
	h.settled()
	h.consistent()
	kill(pid)
	h.reaches(d.sandbox, alloc.StateEnded)
	h.consistent()
}

// settled waits until every run is over.
func (h *host) settled() {
	h.t.Helper()
	h.eventually("every run is settled", func() error {
		for _, n := range h.runs.open() {
			return fmt.Errorf("run %s is open", n.key)
		}
		return nil
	})
}

// TestEvidence: what is seen of the ends of tree and CRIU decides.
func TestEvidence(t *testing.T) {
	for name, c := range map[string]struct {
		act    func(*host, *dumped)
		state  alloc.SandboxState
		images alloc.CheckpointState
	}{
		"tree first":                {func(_ *host, d *dumped) { d.tree.end(); d.end() }, alloc.StateInTransit, alloc.CheckpointOpen},
		"CRIU first":                {func(_ *host, d *dumped) { d.end(); d.tree.end() }, alloc.StateEnded, alloc.CheckpointCopy},
		"it runs on":                {func(_ *host, d *dumped) { d.end() }, alloc.StateRunning, alloc.CheckpointCopy},
		"agent restarted meanwhile": {func(h *host, d *dumped) { h.restart(); d.tree.end(); d.end() }, alloc.StateEnded, alloc.CheckpointCopy},
		"it was told to go on": {func(_ *host, d *dumped) {
			d.passes(criuhook.NetworkUnlock, d.tree.pid, d.images)
			d.tree.end()
			d.end()
		}, alloc.StateEnded, alloc.CheckpointCopy},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			d := h.dump()
			h.reaches(d.sandbox, alloc.StateDumped)
			c.act(h, d)
			if _, cp := h.reaches(d.sandbox, c.state); cp.State != c.images {
				t.Errorf("the images are %s, want %s", cp.State, c.images)
			}
			h.settled()
			h.consistent()
		})
	}
}

// TestLeftBehind: the tree that was dumped is gone, and somebody lives in its namespaces: it goes on.
func TestLeftBehind(t *testing.T) {
	h := newHost(t)
	d := h.dump()
	guest := inside(t, d.tree.pid, []string{"--net"}, 0)
	h.named(guest.pid, "cat")
	d.end()
	d.tree.end()
	h.reaches(d.sandbox, alloc.StateRunning)
	h.consistent()
}

// TestVetoedDump: the source runs on and the images are void, also when the next dump comes at once.
func TestVetoedDump(t *testing.T) {
	h := newHost(t)
	tree := container(t, containerFlags)
	sandbox := h.sandbox(tree.pid)
	images := writeImages(t, "run", containerTypes...)
	broken := t.TempDir()
	c := h.criu()
	c.passes(criuhook.PreDump, tree.pid, images)
	c.vetoed(criuhook.PostDump, tree.pid, broken, "images in")
	c.vetoed(criuhook.PostDump, tree.pid, images, "images in") // the answer of before
	c.end()
	next := h.criu()
	next.passes(criuhook.PreDump, tree.pid, images)
	next.passes(criuhook.PostDump, tree.pid, images)
	tree.end()
	next.end()
	h.reaches(sandbox, alloc.StateInTransit)
	h.settled()
	h.consistent()
}

// TestDumpAfterDump: a dump that leaves its source running is settled a moment later; the next one waits
// for that.
func TestDumpAfterDump(t *testing.T) {
	h := newHost(t)
	d := h.dump()
	d.end() // the source goes on
	next := h.criu()
	next.passes(criuhook.PreDump, d.tree.pid, d.images)
	next.end()
	h.reaches(d.sandbox, alloc.StateRunning)
	h.consistent()
}

// TestGivenBack: a restore that came to nothing gives its claim back, wherever it stopped.
func TestGivenBack(t *testing.T) {
	for name, stop := range map[string]func(*host, *dumped){
		"at pre-restore": func(h *host, d *dumped) {
			c := h.criu()
			c.passes(criuhook.PreRestore, 0, d.images)
			c.end()
		},
		"tree killed": func(h *host, d *dumped) {
			c := h.criu()
			c.passes(criuhook.PreRestore, 0, d.images)
			pid := c.tree(containerFlags, false)
			c.passes(criuhook.SetupNamespaces, pid, d.images)
			c.vetoed(criuhook.PostRestore, pid, h.t.TempDir(), "images in")
			kill(pid)
			c.end()
		},
		"parked":         func(h *host, d *dumped) { h.parked(d, false).end() },
		"parked after 0": func(h *host, d *dumped) { h.parked(d, true).end() },
		"parked, agent restarted": func(h *host, d *dumped) {
			c := h.parked(d, true)
			if err := h.stop(); err != nil {
				h.t.Fatal(err)
			}
			c.end()
			h.start()
		},
		"agent restarted before post-restore": func(h *host, d *dumped) {
			c := h.parked(d, false)
			h.restart()
			c.end()
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			d := h.moved()
			stop(h, d)
			s, cp := h.reaches(d.sandbox, alloc.StateInTransit)
			if cp.State != alloc.CheckpointOpen || cp.Claimant != nil || len(s.Stints) != 2 {
				t.Errorf("epoch %s, checkpoint %+v", s.Epoch, cp)
			}
			h.settled()
			h.consistent()
			c, pid := h.restored(d.images)
			c.end()
			h.reaches(d.sandbox, alloc.StateRunning)
			if after := serialsOf(h.serials(pid)); after[alloc.Net] != d.before[alloc.Net] {
				t.Errorf("net: %s became %s", d.before[alloc.Net], after[alloc.Net])
			}
			h.settled()
			h.consistent()
		})
	}
}

// parked restores a tree that executes CRIU's own program.
func (h *host) parked(d *dumped, zero bool) *criu {
	h.t.Helper()
	c := h.criu()
	c.passes(criuhook.PreRestore, 0, d.images)
	pid := c.tree(containerFlags, true)
	c.passes(criuhook.SetupNamespaces, pid, d.images)
	if zero {
		c.passes(criuhook.PostRestore, pid, d.images)
	}
	return c
}

// TestRanUnasked: a tree runs although it was never answered, which an operator's bypass allows. It keeps
// its claim, and its serials.
func TestRanUnasked(t *testing.T) {
	h := newHost(t)
	d := h.moved()
	c := h.criu()
	c.passes(criuhook.PreRestore, 0, d.images)
	pid := c.tree(containerFlags, false)
	c.passes(criuhook.SetupNamespaces, pid, d.images)
	c.end()
	h.reaches(d.sandbox, alloc.StateRunning)
	after := serialsOf(h.serials(pid))
	for _, typ := range containerTypes {
		if after[typ] != d.before[typ] {
			t.Errorf("%s: %s became %s", typ, d.before[typ], after[typ])
		}
	}
	h.settled()
	h.consistent()
}

// TestNoneOfOurBusiness: a tree in the host's namespaces passes everywhere, also when the agent is a new
// one at each action.
func TestNoneOfOurBusiness(t *testing.T) {
	h := newHost(t)
	tree := container(t, 0)
	images := writeImages(t, "plain")
	c := h.criu()
	for _, a := range []criuhook.Action{criuhook.PreDump, criuhook.PostDump} {
		c.passes(a, tree.pid, images)
		h.restart()
	}
	r := h.criu()
	for _, a := range []criuhook.Action{criuhook.PreRestore, criuhook.SetupNamespaces, criuhook.PostRestore, criuhook.PreResume} {
		r.passes(a, tree.pid, images)
		h.restart()
	}
	if _, err := os.Stat(filepath.Join(images, criuhook.ManifestName)); err == nil {
		t.Error("it has a manifest")
	}
	h.consistent()
}

// TestAdopt: images that nobody knows.
func TestAdopt(t *testing.T) {
	h := newHost(t)
	images := writeImages(t, "unknown", containerTypes...)
	c, pid := h.restored(images)
	c.end()
	places := h.serials(pid)
	if s := h.book.sandbox(places[alloc.Mnt].sandbox); s.Labels["adopted"] != "true" || s.Parent != nil {
		t.Errorf("%+v", s)
	}
	h.settled()
	h.consistent()
}
