package alloctest

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

func testEmpty(t *testing.T, s alloc.Store) {
	for _, rec := range Records(t) {
		if e := get(t, s, rec.Key())[0]; e.Record != nil {
			t.Errorf("an empty store has %+v", e)
		}
	}
	entries, _, err := s.List(t.Context(), alloc.KindHost, "", 10, 0)
	if err != nil || len(entries) != 0 {
		t.Errorf("an empty store lists %v, %v", entries, err)
	}
}

func testKeepsEveryKind(t *testing.T, s alloc.Store) {
	recs := Records(t)
	rev := put(t, s, recs...)
	var keys []alloc.Key
	for _, rec := range recs {
		keys = append(keys, rec.Key())
	}
	tokens := make(map[alloc.Token]bool)
	for i, e := range get(t, s, keys...) {
		if !reflect.DeepEqual(e.Record, recs[i]) {
			t.Errorf("put %+v\ngot %+v", recs[i], e.Record)
		}
		if e.Revision != rev {
			t.Errorf("%s was written at %d and says %d", e.Key, rev, e.Revision)
		}
		tokens[e.Token] = true
	}
	if len(tokens) != len(recs) {
		t.Errorf("%d different records have %d tokens", len(recs), len(tokens))
	}
	// What was read belongs to the reader.
	get(t, s, alloc.HostKey("a"))[0].Record.(*alloc.Host).Labels["rack"] = "changed"
	if h := get(t, s, alloc.HostKey("a"))[0].Record.(*alloc.Host); h.Labels["rack"] != "r1" {
		t.Errorf("changing a record that was read changed the store: %v", h.Labels)
	}
}

func testKeepsExtra(t *testing.T, s alloc.Store) {
	// Field 1000 of the stored form, a varint: what a newer version might have put there.
	extra := []byte{0xc0, 0x3e, 0x07}
	for _, rec := range []alloc.Record{
		&alloc.Sandbox{Serial: Serial(t, 1), State: alloc.StateClaimed, Owner: "a", Epoch: 1<<48 + 1, Extra: extra,
			Bindings: []alloc.Binding{{Serial: Serial(t, 2), Type: alloc.PID, Extra: extra}},
			Stints:   []alloc.Stint{{Host: "a", Epoch: 1<<48 + 1, Began: alloc.BeganClaimed, Extra: extra}},
			Claim:    &alloc.Claim{Claimant: alloc.Claimant{Host: "a", Run: "1"}, From: alloc.StateInTransit, Extra: extra}},
		&alloc.Pool{UUID: "u", State: alloc.PoolOpen, Policy: alloc.DefaultPolicy(), PolicyExtra: extra, Extra: extra},
	} {
		put(t, s, rec)
		for range 2 { // read, write what was read, read
			e := get(t, s, rec.Key())[0]
			if !reflect.DeepEqual(e.Record, rec) {
				t.Fatalf("put %+v\ngot %+v", rec, e.Record)
			}
			put(t, s, e.Record)
		}
	}
}

func testGetIsOfOneRevision(t *testing.T, s alloc.Store) {
	// More keys than etcd takes in one transaction; a writer changes the first and the last together.
	var keys []alloc.Key
	for i := range 300 {
		keys = append(keys, alloc.HostKey(fmt.Sprintf("h%03d", i)))
	}
	first, last := keys[0].ID, keys[len(keys)-1].ID
	put(t, s, host(first, "0"), host(last, "0"))
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			n := fmt.Sprint(i)
			if _, err := s.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{host(first, n), host(last, n)}}); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for range 50 {
		entries := get(t, s, keys...)
		a, b := entries[0].Record.(*alloc.Host).Nonce, entries[len(entries)-1].Record.(*alloc.Host).Nonce
		if a != b {
			t.Errorf("one Get saw %s and %s", a, b)
		}
	}
	stop()
	wg.Wait()
}

func testGuardsCompareValues(t *testing.T, s alloc.Store) {
	put(t, s, host("a", "1"))
	old := get(t, s, alloc.HostKey("a"))[0]
	commit(t, s, alloc.Tx{Guards: []alloc.Guard{{Key: old.Key, Token: old.Token}}, Put: []alloc.Record{host("a", "2")}})
	_, err := s.Commit(t.Context(), alloc.Tx{Guards: []alloc.Guard{{Key: old.Key, Token: old.Token}}, Put: []alloc.Record{host("a", "3")}})
	wantErr(t, err, alloc.ErrConflict)
	if got := nonce(t, s, "a"); got != "2" {
		t.Errorf("the host is at %q", got)
	}
	// By value, never by version: back to the old value, the old token holds again.
	put(t, s, host("a", "1"))
	commit(t, s, alloc.Tx{Guards: []alloc.Guard{{Key: old.Key, Token: old.Token}}, Delete: []alloc.Key{old.Key}})
	_, err = s.Commit(t.Context(), alloc.Tx{Guards: []alloc.Guard{{Key: old.Key, Token: old.Token}}, Put: []alloc.Record{host("a", "4")}})
	wantErr(t, err, alloc.ErrConflict) // absent is not the old value
}

