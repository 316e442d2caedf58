// Package alloctest tests stores: every alloc.Store passes TestStore, so that the rules above them
// can rely on one contract, whatever keeps the records. It tests what the contract says and nothing
// about how; faults of a real store's network are its own tests.
package alloctest

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// patience is how long a condition may take to come true before a test fails.
const patience = 20 * time.Second

// TestStore runs the whole suite. factory makes an empty store, which ends with its test.
func TestStore(t *testing.T, factory func(t *testing.T) Planter) {
	for _, test := range []struct {
		name string
		run  func(t *testing.T, s alloc.Store)
	}{
		{"Unreadable", testUnreadable},
		{"UnreadableIsMoved", testUnreadableIsMoved},
		{"StintsOfOneSandbox", testStintsOfOneSandbox},
		{"Empty", testEmpty},
		{"KeepsEveryKind", testKeepsEveryKind},
		{"KeepsWhatItDoesNotKnow", testKeepsExtra},
		{"GetIsOfOneRevision", testGetIsOfOneRevision},
		{"GuardsCompareValues", testGuardsCompareValues},
		{"GuardsCompareAbsence", testGuardsCompareAbsence},
		{"ConflictWritesNothing", testConflictWritesNothing},
		{"CommitIsOneRevision", testCommitIsOneRevision},
		{"RefusesBadTransactions", testRefusesBadTransactions},
		{"CountersNeverRepeat", testCountersNeverRepeat},
		{"ListPages", testListPages},
		{"ListIsPinned", testListIsPinned},
		{"ListRefuses", testListRefuses},
		{"WatchDeliversInOrder", testWatchDeliversInOrder},
		{"WatchReplays", testWatchReplays},
		{"WatchEndsWithItsContext", testWatchEndsWithItsContext},
		{"SyncMovesWatches", testSyncMovesWatches},
		{"WatchLeavesOut", testWatchLeavesOut},
		{"TokenOfWhatIsPut", testToken},
		{"DeleteSpans", testDeleteSpans},
		{"EndedContext", testEndedContext},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, factory(t)) })
	}
}

