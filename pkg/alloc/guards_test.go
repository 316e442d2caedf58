package alloc_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// overtaken makes a use case with its commit held while meanwhile happens, and gives what it answers.
// changed reports whether the store is other than meanwhile left it.
func overtaken(t *testing.T, uc alloctest.UseCase, meanwhile func(t *testing.T, p *alloctest.Pool, s *held)) (err error, changed bool) {
	t.Helper()
	bubble(t, func(t *testing.T, p *alloctest.Pool, s *held) {
		call := uc.Prepare(t, p)
		release := s.hold()
		done := make(chan error, 1)
		go func() {
			_, err := call(t.Context())
			done <- err
		}()
		synctest.Wait() // it has read and decided, and is about to commit
		meanwhile(t, p, s)
		before := dump(t, s)
		release()
		err = <-done
		changed = dump(t, s) != before
	})
	return err, changed
}

// TestPoolClosesMeanwhile: nothing that was decided while the pool was open is committed when it is not.
func TestPoolClosesMeanwhile(t *testing.T) {
	for _, uc := range alloctest.UseCases() {
		if uc.Name == "Mend counter" || uc.Name == "RemoveServer" || uc.Name == "SetPolicy" || strings.HasPrefix(uc.Name, "Hello of one that has seen") || uc.Name == "Hello when the last host has come" {
			continue // the ways out, and what an operator can do before
		}
		t.Run(uc.Name, func(t *testing.T) {
			err, changed := overtaken(t, uc, func(t *testing.T, p *alloctest.Pool, s *held) {
				pool, _, err := p.Pool(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				closed := *pool
				closed.State = alloc.PoolRecovering
				if _, err := s.Store.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{&closed}}); err != nil {
					t.Fatal(err)
				}
			})
			if !errors.Is(err, alloc.ErrRecovering) || changed {
				t.Errorf("answered %v, changed the store: %v", err, changed)
			}
		})
	}
}

// TestNewLifeMeanwhile: nothing that an older life of a host began is committed after a newer one's Hello.
func TestNewLifeMeanwhile(t *testing.T) {
	for _, uc := range alloctest.UseCases() {
		if uc.Name == "Allocate" || uc.Name == "SetPolicy" || uc.Name == "RemoveServer" || uc.Name == "Waive" || uc.Name == "Settle" || strings.HasPrefix(uc.Name, "Hello") || strings.HasPrefix(uc.Name, "Mend") {
			continue // not in the name of a life
		}
		t.Run(uc.Name, func(t *testing.T) {
			err, changed := overtaken(t, uc, func(t *testing.T, p *alloctest.Pool, s *held) {
				entries, _, err := s.List(t.Context(), alloc.KindHost, "", 10, 0)
				if err != nil {
					t.Fatal(err)
				}
				for _, e := range entries {
					h := e.Record.(*alloc.Host)
					if _, _, err := p.Hello(t.Context(), alloc.HelloCommand{RequestID: p.Request(), Host: h.Name, BootID: h.BootID, Nonce: "a-newer-life-of-" + h.Name}); err != nil {
						t.Fatal(err)
					}
				}
			})
			if !errors.Is(err, alloc.ErrStaleIncarnation) || changed {
				t.Errorf("answered %v, changed the store: %v", err, changed)
			}
		})
	}
}

// TestSpentMeanwhile: a Hello that goes on with a life does not bring back what that life spent.
func TestSpentMeanwhile(t *testing.T) {
	bubble(t, func(t *testing.T, p *alloctest.Pool, s *held) {
		a := p.Agent("a")
		register, hello := a.New(), a.Hello()
		hello.BootID = alloctest.BootID(99)
		release := s.hold()
		var got *alloc.Host
		var err error
		done := make(chan struct{})
		go func() {
			defer close(done)
			got, _, err = p.Hello(t.Context(), hello)
		}()
		synctest.Wait()
		if _, _, err := p.Register(t.Context(), register); err != nil {
			t.Fatal(err)
		}
		release()
		<-done
		if err != nil || got.BootID != hello.BootID || got.Granted.Count() != 997 || a.Record().Granted.Count() != 997 {
			t.Errorf("%v, %v; the store has %v", got, err, a.Record().Granted)
		}
	})
}

// TestRefusedAfterUnknown: a decision is final also after a lost answer. Had the lost one been committed,
// what it compares would be there.
func TestRefusedAfterUnknown(t *testing.T) {
	bubble(t, func(t *testing.T, p *alloctest.Pool, s *held) {
		a, b, c := p.Agent("a"), p.Agent("b"), p.Agent("c")
		h := ok[alloc.Handoff](t)(p.Open(t.Context(), a.Open(a.Sandbox())))
		h = ok[alloc.Handoff](t)(p.Confirm(t.Context(), a.Confirm(h, alloc.SeenStopped)))
		mine, theirs := b.Claim(h, "r"), c.Claim(h, "r")
		release := s.hold()
		done := make(chan error, 1)
		go func() {
			_, err := p.Claim(t.Context(), mine)
			done <- err
		}()
		synctest.Wait()
		ok[alloc.ClaimAnswer](t)(p.Claim(t.Context(), theirs))
		_, commits := s.Ops()
		s.SetFaults(func(op memstore.Op) memstore.Fault {
			if op.Commit && op.N == commits+1 {
				return memstore.Fault{Outcome: memstore.Delayed, After: 100}
			}
			return memstore.Fault{}
		})
		release()
		if err := <-done; !errors.Is(err, alloc.ErrClaimed) {
			t.Errorf("answered %v", err)
		}
		if n := s.Settle(); n != 0 {
			t.Errorf("%d lost transactions took effect after the refusal", n)
		}
	})
}

