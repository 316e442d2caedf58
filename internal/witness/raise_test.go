package witness

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// TestPutBack: a store that is put back to a snapshot is found out at the next write, at any depth: nothing
// is acknowledged from it, and the pool opens by itself in a generation that nobody has issued in. Twice in a row
// it waits, or an operator opens it.
func TestPutBack(t *testing.T) {
	for _, depth := range []int{1, 2, 50} {
		for _, how := range []string{"under the server", "with a new connection", "with a new process"} {
			for _, moved := range []bool{false, true} {
				t.Run(fmt.Sprintf("%d writes, %s, the counter moved: %v", depth, how, moved), func(t *testing.T) {
					w, dir, x := newWorld(t, alloc.UnheardWait), t.TempDir(), issued{}
					l := w.begin(w.p, dir, "s1")
					x.take(t, l, 3)
					other := w.begin(w.p, t.TempDir(), "s2")
					x.take(t, other, 3)
					old := snapshot(t, w.p)
					for range depth {
						x.take(t, l, 3)
					}
					if moved {
						x.take(t, l, 2000)
					}
					w.p.back(snapshot(t, old))
					switch how {
					case "with a new connection":
						l.Connected()
					case "with a new process":
						w.ends(l)
						l = w.begin(w.p, dir, "s1")
					}
					for range 3 {
						x.take(t, l, 3)
						x.take(t, other, 3)
					}
					w.open(2)
					alloctest.Check(t, w.p)

					// The same snapshot once more: the generation that it comes to was seen, and so was when it was taken.
					w.p.back(snapshot(t, old))
					w.passes(alloc.RaiseEvery - time.Second)
					l.Connected()
					for range 3 {
						w.refused(l, "generation 2", "10 minutes", "nsalloc pool recover")
						w.refused(other, "not before")
					}
					if pool := w.pool(); pool.State != alloc.PoolRecovering || pool.Generation != 1 || pool.Target != 3 {
						t.Errorf("while it waits the pool is %+v", pool)
					}
					if moved { // an operator does not wait
						if _, err := l.Mend(t.Context(), alloc.MendCommand{RequestID: alloctest.RequestID(time.Now(), 1<<41), Kind: alloc.KindCounter}); err != nil {
							t.Fatal(err)
						}
					} else {
						w.passes(2 * time.Second)
						w.again(l)
					}
					w.again(other)
					for range 3 {
						x.take(t, l, 3)
						x.take(t, other, 3)
					}
					w.open(3)
				})
			}
		}
	}
}

// TestClosedByAnybody: a pool that is closed by another server, or because of what a host has seen, opens by
// itself, not before the generation that was named, and once: all servers look.
func TestClosedByAnybody(t *testing.T) {
	for _, watches := range []bool{false, true} {
		t.Run(fmt.Sprintf("watches %v", watches), func(t *testing.T) {
			w, x := newWorld(t, alloc.UnheardNewGeneration), issued{}
			one, two := w.begin(w.p, t.TempDir(), "one"), w.begin(w.p, t.TempDir(), "two")
			x.take(t, one, 3)
			x.take(t, two, 3)
			if watches {
				w.runs(one)
				w.runs(two)
			}
			closed := *w.pool()
			closed.State, closed.Target = alloc.PoolRecovering, 7
			var err error
			if watches { // by somebody else
				_, err = w.p.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{&closed}})
			} else {
				_, err = one.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{&closed}})
			}
			if err != nil {
				t.Fatal(err)
			}
			if watches {
				eventually(t, func() bool { return w.pool().State == alloc.PoolOpen })
			}
			for range 3 {
				w.again(two)
				x.take(t, one, 3)
			}
			w.open(7)
			if n := one.Standing().Raised + two.Standing().Raised; n != 1 {
				t.Errorf("it was raised %d times", n)
			}
			alloctest.Check(t, w.p)
		})
	}
}

// runs has a server do what it does by itself, with a watch, until the test ends.
func (w *world) runs(l *life) {
	ctx, cancel := context.WithCancel(w.Context())
	var wg sync.WaitGroup
	from, err := l.Sync(ctx)
	if err != nil {
		w.Fatal(err)
	}
	wg.Go(func() { l.Run(ctx) })
	wg.Go(func() { _ = l.Watch(ctx, from, func(alloc.Revision, []alloc.Change) {}) })
	w.Cleanup(func() { cancel(); wg.Wait() })
}

// TestWatched: what other servers do is on a server's disk soon, although it does nothing itself.
func TestWatched(t *testing.T) {
	w, x := newWorld(t, alloc.UnheardWait), issued{}
	busy, idle := w.begin(w.p, t.TempDir(), "busy"), w.begin(w.p, t.TempDir(), "idle")
	x.take(t, idle, 1)
	w.runs(idle)
	x.take(t, busy, 5000)
	eventually(t, func() bool {
		seen := idle.file.Seen()
		return seen.Counter > 5000 && seen.Others["busy"] == Peer{"at busy", 1}
	})
	w.ends(busy)
	if _, err := idle.RemoveServer(t.Context(), "busy", 1); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { _, ok := idle.Known("busy"); return !ok })
	w.open(1)
}

