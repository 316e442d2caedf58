package alloc_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

var noon = time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)

func moment(p alloc.Policy) alloc.Moment {
	return alloc.Moment{Now: noon, Generation: 1, Policy: p, Actor: "test"}
}

func epoch(n int) alloc.Epoch { return alloc.Epoch(1<<48 + uint64(n)) }

func serial(n int) alloc.Serial { return alloc.Serial(1<<48 + uint64(n)) }

func who(host, run string) alloc.Claimant {
	return alloc.Claimant{Host: host, BootID: alloctest.BootID(1), Run: run}
}

// running is a sandbox in its first epoch.
func running(owner string) alloc.Sandbox {
	return alloc.Sandbox{
		Serial: serial(1), State: alloc.StateRunning, Owner: owner, Epoch: epoch(1), Created: noon,
		Bindings: []alloc.Binding{{Serial: serial(2), Type: alloc.PID, Bound: noon, Kernel: alloc.KernelID{BootID: alloctest.BootID(1), ID: 1, Inode: 1}}},
		Labels:   map[string]string{"name": "web"},
		Stints:   []alloc.Stint{{Host: owner, Epoch: epoch(1), From: noon, Began: "registered", Actor: "host/" + owner}},
	}
}

// situation is a sandbox with all its checkpoints, beside the model of it.
type situation struct {
	sandbox alloc.Sandbox
	images  map[alloc.Serial]alloc.Checkpoint
	model   alloctest.Model
	path    []string
}

func (s situation) handoff() alloc.Handoff {
	h := alloc.Handoff{Sandbox: s.sandbox}
	if c, ok := s.images[s.sandbox.Checkpoint]; ok {
		h.Checkpoint = &c
	}
	return h
}

func (s situation) key() string { return fmt.Sprintf("%+v", s.model) }

func (s situation) records() alloc.Records {
	r := alloc.Records{Sandboxes: []*alloc.Sandbox{&s.sandbox}}
	for _, c := range s.images {
		r.Checkpoints = append(r.Checkpoints, &c)
	}
	return r
}

// event is a command as Next takes it, nil when a use case refuses it before.
func (s situation) event(c alloctest.Command) alloc.Event {
	var ckpt alloc.Serial
	_ = ckpt.UnmarshalText([]byte(c.Ckpt))
	switch c.What {
	case "dump":
		if _, known := s.images[ckpt]; known && ckpt != s.sandbox.Checkpoint {
			return nil
		}
		return alloc.Dumped{Host: c.Host, Epoch: epoch(c.Epoch), Checkpoint: alloc.Checkpoint{Serial: ckpt, RunID: c.Ckpt}}
	case "stopped":
		return alloc.Stopped{Host: c.Host, Epoch: epoch(c.Epoch), Checkpoint: ckpt, Evidence: alloc.Evidence(c.Seen)}
	case "ran-on":
		return alloc.RanOn{Host: c.Host, Epoch: epoch(c.Epoch), Checkpoint: ckpt, ZeroGiven: c.Seen == "yes"}
	case "claim":
		return alloc.Claimed{Claimant: who(c.Host, c.Run), Checkpoint: ckpt}
	case "bind":
		e := alloc.Bound{Claimant: who(c.Host, c.Run), Epoch: epoch(c.Epoch)}
		for _, b := range s.sandbox.Bindings {
			e.Bindings = append(e.Bindings, alloc.Binding{Serial: b.Serial, Type: b.Type, Kernel: alloc.KernelID{BootID: alloctest.BootID(1), ID: uint64(c.Epoch), Inode: 1}})
		}
		return e
	case "release":
		return alloc.Released{Claimant: who(c.Host, c.Run), Epoch: epoch(c.Epoch)}
	case "over":
		return alloc.Over{Host: c.Host, Epoch: epoch(c.Epoch)}
	case "fence":
		return alloc.Fenced{Host: c.Host}
	}
	panic(c.What)
}

