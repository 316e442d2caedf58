package alloc

import (
	"fmt"
	"slices"
)

// Range is Count serials of one generation that follow each other, from First on.
type Range struct {
	First Serial `json:"first"`
	Count uint64 `json:"count"`
}

// Limits of one request.
const (
	// MaxAllocate is how many serials one Allocate or one grant can ask for.
	MaxAllocate = 1 << 20
	// MaxRegister is how many sandboxes one registration can carry: with their guards they fit
	// etcd's 128 operations a transaction.
	MaxRegister = 60
	// MaxBindings is how many bindings one sandbox can have.
	MaxBindings = 4096
)

// Valid reports whether r holds at least one serial and all of them are valid.
func (r Range) Valid() bool {
	return r.First.Valid() && r.Count > 0 && r.Count <= MaxCounter && r.First.Counter()+r.Count-1 <= MaxCounter
}

// Last is the last serial of a valid range.
func (r Range) Last() Serial { return r.First + Serial(r.Count-1) }

// Contains reports whether s is in r.
func (r Range) Contains(s Serial) bool { return r.Count > 0 && s >= r.First && s <= r.Last() }

// String is FIRST+COUNT.
func (r Range) String() string { return fmt.Sprintf("%s+%d", r.First, r.Count) }

// Ranges is a list of ranges that are used up from the front.
type Ranges []Range

// Count is the number of serials in all.
func (rs Ranges) Count() uint64 {
	var n uint64
	for _, r := range rs {
		n += r.Count
	}
	return n
}

// Contains reports whether s is in one of the ranges.
func (rs Ranges) Contains(s Serial) bool {
	return slices.ContainsFunc(rs, func(r Range) bool { return r.Contains(s) })
}

// Take splits off the first n serials. It reports false and takes nothing when there are fewer.
func (rs Ranges) Take(n uint64) (taken, rest Ranges, ok bool) {
	if rs.Count() < n {
		return nil, rs, false
	}
	rest = slices.Clone(rs)
	for n > 0 {
		r := rest[0]
		k := min(n, r.Count)
		taken = append(taken, Range{First: r.First, Count: k})
		if k == r.Count {
			rest = rest[1:]
		} else {
			rest[0] = Range{First: r.First + Serial(k), Count: r.Count - k}
		}
		n -= k
	}
	return taken, rest, true
}

// Spend removes spent from the front of rs. It reports false unless spent is exactly what Take of
// the same number would have taken: that equality is the compare-and-swap of a host's cursor. A
// clone of the host that spent the same serials before makes it fail.
func (rs Ranges) Spend(spent Ranges) (rest Ranges, ok bool) {
	taken, rest, ok := rs.Take(spent.Count())
	if !ok || !slices.Equal(taken, spent) {
		return rs, false
	}
	return rest, true
}

// in is those of generation g; nil for none.
func (rs Ranges) in(g Generation) Ranges {
	var of Ranges
	for _, r := range rs {
		if r.First.Generation() == g {
			of = append(of, r)
		}
	}
	return of
}

// All yields every serial in order, for ranges of a size that is meant to be walked.
func (rs Ranges) All() func(yield func(Serial) bool) {
	return func(yield func(Serial) bool) {
		for _, r := range rs {
			for i := range r.Count {
				if !yield(r.First + Serial(i)) {
					return
				}
			}
		}
	}
}
