package witness

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// TestReadBack: what was committed, and is acknowledged because it was read in the store, is covered by the
// witness of the server that says so, whether it wrote it itself or another one did: a store that forgets it is
// found out.
func TestReadBack(t *testing.T) {
	for _, n := range []uint64{3, 5000} { // of the lane's range, and of the counter
		for _, elsewhere := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d serials, at another server %v", n, elsewhere), func(t *testing.T) {
				w, x := newWorld(t, alloc.UnheardWait), issued{}
				writer, other := w.begin(w.p, t.TempDir(), "s1"), w.begin(w.p, t.TempDir(), "s2")
				x.take(t, other, 3)
				x.take(t, writer, 3)
				old := snapshot(t, w.p)
				var lost atomic.Bool
				w.p.store().SetFaults(func(op memstore.Op) memstore.Fault {
					switch {
					case op.Commit && lost.CompareAndSwap(false, true):
						return memstore.Fault{Outcome: memstore.Stored}
					case elsewhere && lost.Load():
						return memstore.Fault{Outcome: memstore.Unavailable} // until the writer has given up
					}
					return memstore.Fault{}
				})
				cmd := alloc.AllocateCommand{RequestID: alloctest.RequestID(time.Now().Add(-time.Second), 1<<42), Caller: "c", Count: n}
				got, err := writer.Allocate(t.Context(), cmd)
				if elsewhere {
					if alloc.ReasonOf(err) != alloc.ReasonUnknownOutcome {
						t.Fatalf("the answer was lost, and it says %v, %v", got, err)
					}
					w.p.store().SetFaults(nil)
					got, err = other.Allocate(t.Context(), cmd)
				}
				if err != nil {
					t.Fatal(err)
				}
				for s := range got.All() {
					x[s] = true
				}
				w.p.back(old)
				writer.Connected()
				other.Connected()
				for range 3 {
					x.take(t, writer, n)
					x.take(t, other, n)
				}
				w.open(2)
			})
		}
	}
}

// TestPutBackAfterRaising: a generation that a server has taken covers the connections of before it only: what others
// have issued in it since may be forgotten by the time that it looks again.
func TestPutBackAfterRaising(t *testing.T) {
	w, x := newWorld(t, alloc.UnheardWait), issued{}
	one, two := w.begin(w.p, t.TempDir(), "one"), w.begin(w.p, t.TempDir(), "two")
	x.take(t, one, 3)
	x.take(t, two, 3)
	closed := *w.pool()
	closed.State, closed.Target = alloc.PoolRecovering, 2
	if _, err := w.p.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{&closed}}); err != nil {
		t.Fatal(err)
	}
	var raised atomic.Bool
	w.p.afterCommit(func(tx alloc.Tx) {
		for _, rec := range tx.Put {
			if p, ok := rec.(*alloc.Pool); ok && p.Generation == 2 && raised.CompareAndSwap(false, true) {
				old := snapshot(t, w.p)
				two.Connected()
				x.take(t, two, 3)
				w.p.back(old)
				one.Connected()
			}
		}
	})
	one.Connected()
	one.looks()
	if !raised.Load() {
		t.Fatal("no generation was taken")
	}
	for range 3 {
		if got, err := one.allocate(t, 3); err == nil {
			for s := range got.All() {
				if x[s] {
					t.Fatalf("%s was acknowledged twice", s)
				}
			}
		}
	}
}

// TestManyServers: a pool takes as many servers as the others can remember; those that were removed do not count, while
// one read gives all records.
func TestManyServers(t *testing.T) {
	for name, c := range map[string]struct {
		listed, removed int
		says            string
	}{
		"one more":            {alloc.MaxServers - 1, 500, ""},
		"as many as it takes": {alloc.MaxServers, 0, "nsalloc server remove NAME"},
		"names are used up":   {0, 1000 - alloc.MaxServers, "--name gone"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, alloc.UnheardNewGeneration)
			for n := range c.listed + c.removed {
				rec := &alloc.Server{Name: fmt.Sprintf("gone%d", n), Incarnation: 1, Nonce: "n", Removed: 1}
				if n < c.listed {
					rec.Removed = 0
				}
				if _, err := w.p.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{rec}}); err != nil {
					t.Fatal(err)
				}
			}
			l := w.begin(w.p, t.TempDir(), "new")
			_, err := l.allocate(t, 1)
			if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
				t.Errorf("a new one: %v", err)
			}
		})
	}
}