// TestRemovedComesBack: a server that was removed is listed again when it comes back, and is verified as always;
// one that was removed while it lives begins another life.
func TestRemovedComesBack(t *testing.T) {
	w, dir, x := newWorld(t, alloc.UnheardWait), t.TempDir(), issued{}
	stays, gone := w.begin(w.p, t.TempDir(), "stays"), w.begin(w.p, dir, "gone")
	x.take(t, stays, 1)
	for range 5 {
		x.take(t, gone, 1)
	}
	w.ends(gone)
	old := snapshot(t, w.p)
	for range 2 { // repeated it is the same
		if _, err := stays.RemoveServer(t.Context(), "gone", 1); err != nil {
			t.Fatal(err)
		}
	}
	gone = w.begin(w.p, dir, "gone")
	x.take(t, gone, 1)
	w.open(1)
	if _, err := stays.RemoveServer(t.Context(), "gone", 1); err == nil {
		t.Error("a life after the one that was to be removed was removed")
	}
	w.runs(gone)
	if _, err := stays.RemoveServer(t.Context(), "gone", 2); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool {
		_, err := gone.allocate(t, 1)
		return err == nil && gone.file.Seen().Incarnation == 3
	})
	w.open(1)
	// It is not listed in a snapshot of before; who has seen it asks it.
	stays.Connected()
	x.take(t, stays, 1)
	w.p.back(old)
	stays.Connected()
	x.take(t, stays, 1)
	w.open(2)
}

// TestConnectedWhileRaising: a connection that is made while the others are asked is covered by the generation that is
// taken then: it needs no other one, which would have to wait for minutes.
func TestConnectedWhileRaising(t *testing.T) {
	w, x := newWorld(t, alloc.UnheardNewGeneration), issued{}
	gone, stays := w.begin(w.p, t.TempDir(), "gone"), w.begin(w.p, t.TempDir(), "stays")
	x.take(t, gone, 1)
	x.take(t, stays, 1)
	w.ends(gone)
	var once sync.Once
	stays.asks = func(ctx context.Context, address string, q alloc.Question) (alloc.Testimony, error) {
		once.Do(stays.Connected)
		return w.ask(ctx, address, q)
	}
	stays.Connected()
	stays.looks()
	x.take(t, stays, 1)
	w.open(2)
	// The next one is not: the store may have been put back since.
	stays.Connected()
	w.refused(stays, "nsalloc server remove gone")
}

// TestFewGenerations: with few generations left only an operator takes one.
func TestFewGenerations(t *testing.T) {
	w, x := newWorld(t, alloc.UnheardWait), issued{}
	l := w.begin(w.p, t.TempDir(), "s1")
	x.take(t, l, 3)
	closed := *w.pool()
	closed.State, closed.Target = alloc.PoolRecovering, alloc.MaxGeneration-1023
	if _, err := l.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{&closed}}); err != nil {
		t.Fatal(err)
	}
	w.refused(l, "nsalloc pool recover", "fewer than 1024")
	if _, err := l.Mend(t.Context(), alloc.MendCommand{RequestID: alloctest.RequestID(time.Now(), 1<<41), Kind: alloc.KindCounter}); err != nil {
		t.Fatal(err)
	}
	x.take(t, l, 3)
	w.open(alloc.MaxGeneration - 1023)
}

// TestSixInARow: a server that is down while etcd's members are upgraded one after the other does not keep the others
// from going on, and a store that is put back again and again does not use up the generations.
func TestSixInARow(t *testing.T) {
	w, x := newWorld(t, alloc.UnheardNewGeneration), issued{}
	w.raisable(alloc.RaiseBurst)
	gone, stays := w.begin(w.p, t.TempDir(), "gone"), w.begin(w.p, t.TempDir(), "stays")
	x.take(t, gone, 1)
	w.ends(gone)
	for g := range alloc.Generation(alloc.RaiseBurst) {
		stays.Connected()
		x.take(t, stays, 1)
		w.open(g + 2)
	}
	for g := range alloc.Generation(2) {
		stays.Connected()
		w.refused(stays, "10 minutes", "6 in a row", "nsalloc server remove gone")
		w.passes(alloc.RaiseEvery)
		w.again(stays)
		w.open(alloc.RaiseBurst + g + 2)
	}
	w.passes(alloc.RaiseBurst * alloc.RaiseEvery)
	for range alloc.RaiseBurst {
		stays.Connected()
		x.take(t, stays, 1)
	}
	stays.Connected()
	w.refused(stays, "6 in a row")
}

// TestClockSetBack: a raise that lies in the future counts from when it was seen first.
func TestClockSetBack(t *testing.T) {
	w, x := newWorld(t, alloc.UnheardWait), issued{}
	l := w.begin(w.p, t.TempDir(), "s1")
	x.take(t, l, 3)
	closed := *w.pool()
	closed.State, closed.Raised = alloc.PoolRecovering, w.now().Add(365*24*time.Hour)
	if _, err := l.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{&closed}}); err != nil {
		t.Fatal(err)
	}
	w.refused(l, "not before")
	w.passes(alloc.RaiseEvery - time.Second)
	w.refused(l, "not before")
	w.passes(2 * time.Second)
	w.again(l)
	w.open(2)
}
