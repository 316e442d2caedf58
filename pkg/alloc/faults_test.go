package alloc_test

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// useCase is one write: prepare brings a pool to where it can be made, and gives it.
type useCase struct {
	name    string
	prepare func(t *testing.T, p *alloctest.Pool) func(ctx context.Context) (any, error)
}

func ok[T any](t testing.TB) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// answer makes one value of the several that a use case answers.
func answer(err error, vs ...any) (any, error) { return vs, err }

func useCases() []useCase {
	type call = func(context.Context) (any, error)
	transit := func(t *testing.T, a *alloctest.Agent, e alloc.Evidence) alloc.Handoff {
		h := ok[alloc.Handoff](t)(a.Pool.Open(t.Context(), a.Open(a.Sandbox())))
		return ok[alloc.Handoff](t)(a.Pool.Confirm(t.Context(), a.Confirm(h, e)))
	}
	claimed := func(t *testing.T, a, b *alloctest.Agent) alloc.Handoff {
		return ok[alloc.ClaimAnswer](t)(b.Pool.Claim(t.Context(), b.Claim(transit(t, a, alloc.SeenStopped), "r"))).Handoff
	}
	bind := func(b *alloctest.Agent, h alloc.Handoff) alloc.BindCommand {
		cmd := b.Bind(h, "r")
		spend, s := b.Next(1)
		cmd.Spend, cmd.Fresh = spend, []alloc.Binding{b.Namespace(s[0], alloc.Time)}
		return cmd
	}
	list := []useCase{
		{"Allocate", func(_ *testing.T, p *alloctest.Pool) call {
			cmd := alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 10}
			return func(ctx context.Context) (any, error) { return p.Allocate(ctx, cmd) }
		}},
		{"Hello of a new host", func(_ *testing.T, p *alloctest.Pool) call {
			cmd := alloc.HelloCommand{RequestID: p.Request(), Host: "n", BootID: alloctest.BootID(5), Nonce: "0123456789abcdef"}
			return func(ctx context.Context) (any, error) { h, _, err := p.Hello(ctx, cmd); return answer(err, h) }
		}},
		{"Hello of a new life", func(_ *testing.T, p *alloctest.Pool) call {
			a := p.Agent("a")
			a.Nonce = "another-life-0123456"
			cmd := a.Hello()
			return func(ctx context.Context) (any, error) { h, _, err := p.Hello(ctx, cmd); return answer(err, h) }
		}},
		{"Hello of a new boot", func(_ *testing.T, p *alloctest.Pool) call {
			a := p.Agent("a")
			a.BootID = alloctest.BootID(5)
			cmd := a.Hello()
			return func(ctx context.Context) (any, error) { h, _, err := p.Hello(ctx, cmd); return answer(err, h) }
		}},
		{"Grant", func(_ *testing.T, p *alloctest.Pool) call {
			cmd := alloc.GrantCommand{Mutation: p.Agent("a").Mutation(), Count: 10}
			return func(ctx context.Context) (any, error) { return p.Grant(ctx, cmd) }
		}},
		{"Register a new one", func(_ *testing.T, p *alloctest.Pool) call {
			cmd := p.Agent("a").New()
			return func(ctx context.Context) (any, error) {
				s, left, err := p.Register(ctx, cmd)
				return answer(err, s, left)
			}
		}},
		{"Register a change", func(_ *testing.T, p *alloctest.Pool) call {
			a := p.Agent("a")
			sb := a.Sandbox()
			cmd := alloc.RegisterCommand{Mutation: a.Mutation(), Items: []alloc.RegisterItem{{Sandbox: sb.Serial, Epoch: sb.Epoch, Labels: map[string]string{"k": "v"}}}}
			return func(ctx context.Context) (any, error) {
				s, left, err := p.Register(ctx, cmd)
				return answer(err, s, left)
			}
		}},
		{"End", func(_ *testing.T, p *alloctest.Pool) call {
			a := p.Agent("a")
			cmd := a.End(a.Sandbox())
			return func(ctx context.Context) (any, error) { return p.End(ctx, cmd) }
		}},
		{"Open", func(_ *testing.T, p *alloctest.Pool) call {
			a := p.Agent("a")
			cmd := a.Open(a.Sandbox())
			return func(ctx context.Context) (any, error) { return p.Open(ctx, cmd) }
		}},
		{"Open a second dump", func(t *testing.T, p *alloctest.Pool) call {
			a := p.Agent("a")
			sb := a.Sandbox()
			h := ok[alloc.Handoff](t)(p.Open(t.Context(), a.Open(sb)))
			ok[alloc.Handoff](t)(p.Abort(t.Context(), a.Abort(h, true)))
			cmd := a.Open(sb)
			return func(ctx context.Context) (any, error) { return p.Open(ctx, cmd) }
		}},
		{"Claim", func(t *testing.T, p *alloctest.Pool) call {
			a, b := p.Agent("a"), p.Agent("b")
			cmd := b.Claim(transit(t, a, alloc.SeenStopped), "r")
			return func(ctx context.Context) (any, error) { return p.Claim(ctx, cmd) }
		}},
		{"Claim a copy", func(t *testing.T, p *alloctest.Pool) call {
			a, b := p.Agent("a"), p.Agent("b")
			cmd := b.Claim(transit(t, a, alloc.InDoubt), "r")
			return func(ctx context.Context) (any, error) { return p.Claim(ctx, cmd) }
		}},
		{"Bind", func(t *testing.T, p *alloctest.Pool) call {
			a, b := p.Agent("a"), p.Agent("b")
			cmd := bind(b, claimed(t, a, b))
			return func(ctx context.Context) (any, error) { h, left, err := p.Bind(ctx, cmd); return answer(err, h, left) }
		}},
		{"Release a claim", func(t *testing.T, p *alloctest.Pool) call {
			a, b := p.Agent("a"), p.Agent("b")
			cmd := b.Release(claimed(t, a, b), "r")
			return func(ctx context.Context) (any, error) { return p.Release(ctx, cmd) }
		}},
		{"Release what was bound", func(t *testing.T, p *alloctest.Pool) call {
			a, b := p.Agent("a"), p.Agent("b")
			h, _, err := p.Bind(t.Context(), bind(b, claimed(t, a, b)))
			cmd := b.Release(ok[alloc.Handoff](t)(h, err), "r")
			return func(ctx context.Context) (any, error) { return p.Release(ctx, cmd) }
		}},
	}
	for _, e := range []alloc.Evidence{alloc.SeenStopped, alloc.InDoubt, alloc.NotGiven} {
		list = append(list, useCase{"Confirm " + string(e), func(t *testing.T, p *alloctest.Pool) call {
			a := p.Agent("a")
			cmd := a.Confirm(ok[alloc.Handoff](t)(p.Open(t.Context(), a.Open(a.Sandbox()))), e)
			return func(ctx context.Context) (any, error) { return p.Confirm(ctx, cmd) }
		}})
	}
	for _, zero := range []bool{true, false} {
		list = append(list, useCase{fmt.Sprintf("Abort %v", zero), func(t *testing.T, p *alloctest.Pool) call {
			a := p.Agent("a")
			cmd := a.Abort(ok[alloc.Handoff](t)(p.Open(t.Context(), a.Open(a.Sandbox()))), zero)
			return func(ctx context.Context) (any, error) { return p.Abort(ctx, cmd) }
		}})
	}
	return list
}

