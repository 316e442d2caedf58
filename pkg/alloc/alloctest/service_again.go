package alloctest

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// testAgainForgotten: what the store knows nothing of comes back as it was, and goes on from there.
func testAgainForgotten(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	then := p.Snapshot()
	before := a.Sandbox()
	clone := *before
	clone.Labels, clone.Parent = map[string]string{"command": "sleep"}, &alloc.Parent{Sandbox: before.Serial, Checkpoint: before.Serial + 1000}
	for range 2 {
		p.PutBack(then)
		sb := done(t, a.Return(&clone))
		if sb.State != alloc.StateRunning || sb.Owner != "a" || sb.Epoch != before.Epoch || !reflect.DeepEqual(sb.Bindings, before.Bindings) ||
			!sb.Created.Equal(before.Created) || sb.Labels["command"] != "sleep" || *sb.Parent != *clone.Parent || sb.Again != p.generation() {
			t.Errorf("it came back as %+v, it was %+v", sb, before)
		}
		if st := sb.Stints; len(st) != 1 || st[0].Began != alloc.BeganAgain || st[0].Epoch != sb.Epoch || st[0].Actor != "host/a" {
			t.Errorf("its history is %+v", st)
		}
		if !reflect.DeepEqual(p.sandbox(t, sb.Serial), sb) {
			t.Errorf("the store has %+v, the answer was %+v", p.sandbox(t, sb.Serial), sb)
		}
	}
	b.Return()
	h := bind(t, b, claim(t, b, transit(t, a, p.sandbox(t, before.Serial)), "r"), "r")
	if h.Sandbox.Epoch.Generation() != p.generation() || h.Sandbox.Serial != before.Serial {
		t.Errorf("it moved on as %+v", h.Sandbox)
	}
}

// testAgainMoved: the store says that a sandbox runs where it was, and it has moved on. The host that it was on ends
// nothing; the one that has it wins, in whatever order they come.
func testAgainMoved(t *testing.T, p *Pool) {
	a, b, c := p.Agent("a"), p.Agent("b"), p.Agent("c")
	sb := a.Sandbox()
	then := p.Snapshot()
	h := bind(t, b, claim(t, b, transit(t, a, sb), "r"), "r")
	for _, first := range []string{"source", "target"} {
		p.PutBack(then)
		if first == "source" {
			a.Return()
			for _, try := range []func() error{
				func() error { _, err := p.End(t.Context(), a.End(sb)); return err },
				func() error { _, err := p.Open(t.Context(), a.Open(sb)); return err },
				func() error {
					_, _, err := p.Register(t.Context(), alloc.RegisterCommand{Mutation: a.Mutation(), Items: []alloc.RegisterItem{{Sandbox: sb.Serial, Epoch: sb.Epoch, Gone: []alloc.Serial{sb.Bindings[0].Serial}}}})
					return err
				},
			} {
				refused(t, try(), alloc.ErrSettling)
			}
		}
		got := done(t, b.Return(&h.Sandbox))
		if got.State != alloc.StateRunning || got.Owner != "b" || got.Epoch != h.Sandbox.Epoch || got.Checkpoint != 0 || got.Claim != nil {
			t.Fatalf("%s first: it is %+v", first, got)
		}
		for i, b := range got.Bindings {
			if want := h.Sandbox.Bindings[i]; b.Serial != want.Serial || b.Kernel != want.Kernel || !b.Live() {
				t.Errorf("%s first: binding %+v, want %+v", first, b, want)
			}
		}
		if st := got.Stints; len(st) != 2 || st[0].Over != alloc.OverLost || st[0].Host != "a" || st[1].Began != alloc.BeganAgain || st[1].Host != "b" {
			t.Errorf("%s first: its history is %+v", first, st)
		}
		if first == "target" {
			a.Return()
		}
		_, err := p.End(t.Context(), a.End(sb))
		refused(t, err, alloc.ErrStaleEpoch)
		c.Return()
		must[*alloc.Sandbox](t)(p.End(t.Context(), b.End(got)))
	}
}

