package alloctest

import (
	"context"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// useCasesAgain are the writes of a pool whose store has forgotten history.
func useCasesAgain() []UseCase {
	type call = func(context.Context) (any, error)
	again := func(p *Pool, cmd alloc.AgainCommand) call {
		return func(ctx context.Context) (any, error) { got, err := p.RegisterAgain(ctx, cmd); return answer(err, got) }
	}
	return []UseCase{
		{Name: "RegisterAgain what was forgotten", Prepare: func(_ *testing.T, p *Pool) call {
			a := p.Agent("a")
			p.Agent("b")
			then := p.Snapshot()
			sb := a.Sandbox()
			p.PutBack(then)
			a.Rejoin()
			return again(p, a.Again(sb))
		}},
		{Name: "RegisterAgain what has moved", Prepare: func(t *testing.T, p *Pool) call {
			a, b := p.Agent("a"), p.Agent("b")
			way := transit(t, a, a.Sandbox())
			then := p.Snapshot()
			h := bind(t, b, claim(t, b, way, "r"), "r")
			p.PutBack(then)
			b.Rejoin()
			cmd := b.Again(&h.Sandbox)
			cmd.Last = false
			return again(p, cmd)
		}},
		{Name: "RegisterAgain a dump", Prepare: func(t *testing.T, p *Pool) call {
			a, b := p.Agent("a"), p.Agent("b")
			way := transit(t, a, a.Sandbox())
			then := p.Snapshot()
			h := bind(t, b, claim(t, b, way, "r"), "r")
			images := transit(t, b, &h.Sandbox)
			p.PutBack(then)
			b.Rejoin()
			cmd := b.Again()
			cmd.Items = []alloc.AgainItem{b.dumpOf(images)}
			return again(p, cmd)
		}},
		{Name: "RegisterAgain as the last host", Prepare: func(_ *testing.T, p *Pool) call {
			a := p.Agent("a")
			p.PutBack(p.Snapshot())
			a.Rejoin()
			return again(p, a.Again())
		}},
		{Name: "RegisterAgain after a long history", Long: true, Prepare: func(t *testing.T, p *Pool) call {
			hosts := []*Agent{p.Agent("a"), p.Agent("b")}
			sb := hosts[0].Sandbox()
			var then Snapshot
			for i := range 33 {
				if i == 32 { // it has as many stints as a record keeps
					then = p.Snapshot()
				}
				h := bind(t, hosts[(i+1)%2], claim(t, hosts[(i+1)%2], transit(t, hosts[i%2], sb), "r"), "r")
				sb = &h.Sandbox
			}
			p.PutBack(then)
			hosts[1].Rejoin()
			return again(p, hosts[1].Again(sb))
		}},
		{Name: "Waive", Prepare: func(_ *testing.T, p *Pool) call {
			p.Agent("a")
			p.PutBack(p.Snapshot())
			cmd := alloc.WaiveCommand{RequestID: p.Request(), Actor: "operator/ann", Host: "a"}
			return func(ctx context.Context) (any, error) { h, _, err := p.Waive(ctx, cmd); return answer(err, h) }
		}},
		{Name: "Settle", Prepare: func(_ *testing.T, p *Pool) call {
			p.PutBack(p.Snapshot())
			return func(ctx context.Context) (any, error) { return p.Settle(ctx) }
		}},
		{Name: "Claim when the last host has come", Prepare: func(t *testing.T, p *Pool) call {
			a := p.Agent("a")
			way := transit(t, a, a.Sandbox())
			p.PutBack(p.Snapshot())
			a.Rejoin()
			must[[]alloc.AgainAnswer](t)(p.RegisterAgain(t.Context(), a.Again()))
			p.unsettle(t)
			cmd := a.Claim(way, "r")
			return func(ctx context.Context) (any, error) { return p.Claim(ctx, cmd) }
		}},
		{Name: "Hello when the last host has come", Prepare: func(t *testing.T, p *Pool) call {
			a := p.Agent("a")
			p.PutBack(p.Snapshot())
			a.Rejoin()
			must[[]alloc.AgainAnswer](t)(p.RegisterAgain(t.Context(), a.Again()))
			p.unsettle(t)
			cmd := a.Hello()
			return func(ctx context.Context) (any, error) { h, _, err := p.Hello(ctx, cmd); return answer(err, h) }
		}},
		{Name: "Hello of one that has seen more", Prepare: func(t *testing.T, p *Pool) call {
			a := p.Agent("a")
			pool, _, err := p.Pool(t.Context())
			cmd := a.Hello()
			cmd.PoolUUID, cmd.Seen = must[*alloc.Pool](t)(pool, err).UUID, alloc.Seen{Generation: 2}
			return func(ctx context.Context) (any, error) {
				_, _, err := p.Hello(ctx, cmd)
				if alloc.ReasonOf(err) == alloc.ReasonRecovering {
					return "closed", nil
				}
				return nil, err
			}
		}},
	}
}

// unsettle has nobody notice that the last host has come.
func (p *Pool) unsettle(t *testing.T) {
	t.Helper()
	pool := *get(t, p.Store, alloc.Key{Kind: alloc.KindPool})[0].Record.(*alloc.Pool)
	pool.Settled = 1
	p.put(t, &pool)
}
