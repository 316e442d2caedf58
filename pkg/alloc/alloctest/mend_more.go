package alloctest

import (
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// testMendOfAll: everything is broken at once, and what Check says leads out of it.
func testMendOfAll(t *testing.T, l *Lively) {
	r := everything(t, l.Store)
	changed := everything(t, l.Store)
	r0 := changed.Sandboxes
	changed.Counter.Next = 30
	changed.Hosts[0].Granted = changed.Hosts[1].Granted
	r0[0].Bindings[0].Serial = r0[1].Bindings[0].Serial
	changed.Requests[0].Ranges = changed.Requests[1].Ranges
	changed.OldStints[0].Stint.Over = ""
	in(&changed, alloc.StateEnded).Stints = nil
	consumed(&changed).State = alloc.CheckpointOpen
	l.replace(t, r, changed)
	for step := 0; ; step++ {
		f := l.check(t).Findings
		if len(f) == 0 {
			break
		}
		if step == 10 {
			t.Fatalf("after 10 mends: %+v", f)
		}
		if _, err := l.Mend(t.Context(), l.Command(f[0].Mend)); err != nil {
			t.Fatalf("%+v: %v", f[0], err)
		}
	}
	l.issuesNothingTwice(t, reads(changed))
}

func testMendRefuses(t *testing.T, l *Lively) {
	r := everything(t, l.Store)
	running := in(&r, alloc.StateRunning).Serial.String()
	mend := func(kind alloc.Kind, id string, force bool) error {
		_, err := l.Mend(t.Context(), alloc.MendCommand{RequestID: l.Request(), Actor: "operator/ann", Kind: kind, ID: id, Force: force})
		return err
	}
	for _, c := range []struct {
		kind  alloc.Kind
		id    string
		force bool
		want  *alloc.Error
	}{
		{"", "x", false, alloc.ErrInvalid},
		{alloc.KindPool, "", false, alloc.ErrInvalid},
		{alloc.KindAside, "x", false, alloc.ErrInvalid},
		{alloc.KindCounter, "1", false, alloc.ErrInvalid},
		{alloc.KindSandbox, "", false, alloc.ErrInvalid},
		{alloc.KindSandbox, "\xff", false, alloc.ErrInvalid},
		{alloc.KindSandbox, strings.Repeat("0", 513), false, alloc.ErrInvalid},
		{alloc.KindSandbox, "7", true, alloc.ErrRecordNotFound},
		{alloc.KindSandbox, "0001000000ffffff", true, alloc.ErrRecordNotFound},
		{alloc.KindCheckpoint, "0001000000ffffff", true, alloc.ErrRecordNotFound},
		{alloc.KindStint, "0001000000ffffff/0001000000000001", true, alloc.ErrRecordNotFound},
		{alloc.KindHost, "z", true, alloc.ErrRecordNotFound},
		{alloc.KindRequest, l.Request(), true, alloc.ErrRecordNotFound},
		{alloc.KindCounter, "", false, alloc.ErrNothingToMend},
		{alloc.KindHost, "a", false, alloc.ErrNothingToMend},
		{alloc.KindSandbox, running, false, alloc.ErrNothingToMend},
		{alloc.KindStint, r.OldStints[0].Key().ID, false, alloc.ErrNothingToMend},
		{alloc.KindCheckpoint, r.Checkpoints[0].Serial.String(), false, alloc.ErrNothingToMend},
		{alloc.KindRequest, r.Requests[0].ID, false, alloc.ErrNothingToMend},
		{alloc.KindCheckpoint, in(&r, alloc.StateInTransit).Checkpoint.String(), true, alloc.ErrMendFirst},
	} {
		refused(t, mend(c.kind, c.id, c.force), c.want)
	}
	if now := everything(t, l.Store); !reflect.DeepEqual(r, now) {
		t.Error("a refusal changed something")
	}
	// What could be issued again must not leave the records before it cannot.
	changed := everything(t, l.Store)
	changed.Counter.Next = 2
	l.replace(t, r, changed)
	refused(t, mend(alloc.KindSandbox, running, true), alloc.ErrMendFirst)
	refused(t, mend(alloc.KindRequest, r.Requests[0].ID, true), alloc.ErrMendFirst)
	refused(t, mend(alloc.KindHost, "a", true), alloc.ErrMendFirst)
	for _, kind := range []alloc.Kind{alloc.KindCounter, alloc.KindSandbox} {
		id := ""
		if kind == alloc.KindSandbox {
			id = running
		}
		if err := mend(kind, id, true); err != nil {
			t.Error(err)
		}
	}
	// One request is one intent.
	cmd := alloc.MendCommand{RequestID: l.Request(), Kind: alloc.KindHost, ID: "a", Force: true}
	must[alloc.Mended](t)(l.Mend(t.Context(), cmd))
	cmd.ID = "b"
	_, err := l.Mend(t.Context(), cmd)
	refused(t, err, alloc.ErrRequestReused)
	cmd.RequestID = RequestID(l.Clock.Now().Add(-time.Hour), 1)
	_, err = l.Mend(t.Context(), cmd)
	refused(t, err, alloc.ErrRequestExpired)
}

// testMendCutOff: a sandbox with more stints than a transaction takes leaves in several. What a process
// that died in between leaves is found, and mended by the same request or by another.
func testMendCutOff(t *testing.T, l *Lively) {
	r := everything(t, l.Store)
	sb := in(&r, alloc.StateRunning)
	var recs []alloc.Record
	for i := range 100 {
		st := r.OldStints[0].Stint
		st.Epoch = 1<<47 + alloc.Epoch(i)
		st.Checkpoint = 0
		st.Began = alloc.BeganRegistered
		recs = append(recs, &alloc.OldStint{Sandbox: sb.Serial, Stint: st})
	}
	put(t, l.Store, recs...)
	cmd := alloc.MendCommand{RequestID: l.Request(), Actor: "operator/ann", Kind: alloc.KindSandbox, ID: sb.Serial.String(), Force: true}
	// After the first of its transactions the process dies.
	cut := &cutting{Store: l.Store, commits: 1}
	_, err := alloc.NewService(cut, l.Clock.Now).Mend(t.Context(), cmd)
	refused(t, err, alloc.ErrUnavailable)
	f := l.check(t).Findings
	if len(f) != 1 || f[0].Promise != "P3" || !slices.Equal(f[0].Mend, []string{"mend", "sandbox", sb.Serial.String()}) {
		t.Fatalf("cut off: %+v", f)
	}
	done := must[alloc.Mended](t)(l.Mend(t.Context(), cmd))
	if len(done.Changed) < 100 {
		t.Errorf("%d records were put aside", len(done.Changed))
	}
	if again := must[alloc.Mended](t)(l.Mend(t.Context(), cmd)); !reflect.DeepEqual(again, done) {
		t.Errorf("%+v became %+v", done, again)
	}
	if f := l.check(t); len(f.Findings) > 0 || f.Aside != len(done.Changed) {
		t.Errorf("afterwards: %+v", f)
	}
}

// testMendOtherChoice: of two that clash the one that Check does not name can be mended as well.
func testMendOtherChoice(t *testing.T, l *Lively) {
	r := everything(t, l.Store)
	changed := everything(t, l.Store)
	ended, running := in(&changed, alloc.StateEnded), in(&changed, alloc.StateRunning)
	ended.Bindings[0].Serial = running.Bindings[0].Serial
	l.replace(t, r, changed)
	f := l.check(t).Findings
	other := "nsalloc mend sandbox " + running.Serial.String()
	if len(f) != 1 || !slices.Equal(f[0].Mend, []string{"mend", "sandbox", ended.Serial.String()}) || !strings.Contains(f[0].Fix, other) {
		t.Fatalf("%+v does not say %q", f, other)
	}
	must[alloc.Mended](t)(l.Mend(t.Context(), l.Command(strings.Fields(other)[1:])))
	if f := l.check(t).Findings; len(f) > 0 {
		t.Errorf("afterwards: %+v", f)
	}
}

// testMendRequest: a retry of what was put aside is refused, and never given others.
func testMendRequest(t *testing.T, l *Lively) {
	cmd := alloc.AllocateCommand{RequestID: l.Request(), Caller: "c", Count: 5}
	must[alloc.Ranges](t)(l.Allocate(t.Context(), cmd))
	must[alloc.Mended](t)(l.Mend(t.Context(), alloc.MendCommand{RequestID: l.Request(), Kind: alloc.KindRequest, ID: cmd.RequestID, Force: true}))
	_, err := l.Allocate(t.Context(), cmd)
	refused(t, err, alloc.ErrRequestExpired)
	l.Clock.Move(time.Millisecond)
	cmd.RequestID = l.Request()
	must[alloc.Ranges](t)(l.Allocate(t.Context(), cmd))
}

// testMendPutBack: a store that was put back to before its counter was mended takes the same generation
// again, and meets none of the serials that it has issued there.
func testMendPutBack(t *testing.T, l *Lively) {
	before := everything(t, l.Store)
	issued := alloc.Ranges{}
	for range 2 {
		must[alloc.Mended](t)(l.Mend(t.Context(), alloc.MendCommand{RequestID: l.Request(), Actor: "operator/ann", Kind: alloc.KindCounter, Force: true}))
		now := everything(t, l.Store)
		if now.Counter.Generation != 2 || now.Counter.Next < 1 || now.Counter.Next > alloc.MaxCounter/2+1 {
			t.Fatalf("the counter is %+v", now.Counter)
		}
		got := must[alloc.Ranges](t)(l.Allocate(t.Context(), alloc.AllocateCommand{RequestID: l.Request(), Caller: "c", Count: 1000}))
		for s := range got.All() {
			if issued.Contains(s) {
				t.Fatalf("serial %s was issued twice", s)
			}
		}
		issued = append(issued, got...)
		l.replace(t, everything(t, l.Store), before)
	}
}

// testMendUnreadableAhead: that a serial is in use is still told by the key of a record that cannot be read.
// It does not leave the records as long as the pool would issue it again.
func testMendUnreadableAhead(t *testing.T, l *Lively) {
	r := everything(t, l.Store)
	for i, kind := range []alloc.Kind{alloc.KindSandbox, alloc.KindCheckpoint} {
		serial := alloc.Serial(1<<48 | r.Counter.Next + 5 + uint64(i))
		plant(t, l.Store, alloc.Key{Kind: kind, ID: serial.String()}, Malformed)
		_, err := l.Mend(t.Context(), alloc.MendCommand{RequestID: l.Request(), Kind: kind, ID: serial.String()})
		refused(t, err, alloc.ErrMendFirst)
	}
	l.mendAll(t, "P1", alloc.KindCounter, reads(r))
}

// testMendUnreadableHeld: nor as long as a host may spend it.
func testMendUnreadableHeld(t *testing.T, l *Lively) {
	r := everything(t, l.Store)
	held := r.Hosts[0].Granted[0].First
	plant(t, l.Store, alloc.SandboxKey(held), Malformed)
	_, err := l.Mend(t.Context(), alloc.MendCommand{RequestID: l.Request(), Kind: alloc.KindSandbox, ID: held.String()})
	refused(t, err, alloc.ErrMendFirst)
	l.mendAll(t, "P1", alloc.KindHost, reads(r))
}

// testMendUnreadableUnknown: what a sandbox or a host had whose record cannot be read is not known. It does
// not leave the records as long as the counter is wrong.
func testMendUnreadableUnknown(t *testing.T, l *Lively) {
	r := everything(t, l.Store)
	for _, key := range []alloc.Key{r.Sandboxes[0].Key(), alloc.HostKey("a")} {
		plant(t, l.Store, key, Malformed)
		back := *r.Counter
		back.Next = r.Sandboxes[0].Serial.Counter() + 1 // the serials of its bindings are ahead
		put(t, l.Store, &back)
		cmd := alloc.MendCommand{RequestID: l.Request(), Actor: "operator/ann", Kind: key.Kind, ID: key.ID}
		_, err := l.Mend(t.Context(), cmd)
		refused(t, err, alloc.ErrMendFirst)
		put(t, l.Store, r.Counter)
		cmd.RequestID = l.Request()
		must[alloc.Mended](t)(l.Mend(t.Context(), cmd))
		put(t, l.Store, &back)
		plant(t, l.Store, key, Malformed)
		cmd.RequestID, cmd.Force = l.Request(), true
		must[alloc.Mended](t)(l.Mend(t.Context(), cmd))
		put(t, l.Store, r.Counter)
	}
}
