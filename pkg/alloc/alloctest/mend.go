package alloctest

import (
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// TestMend corrupts a pool's records in each of the given ways, and makes each kind of record unreadable.
// Then it does what Check says until Check is silent. factory makes an empty store, which ends with its
// test.
func TestMend(t *testing.T, factory func(t *testing.T) Planter, corruptions []Corruption) {
	for _, c := range corruptions {
		t.Run(strings.ReplaceAll(c.Name, " ", "-"), func(t *testing.T) {
			l := NewLively(t, factory(t))
			before := everything(t, l.Store)
			changed := everything(t, l.Store)
			c.Corrupt(&changed)
			l.replace(t, before, changed)
			l.mendAll(t, c.Promise, c.Mend, reads(changed))
		})
	}
	for _, kind := range []alloc.Kind{alloc.KindCounter, alloc.KindHost, alloc.KindLane, alloc.KindSandbox, alloc.KindStint, alloc.KindCheckpoint, alloc.KindRequest} {
		t.Run("unreadable-"+string(kind), func(t *testing.T) {
			l := NewLively(t, factory(t))
			r := everything(t, l.Store)
			key := alloc.Key{Kind: kind}
			switch kind {
			case alloc.KindHost:
				key.ID = "a"
			case alloc.KindLane:
				key = r.Lanes[0].Key()
			case alloc.KindSandbox:
				key = in(&r, alloc.StateRunning).Key()
			case alloc.KindStint:
				key = r.OldStints[1].Key()
			case alloc.KindCheckpoint:
				key = alloc.CheckpointKey(in(&r, alloc.StateRunning).Checkpoint)
			case alloc.KindRequest:
				key = r.Requests[0].Key()
			}
			if err := l.Store.(Planter).Plant(t.Context(), key, []byte{1, 0xff, 0xff}); err != nil {
				t.Fatal(err)
			}
			l.mendAll(t, "RECORD", kind, reads(r))
		})
	}
	t.Run("OfAll", func(t *testing.T) { testMendOfAll(t, NewLively(t, factory(t))) })
	t.Run("Refuses", func(t *testing.T) { testMendRefuses(t, NewLively(t, factory(t))) })
	t.Run("CutOff", func(t *testing.T) { testMendCutOff(t, NewLively(t, factory(t))) })
	t.Run("OtherChoice", func(t *testing.T) { testMendOtherChoice(t, NewLively(t, factory(t))) })
	t.Run("PutBack", func(t *testing.T) { testMendPutBack(t, NewLively(t, factory(t))) })
	t.Run("UnreadableAhead", func(t *testing.T) { testMendUnreadableAhead(t, NewLively(t, factory(t))) })
	t.Run("UnreadableHeld", func(t *testing.T) { testMendUnreadableHeld(t, NewLively(t, factory(t))) })
	t.Run("UnreadableUnknown", func(t *testing.T) { testMendUnreadableUnknown(t, NewLively(t, factory(t))) })
	t.Run("Request", func(t *testing.T) { testMendRequest(t, NewLively(t, factory(t))) })
}

func everything(t testing.TB, s alloc.Store) alloc.Records {
	t.Helper()
	r, err := Everything(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// reads is every record of r under its key.
func reads(r alloc.Records) map[alloc.Key]alloc.Record {
	m := map[alloc.Key]alloc.Record{}
	if r.Pool != nil {
		m[r.Pool.Key()] = r.Pool
	}
	if r.Counter != nil {
		m[r.Counter.Key()] = r.Counter
	}
	for _, x := range r.Lanes {
		m[x.Key()] = x
	}
	for _, x := range r.Hosts {
		m[x.Key()] = x
	}
	for _, x := range r.Sandboxes {
		m[x.Key()] = x
	}
	for _, x := range r.OldStints {
		m[x.Key()] = x
	}
	for _, x := range r.Checkpoints {
		m[x.Key()] = x
	}
	for _, x := range r.Requests {
		m[x.Key()] = x
	}
	return m
}

// replace makes the store's records those of now instead of before.
func (l *Lively) replace(t testing.TB, before, now alloc.Records) {
	t.Helper()
	old, recs := reads(before), reads(now)
	var tx alloc.Tx
	for k, rec := range recs {
		if !reflect.DeepEqual(old[k], rec) {
			tx.Put = append(tx.Put, rec)
		}
	}
	for k := range old {
		if recs[k] == nil {
			tx.Delete = append(tx.Delete, k)
		}
	}
	commit(t, l.Store, tx)
}

// taken is the serials that may never be issued again: in use, and answered to requests; with what hosts
// hold, also those.
func taken(recs map[alloc.Key]alloc.Record, withHeld bool) (rs alloc.Ranges) {
	one := func(s alloc.Serial) { rs = append(rs, alloc.Range{First: s, Count: 1}) }
	for _, rec := range recs {
		switch rec := rec.(type) {
		case *alloc.Sandbox:
			one(rec.Serial)
			for _, b := range rec.Bindings {
				one(b.Serial)
			}
		case *alloc.Checkpoint:
			one(rec.Serial)
		case *alloc.Request:
			rs = append(rs, valid(rec.Ranges)...)
		case *alloc.Host:
			if withHeld {
				rs = append(rs, valid(rec.Granted)...)
			}
		}
	}
	return rs
}

func valid(rs alloc.Ranges) alloc.Ranges {
	return slices.DeleteFunc(slices.Clone(rs), func(r alloc.Range) bool { return !r.Valid() })
}

// mendAll does what Check says until it is silent, and proves what must hold of every mend.
func (l *Lively) mendAll(t *testing.T, promise string, first alloc.Kind, planted map[alloc.Key]alloc.Record) {
	t.Helper()
	const most = 4 // of one corruption
	var changed []alloc.Key
	for step := 0; ; step++ {
		report := l.check(t)
		if step == 0 {
			found := false
			for _, f := range report.Findings {
				found = found || f.Promise == promise
			}
			if !found {
				t.Fatalf("%s is not among the findings %+v", promise, report.Findings)
			}
			if got := report.Findings[0].Mend[1]; got != string(first) {
				t.Errorf("first to be mended: %s, want %s: %+v", got, first, report.Findings)
			}
		}
		if len(report.Findings) == 0 {
			break
		}
		if step == most {
			t.Fatalf("after %d mends: %+v", most, report.Findings)
		}
		f := report.Findings[0]
		cmd := l.Command(f.Mend)
		done, err := l.Mend(t.Context(), cmd)
		if err != nil {
			t.Fatalf("%v: %v; finding %+v", f.Mend, err, f)
		}
		again, err := l.Mend(t.Context(), cmd)
		if err != nil || !reflect.DeepEqual(again, done) {
			t.Errorf("the same request again: %+v, %v; before %+v", again, err, done)
		}
		for _, g := range l.check(t).Findings {
			if reflect.DeepEqual(g, f) {
				t.Errorf("%v did not mend %+v", f.Mend, f)
			}
		}
		changed = append(changed, done.Changed...)
		t.Logf("%v (%s: %s): %v", f.Mend, f.Subject, f.Evidence, done.Changed)
	}
	l.keptOthers(t, planted, changed)
	l.issuesNothingTwice(t, planted)
}

func (l *Lively) check(t testing.TB) alloc.Report {
	t.Helper()
	report, err := l.Check(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range report.Findings {
		if f.Subject == "" || f.Evidence == "" || f.Fix == "" || strings.Contains(f.Evidence+f.Fix, "%!") || len(f.Mend) < 2 {
			t.Errorf("a finding that says little: %+v", f)
		}
	}
	return report
}

// Command is the mend that a finding names.
func (l *Lively) Command(mend []string) alloc.MendCommand {
	cmd := alloc.MendCommand{RequestID: l.Request(), Actor: "operator/ann", Kind: alloc.Kind(mend[1])}
	if len(mend) > 2 {
		cmd.ID = mend[2]
	}
	return cmd
}

// keptOthers proves that nothing changed but what the mends say, of sandboxes one or two at most, and
// that what changed stands aside as it was.
func (l *Lively) keptOthers(t *testing.T, planted map[alloc.Key]alloc.Record, changed []alloc.Key) {
	t.Helper()
	now := reads(everything(t, l.Store))
	sandboxes := 0
	for _, k := range changed {
		if k.Kind == alloc.KindSandbox {
			sandboxes++
		}
	}
	if sandboxes > 2 {
		t.Errorf("%d sandboxes were touched: %v", sandboxes, changed)
	}
	for k, rec := range planted {
		if !slices.Contains(changed, k) && !reflect.DeepEqual(rec, now[k]) {
			t.Errorf("%s was not to be touched: %+v became %+v", k, rec, now[k])
		}
	}
	aside := map[alloc.Key]int{}
	entries, _, err := l.Store.List(t.Context(), alloc.KindAside, "", 1000, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		a := e.Record.(*alloc.Aside)
		if a.Of.Kind == alloc.KindAside {
			continue // a refusal
		}
		aside[a.Of]++
		if a.Actor != "operator/ann" || len(a.Value) == 0 || a.At.IsZero() {
			t.Errorf("put aside: %+v", a)
		}
	}
	for _, k := range changed {
		if aside[k] == 0 {
			t.Errorf("%s is not aside", k)
		}
	}
}

// issuesNothingTwice has both hosts and a client go on, and compares with what there was.
func (l *Lively) issuesNothingTwice(t *testing.T, planted map[alloc.Key]alloc.Record) {
	t.Helper()
	l.Clock.Move(time.Millisecond) // a request that was put aside has made those of its moment too old
	used, held := taken(planted, false), taken(planted, true)
	fresh := func(what string, got, than alloc.Ranges) {
		t.Helper()
		for s := range got.All() {
			if than.Contains(s) {
				t.Fatalf("%s: %s was there before", what, s)
			}
		}
	}
	for _, a := range []*Agent{l.A, l.B} {
		a.join(t)
		now := must[alloc.Ranges](t)(l.Grant(t.Context(), alloc.GrantCommand{Mutation: a.Mutation(), Count: 300}))
		fresh("granted to host "+a.Name, now[len(now)-1:], held)
		for n := min(now.Count(), 200); n >= 2; n = min(now.Count(), 200) {
			spend, each := a.Next(n)
			cmd := alloc.RegisterCommand{Mutation: a.Mutation(), Spend: spend, Items: []alloc.RegisterItem{{Sandbox: each[0], Add: []alloc.Binding{a.Namespace(each[1], alloc.PID)}}}}
			sbs := register(t, l.Pool, cmd)
			fresh("registered by host "+a.Name, alloc.Ranges{{First: sbs[0].Serial, Count: 1}, {First: sbs[0].Bindings[0].Serial, Count: 1}}, used)
			now = a.Record().Granted
		}
	}
	fresh("allocated", must[alloc.Ranges](t)(l.Allocate(t.Context(), alloc.AllocateCommand{RequestID: l.Request(), Caller: "c", Count: 3000})), held)
	if f := l.check(t).Findings; len(f) > 0 {
		t.Errorf("afterwards: %+v", f)
	}
}

// join goes on with the host's life, or begins a new one where it is over, as an agent does.
func (a *Agent) join(t testing.TB) {
	t.Helper()
	if a.Record().Incarnation != a.Incarnation {
		a.Nonce, a.Incarnation = a.Nonce+"-new", 0
	}
	h, _, err := a.Pool.Hello(t.Context(), a.Hello())
	if err != nil {
		t.Fatal(err)
	}
	if h.Incarnation < a.Incarnation {
		t.Fatalf("incarnation %s after %s", h.Incarnation, a.Incarnation)
	}
	a.Incarnation = h.Incarnation
}
