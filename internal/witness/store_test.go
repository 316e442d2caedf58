package witness

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/internal/baddisk"
	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// put is a store that can be put back to what it was, as an etcd is from a snapshot.
type put struct {
	mu    sync.Mutex
	now   *memstore.Store
	after func(alloc.Tx)
}

func (p *put) store() *memstore.Store { p.mu.Lock(); defer p.mu.Unlock(); return p.now }
func (p *put) back(to *memstore.Store) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.now = to
}

func (p *put) Get(ctx context.Context, keys ...alloc.Key) ([]alloc.Entry, alloc.Revision, error) {
	return p.store().Get(ctx, keys...)
}

func (p *put) List(ctx context.Context, k alloc.Kind, after string, n int, at alloc.Revision) ([]alloc.Entry, alloc.Revision, error) {
	return p.store().List(ctx, k, after, n, at)
}

func (p *put) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	rev, err := p.store().Commit(ctx, tx)
	p.mu.Lock()
	after := p.after
	p.mu.Unlock()
	if after != nil {
		after(tx)
	}
	return rev, err
}

// afterCommit has f called after each commit, before its answer.
func (p *put) afterCommit(f func(alloc.Tx)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.after = f
}
func (p *put) Token(rec alloc.Record) (alloc.Token, error) { return p.store().Token(rec) }
func (p *put) Watch(ctx context.Context, from alloc.Revision, apply func(alloc.Revision, []alloc.Change)) error {
	return p.store().Watch(ctx, from, apply)
}
func (p *put) Sync(ctx context.Context) (alloc.Revision, error) { return p.store().Sync(ctx) }

// snapshot is a copy of all that a store has, byte by byte.
func snapshot(t *testing.T, from alloc.Store) *memstore.Store {
	t.Helper()
	to := memstore.New()
	entries, _, err := from.Get(t.Context(), alloc.Key{Kind: alloc.KindPool}, alloc.Key{Kind: alloc.KindCounter})
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range alloc.Kinds() {
		page, _, err := from.List(t.Context(), kind, "", 1000, 0)
		if err != nil {
			t.Fatal(err)
		}
		entries = append(entries, page...)
	}
	for _, e := range entries {
		if e.Token != "" {
			if err := to.Plant(t.Context(), e.Key, []byte(e.Token)); err != nil {
				t.Fatal(err)
			}
		}
	}
	return to
}

// newPool is a store with a pool in it.
func newPool(t *testing.T) *put {
	t.Helper()
	p := &put{now: memstore.New()}
	if _, err := alloc.NewService(p, nil).InitPool(t.Context(), alloc.DefaultPolicy()); err != nil {
		t.Fatal(err)
	}
	return p
}

// life is a server: its witness, and the service over it.
type life struct {
	*Store
	*alloc.Service
	file *File
}

func begin(t *testing.T, p alloc.Store, dir, name string) *life {
	t.Helper()
	file, _, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(p, name, file, slog.New(slog.NewTextHandler(io.Discard, nil)), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close(); _ = file.Close() })
	return &life{s, alloc.NewService(s, nil), file}
}

var ids struct {
	sync.Mutex
	n uint64
}

func (l *life) allocate(t *testing.T, n uint64) (alloc.Ranges, error) {
	t.Helper()
	ids.Lock()
	ids.n++
	id := alloctest.RequestID(time.Now(), ids.n)
	ids.Unlock()
	return l.Allocate(t.Context(), alloc.AllocateCommand{RequestID: id, Caller: "c", Count: n})
}

// issued finds serials that were acknowledged twice.
type issued map[alloc.Serial]bool

func (x issued) take(t *testing.T, l *life, n uint64) {
	t.Helper()
	got, err := l.allocate(t, n)
	if err != nil {
		t.Fatal(err)
	}
	for s := range got.All() {
		if x[s] {
			t.Fatalf("%s was acknowledged twice", s)
		}
		x[s] = true
	}
}

func TestLives(t *testing.T) {
	p, dir, x := newPool(t), t.TempDir(), issued{}
	for i := range uint64(3) {
		l := begin(t, p, dir, "s1")
		for range 5 {
			x.take(t, l, 3)
		}
		seen := l.file.Seen()
		entries, _, err := p.Get(t.Context(), alloc.Key{Kind: alloc.KindServer, ID: "s1"}, alloc.Key{Kind: alloc.KindCounter}, (&alloc.Slot{Server: "s1", Life: seen.Life}).Key())
		if err != nil {
			t.Fatal(err)
		}
		server, slot := entries[0].Record.(*alloc.Server), entries[2].Record.(*alloc.Slot)
		if server.Incarnation != i+1 || seen.Incarnation != i+1 || seen.Life != server.Nonce || seen.Slots[0] != (Mark{slot.Writes, slot.Nonce}) || slot.Writes != 5 ||
			seen.Counter != entries[1].Record.(*alloc.Counter).Next {
			t.Errorf("life %d: the witness has %+v, the store %+v and %+v", i+1, seen, server, slot)
		}
		if _, _, err := Open(dir); err == nil {
			t.Error("two processes have one witness")
		}
		_ = l.file.Close()
		// The disk has it, too.
		again, _, err := Open(dir)
		if err != nil || fmt.Sprint(again.Seen()) != fmt.Sprint(seen) {
			t.Errorf("read back: %+v, %v", again.Seen(), err)
		}
		_ = again.Close()
	}
	slots, _, _ := p.List(t.Context(), alloc.KindSlot, "", 100, 0)
	if len(slots) != 1 {
		t.Errorf("%d slots are left of all lives", len(slots))
	}
	alloctest.Check(t, p)
}