// testAgainEnds: what is nowhere is ended when every host has come, and not before.
func testAgainEnds(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	sb, lives := a.Sandbox(), a.Sandbox()
	then := p.Snapshot()
	p.PutBack(then)
	a.Return(lives)
	_, err := p.End(t.Context(), a.End(sb))
	refused(t, err, alloc.ErrSettling)
	must[*alloc.Sandbox](t)(p.End(t.Context(), a.End(lives))) // it said that it has that one
	if missing := must[[]string](t)(p.Settle(t.Context())); !slices.Equal(missing, []string{"b"}) {
		t.Errorf("the pool waits for %v", missing)
	}
	b.Return()
	if pool, _, err := p.Pool(t.Context()); err != nil || !pool.IsSettled() || pool.Settled != pool.Generation {
		t.Errorf("the pool is %+v, %v", pool, err)
	}
	must[*alloc.Sandbox](t)(p.End(t.Context(), a.End(sb)))
}

// testAgainHolds: images of before are claimed by nobody while a host may have restored them; others are.
func testAgainHolds(t *testing.T, p *Pool) {
	a, b, c := p.Agent("a"), p.Agent("b"), p.Agent("c")
	way, stays, runs := transit(t, a, a.Sandbox()), transit(t, a, a.Sandbox()), a.Sandbox()
	then := p.Snapshot()
	h := bind(t, b, claim(t, b, way, "r"), "r")
	later := transit(t, b, b.Sandbox())
	p.PutBack(then)
	a.Return(runs)
	c.Return()
	for _, images := range []alloc.Handoff{way, stays, later} {
		_, err := p.Claim(t.Context(), c.Claim(images, "r"))
		refused(t, err, alloc.ErrSettling)
		if images.Checkpoint.Serial != later.Checkpoint.Serial && (err == nil || !strings.Contains(err.Error(), "nsalloc host waive b")) {
			t.Errorf("it does not say what to do: %v", err)
		}
	}
	// A hand-off that begins in this generation waits for nobody.
	bind(t, c, claim(t, c, transit(t, a, p.sandbox(t, runs.Serial)), "r"), "r")

	got := done(t, b.Return(&h.Sandbox))
	if got.Checkpoint != way.Checkpoint.Serial || got.State != alloc.StateRunning {
		t.Errorf("it came back as %+v", got)
	}
	if a := must[alloc.ClaimAnswer](t)(p.Claim(t.Context(), c.Claim(way, "r"))); a.Outcome != alloc.MayClone || a.Images.State != alloc.CheckpointConsumed {
		t.Errorf("its images are restored as %+v", a)
	}
	bind(t, c, claim(t, c, stays, "r2"), "r2")
	_, err := p.Claim(t.Context(), c.Claim(later, "r3"))
	refused(t, err, alloc.ErrCheckpointNotFound)
}

// testAgainClaimed: a claim does not survive; what was bound does, and its images are consumed.
func testAgainClaimed(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	bound, open := claim(t, b, transit(t, a, a.Sandbox()), "r1"), claim(t, b, transit(t, a, a.Sandbox()), "r2")
	then := p.Snapshot()
	h := bind(t, b, bound, "r1")
	p.PutBack(then)
	b.Rejoin()
	_, _, err := p.Bind(t.Context(), b.Bind(open, "r2"))
	refused(t, err, alloc.ErrStaleEpoch)
	got := done(t, b.Return(&h.Sandbox))
	if got.State != alloc.StateRunning || got.Epoch != h.Sandbox.Epoch || got.Checkpoint != h.Checkpoint.Serial || got.Bindings[0].Kernel != h.Sandbox.Bindings[0].Kernel {
		t.Errorf("it came back as %+v", got)
	}
	if st := got.Stint(); st.Began != alloc.BeganClaimed || !st.To.IsZero() {
		t.Errorf("its stint is %+v", st)
	}
	_, _, err = p.Bind(t.Context(), b.Bind(open, "r2"))
	refused(t, err, alloc.ErrStaleEpoch)
	_, err = p.Claim(t.Context(), b.Claim(open, "r2"))
	refused(t, err, alloc.ErrStaleEpoch)
	back := must[alloc.Handoff](t)(p.Release(t.Context(), b.Release(open, "r2")))
	is(t, back, alloc.StateInTransit, "b", alloc.CheckpointOpen)
	a.Return()
	bind(t, a, claim(t, a, back, "r3"), "r3")
	// The restore that was bound can still be given back, as any other one.
	must[alloc.Handoff](t)(p.Release(t.Context(), b.Release(h, "r1")))
}

