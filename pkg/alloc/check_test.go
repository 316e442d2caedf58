package alloc_test

import (
	"strings"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// lively is the records of a pool in which everything has happened: sandboxes in every state, a clone,
// older stints, hosts with ranges, answers.
func lively(t *testing.T) alloc.Store {
	t.Helper()
	s := memstore.New()
	p := alloctest.NewPool(t, s, alloc.DefaultPolicy())
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	a, b := p.Agent("a"), p.Agent("b")
	moved, dumped, transit, claimed, copied, over := a.Sandbox(), a.Sandbox(), a.Sandbox(), a.Sandbox(), a.Sandbox(), a.Sandbox()
	handOff := func(sb *alloc.Sandbox, from *alloctest.Agent) alloc.Handoff {
		h, err := p.Open(t.Context(), from.Open(sb))
		ok(err)
		h, err = p.Confirm(t.Context(), from.Confirm(h, alloc.SeenStopped))
		ok(err)
		return h
	}
	move := func(sb *alloc.Sandbox, from, to *alloctest.Agent) *alloc.Sandbox {
		c, err := p.Claim(t.Context(), to.Claim(handOff(sb, from), "r"))
		ok(err)
		h, _, err := p.Bind(t.Context(), to.Bind(c.Handoff, "r"))
		ok(err)
		return &h.Sandbox
	}
	for range 20 {
		moved = move(move(moved, a, b), b, a)
	}
	move(moved, a, b)
	_, err := p.Open(t.Context(), a.Open(dumped))
	ok(err)
	handOff(transit, a)
	_, err = p.Claim(t.Context(), b.Claim(handOff(claimed, a), "r"))
	ok(err)
	h, err := p.Open(t.Context(), a.Open(copied))
	ok(err)
	h, err = p.Abort(t.Context(), a.Abort(h, true))
	ok(err)
	clone := b.New()
	clone.Items[0].ParentCheckpoint = h.Checkpoint.Serial
	_, _, err = p.Register(t.Context(), clone)
	ok(err)
	_, err = p.End(t.Context(), a.End(over))
	ok(err)
	for range 2 {
		_, err = p.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 10})
		ok(err)
	}
	return s
}

