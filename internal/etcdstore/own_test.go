package etcdstore

import (
	"context"
	"reflect"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// TestOwnWrites: a watch delivers what its own process wrote as what was written, and as it delivers the
// same values of others.
func TestOwnWrites(t *testing.T) {
	s := newStore(t, shared.Endpoint())
	now := time.Unix(1_700_000_000, 5).UTC()
	sb := func(n int) *alloc.Sandbox {
		first := alloc.Serial(1<<48 + 1 + 2*n)
		return &alloc.Sandbox{Serial: first, State: alloc.StateRunning, Owner: "a", Epoch: 1<<48 + 1, Created: now,
			Bindings: []alloc.Binding{{Serial: first + 1, Type: alloc.UTS, Bound: now, Kernel: alloc.KernelID{BootID: "b", ID: 7, Inode: 8}}},
			Stints:   []alloc.Stint{{Host: "a", Epoch: 1<<48 + 1, From: now, Began: alloc.BeganRegistered, Actor: "host/a"}}}
	}
	from, err := s.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{host("a", "1")}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	changes := make(chan alloc.Change, 100)
	go func() {
		defer close(changes)
		_ = s.Watch(ctx, from, func(_ alloc.Revision, cs []alloc.Change) {
			for _, c := range cs {
				changes <- c
			}
		})
	}()
	deadline := time.Now().Add(time.Minute)
	for running := 0; running == 0; { // from then on what is written is remembered
		if time.Now().After(deadline) {
			t.Fatal("the watch does not begin")
		}
		s.mu.Lock()
		running = len(s.watches)
		s.mu.Unlock()
	}
	mine, others, planted := sb(1), sb(2), sb(3)
	if _, err := s.Commit(ctx, alloc.Tx{Put: []alloc.Record{mine}}); err != nil {
		t.Fatal(err)
	}
	value, err := encode(others)
	if err != nil {
		t.Fatal(err)
	}
	put := func(key alloc.Key, value []byte) {
		at, err := s.keys.etcd(key)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.client.etcd.Put(ctx, string(at), string(value)); err != nil {
			t.Fatal(err)
		}
	}
	put(others.Key(), value)
	got := []alloc.Change{<-changes, <-changes}
	// A value that we remember, under a key that it is not of.
	s.own.remember(value, others)
	put(planted.Key(), value)
	got = append(got, <-changes)
	if got[0].Record != alloc.Record(mine) {
		t.Errorf("ours was read anew: %+v", got[0])
	}
	if token, err := s.Token(mine); err != nil || got[0].Token != token || got[0].Key != mine.Key() || got[0].Revision <= from {
		t.Errorf("ours: %+v, %v", got[0], err)
	}
	if got[1].Record == alloc.Record(others) || !reflect.DeepEqual(got[1].Record, alloc.Record(others)) {
		t.Errorf("another's: %+v, want %+v, read", got[1].Record, others)
	}
	if got[2].Record != nil || alloc.ReasonOf(got[2].Err) != alloc.ReasonMalformed {
		t.Errorf("a value under another's key: %+v", got[2])
	}
}

// TestOwnIsBounded: what is never delivered leaves.
func TestOwnIsBounded(t *testing.T) {
	var o own
	for n := range 3 * mostOwn {
		serial := alloc.Serial(1<<48 + 1 + n)
		o.remember([]byte(serial.String()), &alloc.Sandbox{Serial: serial})
	}
	if len(o.records) != mostOwn {
		t.Errorf("%d are kept, want %d", len(o.records), mostOwn)
	}
	last := alloc.Serial(1<<48 + 3*mostOwn)
	if token, sb := o.take(alloc.SandboxKey(last), []byte(last.String())); token != alloc.Token(last.String()) || sb == nil || sb.Serial != last {
		t.Errorf("the last one: %q, %+v", token, sb)
	}
	if _, sb := o.take(alloc.SandboxKey(last), []byte(last.String())); sb != nil {
		t.Errorf("twice: %+v", sb)
	}
}
