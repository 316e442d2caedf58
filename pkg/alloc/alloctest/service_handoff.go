package alloctest

import (
	"fmt"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// transit dumps sb on a and hands it off.
func transit(t testing.TB, a *Agent, sb *alloc.Sandbox) alloc.Handoff {
	t.Helper()
	h := must[alloc.Handoff](t)(a.Pool.Open(t.Context(), a.Open(sb)))
	return must[alloc.Handoff](t)(a.Pool.Confirm(t.Context(), a.Confirm(h, alloc.SeenStopped)))
}

// claim takes h over on b.
func claim(t testing.TB, b *Agent, h alloc.Handoff, run string) alloc.Handoff {
	t.Helper()
	c := must[alloc.ClaimAnswer](t)(b.Pool.Claim(t.Context(), b.Claim(h, run)))
	if c.Outcome != alloc.MayClaim || c.Images == nil || c.Images.Serial != h.Checkpoint.Serial {
		t.Fatalf("claimed with %+v", c)
	}
	return c.Handoff
}

func bind(t testing.TB, b *Agent, h alloc.Handoff, run string) alloc.Handoff {
	t.Helper()
	n, _, err := b.Pool.Bind(t.Context(), b.Bind(h, run))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func is(t testing.TB, h alloc.Handoff, state alloc.SandboxState, owner string, images alloc.CheckpointState) {
	t.Helper()
	if h.Sandbox.State != state || h.Sandbox.Owner != owner || h.Checkpoint == nil || h.Checkpoint.State != images {
		t.Fatalf("%s on %s, %+v; want %s on %s, %s", h.Sandbox.State, h.Sandbox.Owner, h.Checkpoint, state, owner, images)
	}
}

func testStraightPath(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	sb := a.Sandbox()
	h := must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(sb)))
	is(t, h, alloc.StateDumped, "a", alloc.CheckpointOpen)
	p.Clock.Move(time.Second)
	h = must[alloc.Handoff](t)(p.Confirm(t.Context(), a.Confirm(h, alloc.SeenStopped)))
	is(t, h, alloc.StateInTransit, "a", alloc.CheckpointOpen)
	h = claim(t, b, h, "r1")
	is(t, h, alloc.StateClaimed, "b", alloc.CheckpointOpen)
	if h.Sandbox.Epoch != sb.Epoch+1 {
		t.Errorf("epoch %s after %s", h.Sandbox.Epoch, sb.Epoch)
	}
	// One namespace did not come along, one is new.
	cmd := b.Bind(h, "r1")
	spend, s := b.Next(1)
	lost := cmd.Bindings[1].Serial
	cmd.Spend, cmd.Bindings, cmd.Fresh, cmd.Labels = spend, cmd.Bindings[:1], []alloc.Binding{b.Namespace(s[0], alloc.Time)}, map[string]string{"at": "b"}
	p.Clock.Move(time.Second)
	n, left, err := p.Bind(t.Context(), cmd)
	if err != nil {
		t.Fatal(err)
	}
	is(t, n, alloc.StateRunning, "b", alloc.CheckpointConsumed)
	if left.Count() != 999 || n.Sandbox.Labels["at"] != "b" || n.Checkpoint.Claimant == nil || !n.Checkpoint.Consumed.Equal(p.Clock.Now()) {
		t.Errorf("%d left, %+v, %+v", left.Count(), n.Sandbox.Labels, n.Checkpoint)
	}
	first, _ := n.Sandbox.Binding(cmd.Bindings[0].Serial)
	second, _ := n.Sandbox.Binding(lost)
	third, ok := n.Sandbox.Binding(s[0])
	if first.Kernel != cmd.Bindings[0].Kernel || !first.Live() || second.Live() || !ok || third.Type != alloc.Time {
		t.Errorf("bound %+v", n.Sandbox.Bindings)
	}
	st := n.Sandbox.Stints
	if len(st) != 2 || st[0].Host != "a" || st[0].Over != "handed off" || st[1].Host != "b" || st[1].Began != "claimed" || st[1].Checkpoint != h.Checkpoint.Serial || !st[1].To.IsZero() {
		t.Errorf("its history is %+v", st)
	}
	// And back again.
	h = transit(t, b, &n.Sandbox)
	h = bind(t, a, claim(t, a, h, "r2"), "r2")
	is(t, h, alloc.StateRunning, "a", alloc.CheckpointConsumed)
}