func everything(t *testing.T, s alloc.Store) alloc.Records {
	t.Helper()
	r, err := alloctest.Everything(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func in(r alloc.Records, state alloc.SandboxState) *alloc.Sandbox {
	for _, s := range r.Sandboxes {
		if s.State == state {
			return s
		}
	}
	return nil
}

func imagesOf(r alloc.Records, s *alloc.Sandbox) *alloc.Checkpoint {
	for _, c := range r.Checkpoints {
		if c.Serial == s.Checkpoint {
			return c
		}
	}
	return nil
}

func TestCheckFinds(t *testing.T) {
	consumed := func(r alloc.Records) *alloc.Checkpoint {
		for _, c := range r.Checkpoints {
			if s := in(r, alloc.StateRunning); c.State == alloc.CheckpointConsumed && s.Checkpoint != c.Serial {
				return c
			}
		}
		return nil
	}
	s := lively(t)
	for _, c := range []struct {
		name    string
		promise string
		corrupt func(r *alloc.Records)
	}{
		{"a binding's serial twice", "P1", func(r *alloc.Records) { r.Sandboxes[0].Bindings[0].Serial = r.Sandboxes[1].Bindings[0].Serial }},
		{"a sandbox's serial twice", "P1", func(r *alloc.Records) { r.Sandboxes[0].Bindings[0].Serial = r.Sandboxes[1].Serial }},
		{"a checkpoint's serial twice", "P1", func(r *alloc.Records) { r.Sandboxes[0].Bindings[0].Serial = r.Checkpoints[0].Serial }},
		{"a serial of no generation", "P1", func(r *alloc.Records) { r.Sandboxes[0].Bindings[0].Serial = 7 }},
		{"ranges of two hosts overlap", "P1", func(r *alloc.Records) { r.Hosts[0].Granted = r.Hosts[1].Granted }},
		{"a host can spend what is in use", "P1", func(r *alloc.Records) { r.Hosts[0].Granted[0].First = r.Sandboxes[0].Serial }},
		{"a range that is none", "P1", func(r *alloc.Records) { r.Hosts[0].Granted[0].Count = 1 << 50 }},
		{"two requests got the same", "P1", func(r *alloc.Records) { r.Requests[0].Ranges = r.Requests[1].Ranges }},
		{"a request got a host's", "P1", func(r *alloc.Records) { r.Requests[0].Ranges = r.Hosts[0].Granted }},
		{"a request got what is in use", "P1", func(r *alloc.Records) { r.Requests[0].Ranges[0].First = r.Sandboxes[0].Serial - 1 }},
		{"the counter went back", "P1", func(r *alloc.Records) { r.Counter.Next -= 5 }},
		{"the counter went far back", "P1", func(r *alloc.Records) { r.Counter.Next = 2 }},
		{"a serial of a generation to come", "P1", func(r *alloc.Records) { r.Sandboxes[0].Bindings[0].Serial |= 1 << 49 }},

		{"no history", "P3", func(r *alloc.Records) { r.Sandboxes[0].Stints = nil }},
		{"another owner", "P3", func(r *alloc.Records) { in(*r, alloc.StateRunning).Owner = "z" }},
		{"the epoch went back", "P3", func(r *alloc.Records) { in(*r, alloc.StateRunning).Epoch-- }},
		{"the epoch went on alone", "P3", func(r *alloc.Records) { in(*r, alloc.StateRunning).Epoch++ }},
		{"an owner whose stint is over", "P3", func(r *alloc.Records) { in(*r, alloc.StateRunning).Stint().To = time.Now() }},
		{"a stint without an owner", "P3", func(r *alloc.Records) { in(*r, alloc.StateEnded).Stint().To = time.Time{} }},
		{"a stint that never ended", "P3", func(r *alloc.Records) { in(*r, alloc.StateRunning).Stints[3].To = time.Time{} }},
		{"two stints of one epoch", "P3", func(r *alloc.Records) {
			in(*r, alloc.StateRunning).Stints[3].Epoch = in(*r, alloc.StateRunning).Stints[2].Epoch
		}},
		{"an older stint of a later epoch", "P3", func(r *alloc.Records) { r.OldStints[0].Stint.Epoch += 30 }},
		{"an older stint of nothing", "P3", func(r *alloc.Records) { r.OldStints[0].Sandbox++ }},
		{"claimed by nobody", "P3", func(r *alloc.Records) { in(*r, alloc.StateClaimed).Claim = nil }},
		{"claimed by another host", "P3", func(r *alloc.Records) { in(*r, alloc.StateClaimed).Claim.Host = "z" }},
		{"in transit and claimed", "P3", func(r *alloc.Records) { in(*r, alloc.StateInTransit).Claim = in(*r, alloc.StateClaimed).Claim }},
		{"dumped without a checkpoint", "P3", func(r *alloc.Records) { in(*r, alloc.StateDumped).Checkpoint = 0 }},
		{"a checkpoint of an epoch to come", "P3", func(r *alloc.Records) { imagesOf(*r, in(*r, alloc.StateDumped)).Epoch++ }},

		{"no such checkpoint", "P6", func(r *alloc.Records) { in(*r, alloc.StateDumped).Checkpoint = 1<<48 | 9999 }},
		{"no such sandbox", "P6", func(r *alloc.Records) { imagesOf(*r, in(*r, alloc.StateDumped)).Sandbox = 1<<48 | 9999 }},
		{"dumped and consumed", "P6", func(r *alloc.Records) { imagesOf(*r, in(*r, alloc.StateDumped)).State = alloc.CheckpointConsumed }},
		{"in transit and void", "P6", func(r *alloc.Records) { imagesOf(*r, in(*r, alloc.StateInTransit)).State = alloc.CheckpointVoid }},
		{"claimed from in transit and a copy", "P6", func(r *alloc.Records) { imagesOf(*r, in(*r, alloc.StateClaimed)).State = alloc.CheckpointCopy }},
		{"runs from open images", "P6", func(r *alloc.Records) { imagesOf(*r, in(*r, alloc.StateRunning)).State = alloc.CheckpointOpen }},
		{"ran from a copy that is one still", "P6", func(r *alloc.Records) { consumed(*r).State = alloc.CheckpointCopy }},
		{"older images that can be claimed", "P6", func(r *alloc.Records) { consumed(*r).State = alloc.CheckpointOpen }},
		{"two stints from one checkpoint", "P6", func(r *alloc.Records) {
			in(*r, alloc.StateRunning).Stints[3].Checkpoint = in(*r, alloc.StateRunning).Stints[2].Checkpoint
		}},
		{"two stints from one checkpoint, one long ago", "P6", func(r *alloc.Records) {
			r.OldStints[len(r.OldStints)-1].Stint.Checkpoint = in(*r, alloc.StateRunning).Stints[2].Checkpoint
		}},

		{"one namespace in two sandboxes", "P16", func(r *alloc.Records) {
			s := in(*r, alloc.StateDumped)
			s.Bindings = append(s.Bindings, alloc.Binding{Serial: r.Hosts[0].Granted[0].First - 1, Type: alloc.PID})
			for _, o := range r.Sandboxes {
				if o != s && o.Owner == s.Owner && o.State == alloc.StateRunning {
					s.Bindings[len(s.Bindings)-1].Kernel = o.Bindings[0].Kernel
				}
			}
		}},
		{"one namespace twice in a sandbox", "P16", func(r *alloc.Records) {
			b := in(*r, alloc.StateRunning).Bindings
			b[1].Type, b[1].Kernel = b[0].Type, b[0].Kernel
		}},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			r := everything(t, s)
			if f := alloc.Check(r); len(f) > 0 {
				t.Fatalf("before: %+v", f)
			}
			c.corrupt(&r)
			found := false
			for _, f := range alloc.Check(r) {
				if f.Subject == "" || f.Evidence == "" || f.Fix == "" || strings.Contains(f.Evidence, "%!") {
					t.Errorf("a finding that says little: %+v", f)
				}
				found = found || f.Promise == c.promise
			}
			if !found {
				t.Errorf("%s is not among the findings %+v", c.promise, alloc.Check(r))
			}
		})
	}
}

// TestCheckOfParts: not everybody has all of the records.
func TestCheckOfParts(t *testing.T) {
	if f := alloc.Check(alloc.Records{}); len(f) > 0 {
		t.Errorf("nothing: %+v", f)
	}
	r := everything(t, lively(t))
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
