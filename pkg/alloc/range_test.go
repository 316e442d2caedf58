package alloc_test

import (
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

const first = alloc.Serial(1<<48 + 1)

func TestRangeLimits(t *testing.T) {
	last := alloc.Serial(1<<48 | alloc.MaxCounter)
	for _, c := range []struct {
		r  alloc.Range
		ok bool
	}{
		{alloc.Range{First: first, Count: 1}, true},
		{alloc.Range{First: first, Count: alloc.MaxCounter}, true},
		{alloc.Range{First: last, Count: 1}, true},
		{alloc.Range{First: last, Count: 2}, false},
		{alloc.Range{First: first, Count: alloc.MaxCounter + 1}, false},
		{alloc.Range{First: first, Count: 1<<64 - 1}, false},
		{alloc.Range{First: first}, false},
		{alloc.Range{Count: 1}, false},
		{alloc.Range{First: 1 << 48, Count: 1}, false},
		{alloc.Range{First: 1<<63 + 1, Count: 1}, false},
	} {
		if c.r.Valid() != c.ok {
			t.Errorf("%s valid: %v", c.r, c.r.Valid())
		}
	}
	r := alloc.Range{First: first, Count: 3}
	if r.Contains(first-1) || !r.Contains(first) || !r.Contains(first+2) || r.Contains(first+3) || (alloc.Range{First: first}).Contains(first) {
		t.Error("Contains is wrong at an end")
	}
	if r.Last() != first+2 || r.String() != "0001000000000001+3" {
		t.Errorf("%s ends at %s", r, r.Last())
	}
}

// genRanges draws ranges that do not overlap, some beside each other.
func genRanges() *rapid.Generator[alloc.Ranges] {
	return rapid.Custom(func(t *rapid.T) (rs alloc.Ranges) {
		at := first
		for range rapid.IntRange(0, 5).Draw(t, "ranges") {
			at += alloc.Serial(rapid.Uint64Range(0, 3).Draw(t, "gap"))
			n := rapid.Uint64Range(1, 5).Draw(t, "count")
			rs = append(rs, alloc.Range{First: at, Count: n})
			at += alloc.Serial(n)
		}
		return rs
	})
}

func each(rs alloc.Ranges) (s []alloc.Serial) {
	for x := range rs.All() {
		s = append(s, x)
	}
	return s
}

func TestTakeAndSpend(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rs := genRanges().Draw(t, "ranges")
		before := slices.Clone(rs)
		n := rapid.Uint64Range(0, rs.Count()+2).Draw(t, "n")
		taken, rest, ok := rs.Take(n)
		if !slices.Equal(rs, before) {
			t.Fatalf("Take changed %v to %v", before, rs)
		}
		if ok != (n <= rs.Count()) {
			t.Fatalf("%d of %d: %v", n, rs.Count(), ok)
		}
		if !ok {
			if taken != nil || !slices.Equal(rest, rs) {
				t.Fatalf("a Take that failed gave %v, %v", taken, rest)
			}
			return
		}
		if !slices.Equal(append(each(taken), each(rest)...), each(rs)) || taken.Count() != n {
			t.Fatalf("%v split at %d is %v and %v", rs, n, taken, rest)
		}
		for _, r := range slices.Concat(taken, rest) {
			if !r.Valid() {
				t.Fatalf("%v split at %d has %s", rs, n, r)
			}
		}
		// Spend is the compare-and-swap: the front and nothing else, once.
		left, ok := rs.Spend(taken)
		if !ok || !slices.Equal(left, rest) || !slices.Equal(rs, before) {
			t.Fatalf("spending %v of %v leaves %v, %v", taken, rs, left, ok)
		}
		if n > 0 {
			if again, ok := left.Spend(taken); ok || !slices.Equal(again, left) {
				t.Fatalf("%v was spent twice", taken)
			}
			other := slices.Clone(taken)
			i := rapid.IntRange(0, len(other)-1).Draw(t, "which")
			if rapid.Bool().Draw(t, "first") {
				other[i].First++
			} else {
				other[i].Count++
			}
			if got, ok := rs.Spend(other); ok && !slices.Equal(other, mustTake(rs, other.Count())) {
				t.Fatalf("%v was spent from %v, leaving %v", other, rs, got)
			}
		}
	})
}

func mustTake(rs alloc.Ranges, n uint64) alloc.Ranges {
	taken, _, _ := rs.Take(n)
	return taken
}

func TestSpendNotTheFront(t *testing.T) {
	rs := alloc.Ranges{{First: first, Count: 4}, {First: first + 4, Count: 4}}
	for _, spent := range []alloc.Ranges{
		{{First: first + 1, Count: 1}},                           // not the front
		{{First: first, Count: 2}, {First: first + 2, Count: 2}}, // not in one piece
		{{First: first, Count: 8}},                               // two ranges as one
		{{First: first + 4, Count: 4}},                           // the second first
		{{First: first, Count: 4}, {First: first + 4, Count: 5}}, // more than there is
	} {
		if left, ok := rs.Spend(spent); ok || !slices.Equal(left, rs) {
			t.Errorf("%v was spent, leaving %v", spent, left)
		}
	}
}
