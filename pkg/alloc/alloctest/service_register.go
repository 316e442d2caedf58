package alloctest

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

func register(t testing.TB, p *Pool, cmd alloc.RegisterCommand) []*alloc.Sandbox {
	t.Helper()
	sbs, _, err := p.Register(t.Context(), cmd)
	if err != nil {
		t.Fatal(err)
	}
	return sbs
}

func testRegister(t *testing.T, p *Pool) {
	a := p.Agent("a")
	cmd := a.New()
	cmd.Items[0].Labels = map[string]string{"name": "web"}
	sbs, left, err := p.Register(t.Context(), cmd)
	if err != nil || len(sbs) != 1 || left.Count() != 997 {
		t.Fatalf("%v, %v left, %v", sbs, left, err)
	}
	sb := sbs[0]
	st := sb.Stint()
	if sb.State != alloc.StateRunning || sb.Owner != "a" || sb.Epoch != 1<<48|1 || len(sb.Bindings) != 2 || sb.Labels["name"] != "web" ||
		!sb.Created.Equal(p.Clock.Now()) || !sb.Bindings[0].Bound.Equal(p.Clock.Now()) || st.Host != "a" || st.Epoch != sb.Epoch || st.Actor != "host/a" {
		t.Errorf("registered %+v", sb)
	}
	again, left2, err := p.Register(t.Context(), cmd)
	if err != nil || again[0].Serial != sb.Serial || !slices.Equal(left2, left) {
		t.Errorf("asked again: %v, %v, %v", again, left2, err)
	}
	reused := a.New()
	reused.RequestID = cmd.RequestID
	_, _, err = p.Register(t.Context(), reused)
	refused(t, err, alloc.ErrRequestReused)
	// The same serials under another request: a clone of the host's state.
	cmd.RequestID = p.Request()
	_, _, err = p.Register(t.Context(), cmd)
	refused(t, err, alloc.ErrRange)
	// What is spent and not used is burned.
	spend, s := a.Next(10)
	register(t, p, alloc.RegisterCommand{Mutation: a.Mutation(), Spend: spend, Items: []alloc.RegisterItem{{
		Sandbox: s[9], OfHost: true, Add: []alloc.Binding{a.Namespace(s[4], alloc.Mnt)}}}})
	if a.left() != 987 {
		t.Errorf("%d are left", a.left())
	}
}

func testRegisterMany(t *testing.T, p *Pool) {
	a := p.Agent("a")
	spend, s := a.Next(2 * (alloc.MaxRegister + 1))
	items := func(n int) (items []alloc.RegisterItem) {
		for i := range n {
			items = append(items, alloc.RegisterItem{Sandbox: s[2*i], Add: []alloc.Binding{a.Namespace(s[2*i+1], alloc.PID)}})
		}
		return items
	}
	_, _, err := p.Register(t.Context(), alloc.RegisterCommand{Mutation: a.Mutation(), Spend: spend, Items: items(alloc.MaxRegister + 1)})
	refused(t, err, alloc.ErrInvalid)
	_, _, err = p.Register(t.Context(), alloc.RegisterCommand{Mutation: a.Mutation(), Spend: spend})
	refused(t, err, alloc.ErrInvalid)
	cmd := alloc.RegisterCommand{Mutation: a.Mutation(), Spend: spend, Items: items(alloc.MaxRegister)}
	if got := register(t, p, cmd); len(got) != alloc.MaxRegister {
		t.Errorf("%d were registered", len(got))
	}
	if got := register(t, p, cmd); len(got) != alloc.MaxRegister || a.left() != 1000-spend.Count() {
		t.Errorf("asked again: %d, %d left", len(got), a.left())
	}
	// As many clones, each of another checkpoint, still fit one transaction.
	var clones []alloc.RegisterItem
	for _, it := range cmd.Items {
		h := must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(p.sandbox(t, it.Sandbox))))
		must[alloc.Handoff](t)(p.Abort(t.Context(), a.Abort(h, true)))
		clones = append(clones, alloc.RegisterItem{ParentCheckpoint: h.Checkpoint.Serial, Add: []alloc.Binding{{Parent: it.Add[0].Serial}}})
	}
	spend, s = a.Next(2 * alloc.MaxRegister)
	for i := range clones {
		b := a.Namespace(s[2*i+1], alloc.PID)
		b.Parent = clones[i].Add[0].Parent
		clones[i].Sandbox, clones[i].Add[0] = s[2*i], b
	}
	register(t, p, alloc.RegisterCommand{Mutation: a.Mutation(), Spend: spend, Items: clones})
}

