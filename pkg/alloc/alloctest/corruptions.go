package alloctest

import (
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Lively is a pool in which everything has happened: sandboxes in every state, a clone, older stints,
// hosts with ranges, answers.
type Lively struct {
	*Pool
	A, B *Agent
}

// firstLively is the first that was made, as it was then.
var firstLively struct {
	mu      sync.Mutex
	made    bool
	a, b    Agent
	now     int64
	ids     uint64
	records []alloc.Record
}

// NewLively makes it in an empty store: the first of a process by use cases, hundreds of them, the others as
// copies of the first's records.
func NewLively(t testing.TB, s alloc.Store) *Lively {
	t.Helper()
	firstLively.mu.Lock()
	defer firstLively.mu.Unlock()
	first := &firstLively
	if !first.made {
		l := makeLively(t, s)
		first.made, first.a, first.b = true, *l.A, *l.B
		first.now, first.ids = l.Clock.ns.Load(), l.ids.Load()
		first.records = slices.Collect(maps.Values(reads(everything(t, s))))
		return l
	}
	clock := new(Clock)
	clock.ns.Store(first.now)
	p := poolOver(t, s, clock)
	p.ids.Store(first.ids)
	for some := range slices.Chunk(first.records, 100) {
		put(t, s, some...)
	}
	of := func(a Agent) *Agent {
		a.Pool, a.t = p, t
		return &a
	}
	return &Lively{Pool: p, A: of(first.a), B: of(first.b)}
}

func makeLively(t testing.TB, s alloc.Store) *Lively {
	t.Helper()
	p := NewPool(t, s, alloc.DefaultPolicy())
	l := &Lively{Pool: p, A: p.Agent("a"), B: p.Agent("b")}
	a, b := l.A, l.B
	moved, dumped, way, claimed, copied, over := a.Sandbox(), a.Sandbox(), a.Sandbox(), a.Sandbox(), a.Sandbox(), a.Sandbox()
	move := func(sb *alloc.Sandbox, from, to *Agent) *alloc.Sandbox {
		h := bind(t, to, claim(t, to, transit(t, from, sb), "r"), "r")
		return &h.Sandbox
	}
	for range 20 {
		moved = move(move(moved, a, b), b, a)
	}
	move(moved, a, b)
	must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(dumped)))
	transit(t, a, way)
	claim(t, b, transit(t, a, claimed), "r")
	h := must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(copied)))
	h = must[alloc.Handoff](t)(p.Abort(t.Context(), a.Abort(h, true)))
	clone := b.New()
	clone.Items[0].ParentCheckpoint = h.Checkpoint.Serial
	register(t, p, clone)
	must[*alloc.Sandbox](t)(p.End(t.Context(), a.End(over)))
	for range 2 {
		must[alloc.Ranges](t)(p.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 10}))
	}
	return l
}

// Corruption is a change of Lively's records that no sequence of requests makes.
type Corruption struct {
	Name string
	// Promise is one that it breaks.
	Promise string
	// Mend is the kind of object that is named for it first.
	Mend    alloc.Kind
	Corrupt func(r *alloc.Records)
}

// OneOfEach is the first corruption for each kind of object that is named to be mended: for a slow store.
// What Check finds does not depend on the store, what Mend writes does.
func OneOfEach() (some []Corruption) {
	seen := map[alloc.Kind]bool{}
	for _, c := range Corruptions() {
		if !seen[c.Mend] {
			seen[c.Mend] = true
			some = append(some, c)
		}
	}
	return some
}

func in(r *alloc.Records, state alloc.SandboxState) *alloc.Sandbox {
	for _, s := range r.Sandboxes {
		if s.State == state {
			return s
		}
	}
	panic("no sandbox is " + string(state))
}

func imagesOf(r *alloc.Records, s *alloc.Sandbox) *alloc.Checkpoint {
	for _, c := range r.Checkpoints {
		if c.Serial == s.Checkpoint {
			return c
		}
	}
	panic("sandbox " + s.Serial.String() + " has no checkpoint")
}

// consumed is a checkpoint that its sandbox has left behind.
func consumed(r *alloc.Records) *alloc.Checkpoint {
	for _, c := range r.Checkpoints {
		if c.State == alloc.CheckpointConsumed && in(r, alloc.StateRunning).Checkpoint != c.Serial {
			return c
		}
	}
	panic("nothing was consumed")
}

