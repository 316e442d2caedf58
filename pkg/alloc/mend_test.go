package alloc_test

import (
	"errors"
	"reflect"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// TestMendRefusedAfterUnknown: a mend whose answer is lost is guarded by what it changes only, and could take
// effect although what it was decided from is no longer so. Whoever is told that nothing was changed is told
// the truth: it does not any more.
func TestMendRefusedAfterUnknown(t *testing.T) {
	clashing(t, func(t *testing.T, s *held, l *alloctest.Lively, mine, theirs alloc.MendCommand) {
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
		if err := <-done; !errors.Is(err, alloc.ErrNothingToMend) {
			t.Errorf("answered %v", err)
		}
		s.SetFaults(nil)
		if n := s.Settle(); n != 0 {
			t.Fatalf("%d lost transactions took effect after the refusal", n)
		}
		if _, err := l.Mend(t.Context(), mine); !errors.Is(err, alloc.ErrNothingToMend) {
			t.Errorf("asked again: %v", err)
		}
	})
}

// TestMendRefusedBeside: a mend is on its way, and another call with the same id, at a server that has not
// seen it, is told that nothing was changed. So it is: what was on its way changes nothing. The answer stays
// that one, also when there is something to mend once more.
func TestMendRefusedBeside(t *testing.T) {
	clashing(t, func(t *testing.T, s *held, l *alloctest.Lively, mine, theirs alloc.MendCommand) {
		before := ok[alloc.Records](t)(alloctest.Everything(t.Context(), s))
		release := s.hold()
		done := make(chan error, 1)
		go func() {
			_, err := l.Mend(t.Context(), mine)
			done <- err
		}()
		synctest.Wait()
		ok[alloc.Mended](t)(l.Mend(t.Context(), theirs))
		if _, err := alloc.NewService(s, l.Clock.Now).Mend(t.Context(), mine); !errors.Is(err, alloc.ErrNothingToMend) {
			t.Errorf("beside it: %v", err)
		}
		quiet := ok[alloc.Records](t)(alloctest.Everything(t.Context(), s))
		release()
		if err := <-done; !errors.Is(err, alloc.ErrNothingToMend) {
			t.Errorf("what was on its way is answered %v", err)
		}
		if now := ok[alloc.Records](t)(alloctest.Everything(t.Context(), s)); !reflect.DeepEqual(now, quiet) {
			t.Error("something was changed after it was said that nothing was")
		}
		i := slices.IndexFunc(before.Sandboxes, func(sb *alloc.Sandbox) bool { return sb.Serial.String() == theirs.ID })
		ok[alloc.Revision](t)(s.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{before.Sandboxes[i]}}))
		if _, err := l.Mend(t.Context(), mine); !errors.Is(err, alloc.ErrRequestExpired) {
			t.Errorf("asked again: %v", err)
		}
		mine.RequestID = l.Request()
		ok[alloc.Mended](t)(l.Mend(t.Context(), mine))
	})
}

// clashing is a pool with two sandboxes that clash; mending either is enough, and mine and theirs do.
func clashing(t *testing.T, f func(t *testing.T, s *held, l *alloctest.Lively, mine, theirs alloc.MendCommand)) {
	synctest.Test(t, func(t *testing.T) {
		s := &held{Store: memstore.New()}
		l := alloctest.NewLively(t, s)
		r := ok[alloc.Records](t)(alloctest.Everything(t.Context(), s))
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
		f(t, s, l, mend(two[0]), mend(two[1]))
		if f := ok[alloc.Report](t)(l.Check(t.Context())).Findings; len(f) > 0 {
			t.Errorf("afterwards: %+v", f)
		}
	})
}
