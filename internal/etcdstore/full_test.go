package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/nsalloc/nsalloc/internal/etcdembed"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// TestFull: an etcd whose database is full refuses at once, and says what to do. What is answered otherwise was
// written, and nothing that was refused is, then or later. When it has been done, all goes on.
func TestFull(t *testing.T) {
	srv, err := etcdembed.Start(t.Context(), etcdembed.Config{Dir: shortDir(t), Quota: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
	})
	s := newStore(t, srv.Endpoint())
	put(t, s, host("a", "0"))
	// set writes n into the record of host a, and reads back what became of it.
	set := func(n int) (took time.Duration, refused error) {
		t.Helper()
		entries, _, err := s.Get(t.Context(), alloc.HostKey("a"))
		if err != nil {
			t.Fatal(err)
		}
		value, began := fmt.Sprint(n), time.Now()
		_, err = s.Commit(t.Context(), alloc.Tx{
			Guards: []alloc.Guard{{Key: entries[0].Key, Token: entries[0].Token}},
			Put:    []alloc.Record{host("a", value), host("filler", strings.Repeat(value, 100_000/len(value)))},
		})
		took = time.Since(began)
		switch written := nonce(t, s, "a") == value; {
		case err == nil && !written:
			t.Fatalf("write %d was answered and is not there", n)
		case errors.Is(err, alloc.ErrUnavailable) && written:
			t.Fatalf("write %d was refused and is there: %v", n, err)
		}
		return took, err
	}
	var refused error
	n, unknown := 0, 0
	for ; refused == nil && n < 200; n++ {
		took, err := set(n)
		switch {
		case errors.Is(err, alloc.ErrUnknownOutcome):
			unknown++ // the one that was applied while the alarm was raised
		case err != nil:
			if refused = err; took > time.Second {
				t.Errorf("it is refused after %v", took)
			}
		}
	}
	if !errors.Is(refused, alloc.ErrUnavailable) {
		t.Fatalf("after %d writes: %v", n, refused)
	}
	e, _ := errors.AsType[*alloc.Error](refused)
	for _, want := range []string{"full", "NOSPACE", "nothing was written"} {
		if !strings.Contains(e.Msg, want) {
			t.Errorf("it says %q, without %q", e.Msg, want)
		}
	}
	for _, want := range []string{"compact", "defragment", "disarm", "docs/install.md"} {
		if !strings.Contains(e.Fix, want) {
			t.Errorf("its fix is %q, without %q", e.Fix, want)
		}
	}
	if unknown > 1 {
		t.Errorf("%d outcomes are unknown", unknown)
	}

	// What the fix says, as an operator does it.
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	etcd := s.client.etcd
	now, err := etcd.Get(ctx, "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := etcd.Compact(ctx, now.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	if _, err := etcd.Defragment(ctx, srv.Endpoint()); err != nil {
		t.Fatal(err)
	}
	if _, err := set(n); !errors.Is(err, alloc.ErrUnavailable) {
		t.Errorf("the alarm still stands: %v", err)
	}
	if _, err := etcd.AlarmDisarm(ctx, &clientv3.AlarmMember{}); err != nil {
		t.Fatal(err)
	}
	if _, err := set(n + 1); err != nil {
		t.Error(err)
	}
}
