package alloctest

import (
	"fmt"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// testWatchLeavesOut: what every Allocate changes is not delivered, also beside what is.
func testWatchLeavesOut(t *testing.T, s alloc.Store) {
	f := follow(t, s, put(t, s, host("a", "1")))
	recs := Records(t)
	var want []string
	for _, rec := range recs {
		if rec.Key().Kind.Watched() {
			want = append(want, rec.Key().String())
		}
		put(t, s, rec)
	}
	last := commit(t, s, alloc.Tx{Put: []alloc.Record{&alloc.Lane{ID: "1"}, &alloc.Request{ID: "1"}, host("z", "1")}, Delete: []alloc.Key{{Kind: alloc.KindLane, ID: "0123456789abcdef0123456789abcdef"}}})
	var got []string
	for _, c := range f.until(last) {
		if c.Key != alloc.HostKey("z") {
			got = append(got, c.Key.String())
		}
	}
	if fmt.Sprint(got) != fmt.Sprint(want) || len(want) == len(recs) {
		t.Errorf("delivered %v, want %v", got, want)
	}
}

// testToken: the token of a record is known before it is read back.
func testToken(t *testing.T, s alloc.Store) {
	for _, rec := range Records(t) {
		token, err := s.Token(rec)
		if err != nil {
			t.Fatal(err)
		}
		put(t, s, rec)
		if e := get(t, s, rec.Key())[0]; e.Token != token {
			t.Errorf("%s has token %q, Token says %q", e.Key, e.Token, token)
		}
		commit(t, s, alloc.Tx{Guards: []alloc.Guard{{Key: rec.Key(), Token: token}}, Delete: []alloc.Key{rec.Key()}})
	}
	_, err := s.Token(&alloc.Sandbox{State: "nowhere"})
	wantErr(t, err, alloc.ErrInvalid)
}

// testDeleteSpans: a span has the records of its kind after its beginning, up to and with its end.
func testDeleteSpans(t *testing.T, s alloc.Store) {
	fill := func() {
		for _, id := range []string{"a", "aa", "b", "c", "cc", "d"} {
			put(t, s, &alloc.Request{ID: id}, &alloc.Lane{ID: id}, host(id, "1"))
		}
	}
	ids := func(kind alloc.Kind) (all string) {
		entries, _, err := s.List(t.Context(), kind, "", 100, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			all += e.Key.ID + " "
		}
		return all
	}
	const whole = "a aa b c cc d "
	for _, test := range []struct {
		after, through, want string
	}{
		{"a", "c", "a cc d "}, {"", "a", "aa b c cc d "}, {"", "zz", ""}, {"c", "c", whole}, {"d", "a", whole}, {"bb", "cb", "a aa b cc d "}, {"d", "zz", whole},
	} {
		fill()
		rev := commit(t, s, alloc.Tx{Put: []alloc.Record{host("z", "1")}, DeleteSpans: []alloc.Span{{Kind: alloc.KindRequest, After: test.after, Through: test.through}}})
		if got := ids(alloc.KindRequest); got != test.want || ids(alloc.KindLane) != whole {
			t.Errorf("(%s..%s] left %q of requests, want %q; of lanes %q", test.after, test.through, got, test.want, ids(alloc.KindLane))
		}
		if z := get(t, s, alloc.HostKey("z"))[0]; z.Revision != rev {
			t.Errorf("beside a span host z was written at %d, not %d", z.Revision, rev)
		}
	}
	// Hosts are watched: what a span deletes is delivered.
	fill()
	f := follow(t, s, put(t, s, host("z", "2")))
	span := []alloc.Span{{Kind: alloc.KindHost, After: "a", Through: "b"}}
	if got := describeAll(f.until(commit(t, s, alloc.Tx{DeleteSpans: span}))); got != "-host/aa -host/b" {
		t.Errorf("delivered %s", got)
	}
	// Guards hold for spans as for all else.
	fill()
	_, err := s.Commit(t.Context(), alloc.Tx{Guards: []alloc.Guard{{Key: alloc.HostKey("z")}}, DeleteSpans: span})
	wantErr(t, err, alloc.ErrConflict)
	if got := ids(alloc.KindHost); got != whole+"z " {
		t.Errorf("a conflict left %q", got)
	}
	for _, tx := range []alloc.Tx{
		{DeleteSpans: []alloc.Span{{Kind: alloc.KindCounter, Through: "z"}}},
		{DeleteSpans: []alloc.Span{{Kind: "rest", Through: "z"}}},
		{Put: []alloc.Record{host("b", "2")}, DeleteSpans: span},
		{Delete: []alloc.Key{alloc.HostKey("b")}, DeleteSpans: span},
	} {
		_, err := s.Commit(t.Context(), tx)
		wantErr(t, err, alloc.ErrInvalid)
	}
	many := alloc.Tx{}
	for i := range 129 {
		many.DeleteSpans = append(many.DeleteSpans, alloc.Span{Kind: alloc.KindRequest, After: fmt.Sprintf("%03d", i), Through: fmt.Sprintf("%03d", i+1)})
	}
	_, err = s.Commit(t.Context(), many)
	wantErr(t, err, alloc.ErrTooLarge)
}
