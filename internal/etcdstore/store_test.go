package etcdstore

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"

	"github.com/nsalloc/nsalloc/internal/etcdembed"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// shared is an etcd for the tests that do not break it. Each test has a pool of its own in it.
var shared *etcdembed.Server

var pools atomic.Int64

func TestMain(m *testing.M) {
	flag.Parse()
	if flag.Lookup("test.fuzz").Value.String() != "" {
		os.Exit(m.Run()) // an etcd that works beside a fuzzer would look like what an input brought about
	}
	dir, err := os.MkdirTemp("", "etcd")
	if err != nil {
		panic(err)
	}
	if shared, err = etcdembed.Start(context.Background(), etcdembed.Config{Dir: dir}); err != nil {
		panic(err)
	}
	code := m.Run()
	if err := errors.Join(shared.Close(), os.RemoveAll(dir), goleak.Find()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func dial(t *testing.T, cfg Config) *Client {
	t.Helper()
	c, err := Dial(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	return c
}

// newStore is an empty store in the etcd at an endpoint.
func newStore(t *testing.T, endpoint string) *Store {
	t.Helper()
	return open(t, dial(t, Config{Endpoints: []string{endpoint}}), fmt.Sprintf("p%d", pools.Add(1)))
}

func open(t *testing.T, c *Client, pool string) *Store {
	t.Helper()
	s, err := New(c, pool)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// startEtcd is an etcd of the test's own.
func startEtcd(t *testing.T, dir string) *etcdembed.Server {
	t.Helper()
	srv, err := etcdembed.Start(t.Context(), etcdembed.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
	})
	return srv
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "etcd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func host(name, nonce string) *alloc.Host { return &alloc.Host{Name: name, Nonce: nonce} }

func put(t *testing.T, s *Store, recs ...alloc.Record) alloc.Revision {
	t.Helper()
	rev, err := s.Commit(t.Context(), alloc.Tx{Put: recs})
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

// nonce is what host put there, "" when the host is absent.
func nonce(t *testing.T, s *Store, name string) string {
	t.Helper()
	entries, _, err := s.Get(t.Context(), alloc.HostKey(name))
	if err != nil {
		t.Fatal(err)
	}
	if h, ok := entries[0].Record.(*alloc.Host); ok {
		return h.Nonce
	}
	return ""
}

// eventually waits for a condition that other goroutines or processes make true.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(20 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("it never came true that %s", what)
		}
	}
}

func TestStore(t *testing.T) {
	alloctest.TestStore(t, func(t *testing.T) alloctest.Planter { return planted{newStore(t, shared.Endpoint())} })
}

// TestService runs the use cases of a pool against a real etcd, as pkg/alloc does against memory.
func TestService(t *testing.T) {
	alloctest.TestService(t, func(t *testing.T) alloctest.Planter { return planted{newStore(t, shared.Endpoint())} })
}

// TestFaults: every write meets the pairs of faults that lose an answer. That every read fails is seen in
// memory, by pkg/alloc.
func TestFaults(t *testing.T) {
	c := dial(t, Config{Endpoints: []string{shared.Endpoint()}})
	alloctest.TestFaults(t, alloctest.Trouble{
		Run:    func(t *testing.T, f func(t *testing.T)) { f(t) },
		Store:  func(t *testing.T) alloc.Store { return open(t, c, fmt.Sprintf("p%d", pools.Add(1))) },
		Faults: alloctest.Pair,
		Reads:  1,
		Source: "../../pkg/alloc",
	})
}

func TestPoolsAreApart(t *testing.T) {
	c := dial(t, Config{Endpoints: []string{shared.Endpoint()}})
	names := []string{"apart", "apart-b", "apart.b", "apart0"}
	for _, name := range names {
		put(t, open(t, c, name), host("h", name))
	}
	for _, name := range names {
		entries, _, err := open(t, c, name).List(t.Context(), alloc.KindHost, "", 10, 0)
		if err != nil || len(entries) != 1 || entries[0].Record.(*alloc.Host).Nonce != name {
			t.Errorf("pool %s lists %+v, %v", name, entries, err)
		}
	}
	for _, name := range []string{"", "a/b", "A", "a/", "../a"} {
		if _, err := New(c, name); !errors.Is(err, alloc.ErrInvalid) {
			t.Errorf("a pool with the name %q: %v", name, err)
		}
	}
}

func TestTooLarge(t *testing.T) {
	s := newStore(t, shared.Endpoint())
	var tx alloc.Tx
	for i := range MaxTxnOps {
		tx.Put = append(tx.Put, host(fmt.Sprintf("h%d", i), "1"))
		tx.Guards = append(tx.Guards, alloc.Guard{Key: alloc.HostKey(fmt.Sprintf("h%d", i))})
	}
	if _, err := s.Commit(t.Context(), tx); err != nil {
		t.Errorf("%d guards and writes: %v", MaxTxnOps, err)
	}
	tx.Put, tx.Guards = append(tx.Put, host("one-more", "1")), nil
	if _, err := s.Commit(t.Context(), tx); !errors.Is(err, alloc.ErrTooLarge) {
		t.Errorf("%d writes: %v", MaxTxnOps+1, err)
	}
	// The largest that is sent is taken; a byte more is not sent.
	big := host("big", "")
	req, err := s.request(alloc.Tx{Put: []alloc.Record{big, host("x", strings.Repeat("x", 1<<20))}})
	if err != nil {
		t.Fatal(err)
	}
	room := MaxTxnBytes - sizeOf(req) - 16
	big.Nonce = strings.Repeat("b", room)
	if _, err := s.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{big, host("x", strings.Repeat("x", 1<<20))}}); err != nil {
		t.Errorf("a transaction at the limit: %v", err)
	}
	big.Nonce = strings.Repeat("c", room+64)
	if _, err := s.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{big, host("x", strings.Repeat("x", 1<<20))}}); !errors.Is(err, alloc.ErrTooLarge) {
		t.Errorf("a transaction over the limit: %v", err)
	}
	if got := nonce(t, s, "big"); len(got) != room || got[0] != 'b' {
		t.Errorf("the record has %d bytes", len(got))
	}
}

