package server

import (
	"context"
	"errors"
	"reflect"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// twoServers are replicas over one pool, each with a connection to etcd of its own.
func twoServers(t *testing.T) (one, two *running) {
	name := newPool()
	st := openPool(t, shared.Endpoint(), name)
	initPool(t, st)
	checked(t, st)
	one = start(t, Config{Store: st})
	two = start(t, Config{Store: openPool(t, shared.Endpoint(), name)})
	one.waitLoaded()
	two.waitLoaded()
	return one, two
}

// TestReplay sends every mutation to one server and again, as after a lost answer, to the other: the
// answer is the same and nothing happens twice.
func TestReplay(t *testing.T) {
	one, two := twoServers(t)
	ctx := t.Context()
	a, b := join(t, one.dial("a"), "a"), join(t, one.dial("b"), "b")
	a2, b2 := two.dial("a"), two.dial("b")
	same := func(what string, call func(c *client.Client) (any, error), first, second *client.Client) any {
		t.Helper()
		got, err := call(first)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		again, err := call(second)
		if err != nil || !reflect.DeepEqual(got, again) {
			t.Fatalf("%s: the other server answers\n%+v, %v; the first\n%+v", what, again, err, got)
		}
		return got
	}
	hello := alloc.HelloCommand{RequestID: client.NewRequestID(), BootID: uuid.NewString(), Nonce: uuid.NewString(), Labels: map[string]string{"k": "v"}}
	same("Hello", func(c *client.Client) (any, error) { h, _, err := c.Hello(ctx, hello); return h, err }, one.dial("c"), two.dial("c"))

	allocate := alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 10}
	same("Allocate", func(c *client.Client) (any, error) { return c.Allocate(ctx, allocate) }, a.Client, a2)
	grant := alloc.GrantCommand{Mutation: a.mutation(), Count: 10}
	a.granted = same("Grant", func(c *client.Client) (any, error) { return c.Grant(ctx, grant) }, a.Client, a2).(alloc.Ranges)

	register := a.newSandbox(map[string]string{"n": "1"})
	sb := same("Register", func(c *client.Client) (any, error) { s, _, err := c.Register(ctx, register); return s, err }, a.Client, a2).([]*alloc.Sandbox)[0]
	open := a.openCommand(sb)
	h := same("Open", func(c *client.Client) (any, error) { return c.Open(ctx, open) }, a.Client, a2).(alloc.Handoff)
	abort := alloc.AbortCommand{Mutation: a.mutation(), Sandbox: sb.Serial, Epoch: sb.Epoch, Checkpoint: h.Checkpoint.Serial, ZeroGiven: true}
	same("Abort", func(c *client.Client) (any, error) { return c.Abort(ctx, abort) }, a.Client, a2)
	h = a.dump(sb)
	confirm := alloc.ConfirmCommand{Mutation: a.mutation(), Sandbox: sb.Serial, Epoch: sb.Epoch, Checkpoint: h.Checkpoint.Serial, Evidence: alloc.SeenStopped}
	h = same("Confirm", func(c *client.Client) (any, error) { return c.Confirm(ctx, confirm) }, a.Client, a2).(alloc.Handoff)
	claim := b.claimCommand(h.Checkpoint, "run")
	claimed := same("Claim", func(c *client.Client) (any, error) { return c.Claim(ctx, claim) }, b.Client, b2).(alloc.ClaimAnswer)
	release := alloc.ReleaseCommand{Mutation: b.mutation(), Sandbox: sb.Serial, Epoch: claimed.Sandbox.Epoch, BootID: b.boot, Run: "run"}
	same("Release", func(c *client.Client) (any, error) { return c.Release(ctx, release) }, b.Client, b2)
	claimed = b.claim(h.Checkpoint, "run")
	bind := b.bindCommand(claimed.Sandbox, "run")
	bound := same("Bind", func(c *client.Client) (any, error) { h, _, err := c.Bind(ctx, bind); return h, err }, b.Client, b2).(alloc.Handoff)
	end := alloc.EndCommand{Mutation: b.mutation(), Sandbox: sb.Serial, Epoch: bound.Sandbox.Epoch}
	same("End", func(c *client.Client) (any, error) { return c.End(ctx, end) }, b.Client, b2)

	// The same id with another body, at the other server.
	allocate.Count++
	if _, err := a2.Allocate(ctx, allocate); !errors.Is(err, alloc.ErrRequestReused) {
		t.Errorf("Allocate under a used id: %v", err)
	}
	register.Items[0].Labels = map[string]string{"n": "2"}
	if _, _, err := a2.Register(ctx, register); !errors.Is(err, alloc.ErrRequestReused) {
		t.Errorf("Register under a used id: %v", err)
	}
}

