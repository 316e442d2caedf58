package alloctest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

func describeAll(changes []alloc.Change) string {
	var words []string
	for _, c := range changes {
		words = append(words, describe(c))
	}
	return strings.Join(words, " ")
}

func testWatchDeliversInOrder(t *testing.T, s alloc.Store) {
	from := put(t, s, host("z", "1")) // not delivered: the watch is for what comes after
	f := follow(t, s, from)
	var want []string
	var last alloc.Revision
	for i := range 50 {
		n := fmt.Sprint(i)
		put(t, s, host("a", n))
		last = commit(t, s, alloc.Tx{Put: []alloc.Record{host("b", n)}, Delete: []alloc.Key{alloc.HostKey("a")}})
		want = append(want, "host/a="+n, "host/b="+n+" -host/a")
	}
	// Deleting what is not there changes nothing.
	last = max(last, commit(t, s, alloc.Tx{Put: []alloc.Record{host("c", "1")}, Delete: []alloc.Key{alloc.HostKey("a")}}))
	want = append(want, "host/c=1")
	changes := f.until(last)
	if got := describeAll(changes); got != strings.Join(want, " ") {
		t.Errorf("delivered %s\nwant %s", got, strings.Join(want, " "))
	}
	c := changes[len(changes)-1]
	if e := get(t, s, c.Key)[0]; e.Token != c.Token || e.Revision != c.Revision {
		t.Errorf("the watch delivered %+v, the store has %+v", c, e)
	}
}

func testWatchReplays(t *testing.T, s alloc.Store) {
	first := put(t, s, host("a", "1"))
	second := put(t, s, host("a", "2"))
	third := put(t, s, host("a", "3"))
	for from, want := range map[alloc.Revision]string{first: "host/a=2 host/a=3", second: "host/a=3"} {
		if got := describeAll(follow(t, s, from).until(third)); got != want {
			t.Errorf("from %d: %s, want %s", from, got, want)
		}
	}
}

func testWatchEndsWithItsContext(t *testing.T, s alloc.Store) {
	f := follow(t, s, put(t, s, host("a", "1")))
	f.until(put(t, s, host("a", "2"))) // it runs
	f.stop()
	err := f.end()
	wantErr(t, err, alloc.ErrUnavailable)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v does not say that its context ended", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	wantErr(t, s.Watch(ctx, f.last, func(alloc.Revision, []alloc.Change) { t.Error("called") }), alloc.ErrUnavailable)
}

func testSyncMovesWatches(t *testing.T, s alloc.Store) {
	f := follow(t, s, put(t, s, host("a", "1")))
	g := follow(t, s, f.last)
	for i := range 20 {
		acknowledged := put(t, s, host("a", fmt.Sprint(i)))
		rev, err := s.Sync(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if rev < acknowledged {
			t.Fatalf("Sync says %d after %d was acknowledged", rev, acknowledged)
		}
		f.until(rev)
		g.until(rev)
	}
	// No change is left to wait for, and the watches are at the newest revision already.
	rev, err := s.Sync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if changes := f.until(rev); len(changes) > 0 {
		t.Errorf("delivered %s", describeAll(changes))
	}
}

func testEndedContext(t *testing.T, s alloc.Store) {
	put(t, s, host("a", "1"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _, err := s.Get(ctx, alloc.HostKey("a"))
	wantErr(t, err, alloc.ErrUnavailable)
	_, _, err = s.List(ctx, alloc.KindHost, "", 1, 0)
	wantErr(t, err, alloc.ErrUnavailable)
	_, err = s.Sync(ctx)
	wantErr(t, err, alloc.ErrUnavailable)
	_, err = s.Commit(ctx, alloc.Tx{Put: []alloc.Record{host("a", "2")}})
	wantErr(t, err, alloc.ErrUnknownOutcome, alloc.ErrUnavailable)
	if errors.Is(err, alloc.ErrUnavailable) {
		if got := nonce(t, s, "a"); got != "1" {
			t.Errorf("not reached, nothing written, and the host is at %q", got)
		}
	}
}