// Serial is the n-th serial of generation 1.
func Serial(t testing.TB, n uint64) alloc.Serial {
	t.Helper()
	s, err := alloc.NewSerial(1, n)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Records is one record of each kind, with every kind of field in use.
func Records(t testing.TB) []alloc.Record {
	t.Helper()
	const boot = "6f0cf4c5-34b3-4d35-a57e-6d5cfb36cb0f"
	at := time.Date(2026, 2, 3, 4, 5, 6, 789, time.UTC)
	digest := alloc.Digest{1, 2, 3}
	ranges := alloc.Ranges{{First: Serial(t, 100), Count: 10}, {First: Serial(t, 500), Count: 1}}
	marks := alloc.RequestLog{Marks: []alloc.RequestMark{{ID: "01936b2e-0000-7000-8000-000000000001", Digest: digest}}, Forgotten: "01936b2d-0000-7000-8000-000000000001"}
	claimant := alloc.Claimant{Host: "b", BootID: boot, Run: "42/1000"}
	stint := alloc.Stint{Host: "a", Epoch: 1<<48 + 1, From: at, To: at.Add(time.Hour), Began: alloc.BeganRegistered, Over: alloc.OverHandedOff, Actor: "host/a"}
	return []alloc.Record{
		&alloc.Pool{UUID: boot, Generation: 1, State: alloc.PoolOpen, Policy: alloc.DefaultPolicy(), Format: alloc.FormatVersion, Nonce: "n", Target: 2, Raised: at, Created: at},
		&alloc.Counter{Generation: 1, Next: 7, Nonce: "n"},
		&alloc.Server{Name: "s1", Incarnation: 3, Nonce: "n", Started: at, Address: "192.0.2.1:7000", Asked: "a", Removed: 2},
		&alloc.Slot{Server: "s1", Life: "0123456789abcdef0123456789abcdef", N: 5, Writes: 77, Nonce: "n"},
		&alloc.Lane{ID: "0123456789abcdef0123456789abcdef", Left: ranges, Nonce: "n", At: at},
		&alloc.Host{Name: "a", Incarnation: 1<<48 + 1, Nonce: "n", BootID: boot, Granted: ranges,
			Labels: map[string]string{"rack": "r1"}, Hello: at, Requests: marks},
		&alloc.Sandbox{Serial: Serial(t, 1), State: alloc.StateClaimed, Owner: "b", Epoch: 1<<48 + 2,
			Bindings: []alloc.Binding{
				{Serial: Serial(t, 2), Type: alloc.PID, Kernel: alloc.KernelID{BootID: boot, ID: 9, Inode: 4026532000}, Bound: at},
				{Serial: Serial(t, 3), Type: alloc.Net, Parent: Serial(t, 9), Gone: at},
			},
			Stints: []alloc.Stint{stint, {Host: "b", Epoch: 1<<48 + 2, From: at, Began: alloc.BeganClaimed, Checkpoint: Serial(t, 4), Actor: "host/b"}},
			Labels: map[string]string{"name": "web"}, Checkpoint: Serial(t, 4),
			Claim:  &alloc.Claim{Claimant: claimant, From: alloc.StateInTransit, Exe: "2049:131"},
			Parent: &alloc.Parent{Sandbox: Serial(t, 8), Checkpoint: Serial(t, 9)}, Created: at, Requests: marks},
		&alloc.OldStint{Sandbox: Serial(t, 1), Stint: stint},
		&alloc.Checkpoint{Serial: Serial(t, 4), State: alloc.CheckpointOpen, Sandbox: Serial(t, 1), Epoch: 1<<48 + 1, Source: "a",
			RunID: boot, Digest: digest, Claimant: &claimant, Created: at, Consumed: at.Add(time.Minute)},
		&alloc.Request{ID: "01936b2e-0000-7000-8000-000000000001", Digest: digest, Ranges: ranges, At: at},
		&alloc.Aside{Request: "01936b2e-0000-7000-8000-000000000001", Of: alloc.HostKey("a"), Value: []byte{1, 0xff}, At: at, Actor: "operator/ann", Digest: digest},
		&alloc.Aside{Request: "01936b2e-0000-7000-8000-000000000002", Of: alloc.HostKey("c"), Value: []byte{0, 0xff}, At: at, Actor: "operator/ann"},
	}
}

// host is a small record to write.
func host(name, nonce string) *alloc.Host { return &alloc.Host{Name: name, Nonce: nonce} }

func get(t testing.TB, s alloc.Store, keys ...alloc.Key) []alloc.Entry {
	t.Helper()
	entries, rev, err := s.Get(t.Context(), keys...)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != len(keys) {
		t.Fatalf("asked for %d records, got %d", len(keys), len(entries))
	}
	for i, e := range entries {
		switch {
		case e.Key != keys[i]:
			t.Errorf("entry %d is of %s, want %s", i, e.Key, keys[i])
		case e.Err != nil:
			t.Errorf("%s cannot be read: %v", e.Key, e.Err)
		case (e.Record == nil) != (e.Token == "") || (e.Record == nil) != (e.Revision == 0):
			t.Errorf("%s: a record, its token and its revision are there or absent together: %+v", e.Key, e)
		case e.Record != nil && e.Record.Key() != e.Key:
			t.Errorf("%s: the record is of %s", e.Key, e.Record.Key())
		case e.Revision > rev:
			t.Errorf("%s: changed at %d, read at %d", e.Key, e.Revision, rev)
		}
	}
	return entries
}

// nonce is what host put there, "" when the host is absent.
func nonce(t testing.TB, s alloc.Store, name string) string {
	t.Helper()
	h, ok := get(t, s, alloc.HostKey(name))[0].Record.(*alloc.Host)
	if !ok {
		return ""
	}
	return h.Nonce
}

func commit(t testing.TB, s alloc.Store, tx alloc.Tx) alloc.Revision {
	t.Helper()
	rev, err := s.Commit(t.Context(), tx)
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

func put(t testing.TB, s alloc.Store, recs ...alloc.Record) alloc.Revision {
	t.Helper()
	return commit(t, s, alloc.Tx{Put: recs})
}

func wantErr(t testing.TB, err error, want ...*alloc.Error) {
	t.Helper()
	if _, ok := errors.AsType[*alloc.Error](err); !ok {
		t.Errorf("the error is %v (%T), not an *alloc.Error", err, err)
		return
	}
	for _, w := range want {
		if errors.Is(err, w) {
			return
		}
	}
	t.Errorf("the error is %s (%v), want one of %v", alloc.ReasonOf(err), err, reasons(want))
}

func reasons(errs []*alloc.Error) (rs []alloc.Reason) {
	for _, e := range errs {
		rs = append(rs, e.Reason)
	}
	return rs
}

// tail is a running watch.
type tail struct {
	t     testing.TB
	calls chan call
	ended chan error
	stop  context.CancelFunc
	last  alloc.Revision
}

type call struct {
	rev     alloc.Revision
	changes []alloc.Change
}

// follow watches until the test ends. It does not wait for the watch to be there; that a watch
// begins at its revision, whenever it is there, is part of the contract.
func follow(t testing.TB, s alloc.Store, from alloc.Revision) *tail {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	f := &tail{t: t, calls: make(chan call, 10_000), ended: make(chan error, 1), stop: stop, last: from}
	go func() {
		f.ended <- s.Watch(ctx, from, func(rev alloc.Revision, changes []alloc.Change) {
			f.calls <- call{rev, changes}
		})
	}()
	t.Cleanup(func() {
		stop()
		if err := f.end(); err == nil {
			t.Error("a watch ended without an error")
		}
	})
	return f
}

// end waits until the watch has returned.
func (f *tail) end() error {
	f.t.Helper()
	select {
	case err := <-f.ended:
		f.ended <- err // for Cleanup
		return err
	case <-time.After(patience):
		f.t.Fatal("the watch does not end")
		return nil
	}
}

// until collects changes until rev was delivered.
func (f *tail) until(rev alloc.Revision) (changes []alloc.Change) {
	f.t.Helper()
	deadline := time.After(patience)
	for f.last < rev {
		select {
		case c := <-f.calls:
			if c.rev <= f.last {
				f.t.Fatalf("revision %d was delivered after %d", c.rev, f.last)
			}
			for _, ch := range c.changes {
				if ch.Revision != c.rev {
					f.t.Fatalf("a change of revision %d was delivered with %d", ch.Revision, c.rev)
				}
			}
			f.last = c.rev
			changes = append(changes, c.changes...)
		case err := <-f.ended:
			f.ended <- err
			f.t.Fatalf("the watch ended at %d, before %d: %v", f.last, rev, err)
		case <-deadline:
			f.t.Fatalf("the watch is at %d, %d does not come", f.last, rev)
		}
	}
	return changes
}

// describe is a change in one word, for comparing.
func describe(c alloc.Change) string {
	switch r := c.Record.(type) {
	case nil:
		if c.Err != nil {
			return "!" + c.Key.String()
		}
		return "-" + c.Key.String()
	case *alloc.Host:
		return fmt.Sprintf("%s=%s", c.Key, r.Nonce)
	}
	return c.Key.String()
}