func testRegisterChanges(t *testing.T, p *Pool) {
	a := p.Agent("a")
	sb := a.Sandbox()
	p.Clock.Move(time.Second)
	spend, s := a.Next(1)
	change := alloc.RegisterCommand{Mutation: a.Mutation(), Spend: spend, Items: []alloc.RegisterItem{{
		Sandbox: sb.Serial, Epoch: sb.Epoch, Add: []alloc.Binding{a.Namespace(s[0], alloc.Mnt)},
		Gone: []alloc.Serial{sb.Bindings[1].Serial, sb.Bindings[1].Serial}, Labels: map[string]string{"k": "1"}}}}
	got := register(t, p, change)[0]
	if len(got.Bindings) != 3 || !got.Bindings[1].Gone.Equal(p.Clock.Now()) || !got.Bindings[0].Live() || got.Labels["k"] != "1" {
		t.Errorf("changed to %+v", got)
	}
	// A namespace that is gone keeps its serial, and when it went.
	gone := got.Bindings[1]
	p.Clock.Move(time.Second)
	got = register(t, p, alloc.RegisterCommand{Mutation: a.Mutation(), Items: []alloc.RegisterItem{{
		Sandbox: sb.Serial, Epoch: sb.Epoch, Gone: []alloc.Serial{gone.Serial}, Labels: map[string]string{"l": "2"}}}})[0]
	if !got.Bindings[1].Gone.Equal(gone.Gone) || len(got.Labels) != 2 {
		t.Errorf("changed to %+v", got)
	}
	// Its kernel identity is free for a new one; that of a live one is not.
	spend, s = a.Next(1)
	b := gone
	b.Serial = s[0]
	register(t, p, alloc.RegisterCommand{Mutation: a.Mutation(), Spend: spend, Items: []alloc.RegisterItem{{Sandbox: sb.Serial, Epoch: sb.Epoch, Add: []alloc.Binding{b}}}})
	spend, s = a.Next(1)
	b.Serial = s[0]
	_, _, err := p.Register(t.Context(), alloc.RegisterCommand{Mutation: a.Mutation(), Spend: spend, Items: []alloc.RegisterItem{{Sandbox: sb.Serial, Epoch: sb.Epoch, Add: []alloc.Binding{b}}}})
	refused(t, err, alloc.ErrBound)
	ended := must[*alloc.Sandbox](t)(p.End(t.Context(), a.End(sb)))
	if ended.State != alloc.StateEnded || ended.Stint().Over != "ended" {
		t.Errorf("ended as %+v", ended)
	}
	if again := must[*alloc.Sandbox](t)(p.End(t.Context(), a.End(sb))); again.State != alloc.StateEnded {
		t.Errorf("ended twice as %+v", again)
	}
	_, _, err = p.Register(t.Context(), alloc.RegisterCommand{Mutation: a.Mutation(), Items: []alloc.RegisterItem{{Sandbox: sb.Serial, Epoch: sb.Epoch, Labels: map[string]string{"x": "y"}}}})
	refused(t, err, alloc.ErrWrongState)
}