// testTwice: every hook may come twice, under its request or under a new one, and late.
func testTwice(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	sb := a.Sandbox()
	open := a.Open(sb)
	spent := open.Spend
	twice := func(name string, again func(m alloc.Mutation) (alloc.Handoff, error), m alloc.Mutation, state alloc.SandboxState) {
		t.Helper()
		other := alloc.Mutation{RequestID: p.Request(), Host: m.Host, Incarnation: m.Incarnation}
		for _, m := range []alloc.Mutation{m, other} {
			h, err := again(m)
			if err != nil || h.Sandbox.State != state {
				t.Errorf("%s again: %s, %v", name, h.Sandbox.State, err)
			}
		}
	}
	h := must[alloc.Handoff](t)(p.Open(t.Context(), open))
	twice("open", func(m alloc.Mutation) (alloc.Handoff, error) { open.Mutation = m; return p.Open(t.Context(), open) }, open.Mutation, alloc.StateDumped)
	if a.left() != 1000-3-spent.Count() {
		t.Errorf("%d are left: the second Open spent again", a.left())
	}
	confirm := a.Confirm(h, alloc.SeenStopped)
	h = must[alloc.Handoff](t)(p.Confirm(t.Context(), confirm))
	twice("confirm", func(m alloc.Mutation) (alloc.Handoff, error) {
		confirm.Mutation = m
		return p.Confirm(t.Context(), confirm)
	}, confirm.Mutation, alloc.StateInTransit)
	cl := b.Claim(h, "r")
	cl.Exe = "2049:131"
	h = must[alloc.ClaimAnswer](t)(p.Claim(t.Context(), cl)).Handoff
	cl.Exe = "" // as a server hears it that does not know the field, and a claimant that forgot
	twice("claim", func(m alloc.Mutation) (alloc.Handoff, error) {
		cl.Mutation = m
		c, err := p.Claim(t.Context(), cl)
		if c.Outcome != alloc.MayClaim || c.Images == nil {
			t.Errorf("claim again: %+v", c)
		}
		return c.Handoff, err
	}, cl.Mutation, alloc.StateClaimed)
	if s := p.sandbox(t, sb.Serial); s.Epoch != h.Sandbox.Epoch || len(s.Stints) != 2 || s.Claim.Exe != "2049:131" {
		t.Errorf("claimed twice: %+v", s)
	}
	bd := b.Bind(h, "r")
	spend, s := b.Next(1)
	bd.Spend, bd.Fresh = spend, []alloc.Binding{b.Namespace(s[0], alloc.Time)}
	h, left, err := p.Bind(t.Context(), bd)
	if err != nil {
		t.Fatal(err)
	}
	twice("bind", func(m alloc.Mutation) (alloc.Handoff, error) {
		bd.Mutation = m
		h, l, err := p.Bind(t.Context(), bd)
		if l.Count() != left.Count() {
			t.Errorf("bind again: %d left, %d before", l.Count(), left.Count())
		}
		return h, err
	}, bd.Mutation, alloc.StateRunning)
	twice("claim after bind", func(m alloc.Mutation) (alloc.Handoff, error) {
		cl.Mutation = m
		c, err := p.Claim(t.Context(), cl)
		return c.Handoff, err
	}, cl.Mutation, alloc.StateRunning)
	// A second Bind that says something else would be acknowledged and not recorded.
	bd.Mutation, bd.Bindings[0].Kernel.ID = b.Mutation(), 12345
	_, _, err = p.Bind(t.Context(), bd)
	refused(t, err, alloc.ErrBound)
	// The source's hooks of before are of an older epoch by now.
	for _, err := range []error{
		func() error { open.Mutation = a.Mutation(); _, err := p.Open(t.Context(), open); return err }(),
		func() error { confirm.Mutation = a.Mutation(); _, err := p.Confirm(t.Context(), confirm); return err }(),
		func() error { _, err := p.End(t.Context(), a.End(sb)); return err }(),
	} {
		refused(t, err, alloc.ErrStaleEpoch)
	}
}