// testAgainDumped: what became of a dumped tree is its host's to say, and only after it said that it has the tree.
func testAgainDumped(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	confirms, aborts, moved := a.Sandbox(), a.Sandbox(), a.Sandbox()
	var dumped []alloc.Handoff
	for _, sb := range []*alloc.Sandbox{confirms, aborts, moved} {
		dumped = append(dumped, must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(sb))))
	}
	then := p.Snapshot()
	went := must[alloc.Handoff](t)(p.Confirm(t.Context(), a.Confirm(dumped[2], alloc.SeenStopped)))
	went = bind(t, b, claim(t, b, went, "r"), "r")
	p.PutBack(then)
	a.Return(&dumped[0].Sandbox, &dumped[1].Sandbox)
	is(t, must[alloc.Handoff](t)(p.Confirm(t.Context(), a.Confirm(dumped[0], alloc.SeenStopped))), alloc.StateInTransit, "a", alloc.CheckpointOpen)
	is(t, must[alloc.Handoff](t)(p.Abort(t.Context(), a.Abort(dumped[1], true))), alloc.StateRunning, "a", alloc.CheckpointCopy)
	_, err := p.Confirm(t.Context(), a.Confirm(dumped[2], alloc.InDoubt))
	refused(t, err, alloc.ErrSettling)
	_, err = p.Abort(t.Context(), a.Abort(dumped[2], true))
	refused(t, err, alloc.ErrSettling)
	got := done(t, b.Return(&went.Sandbox))
	if got.Checkpoint != dumped[2].Checkpoint.Serial {
		t.Errorf("it came back as %+v", got)
	}
}

// testAgainLost: a tree that has lost is refused, alone.
func testAgainLost(t *testing.T, p *Pool) {
	a, b, c := p.Agent("a"), p.Agent("b"), p.Agent("c")
	moved, over, gone, lives := a.Sandbox(), a.Sandbox(), a.Sandbox(), a.Sandbox()
	h := transit(t, a, moved)
	was := *p.sandbox(t, moved.Serial)
	away := transit(t, a, gone)
	h = bind(t, b, claim(t, b, h, "r"), "r")
	must[*alloc.Sandbox](t)(p.End(t.Context(), a.End(over)))
	p.PutBack(p.Snapshot())
	b.Return(&h.Sandbox)
	was.Bindings = moved.Bindings
	a.Rejoin()
	cmd := a.Again(moved, over, gone, lives)
	var first []alloc.AgainAnswer
	for range 2 {
		answers := must[[]alloc.AgainAnswer](t)(p.RegisterAgain(t.Context(), cmd))
		for i, want := range []*alloc.Error{alloc.ErrStaleEpoch, alloc.ErrWrongState, alloc.ErrWrongState, nil} {
			switch err := answers[i].Err; {
			case want == nil && err != nil:
				t.Errorf("item %d: %v", i, err)
			case want != nil && (err == nil || err.Reason != want.Reason):
				t.Errorf("item %d: %v, want %s", i, err, want.Reason)
			}
		}
		if answers[0].Sandbox.Owner != "b" || answers[1].Sandbox.State != alloc.StateEnded {
			t.Errorf("what stands there is said to be %+v", answers)
		}
		if first != nil && !reflect.DeepEqual(answers, first) {
			t.Errorf("asked again: %+v, before %+v", answers, first)
		}
		first = answers
	}
	c.Return()
	must[alloc.ClaimAnswer](t)(p.Claim(t.Context(), c.Claim(away, "r")))
	// Everything was said: not again before the next generation.
	_, err := p.RegisterAgain(t.Context(), a.Again(lives))
	refused(t, err, alloc.ErrWrongState)
}

