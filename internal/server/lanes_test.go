package server

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// TestLaneLost: an operator learns that a copy of a server is at work, and callers notice nothing.
func TestLaneLost(t *testing.T) {
	mem := memstore.New()
	initPool(t, mem)
	r := start(t, Config{Store: mem})
	c := r.dial("")
	got := map[alloc.Serial]bool{}
	issue := func() {
		t.Helper()
		rs, err := c.Serials(t.Context(), 3)
		if err != nil {
			t.Fatal(err)
		}
		for s := range rs.All() {
			if got[s] {
				t.Errorf("%s was issued twice", s)
			}
			got[s] = true
		}
	}
	lane := func() *alloc.Lane {
		entries, _, err := mem.List(t.Context(), alloc.KindLane, "", 10, 0)
		if err != nil || len(entries) == 0 {
			t.Fatal(entries, err)
		}
		return entries[0].Record.(*alloc.Lane)
	}
	issue()
	theirs := *lane()
	theirs.Nonce = "another copy's"
	if _, err := mem.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{&theirs}}); err != nil {
		t.Fatal(err)
	}
	issue()
	families, err := r.metrics.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	lost := map[string]float64{}
	for _, f := range families {
		if f.GetName() == "nsalloc_lanes_lost_total" {
			for _, m := range f.GetMetric() {
				lost[m.GetLabel()[0].GetValue()] = m.GetCounter().GetValue()
			}
		}
	}
	if lost[laneTaken] != 1 || lost[laneSwept] != 0 || len(lost) != 2 {
		t.Errorf("lanes lost: %v", lost)
	}
	if text := r.log.String(); !strings.Contains(text, theirs.ID) || !strings.Contains(text, "another copy of this server") {
		t.Errorf("the log says %s", text)
	}
	if _, err := mem.Commit(t.Context(), alloc.Tx{Delete: []alloc.Key{theirs.Key()}}); err != nil {
		t.Fatal(err)
	}
}

// stuck is a store whose commits wait.
type stuck struct {
	*memstore.Store
	gate chan struct{}
}

func (s *stuck) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	select {
	case <-s.gate:
		return s.Store.Commit(ctx, tx)
	case <-ctx.Done():
		return 0, &alloc.Error{Reason: alloc.ReasonUnknownOutcome, Err: ctx.Err()}
	}
}

// TestTurnDoesNotCome: a caller whose turn does not come hears that nothing was issued, and when to try again,
// before its own deadline.
func TestTurnDoesNotCome(t *testing.T) {
	mem := memstore.New()
	initPool(t, mem)
	st := &stuck{Store: mem, gate: make(chan struct{})}
	r := start(t, Config{Store: st})
	c := r.dial("")
	// Sooner or later all lanes hang in a commit, or wait for one that does.
	var calls sync.WaitGroup
	deadline := time.Now().Add(30 * time.Second)
	for told := false; !told; {
		if time.Now().After(deadline) {
			t.Fatal("every call's turn came")
		}
		for range 3 {
			calls.Go(func() {
				_, err := c.Allocate(t.Context(), alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 1})
				if err != nil && !client.Again(err) {
					t.Error(err)
				}
			})
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		_, err := c.Allocate(ctx, alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 1})
		var e *alloc.Error
		told = errors.As(err, &e) && e.Reason == alloc.ReasonExhausted && e.RetryAfter > 0 && client.Again(err) && ctx.Err() == nil
		cancel()
	}
	close(st.gate)
	calls.Wait()
}

// TestPoolLevel: what is left, and how fast it goes, as a client and as Prometheus see it.
func TestPoolLevel(t *testing.T) {
	mem := memstore.New()
	initPool(t, mem)
	r := start(t, Config{Store: mem})
	began := time.Now()
	var passed atomic.Int64
	r.view.mu.Lock()
	r.view.now = func() time.Time { return began.Add(time.Duration(passed.Load())) }
	r.view.mu.Unlock()
	c := r.dial("")
	take := func(n uint64) client.PoolStatus {
		t.Helper()
		if _, err := c.Serials(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Sandbox(t.Context(), 1<<48+1, true); !errors.Is(err, alloc.ErrSerialNotFound) && !errors.Is(err, alloc.ErrSandboxNotFound) {
			t.Fatal(err) // a linearizable read: the view has what was committed
		}
		s, err := c.PoolStatus(t.Context())
		if err != nil || s.Level == nil || s.Pool.Generation != 1 {
			t.Fatalf("%+v, %v", s, err)
		}
		return s
	}
	first := take(alloc.MaxAllocate)
	if first.Level.Left != alloc.MaxCounter-first.Level.Next+1 || first.Level.Next <= alloc.MaxAllocate || first.Level.Generations != int(alloc.MaxGeneration)-1 {
		t.Errorf("%+v", first.Level)
	}
	passed.Store(int64(1000 * time.Second))
	second := take(alloc.MaxAllocate)
	if l := second.Level; l.Over < 1000*time.Second || l.Burn < 900 || l.Burn > 1100*2 || l.Next <= first.Level.Next {
		t.Errorf("%+v", l)
	}
	// A host that has used a quarter of its quota.
	hostRecord := &alloc.Host{Name: "a", Nonce: "n", Quota: alloc.Quota{Since: began, Used: alloc.DefaultHostQuota / 4}}
	if _, err := mem.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{hostRecord}}); err != nil {
		t.Fatal(err)
	}
	take(1)
	if got := r.gauge("nsalloc_host_quota_used_max_ratio", ""); got != 0.25 {
		t.Errorf("of its quota a host has used %v", got)
	}
	// Near the end of the generation.
	if _, err := mem.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{&alloc.Counter{Generation: 1, Next: alloc.MaxCounter - 99}}}); err != nil {
		t.Fatal(err)
	}
	_, err := c.Serials(t.Context(), alloc.MaxAllocate)
	if !errors.Is(err, alloc.ErrExhausted) || !strings.Contains(err.Error(), "nsalloc mend counter --force") || client.Again(err) {
		t.Errorf("no serials are left: %v", err)
	}
}