func testDumpVetoed(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	sb := a.Sandbox()
	open := a.Open(sb)
	h := must[alloc.Handoff](t)(p.Open(t.Context(), open))
	_, err := p.Claim(t.Context(), b.Claim(h, "r"))
	refused(t, err, alloc.ErrNotConfirmed)
	abort := a.Abort(h, false)
	h = must[alloc.Handoff](t)(p.Abort(t.Context(), abort))
	is(t, h, alloc.StateRunning, "a", alloc.CheckpointVoid)
	if h.Sandbox.Epoch != sb.Epoch {
		t.Errorf("a veto raised the epoch to %s", h.Sandbox.Epoch)
	}
	abort.Mutation = a.Mutation()
	is(t, must[alloc.Handoff](t)(p.Abort(t.Context(), abort)), alloc.StateRunning, "a", alloc.CheckpointVoid)
	_, err = p.Claim(t.Context(), b.Claim(h, "r"))
	refused(t, err, alloc.ErrVoid)
	// The dump's own hook comes late: it begins nothing anew.
	open.Mutation = a.Mutation()
	_, err = p.Open(t.Context(), open)
	refused(t, err, alloc.ErrWrongState)
	_, err = p.Confirm(t.Context(), a.Confirm(h, alloc.SeenStopped))
	refused(t, err, alloc.ErrWrongState)
	// The next dump is another one.
	is(t, transit(t, a, sb), alloc.StateInTransit, "a", alloc.CheckpointOpen)
	// The tree died before 0 was given.
	sb = a.Sandbox()
	h = must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(sb)))
	is(t, must[alloc.Handoff](t)(p.Confirm(t.Context(), a.Confirm(h, alloc.NotGiven))), alloc.StateEnded, "a", alloc.CheckpointVoid)
	_, err = p.Claim(t.Context(), b.Claim(h, "r"))
	refused(t, err, alloc.ErrVoid)
}

func testLeaveRunning(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	sb := a.Sandbox()
	h := must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(sb)))
	h = must[alloc.Handoff](t)(p.Abort(t.Context(), a.Abort(h, true)))
	is(t, h, alloc.StateRunning, "a", alloc.CheckpointCopy)
	wantClone := func(h alloc.Handoff) {
		t.Helper()
		c := must[alloc.ClaimAnswer](t)(p.Claim(t.Context(), b.Claim(h, "r")))
		if c.Outcome != alloc.MayClone || c.Images.Serial != h.Checkpoint.Serial || c.Why == "" {
			t.Errorf("it may %s from %v because %q", c.Outcome, c.Images, c.Why)
		}
	}
	wantClone(h)
	// A newer dump makes the older copy a clone's for good, also when all is over.
	newer := transit(t, a, sb)
	wantClone(h)
	newer = bind(t, b, claim(t, b, newer, "r1"), "r1")
	wantClone(h)
	must[*alloc.Sandbox](t)(p.End(t.Context(), b.End(&newer.Sandbox)))
	wantClone(h)
	wantClone(newer) // consumed is consumed
	pool, _, err := p.Pool(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	strict := *pool
	strict.Policy.Live = alloc.PolicyRefuse
	p.put(t, &strict)
	_, err = p.Claim(t.Context(), b.Claim(h, "r"))
	refused(t, err, alloc.ErrRefused)
	_, err = p.Claim(t.Context(), b.Claim(newer, "r"))
	refused(t, err, alloc.ErrRefused)
}

