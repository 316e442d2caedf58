package witness

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// world is servers that can ask each other, and a clock.
type world struct {
	*testing.T
	p *put

	mu    sync.Mutex
	at    map[string]*life // by address
	clock time.Time
	log   bytes.Buffer
}

func newWorld(t *testing.T, unheard alloc.Unheard) *world {
	t.Helper()
	w := &world{T: t, p: &put{now: memstore.New()}, at: map[string]*life{}, clock: time.Now()}
	policy := alloc.DefaultPolicy()
	policy.UnheardWitness = unheard
	if _, err := alloc.NewService(w.p, w.now).InitPool(t.Context(), policy); err != nil {
		t.Fatal(err)
	}
	w.raisable(1)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the servers say\n%s", w.said())
		}
	})
	return w
}

// raisable has the servers take that many generations more by themselves before they have to wait.
func (w *world) raisable(n int) {
	w.Helper()
	p := *w.pool()
	p.Raised = w.now().Add(time.Duration(alloc.RaiseBurst-n) * alloc.RaiseEvery)
	if _, err := w.p.Commit(w.Context(), alloc.Tx{Put: []alloc.Record{&p}}); err != nil {
		w.Fatal(err)
	}
}

func (w *world) Write(p []byte) (int, error) { w.mu.Lock(); defer w.mu.Unlock(); return w.log.Write(p) }
func (w *world) said() string                { w.mu.Lock(); defer w.mu.Unlock(); return w.log.String() }
func (w *world) now() time.Time              { w.mu.Lock(); defer w.mu.Unlock(); return w.clock }
func (w *world) passes(d time.Duration)      { w.mu.Lock(); defer w.mu.Unlock(); w.clock = w.clock.Add(d) }

// ask is an Asker.
func (w *world) ask(ctx context.Context, address string, q alloc.Question) (alloc.Testimony, error) {
	w.mu.Lock()
	l := w.at[address]
	w.mu.Unlock()
	if l == nil {
		return alloc.Testimony{}, errors.New("nobody is there")
	}
	return l.Answer(ctx, q)
}

// begin starts a server that has a directory, over a store.
func (w *world) begin(p alloc.Store, dir, name string) *life {
	w.Helper()
	file, _, err := Open(dir)
	if err != nil {
		w.Fatal(err)
	}
	s, err := New(p, name, file, slog.New(slog.NewTextHandler(w, nil)).With("says", name), w.now)
	if err != nil {
		w.Fatal(err)
	}
	s.Join("at "+name, w.ask)
	s.patience = 100 * time.Millisecond
	w.Cleanup(func() { s.Close(); _ = file.Close() })
	l := &life{s, alloc.NewService(s, nil), file}
	w.mu.Lock()
	w.at["at "+name] = l
	w.mu.Unlock()
	return l
}

// ends makes a server one that nobody hears.
func (w *world) ends(l *life) {
	w.mu.Lock()
	delete(w.at, l.address)
	w.mu.Unlock()
	l.Store.Close()
	_ = l.file.Close()
}

// pool is as the store has it.
func (w *world) pool() *alloc.Pool {
	w.Helper()
	pool, _, err := alloc.NewService(w.p, nil).Pool(w.Context())
	if err != nil {
		w.Fatal(err)
	}
	return pool
}

// open fails unless the pool is open in a generation.
func (w *world) open(g alloc.Generation) {
	w.Helper()
	if pool := w.pool(); pool.Generation != g || pool.State != alloc.PoolOpen || pool.Target != 0 {
		w.Errorf("the pool is %s in generation %d, target %d; want open in %d", pool.State, pool.Generation, pool.Target, g)
	}
}

// refused fails unless a server issues nothing and says these words.
func (w *world) refused(l *life, words ...string) {
	w.Helper()
	got, err := l.allocate(w.T, 3)
	e, ok := errors.AsType[*alloc.Error](err)
	if !errors.Is(err, alloc.ErrRecovering) || !ok || e.RetryAfter == 0 {
		w.Fatalf("server %s answered %v, %v", l.name, got, err)
	}
	l.looks()
	said := err.Error() + "\n" + l.Standing().Why
	for _, word := range words {
		if !strings.Contains(said, word) {
			w.Errorf("it does not say %q: %s", word, said)
		}
	}
	if st := l.Standing(); st.Trusts || st.Why == "" {
		w.Errorf("it refuses, and says of itself %+v", st)
	}
}

