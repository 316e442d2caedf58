package alloctest

import (
	"errors"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// TestService runs the use cases over a store, with hosts that behave and hosts that do not. factory
// makes an empty store, which ends with its test; every test ends with Check.
func TestService(t *testing.T, factory func(t *testing.T) Planter) {
	for _, test := range []struct {
		name string
		run  func(t *testing.T, p *Pool)
	}{
		{"Pool", testPool},
		{"Allocate", testAllocate},
		{"AllocateExhausts", testAllocateExhausts},
		{"LastGeneration", testLastGeneration},
		{"RequestsAreSwept", testSweep},
		{"HelloAgain", testHelloAgain},
		{"HelloNewLife", testHelloNewLife},
		{"HelloReplayedByAnOlderLife", testHelloReplayed},
		{"HelloRefuses", testHelloRefuses},
		{"Grant", testGrant},
		{"HostQuota", testQuota},
		{"OlderGeneration", testOlderGeneration},
		{"PoolRecovers", testRecovering},
		{"SetPolicy", testSetPolicy},
		{"Register", testRegister},
		{"RegisterManySandboxes", testRegisterMany},
		{"RegisterChanges", testRegisterChanges},
		{"RegisterParts", testRegisterParts},
		{"PartsFromCopies", testPartsFromCopies},
		{"RegisterRefuses", testRegisterRefuses},
		{"RegisterClone", testRegisterClone},
		{"StraightPath", testStraightPath},
		{"StraightPathTwice", testTwice},
		{"DumpVetoed", testDumpVetoed},
		{"LeaveRunningMakesAClone", testLeaveRunning},
		{"ResumeFromACopy", testResume},
		{"ResumeOfWhatEndedInPieces", testResumePieces},
		{"ReleaseBeforeAndAfterBind", testRelease},
		{"SecondClaimantWaits", testSecondClaimant},
		{"ClaimRepeatedAfterRelease", testClaimRepeated},
		{"BindRefuses", testBindRefuses},
		{"OpenRefuses", testOpenRefuses},
		{"LongHistory", testLongHistory},
		{"AgainForgotten", testAgainForgotten},
		{"AgainMoved", testAgainMoved},
		{"AgainEnds", testAgainEnds},
		{"AgainHolds", testAgainHolds},
		{"AgainClaimed", testAgainClaimed},
		{"AgainDumped", testAgainDumped},
		{"AgainLost", testAgainLost},
		{"AgainBindings", testAgainBindings},
		{"AgainDead", testAgainDead},
		{"AgainImages", testAgainImages},
		{"AgainOver", testAgainOver},
		{"AgainMidDump", testAgainMidDump},
		{"AgainLate", testAgainLate},
		{"AgainRefuses", testAgainRefuses},
		{"HelloOfOneThatHasSeenMore", testSeen},
		{"StaleCallers", testStaleCallers},
		{"ForgottenRequests", testForgotten},
		{"ForgottenMoves", testForgottenMoves},
		{"OldMarksLeave", testOldMarksLeave},
		{"UnreadablePool", testUnreadablePool},
		{"UnreadableHost", testUnreadableHost},
		{"UnreadableSandbox", testUnreadableSandbox},
		{"UnreadableCheckpoint", testUnreadableCheckpoint},
		{"UnreadableRequest", testUnreadableRequest},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, NewPool(t, factory(t), alloc.DefaultPolicy())) })
	}
}

// must is for calls that cannot fail.
func must[T any](t testing.TB) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func refused(t testing.TB, err error, want *alloc.Error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%v, want %s", err, want.Reason)
	}
}

// left is what a host can still spend.
func (a *Agent) left() uint64 { return a.Record().Granted.Count() }

func (p *Pool) sandbox(t testing.TB, s alloc.Serial) *alloc.Sandbox {
	t.Helper()
	sb, ok := get(t, p.Store, alloc.SandboxKey(s))[0].Record.(*alloc.Sandbox)
	if !ok {
		t.Fatalf("sandbox %s is not there", s)
	}
	return sb
}

// put writes a record over what is there: what an operator, a restore or a newer version did.
func (p *Pool) put(t testing.TB, recs ...alloc.Record) {
	t.Helper()
	put(t, p.Store, recs...)
}

