package e2e

import (
	"fmt"
	"testing"

	"github.com/nsalloc/nsalloc/internal/testhost"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// TestAgentRestarts: an agent that is killed, or stopped, and started again numbers nothing anew.
func TestAgentRestarts(t *testing.T) {
	p := newPool(t, "a")
	c := p.container("ctr", "a", testhost.BundleOptions{})
	before := c.identify("a", c.id)
	for what, end := range map[string]func(string) error{"killed": p.KillAgent, "stopped": p.StopAgent} {
		if err := end("a"); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if err := p.StartAgent(p.ctx(), "a"); err != nil {
			t.Fatal(err)
		}
		after := c.identify("a", c.id)
		for typ, n := range before {
			if after[typ] != n {
				t.Errorf("%s: %s: %+v became %+v", what, typ, n, after[typ])
			}
		}
	}
	p.check()
}

// TestDeathIsNoticed: a container that ends, ends its sandbox; its serials stay findable.
func TestDeathIsNoticed(t *testing.T) {
	p := newPool(t, "a")
	c := p.container("ctr", "a", testhost.BundleOptions{})
	ns := c.identify("a", c.id)
	c.remove("a", c.id)
	p.reaches(ns.sandbox(), alloc.StateEnded, "a")
	for typ, n := range ns {
		if !n.ofHost {
			if f := p.stored(n.serial); f.Sandbox.Serial != ns.sandbox() {
				t.Errorf("%s: serial %s finds sandbox %s", typ, n.serial, f.Sandbox.Serial)
			}
		}
	}
	p.check()
}

// TestPoolAway: while the server is gone a dump is refused before anything is frozen, and goes through
// when it is back.
func TestPoolAway(t *testing.T) {
	p := newPool(t, "a", "b")
	c := p.container("ctr", "a", testhost.BundleOptions{})
	before := c.identify("a", c.id)
	count := c.countsOn("a", 2)
	if err := p.KillServer(); err != nil {
		t.Fatal(err)
	}
	if err := c.dump("a"); err == nil {
		t.Fatal("a dump went through without a pool")
	}
	count = c.countsOn("a", count)
	if err := p.StartServer(p.ctx()); err != nil {
		t.Fatal(err)
	}
	p.eventually("the dump goes through", func() error {
		if err := c.dump("a"); err != nil {
			return fmt.Errorf("dump: %w", err)
		}
		return nil
	})
	c.move("a", "b")
	if err := c.restore("b", ""); err != nil {
		t.Fatal(err)
	}
	p.reaches(before.sandbox(), alloc.StateRunning, "b")
	checkMoved(t, before, c.identify("b", c.id), runtimeTypes(false))
	c.countsOn("b", count)
	p.check()
}