// TestSweptMeanwhile: of two sweeps the one that got less far does not put the mark back.
func TestSweptMeanwhile(t *testing.T) {
	bubble(t, func(t *testing.T, p *alloctest.Pool, s *held) {
		var last alloc.AllocateCommand
		for range 4 {
			last = alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 1}
			ok[alloc.Ranges](t)(p.Allocate(t.Context(), last))
			p.Clock.Move(time.Minute)
		}
		ahead := alloc.NewService(s, func() time.Time { return p.Clock.Now().Add(time.Hour) })
		release := s.hold()
		done := make(chan error, 1)
		go func() {
			_, err := ahead.SweepRequests(t.Context(), 1)
			done <- err
		}()
		synctest.Wait()
		if n, err := ahead.SweepRequests(t.Context(), 4); n != 4 || err != nil {
			t.Fatalf("swept %d, %v", n, err)
		}
		release()
		if err := <-done; !errors.Is(err, alloc.ErrConflict) {
			t.Errorf("the slower sweep: %v", err)
		}
		if r, err := p.Allocate(t.Context(), last); !errors.Is(err, alloc.ErrRequestExpired) {
			t.Errorf("a swept request was issued again: %v, %v", r, err)
		}
	})
}

// TestSweepStaysBehind: a sweep by a clock that is far ahead, of more than it takes at once, refuses nobody
// who asks now; and a key that is no request's is in nobody's way.
func TestSweepStaysBehind(t *testing.T) {
	s := memstore.New()
	p := alloctest.NewPool(t, s, alloc.DefaultPolicy())
	for _, id := range []string{"7", "0", "00000000-0001", "zz"} {
		if err := s.Plant(t.Context(), alloc.Key{Kind: alloc.KindRequest, ID: id}, []byte{1}); err != nil {
			t.Fatal(err)
		}
	}
	ahead := alloc.NewService(s, func() time.Time { return p.Clock.Now().Add(time.Hour) })
	total := 0
	for range 40 {
		ok[alloc.Ranges](t)(p.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 1}))
		p.Clock.Move(time.Second)
		n, err := ahead.SweepRequests(t.Context(), 3)
		if err != nil {
			t.Fatal(err)
		}
		total += n
	}
	if total < 20 {
		t.Errorf("%d were swept", total)
	}
	// What is left would be found by Check as what it is.
	if _, err := s.Commit(t.Context(), alloc.Tx{DeleteSpans: []alloc.Span{{Kind: alloc.KindRequest, Through: "0z"}, {Kind: alloc.KindRequest, After: "6", Through: "zzz"}}}); err != nil {
		t.Fatal(err)
	}
}

// TestCounterNeverRepeatsAValue: a store that was put back, where the same is asked again, does not come
// to the value that it had; what compares the lost one fails.
func TestCounterNeverRepeatsAValue(t *testing.T) {
	s := memstore.New()
	p := alloctest.NewPool(t, s, alloc.DefaultPolicy())
	a := p.Agent("a")
	read := func() []alloc.Entry {
		entries, _, err := s.Get(t.Context(), alloc.Key{Kind: alloc.KindCounter}, alloc.HostKey("a"))
		if err != nil {
			t.Fatal(err)
		}
		return entries
	}
	for name, issue := range map[string]func(ctx context.Context, id string) error{
		"Allocate": func(ctx context.Context, id string) error { // of a server that has no lane yet
			_, err := alloc.NewService(s, p.Clock.Now).Allocate(ctx, alloc.AllocateCommand{RequestID: id, Caller: "c", Count: 5})
			return err
		},
		"Grant": func(ctx context.Context, id string) error {
			m := a.Mutation()
			m.RequestID = id
			_, err := alloc.NewService(s, p.Clock.Now).Grant(ctx, alloc.GrantCommand{Mutation: m, Count: 5}) // one that has not seen the counter
			return err
		},
	} {
		snapshot, id := read(), p.Request()
		if err := issue(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		lost := read()[0]
		if _, err := s.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{snapshot[0].Record, snapshot[1].Record},
			Delete: []alloc.Key{{Kind: alloc.KindRequest, ID: id}}, DeleteSpans: []alloc.Span{{Kind: alloc.KindLane, Through: "g"}}}); err != nil {
			t.Fatal(err)
		}
		if now := read()[0]; now.Token != snapshot[0].Token {
			t.Fatalf("%s: the store did not go back: %+v", name, now.Record)
		}
		if err := issue(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		again := read()[0]
		if again.Record.(*alloc.Counter).Next != lost.Record.(*alloc.Counter).Next || again.Token == lost.Token {
			t.Errorf("%s: after the store went back the counter is at %+v, before at %+v", name, again.Record, lost.Record)
		}
	}
}