// Corruptions is what Check must find and Mend must mend.
func Corruptions() []Corruption {
	const (
		sandbox, checkpoint, stint = alloc.KindSandbox, alloc.KindCheckpoint, alloc.KindStint
		host, lane                 = alloc.KindHost, alloc.KindLane
		request, counter           = alloc.KindRequest, alloc.KindCounter
		nowhere                    = alloc.Serial(1<<48 | 9999)
	)
	type records = *alloc.Records
	return []Corruption{
		{"a binding's serial twice", "P1", sandbox, func(r records) { r.Sandboxes[0].Bindings[0].Serial = r.Sandboxes[1].Bindings[0].Serial }},
		{"a binding's serial twice in a sandbox", "P1", sandbox, func(r records) { r.Sandboxes[0].Bindings[0].Serial = r.Sandboxes[0].Bindings[1].Serial }},
		{"a sandbox's serial twice", "P1", sandbox, func(r records) { r.Sandboxes[0].Bindings[0].Serial = r.Sandboxes[1].Serial }},
		{"a checkpoint's serial twice", "P1", checkpoint, func(r records) { r.Sandboxes[0].Bindings[0].Serial = consumed(r).Serial }},
		{"the serial of a checkpoint under way twice", "P1", sandbox, func(r records) {
			in(r, alloc.StateRunning).Bindings[0].Serial = in(r, alloc.StateInTransit).Checkpoint
		}},
		{"a serial of no generation", "P1", sandbox, func(r records) { r.Sandboxes[0].Bindings[0].Serial = 7 }},
		{"ranges of two hosts overlap", "P1", host, func(r records) { r.Hosts[0].Granted = r.Hosts[1].Granted }},
		{"a host can spend what is in use", "P1", host, func(r records) { r.Hosts[0].Granted[0].First = r.Sandboxes[0].Serial }},
		{"a range that is none", "P1", host, func(r records) { r.Hosts[0].Granted[0].Count = 1 << 50 }},
		{"an answer that is none", "P1", request, func(r records) { r.Requests[0].Ranges[0].Count = 0 }},
		{"two requests got the same", "P1", request, func(r records) { r.Requests[0].Ranges = r.Requests[1].Ranges }},
		{"a request got a host's", "P1", host, func(r records) { r.Requests[0].Ranges = r.Hosts[0].Granted }},
		{"a request got what is in use", "P1", request, func(r records) { r.Requests[0].Ranges[0].First = r.Sandboxes[0].Serial - 1 }},
		{"a lane can issue what is in use", "P1", lane, func(r records) { r.Lanes[0].Left[0].First = r.Sandboxes[0].Serial }},
		{"a lane can issue a host's", "P1", lane, func(r records) { r.Lanes[0].Left = r.Hosts[0].Granted }},
		{"a lane can issue what a request got", "P1", lane, func(r records) { r.Lanes[0].Left = r.Requests[0].Ranges }},
		{"a lane's range that is none", "P1", lane, func(r records) { r.Lanes[0].Left[0].Count = 0 }},
		{"the counter went back", "P1", counter, func(r records) { r.Counter.Next -= 5 }},
		{"the counter went far back", "P1", counter, func(r records) { r.Counter.Next = 2 }},
		{"the counter is at 0", "P1", counter, func(r records) { r.Counter.Next = 0 }},
		{"the counter is of another generation", "P1", counter, func(r records) { r.Counter.Generation++ }},
		{"the counter is lost", "P1", counter, func(r records) { r.Counter = nil }},
		{"the pool is in no generation", "P1", counter, func(r records) { r.Pool.Generation = 0 }},
		{"the pool went on alone", "P1", counter, func(r records) { r.Pool.Generation++ }},
		{"a serial of a generation to come", "P1", counter, func(r records) { r.Sandboxes[0].Bindings[0].Serial |= 1 << 49 }},
		{"settled in a generation to come", "P1", counter, func(r records) { r.Pool.Settled++ }},
		{"a host settled in a generation to come", "P1", counter, func(r records) { r.Hosts[0].Settled = 2 }},
		{"a host waived in a generation to come", "P1", counter, func(r records) { r.Hosts[0].Waived = 3 }},
		{"a host settled in a generation far to come", "P1", host, func(r records) { r.Hosts[0].Settled = 32767 }},
		{"registered again in a generation to come", "P1", counter, func(r records) { r.Sandboxes[0].Again = 2 }},
		{"an epoch of a generation far to come", "P1", sandbox, func(r records) {
			s := in(r, alloc.StateRunning)
			s.Epoch = 32767<<48 | 1
			s.Stint().Epoch = s.Epoch
		}},
		{"a serial of a generation far to come", "P1", sandbox, func(r records) { r.Sandboxes[0].Bindings[0].Serial |= 0x7fff << 48 }},
		{"a range of a generation to come", "P1", counter, func(r records) { r.Hosts[0].Granted[0].First |= 1 << 49 }},
		{"the counter went back and a serial is there twice", "P1", counter, func(r records) {
			r.Counter.Next = 20
			r.Sandboxes[0].Bindings[0].Serial = r.Sandboxes[1].Bindings[0].Serial
		}},

		{"no history", "P3", sandbox, func(r records) { r.Sandboxes[0].Stints = nil }},
		{"another owner", "P3", sandbox, func(r records) { in(r, alloc.StateRunning).Owner = "z" }},
		{"the epoch went back", "P3", sandbox, func(r records) { in(r, alloc.StateRunning).Epoch-- }},
		{"the epoch went on alone", "P3", sandbox, func(r records) { in(r, alloc.StateRunning).Epoch++ }},
		{"an owner whose stint is over", "P3", sandbox, func(r records) { in(r, alloc.StateRunning).Stint().To = time.Unix(1, 0).UTC() }},
		{"a stint without an owner", "P3", sandbox, func(r records) { in(r, alloc.StateEnded).Stint().To = time.Time{} }},
		{"a stint that is over by nothing", "P3", sandbox, func(r records) { in(r, alloc.StateEnded).Stint().Over = "" }},
		{"a stint that never ended", "P3", sandbox, func(r records) { in(r, alloc.StateRunning).Stints[3].To = time.Time{} }},
		{"an older stint that never ended", "P3", stint, func(r records) { r.OldStints[2].Stint.To = time.Time{} }},
		{"an older stint that is over by nothing", "P3", stint, func(r records) { r.OldStints[2].Stint.Over = "" }},
		{"two stints of one epoch", "P3", sandbox, func(r records) {
			in(r, alloc.StateRunning).Stints[3].Epoch = in(r, alloc.StateRunning).Stints[2].Epoch
		}},
		{"an older stint of a later epoch", "P3", stint, func(r records) { r.OldStints[0].Stint.Epoch += 30 }},
		{"an older stint of nothing", "P3", sandbox, func(r records) { r.OldStints[0].Sandbox++ }},
		{"claimed by nobody", "P3", sandbox, func(r records) { in(r, alloc.StateClaimed).Claim = nil }},
		{"claimed by another host", "P3", sandbox, func(r records) { in(r, alloc.StateClaimed).Claim.Host = "z" }},
		{"in transit and claimed", "P3", sandbox, func(r records) { in(r, alloc.StateInTransit).Claim = in(r, alloc.StateClaimed).Claim }},
		{"dumped without a checkpoint", "P3", sandbox, func(r records) { in(r, alloc.StateDumped).Checkpoint = 0 }},
		{"a checkpoint of an epoch to come", "P3", sandbox, func(r records) { imagesOf(r, in(r, alloc.StateDumped)).Epoch++ }},

		{"no such checkpoint", "P6", checkpoint, func(r records) { in(r, alloc.StateDumped).Checkpoint = nowhere }},
		{"no such checkpoint of what runs", "P6", checkpoint, func(r records) { in(r, alloc.StateRunning).Checkpoint = nowhere }},
		{"no such sandbox", "P6", sandbox, func(r records) { imagesOf(r, in(r, alloc.StateDumped)).Sandbox = nowhere }},
		{"older images of no sandbox", "P6", checkpoint, func(r records) { consumed(r).Sandbox = nowhere }},
		{"dumped and consumed", "P6", sandbox, func(r records) { imagesOf(r, in(r, alloc.StateDumped)).State = alloc.CheckpointConsumed }},
		{"in transit and void", "P6", sandbox, func(r records) { imagesOf(r, in(r, alloc.StateInTransit)).State = alloc.CheckpointVoid }},
		{"claimed from in transit and a copy", "P6", sandbox, func(r records) { imagesOf(r, in(r, alloc.StateClaimed)).State = alloc.CheckpointCopy }},
		{"runs from open images", "P6", checkpoint, func(r records) { imagesOf(r, in(r, alloc.StateRunning)).State = alloc.CheckpointOpen }},
		{"ran from a copy that is one still", "P6", checkpoint, func(r records) { consumed(r).State = alloc.CheckpointCopy }},
		{"older images that can be claimed", "P6", checkpoint, func(r records) { consumed(r).State = alloc.CheckpointOpen }},
		{"two stints from one checkpoint", "P6", sandbox, func(r records) {
			in(r, alloc.StateRunning).Stints[3].Checkpoint = in(r, alloc.StateRunning).Stints[2].Checkpoint
		}},
		{"two stints from one checkpoint, one long ago", "P6", stint, func(r records) {
			r.OldStints[len(r.OldStints)-1].Stint.Checkpoint = in(r, alloc.StateRunning).Stints[2].Checkpoint
		}},
		{"the sandbox of many stints is lost", "P3", sandbox, func(r records) {
			for i, s := range r.Sandboxes {
				if s.Serial == r.OldStints[0].Sandbox {
					r.Sandboxes = append(r.Sandboxes[:i:i], r.Sandboxes[i+1:]...)
					return
				}
			}
		}},

		{"one namespace in two sandboxes", "P16", sandbox, func(r records) {
			s, held := in(r, alloc.StateDumped), &r.Hosts[0].Granted[0]
			s.Bindings = append(s.Bindings, alloc.Binding{Serial: held.First, Type: alloc.PID})
			held.First, held.Count = held.First+1, held.Count-1
			for _, o := range r.Sandboxes {
				if o != s && o.Owner == s.Owner && o.State == alloc.StateRunning {
					s.Bindings[len(s.Bindings)-1].Kernel = o.Bindings[0].Kernel
				}
			}
		}},
		{"one namespace twice in a sandbox", "P16", sandbox, func(r records) {
			b := in(r, alloc.StateRunning).Bindings
			b[1].Type, b[1].Kernel = b[0].Type, b[0].Kernel
		}},
	}
}
