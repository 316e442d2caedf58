package alloctest

import (
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"regexp"
	"sync"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Trouble is how TestFaults tests a store.
type Trouble struct {
	// Run runs a test, in a bubble of time perhaps.
	Run func(t *testing.T, f func(t *testing.T))
	// Store makes an empty store, which ends with its test.
	Store func(t *testing.T) alloc.Store
	// Faults are paired with each other and with reads that fail. The first is none.
	Faults []Fault
	// Reads is how many reads of a use case fail, one a time; 0 is all. A read that fails never comes to the
	// store, so that a slow one has little to learn from the later ones.
	Reads int
	// Source is the directory of pkg/alloc.
	Source string
}

// troubled is a Trouble that counts.
type troubled struct {
	Trouble
	mu  sync.Mutex
	met map[write]map[string]int // guarded by mu
}

// TestFaults makes every write of a pool meet every pair of faults: each use case at its first two
// commits, and every fault together with each of Reads. Whatever is answered, asking again with
// the same request id comes to what it would have come to without faults, once. It ends by counting: a
// write in the source of pkg/alloc that met no lost answer, stored and not, is a failure.
func TestFaults(t *testing.T, trouble Trouble) {
	tr := &troubled{Trouble: trouble, met: map[write]map[string]int{}}
	for _, uc := range UseCases() {
		t.Run(uc.Name, func(t *testing.T) { tr.Run(t, func(t *testing.T) { tr.pairs(t, uc) }) })
	}
	t.Run("InitPool", func(t *testing.T) { tr.Run(t, tr.initPool) })
	t.Run("SweepRequests", func(t *testing.T) { tr.Run(t, tr.sweep) })
	t.Run("SweepLanes", func(t *testing.T) { tr.Run(t, tr.sweepLanes) })
	t.Run("EveryWrite", tr.everyWrite)
}

func (tr *troubled) faulty(t *testing.T) *faulty {
	return &faulty{Store: tr.Store(t), met: func(at write, f Fault) {
		tr.mu.Lock()
		defer tr.mu.Unlock()
		if tr.met[at] == nil {
			tr.met[at] = map[string]int{}
		}
		tr.met[at][f.What]++
	}}
}

// pairs is for one use case.
func (tr *troubled) pairs(t *testing.T, uc UseCase) {
	faults := tr.Faults
	if uc.Long {
		faults = Pair
	}
	want, wantStored := tr.outcome(t, uc, func(bool, int) Fault { return Fault{} })
	try := func(name string, decide func(commit bool, n int) Fault) {
		t.Helper()
		got, stored := tr.outcome(t, uc, decide)
		if got != want || stored != wantStored {
			t.Fatalf("%s: answered %s\nwant %s\nthe store has %s\nwant %s", name, got, want, stored, wantStored)
		}
	}
	for _, once := range faults {
		for _, then := range faults {
			met := false
			try(fmt.Sprintf("%v, then %v", once, then), func(commit bool, n int) Fault {
				switch {
				case commit && n == 1:
					return once
				case commit && n == 2:
					met = true
					return then
				}
				return Fault{}
			})
			if !met {
				break // there is no second commit; nor will there be with another fault at it
			}
		}
		for read, met := 1, !uc.Long; met && (tr.Reads == 0 || read <= tr.Reads); read++ {
			met = false
			try(fmt.Sprintf("%v, and read %d fails", once, read), func(commit bool, n int) Fault {
				switch {
				case commit && n == 1:
					return once
				case !commit && n == read:
					met = true
					return Fault{What: "unavailable"}
				}
				return Fault{}
			})
		}
	}
}

// outcome makes a use case, again until it is answered, and gives the answer and what is stored.
func (tr *troubled) outcome(t *testing.T, uc UseCase, faults func(commit bool, n int) Fault) (answer, stored string) {
	t.Helper()
	s := tr.faulty(t)
	p := NewPool(t, s, alloc.DefaultPolicy())
	call := uc.Prepare(t, p)
	before := inStore(t, s)
	s.trouble(faults)
	unknown := false
	for range 4 {
		v, err := call(t.Context())
		s.trouble(nil)
		switch {
		case err == nil:
			s.settle()
			if again, err := call(t.Context()); err != nil || asJSON(t, again) != asJSON(t, v) {
				t.Fatalf("answered %s, asked again %s, %v", asJSON(t, v), asJSON(t, again), err)
			}
			Check(t, s)
			return asJSON(t, v), inStore(t, s)
		case alloc.ReasonOf(err) == alloc.ReasonUnknownOutcome:
			unknown = true
		case alloc.ReasonOf(err) == alloc.ReasonUnavailable, alloc.ReasonOf(err) == alloc.ReasonConflict:
			// Nothing was changed, and nothing will be.
			s.settle()
			if now := inStore(t, s); !unknown && now != before {
				t.Fatalf("%v, and the store has changed:\n%s\n%s", err, before, now)
			}
		default:
			t.Fatalf("refused with %v", err)
		}
	}
	t.Fatal("never answered")
	return "", ""
}

// inStore is all that a store has but its random numbers: it is equal exactly if the same happened.
func inStore(t testing.TB, s alloc.Store) string {
	t.Helper()
	r, err := Everything(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	r.Pool = nil
	if r.Counter != nil && r.Counter.Generation > 1 { // mended: it began at a random point
		counter := *r.Counter
		counter.Next = 0
		r.Counter = &counter
	}
	return asJSON(t, r)
}

func asJSON(t testing.TB, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return randomID.ReplaceAllString(string(b), `"$1":"a lane"`)
}

// randomID finds the ids of lanes, which differ from run to run.
var randomID = regexp.MustCompile(`"(id|ID)":"[0-9a-f]{32}"`)

// first is a fault at the first commit only; always, at each.
func first(f Fault) func(bool, int) Fault {
	return func(commit bool, n int) Fault {
		if commit && n == 1 {
			return f
		}
		return Fault{}
	}
}

func always(f Fault) func(bool, int) Fault {
	return func(commit bool, _ int) Fault {
		if commit {
			return f
		}
		return Fault{}
	}
}

// initPool: a pool is made once, whatever is lost.
func (tr *troubled) initPool(t *testing.T) {
	for _, f := range tr.Faults {
		s := tr.faulty(t)
		svc := alloc.NewService(s, nil)
		s.trouble(first(f))
		made, err := svc.InitPool(t.Context(), alloc.DefaultPolicy())
		second, err2 := svc.InitPool(t.Context(), alloc.DefaultPolicy())
		s.settle()
		found, _, err3 := svc.Pool(t.Context())
		switch {
		case err3 != nil:
			t.Errorf("%v: no pool: %v, %v", f, err, err2)
		case err == nil && (made.UUID != found.UUID || alloc.ReasonOf(err2) != alloc.ReasonPoolExists):
			t.Errorf("%v: made pool %s, then %v; the store has %s", f, made.UUID, err2, found.UUID)
		case err2 == nil && second.UUID != found.UUID:
			t.Errorf("%v: made pool %s, the store has %s", f, second.UUID, found.UUID)
		}
		Check(t, s)
	}
}

// sweep: a sweep that is lost and arrives late makes no request new.
func (tr *troubled) sweep(t *testing.T) {
	for _, f := range tr.Faults {
		s := tr.faulty(t)
		p := NewPool(t, s, alloc.DefaultPolicy())
		cmd := alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 3}
		before := must[alloc.Ranges](t)(p.Allocate(t.Context(), cmd))
		ahead := alloc.NewService(s, func() time.Time { return p.Clock.Now().Add(time.Hour) })
		s.trouble(always(f))
		_, _ = ahead.SweepRequests(t.Context(), 10)
		s.trouble(nil)
		for range 4 {
			got, err := p.Allocate(t.Context(), cmd)
			if alloc.ReasonOf(err) != alloc.ReasonRequestExpired && (err != nil || got[0] != before[0]) {
				t.Errorf("%v: %v, %v; before %v", f, got, err, before)
			}
		}
		s.settle()
		Check(t, s)
	}
}

// sweepLanes: a lane whose record is swept while it issues begins another one, and issues nothing twice.
func (tr *troubled) sweepLanes(t *testing.T) {
	for _, f := range tr.Faults {
		s := tr.faulty(t)
		p := NewPool(t, s, alloc.DefaultPolicy())
		allocate := func() (alloc.AllocateCommand, alloc.Ranges) {
			cmd := alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 3}
			return cmd, must[alloc.Ranges](t)(p.Allocate(t.Context(), cmd))
		}
		first, before := allocate()
		ahead := alloc.NewService(s, func() time.Time { return p.Clock.Now().Add(time.Hour) })
		s.trouble(always(f))
		_, _ = ahead.SweepLanes(t.Context())
		s.trouble(nil)
		allocate()
		s.settle()
		allocate()
		if again := must[alloc.Ranges](t)(p.Allocate(t.Context(), first)); again[0] != before[0] {
			t.Errorf("%v: %v, asked again %v", f, before, again)
		}
		Check(t, s)
	}
}