// TestStoreOfAnother: the store of another pool, and one that lost everything, are not written.
func TestStoreOfAnother(t *testing.T) {
	p, x := newPool(t), issued{}
	l := begin(t, p, t.TempDir(), "s1")
	x.take(t, l, 3)
	p.back(newPool(t).store())
	l.Connected()
	if _, err := l.allocate(t, 3); !errors.Is(err, alloc.ErrPoolMissing) {
		t.Errorf("another pool: %v", err)
	}
	p.back(memstore.New())
	l.Connected()
	if _, err := l.allocate(t, 3); !errors.Is(err, alloc.ErrPoolMissing) && !errors.Is(err, alloc.ErrRecovering) {
		t.Errorf("an empty store: %v", err)
	}
	if n, _ := p.store().Ops(); n == 0 {
		t.Error("it was not looked at")
	}
	if _, commits := p.store().Ops(); commits != 0 {
		t.Errorf("%d commits to an empty store", commits)
	}
}

// TestTwins: of two servers that have one state directory's content, the later start goes on, the other is
// fenced at its next write and stays so; nothing is issued twice.
func TestTwins(t *testing.T) {
	p, dir, x := newPool(t), t.TempDir(), issued{}
	l := begin(t, p, dir, "s1")
	x.take(t, l, 3)
	older := copyOf(t, dir)
	x.take(t, l, 3)
	now := copyOf(t, dir)
	for i, copied := range []string{older, now, older} {
		twin := begin(t, p, copied, "s1")
		x.take(t, twin, 3)
		for range 2 {
			if got, err := l.allocate(t, 3); !errors.Is(err, alloc.ErrUnavailable) || !strings.Contains(err.Error(), "--name") {
				t.Errorf("copy %d is at work, and the one before got %v, %v", i, got, err)
			}
		}
		x.take(t, twin, 3)
		_ = l.file.Close()
		l = twin
		if copied == older {
			older = copyOf(t, dir)
		}
	}
	alloctest.Check(t, p)
}

func copyOf(t *testing.T, dir string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, fileName))
	if err != nil {
		t.Fatal(err)
	}
	to := t.TempDir()
	if err := os.WriteFile(filepath.Join(to, fileName), data, 0o600); err != nil {
		t.Fatal(err)
	}
	return to
}

// TestDiskTrouble: while the witness cannot be written nothing is acknowledged; what was committed is found
// under its request id when there is room again.
func TestDiskTrouble(t *testing.T) {
	p, dir, x := newPool(t), t.TempDir(), issued{}
	l := begin(t, p, dir, "s1")
	x.take(t, l, 3)
	good := l.file.f
	bad, err := os.Open(filepath.Join(dir, fileName)) // for reading only
	if err != nil {
		t.Fatal(err)
	}
	defer bad.Close()
	l.file.writing.Lock()
	l.file.f = bad
	l.file.writing.Unlock()
	cmd := alloc.AllocateCommand{RequestID: alloctest.RequestID(time.Now(), 1<<42), Caller: "c", Count: 3}
	if got, err := l.Allocate(t.Context(), cmd); err == nil {
		t.Errorf("acknowledged %v without a witness", got)
	}
	if _, err := l.allocate(t, 3); !errors.Is(err, alloc.ErrUnavailable) || !strings.Contains(err.Error(), "make room") {
		t.Errorf("the next one: %v", err)
	}
	l.file.writing.Lock()
	l.file.f = good
	l.file.writing.Unlock()
	got, err := l.Allocate(t.Context(), cmd)
	if err != nil {
		t.Fatal(err)
	}
	again, err := l.Allocate(t.Context(), cmd)
	if err != nil || fmt.Sprint(again) != fmt.Sprint(got) {
		t.Errorf("%v, asked again %v, %v", got, again, err)
	}
	x.take(t, l, 3)
}

