package alloc_test

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// far is a store that takes a while, each call another one, so that callers meet at every step.
type far struct {
	alloc.Store
	mu     sync.Mutex
	random *rand.Rand // guarded by mu
}

func (f *far) travel() {
	f.mu.Lock()
	d := time.Duration(f.random.IntN(5000)) * time.Microsecond
	f.mu.Unlock()
	time.Sleep(d) // of the bubble's time
}

func (f *far) Get(ctx context.Context, keys ...alloc.Key) ([]alloc.Entry, alloc.Revision, error) {
	f.travel()
	defer f.travel()
	return f.Store.Get(ctx, keys...)
}

func (f *far) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	f.travel()
	rev, err := f.Store.Commit(ctx, tx)
	if f.travel(); err == nil && ctx.Err() != nil {
		return 0, alloc.ErrUnknownOutcome // its caller has left before the answer came
	}
	return rev, err
}

// randomFaults loses answers of commits, some of them for a while only, and refuses reads.
func randomFaults(seed uint64) func(memstore.Op) memstore.Fault {
	random := rand.New(rand.NewPCG(seed, 7)) // the store asks one call at a time
	return func(op memstore.Op) memstore.Fault {
		switch {
		case !op.Commit && random.IntN(40) == 0:
			return memstore.Fault{Outcome: memstore.Unavailable}
		case !op.Commit || random.IntN(3) > 0:
			return memstore.Fault{}
		}
		return memstore.Fault{Outcome: memstore.Outcome(random.IntN(6)), After: 1 + random.IntN(30)}
	}
}

// record lets a crowd loose on a memory store, seen through between.
func record(t *testing.T, seed uint64, faults bool, between func(alloc.Store) alloc.Store) (h *alloctest.History) {
	synctest.Test(t, func(t *testing.T) {
		s := memstore.New()
		if _, err := alloc.NewService(s, nil).InitPool(t.Context(), alloc.DefaultPolicy()); err != nil {
			t.Fatal(err)
		}
		if faults {
			s.SetFaults(randomFaults(seed))
		}
		seen := between(&far{Store: s, random: rand.New(rand.NewPCG(seed, 8))})
		one, two := alloctest.ServiceDoor(seen, nil), alloctest.ServiceDoor(seen, nil)
		h = alloctest.Crowd{
			Doors:  func(string) [2]alloctest.Door { return [2]alloctest.Door{one, two} },
			Policy: alloc.DefaultPolicy(), Now: time.Now, Faults: faults, Moves: 100, Seed: seed,
		}.Record(t)
		time.Sleep(time.Minute) // of the bubble's time: what callers left behind comes to its end
	})
	return h
}

func asItIs(s alloc.Store) alloc.Store { return s }

// TestLinearizable: whatever hosts ask at the same time, through two services over one store, some order
// of single steps of the model explains what they were answered; also when answers are lost.
func TestLinearizable(t *testing.T) {
	lost := 0
	for seed := range uint64(6) {
		t.Run("Calm", func(t *testing.T) { record(t, seed, false, asItIs).Check(t) })
		t.Run("Faults", func(t *testing.T) {
			h := record(t, seed, true, asItIs)
			h.Check(t)
			lost += h.Lost()
		})
	}
	if lost == 0 {
		t.Error("no answer was ever lost")
	}
}

// unguarded is a store that does not compare the records of one kind.
type unguarded struct {
	alloc.Store
	kind alloc.Kind
}

func (u unguarded) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	kept := tx
	kept.Guards = nil
	for _, g := range tx.Guards {
		if g.Key.Kind != u.kind {
			kept.Guards = append(kept.Guards, g)
		}
	}
	return u.Store.Commit(ctx, kept)
}

// TestHistoriesTell: histories of a pool that is broken are not linearizable, and their drawing says so.
func TestHistoriesTell(t *testing.T) {
	for kind, what := range map[alloc.Kind]string{
		alloc.KindSandbox: "the history of sandboxes", alloc.KindCounter: "the history of serials",
	} {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			for seed := range uint64(10) {
				problem := record(t, seed, false, func(s alloc.Store) alloc.Store { return unguarded{s, kind} }).Problem()
				for i, drawn := range strings.Split(problem, "drawn in ") {
					if html, _, ok := strings.Cut(drawn, ":"); i > 0 && ok {
						defer os.RemoveAll(filepath.Dir(html))
					}
				}
				if !strings.Contains(problem, what) {
					continue
				}
				_, path, _ := strings.Cut(problem, "drawn in ")
				path, _, _ = strings.Cut(path, ":")
				html, err := os.ReadFile(path)
				if err != nil || !strings.Contains(string(html), "<svg") {
					t.Errorf("%s: the drawing: %v", problem, err)
				}
				return
			}
			t.Error("a store that does not compare was not found out")
		})
	}
}
