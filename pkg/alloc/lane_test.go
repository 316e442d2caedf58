package alloc_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// TestLaneNeverIssuesTwice: what is left of a lane's range is nobody's once its record is not the one that
// it wrote last. A copy of the server was quicker, the record was swept, the store was put back: the lane begins
// another range, and says so.
func TestLaneNeverIssuesTwice(t *testing.T) {
	for name, meanwhile := range map[string]struct {
		put   func(now, before *alloc.Lane) alloc.Tx
		swept bool
	}{
		"a copy was quicker": {put: func(now, _ *alloc.Lane) alloc.Tx {
			theirs := *now
			taken, rest, _ := now.Left.Take(5)
			theirs.Left, theirs.Nonce = rest, "0123456789abcdef0123456789abcdef"
			return alloc.Tx{Put: []alloc.Record{&theirs, &alloc.Request{ID: alloctest.RequestID(time.Now(), 999_999), Ranges: taken}}}
		}},
		// The same range, and nothing but the nonce tells.
		"a copy came to the same": {put: func(now, _ *alloc.Lane) alloc.Tx {
			theirs := *now
			theirs.Nonce = "0123456789abcdef0123456789abcdef"
			return alloc.Tx{Put: []alloc.Record{&theirs}}
		}},
		"it was swept":           {put: func(now, _ *alloc.Lane) alloc.Tx { return alloc.Tx{Delete: []alloc.Key{now.Key()}} }, swept: true},
		"the store was put back": {put: func(_, before *alloc.Lane) alloc.Tx { return alloc.Tx{Put: []alloc.Record{before}} }},
	} {
		t.Run(name, func(t *testing.T) {
			s := memstore.New()
			p := alloctest.NewPool(t, s, alloc.DefaultPolicy())
			var lost []string
			p.LaneLost = func(id string, swept bool) {
				if lost = append(lost, id); swept != meanwhile.swept {
					t.Errorf("lost, swept: %v", swept)
				}
			}
			got := map[alloc.Serial]bool{}
			allocate := func() {
				t.Helper()
				for _, x := range each(ok[alloc.Ranges](t)(p.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 5}))) {
					if got[x] {
						t.Errorf("%s was issued twice", x)
					}
					got[x] = true
				}
			}
			lane := func() *alloc.Lane { return everything(t, s).Lanes[0] }
			allocate()
			before := lane()
			allocate()
			allocate()
			if len(everything(t, s).Lanes) != 1 || len(lost) > 0 {
				t.Fatalf("more than one lane for one caller, or lost: %v", lost)
			}
			tx := meanwhile.put(lane(), before)
			for _, rec := range tx.Put {
				if theirs, ok := rec.(*alloc.Request); ok {
					for _, x := range each(theirs.Ranges) {
						got[x] = true
					}
				}
			}
			if _, err := s.Commit(t.Context(), tx); err != nil {
				t.Fatal(err)
			}
			allocate()
			allocate()
			if len(lost) != 1 || lost[0] != before.ID {
				t.Errorf("lost %v, want %s", lost, before.ID)
			}
			// What remains of the lost one is as Check would have it after it was swept.
			if _, err := s.Commit(t.Context(), alloc.Tx{Delete: []alloc.Key{before.Key()}}); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestCounterPutBack: a server that has seen the counter further on takes nothing from one that went back.
func TestCounterPutBack(t *testing.T) {
	s := memstore.New()
	p := alloctest.NewPool(t, s, alloc.DefaultPolicy())
	allocate := func(n uint64) error {
		_, err := p.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: n})
		return err
	}
	a := p.Agent("a")
	if err := allocate(1); err != nil {
		t.Fatal(err)
	}
	before := everything(t, s)
	if err := allocate(5000); err != nil {
		t.Fatal(err)
	}
	after := everything(t, s)
	if _, err := s.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{before.Counter, before.Lanes[0]}}); err != nil {
		t.Fatal(err)
	}
	if err := allocate(1); !errors.Is(err, alloc.ErrRecovering) || !strings.Contains(err.Error(), "nsalloc mend counter") {
		t.Errorf("Allocate: %v", err)
	}
	if _, err := p.Grant(t.Context(), alloc.GrantCommand{Mutation: a.Mutation(), Count: 10}); !errors.Is(err, alloc.ErrRecovering) {
		t.Errorf("Grant: %v", err)
	}
	if _, err := s.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{after.Counter, after.Lanes[0]}}); err != nil {
		t.Fatal(err)
	}
	if err := allocate(1); err != nil {
		t.Errorf("with the counter where it was: %v", err)
	}
}