// looks is what Run does each second.
func (l *life) looks() { _, _ = l.sound(context.Background()) }

// again waits until a server that waited issues again.
func (w *world) again(l *life) {
	w.Helper()
	eventually(w.T, func() bool { l.looks(); _, err := l.allocate(w.T, 1); return err == nil })
}

// TestIdleServer: a store that was put back is found out also where the server that connects first has seen
// nothing of what is lost, because it asks the one that has.
func TestIdleServer(t *testing.T) {
	for _, how := range []string{"a new connection", "a new process"} {
		t.Run(how, func(t *testing.T) {
			w, dir, x := newWorld(t, alloc.UnheardWait), t.TempDir(), issued{}
			busy, idle := w.begin(w.p, t.TempDir(), "busy"), w.begin(w.p, dir, "idle")
			x.take(t, busy, 1)
			x.take(t, idle, 1)
			w.open(1)
			old := snapshot(t, w.p)
			for range 20 {
				x.take(t, busy, 300) // moves the counter, which idle does not watch here
			}
			w.p.back(old)
			if how == "a new process" {
				w.ends(idle)
				idle = w.begin(w.p, dir, "idle")
			} else {
				idle.Connected()
			}
			for range 10 {
				x.take(t, idle, 2000)
			}
			w.open(2)
			for range 10 {
				x.take(t, busy, 300)
				x.take(t, idle, 300)
			}
			w.open(2)
			if st := idle.Standing(); !st.Trusts || st.Raised != 1 || len(st.Others) != 1 || st.Others[0].Says != alloc.SaysBehind || st.Others[0].Server != "busy" {
				t.Errorf("idle says of itself %+v", st)
			}
			alloctest.Check(t, w.p)
		})
	}
}

// TestUnheard: another server that is not heard may have seen more.
func TestUnheard(t *testing.T) {
	begin := func(t *testing.T, unheard alloc.Unheard, back bool) (w *world, dir string, idle *life, x issued) {
		w, dir, x = newWorld(t, unheard), t.TempDir(), issued{}
		busy := w.begin(w.p, dir, "busy")
		idle = w.begin(w.p, t.TempDir(), "idle")
		x.take(t, busy, 1)
		x.take(t, idle, 1)
		old := snapshot(t, w.p)
		for range 20 {
			x.take(t, busy, 300)
		}
		w.ends(busy)
		if back {
			w.p.back(old)
		}
		idle.Connected()
		return w, dir, idle, x
	}
	for _, back := range []bool{false, true} {
		t.Run("a new generation", func(t *testing.T) {
			w, dir, idle, x := begin(t, alloc.UnheardNewGeneration, back)
			for range 10 {
				x.take(t, idle, 2000)
			}
			w.open(2)
			busy := w.begin(w.p, dir, "busy")
			x.take(t, busy, 10)
			w.open(2) // it follows
			w.ends(busy)
			busy = w.begin(w.p, dir, "busy")
			x.take(t, busy, 10)
			// One that is gone for long keeps the next connection waiting, and not for ever.
			w.ends(busy)
			idle.Connected()
			w.refused(idle, "busy (at busy)", "nsalloc server remove busy", "nsalloc pool recover", "not before")
			w.open(2) // and nobody else is disturbed
			busy = w.begin(w.p, dir, "busy")
			x.take(t, busy, 1)
			w.again(idle)
			w.open(2)
			alloctest.Check(t, w.p)
		})
	}
	t.Run("wait until it is heard", func(t *testing.T) {
		w, dir, idle, x := begin(t, alloc.UnheardWait, true)
		w.refused(idle, "busy (at busy)", "nsalloc server remove busy", "wait")
		w.passes(24 * time.Hour)
		w.refused(idle, "busy (at busy)")
		w.open(1)
		busy := w.begin(w.p, dir, "busy")
		for range 10 {
			x.take(t, busy, 2000)
		}
		w.again(idle)
		w.open(2)
		alloctest.Check(t, w.p)
	})
	t.Run("wait until it is removed", func(t *testing.T) {
		w, _, idle, x := begin(t, alloc.UnheardWait, false)
		w.refused(idle, "nsalloc server remove busy")
		life, ok := idle.Known("busy")
		if _, err := idle.RemoveServer(t.Context(), "busy", life); err != nil || !ok {
			t.Fatal(err, ok)
		}
		x.take(t, idle, 2000)
		w.open(1)
		if _, ok := idle.Known("busy"); ok {
			t.Error("it is still asked")
		}
	})
	t.Run("a store that has forgotten it", func(t *testing.T) {
		w := newWorld(t, alloc.UnheardWait)
		idle := w.begin(w.p, t.TempDir(), "idle")
		issued{}.take(t, idle, 1)
		old := snapshot(t, w.p)
		gone := w.begin(w.p, t.TempDir(), "gone")
		issued{}.take(t, gone, 1)
		idle.Connected()
		issued{}.take(t, idle, 1)
		w.ends(gone)
		w.p.back(old)
		idle.Connected()
		w.refused(idle, "gone")
	})
}

