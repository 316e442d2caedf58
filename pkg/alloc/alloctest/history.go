package alloctest

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// History is what callers asked at the same time and what they were answered, for a check that some
// order of single steps of the Model explains it: that the pool is linearizable.
//
// A mutation whose outcome nobody learned is a call that never returned: it took effect at any moment
// since, or never.
type History struct {
	policy alloc.Policy
	// strict: no answer was lost. Then what a mutation answers is what it left; else it is what stood there
	// at some later moment, because a lost transaction is looked for, and may be found after others.
	strict  bool
	clock   atomic.Int64
	lost    atomic.Int64 // mutations whose outcome nobody learned
	unknown atomic.Int64 // answers that were lost, of mutations and of what was asked again

	mu     sync.Mutex
	moves  []porcupine.Operation // guarded by mu: of asked and told
	issues []porcupine.Operation // guarded by mu: of nil and alloc.Range
	wrongs []string              // guarded by mu: answers that no history explains
}

// asked is the input of an operation.
type asked struct {
	sandbox alloc.Serial // 0: of all sandboxes
	Command
}

// told is its output.
type told struct {
	answer Answer // "" for one that was lost
	seen   *Seen  // the sandbox as it was answered, nil when it was not
}

// Seen is a sandbox with its current checkpoint, in the Model's words.
type Seen struct {
	State, Owner, Cur, Images, Holder, Label string
	Epoch                                    int
}

// label is the one that register sets.
const label = "history"

// See is what records say.
func See(s *alloc.Sandbox, c *alloc.Checkpoint) *Seen {
	if s == nil {
		return &Seen{}
	}
	m := ModelOf(s, nil)
	seen := &Seen{State: m.State, Owner: m.Owner, Epoch: m.Epoch, Cur: m.Cur, Holder: m.Holder, Label: s.Labels[label]}
	if c != nil {
		seen.Images = string(c.State)
	}
	return seen
}

// see is what the model shows of itself.
func (m Model) see() Seen {
	return Seen{State: m.State, Owner: m.Owner, Epoch: m.Epoch, Cur: m.Cur, Images: m.Images[m.Cur], Holder: m.Holder, Label: m.Label}
}

func (m Model) equal(o Model) bool {
	return m.Same(o) && m.From == o.From && m.Given == o.Given && m.Label == o.Label && maps.Equal(m.Lives, o.Lives)
}

// move records a call on a sandbox that began at a tick and returns now.
func (h *History) move(client int, began int64, in asked, out told) {
	ended := h.clock.Add(1)
	if out.answer == "" {
		h.lost.Add(1)
		ended = math.MaxInt64
	}
	op := porcupine.Operation{ClientId: client, Input: in, Call: began, Output: out, Return: ended}
	ops := []porcupine.Operation{op}
	if out.seen != nil && in.What != "get" && !h.strict {
		ops[0].Output = told{answer: out.answer}
		op.Input, op.Output = asked{in.sandbox, Command{What: "get"}}, told{answer: Done, seen: out.seen}
		ops = append(ops, op)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.moves = append(h.moves, ops...)
}

func (h *History) wrong(what string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.wrongs = append(h.wrongs, what)
}

// issued records serials that were acknowledged to a call that began at a tick.
func (h *History) issued(client int, began int64, r alloc.Range) {
	ended := h.clock.Add(1)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.issues = append(h.issues, porcupine.Operation{ClientId: client, Call: began, Output: r, Return: ended})
}

// sandboxes is the Model for porcupine, a partition a sandbox: a host's new life is in each.
func (h *History) sandboxes() porcupine.Model {
	return porcupine.Model{
		Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
			parts := map[alloc.Serial][]porcupine.Operation{}
			for _, op := range history {
				if s := op.Input.(asked).sandbox; s != 0 {
					parts[s] = append(parts[s], op)
				}
			}
			for _, op := range history {
				if op.Input.(asked).sandbox == 0 {
					for s := range parts {
						parts[s] = append(parts[s], op)
					}
				}
			}
			var list [][]porcupine.Operation
			for _, s := range slices.Sorted(maps.Keys(parts)) {
				list = append(list, parts[s])
			}
			return list
		},
		Init: func() any { return Model{} },
		Step: func(state, input, output any) (bool, any) {
			m, in, out := state.(Model), input.(asked), output.(told)
			next, answers := m.Step(in.Command, h.policy)
			switch {
			case out.answer == "":
				return true, next
			case !answers.Allow(out.answer):
				return false, m
			case in.What == "hello" && next.Lives[in.Host] != in.Life:
				return false, m
			case out.seen != nil && next.see() != *out.seen:
				return false, m
			}
			return true, next
		},
		Equal: func(a, b any) bool { return a.(Model).equal(b.(Model)) },
		Hash: func(state any) uint64 {
			m := state.(Model)
			hash := uint64(m.Epoch)*31 + uint64(len(m.Images))
			for _, s := range []string{m.State, m.Owner, m.Cur, m.Holder, m.Images[m.Cur]} {
				for _, b := range []byte(s) {
					hash = hash*1099511628211 ^ uint64(b)
				}
			}
			return hash
		},
		DescribeOperation: func(input, output any) string {
			out := output.(told)
			s := input.(asked).String() + " -> " + string(out.answer)
			if out.answer == "" {
				s += "lost"
			}
			if out.seen != nil {
				s += fmt.Sprintf(" %+v", *out.seen)
			}
			return s
		},
		DescribeState: func(state any) string { return fmt.Sprintf("%+v", state) },
	}
}

