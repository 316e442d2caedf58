package alloc_test

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"

	"pgregory.net/rapid"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// forgetful moves one sandbox among hosts while its store is put back to snapshots, hosts go away and come back in any
// order, and an operator waives one. What each host has in truth is kept here, as an agent knows it.
type forgetful struct {
	t     *testing.T
	rt    *rapid.T
	p     *alloctest.Pool
	hosts []*truth
	then  []alloctest.Snapshot
	// images are the hand-offs that began, by what the source knows of them.
	images   []alloc.Handoff
	putBacks int
	waived   bool // an operator gave a host up: from then on a tree can lose
	lost     int
	runs     int
	sandbox  alloc.Serial
	bound    map[alloc.Serial]int // how often images were consumed
	reopened int
}

// truth is a host.
type truth struct {
	*alloctest.Agent
	up    bool
	in    alloc.Generation // the generation that it has registered again in
	lives *alloc.Sandbox   // what runs on it, as it was acknowledged
	half  *alloc.Handoff   // what it has claimed and not bound
	run   string
	// knows is the last thing that it did with the sandbox in each epoch, as its agent's disk has it.
	knows map[alloc.Epoch]deed
}

// deed is a dump that was answered 0 and whose tree is dead, as was seen then; or a restore.
type deed struct {
	alloc.Handoff
	seen alloc.Evidence // "" for a restore
}

// item is what the host says of the sandbox: that it lives there, or what it has last done with it.
func (h *truth) item() (it alloc.AgainItem, last deed, ok bool) {
	if h.lives != nil {
		return h.Item(h.lives), last, true
	}
	for epoch, d := range h.knows {
		if epoch > last.Sandbox.Epoch {
			last, ok = d, true
		}
	}
	if !ok {
		return it, last, false
	}
	it = h.Item(&last.Sandbox)
	if last.seen == "" {
		it.Bindings, it.Over = nil, true
	} else {
		it.Dump = &alloc.AgainDump{Checkpoint: last.Checkpoint.Serial, RunID: last.Checkpoint.RunID, Digest: last.Checkpoint.Digest}
	}
	return it, last, true
}

func (f *forgetful) generation() alloc.Generation {
	pool, _, err := f.p.Pool(f.t.Context())
	if err != nil {
		f.rt.Fatal(err)
	}
	return pool.Generation
}

func (f *forgetful) record() *alloc.Sandbox {
	entries, _, err := f.p.Store.Get(f.t.Context(), alloc.SandboxKey(f.sandbox))
	if err != nil {
		f.rt.Fatal(err)
	}
	sb, _ := entries[0].Record.(*alloc.Sandbox)
	return sb
}

// allowed fails the test on an error that no caller can make sense of.
func (f *forgetful) allowed(what string, err error) {
	switch r := alloc.ReasonOf(err); {
	case err == nil:
	case r == alloc.ReasonMalformed, r == alloc.ReasonInvalid, r == "":
		f.rt.Fatalf("%s: %v", what, err)
	}
}

// comeBack is a host in a generation that it has not been in: it says what it has, and lets go of what it claimed.
func (f *forgetful) comeBack(h *truth) {
	h.Rejoin()
	h.in = f.generation()
	if h.half != nil {
		f.bind(h) // its tree stands still in the restore, whose last step is refused
	}
	if h.Record().Settled < h.in {
		cmd := h.Again()
		it, last, some := h.item()
		if some {
			cmd.Items = append(cmd.Items, it)
		}
		answers, err := f.p.RegisterAgain(f.t.Context(), cmd)
		if err != nil {
			f.rt.Fatal(err)
		}
		switch {
		case some && it.Dump != nil && answers[0].Err == nil && answers[0].Sandbox.State == alloc.StateDumped:
			f.reopened++
			_, err := f.p.Confirm(f.t.Context(), h.Confirm(last.Handoff, last.seen))
			if f.allowed("confirm again", err); err != nil {
				f.rt.Fatal(err)
			}
		case h.lives != nil && answers[0].Err != nil:
			f.lost++
			h.lives = nil
			if !f.waived {
				f.rt.Fatalf("what lives on host %s was refused: %v", h.Name, answers[0].Err)
			}
		}
	}
	if _, err := f.p.Grant(f.t.Context(), alloc.GrantCommand{Mutation: h.Mutation(), Count: 100}); err != nil {
		f.rt.Fatal(err)
	}
	f.tidy(h)
}