// TestSlowLane: calls do not wait for a lane whose transaction hangs.
func TestSlowLane(t *testing.T) {
	bubble(t, func(t *testing.T, p *alloctest.Pool, s *held) {
		ask := func() error {
			_, err := p.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 1})
			return err
		}
		if err := ask(); err != nil { // later ones need no counter
			t.Fatal(err)
		}
		_ = s.hold()
		hangs := make(chan error, 1)
		go func() { hangs <- ask() }()
		synctest.Wait()
		began := time.Now()
		for range 3 { // the one that waits as it hangs, and those that come later
			if err := ask(); err != nil {
				t.Error(err)
			}
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("others waited %s for it", took)
		}
		if err := <-hangs; err != nil { // it is tried again before its callers are gone
			t.Errorf("the call in it: %v", err)
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("it was tried again after %s", took)
		}
	})
}

// TestSameRequestAtTwoServers: a request that is asked again elsewhere while it is on its way is one.
func TestSameRequestAtTwoServers(t *testing.T) {
	bubble(t, func(t *testing.T, p *alloctest.Pool, s *held) {
		other := alloc.NewService(s, p.Clock.Now)
		for _, server := range []*alloc.Service{p.Service, other} { // both have a lane, and need not read
			ok[alloc.Ranges](t)(server.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 1}))
		}
		cmd := alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 3}
		release := s.hold()
		first := make(chan answered, 1)
		go func() {
			r, err := p.Allocate(t.Context(), cmd)
			first <- answered{r, err}
		}()
		synctest.Wait()
		second := ok[alloc.Ranges](t)(other.Allocate(t.Context(), cmd))
		release()
		if got := <-first; got.err != nil || !slices.Equal(got.ranges, second) {
			t.Errorf("%v and %v, %v", second, got.ranges, got.err)
		}
	})
}

// gated is a store all of whose commits wait while gate is not nil.
type gated struct {
	*memstore.Store
	mu   sync.Mutex
	gate chan struct{}
}

func (g *gated) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	g.mu.Lock()
	gate := g.gate
	g.mu.Unlock()
	if gate != nil {
		<-gate
	}
	return g.Store.Commit(ctx, tx)
}

// TestLanesShareTheLoad: another lane begins for each transaction's worth of calls that waits, and for no less.
func TestLanesShareTheLoad(t *testing.T) {
	for waiting, want := range map[int]int{0: 1, 119: 1, 120: 2, 239: 2, 240: 3, 359: 3, 360: 4, 1000: 4} {
		t.Run(fmt.Sprint(waiting), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &gated{Store: memstore.New()}
				p := alloctest.NewPool(t, s, alloc.DefaultPolicy())
				var wg sync.WaitGroup
				ask := func(n int) {
					for range n {
						cmd := alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 1}
						wg.Go(func() {
							if _, err := p.Allocate(t.Context(), cmd); err != nil {
								t.Error(err)
							}
						})
					}
					synctest.Wait()
				}
				gate := make(chan struct{})
				s.gate = gate
				ask(1)
				ask(waiting)
				s.mu.Lock()
				s.gate = nil
				s.mu.Unlock()
				close(gate)
				wg.Wait()
				if n := len(everything(t, s).Lanes); n != want {
					t.Errorf("%d lanes for %d calls beside one, want %d", n, waiting, want)
				}
			})
		})
	}
}