func testResume(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	sb := a.Sandbox()
	h := must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(sb)))
	h = must[alloc.Handoff](t)(p.Confirm(t.Context(), a.Confirm(h, alloc.InDoubt)))
	is(t, h, alloc.StateEnded, "a", alloc.CheckpointCopy)
	cmd := b.Claim(h, "r")
	cmd.Digest = alloc.Digest{9}
	_, err := p.Claim(t.Context(), cmd)
	refused(t, err, alloc.ErrManifest)
	pool, _, err := p.Pool(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	strict := *pool
	strict.Policy.Over = alloc.PolicyRefuse
	p.put(t, &strict)
	_, err = p.Claim(t.Context(), b.Claim(h, "r"))
	refused(t, err, alloc.ErrRefused)
	strict.Policy.Over = alloc.PolicyClone
	p.put(t, &strict)
	if c := must[alloc.ClaimAnswer](t)(p.Claim(t.Context(), b.Claim(h, "r"))); c.Outcome != alloc.MayClone {
		t.Errorf("it may %s", c.Outcome)
	}
	p.put(t, pool)
	// Given back it is a copy of something that is over again, and can be claimed again.
	c := claim(t, b, h, "r1")
	is(t, c, alloc.StateClaimed, "b", alloc.CheckpointCopy)
	c = must[alloc.Handoff](t)(p.Release(t.Context(), b.Release(c, "r1")))
	is(t, c, alloc.StateEnded, "b", alloc.CheckpointCopy)
	c = bind(t, a, claim(t, a, c, "r2"), "r2")
	is(t, c, alloc.StateRunning, "a", alloc.CheckpointConsumed)
}

// testResumePieces: a container runs on after its dump and ends, and its namespaces are seen to go one after
// the other. The images have them all.
func testResumePieces(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	sb := a.Sandbox()
	h := must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(sb)))
	h = must[alloc.Handoff](t)(p.Abort(t.Context(), a.Abort(h, true)))
	_, _, err := p.Register(t.Context(), alloc.RegisterCommand{Mutation: a.Mutation(), Items: []alloc.RegisterItem{{
		Sandbox: sb.Serial, Epoch: h.Sandbox.Epoch, Gone: []alloc.Serial{sb.Bindings[0].Serial}}}})
	if err != nil {
		t.Fatal(err)
	}
	must[*alloc.Sandbox](t)(p.End(t.Context(), a.End(&h.Sandbox)))
	h = claim(t, b, h, "r")
	cmd := b.Bind(h, "r")
	cmd.Bindings = []alloc.Binding{b.Namespace(sb.Bindings[0].Serial, sb.Bindings[0].Type), b.Namespace(sb.Bindings[1].Serial, sb.Bindings[1].Type)}
	h, _, err = p.Bind(t.Context(), cmd)
	if err != nil {
		t.Fatal(err)
	}
	is(t, h, alloc.StateRunning, "b", alloc.CheckpointConsumed)
	for _, b := range h.Sandbox.Bindings {
		if !b.Live() {
			t.Errorf("the %s namespace is gone since %s", b.Type, b.Gone)
		}
	}
}

func testRelease(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	h := transit(t, a, a.Sandbox())
	c := claim(t, b, h, "r1")
	release := b.Release(c, "r1")
	r := must[alloc.Handoff](t)(p.Release(t.Context(), release))
	is(t, r, alloc.StateInTransit, "b", alloc.CheckpointOpen)
	if r.Sandbox.Epoch != c.Sandbox.Epoch || r.Checkpoint.Claimant != nil || r.Sandbox.Claim != nil {
		t.Errorf("given back: %+v, %+v", r.Sandbox, r.Checkpoint)
	}
	release.Mutation = b.Mutation()
	is(t, must[alloc.Handoff](t)(p.Release(t.Context(), release)), alloc.StateInTransit, "b", alloc.CheckpointOpen)
	// This restore is closed: its late Bind commits nothing.
	_, _, err := p.Bind(t.Context(), b.Bind(c, "r1"))
	refused(t, err, alloc.ErrWrongState)

	// A commit goes back too, when nothing ran; the namespaces that it did not have are not lost.
	c = claim(t, b, r, "r2")
	cmd := b.Bind(c, "r2")
	cmd.Bindings = cmd.Bindings[:1]
	n, _, err := p.Bind(t.Context(), cmd)
	if err != nil {
		t.Fatal(err)
	}
	p.Clock.Move(time.Second)
	r = must[alloc.Handoff](t)(p.Release(t.Context(), b.Release(n, "r2")))
	is(t, r, alloc.StateInTransit, "b", alloc.CheckpointOpen)
	if !r.Checkpoint.Consumed.IsZero() {
		t.Errorf("given back, and consumed %s", r.Checkpoint.Consumed)
	}
	n = bind(t, a, claim(t, a, r, "r3"), "r3")
	is(t, n, alloc.StateRunning, "a", alloc.CheckpointConsumed)
	for _, b := range n.Sandbox.Bindings {
		if !b.Live() {
			t.Errorf("the %s namespace is gone since %s", b.Type, b.Gone)
		}
	}
	if st := n.Sandbox.Stints; len(st) != 4 || st[1].Over != "released" || st[2].Over != "released" {
		t.Errorf("its history is %+v", st)
	}
}

