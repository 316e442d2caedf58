package server

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// TestStory calls every method once where it succeeds: a sandbox is registered on a, moves to b, is
// dumped there without leaving, moves back after a restore that came to nothing, and ends.
func TestStory(t *testing.T) {
	r, _ := serving(t)
	operator := dialTo(t, r.tcp, "")
	a, b := join(t, r.dial("a"), "a"), join(t, dialTo(t, r.tcp, "b"), "b")
	ctx := t.Context()

	pool, rev, err := operator.Pool(ctx)
	if err != nil || pool.Generation != 1 || pool.State != alloc.PoolOpen || pool.Policy != alloc.DefaultPolicy() || rev == 0 {
		t.Fatalf("pool %+v at %d: %v", pool, rev, err)
	}
	if got, err := operator.Allocate(ctx, alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 7}); err != nil || got.Count() != 7 {
		t.Fatalf("allocated %v: %v", got, err)
	}

	cmd := a.newSandbox(map[string]string{"command": "web"})
	registered, granted, err := a.Register(ctx, cmd)
	if err != nil || !slices.Equal(granted, a.granted) {
		t.Fatalf("granted %v, want %v: %v", granted, a.granted, err)
	}
	sb := registered[0]
	if sb.State != alloc.StateRunning || sb.Owner != "a" || sb.Labels["command"] != "web" || len(sb.Bindings) != 2 || sb.Stint().Actor != "host/a" {
		t.Fatalf("registered %+v", sb)
	}

	// Every way to find it leads to the same record.
	net := sb.Bindings[0]
	for what, find := range map[string]func() (client.Found, error){
		"its serial":         func() (client.Found, error) { return operator.Sandbox(ctx, sb.Serial, true) },
		"a namespace":        func() (client.Found, error) { return operator.Sandbox(ctx, net.Serial, true) },
		"a kernel namespace": func() (client.Found, error) { return operator.SandboxOf(ctx, "a", net.Type, net.Kernel, true) },
	} {
		got, err := find()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if !reflect.DeepEqual(got.Sandbox, sb) || got.Checkpoint != nil || got.Revision == 0 {
			t.Errorf("%s: found\n%+v, want\n%+v", what, got.Sandbox, sb)
		}
	}

	h := a.dump(sb)
	if h.Sandbox.State != alloc.StateDumped || h.Checkpoint.State != alloc.CheckpointOpen || h.Checkpoint.Source != "a" {
		t.Fatalf("dumped %+v", h)
	}
	h = a.confirm(h, alloc.SeenStopped)
	if h.Sandbox.State != alloc.StateInTransit {
		t.Fatalf("confirmed %+v", h)
	}
	for what, find := range map[string]func() (*alloc.Checkpoint, error){
		"its serial": func() (*alloc.Checkpoint, error) { return b.Checkpoint(ctx, h.Checkpoint.Serial) },
		"its run":    func() (*alloc.Checkpoint, error) { return b.CheckpointByRun(ctx, h.Checkpoint.RunID) },
	} {
		if c, err := find(); err != nil || !reflect.DeepEqual(c, h.Checkpoint) {
			t.Errorf("by %s: %+v, want %+v: %v", what, c, h.Checkpoint, err)
		}
	}

	// b moves in.
	claimed := b.claim(h.Checkpoint, "run-1")
	if claimed.Outcome != alloc.MayClaim || claimed.Sandbox.Owner != "b" || claimed.Sandbox.Epoch <= sb.Epoch || claimed.Images.Serial != h.Checkpoint.Serial {
		t.Fatalf("claimed %+v", claimed)
	}
	bind := b.bindCommand(claimed.Sandbox, "run-1")
	bind.Spend = b.take(1)
	bind.Fresh = []alloc.Binding{{Serial: bind.Spend[0].First, Type: alloc.Cgroup, Kernel: b.kernel()}}
	bound, granted, err := b.Bind(ctx, bind)
	if err != nil || bound.Sandbox.State != alloc.StateRunning || bound.Checkpoint.State != alloc.CheckpointConsumed || len(bound.Sandbox.Bindings) != 3 || !slices.Equal(granted, b.granted) {
		t.Fatalf("bound %+v, granted %v: %v", bound, granted, err)
	}
	if _, err := operator.SandboxOf(ctx, "a", net.Type, net.Kernel, true); !errors.Is(err, alloc.ErrSerialNotFound) {
		t.Errorf("its old namespace on a: %v", err)
	}
	if got, err := operator.SandboxOf(ctx, "b", alloc.Net, bind.Bindings[0].Kernel, true); err != nil || got.Sandbox.Serial != sb.Serial || got.Checkpoint.State != alloc.CheckpointConsumed {
		t.Errorf("its new namespace on b: %+v, %v", got, err)
	}
	// The same images again are a clone.
	if again := b.claim(h.Checkpoint, "run-2"); again.Outcome != alloc.MayClone || again.Why == "" {
		t.Errorf("a second restore: %+v", again)
	}

	// A dump on b whose container runs on.
	live := bound.Sandbox
	h2 := b.dump(&live)
	aborted, err := b.Abort(ctx, alloc.AbortCommand{Mutation: b.mutation(), Sandbox: live.Serial, Epoch: live.Epoch, Checkpoint: h2.Checkpoint.Serial, ZeroGiven: true})
	if err != nil || aborted.Sandbox.State != alloc.StateRunning || aborted.Checkpoint.State != alloc.CheckpointCopy {
		t.Fatalf("aborted %+v: %v", aborted, err)
	}
	// Back to a, at the second try.
	h3 := b.confirm(b.dump(&live), alloc.SeenStopped)
	first := a.claim(h3.Checkpoint, "run-3")
	released, err := a.Release(ctx, alloc.ReleaseCommand{Mutation: a.mutation(), Sandbox: sb.Serial, Epoch: first.Sandbox.Epoch, BootID: a.boot, Run: "run-3"})
	if err != nil || released.Sandbox.State != alloc.StateInTransit || released.Sandbox.Epoch != first.Sandbox.Epoch {
		t.Fatalf("released %+v: %v", released, err)
	}
	second := a.claim(h3.Checkpoint, "run-4")
	bound, _, err = a.Bind(ctx, a.bindCommand(second.Sandbox, "run-4"))
	if err != nil {
		t.Fatal(err)
	}
	ended, err := a.End(ctx, alloc.EndCommand{Mutation: a.mutation(), Sandbox: sb.Serial, Epoch: bound.Sandbox.Epoch})
	if err != nil || ended.State != alloc.StateEnded {
		t.Fatalf("ended %+v: %v", ended, err)
	}
	got, err := operator.Sandbox(ctx, h.Checkpoint.Serial, true)
	if err != nil || !reflect.DeepEqual(got.Sandbox, ended) || got.Checkpoint.Serial != h3.Checkpoint.Serial {
		t.Errorf("by its first checkpoint: %+v, %v", got, err)
	}

	host, err := operator.Host(ctx, "b")
	if err != nil || host.Incarnation != b.life || !slices.Equal(host.Granted, b.granted) {
		t.Errorf("host b is %+v: %v", host, err)
	}
	if names := collect(t, operator.Hosts(ctx), func(h *alloc.Host) string { return h.Name }); !slices.Equal(names, []string{"a", "b"}) {
		t.Errorf("hosts %v", names)
	}
	cps := collect(t, operator.Checkpoints(ctx, sb.Serial), func(c *alloc.Checkpoint) string { return string(c.State) })
	slices.Sort(cps) // serials of two hosts
	if !slices.Equal(cps, []string{"consumed", "consumed", "copy"}) {
		t.Errorf("checkpoints %v", cps)
	}
}