// testAgainBindings: the host has been the owner all the time, so that what it has counts; and a serial is in one
// record.
func testAgainBindings(t *testing.T, p *Pool) {
	a := p.Agent("a")
	sb, dead := a.Sandbox(), a.Sandbox()
	then := p.Snapshot()
	spend, s := a.Next(2)
	goes := sb.Bindings[1]
	goes.Bound = alloc.Binding{}.Bound
	news := register(t, p, alloc.RegisterCommand{Mutation: a.Mutation(), Spend: spend, Items: []alloc.RegisterItem{
		{Sandbox: sb.Serial, Epoch: sb.Epoch, Part: []alloc.Serial{goes.Serial}, Add: []alloc.Binding{a.Namespace(s[1], alloc.UTS)}},
		{Sandbox: s[0], Add: []alloc.Binding{goes}},
	}})
	spend, s = a.Next(1)
	goes = dead.Bindings[1]
	goes.Bound = alloc.Binding{}.Bound
	other := register(t, p, alloc.RegisterCommand{Mutation: a.Mutation(), Spend: spend, Items: []alloc.RegisterItem{
		{Sandbox: dead.Serial, Epoch: dead.Epoch, Part: []alloc.Serial{goes.Serial}},
		{Sandbox: s[0], Add: []alloc.Binding{goes}},
	}})[1]
	p.PutBack(then)
	a.Rejoin()
	cmd := a.Again(news[1], news[0], other)
	cmd.Items[0].From, cmd.Items[2].From = []alloc.Serial{sb.Serial}, []alloc.Serial{dead.Serial, sb.Serial + 4000}
	answers := must[[]alloc.AgainAnswer](t)(p.RegisterAgain(t.Context(), cmd))
	done(t, answers)
	for i, want := range []*alloc.Sandbox{news[1], news[0], other} {
		got := p.sandbox(t, want.Serial)
		if len(got.Bindings) != len(want.Bindings) || !reflect.DeepEqual(answers[i].Sandbox, got) {
			t.Errorf("it came back as %+v, answered as %+v; it was %+v", got, answers[i].Sandbox, want)
			continue
		}
		for j, b := range got.Bindings {
			if w := want.Bindings[j]; b.Serial != w.Serial || b.Kernel != w.Kernel || !b.Live() || !b.Bound.Equal(w.Bound) {
				t.Errorf("binding %+v, it was %+v", b, w)
			}
		}
	}
	if got := p.sandbox(t, dead.Serial); len(got.Bindings) != 1 {
		t.Errorf("what parted from a sandbox that is dead is in it still: %+v", got)
	}
	// Said once, it stays what it is when it is said late.
	if got := p.sandbox(t, sb.Serial); got.Again != p.generation() {
		t.Errorf("it is %+v", got)
	}
}

// testAgainDead: of what the store has in a sandbox and its host has not, the serials stay taken, and nothing lives.
func testAgainDead(t *testing.T, p *Pool) {
	a := p.Agent("a")
	sb := a.Sandbox()
	then := p.Snapshot()
	out := register(t, p, alloc.RegisterCommand{Mutation: a.Mutation(), Items: []alloc.RegisterItem{{Sandbox: sb.Serial, Epoch: sb.Epoch, Gone: []alloc.Serial{sb.Bindings[1].Serial}}}})
	p.PutBack(then)
	got := done(t, a.Return(out[0]))
	if len(got.Bindings) != 2 || !got.Bindings[0].Live() || got.Bindings[1].Live() || got.Bindings[1].Serial != sb.Bindings[1].Serial {
		t.Errorf("it came back as %+v", got.Bindings)
	}
}

// testAgainLate: a host that was waived, and one that the store has forgotten.
func testAgainLate(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	sb, images := a.Sandbox(), transit(t, a, a.Sandbox())
	then := p.Snapshot()
	c := p.Agent("c") // nobody will know it
	mine := c.Sandbox()
	h := bind(t, b, claim(t, b, images, "r"), "r")
	p.PutBack(then)
	a.Return(sb)
	if c.Rejoin(); c.Record().Settled != 0 {
		t.Errorf("a host that has been in the pool before is settled: %+v", c.Record())
	}
	waive := func(host string) ([]string, error) {
		_, waits, err := p.Waive(t.Context(), alloc.WaiveCommand{RequestID: p.Request(), Actor: "operator/ann", Host: host})
		return waits, err
	}
	_, err := waive("nobody")
	refused(t, err, alloc.ErrHostUnknown)
	_, err = waive("a")
	refused(t, err, alloc.ErrWrongState)
	cmd := alloc.WaiveCommand{RequestID: p.Request(), Actor: "operator/ann", Host: "b"}
	for range 2 {
		host, waits, err := p.Waive(t.Context(), cmd)
		if err != nil || host.Waived != p.generation() || !slices.Equal(waits, []string{"c"}) {
			t.Errorf("waived: %+v, it waits for %v, %v", host, waits, err)
		}
	}
	_, err = p.Claim(t.Context(), a.Claim(images, "r"))
	refused(t, err, alloc.ErrSettling)
	done(t, c.Return(mine))
	// b is given up: its images go on elsewhere, and when it comes back after all it has lost.
	again := claim(t, a, images, "r")
	if answers := b.Return(&h.Sandbox); answers[0].Err == nil || answers[0].Err.Reason != alloc.ReasonStaleEpoch {
		t.Errorf("the host that was waived: %+v", answers)
	}
	bind(t, a, again, "r")
	_, err = waive("b")
	refused(t, err, alloc.ErrWrongState)
	if h := p.Agent("new").Record(); h.Settled != p.generation() {
		t.Errorf("a new host is %+v", h)
	}
}

