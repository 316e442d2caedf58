package alloctest

import (
	"fmt"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

func testBindRefuses(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	h := claim(t, b, transit(t, a, a.Sandbox()), "r")
	other := b.Sandbox()
	for _, c := range []struct {
		name   string
		change func(c *alloc.BindCommand)
		want   *alloc.Error
	}{
		{"epoch", func(c *alloc.BindCommand) { c.Epoch-- }, alloc.ErrStaleEpoch},
		{"run", func(c *alloc.BindCommand) { c.Run = "s" }, alloc.ErrWrongState},
		{"boot", func(c *alloc.BindCommand) { c.BootID = BootID(99) }, alloc.ErrInvalid},
		{"twice", func(c *alloc.BindCommand) { c.Bindings[1] = c.Bindings[0] }, alloc.ErrBound},
		{"another's", func(c *alloc.BindCommand) { c.Bindings[0].Serial = other.Bindings[0].Serial }, alloc.ErrBound},
		{"another type", func(c *alloc.BindCommand) { c.Bindings[0].Type = alloc.Mnt }, alloc.ErrBound},
		{"too many", func(c *alloc.BindCommand) { c.Bindings = make([]alloc.Binding, alloc.MaxBindings+1) }, alloc.ErrBound},
		{"fresh and not spent", func(c *alloc.BindCommand) { c.Fresh = []alloc.Binding{b.Namespace(other.Serial, alloc.Time)} }, alloc.ErrInvalid},
		{"fresh and known", func(c *alloc.BindCommand) {
			spend, s := b.Next(1)
			c.Spend, c.Fresh = spend, []alloc.Binding{b.Namespace(s[0], alloc.Time)}
			c.Fresh[0].Type, c.Fresh[0].Kernel = c.Bindings[0].Type, c.Bindings[0].Kernel
		}, alloc.ErrBound},
		{"fresh with a parent", func(c *alloc.BindCommand) {
			spend, s := b.Next(1)
			c.Spend, c.Fresh = spend, []alloc.Binding{b.Namespace(s[0], alloc.Time)}
			c.Fresh[0].Parent = other.Serial
		}, alloc.ErrInvalid},
		{"spend", func(c *alloc.BindCommand) { c.Spend = alloc.Ranges{{First: other.Serial, Count: 1}} }, alloc.ErrRange},
		{"labels", func(c *alloc.BindCommand) { c.Labels = map[string]string{"": ""} }, alloc.ErrInvalid},
		{"sandbox", func(c *alloc.BindCommand) { c.Sandbox += 900 }, alloc.ErrSandboxNotFound},
	} {
		cmd := b.Bind(h, "r")
		c.change(&cmd)
		if _, _, err := p.Bind(t.Context(), cmd); alloc.ReasonOf(err) != c.want.Reason {
			t.Errorf("%s: %v, want %s", c.name, err, c.want.Reason)
		}
	}
	// The host booted anew: nothing of that restore lives there, and the claim goes back all the same.
	late, release := b.Bind(h, "r"), b.Release(h, "r")
	b.BootID = BootID(98)
	if _, _, err := p.Hello(t.Context(), b.Hello()); err != nil {
		t.Fatal(err)
	}
	_, _, err := p.Bind(t.Context(), late)
	refused(t, err, alloc.ErrInvalid)
	is(t, must[alloc.Handoff](t)(p.Release(t.Context(), release)), alloc.StateInTransit, "b", alloc.CheckpointOpen)
}

func testOpenRefuses(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	sb, own := a.Sandbox(), a.New()
	own.Items[0].OfHost = true
	ofHost := register(t, p, own)[0]
	dumped := a.Sandbox()
	h := must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(dumped)))
	for _, c := range []struct {
		name   string
		change func(c *alloc.OpenCommand)
		want   *alloc.Error
	}{
		{"not spent", func(c *alloc.OpenCommand) { c.Checkpoint++ }, alloc.ErrInvalid},
		{"nothing spent", func(c *alloc.OpenCommand) { c.Spend = nil }, alloc.ErrInvalid},
		{"not the front", func(c *alloc.OpenCommand) { c.Spend[0].First++; c.Checkpoint++ }, alloc.ErrRange},
		{"run id", func(c *alloc.OpenCommand) { c.RunID = fmt.Sprintf("%065d", 0) }, alloc.ErrInvalid},
		{"digest", func(c *alloc.OpenCommand) { c.Digest = alloc.Digest{} }, alloc.ErrInvalid},
		{"epoch", func(c *alloc.OpenCommand) { c.Epoch++ }, alloc.ErrStaleEpoch},
		{"sandbox", func(c *alloc.OpenCommand) { c.Sandbox += 900 }, alloc.ErrSandboxNotFound},
		{"dumped", func(c *alloc.OpenCommand) { c.Sandbox = dumped.Serial }, alloc.ErrWrongState},
		{"of the host", func(c *alloc.OpenCommand) { c.Sandbox = ofHost.Serial }, alloc.ErrWrongState},
		{"another's checkpoint", func(c *alloc.OpenCommand) {
			c.Checkpoint, c.Spend = h.Checkpoint.Serial, alloc.Ranges{{First: h.Checkpoint.Serial, Count: 1}}
		}, alloc.ErrBound},
		{"another dump", func(c *alloc.OpenCommand) {
			c.Sandbox, c.Checkpoint, c.Spend, c.RunID = dumped.Serial, h.Checkpoint.Serial, alloc.Ranges{{First: h.Checkpoint.Serial, Count: 1}}, "other"
		}, alloc.ErrBound},
	} {
		cmd := a.Open(sb)
		c.change(&cmd)
		if _, err := p.Open(t.Context(), cmd); alloc.ReasonOf(err) != c.want.Reason {
			t.Errorf("%s: %v, want %s", c.name, err, c.want.Reason)
		}
	}
	_, err := p.Open(t.Context(), b.Open(sb))
	refused(t, err, alloc.ErrNotOwner)
	_, err = p.Claim(t.Context(), alloc.ClaimCommand{Mutation: b.Mutation(), Checkpoint: sb.Serial, BootID: b.BootID, Run: "r"})
	refused(t, err, alloc.ErrCheckpointNotFound)
	for _, cmd := range []alloc.ClaimCommand{
		{Mutation: b.Mutation(), Checkpoint: h.Checkpoint.Serial, BootID: b.BootID},
		{Mutation: b.Mutation(), Checkpoint: h.Checkpoint.Serial, BootID: "x", Run: "r"},
		{Mutation: b.Mutation(), Checkpoint: h.Checkpoint.Serial, BootID: a.BootID, Run: "r"},
		{Mutation: b.Mutation(), Checkpoint: h.Checkpoint.Serial, BootID: b.BootID, Run: fmt.Sprintf("%0129d", 0)},
		{Mutation: b.Mutation(), Checkpoint: h.Checkpoint.Serial, BootID: b.BootID, Run: "r", Exe: fmt.Sprintf("%065d", 0)},
	} {
		cmd.Digest = h.Checkpoint.Digest
		_, err = p.Claim(t.Context(), cmd)
		refused(t, err, alloc.ErrInvalid)
	}
	_, err = p.Confirm(t.Context(), a.Confirm(h, "guessed"))
	refused(t, err, alloc.ErrInvalid)
}
