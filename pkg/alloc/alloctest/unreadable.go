package alloctest

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Planter is a store that others write to behind its back, as a defect or a newer version would.
type Planter interface {
	alloc.Store
	// Plant puts a value under a key, byte by byte.
	Plant(ctx context.Context, key alloc.Key, value []byte) error
	// Newer is a record as a newer version might store it, so that this one cannot read it; ok is false
	// when it can, whatever a newer version adds.
	Newer(rec alloc.Record) (value []byte, ok bool)
}

// Malformed is a value that no store of ours can have written.
var Malformed = []byte{1, 0xff}

func plant(t testing.TB, s alloc.Store, key alloc.Key, value []byte) {
	t.Helper()
	if err := s.(Planter).Plant(t.Context(), key, value); err != nil {
		t.Fatal(err)
	}
}

// spoiled is the values that make rec unreadable, with the error that each one is.
func spoiled(s alloc.Store, rec alloc.Record) map[*alloc.Error][]byte {
	values := map[*alloc.Error][]byte{alloc.ErrMalformed: Malformed}
	if newer, ok := s.(Planter).Newer(rec); ok {
		values[alloc.ErrFormat] = newer
	}
	return values
}

// testUnreadable: one such record of each kind takes nothing else away from Get, List and Watch.
func testUnreadable(t *testing.T, s alloc.Store) {
	recs := Records(t)
	from := put(t, s, append(recs, host("z", "1"))...)
	f := follow(t, s, from)
	for i, rec := range recs {
		key := rec.Key()
		before := get(t, s, key)[0]
		for want, value := range spoiled(s, rec) {
			plant(t, s, key, value)
			entries, rev, err := s.Get(t.Context(), key, alloc.HostKey("z"))
			if err != nil || len(entries) != 2 {
				t.Fatalf("Get with %s: %v, %v", key, entries, err)
			}
			e := entries[0]
			if !errors.Is(e.Err, want) || e.Key != key || e.Record != nil || e.Token != alloc.Token(value) || e.Revision == 0 || e.Revision > rev {
				t.Errorf("Get of %s, which is %s, gives %+v", key, want.Reason, e)
			}
			owner := ""
			if sb, ok := rec.(*alloc.Sandbox); ok && want == alloc.ErrFormat {
				owner = sb.Owner
			}
			if e.Owner != owner {
				t.Errorf("%s, which is %s, is %q's, not %q's", key, want.Reason, e.Owner, owner)
			}
			if entries[1].Err != nil || entries[1].Record == nil {
				t.Errorf("beside %s: %+v", key, entries[1])
			}
			if key.ID != "" {
				listsUnreadable(t, s, e)
			}
			if !key.Kind.Watched() {
				continue
			}
			changes := f.until(e.Revision)
			if got, last := describeAll(changes), changes[len(changes)-1]; got != "!"+key.String() || !errors.Is(last.Err, want) || last.Record != nil || last.Token != e.Token || last.Owner != e.Owner {
				t.Errorf("the watch delivered %s: %+v", got, last)
			}
		}
		// Byte by byte what it was: a record again, with the same token.
		plant(t, s, key, []byte(before.Token))
		after := get(t, s, key)[0]
		if after.Token != before.Token || !reflect.DeepEqual(after.Record, recs[i]) {
			t.Errorf("%s came back as %+v, it was %+v", key, after, before)
		}
		if !key.Kind.Watched() {
			continue
		}
		if changes := f.until(after.Revision); len(changes) != 1 || changes[0].Err != nil || changes[0].Record == nil {
			t.Errorf("the watch delivered %+v", changes)
		}
	}
}

