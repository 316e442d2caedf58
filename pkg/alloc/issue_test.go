package alloc_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// held is a store whose next commit waits until it is let go, so that calls gather behind it.
type held struct {
	*memstore.Store
	mu   sync.Mutex
	gate chan struct{}
}

func (h *held) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	h.mu.Lock()
	gate := h.gate
	h.gate = nil
	h.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return 0, &alloc.Error{Reason: alloc.ReasonUnknownOutcome, Err: ctx.Err()}
		}
	}
	return h.Store.Commit(ctx, tx)
}

// hold makes the next commit wait until what it returns is called.
func (h *held) hold() (release func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	gate := make(chan struct{})
	h.gate = gate
	return func() { close(gate) }
}

// bubble is a pool over a store that can be held, in a time of its own.
func bubble(t *testing.T, f func(t *testing.T, p *alloctest.Pool, s *held)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &held{Store: memstore.New()}
		f(t, alloctest.NewPool(t, s, alloc.DefaultPolicy()), s)
		time.Sleep(time.Minute) // of the bubble's time: what was lost on its way has been given up by then
	})
}

type answered struct {
	ranges alloc.Ranges
	err    error
}

func TestAllocateGathers(t *testing.T) {
	bubble(t, func(t *testing.T, p *alloctest.Pool, s *held) {
		const calls = 200
		_, before := s.Ops()
		release := s.hold()
		var wg sync.WaitGroup
		got := make([]answered, calls)
		for i := range calls {
			cmd := alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: uint64(i%3 + 1)}
			wg.Go(func() { got[i].ranges, got[i].err = p.Allocate(t.Context(), cmd) })
			if i == 0 {
				synctest.Wait() // it is in its commit; all others wait behind it
			}
		}
		synctest.Wait()
		release()
		wg.Wait()
		var all []alloc.Serial
		for i, a := range got {
			if a.err != nil || a.ranges.Count() != uint64(i%3+1) {
				t.Fatalf("call %d: %v, %v", i, a.ranges, a.err)
			}
			all = append(all, each(a.ranges)...)
		}
		slices.Sort(all)
		if n := len(slices.Compact(slices.Clone(all))); n != len(all) {
			t.Errorf("%d serials for %d", n, len(all))
		}
		if _, after := s.Ops(); after-before != 3 { // 1, and 199 by 120
			t.Errorf("%d transactions for %d calls", after-before, calls)
		}
	})
}

func TestAllocateInOneBatch(t *testing.T) {
	bubble(t, func(t *testing.T, p *alloctest.Pool, s *held) {
		// 20 serials are left: what does not fit is refused, what fits is not held up by it.
		if _, err := s.Store.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{&alloc.Counter{Generation: 1, Next: alloc.MaxCounter - 19}}}); err != nil {
			t.Fatal(err)
		}
		release := s.hold()
		var wg sync.WaitGroup
		ask := func(ctx context.Context, id string, n uint64) *answered {
			a := new(answered)
			wg.Go(func() {
				a.ranges, a.err = p.Allocate(ctx, alloc.AllocateCommand{RequestID: id, Caller: "c", Count: n})
			})
			synctest.Wait()
			return a
		}
		first := ask(t.Context(), p.Request(), 1)
		id := p.Request()
		leaving, leave := context.WithCancel(t.Context())
		left := ask(leaving, p.Request(), 5)
		one, two := ask(t.Context(), id, 5), ask(t.Context(), id, 5)
		reused := ask(t.Context(), id, 6)
		much := ask(t.Context(), p.Request(), 19)
		rest := ask(t.Context(), p.Request(), 14)
		none := ask(t.Context(), p.Request(), 1)
		leave()
		synctest.Wait()
		if !errors.Is(left.err, alloc.ErrExhausted) || !errors.Is(left.err, context.Canceled) {
			t.Errorf("the caller who left got %v", left.err)
		}
		release()
		wg.Wait()
		if first.err != nil || one.err != nil || two.err != nil || one.ranges.Count() != 5 || !slices.Equal(one.ranges, two.ranges) {
			t.Errorf("%+v; the same request twice: %+v, %+v", first, one, two)
		}
		if one.ranges[0] = (alloc.Range{}); two.ranges[0].Count == 0 {
			t.Error("two callers share one answer")
		}
		for a, want := range map[*answered]*alloc.Error{reused: alloc.ErrRequestReused, much: alloc.ErrExhausted, none: alloc.ErrExhausted} {
			if !errors.Is(a.err, want) || a.ranges != nil {
				t.Errorf("%+v, want %s", a, want.Reason)
			}
		}
		// Nothing was issued to who had left before the turn came: the rest fits exactly.
		if rest.err != nil || rest.ranges[0].Last().Counter() != alloc.MaxCounter {
			t.Errorf("the rest is %+v", rest)
		}
	})
}

