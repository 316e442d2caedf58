package alloctest

import (
	"context"
	"fmt"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// UseCase is one write: Prepare brings a pool to where it can be made, and gives it.
type UseCase struct {
	Name    string
	Prepare func(t *testing.T, p *Pool) func(ctx context.Context) (any, error)
	// Long says that Prepare takes its time, so that the use case meets the shortest list of faults only.
	Long bool
}

// answer makes one value of the several that a use case answers.
func answer(err error, vs ...any) (any, error) { return vs, err }

// UseCases are all writes of a pool that is there, each in every way that writes other records.
func UseCases() []UseCase {
	type call = func(context.Context) (any, error)
	seen := func(t *testing.T, a *Agent, e alloc.Evidence) alloc.Handoff {
		h := must[alloc.Handoff](t)(a.Pool.Open(t.Context(), a.Open(a.Sandbox())))
		return must[alloc.Handoff](t)(a.Pool.Confirm(t.Context(), a.Confirm(h, e)))
	}
	claimed := func(t *testing.T, a, b *Agent) alloc.Handoff {
		return must[alloc.ClaimAnswer](t)(b.Pool.Claim(t.Context(), b.Claim(seen(t, a, alloc.SeenStopped), "r"))).Handoff
	}
	binding := func(b *Agent, h alloc.Handoff) alloc.BindCommand {
		cmd := b.Bind(h, "r")
		spend, s := b.Next(1)
		cmd.Spend, cmd.Fresh = spend, []alloc.Binding{b.Namespace(s[0], alloc.Time)}
		return cmd
	}
	list := []UseCase{
		{Name: "Allocate", Prepare: func(_ *testing.T, p *Pool) call {
			cmd := alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 10}
			return func(ctx context.Context) (any, error) { return p.Allocate(ctx, cmd) }
		}},
		{Name: "RemoveServer", Prepare: func(_ *testing.T, p *Pool) call {
			return func(ctx context.Context) (any, error) { return p.RemoveServer(ctx, "s1", 3) }
		}},
		{Name: "Hello of a new host", Prepare: func(_ *testing.T, p *Pool) call {
			cmd := alloc.HelloCommand{RequestID: p.Request(), Host: "n", BootID: BootID(5), Nonce: "0123456789abcdef"}
			return func(ctx context.Context) (any, error) { h, _, err := p.Hello(ctx, cmd); return answer(err, h) }
		}},
		{Name: "Hello of a new life", Prepare: func(_ *testing.T, p *Pool) call {
			a := p.Agent("a")
			a.Nonce = "another-life-0123456"
			cmd := a.Hello()
			return func(ctx context.Context) (any, error) { h, _, err := p.Hello(ctx, cmd); return answer(err, h) }
		}},
		{Name: "Hello of a new boot", Prepare: func(_ *testing.T, p *Pool) call {
			a := p.Agent("a")
			a.BootID = BootID(5)
			cmd := a.Hello()
			return func(ctx context.Context) (any, error) { h, _, err := p.Hello(ctx, cmd); return answer(err, h) }
		}},
		{Name: "SetPolicy", Prepare: func(_ *testing.T, p *Pool) call {
			cmd := alloc.SetPolicyCommand{RequestID: p.Request(), Fields: map[string]string{"over": "clone"}}
			return func(ctx context.Context) (any, error) {
				pool, _, err := p.SetPolicy(ctx, cmd)
				if err != nil {
					return nil, err
				}
				return answer(nil, pool.Policy)
			}
		}},
		{Name: "Grant", Prepare: func(_ *testing.T, p *Pool) call {
			cmd := alloc.GrantCommand{Mutation: p.Agent("a").Mutation(), Count: 10}
			return func(ctx context.Context) (any, error) { return p.Grant(ctx, cmd) }
		}},
		{Name: "Register a new one", Prepare: func(_ *testing.T, p *Pool) call {
			cmd := p.Agent("a").New()
			return func(ctx context.Context) (any, error) {
				s, left, err := p.Register(ctx, cmd)
				return answer(err, s, left)
			}
		}},
		{Name: "Register a change", Prepare: func(_ *testing.T, p *Pool) call {
			a := p.Agent("a")
			sb := a.Sandbox()
			cmd := alloc.RegisterCommand{Mutation: a.Mutation(), Items: []alloc.RegisterItem{{Sandbox: sb.Serial, Epoch: sb.Epoch, Labels: map[string]string{"k": "v"}}}}
			return func(ctx context.Context) (any, error) {
				s, left, err := p.Register(ctx, cmd)
				return answer(err, s, left)
			}
		}},
		{Name: "End", Prepare: func(_ *testing.T, p *Pool) call {
			a := p.Agent("a")
			cmd := a.End(a.Sandbox())
			return func(ctx context.Context) (any, error) { return p.End(ctx, cmd) }
		}},
		{Name: "Open", Prepare: func(_ *testing.T, p *Pool) call {
			a := p.Agent("a")
			cmd := a.Open(a.Sandbox())
			return func(ctx context.Context) (any, error) { return p.Open(ctx, cmd) }
		}},
		{Name: "Open a second dump", Prepare: func(t *testing.T, p *Pool) call {
			a := p.Agent("a")
			sb := a.Sandbox()
			h := must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(sb)))
			must[alloc.Handoff](t)(p.Abort(t.Context(), a.Abort(h, true)))
			cmd := a.Open(sb)
			return func(ctx context.Context) (any, error) { return p.Open(ctx, cmd) }
		}},
		{Name: "Claim", Prepare: func(t *testing.T, p *Pool) call {
			a, b := p.Agent("a"), p.Agent("b")
			cmd := b.Claim(seen(t, a, alloc.SeenStopped), "r")
			return func(ctx context.Context) (any, error) { return p.Claim(ctx, cmd) }
		}},
		{Name: "Claim after a long history", Long: true, Prepare: func(t *testing.T, p *Pool) call {
			hosts := []*Agent{p.Agent("a"), p.Agent("b")}
			sb := hosts[0].Sandbox()
			const moves = 31 // one more, and a stint becomes a record of its own
			for i := range moves {
				run := fmt.Sprint("r", i)
				h := bind(t, hosts[(i+1)%2], claim(t, hosts[(i+1)%2], transit(t, hosts[i%2], sb), run), run)
				sb = &h.Sandbox
			}
			cmd := hosts[0].Claim(transit(t, hosts[1], sb), "r")
			return func(ctx context.Context) (any, error) { return p.Claim(ctx, cmd) }
		}},
		{Name: "Claim a copy", Prepare: func(t *testing.T, p *Pool) call {
			a, b := p.Agent("a"), p.Agent("b")
			cmd := b.Claim(seen(t, a, alloc.InDoubt), "r")
			return func(ctx context.Context) (any, error) { return p.Claim(ctx, cmd) }
		}},
		{Name: "Bind", Prepare: func(t *testing.T, p *Pool) call {
			a, b := p.Agent("a"), p.Agent("b")
			cmd := binding(b, claimed(t, a, b))
			return func(ctx context.Context) (any, error) { h, left, err := p.Bind(ctx, cmd); return answer(err, h, left) }
		}},
		{Name: "Release a claim", Prepare: func(t *testing.T, p *Pool) call {
			a, b := p.Agent("a"), p.Agent("b")
			cmd := b.Release(claimed(t, a, b), "r")
			return func(ctx context.Context) (any, error) { return p.Release(ctx, cmd) }
		}},
		{Name: "Release what was bound", Prepare: func(t *testing.T, p *Pool) call {
			a, b := p.Agent("a"), p.Agent("b")
			h, _, err := p.Bind(t.Context(), binding(b, claimed(t, a, b)))
			cmd := b.Release(must[alloc.Handoff](t)(h, err), "r")
			return func(ctx context.Context) (any, error) { return p.Release(ctx, cmd) }
		}},
	}
	for _, kind := range []alloc.Kind{alloc.KindSandbox, alloc.KindHost, alloc.KindCounter, alloc.KindLane, alloc.KindRequest, alloc.KindCheckpoint, alloc.KindStint} {
		list = append(list, UseCase{Name: "Mend " + string(kind), Prepare: func(t *testing.T, p *Pool) call {
			a := p.Agent("a")
			sb := a.Sandbox()
			id := sb.Serial.String()
			switch kind {
			case alloc.KindHost:
				id = "a"
			case alloc.KindCounter:
				id = ""
			case alloc.KindLane:
				must[alloc.Ranges](t)(p.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 3}))
				lanes, _, err := p.Store.List(t.Context(), alloc.KindLane, "", 1, 0)
				if err != nil {
					t.Fatal(err)
				}
				id = lanes[0].Key.ID
			case alloc.KindRequest:
				id = p.Request()
				must[alloc.Ranges](t)(p.Allocate(t.Context(), alloc.AllocateCommand{RequestID: id, Caller: "c", Count: 3}))
			case alloc.KindCheckpoint:
				h := must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(sb)))
				must[alloc.Handoff](t)(p.Abort(t.Context(), a.Abort(h, true)))
				id = h.Checkpoint.Serial.String()
			case alloc.KindStint:
				old := &alloc.OldStint{Sandbox: sb.Serial, Stint: sb.Stints[0]}
				old.Stint.Epoch--
				old.Stint.To, old.Stint.Over = p.Clock.Now(), alloc.OverHandedOff
				put(t, p.Store, old)
				id = old.Key().ID
			}
			cmd := alloc.MendCommand{RequestID: p.Request(), Actor: "operator/ann", Kind: kind, ID: id, Force: true}
			return func(ctx context.Context) (any, error) { m, err := p.Mend(ctx, cmd); return answer(err, m.Changed) }
		}})
	}
	for _, e := range []alloc.Evidence{alloc.SeenStopped, alloc.InDoubt, alloc.NotGiven} {
		list = append(list, UseCase{Name: "Confirm " + string(e), Prepare: func(t *testing.T, p *Pool) call {
			a := p.Agent("a")
			cmd := a.Confirm(must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(a.Sandbox()))), e)
			return func(ctx context.Context) (any, error) { return p.Confirm(ctx, cmd) }
		}})
	}
	for _, zero := range []bool{true, false} {
		list = append(list, UseCase{Name: fmt.Sprintf("Abort %v", zero), Prepare: func(t *testing.T, p *Pool) call {
			a := p.Agent("a")
			cmd := a.Abort(must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(a.Sandbox()))), zero)
			return func(ctx context.Context) (any, error) { return p.Abort(ctx, cmd) }
		}})
	}
	return append(list, useCasesAgain()...)
}
