package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"reflect"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/nsalloc/nsalloc/internal/etcdembed"
	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

// TestCompaction: a view that was cut off while its revision was compacted lists again, and misses nothing.
func TestCompaction(t *testing.T) {
	dir, err := os.MkdirTemp("", "cmp")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	etcd, err := etcdembed.Start(t.Context(), etcdembed.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer etcd.Close()
	st := openPool(t, etcd.Endpoint(), "p")
	initPool(t, st)
	// The cut server sees its store through a gate that ends its watches and refuses new ones.
	gated := &gate{Store: openPool(t, etcd.Endpoint(), "p")}
	cut, whole := start(t, Config{Store: gated}), start(t, Config{Store: st})
	cut.waitLoaded()
	a := join(t, whole.dial("a"), "a")
	before := a.register()
	reader := cut.dial("")
	if _, err := reader.Sandbox(t.Context(), before.Serial, true); err != nil {
		t.Fatal(err)
	}
	gated.shut()
	after := a.register()
	if _, err := reader.Sandbox(t.Context(), before.Serial, false); err != nil {
		t.Errorf("a read that may be stale, while the watch is away: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := reader.Sandbox(ctx, after.Serial, true); !errors.Is(err, alloc.ErrUnavailable) {
		t.Errorf("a linearizable read that cannot be had in time: %v", err)
	}
	compact(t, etcd.Endpoint())
	gated.open()
	if got, err := reader.Sandbox(t.Context(), after.Serial, true); err != nil || got.Sandbox.Serial != after.Serial {
		eventually(t, "the view is back", func() bool {
			got, err := reader.Sandbox(t.Context(), after.Serial, true)
			return err == nil && got.Sandbox.Serial == after.Serial
		})
	}
	cut.view.mu.RLock()
	loads := cut.view.loads
	cut.view.mu.RUnlock()
	if loads != 2 {
		t.Errorf("the store was read %d times, want 2", loads)
	}
}

func compact(t *testing.T, endpoint string) {
	t.Helper()
	raw, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	now, err := raw.Put(t.Context(), "elsewhere", "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := raw.Compact(t.Context(), now.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
}

// gate is a store whose watches can be kept away.
type gate struct {
	alloc.Store
	mu     sync.Mutex
	closed bool
	cut    map[*context.CancelFunc]bool
}

func (g *gate) Watch(ctx context.Context, from alloc.Revision, apply func(alloc.Revision, []alloc.Change)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		return &alloc.Error{Reason: alloc.ReasonUnavailable, Msg: "cut off"}
	}
	if g.cut == nil {
		g.cut = map[*context.CancelFunc]bool{}
	}
	g.cut[&cancel] = true
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.cut, &cancel)
	}()
	return g.Store.Watch(ctx, from, apply)
}

func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	for c := range g.cut {
		(*c)()
	}
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = false
}

// TestStorePutBack: a store that answers a revision from before what it has said was put back. Nothing
// that was read from the lost history is answered as linearizable, and the view begins anew.
func TestStorePutBack(t *testing.T) {
	old, lost := memstore.New(), memstore.New()
	pool := initPool(t, old)
	initPool(t, lost)
	for range 20 { // the lost history went on for longer
		if _, err := alloc.NewService(lost, nil).Allocate(t.Context(), alloc.AllocateCommand{RequestID: client.NewRequestID(), Caller: "t", Count: 1}); err != nil {
			t.Fatal(err)
		}
	}
	both := &switched{now: lost}
	r := start(t, Config{Store: both})
	r.waitLoaded()
	c := r.dial("")
	ctx := t.Context()
	if err := r.view.catchUp(ctx); err != nil {
		t.Fatal(err)
	}
	both.mu.Lock()
	both.now = old
	both.mu.Unlock()
	_, err := c.Sandbox(ctx, 1<<48+1, true)
	if !errors.Is(err, alloc.ErrUnavailable) && !errors.Is(err, alloc.ErrSerialNotFound) {
		t.Errorf("a linearizable read: %v", err)
	}
	eventually(t, "the view is of the store that is there", func() bool {
		p, _, err := c.Pool(ctx)
		return err == nil && p.UUID == pool.UUID
	})
}

// switched is a store that becomes another one under the same address.
type switched struct {
	mu  sync.Mutex
	now alloc.Store
}

func (s *switched) store() alloc.Store {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now
}

func (s *switched) Get(ctx context.Context, keys ...alloc.Key) ([]alloc.Entry, alloc.Revision, error) {
	return s.store().Get(ctx, keys...)
}

