package alloc_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// interposed calls before, once, between the reads of a History.
type interposed struct {
	alloc.Store
	before func()
}

func (s *interposed) List(ctx context.Context, kind alloc.Kind, after string, limit int, at alloc.Revision) ([]alloc.Entry, alloc.Revision, error) {
	if before := s.before; before != nil && kind == alloc.KindStint {
		s.before = nil
		before()
	}
	return s.Store.List(ctx, kind, after, limit, at)
}

// TestHistoryWhileItMoves: a stint leaves the record between the reads of the record and of the older ones,
// or the revision of the first read is compacted.
func TestHistoryWhileItMoves(t *testing.T) {
	mem := memstore.New()
	p := alloctest.NewPool(t, mem, alloc.DefaultPolicy())
	hosts := []*alloctest.Agent{p.Agent("a"), p.Agent("b")}
	sb, moves := hosts[0].Sandbox(), 0
	move := func() {
		from, to, run := hosts[moves%2], hosts[(moves+1)%2], fmt.Sprint("r", moves)
		moves++
		h, err := p.Open(t.Context(), from.Open(sb))
		if err == nil {
			h, err = p.Confirm(t.Context(), from.Confirm(h, alloc.SeenStopped))
		}
		if err != nil {
			t.Fatal(err)
		}
		c, err := p.Claim(t.Context(), to.Claim(h, run))
		if err != nil {
			t.Fatal(err)
		}
		if h, _, err = p.Bind(t.Context(), to.Bind(c.Handoff, run)); err != nil {
			t.Fatal(err)
		}
		sb = &h.Sandbox
	}
	for range 50 {
		move()
	}
	for name, between := range map[string]struct {
		do   func()
		want int // stints more than before
	}{
		"moved":                {move, 0},
		"moved and compacted":  {func() { move(); mem.Compact() }, 1},
		"moved many":           {func() { move(); move(); move() }, 0},
		"compacted, not moved": {func() { put(t, mem); mem.Compact() }, 0},
	} {
		before := moves + 1
		s := alloc.NewService(&interposed{mem, between.do}, p.Clock.Now)
		got, _, err := s.History(t.Context(), sb.Serial, 0, alloc.MaxHistory)
		if err != nil || len(got) != before+between.want {
			t.Errorf("%s: %d stints, %v; want %d", name, len(got), err, before+between.want)
			continue
		}
		for i, st := range got {
			if st.Epoch != alloc.Epoch(1<<48+uint64(i)+1) || st.To.IsZero() != (i == len(got)-1) {
				t.Errorf("%s: stint %d is %+v", name, i, st)
			}
		}
	}
}

// put moves the store's revision on.
func put(t *testing.T, s alloc.Store) {
	t.Helper()
	if _, err := s.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{&alloc.Host{Name: "elsewhere", Nonce: fmt.Sprint(t.Name())}}}); err != nil {
		t.Fatal(err)
	}
}