// TestFsyncFails: what the disk took into its cache and lost was not seen, although a later fsync succeeds. An Update
// after that writes the page anew.
func TestFsyncFails(t *testing.T) {
	bad := baddisk.New(t, filepath.Join(t.TempDir(), "disk"))
	dir := filepath.Join(bad.Dir, "server")
	see := func(w *File, n uint64) error { return w.Update(func(s *Seen) { s.Pool, s.Counter = "p", n }) }
	w := opened(t, dir)
	if err := see(w, 7); err != nil {
		t.Fatal(err)
	}
	again := func() {
		t.Helper()
		if err := errors.Join(w.Close(), bad.Remount()); err != nil {
			t.Fatal(err)
		}
		w = opened(t, dir)
	}
	again()
	// The page that is written next.
	if err := errors.Join(bad.FailAt(filepath.Join(dir, fileName), int64((w.number+1)%2)*pageSize), bad.Fail()); err != nil {
		t.Fatal(err)
	}
	if err := see(w, 8); err == nil {
		t.Fatal("it is on disk")
	}
	tells := errors.New("not tried")
	for i := 0; tells != nil && i < 5; i++ {
		tells = unix.Fdatasync(int(w.f.Fd()))
	}
	if tells != nil {
		t.Fatalf("each further fsync fails: %v", tells) // then this proves less than it says
	}
	again()
	if got := w.Seen().Counter; got != 7 {
		t.Errorf("after the machine was cut off it has seen %d", got)
	}
	if err := see(w, 9); err == nil {
		t.Fatal("it is on disk")
	}
	if err := bad.Heal(); err != nil {
		t.Fatal(err)
	}
	if err := w.Kept(); err != nil {
		t.Fatal(err)
	}
	again()
	if got := w.Seen().Counter; got != 9 {
		t.Errorf("what was kept is %d", got)
	}
}

// opened opens a witness that is there, or makes one.
func opened(t *testing.T, dir string) *File {
	t.Helper()
	w, _, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close() })
	return w
}

// TestLostAnswers: writes whose answers are lost or late leave the slots usable, and nothing is issued twice.
func TestLostAnswers(t *testing.T) {
	p, x := newPool(t), issued{}
	l := begin(t, p, t.TempDir(), "s1")
	x.take(t, l, 1)
	p.store().SetFaults(func(op memstore.Op) memstore.Fault {
		if !op.Commit {
			return memstore.Fault{}
		}
		return memstore.Fault{Outcome: []memstore.Outcome{0, 0, memstore.Stored, 0, memstore.Lost, 0, memstore.Delayed, 0, memstore.Unavailable}[op.N%9], After: op.N % 5}
	})
	var mu sync.Mutex
	var wg sync.WaitGroup
	for w := range uint64(8) {
		wg.Go(func() {
			for n := range uint64(50) {
				cmd := alloc.AllocateCommand{RequestID: alloctest.RequestID(time.Now(), 1<<43+w<<20+n), Caller: "c", Count: 2}
				var got alloc.Ranges
				err := errors.New("not asked")
				for try := 0; err != nil && try < 50; try++ {
					got, err = l.Allocate(t.Context(), cmd)
				}
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				for s := range got.All() {
					if x[s] {
						t.Errorf("%s was acknowledged twice", s)
					}
					x[s] = true
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	p.store().SetFaults(nil)
	p.store().Settle()
	alloctest.Check(t, p)
}

// TestService: the use cases do not notice the witness.
func TestService(t *testing.T) {
	alloctest.TestService(t, func(t *testing.T) alloctest.Planter {
		mem := memstore.New()
		file, _, err := Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		s, err := New(mem, "s1", file, slog.New(slog.NewTextHandler(io.Discard, nil)),
			func() time.Time { return time.Date(2026, 2, 3, 4, 5, 10, 0, time.UTC) }) // a moment after the suite's pools are made
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close(); _ = file.Close() })
		return planted{s, mem}
	})
}

type planted struct {
	*Store
	mem *memstore.Store
}

// Commit leaves nothing of a server in a store that loses its pool: the use cases then see an empty one.
func (p planted) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	for _, k := range tx.Delete {
		if k.Kind == alloc.KindPool {
			tx.DeleteSpans = append(tx.DeleteSpans, alloc.Span{Kind: alloc.KindServer, Through: "z"}, alloc.Span{Kind: alloc.KindSlot, Through: "z"})
			return p.mem.Commit(ctx, tx)
		}
	}
	entries, _, err := p.mem.Get(ctx, alloc.Key{Kind: alloc.KindPool})
	if err != nil || entries[0].Token == "" {
		rev, err := p.mem.Commit(ctx, tx) // the tests' own, where there is no pool
		_, _ = p.sound(ctx)               // a life begins, if that was one
		return rev, err
	}
	return p.Store.Commit(ctx, tx)
}

func (p planted) Plant(ctx context.Context, key alloc.Key, value []byte) error {
	return p.mem.Plant(ctx, key, value)
}
func (p planted) Newer(rec alloc.Record) ([]byte, bool) { return p.mem.Newer(rec) }