func testRegisterRefuses(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	mine, theirs := a.Sandbox(), b.Sandbox()
	huge := make([]alloc.Binding, alloc.MaxBindings+1)
	before := a.Record().Granted
	for _, c := range []struct {
		name   string
		change func(c *alloc.RegisterCommand, it *alloc.RegisterItem)
		want   *alloc.Error
	}{
		{"not the front", func(c *alloc.RegisterCommand, _ *alloc.RegisterItem) { c.Spend[0].Count++; c.Spend[0].First-- }, alloc.ErrRange},
		{"not a range", func(c *alloc.RegisterCommand, _ *alloc.RegisterItem) { c.Spend[0].Count = 1 << 60 }, alloc.ErrInvalid},
		{"many ranges", func(c *alloc.RegisterCommand, _ *alloc.RegisterItem) {
			c.Spend = slices.Repeat(c.Spend, alloc.MaxGrantedRanges+1)
		}, alloc.ErrInvalid},
		{"more than it has", func(c *alloc.RegisterCommand, _ *alloc.RegisterItem) { c.Spend[0].Count = 1001 }, alloc.ErrRange},
		{"another's range", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) {
			spend, s := b.Next(3)
			c.Spend, it.Sandbox, it.Add[0].Serial, it.Add[1].Serial = spend, s[0], s[1], s[2]
		}, alloc.ErrRange},
		{"a serial that is not spent", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) { it.Add[0].Serial += 100 }, alloc.ErrInvalid},
		{"the same serial twice", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) { it.Add[0].Serial = it.Add[1].Serial }, alloc.ErrBound},
		{"the sandbox's serial", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) { it.Add[0].Serial = it.Sandbox }, alloc.ErrBound},
		{"the same sandbox twice", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) { c.Items = append(c.Items, *it) }, alloc.ErrBound},
		{"the same namespace twice", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) {
			it.Add[1].Type, it.Add[1].Kernel = it.Add[0].Type, it.Add[0].Kernel
		}, alloc.ErrBound},
		{"no namespace", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) { it.Add = nil }, alloc.ErrInvalid},
		{"many namespaces", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) { it.Add = huge }, alloc.ErrTooLarge},
		{"an epoch", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) { it.Epoch = 1<<48 | 1 }, alloc.ErrInvalid},
		{"gone", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) { it.Gone = []alloc.Serial{it.Add[0].Serial} }, alloc.ErrInvalid},
		{"a parent and no checkpoint", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) { it.Add[0].Parent = mine.Serial }, alloc.ErrInvalid},
		{"a parent that is no serial", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) {
			it.ParentCheckpoint, it.Add[0].Parent = mine.Serial, 7
		}, alloc.ErrInvalid},
		{"a checkpoint that is none", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) { it.ParentCheckpoint = mine.Serial }, alloc.ErrCheckpointNotFound},
		{"type", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) { it.Add[0].Type = "pids" }, alloc.ErrInvalid},
		{"another boot", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) { it.Add[0].Kernel.BootID = BootID(99) }, alloc.ErrInvalid},
		{"no identity", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) {
			it.Add[0].Kernel = alloc.KernelID{BootID: a.BootID}
		}, alloc.ErrInvalid},
		{"a weak identity that does not say so", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) { it.Add[0].Kernel.ID = 0 }, alloc.ErrInvalid},
		{"label", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) {
			it.Labels = map[string]string{strings.Repeat("k", 257): ""}
		}, alloc.ErrInvalid},
		{"a time that no store keeps", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) {
			it.Add[0].Bound = time.Date(20000, 1, 1, 0, 0, 0, 0, time.UTC)
		}, alloc.ErrInvalid},

		{"another's sandbox", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) {
			it.Sandbox, it.Epoch = theirs.Serial, theirs.Epoch
		}, alloc.ErrNotOwner},
		{"another epoch", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) {
			it.Sandbox, it.Epoch = mine.Serial, mine.Epoch+1
		}, alloc.ErrStaleEpoch},
		{"no sandbox", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) { it.Sandbox += 500 }, alloc.ErrSandboxNotFound},
		{"no serial", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) { it.Sandbox = 0 }, alloc.ErrInvalid},
		{"an old sandbox as the host's", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) {
			it.Sandbox, it.Epoch, it.OfHost = mine.Serial, mine.Epoch, true
		}, alloc.ErrInvalid},
		{"gone, and not of it", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) {
			it.Sandbox, it.Epoch, it.Gone = mine.Serial, mine.Epoch, []alloc.Serial{theirs.Bindings[0].Serial}
		}, alloc.ErrBound},
		{"gone without end", func(c *alloc.RegisterCommand, it *alloc.RegisterItem) {
			it.Sandbox, it.Epoch, it.Gone = mine.Serial, mine.Epoch, make([]alloc.Serial, alloc.MaxBindings+1)
		}, alloc.ErrTooLarge},
	} {
		cmd := a.New()
		c.change(&cmd, &cmd.Items[0])
		if _, _, err := p.Register(t.Context(), cmd); alloc.ReasonOf(err) != c.want.Reason {
			t.Errorf("%s: %v, want %s", c.name, err, c.want.Reason)
		}
	}
	if after := a.Record().Granted; !slices.Equal(after, before) {
		t.Errorf("a refused request spent serials: %v, before %v", after, before)
	}
}

func testRegisterClone(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	sb := a.Sandbox()
	h := must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(sb)))
	h = must[alloc.Handoff](t)(p.Abort(t.Context(), a.Abort(h, true)))
	got := must[alloc.ClaimAnswer](t)(p.Claim(t.Context(), b.Claim(h, "r")))
	if got.Outcome != alloc.MayClone || got.Why == "" || got.Images.Serial != h.Checkpoint.Serial || got.Sandbox.Owner != "a" {
		t.Fatalf("a copy of a live sandbox: %+v", got)
	}
	cmd := b.New()
	cmd.Items[0].ParentCheckpoint = h.Checkpoint.Serial
	for i := range cmd.Items[0].Add {
		cmd.Items[0].Add[i].Parent = sb.Bindings[i].Serial
	}
	// A parent is of the sandbox that was dumped, and not of any other one, however well its clone is known.
	other := a.Sandbox()
	for _, parent := range []alloc.Serial{other.Bindings[0].Serial, sb.Serial, h.Checkpoint.Serial, cmd.Items[0].Add[0].Serial} {
		bad := cmd
		bad.Items = slices.Clone(cmd.Items)
		bad.Items[0].Add = slices.Clone(cmd.Items[0].Add)
		bad.Items[0].Add[1].Parent = parent
		if _, _, err := p.Register(t.Context(), bad); alloc.ReasonOf(err) != alloc.ReasonInvalid {
			t.Errorf("parent %s: %v", parent, err)
		}
	}
	clone := register(t, p, cmd)[0]
	if clone.Parent == nil || clone.Parent.Sandbox != sb.Serial || clone.Parent.Checkpoint != h.Checkpoint.Serial || clone.Owner != "b" ||
		clone.Bindings[0].Parent != sb.Bindings[0].Serial || clone.Stint().Began != "cloned" {
		t.Errorf("the clone is %+v", clone)
	}
	if s := p.sandbox(t, sb.Serial); s.Owner != "a" || s.State != alloc.StateRunning {
		t.Errorf("its parent is %+v", s)
	}
}
