package e2e

import (
	"slices"
	"testing"

	"github.com/nsalloc/nsalloc/internal/testhost"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// TestMigrate is the main job: a container's namespaces keep their serials from one host to another.
func TestMigrate(t *testing.T) {
	p := newPool(t, "a", "b")
	for name, o := range map[string]testhost.BundleOptions{"plain": {}, "userns": {UserNS: true}} {
		t.Run(name, func(t *testing.T) {
			p := &pool{Pool: p.Pool, t: t}
			types := runtimeTypes(o.UserNS)
			c := p.container(name, "a", o)
			before := c.identify("a", c.id)
			p.checkStored(before, types)
			source := p.stored(before.sandbox()).Sandbox
			count := c.countsOn("a", 2)

			if err := c.dump("a"); err != nil {
				t.Fatal(err)
			}
			dumped := p.reaches(source.Serial, alloc.StateInTransit, "a")
			if dumped.Checkpoint == nil || dumped.Checkpoint.State != alloc.CheckpointOpen {
				t.Errorf("in transit, its checkpoint is %+v", dumped.Checkpoint)
			}
			c.move("a", "b")
			if err := c.restore("b", ""); err != nil {
				t.Fatal(err)
			}
			f := p.reaches(source.Serial, alloc.StateRunning, "b")
			if f.Sandbox.Epoch != source.Epoch+1 || f.Checkpoint.State != alloc.CheckpointConsumed {
				t.Errorf("on b: epoch %s after %s, checkpoint %s", f.Sandbox.Epoch, source.Epoch, f.Checkpoint.State)
			}
			after := c.identify("b", c.id)
			p.checkStored(after, types)
			checkMoved(t, before, after, types)
			c.countsOn("b", count)

			checkSecondRestore(t, p, c, after, types)
			p.check()
		})
	}
}

// checkMoved compares a container before and after its move.
func checkMoved(t *testing.T, before, after namespaces, types []alloc.NamespaceType) {
	t.Helper()
	for _, typ := range alloc.NamespaceTypes() {
		x, y := before[typ], after[typ]
		t.Logf("%-6s  a: inode %d id %d serial %s   b: inode %d id %d serial %s", typ, x.kernel.Inode, x.kernel.ID, x.serial, y.kernel.Inode, y.kernel.ID, y.serial)
		switch {
		case slices.Contains(types, typ):
			if x.serial != y.serial || x.sandbox != y.sandbox {
				t.Errorf("%s: serial %s became %s (sandbox %s, %s)", typ, x.serial, y.serial, x.sandbox, y.sandbox)
			}
			// Below Linux 6.18 an identity is weak and says nothing across hosts.
			if !x.kernel.Weak && x.kernel.ID == y.kernel.ID || x.ofHost || y.ofHost {
				t.Errorf("%s: the same kernel namespace on both hosts: %+v, %+v", typ, x, y)
			}
		case typ == alloc.Time:
			// CRIU restores the host's time namespace as a new one (criu.md): it gets a fresh serial, the
			// host's own keeps the host's.
			if !x.ofHost || x.serial == y.serial {
				t.Errorf("time: %+v became %+v", x, y)
			}
		default:
			if !x.ofHost || !y.ofHost || x.serial == y.serial {
				t.Errorf("%s is the host's on both sides and has each host's serial: %+v, %+v", typ, x, y)
			}
		}
	}
}

// checkSecondRestore restores consumed images once more: a clone with fresh serials and parents.
func checkSecondRestore(t *testing.T, p *pool, c *container, original namespaces, types []alloc.NamespaceType) {
	t.Helper()
	id := c.id + "-again"
	if err := c.restore("b", id); err != nil {
		t.Fatal(err)
	}
	clone := c.identify("b", id)
	for _, typ := range types {
		if clone[typ].serial == original[typ].serial || clone[typ].parent != original[typ].serial {
			t.Errorf("%s: the clone has serial %s with parent %s, the original has %s", typ, clone[typ].serial, clone[typ].parent, original[typ].serial)
		}
	}
	f := p.stored(clone.sandbox())
	own := p.stored(original.sandbox())
	if f.Sandbox.Parent == nil || f.Sandbox.Parent.Sandbox != original.sandbox() || f.Sandbox.Parent.Checkpoint != own.Sandbox.Checkpoint {
		t.Errorf("the clone's parent is %+v", f.Sandbox.Parent)
	}
	if own.Sandbox.State != alloc.StateRunning || own.Sandbox.Owner != "b" {
		t.Errorf("the original is %s on host %s", own.Sandbox.State, own.Sandbox.Owner)
	}
	c.counts("b", id, 2)
}