// do is Admit, where it applies, and Next.
func (s situation) do(c alloctest.Command, p alloc.Policy) (alloc.Handoff, alloctest.Answer, error) {
	h, e := s.handoff(), s.event(c)
	if claim, ok := e.(alloc.Claimed); ok {
		images, known := s.images[claim.Checkpoint]
		if !known {
			return h, alloctest.Answer(alloc.ReasonCheckpointNotFound), nil
		}
		outcome, why, err := alloc.Admit(&images, &s.sandbox, images.Digest, claim.Claimant, p)
		switch {
		case err != nil:
			return h, alloctest.AnswerOf(err), err
		case outcome == alloc.MayClone:
			if why == "" {
				return h, alloctest.Clone, errors.New("a clone without a reason")
			}
			return h, alloctest.Clone, nil
		}
	}
	if e == nil {
		return h, alloctest.Answer(alloc.ReasonBound), nil
	}
	next, err := h.Next(e, moment(p))
	if err != nil {
		return next, alloctest.AnswerOf(err), err
	}
	return next, alloctest.Done, nil
}

// commands are all that can be said of a sandbox in this situation, by right and by wrong, in time and late.
func (s situation) commands() (cs []alloctest.Command) {
	known := slices.Sorted(maps.Keys(s.model.Images))
	fresh := serial(100 + len(known)).String()
	for _, host := range []string{"a", "b"} {
		cs = append(cs, alloctest.Command{What: "fence", Host: host})
		for _, e := range []int{s.model.Epoch, s.model.Epoch - 1} {
			cs = append(cs, alloctest.Command{What: "over", Host: host, Epoch: e})
			for _, ckpt := range append(known, fresh) {
				for _, seen := range []string{"stopped", "in_doubt", "not_given"} {
					cs = append(cs, alloctest.Command{What: "stopped", Host: host, Epoch: e, Ckpt: ckpt, Seen: seen})
				}
				for _, seen := range []string{"yes", "no"} {
					cs = append(cs, alloctest.Command{What: "ran-on", Host: host, Epoch: e, Ckpt: ckpt, Seen: seen})
				}
				if len(known) < 2 || ckpt != fresh {
					cs = append(cs, alloctest.Command{What: "dump", Host: host, Epoch: e, Ckpt: ckpt})
				}
			}
			for _, run := range []string{"1", "2"} {
				cs = append(cs, alloctest.Command{What: "bind", Host: host, Epoch: e, Run: run}, alloctest.Command{What: "release", Host: host, Epoch: e, Run: run})
			}
		}
		for _, run := range []string{"1", "2"} {
			for _, ckpt := range append(known, fresh) {
				cs = append(cs, alloctest.Command{What: "claim", Host: host, Run: run, Ckpt: ckpt})
			}
		}
	}
	return cs
}

func inJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestNextAgainstModel walks every situation that two hosts with two runs each can bring a sandbox to
// in two or three epochs with two dumps, says everything in each, and compares with the model.
func TestNextAgainstModel(t *testing.T) {
	for name, p := range map[string]alloc.Policy{
		"default": alloc.DefaultPolicy(),
		"refuse":  {Live: alloc.PolicyRefuse, Over: alloc.PolicyRefuse, Unknown: alloc.PolicyRefuse},
		"clone":   {Live: alloc.PolicyClone, Over: alloc.PolicyClone, Unknown: alloc.PolicyAdopt},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			epochs := 3
			if p != alloc.DefaultPolicy() {
				epochs = 2
			}
			start := situation{sandbox: running("a"), model: alloctest.NewModel("a")}
			seen := map[string]bool{start.key(): true}
			said := 0
			for queue := []situation{start}; len(queue) > 0 && !t.Failed(); queue = queue[1:] {
				before := inJSON(t, queue[0].handoff())
				for _, c := range queue[0].commands() {
					said++
					next := step(t, queue[0], c, p)
					if next.model.Epoch > epochs || next.model.Same(queue[0].model) || seen[next.key()] {
						continue
					}
					if f := alloc.Check(next.records()); len(f) > 0 {
						t.Fatalf("%q: %+v", next.path, f)
					}
					seen[next.key()] = true
					next.path = append(slices.Clip(next.path), c.String())
					queue = append(queue, next)
				}
				if after := inJSON(t, queue[0].handoff()); after != before {
					t.Fatalf("%q: Next changed what it was given:\n%s\n%s", queue[0].path, before, after)
				}
			}
			t.Logf("%d situations, %d commands", len(seen), said)
		})
	}
}