func testGuardsCompareAbsence(t *testing.T, s alloc.Store) {
	absent := []alloc.Guard{{Key: alloc.HostKey("a")}}
	commit(t, s, alloc.Tx{Guards: absent, Put: []alloc.Record{host("a", "1")}})
	_, err := s.Commit(t.Context(), alloc.Tx{Guards: absent, Put: []alloc.Record{host("a", "2")}})
	wantErr(t, err, alloc.ErrConflict)
	commit(t, s, alloc.Tx{Delete: []alloc.Key{alloc.HostKey("a")}})
	commit(t, s, alloc.Tx{Guards: absent, Put: []alloc.Record{host("a", "3")}})
	if got := nonce(t, s, "a"); got != "3" {
		t.Errorf("the host is at %q", got)
	}
}

func testConflictWritesNothing(t *testing.T, s alloc.Store) {
	put(t, s, host("a", "1"), host("b", "1"), host("c", "1"))
	e := get(t, s, alloc.HostKey("a"), alloc.HostKey("b"))
	_, before, err := s.Get(t.Context(), alloc.HostKey("a"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Commit(t.Context(), alloc.Tx{
		Guards: []alloc.Guard{{Key: e[0].Key, Token: e[0].Token}, {Key: e[1].Key, Token: e[0].Token + "x"}},
		Put:    []alloc.Record{host("a", "2"), host("d", "2")}, Delete: []alloc.Key{alloc.HostKey("c")},
	})
	wantErr(t, err, alloc.ErrConflict)
	if got := nonce(t, s, "a") + nonce(t, s, "b") + nonce(t, s, "c") + nonce(t, s, "d"); got != "111" {
		t.Errorf("after a conflict the hosts are at %q", got)
	}
	for _, e := range get(t, s, alloc.HostKey("a"), alloc.HostKey("c")) {
		if e.Revision > before {
			t.Errorf("%s was touched by a conflict", e.Key)
		}
	}
}

func testCommitIsOneRevision(t *testing.T, s alloc.Store) {
	first := put(t, s, host("a", "1"))
	rev := commit(t, s, alloc.Tx{Put: []alloc.Record{host("b", "1"), host("c", "1")}, Delete: []alloc.Key{alloc.HostKey("a"), alloc.HostKey("z")}})
	if rev <= first {
		t.Errorf("revision %d came after %d", rev, first)
	}
	e := get(t, s, alloc.HostKey("a"), alloc.HostKey("b"), alloc.HostKey("c"))
	if e[0].Record != nil || e[1].Revision != rev || e[2].Revision != rev {
		t.Errorf("a transaction at %d left %+v", rev, e)
	}
	// Guards without a write are a question.
	commit(t, s, alloc.Tx{Guards: []alloc.Guard{{Key: e[1].Key, Token: e[1].Token}}})
	_, err := s.Commit(t.Context(), alloc.Tx{Guards: []alloc.Guard{{Key: e[1].Key}}})
	wantErr(t, err, alloc.ErrConflict)
}

func testRefusesBadTransactions(t *testing.T, s alloc.Store) {
	for name, tx := range map[string]alloc.Tx{
		"put twice":        {Put: []alloc.Record{host("a", "1"), host("a", "2")}},
		"put and delete":   {Put: []alloc.Record{host("a", "1")}, Delete: []alloc.Key{alloc.HostKey("a")}},
		"delete twice":     {Delete: []alloc.Key{alloc.HostKey("a"), alloc.HostKey("a")}},
		"no kind":          {Delete: []alloc.Key{{ID: "x"}}},
		"unknown kind":     {Delete: []alloc.Key{{Kind: "hosts", ID: "x"}}},
		"host without id":  {Put: []alloc.Record{host("", "1")}},
		"pool with an id":  {Delete: []alloc.Key{{Kind: alloc.KindPool, ID: "x"}}},
		"guard of no kind": {Guards: []alloc.Guard{{Key: alloc.Key{ID: "x"}}}, Put: []alloc.Record{host("a", "1")}},
	} {
		if _, err := s.Commit(t.Context(), tx); !errors.Is(err, alloc.ErrInvalid) {
			t.Errorf("%s: %v, want %s", name, err, alloc.ReasonInvalid)
		}
	}
	if got := nonce(t, s, "a"); got != "" {
		t.Errorf("a refused transaction wrote %q", got)
	}
}

// testCountersNeverRepeat is what everything rests on: many issuers advance one counter by
// compare-and-swap, and no number is had by two.
func testCountersNeverRepeat(t *testing.T, s alloc.Store) {
	const issuers, each = 4, 25
	put(t, s, &alloc.Counter{Generation: 1, Next: 1})
	key := (&alloc.Counter{}).Key()
	var mu sync.Mutex
	var issued []uint64
	var wg sync.WaitGroup
	for i := range issuers {
		wg.Go(func() {
			for n := 0; n < each; {
				entries, _, err := s.Get(t.Context(), key)
				if err != nil {
					t.Error(err)
					return
				}
				c := *entries[0].Record.(*alloc.Counter)
				mine := c.Next
				c.Next, c.Nonce = mine+1, fmt.Sprintf("%d.%d", i, n)
				_, err = s.Commit(t.Context(), alloc.Tx{Guards: []alloc.Guard{{Key: key, Token: entries[0].Token}}, Put: []alloc.Record{&c}})
				if errors.Is(err, alloc.ErrConflict) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				issued = append(issued, mine)
				mu.Unlock()
				n++
			}
		})
	}
	wg.Wait()
	slices.Sort(issued)
	for i, n := range issued {
		if n != uint64(i+1) {
			t.Fatalf("issued %v", issued)
		}
	}
	if len(issued) != issuers*each {
		t.Errorf("%d were issued", len(issued))
	}
}

func testListPages(t *testing.T, s alloc.Store) {
	var want []string
	var recs []alloc.Record
	for i := range 25 {
		name := fmt.Sprintf("h%d", i) // h1 and h10 are beside each other
		want = append(want, name)
		recs = append(recs, host(name, "1"))
	}
	// Neighbours of other kinds are not listed.
	recs = append(recs, slices.DeleteFunc(Records(t), func(r alloc.Record) bool { return r.Key().Kind == alloc.KindHost })...)
	put(t, s, recs...)
	slices.Sort(want)
	for _, limit := range []int{1, 7, 25, 1000} {
		var got []string
		var at alloc.Revision
		for after := ""; ; {
			entries, rev, err := s.List(t.Context(), alloc.KindHost, after, limit, at)
			if err != nil {
				t.Fatal(err)
			}
			if at != 0 && rev != at {
				t.Errorf("a page pinned at %d says %d", at, rev)
			}
			at = rev
			for _, e := range entries {
				got = append(got, e.Key.ID)
				if e.Token == "" || e.Record.Key() != e.Key {
					t.Errorf("listed %+v", e)
				}
				after = e.Key.ID
			}
			if len(entries) < limit {
				break
			}
		}
		if strings.Join(got, " ") != strings.Join(want, " ") {
			t.Errorf("pages of %d: %v\nwant %v", limit, got, want)
		}
	}
	e := get(t, s, alloc.HostKey("h7"))[0]
	entries, _, err := s.List(t.Context(), alloc.KindHost, "h6", 1, 0)
	if err != nil || len(entries) != 1 || !reflect.DeepEqual(entries[0], e) {
		t.Errorf("List gives %+v, %v\nGet gives  %+v", entries, err, e)
	}
}

func testListIsPinned(t *testing.T, s alloc.Store) {
	put(t, s, host("a", "1"), host("b", "1"), host("c", "1"))
	page, at, err := s.List(t.Context(), alloc.KindHost, "", 1, 0)
	if err != nil || len(page) != 1 {
		t.Fatal(page, err)
	}
	put(t, s, host("aa", "2"), host("b", "2"))
	commit(t, s, alloc.Tx{Delete: []alloc.Key{alloc.HostKey("c")}})
	rest, rev, err := s.List(t.Context(), alloc.KindHost, "a", 10, at)
	if err != nil || rev != at {
		t.Fatal(rev, err)
	}
	var got []string
	for _, e := range rest {
		got = append(got, e.Key.ID+"="+e.Record.(*alloc.Host).Nonce)
	}
	if s := strings.Join(got, " "); s != "b=1 c=1" {
		t.Errorf("the second page of a listing at %d is %s", at, s)
	}
}

func testListRefuses(t *testing.T, s alloc.Store) {
	for _, c := range []struct {
		kind  alloc.Kind
		limit int
	}{{alloc.KindHost, 0}, {alloc.KindHost, -1}, {alloc.KindHost, 1001}, {"", 1}, {"hosts", 1}, {alloc.KindPool, 1}, {alloc.KindCounter, 1}} {
		_, _, err := s.List(t.Context(), c.kind, "", c.limit, 0)
		wantErr(t, err, alloc.ErrInvalid)
	}
	_, _, err := s.Get(t.Context(), alloc.Key{Kind: "hosts", ID: "a"})
	wantErr(t, err, alloc.ErrInvalid)
}
