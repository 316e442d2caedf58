package client

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

// issuer is a server's Allocate that takes a moment. answer says what becomes of the n-th request.
type issuer struct {
	nsallocv1.AllocatorClient
	answer func(n int) error

	mu     sync.Mutex
	next   alloc.Serial
	issued map[string]alloc.Ranges
	counts []uint64
	ids    []string
	flying atomic.Int32
	many   bool // requests at once are right
}

func (s *issuer) Allocate(ctx context.Context, req *nsallocv1.AllocateRequest, _ ...grpc.CallOption) (*nsallocv1.AllocateResponse, error) {
	if s.flying.Add(1) > 1 && !s.many {
		return nil, errors.New("two requests at once")
	}
	defer s.flying.Add(-1)
	s.mu.Lock()
	n := len(s.ids)
	s.ids, s.counts = append(s.ids, req.GetRequestId()), append(s.counts, req.GetCount())
	got, ok := s.issued[req.GetRequestId()]
	if !ok {
		// In two ranges, as at the end of a lane's.
		half := req.GetCount() / 2
		if half > 0 {
			got = append(got, alloc.Range{First: s.next, Count: half})
		}
		got = append(got, alloc.Range{First: s.next + 1000_000_000, Count: req.GetCount() - half})
		s.next += alloc.Serial(req.GetCount())
		s.issued[req.GetRequestId()] = got
	}
	s.mu.Unlock()
	select {
	case <-time.After(time.Millisecond):
	case <-ctx.Done():
		return nil, &alloc.Error{Reason: alloc.ReasonUnknownOutcome, Err: ctx.Err()}
	}
	if s.answer != nil {
		if err := s.answer(n); err != nil {
			return nil, err
		}
	}
	return &nsallocv1.AllocateResponse{Ranges: wire.RangesToWire(got)}, nil
}

func gathering(t *testing.T, answer func(n int) error, f func(t *testing.T, c *Client, s *issuer)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &issuer{answer: answer, next: 1<<48 + 1, issued: map[string]alloc.Ranges{}}
		f(t, &Client{allocator: s}, s)
	})
}

// taken counts serials, and finds those that were handed out twice.
type taken struct {
	mu  sync.Mutex
	all map[alloc.Serial]bool
}

func (x *taken) add(t *testing.T, got alloc.Ranges, n uint64) {
	t.Helper()
	x.mu.Lock()
	defer x.mu.Unlock()
	if got.Count() != n {
		t.Errorf("asked for %d, got %v", n, got)
	}
	for s := range got.All() {
		if x.all[s] {
			t.Errorf("%s was handed out twice", s)
		}
		x.all[s] = true
	}
}

func TestSerialsGather(t *testing.T) {
	// Every third answer is lost, and some are refusals that pass.
	gathering(t, func(n int) error {
		switch n % 6 {
		case 1, 4:
			return refusal(alloc.ReasonUnknownOutcome, 0)
		case 2:
			return refusal(alloc.ReasonUnavailable, 0)
		}
		return nil
	}, func(t *testing.T, c *Client, s *issuer) {
		got := taken{all: map[alloc.Serial]bool{}}
		var wg sync.WaitGroup
		const callers, each = 300, 10
		var want uint64
		for i := range callers {
			n := uint64(1 + i%5)
			want += n * each
			wg.Go(func() {
				for range each {
					r, err := c.Serials(t.Context(), n)
					if err != nil {
						t.Error(err)
						return
					}
					got.add(t, r, n)
				}
			})
		}
		wg.Wait()
		if uint64(len(got.all)) != want {
			t.Errorf("%d serials, want %d", len(got.all), want)
		}
		if uint64(s.next) != 1<<48+1+want {
			t.Errorf("%d were issued, %d handed out", uint64(s.next)-1<<48-1, want)
		}
		if len(s.ids) > 10*each { // of 3,000 calls
			t.Errorf("%d requests", len(s.ids))
		}
	})
}

// TestSerialsLeave: who leaves gets nothing, and nobody gets what was for them.
func TestSerialsLeave(t *testing.T) {
	gathering(t, nil, func(t *testing.T, c *Client, s *issuer) {
		got := taken{all: map[alloc.Serial]bool{}}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		ask := func(ctx context.Context, leaves bool) {
			wg.Go(func() {
				r, err := c.Serials(ctx, 3)
				switch {
				case leaves && (!errors.Is(err, alloc.ErrUnavailable) || !errors.Is(err, context.Canceled)):
					t.Errorf("who left got %v, %v", r, err)
				case !leaves && err != nil:
					t.Error(err)
				case !leaves:
					got.add(t, r, 3)
				}
			})
			synctest.Wait()
		}
		ask(t.Context(), false) // on its way
		ask(t.Context(), false)
		ask(ctx, true)
		ask(t.Context(), false)
		cancel()
		wg.Wait()
		if len(got.all) != 9 || len(s.ids) != 2 {
			t.Errorf("%d serials in %d requests", len(got.all), len(s.ids))
		}
		if _, err := c.Serials(ctx, 1); !errors.Is(err, context.Canceled) {
			t.Errorf("who had left: %v", err)
		}

		// When all leave the request is given up, and the next one is answered.
		ctx, cancel = context.WithCancel(t.Context())
		ask(ctx, true)
		ask(ctx, true)
		cancel()
		wg.Wait()
		ask(t.Context(), false)
		wg.Wait()
	})
}