// testAgainRefuses: requests that no agent makes change nothing.
func testAgainRefuses(t *testing.T, p *Pool) {
	a := p.Agent("a")
	sb, other := a.Sandbox(), a.Sandbox()
	_, err := p.RegisterAgain(t.Context(), a.Again(sb))
	refused(t, err, alloc.ErrWrongState) // nothing was forgotten
	p.PutBack(p.Snapshot())
	a.Rejoin()
	now := uint64(p.generation()) << 48
	for name, tc := range map[string]struct {
		change func(*alloc.AgainCommand)
		want   *alloc.Error
	}{
		"nothing":              {func(c *alloc.AgainCommand) { c.Items, c.Last = nil, false }, alloc.ErrInvalid},
		"too many":             {func(c *alloc.AgainCommand) { c.Items = make([]alloc.AgainItem, alloc.MaxRegister+1) }, alloc.ErrInvalid},
		"no serial":            {func(c *alloc.AgainCommand) { c.Items[0].Sandbox = 7 }, alloc.ErrInvalid},
		"of this generation":   {func(c *alloc.AgainCommand) { c.Items[0].Sandbox = alloc.Serial(now | 7) }, alloc.ErrInvalid},
		"binding of it":        {func(c *alloc.AgainCommand) { c.Items[0].Bindings[0].Serial = alloc.Serial(now | 7) }, alloc.ErrInvalid},
		"epoch of it":          {func(c *alloc.AgainCommand) { c.Items[0].Epoch = alloc.Epoch(now | 1) }, alloc.ErrInvalid},
		"no epoch":             {func(c *alloc.AgainCommand) { c.Items[0].Epoch = 0 }, alloc.ErrInvalid},
		"nothing lives":        {func(c *alloc.AgainCommand) { c.Items[0].Bindings = nil }, alloc.ErrInvalid},
		"of another boot":      {func(c *alloc.AgainCommand) { c.Items[0].Bindings[0].Kernel.BootID = BootID(99) }, alloc.ErrInvalid},
		"twice":                {func(c *alloc.AgainCommand) { c.Items[1].Sandbox = c.Items[0].Sandbox }, alloc.ErrBound},
		"a serial twice":       {func(c *alloc.AgainCommand) { c.Items[1].Bindings[0].Serial = c.Items[0].Bindings[0].Serial }, alloc.ErrBound},
		"a namespace twice":    {func(c *alloc.AgainCommand) { c.Items[1].Bindings[0].Kernel = c.Items[0].Bindings[0].Kernel }, alloc.ErrBound},
		"parted from itself":   {func(c *alloc.AgainCommand) { c.Items[0].From = []alloc.Serial{c.Items[0].Sandbox} }, alloc.ErrInvalid},
		"parted from too many": {func(c *alloc.AgainCommand) { c.Items[0].From = make([]alloc.Serial, 17) }, alloc.ErrInvalid},
		"labels":               {func(c *alloc.AgainCommand) { c.Items[0].Labels = map[string]string{"": "x"} }, alloc.ErrInvalid},
		"an older life":        {func(c *alloc.AgainCommand) { c.Incarnation-- }, alloc.ErrStaleIncarnation},
	} {
		cmd := a.Again(sb, other)
		tc.change(&cmd)
		_, err := p.RegisterAgain(t.Context(), cmd)
		if t.Log(name); err == nil {
			t.Errorf("%s: accepted", name)
			continue
		}
		refused(t, err, tc.want)
	}
	if h := a.Record(); h.Settled != 1 || p.sandbox(t, sb.Serial).Again != 0 {
		t.Errorf("refused requests changed something: %+v", h)
	}
	// Alone: a type that is not the serial's, and what lives elsewhere under the serial.
	cmd := a.Again(sb, other)
	cmd.Items[0].Bindings[0].Type = alloc.UTS
	answers := must[[]alloc.AgainAnswer](t)(p.RegisterAgain(t.Context(), cmd))
	if answers[0].Err == nil || answers[0].Err.Reason != alloc.ReasonBound || answers[1].Err != nil {
		t.Errorf("answered %+v", answers)
	}
	reused := cmd
	reused.Last = false
	_, err = p.RegisterAgain(t.Context(), reused)
	refused(t, err, alloc.ErrRequestReused)
}

