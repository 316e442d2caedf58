package alloc_test

import (
	"errors"
	"testing"
	"testing/synctest"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// TestMendRefusedAfterUnknown: a mend whose answer is lost is guarded by what it changes only, and takes
// effect although what it was decided from is no longer so. Until it is found nobody is told that nothing
// was changed.
func TestMendRefusedAfterUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &held{Store: memstore.New()}
		l := alloctest.NewLively(t, s)
		r := ok[alloc.Records](t)(alloctest.Everything(t.Context(), s))
		// Two sandboxes clash; mending either is enough.
		var two []*alloc.Sandbox
		for _, sb := range r.Sandboxes {
			if sb.State == alloc.StateEnded || sb.State == alloc.StateRunning && len(two) > 0 {
				two = append(two, sb)
			}
		}
		if len(two) < 2 || two[0].State == two[1].State {
			t.Fatalf("no two to clash among %+v", two)
		}
		two[0].Bindings[0].Serial = two[1].Bindings[0].Serial
		ok[alloc.Revision](t)(s.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{two[0]}}))
		mend := func(sb *alloc.Sandbox) alloc.MendCommand {
			return alloc.MendCommand{RequestID: l.Request(), Actor: "operator/ann", Kind: alloc.KindSandbox, ID: sb.Serial.String()}
		}
		mine, theirs := mend(two[0]), mend(two[1])
		release := s.hold()
		done := make(chan error, 1)
		go func() {
			_, err := l.Mend(t.Context(), mine)
			done <- err
		}()
		synctest.Wait()
		ok[alloc.Mended](t)(l.Mend(t.Context(), theirs))
		_, commits := s.Ops()
		s.SetFaults(func(op memstore.Op) memstore.Fault {
			if op.Commit && op.N == commits+1 {
				return memstore.Fault{Outcome: memstore.Delayed, After: 1000}
			}
			return memstore.Fault{}
		})
		release()
		if err := <-done; !errors.Is(err, alloc.ErrUnknownOutcome) {
			t.Errorf("answered %v", err)
		}
		s.SetFaults(nil)
		if n := s.Settle(); n != 1 {
			t.Fatalf("%d lost transactions took effect, want the mend", n)
		}
		if again := ok[alloc.Mended](t)(l.Mend(t.Context(), mine)); len(again.Changed) == 0 {
			t.Errorf("asked again: %+v", again)
		}
		if f := alloc.Check(ok[alloc.Records](t)(alloctest.Everything(t.Context(), s))); len(f) > 0 {
			t.Errorf("afterwards: %+v", f)
		}
	})
}