func TestCompaction(t *testing.T) {
	s := newStore(t, startEtcd(t, shortDir(t)).Endpoint())
	old := put(t, s, host("a", "1"))
	put(t, s, host("a", "2"))
	now := put(t, s, host("a", "3"))
	if _, err := s.client.etcd.Compact(t.Context(), int64(now), clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.List(t.Context(), alloc.KindHost, "", 10, old); !errors.Is(err, alloc.ErrConflict) {
		t.Errorf("a listing at a compacted revision: %v", err)
	}
	never := func(alloc.Revision, []alloc.Change) { t.Error("changes were delivered") }
	if err := s.Watch(t.Context(), old, never); !errors.Is(err, alloc.ErrConflict) {
		t.Errorf("a watch from a compacted revision: %v", err)
	}
	// The last revision itself is still good to go on from.
	page, _, err := s.List(t.Context(), alloc.KindHost, "", 10, now)
	if err != nil || len(page) != 1 {
		t.Errorf("at the compaction: %v, %v", page, err)
	}
}

// A store that was put back to an older snapshot has lost the revisions that its readers know.
func TestRevisionOfTheFuture(t *testing.T) {
	s := newStore(t, shared.Endpoint())
	future := put(t, s, host("a", "1")) + 1_000_000
	err := s.Watch(t.Context(), future, func(alloc.Revision, []alloc.Change) { t.Error("changes were delivered") })
	if !errors.Is(err, alloc.ErrConflict) {
		t.Errorf("a watch from it: %v", err)
	}
	if _, _, err := s.List(t.Context(), alloc.KindHost, "", 10, future); !errors.Is(err, alloc.ErrConflict) {
		t.Errorf("a listing at it: %v", err)
	}
}

// Others write to the same etcd: its revision moves on without a change of the pool, and only Sync
// tells a watch so.
func TestSyncPastForeignWrites(t *testing.T) {
	s, other := newStore(t, shared.Endpoint()), newStore(t, shared.Endpoint())
	from := put(t, s, host("a", "1"))
	at := make(chan alloc.Revision, 100)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- s.Watch(ctx, from, func(rev alloc.Revision, changes []alloc.Change) {
			if len(changes) > 0 {
				t.Errorf("at %d: %+v", rev, changes)
			}
			at <- rev
		})
	}()
	for range 10 {
		foreign := put(t, other, host("a", "1"))
		rev, err := s.Sync(t.Context())
		if err != nil || rev < foreign {
			t.Fatalf("Sync says %d, %v after %d", rev, err, foreign)
		}
		if _, err := s.Sync(t.Context()); err != nil { // a second one at the same revision
			t.Fatal(err)
		}
		var last alloc.Revision
		eventually(t, "the watch moved on", func() bool {
			select {
			case last = <-at:
			default:
			}
			return last >= rev
		})
	}
	stop()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// More than etcd puts into one response comes in fragments.
func TestWatchOfLargeRecords(t *testing.T) {
	s := newStore(t, shared.Endpoint())
	from := put(t, s, host("a", "0"))
	var last alloc.Revision
	for i := range 6 {
		last = put(t, s, host("a", strings.Repeat(fmt.Sprint(i), 400_000)), host("b", strings.Repeat(fmt.Sprint(i), 400_000)))
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var got []string
	err := s.Watch(ctx, from, func(rev alloc.Revision, changes []alloc.Change) {
		if len(changes) != 2 {
			t.Errorf("revision %d has %d changes", rev, len(changes))
		}
		for _, c := range changes {
			h := c.Record.(*alloc.Host)
			got = append(got, fmt.Sprintf("%s%c*%d", h.Name, h.Nonce[0], len(h.Nonce)))
		}
		if rev == last {
			stop()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if want := "a0*400000 b0*400000 a1*400000 b1*400000 a2*400000 b2*400000 " +
		"a3*400000 b3*400000 a4*400000 b4*400000 a5*400000 b5*400000"; strings.Join(got, " ") != want {
		t.Errorf("got %s", strings.Join(got, " "))
	}
}

// A pool of a newer version holds kinds that this one does not know.
func TestUnknownKindsAreLeftAlone(t *testing.T) {
	s := newStore(t, shared.Endpoint())
	from := put(t, s, host("a", "1"))
	resp, err := s.client.etcd.Put(t.Context(), s.keys.prefix+"future/x", "y")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	err = s.Watch(ctx, from, func(rev alloc.Revision, changes []alloc.Change) {
		if len(changes) > 0 || int64(rev) != resp.Header.Revision {
			t.Errorf("at %d: %+v", rev, changes)
		}
		stop()
	})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestCheckServer(t *testing.T) {
	var connections atomic.Int64
	checked := dial(t, Config{Endpoints: []string{shared.Endpoint()}, Connected: func() { connections.Add(1) }})
	put(t, open(t, checked, "checked"), host("a", "0")) // its own connection is there
	before := connections.Load()
	warnings, err := checked.CheckServer(t.Context())
	if now := connections.Load(); now != before {
		t.Errorf("%d connections, and %d before: who verifies each of them is disturbed", now, before)
	}
	if err != nil || len(warnings) > 0 {
		t.Errorf("the embedded server: %q, %v", warnings, err)
	}
	nobody := "unix://" + filepath.Join(shortDir(t), "none.sock")
	c := dial(t, Config{Endpoints: []string{nobody}, Timeout: 200 * time.Millisecond})
	if _, err := c.CheckServer(t.Context()); !errors.Is(err, alloc.ErrUnavailable) {
		t.Errorf("nobody: %v", err)
	}
	c = dial(t, Config{Endpoints: []string{shared.Endpoint(), nobody}, Timeout: 500 * time.Millisecond})
	if warnings, err := c.CheckServer(t.Context()); err != nil || len(warnings) != 1 || !strings.Contains(warnings[0], nobody) {
		t.Errorf("one of two: %q, %v", warnings, err)
	}
	for version, want := range map[string]string{
		"3.3.27": "error", "2.3.8": "error", "4.0.0": "error",
		"3.4.30": "out of support", "3.5.4": "15220", "3.5.16": "", "3.6.0": "", "3.7.3": "", "3.7.0-rc.1": "",
		"3.8.0": "newer", "unknown": "not understood",
	} {
		warning, err := assess(version)
		if (err != nil) != (want == "error") || err == nil && (want == "") != (warning == "") || err == nil && !strings.Contains(warning, want) {
			t.Errorf("%s: %q, %v", version, warning, err)
		}
	}
}