func TestAllocateForNobody(t *testing.T) {
	bubble(t, func(t *testing.T, p *alloctest.Pool, s *held) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := p.Allocate(ctx, alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 1}); !errors.Is(err, alloc.ErrUnavailable) || !errors.Is(err, context.Canceled) {
			t.Errorf("a caller that had left: %v", err)
		}
		// The store hangs: callers leave at their deadline, the batch at its own, and the next ones are served.
		_ = s.hold()
		cmd := alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 1}
		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := p.Allocate(ctx, cmd); !errors.Is(err, alloc.ErrUnknownOutcome) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("while the store hangs: %v", err)
		}
		if r, err := p.Allocate(t.Context(), cmd); err != nil || r.Count() != 1 {
			t.Errorf("asked again: %v, %v", r, err)
		}
	})
}

// TestAllocateQueueIsBounded: calls beyond the queue wait for a place in it, and are told so when their
// deadline comes first. Nothing is issued to them, nor to those whose turn did not come.
func TestAllocateQueueIsBounded(t *testing.T) {
	bubble(t, func(t *testing.T, p *alloctest.Pool, s *held) {
		release := s.hold()
		ctx, cancel := context.WithCancel(t.Context())
		ask := func(ctx context.Context, i int) error {
			_, err := p.Allocate(ctx, alloc.AllocateCommand{RequestID: alloctest.RequestID(p.Clock.Now(), uint64(i)), Caller: "c", Count: 1})
			return err
		}
		// One is in its commit, and its lane holds the counter; the other lanes wait for that with a batch each,
		// and 10,000 in the queue.
		const all = 1 + 3*120 + 10_000
		var wg sync.WaitGroup
		var late, other atomic.Int32
		for i := range all {
			wg.Go(func() {
				switch err := ask(ctx, 1000+i); {
				case errors.Is(err, alloc.ErrExhausted):
					late.Add(1)
				case errors.Is(err, alloc.ErrUnknownOutcome): // it had begun
					other.Add(1)
				default:
					t.Error(err)
				}
			})
			if i == 0 {
				synctest.Wait()
			}
		}
		synctest.Wait()
		short, end := context.WithTimeout(t.Context(), time.Second)
		defer end()
		var e *alloc.Error
		if err := ask(short, 1); !errors.As(err, &e) || e.Reason != alloc.ReasonExhausted || e.RetryAfter == 0 || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("one more: %v", err)
		}
		patient := make(chan error, 1)
		go func() { patient <- ask(t.Context(), 2) }()
		synctest.Wait()
		cancel()
		wg.Wait()
		begun := int(other.Load())
		if late.Load() < 10_000 || int(late.Load())+begun != all {
			t.Errorf("%d were late, %d had begun", late.Load(), begun)
		}
		release()
		if err := <-patient; err != nil {
			t.Errorf("who waited for a place: %v", err)
		}
		synctest.Wait()
		r, err := alloctest.Everything(t.Context(), s)
		if err != nil || len(r.Requests) != begun+1 {
			t.Errorf("%d requests have serials, %v", len(r.Requests), err)
		}
	})
}

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

// TestServersAtOnce: several servers issue from one store, to callers and to hosts, with faults.
func TestServersAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := memstore.New()
		p := alloctest.NewPool(t, s, alloc.DefaultPolicy())
		agents := []*alloctest.Agent{p.Agent("a"), p.Agent("b"), p.Agent("c")}
		s.SetFaults(func(op memstore.Op) memstore.Fault {
			if !op.Commit {
				return memstore.Fault{}
			}
			return memstore.Fault{Outcome: []memstore.Outcome{0, 0, memstore.Stored, 0, memstore.Lost, 0, memstore.Delayed}[op.N%7], After: op.N % 5}
		})
		var wg sync.WaitGroup
		var mu sync.Mutex
		got := map[alloc.Serial]string{}
		take := func(rs alloc.Ranges, who string) {
			mu.Lock()
			defer mu.Unlock()
			for _, x := range each(rs) {
				if other, ok := got[x]; ok && other != who {
					t.Errorf("%s was issued to %s and to %s", x, other, who)
				}
				got[x] = who
			}
		}
		for i, a := range agents {
			server := alloc.NewService(s, p.Clock.Now)
			for j := range 3 {
				wg.Go(func() {
					for n := range 20 {
						cmd := alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 3}
						for {
							r, err := server.Allocate(t.Context(), cmd)
							if err == nil {
								take(r, fmt.Sprint("request ", i, j, n))
								break
							}
							if r := alloc.ReasonOf(err); r != alloc.ReasonUnknownOutcome && r != alloc.ReasonConflict {
								t.Error(err)
								return
							}
						}
					}
				})
			}
			wg.Go(func() {
				for range 10 {
					r, err := server.Grant(t.Context(), alloc.GrantCommand{Mutation: a.Mutation(), Count: 3})
					if r := alloc.ReasonOf(err); err != nil && r != alloc.ReasonUnknownOutcome && r != alloc.ReasonConflict {
						t.Error(err)
						return
					}
					take(r, "host "+a.Name)
				}
			})
		}
		wg.Wait()
		s.SetFaults(nil)
		s.Settle()
	})
}
