package alloc_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// machine runs a random history of one sandbox against the service, with faults, beside the model.
// After a lost answer that nobody asked for again it is not known what happened, so that there are
// several models; what is read next tells.
type machine struct {
	p       *alloctest.Pool
	store   *memstore.Store
	policy  alloc.Policy
	agents  map[string]*alloctest.Agent
	sandbox alloc.Serial
	dumps   map[string]alloc.OpenCommand // checkpoint -> the dump that made it, or was refused
	models  []alloctest.Model            // what the sandbox may be like
	pending []late                       // commands that may take effect later
}

// late is a command whose answer was lost. What it sent compares the sandbox's record as it was when its
// step ended, or before: once that value is gone, it can change nothing any more.
type late struct {
	alloctest.Command
	token alloc.Token
}

var hostNames = []string{"a", "b", "c"}

func newMachine(t *testing.T, policy alloc.Policy) *machine {
	m := &machine{store: memstore.New(), policy: policy, agents: map[string]*alloctest.Agent{}, dumps: map[string]alloc.OpenCommand{}}
	m.p = alloctest.NewPool(t, m.store, policy)
	t.Cleanup(func() { m.store.SetFaults(nil) }) // a draw can end the test within a call
	for _, name := range hostNames {
		m.agents[name] = m.p.Agent(name)
	}
	m.sandbox = m.agents["a"].Sandbox().Serial
	m.models = []alloctest.Model{alloctest.NewModel("a")}
	return m
}

// look is what the store says, as of one revision: what is pending may arrive at any call.
func (m *machine) look(t *testing.T) (alloctest.Model, alloc.Token) {
	keys := []alloc.Key{alloc.SandboxKey(m.sandbox)}
	for _, cmd := range m.dumps {
		keys = append(keys, alloc.CheckpointKey(cmd.Checkpoint))
	}
	entries, _, err := m.store.Get(t.Context(), keys...)
	if err != nil {
		t.Fatal(err)
	}
	var images []*alloc.Checkpoint
	for _, e := range entries[1:] {
		if c, ok := e.Record.(*alloc.Checkpoint); ok {
			images = append(images, c)
		}
	}
	return alloctest.ModelOf(entries[0].Record.(*alloc.Sandbox), images), entries[0].Token
}

// draw is a command: mostly one that fits, in the name of somebody who may, and often not.
func (m *machine) draw(t *rapid.T) alloctest.Command {
	now := m.models[0]
	likely := map[string][]string{
		"running": {"dump", "dump", "dump", "dump", "dump", "dump", "release", "over"}, "dumped": {"stopped", "stopped", "ran-on"},
		"in_transit": {"claim"}, "claimed": {"bind", "bind", "release"}, "ended": {"claim"},
	}[now.State]
	c := alloctest.Command{What: rapid.SampledFrom(likely).Draw(t, "likely"), Host: now.Owner, Epoch: now.Epoch, Ckpt: now.Cur}
	if rapid.IntRange(0, 3).Draw(t, "odd") == 0 {
		c.What = rapid.SampledFrom([]string{"dump", "stopped", "ran-on", "claim", "bind", "release", "over"}).Draw(t, "what")
	}
	if c.What == "claim" || rapid.IntRange(0, 7).Draw(t, "other host") == 0 {
		c.Host = rapid.SampledFrom(hostNames).Draw(t, "host")
	}
	if rapid.IntRange(0, 7).Draw(t, "late") == 0 {
		c.Epoch -= rapid.IntRange(0, 2).Draw(t, "epochs")
	}
	var known []string
	for ckpt := range now.Images {
		known = append(known, ckpt)
	}
	slices.Sort(known)
	if len(known) > 0 && rapid.IntRange(0, 7).Draw(t, "other images") == 0 {
		c.Ckpt = rapid.SampledFrom(known).Draw(t, "images")
	}
	if c.What == "dump" && (len(known) == 0 || rapid.IntRange(0, 5).Draw(t, "again") != 0) {
		c.Ckpt = ""
	}
	c.Run = rapid.SampledFrom([]string{"1", "1", "2"}).Draw(t, "run")
	if now.Holder != "" && c.What != "claim" {
		c.Run = now.Holder[len(now.Holder)-1:]
	}
	switch c.What {
	case "stopped":
		c.Seen = rapid.SampledFrom([]string{"stopped", "stopped", "stopped", "in_doubt", "in_doubt", "not_given"}).Draw(t, "seen")
	case "ran-on":
		c.Seen = rapid.SampledFrom([]string{"yes", "no"}).Draw(t, "zero")
	}
	return c
}