func step(t *testing.T, s situation, c alloctest.Command, p alloc.Policy) situation {
	t.Helper()
	h, answer, err := s.do(c, p)
	model, want := s.model.Step(c, p)
	next := situation{sandbox: h.Sandbox, images: maps.Clone(s.images), model: model, path: s.path}
	if h.Checkpoint != nil {
		if next.images == nil {
			next.images = map[alloc.Serial]alloc.Checkpoint{}
		}
		next.images[h.Checkpoint.Serial] = *h.Checkpoint
	}
	r := next.records()
	switch {
	case !want.Allow(answer):
		t.Fatalf("%q, then %s: %s (%v), the model says %s", next.path, c, answer, err, want)
	case !alloctest.ModelOf(&next.sandbox, r.Checkpoints).Same(model):
		t.Fatalf("%q, then %s: %+v\nthe model says %+v", next.path, c, alloctest.ModelOf(&next.sandbox, r.Checkpoints), model)
	case h.Sandbox.Epoch < s.sandbox.Epoch:
		t.Fatalf("%q, then %s: the epoch went back from %s to %s", next.path, c, s.sandbox.Epoch, h.Sandbox.Epoch)
	case (answer != alloctest.Done || model.Same(s.model)) && !reflect.DeepEqual(h, s.handoff()):
		t.Fatalf("%q, then %s: %s, and changed the records:\n%s\n%s", next.path, c, answer, inJSON(t, s.handoff()), inJSON(t, h))
	case err != nil && (alloc.ReasonOf(err) == "" || alloc.ReasonOf(err) == alloc.ReasonMalformed):
		t.Fatalf("%q, then %s: %v has no reason", next.path, c, err)
	}
	if answer == alloctest.Done { // twice is once
		again, answer, err := next.do(c, p)
		if answer != alloctest.Done || !reflect.DeepEqual(again, h) {
			t.Fatalf("%q, then %s twice: %s, %v\n%s\n%s", next.path, c, answer, err, inJSON(t, h), inJSON(t, again))
		}
	}
	return next
}

// at brings a sandbox of host a into a state, as far as it can be said in one word.
func at(t *testing.T, state string) alloc.Handoff {
	t.Helper()
	dumped := alloc.Dumped{Host: "a", Epoch: epoch(1), Checkpoint: alloc.Checkpoint{Serial: serial(9), RunID: "d", Digest: alloc.Digest{1}}}
	claimed := alloc.Claimed{Claimant: who("b", "1"), Checkpoint: serial(9)}
	stopped := alloc.Stopped{Host: "a", Epoch: epoch(1), Checkpoint: serial(9), Evidence: alloc.SeenStopped}
	bound := alloc.Bound{Claimant: who("b", "1"), Epoch: epoch(2),
		Bindings: []alloc.Binding{{Serial: serial(2), Type: alloc.PID, Kernel: alloc.KernelID{BootID: alloctest.BootID(1), ID: 7, Inode: 7}}}}
	h := alloc.Handoff{Sandbox: running("a")}
	for _, e := range map[string][]alloc.Event{
		"running":    nil,
		"dumped":     {dumped},
		"in_transit": {dumped, stopped},
		"copy":       {dumped, alloc.Stopped{Host: "a", Epoch: epoch(1), Checkpoint: serial(9), Evidence: alloc.InDoubt}},
		"void":       {dumped, alloc.Stopped{Host: "a", Epoch: epoch(1), Checkpoint: serial(9), Evidence: alloc.NotGiven}},
		"ran on":     {dumped, alloc.RanOn{Host: "a", Epoch: epoch(1), Checkpoint: serial(9)}},
		"claimed":    {dumped, stopped, claimed},
		"bound":      {dumped, stopped, claimed, bound},
		"released":   {dumped, stopped, claimed, alloc.Released{Claimant: who("b", "1"), Epoch: epoch(2)}},
		"ended":      {alloc.Over{Host: "a", Epoch: epoch(1)}},
		"fenced":     {alloc.Fenced{Host: "a"}},
	}[state] {
		var err error
		if h, err = h.Next(e, moment(alloc.DefaultPolicy())); err != nil {
			t.Fatalf("%s: %T: %v", state, e, err)
		}
	}
	return h
}