func eventually(t *testing.T, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it did not happen in 20 s")
		}
	}
}

// TestAnotherStore: an old and a restored cluster are alive together. Who is asked from the other one drops
// nothing, and is not heard.
func TestAnotherStore(t *testing.T) {
	w, x := newWorld(t, alloc.UnheardWait), issued{}
	old, moved := w.begin(w.p, t.TempDir(), "old"), w.begin(w.p, t.TempDir(), "moved")
	x.take(t, old, 1)
	x.take(t, moved, 1)
	before := w.p.store()
	other := &put{now: snapshot(t, w.p)}
	moved.Store.Store = other
	moved.Connected()
	old.mu.Lock()
	made := old.made
	old.mu.Unlock()
	w.refused(moved, "old (at old)")
	if st := moved.Standing(); st.Others[0].Says != alloc.SaysElsewhere {
		t.Errorf("it heard %+v", st.Others)
	}
	old.mu.Lock()
	if old.made != made {
		t.Error("a server was disturbed by one with another store")
	}
	old.mu.Unlock()
	if w.p.store() != before {
		t.Error("the test mixes the stores up")
	}
	x.take(t, old, 1)
}

// TestNewServer: who has no witness trusts nobody, but where there was nothing to lose, or all others say so.
func TestNewServer(t *testing.T) {
	for _, c := range []struct {
		name    string
		prepare func(w *world, x issued) (dir string)
		want    alloc.Generation
	}{
		{"the pool was made a moment ago", func(*world, issued) string { return "" }, 1},
		{"the pool was made long ago", func(w *world, _ issued) string { w.passes(time.Hour); return "" }, 2},
		{"the pool was made in the future", func(w *world, _ issued) string { w.passes(-time.Hour); w.raisable(1); return "" }, 2},
		{"the counter has moved", func(w *world, x issued) string {
			gone := w.begin(w.p, w.TempDir(), "gone")
			x.take(w.T, gone, 1)
			w.ends(gone)
			if _, err := gone.RemoveServer(w.Context(), "gone", 1); err != nil {
				w.Fatal(err)
			}
			return ""
		}, 2},
		{"another one says that nothing is lost", func(w *world, x issued) string {
			x.take(w.T, w.begin(w.p, w.TempDir(), "old"), 1)
			w.passes(time.Hour)
			return ""
		}, 1},
		{"another one is not heard", func(w *world, x issued) string {
			old := w.begin(w.p, w.TempDir(), "old")
			x.take(w.T, old, 1)
			w.ends(old)
			return ""
		}, 2},
		{"another one says that it is behind", func(w *world, x issued) string {
			old := w.begin(w.p, w.TempDir(), "old")
			x.take(w.T, old, 1)
			back := snapshot(w.T, w.p)
			x.take(w.T, old, 5000)
			w.p.back(back)
			return ""
		}, 2},
		{"it was of the pool, and its witness is lost", func(w *world, x issued) string {
			x.take(w.T, w.begin(w.p, w.TempDir(), "old"), 1)
			lost := w.begin(w.p, w.TempDir(), "new")
			x.take(w.T, lost, 1)
			w.ends(lost)
			return ""
		}, 2},
		{"its witness is lost, and the process that began dies", func(w *world, x issued) string {
			x.take(w.T, w.begin(w.p, w.TempDir(), "old"), 1)
			lost := w.begin(w.p, w.TempDir(), "new")
			x.take(w.T, lost, 1)
			w.ends(lost)
			dir := w.TempDir()
			again := w.begin(w.p, dir, "new")
			again.asks = func(context.Context, string, alloc.Question) (alloc.Testimony, error) {
				again.stop()
				return alloc.Testimony{}, errors.New("it dies")
			}
			if got, err := again.allocate(w.T, 1); err == nil {
				w.Fatalf("it issued %v", got)
			}
			w.ends(again)
			return dir
		}, 2},
		{"it was removed, and comes back without its witness", func(w *world, x issued) string {
			old := w.begin(w.p, w.TempDir(), "old")
			x.take(w.T, old, 1)
			gone := w.begin(w.p, w.TempDir(), "new")
			x.take(w.T, gone, 1)
			w.ends(gone)
			if _, err := old.RemoveServer(w.Context(), "new", 1); err != nil {
				w.Fatal(err)
			}
			return ""
		}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, x := newWorld(t, alloc.UnheardNewGeneration), issued{}
			dir := c.prepare(w, x)
			if dir == "" {
				dir = t.TempDir()
			}
			l := w.begin(w.p, dir, "new")
			for range 3 {
				x.take(t, l, 700)
			}
			w.open(c.want)
			if seen := l.file.Seen(); seen.Due != DueNothing || seen.Generation != c.want {
				t.Errorf("its witness has %+v", seen)
			}
			alloctest.Check(t, w.p)
		})
	}
}