// listsUnreadable: a listing in pages of one has e in its place, and every other record.
func listsUnreadable(t *testing.T, s alloc.Store, e alloc.Entry) {
	t.Helper()
	var at alloc.Revision
	seen := 0
	for after := ""; ; {
		page, rev, err := s.List(t.Context(), e.Key.Kind, after, 1, at)
		if err != nil {
			t.Fatalf("List with %s: %v", e.Key, err)
		}
		if at = rev; len(page) == 0 {
			break
		}
		got := page[0]
		after = got.Key.ID
		switch {
		case got.Key != e.Key && (got.Err != nil || got.Record == nil):
			t.Errorf("beside %s: %+v", e.Key, got)
		case got.Key == e.Key:
			seen++
			if got.Record != nil || got.Token != e.Token || got.Revision != e.Revision || got.Owner != e.Owner || alloc.ReasonOf(got.Err) != alloc.ReasonOf(e.Err) {
				t.Errorf("List has %+v, Get has %+v", got, e)
			}
		}
	}
	if seen != 1 {
		t.Errorf("%s is listed %d times", e.Key, seen)
	}
}

// testUnreadableIsMoved: a guard holds on a value that cannot be read, so that it can be put aside.
func testUnreadableIsMoved(t *testing.T, s alloc.Store) {
	for n, rec := range Records(t) {
		for want, value := range spoiled(s, rec) {
			key := rec.Key()
			plant(t, s, key, value)
			entries, _, err := s.Get(t.Context(), key)
			if err != nil {
				t.Fatal(err)
			}
			e := entries[0]
			aside := &alloc.Aside{Request: fmt.Sprintf("%s-%d", want.Reason, n), Of: key, Value: []byte(e.Token)}
			move := alloc.Tx{Guards: []alloc.Guard{{Key: key, Token: e.Token}, {Key: aside.Key()}}, Put: []alloc.Record{aside}, Delete: []alloc.Key{key}}
			// It is neither absent nor another value.
			for _, token := range []alloc.Token{"", e.Token + "x"} {
				wrong := move
				wrong.Guards = []alloc.Guard{{Key: key, Token: token}, {Key: aside.Key()}}
				_, err := s.Commit(t.Context(), wrong)
				wantErr(t, err, alloc.ErrConflict)
			}
			commit(t, s, move)
			after := get(t, s, key, aside.Key())
			if after[0].Token != "" {
				t.Errorf("%s is still there: %+v", key, after[0])
			}
			if a, ok := after[1].Record.(*alloc.Aside); !ok || string(a.Value) != string(value) || a.Of != key {
				t.Errorf("%s was put aside as %+v, it was %x", key, after[1].Record, value)
			}
		}
	}
}

// testStintsOfOneSandbox: old stints of a sandbox stand side by side, in the order of their epochs.
func testStintsOfOneSandbox(t *testing.T, s alloc.Store) {
	const stints = 300
	var recs []alloc.Record
	for _, of := range []uint64{1, 2, 3} {
		for n := range stints {
			recs = append(recs, &alloc.OldStint{Sandbox: Serial(t, of), Stint: alloc.Stint{
				Host: "a", Epoch: 1<<48 + alloc.Epoch(n+1), Began: alloc.BeganClaimed, Over: alloc.OverHandedOff}})
		}
	}
	for len(recs) > 0 {
		n := min(len(recs), 100)
		put(t, s, recs[:n]...)
		recs = recs[n:]
	}
	var got []alloc.Epoch
	for after := Serial(t, 2).String(); ; {
		page, _, err := s.List(t.Context(), alloc.KindStint, after, 128, 0)
		if err != nil || len(page) == 0 {
			t.Fatal(page, err)
		}
		for _, e := range page {
			if o := e.Record.(*alloc.OldStint); o.Sandbox == Serial(t, 2) {
				got = append(got, o.Stint.Epoch)
			}
		}
		last := page[len(page)-1]
		if after = last.Key.ID; last.Record.(*alloc.OldStint).Sandbox != Serial(t, 2) {
			break
		}
	}
	if len(got) != stints {
		t.Fatalf("%d stints were listed", len(got))
	}
	for n, epoch := range got {
		if epoch != 1<<48+alloc.Epoch(n+1) {
			t.Fatalf("stint %d has epoch %s", n, epoch)
		}
	}
}
