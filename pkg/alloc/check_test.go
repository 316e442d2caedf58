package alloc_test

import (
	"strings"
	"testing"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

func everything(t *testing.T, s alloc.Store) alloc.Records {
	t.Helper()
	r, err := alloctest.Everything(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestCheckFinds: the rules alone, on values.
func TestCheckFinds(t *testing.T) {
	s := alloctest.NewLively(t, memstore.New()).Store
	for _, c := range alloctest.Corruptions() {
		t.Run(strings.ReplaceAll(c.Name, " ", "-"), func(t *testing.T) {
			r := everything(t, s)
			if f := alloc.Check(r); len(f) > 0 {
				t.Fatalf("before: %+v", f)
			}
			c.Corrupt(&r)
			found := false
			for _, f := range alloc.Check(r) {
				found = found || f.Promise == c.Promise
			}
			if !found {
				t.Errorf("%s is not among the findings %+v", c.Promise, alloc.Check(r))
			}
		})
	}
}

// TestMend: what Check says is done until it is silent.
func TestMend(t *testing.T) {
	alloctest.TestMend(t, func(*testing.T) alloctest.Planter { return memstore.New() }, alloctest.Corruptions())
}

// TestCheckSaysWhatMendingCosts: a sandbox that runs costs its serials, one that is handed off may be in its
// images alone.
func TestCheckSaysWhatMendingCosts(t *testing.T) {
	s := alloctest.NewLively(t, memstore.New()).Store
	seen := map[alloc.SandboxState]string{}
	for i := range everything(t, s).Sandboxes {
		r := everything(t, s)
		sb := r.Sandboxes[i]
		sb.Stints = nil
		for _, f := range alloc.Check(r) {
			if f.Mend[1] == string(alloc.KindSandbox) {
				seen[sb.State] = f.Fix
			}
		}
	}
	for state, part := range map[alloc.SandboxState]string{
		alloc.StateRunning: "registered again by its host's agent", alloc.StateInTransit: "its processes are dead, and nothing is left",
		alloc.StateClaimed: "its processes are dead, and nothing is left", alloc.StateDumped: "unless the dump let them run on",
	} {
		if fix := seen[state]; !strings.Contains(fix, part) || !strings.Contains(fix, "without their nsalloc.json") {
			t.Errorf("of one that is %s: %q", state, fix)
		}
	}
	if strings.Contains(seen[alloc.StateRunning], "nothing is left") {
		t.Errorf("of one that runs: %q", seen[alloc.StateRunning])
	}
}

// TestCheckTooLargeToMoveAside: no command is named that the store would not take.
func TestCheckTooLargeToMoveAside(t *testing.T) {
	for size, command := range map[int]bool{700 << 10: true, 700<<10 + 1: false} {
		e := alloc.Entry{Key: alloc.HostKey("a"), Token: alloc.Token(strings.Repeat("x", size)), Err: alloc.ErrMalformed}
		f := alloc.Check(alloc.Records{Unreadable: []alloc.Entry{e}})
		if len(f) != 1 || command != (len(f[0].Mend) > 0) || command == strings.Contains(f[0].Fix, "etcdctl") {
			t.Errorf("%d bytes: %+v", size, f)
		}
	}
}

// TestCheckOfParts: not everybody has all of the records.
func TestCheckOfParts(t *testing.T) {
	if f := alloc.Check(alloc.Records{}); len(f) > 0 {
		t.Errorf("nothing: %+v", f)
	}
	r := everything(t, alloctest.NewLively(t, memstore.New()).Store)
	r.Pool, r.Counter, r.Requests, r.OldStints = nil, nil, nil, nil
	for _, s := range r.Sandboxes {
		if s.Claim != nil {
			s.Claim.From = "" // the wire does not carry it
		}
	}
	if f := alloc.Check(r); len(f) > 0 {
		t.Errorf("without pool, counter, requests and older stints: %+v", f)
	}
}

// TestCheckReachesOver: a range is compared with all that it reaches over, not with its neighbour alone.
func TestCheckReachesOver(t *testing.T) {
	at := func(first alloc.Serial, n uint64) alloc.Ranges { return alloc.Ranges{{First: 1<<48 | first, Count: n}} }
	found := alloc.Check(alloc.Records{
		Requests:    []*alloc.Request{{ID: "a", Ranges: at(1, 100)}, {ID: "b", Ranges: at(2, 2)}, {ID: "c", Ranges: at(50, 10)}, {ID: "d", Ranges: at(200, 5)}},
		Checkpoints: []*alloc.Checkpoint{{Serial: 1<<48 | 70}, {Serial: 1<<48 | 101}, {Serial: 1<<48 | 204}},
	})
	clashes := 0
	for _, f := range found {
		if f.Promise == "P1" {
			clashes++
		}
	}
	if clashes != 4 {
		t.Errorf("%d clashes, want 4: b and c with a, and two checkpoints with a and d: %+v", clashes, found)
	}
}