// TestNextTable is the table of the package comment, with what the model does not have: the history,
// the claim, and the reasons.
func TestNextTable(t *testing.T) {
	dump := func(host string, n int) alloc.Event {
		return alloc.Dumped{Host: host, Epoch: epoch(n), Checkpoint: alloc.Checkpoint{Serial: serial(10), RunID: "e"}}
	}
	stop := func(e alloc.Evidence) alloc.Event {
		return alloc.Stopped{Host: "a", Epoch: epoch(1), Checkpoint: serial(9), Evidence: e}
	}
	ranOn := func(zero bool) alloc.Event {
		return alloc.RanOn{Host: "a", Epoch: epoch(1), Checkpoint: serial(9), ZeroGiven: zero}
	}
	claim := alloc.Claimed{Claimant: who("b", "1"), Checkpoint: serial(9)}
	bind := alloc.Bound{Claimant: who("b", "1"), Epoch: epoch(2)}
	release := alloc.Released{Claimant: who("b", "1"), Epoch: epoch(2)}
	over := func(host string, n int) alloc.Event { return alloc.Over{Host: host, Epoch: epoch(n)} }
	for _, c := range []struct {
		from   string
		event  alloc.Event
		reason alloc.Reason // or
		state  alloc.SandboxState
		images alloc.CheckpointState
		epoch  int
		claim  bool
		stint  alloc.StintOver // how the last one ended, "" while it lasts
	}{
		{"running", dump("a", 1), "", alloc.StateDumped, alloc.CheckpointOpen, 1, false, ""},
		{"ran on", dump("a", 1), "", alloc.StateDumped, alloc.CheckpointOpen, 1, false, ""},
		{"bound", dump("b", 2), "", alloc.StateDumped, alloc.CheckpointOpen, 2, false, ""},
		{"dumped", stop(alloc.SeenStopped), "", alloc.StateInTransit, alloc.CheckpointOpen, 1, false, "handed off"},
		{"dumped", stop(alloc.InDoubt), "", alloc.StateEnded, alloc.CheckpointCopy, 1, false, "ended"},
		{"dumped", stop(alloc.NotGiven), "", alloc.StateEnded, alloc.CheckpointVoid, 1, false, "ended"},
		{"dumped", ranOn(true), "", alloc.StateRunning, alloc.CheckpointCopy, 1, false, ""},
		{"dumped", ranOn(false), "", alloc.StateRunning, alloc.CheckpointVoid, 1, false, ""},
		{"in_transit", claim, "", alloc.StateClaimed, alloc.CheckpointOpen, 2, true, ""},
		{"released", claim, "", alloc.StateClaimed, alloc.CheckpointOpen, 3, true, ""},
		{"copy", claim, "", alloc.StateClaimed, alloc.CheckpointCopy, 2, true, ""},
		{"claimed", bind, "", alloc.StateRunning, alloc.CheckpointConsumed, 2, true, ""},
		{"claimed", release, "", alloc.StateInTransit, alloc.CheckpointOpen, 2, false, "released"},
		{"bound", release, "", alloc.StateInTransit, alloc.CheckpointOpen, 2, false, "released"},
		{"running", over("a", 1), "", alloc.StateEnded, "", 1, false, "ended"},
		{"bound", over("b", 2), "", alloc.StateEnded, alloc.CheckpointConsumed, 2, false, "ended"},
		{"running", alloc.Fenced{Host: "a"}, "", alloc.StateEnded, "", 2, false, "fenced"},
		{"dumped", alloc.Fenced{Host: "a"}, "", alloc.StateInTransit, alloc.CheckpointOpen, 2, false, "fenced"},
		{"claimed", alloc.Fenced{Host: "b"}, "", alloc.StateInTransit, alloc.CheckpointOpen, 3, false, "claim fenced"},
		{"bound", alloc.Fenced{Host: "b"}, "", alloc.StateEnded, alloc.CheckpointConsumed, 3, false, "fenced"},
		{"in_transit", alloc.Fenced{Host: "a"}, "", alloc.StateInTransit, alloc.CheckpointOpen, 1, false, "handed off"},
		{"ended", alloc.Fenced{Host: "a"}, "", alloc.StateEnded, "", 1, false, "ended"},

		{from: "running", event: dump("b", 1), reason: alloc.ReasonNotOwner},
		{from: "running", event: dump("a", 2), reason: alloc.ReasonStaleEpoch},
		{from: "bound", event: dump("a", 1), reason: alloc.ReasonStaleEpoch},
		{from: "dumped", event: dump("a", 1), reason: alloc.ReasonWrongState},
		{from: "in_transit", event: dump("a", 1), reason: alloc.ReasonWrongState},
		{from: "claimed", event: dump("b", 2), reason: alloc.ReasonWrongState},
		{from: "ended", event: dump("a", 1), reason: alloc.ReasonWrongState},
		{from: "running", event: stop(alloc.SeenStopped), reason: alloc.ReasonWrongState},
		{from: "ran on", event: stop(alloc.SeenStopped), reason: alloc.ReasonWrongState},
		{from: "dumped", event: stop("guessed"), reason: alloc.ReasonInvalid},
		{from: "claimed", event: stop(alloc.SeenStopped), reason: alloc.ReasonStaleEpoch},
		{from: "in_transit", event: stop(alloc.InDoubt), reason: alloc.ReasonWrongState},
		{from: "in_transit", event: ranOn(true), reason: alloc.ReasonWrongState},
		{from: "claimed", event: ranOn(true), reason: alloc.ReasonStaleEpoch},
		{from: "ran on", event: ranOn(true), reason: alloc.ReasonWrongState},
		{from: "running", event: claim, reason: alloc.ReasonWrongState},
		{from: "dumped", event: claim, reason: alloc.ReasonWrongState},
		{from: "void", event: claim, reason: alloc.ReasonWrongState},
		{from: "claimed", event: alloc.Claimed{Claimant: who("b", "2"), Checkpoint: serial(9)}, reason: alloc.ReasonWrongState},
		{from: "claimed", event: alloc.Claimed{Claimant: who("c", "1"), Checkpoint: serial(9)}, reason: alloc.ReasonWrongState},
		{from: "in_transit", event: alloc.Claimed{Claimant: who("b", "1"), Checkpoint: serial(8)}, reason: alloc.ReasonWrongState},
		{from: "in_transit", event: bind, reason: alloc.ReasonStaleEpoch},
		{from: "released", event: bind, reason: alloc.ReasonWrongState},
		{from: "claimed", event: alloc.Bound{Claimant: who("b", "2"), Epoch: epoch(2)}, reason: alloc.ReasonWrongState},
		{from: "claimed", event: alloc.Bound{Claimant: who("b", "1"), Epoch: epoch(1)}, reason: alloc.ReasonStaleEpoch},
		{from: "claimed", event: alloc.Released{Claimant: who("b", "2"), Epoch: epoch(2)}, reason: alloc.ReasonWrongState},
		{from: "bound", event: alloc.Released{Claimant: who("b", "1"), Epoch: epoch(1)}, reason: alloc.ReasonStaleEpoch},
		{from: "claimed", event: over("b", 2), reason: alloc.ReasonWrongState},
		{from: "dumped", event: over("a", 1), reason: alloc.ReasonWrongState},
		{from: "in_transit", event: over("a", 1), reason: alloc.ReasonWrongState},
		{from: "fenced", event: over("a", 1), reason: alloc.ReasonStaleEpoch},
		{from: "claimed", event: alloc.Fenced{Host: "a"}, reason: alloc.ReasonNotOwner},
	} {
		t.Run(fmt.Sprintf("%s/%T", c.from, c.event), func(t *testing.T) {
			h := at(t, c.from)
			n, err := h.Next(c.event, moment(alloc.DefaultPolicy()))
			if c.reason != "" {
				if alloc.ReasonOf(err) != c.reason || inJSON(t, n) != inJSON(t, h) {
					t.Errorf("refused with %v, want %s", err, c.reason)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var images alloc.CheckpointState
			if n.Checkpoint != nil {
				images = n.Checkpoint.State
			}
			s := n.Sandbox
			if s.State != c.state || images != c.images || s.Epoch != epoch(c.epoch) || (s.Claim != nil) != c.claim || s.Stint().Over != c.stint || s.Stint().To.IsZero() != (c.stint == "") {
				t.Errorf("%s, %s, epoch %s, claim %v, stint %+v\nwant %+v", s.State, images, s.Epoch, s.Claim, s.Stint(), c)
			}
		})
	}
}