// tidy says what an agent says of what the pool believes to be on its host and is not.
func (f *forgetful) tidy(h *truth) {
	sb := f.record()
	if sb == nil || sb.Owner != h.Name || h.lives != nil && h.lives.Epoch == sb.Epoch || h.half != nil {
		return
	}
	at := alloc.Handoff{Sandbox: *sb, Checkpoint: &alloc.Checkpoint{Serial: sb.Checkpoint, Digest: alloc.Digest{1}}}
	var err error
	switch sb.State {
	case alloc.StateRunning:
		_, err = f.p.End(f.t.Context(), h.End(sb))
	case alloc.StateDumped:
		seen := alloc.InDoubt
		if d := h.knows[sb.Epoch]; d.seen != "" && d.Checkpoint.Serial == sb.Checkpoint {
			seen = d.seen
		}
		_, err = f.p.Confirm(f.t.Context(), h.Confirm(at, seen))
	case alloc.StateClaimed:
		_, err = f.p.Release(f.t.Context(), alloc.ReleaseCommand{Mutation: h.Mutation(), Sandbox: sb.Serial, Epoch: sb.Epoch, BootID: sb.Claim.BootID, Run: sb.Claim.Run})
	}
	f.allowed("tidy", err)
}

func (f *forgetful) dump(h *truth) {
	o, err := f.p.Open(f.t.Context(), h.Open(h.lives))
	if f.allowed("dump", err); err != nil {
		f.rt.Fatalf("host %s cannot dump what lives on it: %v", h.Name, err)
	}
	f.images = append(f.images, o)
	switch rapid.SampledFrom([]string{"stopped", "stopped", "late", "in doubt", "ran on"}).Draw(f.rt, "end of the dump") {
	case "stopped":
		_, err = f.p.Confirm(f.t.Context(), h.Confirm(o, alloc.SeenStopped))
		h.lives, h.knows[o.Sandbox.Epoch] = nil, deed{o, alloc.SeenStopped}
	case "late": // the tree is dead, and nobody is told yet
		h.lives, h.knows[o.Sandbox.Epoch] = nil, deed{o, alloc.SeenStopped}
	case "in doubt":
		_, err = f.p.Confirm(f.t.Context(), h.Confirm(o, alloc.InDoubt))
		h.lives, h.knows[o.Sandbox.Epoch] = nil, deed{o, alloc.InDoubt}
	case "ran on":
		var back alloc.Handoff
		if back, err = f.p.Abort(f.t.Context(), h.Abort(o, true)); err == nil {
			h.lives = &back.Sandbox
		}
	}
	if err != nil {
		f.rt.Fatalf("the end of a dump: %v", err)
	}
}

func (f *forgetful) claim(h *truth) {
	o := rapid.SampledFrom(f.images).Draw(f.rt, "images")
	f.runs++
	h.run = fmt.Sprint("r", f.runs)
	c, err := f.p.Claim(f.t.Context(), h.Claim(o, h.run))
	f.allowed("claim", err)
	if err == nil && c.Outcome == alloc.MayClaim {
		h.half = &c.Handoff
	}
}

// bind ends a restore: the tree runs, or is killed and what was claimed given back.
func (f *forgetful) bind(h *truth) {
	o, _, err := f.p.Bind(f.t.Context(), h.Bind(*h.half, h.run))
	if f.allowed("bind", err); err == nil {
		if h.half.Sandbox.Epoch.Generation() < f.generation() {
			f.rt.Fatalf("a claim of epoch %s was bound in generation %d", h.half.Sandbox.Epoch, f.generation())
		}
		h.lives, h.knows[o.Sandbox.Epoch] = &o.Sandbox, deed{o, ""}
		if f.bound[o.Checkpoint.Serial]++; f.bound[o.Checkpoint.Serial] > 1 && !f.waived {
			f.rt.Fatalf("images %s were consumed twice", o.Checkpoint.Serial)
		}
	} else {
		_, err = f.p.Release(f.t.Context(), h.Release(*h.half, h.run))
		f.allowed("release", err)
	}
	h.half = nil
}

func (f *forgetful) putBack() {
	rapid.SampledFrom(f.then).Draw(f.rt, "snapshot").PutBack(f.t, f.p.Store, f.generation()+1)
	if _, err := f.p.Mend(f.t.Context(), alloc.MendCommand{RequestID: f.p.Request(), Actor: "operator/ann", Kind: alloc.KindCounter, Force: true}); err != nil {
		f.rt.Fatal(err)
	}
	f.putBacks++
}