func collect[T any](t *testing.T, seq func(func(T, error) bool), f func(T) string) (out []string) {
	t.Helper()
	for v, err := range seq {
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, f(v))
	}
	return out
}

func TestListings(t *testing.T) {
	r, _ := serving(t)
	a, b := join(t, r.dial("a"), "a"), join(t, r.dial("b"), "b")
	ctx := t.Context()
	var all, ofA, over []string
	for i := range 25 {
		m := a
		if i%3 == 0 {
			m = b
		}
		sb := m.register()
		all = append(all, sb.Serial.String())
		if m == a {
			ofA = append(ofA, sb.Serial.String())
		}
		if i%5 == 0 {
			if _, err := m.End(ctx, alloc.EndCommand{Mutation: m.mutation(), Sandbox: sb.Serial, Epoch: sb.Epoch}); err != nil {
				t.Fatal(err)
			}
			over = append(over, sb.Serial.String())
		}
	}
	slices.Sort(all)
	slices.Sort(over)
	serial := func(s *alloc.Sandbox) string { return s.Serial.String() }
	for _, c := range []struct {
		f    client.Filter
		want []string
	}{
		{client.Filter{Linearizable: true}, all},
		{client.Filter{Owner: "a", Linearizable: true}, ofA},
		{client.Filter{States: []alloc.SandboxState{alloc.StateEnded}, Linearizable: true}, over},
		{client.Filter{States: []alloc.SandboxState{alloc.StateEnded, alloc.StateRunning}, Linearizable: true}, all},
		{client.Filter{Owner: "nobody", Linearizable: true}, nil},
	} {
		if got := collect(t, a.Sandboxes(ctx, c.f), serial); !slices.Equal(got, c.want) {
			t.Errorf("%+v: %v, want %v", c.f, got, c.want)
		}
	}
	// Pages of every size put the whole together.
	for size := int32(1); size <= 26; size += 5 {
		if got := pagesOf(t, a, size); !slices.Equal(got, all) {
			t.Errorf("pages of %d: %v, want %v", size, got, all)
		}
	}
	for i := range 23 {
		join(t, r.dial(fmt.Sprintf("h%02d", i)), fmt.Sprintf("h%02d", i))
	}
	if _, err := a.Sandbox(ctx, 1<<48+1, true); err != nil { // all of this is in the view
		if !errors.Is(err, alloc.ErrSerialNotFound) {
			t.Fatal(err)
		}
	}
	if n := hostPages(t, a, 4); n != 25 {
		t.Errorf("%d hosts in pages of 4", n)
	}
}