// testSeen: an agent that has seen more than the store closes the pool, and no agent does more than that.
func testSeen(t *testing.T, p *Pool) {
	a := p.Agent("a")
	sb := a.Sandbox()
	pool, _, err := p.Pool(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var top alloc.Serial
	hello := func(change func(*alloc.HelloCommand)) error {
		cmd := a.Hello()
		cmd.PoolUUID, cmd.Seen = pool.UUID, alloc.Seen{Generation: 1, Highest: top}
		change(&cmd)
		_, _, err := p.Hello(t.Context(), cmd)
		return err
	}
	var closed []string
	p.Behind = func(host, why string) { closed = append(closed, host+": "+why) }
	for name, tc := range map[string]struct {
		change func(*alloc.HelloCommand)
		target alloc.Generation // 0: it goes on
	}{
		"what is there":                     {func(c *alloc.HelloCommand) { c.Seen.Spent = top - 10 }, 0},
		"a later life of nobody's":          {func(c *alloc.HelloCommand) { c.Incarnation, c.Seen = c.Incarnation+1, alloc.Seen{} }, 0},
		"a serial of another generation":    {func(c *alloc.HelloCommand) { c.Seen.Highest = 7<<48 | 1 }, 0},
		"a serial that the counter has not": {func(c *alloc.HelloCommand) { c.Seen.Highest = top + 1 }, 2},
		"what the store knows of a sandbox": {func(c *alloc.HelloCommand) { c.Seen.Sandbox, c.Seen.Epoch = sb.Serial, sb.Epoch }, 0},
		"a sandbox that nobody knows":       {func(c *alloc.HelloCommand) { c.Seen.Sandbox, c.Seen.Epoch = 1<<48|9999, sb.Epoch }, 0},
		"a later epoch of a sandbox":        {func(c *alloc.HelloCommand) { c.Seen.Sandbox, c.Seen.Epoch = sb.Serial, sb.Epoch+1 }, 2},
		"a serial that is spent":            {func(c *alloc.HelloCommand) { c.Seen.Spent = top }, 2},
		"a later life":                      {func(c *alloc.HelloCommand) { c.Incarnation++ }, 2},
		"a later generation":                {func(c *alloc.HelloCommand) { c.Seen.Generation = 17 }, 18},
	} {
		p.put(t, pool)
		closed = nil
		a.Nonce = "of-" + strings.ReplaceAll(name, " ", "-") + "-0123456789"
		a.Rejoin()
		top = must[alloc.Ranges](t)(p.Grant(t.Context(), alloc.GrantCommand{Mutation: a.Mutation(), Count: 10}))[0].Last()
		err := hello(tc.change)
		now := get(t, p.Store, pool.Key())[0].Record.(*alloc.Pool)
		if tc.target == 0 {
			if err != nil || now.State != alloc.PoolOpen || closed != nil {
				t.Errorf("%s: %v, the pool is %+v", name, err, now)
			}
			continue
		}
		refused(t, err, alloc.ErrRecovering)
		if now.State != alloc.PoolRecovering || now.Target != tc.target || len(closed) != 1 || !strings.HasPrefix(closed[0], "a: ") {
			t.Errorf("%s: the pool is %+v, and %q was said", name, now, closed)
		}
		// Who has seen still more raises where it opens, once.
		for range 2 {
			refused(t, hello(func(c *alloc.HelloCommand) { c.Seen.Generation = 17 }), alloc.ErrRecovering)
		}
		if now = get(t, p.Store, pool.Key())[0].Record.(*alloc.Pool); now.Target != 18 || len(closed) > 2 {
			t.Errorf("%s: the pool is %+v, and %q was said", name, now, closed)
		}
	}
	p.put(t, pool)
	refused(t, hello(func(c *alloc.HelloCommand) { c.Seen.Generation = 18 }), alloc.ErrInvalid)
	if now := get(t, p.Store, pool.Key())[0].Record.(*alloc.Pool); now.State != alloc.PoolOpen {
		t.Errorf("an agent that says too much closed the pool: %+v", now)
	}
}