// dump is all that a store has but its random numbers: it is equal exactly if the same happened.
func dump(t *testing.T, s alloc.Store) string {
	t.Helper()
	r, err := alloctest.Everything(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	r.Pool = nil
	return asJSON(t, r)
}

func asJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// commitFaults are what a commit can meet. A delayed one arrives before the next read, before the next
// commit, or after it.
var commitFaults = []memstore.Fault{
	{Outcome: memstore.OK}, {Outcome: memstore.Stored}, {Outcome: memstore.Lost}, {Outcome: memstore.Unavailable}, {Outcome: memstore.Conflict},
	{Outcome: memstore.Delayed, After: 1}, {Outcome: memstore.Delayed, After: 2}, {Outcome: memstore.Delayed, After: 3},
	{Outcome: memstore.Delayed, After: 4}, {Outcome: memstore.Delayed, After: 5}, {Outcome: memstore.Delayed, After: 100},
}

// TestFaultPairs makes each use case meet every pair of faults at its first two commits, and every
// fault together with every read that fails. Whatever is answered, asking again with the same request
// id comes to what it would have come to without faults, once.
func TestFaultPairs(t *testing.T) {
	for _, uc := range useCases() {
		t.Run(uc.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				want, wantDump := withFaults(t, uc, nil)
				try := func(name string, faults func(op memstore.Op) memstore.Fault) {
					got, gotDump := withFaults(t, uc, faults)
					if got != want || gotDump != wantDump {
						t.Fatalf("%s: answered %s\nwant %s\nthe store has %s\nwant %s", name, got, want, gotDump, wantDump)
					}
				}
				for _, first := range commitFaults {
					for _, second := range commitFaults {
						met := false
						try(fmt.Sprintf("%s %d, then %s %d", first.Outcome, first.After, second.Outcome, second.After), func(op memstore.Op) memstore.Fault {
							switch {
							case op.Commit && op.N == 1:
								return first
							case op.Commit && op.N == 2:
								met = true
								return second
							}
							return memstore.Fault{}
						})
						if !met {
							break // there is no second commit; nor will there be with another fault at it
						}
					}
					for read, met := 1, true; met; read++ {
						met = false
						try(fmt.Sprintf("%s %d, and read %d fails", first.Outcome, first.After, read), func(op memstore.Op) memstore.Fault {
							switch {
							case op.Commit && op.N == 1:
								return first
							case !op.Commit && op.N == read:
								met = true
								return memstore.Fault{Outcome: memstore.Unavailable}
							}
							return memstore.Fault{}
						})
					}
				}
			})
		})
	}
}

