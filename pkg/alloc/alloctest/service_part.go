package alloctest

import (
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// testRegisterParts: a live namespace goes from one sandbox to a new one, under its serial and as old as it
// is; anything else that says so is refused and changes nothing.
func testRegisterParts(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	sb, other, theirs := a.Sandbox(), a.Sandbox(), b.Sandbox()
	stays, goes := sb.Bindings[0], sb.Bindings[1]
	p.Clock.Move(time.Second)
	spend, s := a.Next(3)
	fresh := a.Namespace(s[2], alloc.Mnt)
	cmd := func() alloc.RegisterCommand {
		moved := goes
		moved.Bound = time.Time{}
		return alloc.RegisterCommand{Mutation: a.Mutation(), Spend: slices.Clone(spend), Items: []alloc.RegisterItem{
			{Sandbox: sb.Serial, Epoch: sb.Epoch, Part: []alloc.Serial{goes.Serial}},
			{Sandbox: s[0], Add: []alloc.Binding{moved}, Labels: map[string]string{"of": "net"}},
		}}
	}
	for _, tc := range []struct {
		name   string
		change func(c *alloc.RegisterCommand)
		want   *alloc.Error
	}{
		{"added before it parts", func(c *alloc.RegisterCommand) { slices.Reverse(c.Items) }, alloc.ErrInvalid},
		{"added to none", func(c *alloc.RegisterCommand) { c.Items[1].Add = []alloc.Binding{fresh} }, alloc.ErrInvalid},
		{"parted by none", func(c *alloc.RegisterCommand) { c.Items[0].Part = nil }, alloc.ErrInvalid},
		{"parted twice", func(c *alloc.RegisterCommand) { c.Items[0].Part = []alloc.Serial{goes.Serial, goes.Serial} }, alloc.ErrInvalid},
		{"a spent serial", func(c *alloc.RegisterCommand) {
			c.Items[0].Part = []alloc.Serial{s[2]}
			c.Items[1].Add = []alloc.Binding{fresh}
		}, alloc.ErrInvalid},
		{"added twice", func(c *alloc.RegisterCommand) {
			c.Items = append(c.Items, alloc.RegisterItem{Sandbox: s[1], Add: c.Items[1].Add})
		}, alloc.ErrBound},
		{"to a sandbox that exists", func(c *alloc.RegisterCommand) {
			c.Items[1].Sandbox, c.Items[1].Epoch = other.Serial, other.Epoch
		}, alloc.ErrInvalid},
		{"by a new sandbox", func(c *alloc.RegisterCommand) { c.Items[1].Part = []alloc.Serial{stays.Serial} }, alloc.ErrInvalid},
		{"not of it", func(c *alloc.RegisterCommand) {
			c.Items[0].Sandbox, c.Items[0].Epoch = other.Serial, other.Epoch
		}, alloc.ErrBound},
		{"as another namespace", func(c *alloc.RegisterCommand) { c.Items[1].Add[0].Kernel.ID++ }, alloc.ErrBound},
		{"as another type", func(c *alloc.RegisterCommand) { c.Items[1].Add[0].Type = alloc.User }, alloc.ErrBound},
		{"another host's", func(c *alloc.RegisterCommand) {
			c.Items[0].Sandbox, c.Items[0].Epoch, c.Items[0].Part = theirs.Serial, theirs.Epoch, []alloc.Serial{theirs.Bindings[1].Serial}
			c.Items[1].Add[0].Serial = theirs.Bindings[1].Serial
		}, alloc.ErrNotOwner},
		{"another epoch", func(c *alloc.RegisterCommand) { c.Items[0].Epoch++ }, alloc.ErrStaleEpoch},
	} {
		c := cmd()
		tc.change(&c)
		_, _, err := p.Register(t.Context(), c)
		if t.Log(tc.name); err == nil {
			t.Errorf("%s: accepted", tc.name)
			continue
		}
		refused(t, err, tc.want)
	}
	if got := p.sandbox(t, sb.Serial); len(got.Bindings) != 2 {
		t.Fatalf("refused requests changed it to %+v", got)
	}

	c := cmd()
	for _, what := range []string{"first", "asked again"} {
		got := register(t, p, c)
		if len(got) != 2 || len(got[0].Bindings) != 1 || got[0].Bindings[0].Serial != stays.Serial {
			t.Fatalf("%s: it parted as %+v", what, got)
		}
		if n := got[1]; n.State != alloc.StateRunning || n.Owner != "a" || len(n.Bindings) != 1 || !reflect.DeepEqual(n.Bindings[0], goes) || n.Labels["of"] != "net" {
			t.Errorf("%s: the new one is %+v, the namespace was %+v", what, n, goes)
		}
	}
	// It has left: it is not parted with again, and the sandbox goes its way without it.
	_, _, err := p.Register(t.Context(), alloc.RegisterCommand{Mutation: a.Mutation(), Items: []alloc.RegisterItem{{Sandbox: sb.Serial, Epoch: sb.Epoch, Gone: []alloc.Serial{goes.Serial}}}})
	refused(t, err, alloc.ErrBound)
	must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(p.sandbox(t, sb.Serial))))
	if n := p.sandbox(t, s[0]); n.State != alloc.StateRunning || !n.Bindings[0].Live() {
		t.Errorf("a dump of the other changed it to %+v", n)
	}
}

// testPartsFromCopies: images from before a namespace parted have it, and so they are not the sandbox's any
// more. It does not go on from them, neither when it is over nor when a restore is given back; they
// restore as a clone.
func testPartsFromCopies(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	part := func(of *Agent, sb *alloc.Sandbox) *alloc.Sandbox {
		t.Helper()
		spend, s := of.Next(1)
		goes := sb.Bindings[1]
		goes.Bound = time.Time{}
		return register(t, p, alloc.RegisterCommand{Mutation: of.Mutation(), Spend: spend, Items: []alloc.RegisterItem{
			{Sandbox: sb.Serial, Epoch: sb.Epoch, Part: []alloc.Serial{goes.Serial}},
			{Sandbox: s[0], Add: []alloc.Binding{goes}},
		}})[0]
	}
	clones := func(h alloc.Handoff, run string) {
		t.Helper()
		if c := must[alloc.ClaimAnswer](t)(p.Claim(t.Context(), b.Claim(h, run))); c.Outcome != alloc.MayClone {
			t.Errorf("its copy may be restored as %+v", c)
		}
	}
	h := must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(a.Sandbox())))
	h = must[alloc.Handoff](t)(p.Abort(t.Context(), a.Abort(h, true)))
	is(t, h, alloc.StateRunning, "a", alloc.CheckpointCopy)
	sb := part(a, &h.Sandbox)
	clones(h, "r1")
	must[*alloc.Sandbox](t)(p.End(t.Context(), a.End(sb)))
	clones(h, "r2")

	// A restored one, whose claim could still be given back.
	h = bind(t, b, claim(t, b, transit(t, a, a.Sandbox()), "r3"), "r3")
	sb = part(b, &h.Sandbox)
	_, err := p.Release(t.Context(), b.Release(h, "r3"))
	refused(t, err, alloc.ErrWrongState)
	h = bind(t, a, claim(t, a, transit(t, b, sb), "r4"), "r4")
	is(t, h, alloc.StateRunning, "a", alloc.CheckpointConsumed)
}