// lazy is a store whose connection is made by the first read.
type lazy struct {
	alloc.Store
	connect func()
}

func (l *lazy) Get(ctx context.Context, keys ...alloc.Key) ([]alloc.Entry, alloc.Revision, error) {
	if l.connect != nil {
		l.connect()
		l.connect = nil
	}
	return l.Store.Get(ctx, keys...)
}

// TestConnectedByLook: a server connects when it looks at its store for the first time. It asks the others once after
// that, and where none is heard takes one generation; the next would have to wait for minutes.
func TestConnectedByLook(t *testing.T) {
	w, x := newWorld(t, alloc.UnheardNewGeneration), issued{}
	gone := w.begin(w.p, t.TempDir(), "gone")
	x.take(t, gone, 1)
	w.ends(gone)
	store := &lazy{Store: w.p}
	fresh := w.begin(store, t.TempDir(), "fresh")
	store.connect = fresh.Connected
	fresh.looks()
	x.take(t, fresh, 1)
	w.open(2)
}

// TestAskedMeanwhile: what a server has under way when it is asked is an unknown outcome: the asker was told of a
// store without it.
func TestAskedMeanwhile(t *testing.T) {
	w := newWorld(t, alloc.UnheardWait)
	one, two := w.begin(w.p, t.TempDir(), "one"), w.begin(w.p, t.TempDir(), "two")
	issued{}.take(t, one, 1)
	issued{}.take(t, two, 1)
	var once sync.Once
	w.p.afterCommit(func(tx alloc.Tx) {
		for _, rec := range tx.Put {
			if h, ok := rec.(*alloc.Host); ok && h.Name == "a" {
				once.Do(func() {
					two.Connected()
					if _, err := two.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{&alloc.Host{Name: "b", Nonce: "n"}}}); err != nil {
						t.Errorf("the asker: %v", err)
					}
				})
			}
		}
	})
	if _, err := one.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{&alloc.Host{Name: "a", Nonce: "n"}}}); !errors.Is(err, alloc.ErrUnknownOutcome) {
		t.Errorf("asked between commit and answer: %v", err)
	}
	one.mu.Lock()
	if one.connected != 1 {
		t.Error("who is asked takes that for a new connection, and asks the asker")
	}
	one.mu.Unlock()
	if _, err := one.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{&alloc.Host{Name: "c", Nonce: "n"}}}); err != nil {
		t.Errorf("the next one: %v", err)
	}
}