// call is the service's side of a command, which it may complete.
func (m *machine) call(c *alloctest.Command) func(context.Context) (alloctest.Answer, error) {
	a := m.agents[c.Host]
	var ckpt alloc.Serial
	_ = ckpt.UnmarshalText([]byte(c.Ckpt))
	e := epoch(c.Epoch)
	mut := a.Mutation()
	done := func(err error) (alloctest.Answer, error) {
		switch alloc.ReasonOf(err) {
		case alloc.ReasonUnknownOutcome, alloc.ReasonUnavailable, alloc.ReasonConflict, alloc.ReasonMalformed, alloc.ReasonInvalid:
			return "", err
		}
		return alloctest.AnswerOf(err), nil
	}
	switch c.What {
	case "dump":
		cmd, again := m.dumps[c.Ckpt]
		if !again || cmd.Host != c.Host {
			spend, s := a.Next(1)
			c.Ckpt = s[0].String()
			cmd = alloc.OpenCommand{Sandbox: m.sandbox, Spend: spend, Checkpoint: s[0], RunID: c.Ckpt, Digest: alloc.Digest{1}}
		}
		cmd.Mutation, cmd.Epoch = mut, e
		m.dumps[c.Ckpt] = cmd
		return func(ctx context.Context) (alloctest.Answer, error) { _, err := m.p.Open(ctx, cmd); return done(err) }
	case "stopped":
		cmd := alloc.ConfirmCommand{Mutation: mut, Sandbox: m.sandbox, Epoch: e, Checkpoint: ckpt, Evidence: alloc.Evidence(c.Seen)}
		return func(ctx context.Context) (alloctest.Answer, error) {
			_, err := m.p.Confirm(ctx, cmd)
			return done(err)
		}
	case "ran-on":
		cmd := alloc.AbortCommand{Mutation: mut, Sandbox: m.sandbox, Epoch: e, Checkpoint: ckpt, ZeroGiven: c.Seen == "yes"}
		return func(ctx context.Context) (alloctest.Answer, error) { _, err := m.p.Abort(ctx, cmd); return done(err) }
	case "claim":
		cmd := alloc.ClaimCommand{Mutation: mut, Checkpoint: ckpt, Digest: alloc.Digest{1}, BootID: a.BootID, Run: c.Run}
		return func(ctx context.Context) (alloctest.Answer, error) {
			got, err := m.p.Claim(ctx, cmd)
			if err == nil && got.Outcome == alloc.MayClone {
				return alloctest.Clone, nil
			}
			return done(err)
		}
	case "bind":
		cmd := alloc.BindCommand{Mutation: mut, Sandbox: m.sandbox, Epoch: e, BootID: a.BootID, Run: c.Run}
		return func(ctx context.Context) (alloctest.Answer, error) {
			_, _, err := m.p.Bind(ctx, cmd)
			return done(err)
		}
	case "release":
		cmd := alloc.ReleaseCommand{Mutation: mut, Sandbox: m.sandbox, Epoch: e, BootID: a.BootID, Run: c.Run}
		return func(ctx context.Context) (alloctest.Answer, error) {
			_, err := m.p.Release(ctx, cmd)
			return done(err)
		}
	case "over":
		cmd := alloc.EndCommand{Mutation: mut, Sandbox: m.sandbox, Epoch: e}
		return func(ctx context.Context) (alloctest.Answer, error) { _, err := m.p.End(ctx, cmd); return done(err) }
	}
	panic(c.What)
}