func (s *switched) List(ctx context.Context, k alloc.Kind, after string, n int, at alloc.Revision) ([]alloc.Entry, alloc.Revision, error) {
	return s.store().List(ctx, k, after, n, at)
}

func (s *switched) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	return s.store().Commit(ctx, tx)
}

func (s *switched) Watch(ctx context.Context, from alloc.Revision, apply func(alloc.Revision, []alloc.Change)) error {
	return s.store().Watch(ctx, from, apply)
}

func (s *switched) Token(rec alloc.Record) (alloc.Token, error) { return s.store().Token(rec) }

func (s *switched) Sync(ctx context.Context) (alloc.Revision, error) { return s.store().Sync(ctx) }

// TestIndex changes random records in an index and compares every answer with a plain search.
func TestIndex(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	ix, plain := newIndex(), map[alloc.Serial]*alloc.Sandbox{}
	boots := []string{uuid.NewString(), uuid.NewString(), uuid.NewString()}
	states := []alloc.SandboxState{alloc.StateRunning, alloc.StateDumped, alloc.StateInTransit, alloc.StateClaimed, alloc.StateEnded}
	change := func(key alloc.Key, rec alloc.Record) {
		u, err := ix.prepare(alloc.Change{Key: key, Record: rec})
		if err != nil {
			t.Fatal(err)
		}
		ix.apply(u)
	}
	for step := range 4000 {
		serial := alloc.Serial(1<<48 + 16*(1+random.Uint64N(60)))
		if random.IntN(12) == 0 {
			delete(plain, serial)
			change(alloc.SandboxKey(serial), nil)
			continue
		}
		sb := &alloc.Sandbox{Serial: serial, State: states[random.IntN(len(states))], Owner: fmt.Sprintf("h%d", random.IntN(4)), Epoch: alloc.Epoch(step + 1), Created: time.Unix(int64(step), 0).UTC()}
		if before := plain[serial]; before != nil {
			sb.Bindings = slices.Clone(before.Bindings) // bindings stay for ever
		}
		for i := len(sb.Bindings); i < 1+random.IntN(8); i++ {
			// Each namespace has a kernel id of its own, as the kernel promises.
			sb.Bindings = append(sb.Bindings, alloc.Binding{Serial: serial + 1 + alloc.Serial(i), Type: alloc.NamespaceTypes()[random.IntN(8)]})
		}
		for i := range sb.Bindings {
			b := &sb.Bindings[i]
			if random.IntN(2) == 0 {
				b.Kernel = alloc.KernelID{BootID: boots[random.IntN(3)], ID: uint64(b.Serial), Inode: 7}
			}
			if random.IntN(6) == 0 {
				b.Gone = time.Unix(int64(step), 0).UTC()
			}
		}
		plain[serial] = sb
		change(alloc.SandboxKey(serial), sb)
		if step%100 == 0 {
			compare(t, ix, plain)
		}
	}
	compare(t, ix, plain)
}

func compare(t *testing.T, ix *index, plain map[alloc.Serial]*alloc.Sandbox) {
	t.Helper()
	owners := map[string][]alloc.Serial{}
	var order []alloc.Serial
	serials, kernels := 0, 0
	for serial, sb := range plain {
		order = append(order, serial)
		owners[sb.Owner] = append(owners[sb.Owner], serial)
		serials += 1 + len(sb.Bindings)
		e := ix.sandbox(serial)
		if e == nil {
			t.Fatalf("%s is not found", serial)
		}
		msg, err := e.unpack()
		if err != nil {
			t.Fatal(err)
		}
		if got := wire.SandboxFromWire(msg); !reflect.DeepEqual(got, sb) {
			t.Fatalf("found\n%+v\nwant\n%+v", got, sb)
		}
		for _, b := range sb.Bindings {
			if ix.sandbox(b.Serial) != e {
				t.Fatalf("%s is not found by its namespace %s", serial, b.Serial)
			}
			found := ix.namespace(sb.Owner, wire.NamespaceTypeToWire(b.Type), wire.KernelIDToWire(b.Kernel))
			on := (sb.State == alloc.StateRunning || sb.State == alloc.StateDumped) && b.Live() && !b.Kernel.IsZero()
			if on {
				kernels++
			}
			if (found == e) != on {
				t.Fatalf("%s by %v on host %s: %v, want %v", serial, b.Kernel, sb.Owner, found == e, on)
			}
		}
	}
	slices.Sort(order)
	list := func(es []*entry) (out []alloc.Serial) {
		for _, e := range es {
			out = append(out, e.serial)
		}
		return out
	}
	if got := list(slices.Collect(ix.after("", 0))); !slices.Equal(got, order) || ix.order.Len() != len(order) {
		t.Fatalf("order %v, want %v", got, order)
	}
	if len(order) > 0 {
		// A page begins behind the last one's end, also when that sandbox is gone.
		end := order[len(order)/2]
		if got := list(slices.Collect(ix.after("", end))); !slices.Equal(got, order[len(order)/2+1:]) {
			t.Fatalf("after %s: %v, want the end of %v", end, got, order)
		}
		if got := list(slices.Collect(ix.after("", end-1))); !slices.Equal(got, order[len(order)/2:]) {
			t.Fatalf("after %s, which is not there: %v, want the end of %v", end-1, got, order)
		}
	}
	if len(ix.owners) != len(owners) {
		t.Fatalf("%d owners, want %d", len(ix.owners), len(owners))
	}
	for name, of := range owners {
		slices.Sort(of)
		if !slices.Equal(list(slices.Collect(ix.after(name, 0))), of) {
			t.Fatalf("owner %s: %v, want %v", name, list(slices.Collect(ix.after(name, 0))), of)
		}
	}
	if len(ix.bySerial) != serials || len(ix.byKernel) != kernels {
		t.Fatalf("%d serials and %d kernel ids are left in the index, want %d and %d", len(ix.bySerial), len(ix.byKernel), serials, kernels)
	}
}

