package alloctest

import (
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// history reads all stints of a sandbox in pages of limit.
func (p *Pool) history(t testing.TB, sandbox alloc.Serial, limit int) (all []alloc.Stint) {
	t.Helper()
	var after alloc.Epoch
	for {
		page, rev, err := p.History(t.Context(), sandbox, after, limit)
		if err != nil || rev == 0 || len(page) > limit {
			t.Fatalf("a page of %d after %s: %d stints at %d, %v", limit, after, len(page), rev, err)
		}
		all = append(all, page...)
		if len(page) < limit {
			return all
		}
		after = page[len(page)-1].Epoch
	}
}

// wholeHistory fails the test when sb, which was registered and runs, is not told to have had n stints.
func wholeHistory(t *testing.T, p *Pool, sb *alloc.Sandbox, n int) {
	t.Helper()
	for _, limit := range []int{1, 7, n - 32, n - 31, n, n + 1, alloc.MaxHistory} {
		all := p.history(t, sb.Serial, limit)
		if len(all) != n {
			t.Errorf("in pages of %d there are %d stints, want %d", limit, len(all), n)
			continue
		}
		for i, st := range all {
			began, over := alloc.BeganClaimed, alloc.OverHandedOff
			if i == 0 {
				began = alloc.BeganRegistered
			}
			if i == n-1 {
				over = ""
			}
			if st.Epoch != alloc.Epoch(1<<48+uint64(i)+1) || st.Began != began || st.Over != over {
				t.Errorf("in pages of %d stint %d is %+v", limit, i, st)
			}
		}
	}
	_, _, err := p.History(t.Context(), sb.Serial+9000, 0, 10)
	refused(t, err, alloc.ErrSandboxNotFound)
	for _, limit := range []int{-1, 0, alloc.MaxHistory + 1} {
		_, _, err := p.History(t.Context(), sb.Serial, 0, limit)
		refused(t, err, alloc.ErrInvalid)
	}
	// A history with a hole in it is none, and another sandbox's hole is not in it.
	other := (&alloc.OldStint{Sandbox: sb.Serial + 1, Stint: alloc.Stint{Epoch: 1}}).Key()
	plant(t, p.Store, other, Malformed)
	if all := p.history(t, sb.Serial, alloc.MaxHistory); len(all) != n {
		t.Errorf("beside another's hole there are %d stints", len(all))
	}
	commit(t, p.Store, alloc.Tx{Delete: []alloc.Key{other}})
	old := (&alloc.OldStint{Sandbox: sb.Serial, Stint: alloc.Stint{Epoch: 1<<48 + 3}}).Key()
	read := useCase{"History", func() error { _, _, err := p.History(t.Context(), sb.Serial, 0, 1000); return err }}
	// After the hole, it does not matter.
	after := useCase{"History after", func() error {
		if page, _, err := p.History(t.Context(), sb.Serial, 1<<48+3, 5); err != nil || page[0].Epoch != 1<<48+4 {
			t.Errorf("after what cannot be read: %+v, %v", page, err)
		}
		return read.try()
	}}
	p.without(t, old, read, after)
	p.without(t, sb.Key(), read)
}