// faults are drawn for the commits and reads of one call.
func (m *machine) faults(t *rapid.T) func(memstore.Op) memstore.Fault {
	if rapid.Bool().Draw(t, "calm") {
		return nil
	}
	var drawn []memstore.Fault
	for range 3 {
		f := memstore.Fault{Outcome: rapid.SampledFrom([]memstore.Outcome{memstore.OK, memstore.Stored, memstore.Lost, memstore.Delayed, memstore.Delayed, memstore.Unavailable, memstore.Conflict}).Draw(t, "fault")}
		if f.Outcome == memstore.Delayed {
			f.After = rapid.IntRange(1, 12).Draw(t, "after")
		}
		drawn = append(drawn, f)
	}
	badRead := rapid.IntRange(1, 12).Draw(t, "bad read")
	commits, reads := 0, 0
	return func(op memstore.Op) memstore.Fault {
		if !op.Commit {
			if reads++; reads == badRead {
				return memstore.Fault{Outcome: memstore.Unavailable}
			}
			return memstore.Fault{}
		}
		if commits++; commits <= len(drawn) {
			return drawn[commits-1]
		}
		return memstore.Fault{}
	}
}

// grow adds to models what pending commands can make of them.
func (m *machine) grow(models []alloctest.Model) []alloctest.Model {
	for i := 0; i < len(models); i++ {
		for _, c := range m.pending {
			next, answers := models[i].Step(c.Command, m.policy)
			if answers.Allow(alloctest.Done) && !slices.ContainsFunc(models, next.Same) {
				models = append(models, next)
			}
		}
	}
	return models
}

func (m *machine) step(t *testing.T, rt *rapid.T) {
	c := m.draw(rt)
	call := m.call(&c)
	m.store.SetFaults(m.faults(rt))
	answer, err := call(t.Context())
	lost := alloc.ReasonOf(err) == alloc.ReasonUnknownOutcome
	for range rapid.IntRange(0, 2).Draw(rt, "asks again") {
		if err != nil {
			answer, err = call(t.Context())
			lost = lost || alloc.ReasonOf(err) == alloc.ReasonUnknownOutcome
		}
	}
	m.store.SetFaults(nil)

	before := m.grow(slices.Clone(m.models))
	var after []alloctest.Model
	for _, b := range before {
		next, answers := b.Step(c, m.policy)
		switch {
		case err == nil && answers.Allow(answer):
			after = append(after, next)
		case err == nil:
		case lost:
			after = append(after, b, next)
		default: // the error says that nothing was changed
			after = append(after, b)
		}
	}
	if r := alloc.ReasonOf(err); r == alloc.ReasonMalformed || r == alloc.ReasonInvalid {
		rt.Fatalf("%s: %v", c, err)
	}
	maybe := err != nil && lost
	if maybe {
		m.pending = append(m.pending, late{Command: c})
	}
	after = m.grow(after)
	seen, token := m.look(t)
	after = slices.DeleteFunc(after, func(x alloctest.Model) bool { return !x.Same(seen) })
	if len(after) == 0 {
		rt.Fatalf("%s gave %s, %v\nbefore %+v\nthe store has %+v", c, answer, err, before, seen)
	}
	m.models = after
	if maybe {
		m.pending[len(m.pending)-1].token = token
	}
	m.pending = slices.DeleteFunc(m.pending, func(l late) bool { return l.token != token })
}

// tb hides that a test has a deadline, which means nothing in a bubble's time.
type tb struct{ testing.TB }

var historyPolicies = map[string]alloc.Policy{
	"default": alloc.DefaultPolicy(),
	"refuse":  {Live: alloc.PolicyRefuse, Over: alloc.PolicyClone, Unknown: alloc.PolicyRefuse},
}