func testSecondClaimant(t *testing.T, p *Pool) {
	a, b, c := p.Agent("a"), p.Agent("b"), p.Agent("c")
	h := transit(t, a, a.Sandbox())
	held := claim(t, b, h, "r1")
	for _, who := range []*Agent{b, c} { // another run on the same host is another claimant
		_, err := p.Claim(t.Context(), who.Claim(h, "r2"))
		refused(t, err, alloc.ErrClaimed)
		_, _, err = p.Bind(t.Context(), who.Bind(held, "r2"))
		if r := alloc.ReasonOf(err); r != alloc.ReasonWrongState && r != alloc.ReasonNotOwner {
			t.Errorf("bound by another: %v", err)
		}
		_, err = p.Release(t.Context(), who.Release(held, "r2"))
		if r := alloc.ReasonOf(err); r != alloc.ReasonWrongState && r != alloc.ReasonNotOwner {
			t.Errorf("released by another: %v", err)
		}
	}
	must[alloc.Handoff](t)(p.Release(t.Context(), b.Release(held, "r1")))
	bind(t, c, claim(t, c, h, "r2"), "r2")
}

// testClaimRepeated: what a request got once is not what it has now.
func testClaimRepeated(t *testing.T, p *Pool) {
	a, b, c := p.Agent("a"), p.Agent("b"), p.Agent("c")
	h := transit(t, a, a.Sandbox())
	cmd := b.Claim(h, "r1")
	got := must[alloc.ClaimAnswer](t)(p.Claim(t.Context(), cmd))
	must[alloc.Handoff](t)(p.Release(t.Context(), b.Release(got.Handoff, "r1")))
	_, err := p.Claim(t.Context(), cmd)
	refused(t, err, alloc.ErrWrongState)
	bind(t, c, claim(t, c, h, "r1"), "r1")
	_, err = p.Claim(t.Context(), cmd)
	refused(t, err, alloc.ErrWrongState)
}

// testLongHistory: a sandbox that moves for ever keeps a bounded record and loses no stint.
func testLongHistory(t *testing.T, p *Pool) {
	const moves = 120
	hosts := []*Agent{p.Agent("a"), p.Agent("b")}
	sb := hosts[0].Sandbox()
	for i := range moves {
		from, to := hosts[i%2], hosts[(i+1)%2]
		run := fmt.Sprint("r", i)
		h := bind(t, to, claim(t, to, transit(t, from, sb), run), run)
		sb = &h.Sandbox
	}
	wholeHistory(t, p, sb, moves+1)
	r, err := Everything(t.Context(), p.Store)
	if err != nil {
		t.Fatal(err)
	}
	if len(sb.Stints) != 32 || len(r.OldStints) != moves+1-32 || len(sb.Requests.Marks) != alloc.KeptRequests {
		t.Errorf("%d stints and %d older ones, %d requests", len(sb.Stints), len(r.OldStints), len(sb.Requests.Marks))
	}
	for i, o := range r.OldStints {
		if want := alloc.Epoch(1<<48 + uint64(i) + 1); o.Stint.Epoch != want || o.Sandbox != sb.Serial || o.Stint.To.IsZero() {
			t.Errorf("older stint %d is %+v", i, o)
		}
	}
}
