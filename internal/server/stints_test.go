package server

import (
	"errors"
	"fmt"
	"testing"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// TestHistory: of a sandbox that moved more often than its record keeps, over the wire.
func TestHistory(t *testing.T) {
	r, _ := serving(t)
	hosts := []*machine{join(t, r.dial("a"), "a"), join(t, r.dial("b"), "b")}
	sb := hosts[0].register()
	const moves = 110
	for i := range moves {
		from, to, run := hosts[i%2], hosts[(i+1)%2], fmt.Sprint("r", i)
		h := from.confirm(from.dump(sb), alloc.SeenStopped)
		claimed := to.claim(h.Checkpoint, run)
		bound, _, err := to.Bind(t.Context(), to.bindCommand(claimed.Sandbox, run))
		if err != nil {
			t.Fatal(err)
		}
		sb = &bound.Sandbox
	}
	c := r.dial("")
	n := 0
	for st, err := range c.History(t.Context(), sb.Serial) {
		if err != nil {
			t.Fatal(err)
		}
		n++
		if st.Epoch != alloc.Epoch(1<<48+n) || st.Host != hosts[(n-1)%2].name || st.Actor == "" || st.From.IsZero() || st.To.IsZero() != (n == moves+1) {
			t.Errorf("stint %d is %+v", n, st)
		}
	}
	if n != moves+1 {
		t.Errorf("%d stints, want %d", n, moves+1)
	}
	for _, err := range c.History(t.Context(), sb.Serial+900) {
		if !errors.Is(err, alloc.ErrSandboxNotFound) {
			t.Errorf("of nobody: %v", err)
		}
	}
	raw := nsallocv1.NewSandboxesClient(c.Conn())
	page, err := raw.History(t.Context(), &nsallocv1.SandboxesHistoryRequest{Serial: uint64(sb.Serial), After: 1<<48 + 75, Limit: 10})
	if err != nil || len(page.GetStints()) != 10 || page.GetStints()[0].GetEpoch() != 1<<48+76 || page.GetRevision() == 0 {
		t.Errorf("a page across what has moved out and what has not: %v, %v", page, err)
	}
	for _, req := range []*nsallocv1.SandboxesHistoryRequest{{}, {Serial: 1 << 63}, {Serial: uint64(sb.Serial), Limit: 1001}} {
		if _, err := raw.History(t.Context(), req); !errors.Is(err, alloc.ErrInvalid) {
			t.Errorf("%v: %v", req, err)
		}
	}
}