func (f *forgetful) step() {
	h := rapid.SampledFrom(f.hosts).Draw(f.rt, "host")
	g := f.generation()
	switch what := rapid.IntRange(0, 19).Draw(f.rt, "step"); {
	case what == 0:
		f.then = append(f.then, f.p.Snapshot())
	case what == 1 && f.putBacks < 3 && len(f.then) > 0:
		f.putBack()
	case what == 2 || what == 3:
		h.up = !h.up
	case what == 4 && !h.up && h.in < g && f.putBacks > 0:
		if _, _, err := f.p.Waive(f.t.Context(), alloc.WaiveCommand{RequestID: f.p.Request(), Actor: "operator/ann", Host: h.Name}); err == nil {
			f.waived = true
		}
	case !h.up:
	case h.in < g:
		f.comeBack(h)
	case h.half != nil:
		f.bind(h)
	case h.lives != nil && what == 5:
		h.lives = nil
		f.tidy(h)
	case h.lives != nil && what < 18:
		f.dump(h)
	case len(f.images) > 0 && what < 18:
		f.claim(h)
	default:
		f.tidy(h)
	}
	f.check()
}

// check proves that the records contradict neither each other nor what lives.
func (f *forgetful) check() {
	f.oneLives()
	r, err := alloctest.Everything(f.t.Context(), f.p.Store)
	if err != nil {
		f.rt.Fatal(err)
	}
	if found := alloc.Check(r); len(found) > 0 {
		f.rt.Fatalf("%+v", found)
	}
}

// oneLives: of all that was acknowledged one lives, unless a host was given up that has it still.
func (f *forgetful) oneLives() {
	var at []string
	for _, h := range f.hosts {
		if h.lives != nil {
			at = append(at, h.Name)
		}
	}
	if len(at) > 1 && !f.waived {
		f.rt.Fatalf("it lives on hosts %v", at)
	}
}

// heal has everybody come back, and finish what was begun.
func (f *forgetful) heal() {
	for range 4 {
		for _, h := range f.hosts {
			h.up = true
			if h.in < f.generation() {
				f.comeBack(h)
			}
			if h.half != nil {
				f.bind(h)
			}
			f.tidy(h)
			f.check()
		}
	}
	pool, _, err := f.p.Pool(f.t.Context())
	if err != nil || !pool.IsSettled() {
		f.rt.Fatalf("every host has come, and the pool is %+v, %v", pool, err)
	}
	var lives *truth
	for _, h := range f.hosts {
		switch {
		case h.lives == nil:
		case lives != nil:
			f.rt.Fatalf("it lives on hosts %s and %s", lives.Name, h.Name)
		default:
			lives = h
		}
	}
	sb := f.record()
	switch {
	case lives == nil && sb != nil && (sb.State == alloc.StateRunning || sb.State == alloc.StateClaimed || sb.State == alloc.StateDumped):
		f.rt.Fatalf("it lives nowhere, and is %s on host %s", sb.State, sb.Owner)
	case lives != nil && (sb == nil || sb.State != alloc.StateRunning || sb.Owner != lives.Name || sb.Epoch != lives.lives.Epoch):
		f.rt.Fatalf("it lives on host %s, and is %+v", lives.Name, sb)
	}
	if lives != nil {
		for _, b := range lives.lives.Bindings {
			if now, ok := sb.Binding(b.Serial); b.Live() && (!ok || now.Kernel != b.Kernel || !now.Live()) {
				f.rt.Fatalf("a namespace of host %s was %+v and is %+v", lives.Name, b, now)
			}
		}
	}
}

// TestForgetfulStore: what recov.pml of the design models, of the code: whatever is put back, and in whatever order hosts
// come, what lives keeps its serials and lives once, and nothing is stuck.
func TestForgetfulStore(t *testing.T) {
	seen := map[string]int{}
	synctest.Test(t, func(t *testing.T) {
		rapid.Check(tb{t}, func(rt *rapid.T) {
			f := &forgetful{t: t, rt: rt, p: alloctest.NewPool(t, memstore.New(), alloc.DefaultPolicy()), bound: map[alloc.Serial]int{}}
			for _, name := range hostNames {
				f.hosts = append(f.hosts, &truth{Agent: f.p.Agent(name), up: true, in: 1, knows: map[alloc.Epoch]deed{}})
			}
			f.then = []alloctest.Snapshot{f.p.Snapshot()}
			f.hosts[0].lives = f.hosts[0].Sandbox()
			f.sandbox = f.hosts[0].lives.Serial
			for range rapid.IntRange(1, 100).Draw(rt, "steps") {
				f.step()
			}
			f.heal()
			seen["put back"] += f.putBacks
			seen["lost"] += f.lost
			seen["recorded again"] += f.reopened
			if f.waived {
				seen["waived"]++
			}
			if i := slices.IndexFunc(f.hosts, func(h *truth) bool { return h.lives != nil }); i >= 0 {
				seen["lives"]++
			}
			if len(f.images) > 2 {
				seen["dumped often"]++
			}
		})
	})
	t.Logf("seen %v", seen)
}