// TestLaneTakesAhead: a lane that runs low takes its next range before it needs it, and does not wait for the
// counter while it has enough.
func TestLaneTakesAhead(t *testing.T) {
	bubble(t, func(t *testing.T, p *alloctest.Pool, s *held) {
		allocate := func(n uint64) {
			t.Helper()
			ok[alloc.Ranges](t)(p.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: n}))
		}
		left := func() uint64 { return everything(t, s).Lanes[0].Left.Count() }
		a := p.Agent("a")
		allocate(1)
		all := left() + 1
		release := s.hold()
		granted := make(chan error, 1)
		go func() {
			_, err := p.Grant(t.Context(), alloc.GrantCommand{Mutation: a.Mutation(), Count: 10})
			granted <- err
		}()
		synctest.Wait() // it has the counter
		began := time.Now()
		allocate(all - all/8) // now it is low
		before := left()
		if took := time.Since(began); took > 0 || before != all/8-1 {
			t.Errorf("waited %s for the counter, %d are left of %d", took, before, all)
		}
		release()
		if err := <-granted; err != nil {
			t.Error(err)
		}
		allocate(1)
		if now := left(); now < before-1+all {
			t.Errorf("%d are left: none were taken ahead", now)
		}
		_, commits := s.Ops()
		allocate(1)
		if _, now := s.Ops(); now != commits+1 || left() < all {
			t.Errorf("%d commits for one call, %d are left", now-commits, left())
		}
	})
}

// TestCounterBrokenAhead: what a lane has it issues also when nothing more can be taken from the counter.
func TestCounterBrokenAhead(t *testing.T) {
	s := memstore.New()
	p := alloctest.NewPool(t, s, alloc.DefaultPolicy())
	allocate := func(n uint64) error {
		_, err := p.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: n})
		return err
	}
	if err := allocate(900); err != nil { // of 1024
		t.Fatal(err)
	}
	counter := everything(t, s).Counter
	if _, err := s.Commit(t.Context(), alloc.Tx{Delete: []alloc.Key{counter.Key()}}); err != nil {
		t.Fatal(err)
	}
	if err := allocate(100); err != nil {
		t.Error(err)
	}
	if err := allocate(100); !errors.Is(err, alloc.ErrMalformed) {
		t.Errorf("without a counter: %v", err)
	}
	if _, err := s.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{counter}}); err != nil {
		t.Fatal(err)
	}
}

// TestRepeatedAlone: a request that is asked again, elsewhere, is answered by a transaction that is about nothing else,
// and makes those of nobody else conflict.
func TestRepeatedAlone(t *testing.T) {
	bubble(t, func(t *testing.T, p *alloctest.Pool, s *held) {
		other := alloc.NewService(s, p.Clock.Now)
		ok[alloc.Ranges](t)(other.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 1}))
		cmd := alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 3}
		first := ok[alloc.Ranges](t)(p.Allocate(t.Context(), cmd))
		p.Clock.Move(time.Second)
		_, commits := s.Ops()
		release := s.hold()
		var wg sync.WaitGroup
		ask := func(cmd alloc.AllocateCommand, want alloc.Ranges) {
			wg.Go(func() {
				got := ok[alloc.Ranges](t)(other.Allocate(t.Context(), cmd))
				if want != nil && !slices.Equal(got, want) {
					t.Errorf("%v, want %v", got, want)
				}
			})
			synctest.Wait()
		}
		ask(alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 1}, nil) // it hangs, and all else waits for one
		ask(cmd, first)
		ask(alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 1}, nil)
		release()
		wg.Wait()
		if _, now := s.Ops(); now != commits+3 {
			t.Errorf("%d commits for two new requests and a repeated one", now-commits)
		}
		reused := cmd
		reused.Count++
		if _, err := other.Allocate(t.Context(), reused); !errors.Is(err, alloc.ErrRequestReused) {
			t.Errorf("with another body: %v", err)
		}
	})
}