// serials is the set of those that were acknowledged: none twice. They come in no order, because each lane
// issues from a range of its own. Only ranges that touch the same serials have to do with each other.
func serials() porcupine.Model {
	return porcupine.Model{
		Partition: func(ops []porcupine.Operation) (parts [][]porcupine.Operation) {
			ops = slices.Clone(ops)
			slices.SortFunc(ops, func(a, b porcupine.Operation) int {
				return cmp.Compare(a.Output.(alloc.Range).First, b.Output.(alloc.Range).First)
			})
			var last alloc.Serial
			for _, op := range ops {
				r := op.Output.(alloc.Range)
				if len(parts) == 0 || r.First > last {
					parts = append(parts, nil)
				}
				parts[len(parts)-1] = append(parts[len(parts)-1], op)
				last = max(last, r.Last())
			}
			return parts
		},
		Init: func() any { return alloc.Ranges(nil) },
		Step: func(state, _, output any) (bool, any) {
			r, before := output.(alloc.Range), state.(alloc.Ranges)
			twice := slices.ContainsFunc(before, func(x alloc.Range) bool { return r.First <= x.Last() && x.First <= r.Last() })
			return !twice, append(slices.Clip(before), r)
		},
		Equal:             func(a, b any) bool { return slices.Equal(a.(alloc.Ranges), b.(alloc.Ranges)) },
		DescribeOperation: func(_, output any) string { return fmt.Sprint("issue -> ", output) },
	}
}

// thinking bounds the check of one history; the check of one that is in order takes a part of a second.
const thinking = time.Minute

// Problem is why the history is not linearizable, with the file in a new directory that shows it; ""
// when it is.
func (h *History) Problem() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	problems := h.wrongs
	for _, part := range []struct {
		name  string
		model porcupine.Model
		ops   []porcupine.Operation
	}{{"sandboxes", h.sandboxes(), h.moves}, {"serials", serials(), h.issues}} {
		result, info := porcupine.CheckOperationsVerbose(part.model, part.ops, thinking)
		if result == porcupine.Ok {
			continue
		}
		what := "no order of single steps explains the history of " + part.name
		if result == porcupine.Unknown {
			what = fmt.Sprintf("the history of %s was not decided in %s", part.name, thinking)
		}
		dir, err := os.MkdirTemp("", "nsalloc-history-")
		path := filepath.Join(dir, part.name+".html")
		if err == nil {
			err = porcupine.VisualizePath(part.model, info, path)
		}
		if err != nil {
			path = "nowhere: " + err.Error()
		}
		problems = append(problems, fmt.Sprintf("%s (%d operations); it is drawn in %s: open it in a browser\n%s", what, len(part.ops), path, stuck(part.model, part.ops, info)))
	}
	return strings.Join(problems, "\n")
}

// stuck says how far an order of single steps came, and what was under way then and fits no more.
func stuck(model porcupine.Model, ops []porcupine.Operation, info porcupine.LinearizationInfo) string {
	parts := [][]porcupine.Operation{ops}
	if model.Partition != nil {
		parts = model.Partition(ops)
	}
	var b strings.Builder
	for i, found := range info.PartialLinearizationsOperations() {
		longest := slices.MaxFunc(append(found, nil), func(x, y []porcupine.Operation) int { return len(x) - len(y) })
		if len(longest) == len(parts[i]) {
			continue
		}
		write := func(op porcupine.Operation) {
			fmt.Fprintf(&b, "  %d to %d: %s\n", op.Call, op.Return, model.DescribeOperation(op.Input, op.Output))
		}
		state, in := model.Init(), map[string]bool{}
		for i, op := range longest {
			_, state = model.Step(state, op.Input, op.Output)
			in[fmt.Sprint(op)] = true
			if i >= len(longest)-4 {
				write(op)
			}
		}
		fmt.Fprintf(&b, "%d operations led to %+v; then came, and none fits:\n", len(longest), state)
		left := slices.DeleteFunc(slices.Clone(parts[i]), func(op porcupine.Operation) bool { return in[fmt.Sprint(op)] })
		first := slices.MinFunc(left, func(x, y porcupine.Operation) int { return int(x.Return - y.Return) })
		for _, op := range left {
			if op.Call <= first.Return {
				write(op)
			}
		}
	}
	return b.String()
}

// Lost is how many answers were lost; most mutations were asked again until one was not.
func (h *History) Lost() int { return int(h.unknown.Load()) }

// Check fails the test when the history is not linearizable. The drawing outlives the test.
func (h *History) Check(t testing.TB) {
	t.Helper()
	kinds := map[string]int{}
	for _, op := range h.moves {
		kinds[op.Input.(asked).What+" "+string(op.Output.(told).answer)]++
	}
	t.Logf("%d operations, %d issues, %d answers lost, %d for good: %v", len(h.moves), len(h.issues), h.unknown.Load(), h.lost.Load(), kinds)
	if p := h.Problem(); p != "" {
		t.Error(p)
	}
}

// pause waits without holding anything, less when ctx ends.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
