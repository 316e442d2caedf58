package alloc_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
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