func testPool(t *testing.T, p *Pool) {
	found, _, err := p.Pool(t.Context())
	if err != nil || found.Generation != 1 || found.State != alloc.PoolOpen || found.Policy != alloc.DefaultPolicy() {
		t.Errorf("%+v, %v", found, err)
	}
	_, err = p.InitPool(t.Context(), alloc.DefaultPolicy())
	refused(t, err, alloc.ErrPoolExists)
	_, err = p.InitPool(t.Context(), alloc.Policy{})
	refused(t, err, alloc.ErrInvalid)

	// A pool of a newer format is left alone.
	newer := *found
	newer.Format = alloc.FormatVersion + 1
	p.put(t, &newer)
	_, err = p.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 1})
	refused(t, err, alloc.ErrFormat)

	// Without its record, what is left of a pool is not an empty store.
	commit(t, p.Store, alloc.Tx{Delete: []alloc.Key{{Kind: alloc.KindPool}}})
	_, err = p.InitPool(t.Context(), alloc.DefaultPolicy())
	refused(t, err, alloc.ErrMalformed)
	_, err = p.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 1})
	refused(t, err, alloc.ErrPoolMissing)
	commit(t, p.Store, alloc.Tx{Delete: []alloc.Key{{Kind: alloc.KindCounter}}, Put: []alloc.Record{&alloc.Host{Name: "a"}}})
	_, err = p.InitPool(t.Context(), alloc.DefaultPolicy())
	refused(t, err, alloc.ErrMalformed)
	commit(t, p.Store, alloc.Tx{Delete: []alloc.Key{alloc.HostKey("a")}})
	if _, err = p.InitPool(t.Context(), alloc.DefaultPolicy()); err != nil {
		t.Errorf("in an empty store: %v", err)
	}
}

func testRecovering(t *testing.T, p *Pool) {
	a := p.Agent("a")
	sb := a.Sandbox()
	found, _, err := p.Pool(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	recovering := *found
	recovering.State = alloc.PoolRecovering
	hello, grant, register, open := a.Hello(), alloc.GrantCommand{Mutation: a.Mutation(), Count: 1}, a.New(), a.Open(sb)
	p.put(t, &recovering)
	_, err = p.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 1})
	refused(t, err, alloc.ErrRecovering)
	_, _, err = p.Hello(t.Context(), hello)
	refused(t, err, alloc.ErrRecovering)
	_, err = p.Grant(t.Context(), grant)
	refused(t, err, alloc.ErrRecovering)
	_, _, err = p.Register(t.Context(), register)
	refused(t, err, alloc.ErrRecovering)
	_, err = p.Open(t.Context(), open)
	refused(t, err, alloc.ErrRecovering)
	p.put(t, found)
	must[[]*alloc.Sandbox](t)(func() ([]*alloc.Sandbox, error) { s, _, err := p.Register(t.Context(), register); return s, err }())
}

// testStaleCallers: of an older life, of a host that nobody knows, with requests of another time.
func testStaleCallers(t *testing.T, p *Pool) {
	a := p.Agent("a")
	sb := a.Sandbox()
	h := must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(sb)))
	register, end, confirm, claim := a.New(), a.End(sb), a.Confirm(h, alloc.SeenStopped), a.Claim(h, "r")
	call := func(m alloc.Mutation) []error {
		register.Mutation, end.Mutation, confirm.Mutation, claim.Mutation = m, m, m, m
		_, _, err1 := p.Register(t.Context(), register)
		_, err2 := p.End(t.Context(), end)
		_, err3 := p.Confirm(t.Context(), confirm)
		_, err4 := p.Claim(t.Context(), claim)
		_, err5 := p.Grant(t.Context(), alloc.GrantCommand{Mutation: m, Count: 1})
		return []error{err1, err2, err3, err4, err5}
	}
	before := get(t, p.Store, alloc.HostKey("a"), alloc.SandboxKey(sb.Serial), h.Checkpoint.Key())
	for _, c := range []struct {
		change func(m *alloc.Mutation)
		want   *alloc.Error
	}{
		{func(m *alloc.Mutation) { m.Incarnation-- }, alloc.ErrStaleIncarnation},
		{func(m *alloc.Mutation) { m.Incarnation++ }, alloc.ErrRecovering},
		{func(m *alloc.Mutation) { m.Host = "nobody" }, alloc.ErrHostUnknown},
		{func(m *alloc.Mutation) { m.Host = "" }, alloc.ErrInvalid},
		{func(m *alloc.Mutation) { m.RequestID = "" }, alloc.ErrInvalid},
		{func(m *alloc.Mutation) { m.RequestID = "01936b2e-0000-4000-8000-000000000001" }, alloc.ErrInvalid},
		{func(m *alloc.Mutation) { m.RequestID = RequestID(p.Clock.Now().Add(-alloc.RequestLife-1e6), 1) }, alloc.ErrRequestExpired},
		{func(m *alloc.Mutation) { m.RequestID = RequestID(p.Clock.Now().Add(2*60e9), 1) }, alloc.ErrInvalid},
	} {
		m := a.Mutation()
		c.change(&m)
		for _, err := range call(m) {
			refused(t, err, c.want)
		}
	}
	for i, e := range get(t, p.Store, alloc.HostKey("a"), alloc.SandboxKey(sb.Serial), h.Checkpoint.Key()) {
		if e.Token != before[i].Token {
			t.Errorf("%s was changed", e.Key)
		}
	}
}