// TestCheckpointsInIndex: run ids and lists follow checkpoints that come, change and go.
func TestCheckpointsInIndex(t *testing.T) {
	ix := newIndex()
	put := func(c *alloc.Checkpoint) {
		u, err := ix.prepare(alloc.Change{Key: c.Key(), Record: c})
		if err != nil {
			t.Fatal(err)
		}
		ix.apply(u)
	}
	const s = alloc.Serial(1<<48 + 1)
	put(&alloc.Checkpoint{Serial: s + 2, Sandbox: s, RunID: "r"})
	put(&alloc.Checkpoint{Serial: s + 1, Sandbox: s, RunID: "r"})
	put(&alloc.Checkpoint{Serial: s + 3, Sandbox: s + 9})
	if ix.byRun["r"] != s+2 || len(ix.byRun) != 1 {
		t.Errorf("run r is %v", ix.byRun)
	}
	if !slices.Equal(ix.cpsOf[s], []alloc.Serial{s + 1, s + 2}) || !slices.Equal(ix.cpOrder, []alloc.Serial{s + 1, s + 2, s + 3}) {
		t.Errorf("%v, %v", ix.cpsOf, ix.cpOrder)
	}
	ix.apply(update{key: alloc.CheckpointKey(s + 2)})
	if len(ix.byRun) != 0 || !slices.Equal(ix.cpsOf[s], []alloc.Serial{s + 1}) || len(ix.checkpoints) != 2 {
		t.Errorf("after a delete: %v, %v", ix.byRun, ix.cpsOf)
	}
}

// BenchmarkIndexMemory says what a sandbox of eight namespaces costs: go test -bench IndexMemory -benchtime 100000x
func BenchmarkIndexMemory(b *testing.B) {
	ix := newIndex()
	boot := uuid.NewString()
	b.ReportAllocs()
	for i := range b.N {
		first := alloc.Serial(1<<48 + 1 + 9*uint64(i))
		now := time.Now()
		sb := &alloc.Sandbox{Serial: first, State: alloc.StateRunning, Owner: fmt.Sprintf("host-%d", i%10_000), Epoch: 1<<48 + 1, Created: now,
			Labels: map[string]string{"command": "/usr/bin/sleep", "cgroup": "/system.slice/some-container.scope"},
			Stints: []alloc.Stint{{Host: fmt.Sprintf("host-%d", i%10_000), Epoch: 1<<48 + 1, From: now, Began: "registered", Actor: "host/x"}}}
		for j, t := range alloc.NamespaceTypes() {
			sb.Bindings = append(sb.Bindings, alloc.Binding{Serial: first + 1 + alloc.Serial(j), Type: t, Bound: now, Kernel: alloc.KernelID{BootID: boot, ID: uint64(8*i + j + 1), Inode: 4026531840}})
		}
		u, err := ix.prepare(alloc.Change{Key: sb.Key(), Record: sb})
		if err != nil {
			b.Fatal(err)
		}
		ix.apply(u)
	}
	b.ReportMetric(float64(heap())/float64(b.N), "B/sandbox")
	slog.Debug("kept", "sandboxes", ix.order.Len())
}
