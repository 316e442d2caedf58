package main

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// History answers what was recorded, a stint of each epoch; a fake without is a server that is older than
// the call.
func (f fakeSandboxes) History(ctx context.Context, r *nsallocv1.SandboxesHistoryRequest) (*nsallocv1.SandboxesHistoryResponse, error) {
	if f.history == nil {
		return f.UnimplementedSandboxesServer.History(ctx, r)
	}
	answer := &nsallocv1.SandboxesHistoryResponse{Revision: 42}
	for _, st := range f.history {
		if st.Epoch > r.After && len(answer.Stints) < int(r.Limit) {
			answer.Stints = append(answer.Stints, st)
		}
	}
	return answer, nil
}

// longHistory is a pool whose sandbox 10 moved more often than its record keeps.
func longHistory(n int) *fake {
	f := &fake{records: recorded()}
	for i := range n {
		st := &nsallocv1.Stint{Host: string(rune('a' + i%2)), Epoch: serial(uint64(i + 1)), From: before(time.Duration(n-i) * time.Hour), To: before(time.Duration(n-i-1) * time.Hour),
			Began: nsallocv1.StintBegan_STINT_BEGAN_CLAIMED, Over: nsallocv1.StintOver_STINT_OVER_HANDED_OFF, Checkpoint: serial(0x20)}
		if i == 0 {
			st.Began = nsallocv1.StintBegan_STINT_BEGAN_REGISTERED
		}
		f.history = append(f.history, st)
	}
	last := f.history[n-1]
	last.To, last.Over = nil, 0
	s := proto.Clone(f.sandboxes[1]).(*nsallocv1.Sandbox)
	s.Stints, s.Epoch, s.Owner = f.history[n-32:], last.Epoch, last.Host
	f.sandboxes[1] = s
	return f
}

func TestHistoryIsWhole(t *testing.T) {
	for _, n := range []int{33, 120, 2500} {
		f := longHistory(n)
		for _, args := range []string{"serial history 10 -o json", "sandbox get 10 -o json"} {
			_, out, errs := invoke(t, f, strings.Fields(args)...)
			var doc struct{ Stints []stintDoc }
			if err := json.Unmarshal([]byte(out), &doc); err != nil {
				t.Fatalf("%s: %v: %s", args, err, errs)
			}
			if len(doc.Stints) != n || doc.Stints[0].Began != string(alloc.BeganRegistered) {
				t.Errorf("%s shows %d stints of %d", args, len(doc.Stints), n)
			}
		}
		_, out, _ := invoke(t, f, "serial", "history", "10")
		if got := strings.Count(out, "claimed"); got != n-1 || strings.Contains(out, "earlier") {
			t.Errorf("%d stints that began with a claim are shown, of %d:\n%s", got, n-1, out)
		}
		// In the middle of what the record keeps no more.
		_, out, _ = invoke(t, f, "serial", "history", "10", "--at", noon.Add(-time.Duration(n-1)*time.Hour).Add(time.Minute).Format(time.RFC3339))
		if !strings.Contains(out, "1.2 ") || strings.Contains(out, "not there yet") {
			t.Errorf("where it was in its second hour:\n%s", out)
		}
	}
}

// TestHistoryOfAnOlderServer: what the record keeps is shown, and that there is more.
func TestHistoryOfAnOlderServer(t *testing.T) {
	f := longHistory(50)
	f.history = nil
	code, out, errs := invoke(t, f, "serial", "history", "10")
	if code != exitOK || strings.Count(out, "claimed") != 32 || !strings.Contains(out, "the last 32 stints; there were earlier ones") {
		t.Errorf("exit %d:\n%s%s", code, out, errs)
	}
	if code, out, _ := invoke(t, f, "sandbox", "get", "10"); code != exitOK {
		t.Errorf("exit %d:\n%s", code, out)
	}
}

// TestListsSayWhatTheyLeaveOut: what can be read is shown, and how much cannot.
func TestListsSayWhatTheyLeaveOut(t *testing.T) {
	f := &fake{records: recorded(), unreadable: 3}
	for _, what := range []string{"sandbox", "checkpoint", "host"} {
		code, out, errs := invoke(t, f, what, "list", "-o", "name")
		_, all, _ := invoke(t, &fake{records: recorded()}, what, "list", "-o", "name")
		if code != exitOK || out != all || !strings.Contains(errs, "3 of the pool cannot be read") || !strings.Contains(errs, "nsalloc check") {
			t.Errorf("%s list: exit %d, %q\n%s", what, code, out, errs)
		}
	}
	if _, err := all(func(yield func(int, error) bool) { _ = yield(1, nil) && yield(0, errors.New("x")) }); err == nil {
		t.Error("an error at the end of a list is lost")
	}
}