func TestSerialsRefused(t *testing.T) {
	gathering(t, func(int) error { return refusal(alloc.ReasonExhausted, 0) }, func(t *testing.T, c *Client, s *issuer) {
		for _, n := range []uint64{0, alloc.MaxAllocate + 1, 1<<64 - 1} {
			if _, err := c.Serials(t.Context(), n); !errors.Is(err, alloc.ErrInvalid) {
				t.Errorf("%d: %v", n, err)
			}
		}
		s.many = true // each asks for itself when all together were too much
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() {
				if _, err := c.Serials(t.Context(), 1); !errors.Is(err, alloc.ErrExhausted) {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	})
	gathering(t, nil, func(t *testing.T, c *Client, s *issuer) {
		// More than one request can have makes two.
		var wg sync.WaitGroup
		for _, n := range []uint64{1, alloc.MaxAllocate - 1, 2, alloc.MaxAllocate} {
			wg.Go(func() {
				if r, err := c.Serials(t.Context(), n); err != nil || r.Count() != n {
					t.Errorf("%d: %v, %v", n, r, err)
				}
			})
			synctest.Wait()
		}
		wg.Wait()
		if len(s.counts) != 4 {
			t.Errorf("requests of %v", s.counts)
		}
	})
}

// TestSerialsOfManyAtTheEnd: what one asks for in vain takes nothing from the others of its batch.
func TestSerialsOfManyAtTheEnd(t *testing.T) {
	var s *issuer
	left := uint64(50)
	gathering(t, func(n int) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.counts[n] > left {
			return refusal(alloc.ReasonExhausted, 0)
		}
		left -= s.counts[n]
		return nil
	}, func(t *testing.T, c *Client, is *issuer) {
		s = is
		s.many = true
		var wg sync.WaitGroup
		var refused atomic.Int32
		for i := range 30 {
			n := uint64(1)
			if i == 7 {
				n = 1000
			}
			wg.Go(func() {
				if _, err := c.Serials(t.Context(), n); err != nil {
					if !errors.Is(err, alloc.ErrExhausted) || n == 1 {
						t.Errorf("%d: %v", n, err)
					}
					refused.Add(1)
				}
			})
		}
		wg.Wait()
		if refused.Load() != 1 {
			t.Errorf("%d were refused", refused.Load())
		}
	})
}

// TestSerialsExpired: a request that was unknown for so long that nobody can tell is made anew.
func TestSerialsExpired(t *testing.T) {
	gathering(t, func(n int) error {
		switch n {
		case 0:
			return refusal(alloc.ReasonUnknownOutcome, 0)
		case 1:
			return refusal(alloc.ReasonRequestExpired, 0)
		}
		return nil
	}, func(t *testing.T, c *Client, s *issuer) {
		if r, err := c.Serials(t.Context(), 3); err != nil || r.Count() != 3 || s.ids[0] != s.ids[1] || s.ids[2] == s.ids[1] {
			t.Errorf("%v, %v; asked as %v", r, err, s.ids)
		}
	})
	gathering(t, func(int) error { return refusal(alloc.ReasonRequestExpired, 0) }, func(t *testing.T, c *Client, s *issuer) {
		if _, err := c.Serials(t.Context(), 3); !errors.Is(err, alloc.ErrRequestExpired) {
			t.Errorf("a clock that is far behind: %v", err)
		}
	})
}

// TestSerialsClosed: Close ends what waits, and what comes.
func TestSerialsClosed(t *testing.T) {
	gathering(t, func(int) error { return refusal(alloc.ReasonUnavailable, 0) }, func(t *testing.T, c *Client, s *issuer) {
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if _, err := c.Serials(t.Context(), 3); !errors.Is(err, ErrClosed) {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		c.gather.close()
		wg.Wait()
		if _, err := c.Serials(t.Context(), 3); !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
	})
}

func TestCut(t *testing.T) {
	ranges := alloc.Ranges{{First: 10, Count: 3}, {First: 20, Count: 1}, {First: 30, Count: 5}}
	var all []alloc.Serial
	for s := range ranges.All() {
		all = append(all, s)
	}
	for skip := range uint64(len(all)) {
		for n := uint64(1); skip+n <= uint64(len(all)); n++ {
			i := skip
			for s := range cut(ranges, skip, n).All() {
				if s != all[i] {
					t.Errorf("cut(%d, %d) is %v", skip, n, cut(ranges, skip, n))
				}
				i++
			}
			if i != skip+n {
				t.Errorf("cut(%d, %d) is %v", skip, n, cut(ranges, skip, n))
			}
		}
	}
}