// everyWrite counts the writes: each commit in the source of pkg/alloc, and each use case, has met an
// answer that was lost of what was stored, and of what was not.
func (tr *troubled) everyWrite(t *testing.T) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	places, useCases, total := map[string]map[string]int{}, map[string]bool{}, 0
	for at, faults := range tr.met {
		place := fmt.Sprintf("%s:%d", at.file, at.line)
		if places[place] == nil {
			places[place] = map[string]int{}
		}
		for what, n := range faults {
			places[place][what] += n
			total += n
		}
		useCases[at.useCase] = true
		for _, want := range []string{"stored", "lost"} {
			if faults[want] == 0 {
				t.Errorf("the write of %s at %s was never %s", at.useCase, place, want)
			}
		}
	}
	source := commitsIn(t, tr.Source)
	for _, place := range source {
		if places[place] == nil {
			t.Errorf("the write at %s met no fault: add its use case to UseCases", place)
		}
	}
	// Allocate commits in a goroutine of the service's, which says nothing of who asked.
	const mutations = 20
	if len(useCases) != mutations {
		t.Errorf("%d use cases wrote, want %d: %v", len(useCases), mutations, useCases)
	}
	t.Logf("%d places that write, %d use cases, %d commits: %v", len(source), len(useCases), total, places)
}

// commitsIn finds every call of a store's Commit in a directory.
func commitsIn(t *testing.T, dir string) (places []string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if matched, _ := filepath.Match("*_test.go", filepath.Base(name)); matched {
			continue
		}
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			if sel, ok := call.Fun.(*ast.SelectorExpr); ok && sel.Sel.Name == "Commit" {
				at := fset.Position(sel.Sel.Pos())
				places = append(places, fmt.Sprintf("%s:%d", filepath.Base(name), at.Line))
			}
			return true
		})
	}
	if len(places) == 0 {
		t.Fatalf("no write was found in %s", dir)
	}
	return places
}
