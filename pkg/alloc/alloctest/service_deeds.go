package alloctest

import (
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// dumpOf is what the host says of a dump of its.
func (a *Agent) dumpOf(h alloc.Handoff) alloc.AgainItem {
	it := a.Item(&h.Sandbox)
	it.Dump = &alloc.AgainDump{Checkpoint: h.Checkpoint.Serial, RunID: h.Checkpoint.RunID, Digest: h.Checkpoint.Digest}
	return it
}

// testAgainImages: images that the store has forgotten carry their sandbox on, from whatever the store has of it.
func testAgainImages(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	nothing := p.Snapshot()
	sb := a.Sandbox()
	runs := p.Snapshot()
	h := bind(t, b, claim(t, b, transit(t, a, sb), "r"), "r")
	images := transit(t, b, &h.Sandbox)
	cut := p.Snapshot()
	for name, then := range map[string]Snapshot{"nothing": nothing, "where it was": runs, "all": cut} {
		p.PutBack(then)
		a.Return()
		b.Rejoin()
		cmd := b.Again()
		cmd.Items = []alloc.AgainItem{b.dumpOf(images)}
		var first alloc.AgainAnswer
		for i := range 2 {
			answer := must[[]alloc.AgainAnswer](t)(p.RegisterAgain(t.Context(), cmd))[0]
			if known := name == "all"; known != (answer.Err != nil) {
				t.Fatalf("%s: %+v", name, answer)
			}
			if i == 0 {
				first = answer
			} else if answer.Sandbox.State != first.Sandbox.State {
				t.Errorf("%s: asked again %+v, before %+v", name, answer, first)
			}
		}
		must[alloc.Ranges](t)(p.Grant(t.Context(), alloc.GrantCommand{Mutation: b.Mutation(), Count: 100}))
		if name != "all" {
			is(t, must[alloc.Handoff](t)(p.Confirm(t.Context(), b.Confirm(images, alloc.SeenStopped))), alloc.StateInTransit, "b", alloc.CheckpointOpen)
		}
		back := bind(t, a, claim(t, a, images, "r"+name), "r"+name)
		if back.Sandbox.Serial != sb.Serial || back.Checkpoint.RunID != images.Checkpoint.RunID || back.Checkpoint.Source != "b" {
			t.Errorf("%s: it went on as %+v from %+v", name, back.Sandbox, back.Checkpoint)
		}
	}
}

// testAgainOver: what was restored once and is over is not restored again from the same images, whatever the store has of
// that restore.
func testAgainOver(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	nothing := p.Snapshot()
	images := transit(t, a, a.Sandbox())
	way := p.Snapshot()
	h := claim(t, b, images, "r")
	claimed := p.Snapshot()
	h = bind(t, b, h, "r")
	bound := p.Snapshot()
	for name, then := range map[string]Snapshot{"nothing": nothing, "in transit": way, "claimed": claimed, "running": bound} {
		p.PutBack(then)
		b.Rejoin()
		cmd := b.Again()
		cmd.Items = []alloc.AgainItem{{Sandbox: h.Sandbox.Serial, Epoch: h.Sandbox.Epoch, Checkpoint: images.Checkpoint.Serial, Over: true}}
		for range 2 {
			got := done(t, must[[]alloc.AgainAnswer](t)(p.RegisterAgain(t.Context(), cmd)))
			if got.State != alloc.StateEnded || got.Owner != "b" || got.Epoch != h.Sandbox.Epoch || got.Claim != nil || got.Stint().To.IsZero() {
				t.Errorf("%s: it is %+v", name, got)
			}
		}
		a.Rejoin()
		cmd = a.Again()
		cmd.Items = []alloc.AgainItem{a.dumpOf(images)} // what it knows of is older
		if answer := must[[]alloc.AgainAnswer](t)(p.RegisterAgain(t.Context(), cmd))[0]; answer.Err == nil || answer.Err.Reason != alloc.ReasonStaleEpoch {
			t.Errorf("%s: %+v", name, answer)
		}
		c, err := p.Claim(t.Context(), a.Claim(images, "r2"))
		if err == nil && (c.Outcome != alloc.MayClone || c.Images.State != alloc.CheckpointConsumed) || err != nil && alloc.ReasonOf(err) != alloc.ReasonCheckpointNotFound {
			t.Errorf("%s: the same images may be restored as %+v, %v", name, c, err)
		}
	}
}

// testAgainMidDump: a tree that lives in the middle of a dump goes on as one that is dumped.
func testAgainMidDump(t *testing.T, p *Pool) {
	a := p.Agent("a")
	sb := a.Sandbox()
	then := p.Snapshot()
	h := must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(sb)))
	p.PutBack(then)
	a.Rejoin()
	for name, change := range map[string]func(*alloc.AgainItem){
		"over":        func(it *alloc.AgainItem) { it.Over, it.Bindings = true, nil },
		"no digest":   func(it *alloc.AgainItem) { it.Dump.Digest = alloc.Digest{} },
		"no serial":   func(it *alloc.AgainItem) { it.Dump.Checkpoint = 7 },
		"a later one": func(it *alloc.AgainItem) { it.Dump.Checkpoint = 2<<48 | 7 },
		"no boot":     func(it *alloc.AgainItem) { it.Bindings[0].Kernel.BootID = "1" },
	} {
		cmd := a.Again()
		cmd.Items = []alloc.AgainItem{a.dumpOf(h)}
		change(&cmd.Items[0])
		if _, err := p.RegisterAgain(t.Context(), cmd); alloc.ReasonOf(err) != alloc.ReasonInvalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	cmd := a.Again()
	cmd.Items = []alloc.AgainItem{a.dumpOf(h)}
	got := done(t, must[[]alloc.AgainAnswer](t)(p.RegisterAgain(t.Context(), cmd)))
	if got.State != alloc.StateDumped || got.Checkpoint != h.Checkpoint.Serial {
		t.Errorf("it is %+v", got)
	}
	is(t, must[alloc.Handoff](t)(p.Abort(t.Context(), a.Abort(h, true))), alloc.StateRunning, "a", alloc.CheckpointCopy)
}
