package client

import (
	"errors"
	"testing"
)

// TestPagesIncomplete: what one page left out is missing in the whole, also when a later one left out nothing.
func TestPagesIncomplete(t *testing.T) {
	one, two := 1, 2
	answers := map[string]struct {
		items   []*int
		next    string
		leftOut uint64
	}{"": {[]*int{&one}, "b", 1}, "b": {[]*int{&two}, "", 0}}
	var got []int
	var last error
	for n, err := range pages("numbers", func(token string) ([]*int, string, uint64, error) {
		a := answers[token]
		return a.items, a.next, a.leftOut, nil
	}, func(n *int) *int { return n }) {
		if last = err; err == nil {
			got = append(got, *n)
		}
	}
	if len(got) != 2 || !errors.Is(last, ErrIncomplete) {
		t.Errorf("%v, then %v", got, last)
	}
}