// withFaults makes a use case, again until it is answered, and gives the answer and what is stored.
func withFaults(t *testing.T, uc useCase, faults func(op memstore.Op) memstore.Fault) (answer, stored string) {
	t.Helper()
	s := memstore.New()
	p := alloctest.NewPool(t, s, alloc.DefaultPolicy())
	call := uc.prepare(t, p)
	before := dump(t, s)
	if faults != nil {
		reads, commits := s.Ops()
		s.SetFaults(func(op memstore.Op) memstore.Fault {
			op.N -= reads
			if op.Commit {
				op.N += reads - commits
			}
			return faults(op)
		})
	}
	unknown := false
	for range 4 {
		v, err := call(t.Context())
		s.SetFaults(nil)
		switch {
		case err == nil:
			s.Settle()
			if again, err := call(t.Context()); err != nil || asJSON(t, again) != asJSON(t, v) {
				t.Fatalf("answered %s, asked again %s, %v", asJSON(t, v), asJSON(t, again), err)
			}
			return asJSON(t, v), dump(t, s)
		case alloc.ReasonOf(err) == alloc.ReasonUnknownOutcome:
			unknown = true
		case alloc.ReasonOf(err) == alloc.ReasonUnavailable, alloc.ReasonOf(err) == alloc.ReasonConflict:
			// Nothing was changed, and nothing will be.
			s.Settle()
			if now := dump(t, s); !unknown && now != before {
				t.Fatalf("%v, and the store has changed:\n%s\n%s", err, before, now)
			}
		default:
			t.Fatalf("refused with %v", err)
		}
	}
	t.Fatal("never answered")
	return "", ""
}

// TestInitPoolFaults: a pool is made once, whatever is lost.
func TestInitPoolFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, f := range commitFaults {
			s := memstore.New()
			svc := alloc.NewService(s, nil)
			s.SetFaults(func(op memstore.Op) memstore.Fault {
				if op.Commit && op.N == 1 {
					return f
				}
				return memstore.Fault{}
			})
			first, err := svc.InitPool(t.Context(), alloc.DefaultPolicy())
			second, err2 := svc.InitPool(t.Context(), alloc.DefaultPolicy())
			s.Settle()
			found, _, err3 := svc.Pool(t.Context())
			switch {
			case err3 != nil:
				t.Errorf("%s %d: no pool: %v, %v", f.Outcome, f.After, err, err2)
			case err == nil && (first.UUID != found.UUID || alloc.ReasonOf(err2) != alloc.ReasonPoolExists):
				t.Errorf("%s %d: made pool %s, then %v; the store has %s", f.Outcome, f.After, first.UUID, err2, found.UUID)
			case err2 == nil && second.UUID != found.UUID:
				t.Errorf("%s %d: made pool %s, the store has %s", f.Outcome, f.After, second.UUID, found.UUID)
			}
			alloctest.Check(t, s)
		}
	})
}

// TestSweepFaults: a sweep that is lost and arrives late makes no request new.
func TestSweepFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, f := range commitFaults {
			s := memstore.New()
			p := alloctest.NewPool(t, s, alloc.DefaultPolicy())
			cmd := alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 3}
			before := ok[alloc.Ranges](t)(p.Allocate(t.Context(), cmd))
			ahead := alloc.NewService(s, func() time.Time { return p.Clock.Now().Add(time.Hour) })
			s.SetFaults(func(op memstore.Op) memstore.Fault {
				if op.Commit {
					return f
				}
				return memstore.Fault{}
			})
			_, _ = ahead.SweepRequests(t.Context(), 10)
			s.SetFaults(nil)
			for range 4 {
				got, err := p.Allocate(t.Context(), cmd)
				if alloc.ReasonOf(err) != alloc.ReasonRequestExpired && (err != nil || got[0] != before[0]) {
					t.Errorf("%s %d: %v, %v; before %v", f.Outcome, f.After, got, err, before)
				}
			}
			s.Settle()
		}
	})
}