// TestLinearizable: what one server has acknowledged, the other one's linearizable read shows, always.
func TestLinearizable(t *testing.T) {
	one, two := twoServers(t)
	a := join(t, one.dial("a"), "a")
	reader := two.dial("")
	for range 50 {
		sb := a.register()
		got, err := reader.Sandbox(t.Context(), sb.Serial, true)
		if err != nil || got.Sandbox.State != alloc.StateRunning {
			t.Fatalf("registered and not found: %v", err)
		}
		if _, err := a.End(t.Context(), alloc.EndCommand{Mutation: a.mutation(), Sandbox: sb.Serial, Epoch: sb.Epoch}); err != nil {
			t.Fatal(err)
		}
		if got, err = reader.Sandbox(t.Context(), sb.Serial, true); err != nil || got.Sandbox.State != alloc.StateEnded {
			t.Fatalf("ended and %v: %v", got.Sandbox.State, err)
		}
	}
	// Reads that are not linearizable get there too, and never go back.
	var last alloc.Revision
	for range 100 {
		_, rev, err := reader.Pool(t.Context())
		if err != nil || rev < last {
			t.Fatalf("revision %d after %d: %v", rev, last, err)
		}
		last = rev
	}
}

// TestHammer has many callers allocate, and hosts get ranges, through two servers for a while. Every
// acknowledged range is logged; no two may overlap.
func TestHammer(t *testing.T) {
	one, two := twoServers(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	var mu sync.Mutex
	var got []alloc.Range
	note := func(rs alloc.Ranges) {
		mu.Lock()
		defer mu.Unlock()
		got = append(got, rs...)
	}
	var wg sync.WaitGroup
	for i := range 32 {
		server := []*running{one, two}[i%2]
		c := server.dial("")
		wg.Go(func() {
			for n := uint64(1); ctx.Err() == nil; n = n%97 + 1 {
				var rs alloc.Ranges
				err := client.Retry(ctx, func(id string) error {
					var err error
					rs, err = c.Allocate(ctx, alloc.AllocateCommand{RequestID: id, Count: n})
					return err
				})
				switch {
				case err == nil && rs.Count() == n:
					note(rs)
				case err == nil:
					t.Errorf("asked for %d, got %v", n, rs)
					return
				case ctx.Err() == nil:
					t.Errorf("allocate: %v", err)
					return
				}
			}
		})
	}
	for i, server := range []*running{one, two} {
		name := string(rune('a' + i))
		m := join(t, server.dial(name), name)
		note(m.granted)
		wg.Go(func() {
			for ctx.Err() == nil {
				before := slices.Clone(m.granted)
				var after alloc.Ranges
				err := client.Retry(ctx, func(id string) error {
					var err error
					after, err = m.Grant(ctx, alloc.GrantCommand{Mutation: alloc.Mutation{RequestID: id, Incarnation: m.life}, Count: 50})
					return err
				})
				if errors.Is(err, alloc.ErrExhausted) || ctx.Err() != nil {
					return // it holds as many ranges as it may
				}
				if err != nil {
					t.Errorf("grant: %v", err)
					return
				}
				m.granted = after
				note(after[len(before):])
			}
		})
	}
	wg.Wait()
	slices.SortFunc(got, func(a, b alloc.Range) int { return int(int64(a.First) - int64(b.First)) })
	for i, r := range got {
		if !r.Valid() || i > 0 && got[i-1].Last() >= r.First {
			t.Fatalf("%v was acknowledged, and so was %v", r, got[max(i-1, 0)])
		}
	}
	if len(got) < 100 {
		t.Errorf("only %d answers in 3 s", len(got))
	}
	t.Logf("%d disjoint answers", len(got))
}