// randomHistory is a property: every answer of a drawn history is the model's, and Check finds nothing at
// its end. It counts in visited the states that it passed through.
func randomHistory(t *testing.T, policy alloc.Policy, visited map[string]int) func(*rapid.T) {
	return func(rt *rapid.T) {
		m := newMachine(t, policy)
		for range rapid.IntRange(1, 40).Draw(rt, "steps") {
			m.step(t, rt)
			visited[m.models[0].State]++
			if x := m.models[0]; x.State == "ended" && x.Images[x.Cur] != "copy" && len(m.pending) == 0 {
				break // for good
			}
		}
		m.store.Settle()
		r, err := alloctest.Everything(t.Context(), m.store)
		if err != nil {
			rt.Fatal(err)
		}
		if f := alloc.Check(r); len(f) > 0 {
			rt.Fatalf("%+v", f)
		}
	}
}

func TestRandomHistories(t *testing.T) {
	for name, policy := range historyPolicies {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				visited := map[string]int{}
				rapid.Check(tb{t}, randomHistory(t, policy, visited))
				t.Logf("visited %v", visited)
			})
		})
	}
}

// FuzzHistories draws from the fuzzer's bytes, for as long as one likes, what TestRandomHistories draws a
// hundred times.
func FuzzHistories(f *testing.F) {
	random := rand.NewChaCha8([32]byte{})
	for name := range historyPolicies {
		for range 4 {
			input := make([]byte, 8<<10)
			_, _ = random.Read(input)
			f.Add(name, input)
		}
	}
	f.Fuzz(func(t *testing.T, name string, input []byte) {
		policy, ok := historyPolicies[name]
		if !ok {
			policy = alloc.DefaultPolicy()
		}
		synctest.Test(t, func(t *testing.T) {
			rapid.MakeFuzz(randomHistory(t, policy, map[string]int{}))(t, input)
		})
	})
}

// TestHostsAtOnce: hosts that know nothing of each other move one sandbox about, each by what it reads.
func TestHostsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := memstore.New()
		p := alloctest.NewPool(t, s, alloc.DefaultPolicy())
		agents := []*alloctest.Agent{p.Agent("a"), p.Agent("b"), p.Agent("c")}
		sb := agents[0].Sandbox().Serial
		var faults sync.Mutex
		random := rand.New(rand.NewPCG(1, 2))
		s.SetFaults(func(op memstore.Op) memstore.Fault {
			faults.Lock()
			defer faults.Unlock()
			if !op.Commit || random.IntN(3) > 0 {
				return memstore.Fault{}
			}
			return memstore.Fault{Outcome: memstore.Outcome(random.IntN(6)), After: 1 + random.IntN(5)}
		})
		var wg sync.WaitGroup
		moved := make([]int, len(agents))
		for i, a := range agents {
			wg.Go(func() {
				random := rand.New(rand.NewPCG(3, uint64(i)))
				for n := range 200 {
					if random.IntN(3) > 0 {
						time.Sleep(time.Duration(random.IntN(10)) * time.Millisecond) // of the bubble's time
					}
					entries, _, err := s.Get(t.Context(), alloc.SandboxKey(sb))
					if err != nil {
						t.Error(err)
						return
					}
					cur := entries[0].Record.(*alloc.Sandbox)
					h := alloc.Handoff{Sandbox: *cur, Checkpoint: &alloc.Checkpoint{Serial: cur.Checkpoint, Digest: alloc.Digest{1}}}
					switch run := fmt.Sprint(n / 8); cur.State {
					case alloc.StateRunning:
						_, err = p.Open(t.Context(), a.Open(cur))
					case alloc.StateDumped:
						_, err = p.Confirm(t.Context(), a.Confirm(h, alloc.SeenStopped))
					case alloc.StateInTransit:
						_, err = p.Claim(t.Context(), a.Claim(h, run))
					case alloc.StateClaimed:
						if _, _, err = p.Bind(t.Context(), a.Bind(h, cur.Claim.Run)); err == nil {
							moved[i]++
						}
					}
					if r := alloc.ReasonOf(err); r == alloc.ReasonMalformed || r == alloc.ReasonInvalid || err != nil && r == "" {
						t.Errorf("in state %s: %v", cur.State, err)
					}
				}
			})
		}
		wg.Wait()
		s.SetFaults(nil)
		s.Settle()
		t.Logf("moved %v times", moved)
		if slices.Max(moved) == 0 {
			t.Error("nothing moved")
		}
	})
}
