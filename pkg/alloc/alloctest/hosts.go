package alloctest

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Calls are the use cases: *alloc.Service and *client.Client have them.
type Calls interface {
	Allocate(ctx context.Context, cmd alloc.AllocateCommand) (alloc.Ranges, error)
	Hello(ctx context.Context, cmd alloc.HelloCommand) (*alloc.Host, *alloc.Pool, error)
	Grant(ctx context.Context, cmd alloc.GrantCommand) (alloc.Ranges, error)
	Register(ctx context.Context, cmd alloc.RegisterCommand) ([]*alloc.Sandbox, alloc.Ranges, error)
	End(ctx context.Context, cmd alloc.EndCommand) (*alloc.Sandbox, error)
	Open(ctx context.Context, cmd alloc.OpenCommand) (alloc.Handoff, error)
	Confirm(ctx context.Context, cmd alloc.ConfirmCommand) (alloc.Handoff, error)
	Abort(ctx context.Context, cmd alloc.AbortCommand) (alloc.Handoff, error)
	Claim(ctx context.Context, cmd alloc.ClaimCommand) (alloc.ClaimAnswer, error)
	Bind(ctx context.Context, cmd alloc.BindCommand) (alloc.Handoff, alloc.Ranges, error)
	Release(ctx context.Context, cmd alloc.ReleaseCommand) (alloc.Handoff, error)
}

// Door is a way into a pool, as one host has it.
type Door struct {
	Calls
	// Look reads a sandbox and its current checkpoint, linearizable, as of one revision.
	Look func(ctx context.Context, s alloc.Serial) (*alloc.Sandbox, *alloc.Checkpoint, error)
}

// ServiceDoor is one without a server in between.
func ServiceDoor(store alloc.Store, now func() time.Time) Door {
	return Door{Calls: alloc.NewService(store, now), Look: func(ctx context.Context, serial alloc.Serial) (*alloc.Sandbox, *alloc.Checkpoint, error) {
		var current alloc.Serial
		for {
			entries, _, err := store.Get(ctx, alloc.SandboxKey(serial), alloc.CheckpointKey(current))
			if err != nil {
				return nil, nil, err
			}
			sb, ok := entries[0].Record.(*alloc.Sandbox)
			if !ok {
				return nil, nil, alloc.ErrSandboxNotFound
			}
			c, _ := entries[1].Record.(*alloc.Checkpoint)
			if sb.Checkpoint == current {
				return sb, c, nil
			}
			current = sb.Checkpoint
		}
	}}
}

// Crowd is hosts that move a few sandboxes about at the same time, each by what it sees and often by
// what it saw before, or heard of another.
type Crowd struct {
	// Doors has two for each host, which it uses in turn: two workers of a host, or two servers.
	Doors  func(host string) [2]Door
	Policy alloc.Policy
	Now    func() time.Time
	// Faults says that answers may be lost.
	Faults bool
	// Moves is how often each of the six workers does something.
	Moves int
	Seed  uint64
}

// sandboxesOfCrowd is how many sandboxes are moved about at the same time.
const sandboxesOfCrowd = 3

// crowd is a Crowd at work.
type crowd struct {
	Crowd
	*History
	requests   atomic.Uint64
	clients    atomic.Int64
	slots      [sandboxesOfCrowd]slot
	namespaces sync.Map // sandbox -> the serial of its namespace
	hosts      []*crowdHost
}

// slot is a sandbox that is moved about, and the next one when it is over.
type slot struct {
	mu     sync.Mutex
	serial alloc.Serial                    // guarded by mu
	ckpts  map[alloc.Serial][]alloc.Serial // guarded by mu: of a sandbox, as far as is known
}

// crowdHost is a host of the crowd.
type crowdHost struct {
	c     *crowd
	name  string
	boot  string
	doors [2]Door
	// spending is held by who spends serials, or begins a new life.
	spending chan struct{}
	ranges   alloc.Ranges // by the holder of spending
	stale    bool         // by the holder of spending: ranges may not be what the pool has
	life     atomic.Uint64
}

// Record lets the crowd loose and gives what it saw.
func (c Crowd) Record(t testing.TB) *History {
	t.Helper()
	w := &crowd{Crowd: c, History: &History{policy: c.Policy, strict: !c.Faults}}
	for i, name := range []string{"a", "b", "c"} {
		w.hosts = append(w.hosts, &crowdHost{c: w, name: name, boot: BootID(100 + i), doors: c.Doors(name), spending: make(chan struct{}, 1), stale: true})
	}
	for i := range w.slots {
		w.slots[i].ckpts = map[alloc.Serial][]alloc.Serial{}
	}
	var wg sync.WaitGroup
	for i, h := range w.hosts {
		for n := range 2 {
			worker := &worker{h: h, id: int(w.clients.Add(1)), Door: h.doors[n], random: rand.New(rand.NewPCG(c.Seed, uint64(2*i+n)))}
			wg.Go(func() {
				for range c.Moves {
					if err := worker.move(t.Context()); err != nil {
						w.wrong(fmt.Sprintf("host %s: %v", h.name, err))
						return
					}
				}
			})
		}
	}
	wg.Wait()
	return w.History
}

func (c *crowd) request() string {
	n := c.requests.Add(1)
	return RequestID(c.Now(), c.Seed%1000<<32|n)
}

// worker is one thread of a host's agent.
type worker struct {
	Door
	h      *crowdHost
	id     int
	random *rand.Rand
	last   map[alloc.Serial]Seen // what it saw of sandboxes, perhaps long ago
}

func (w *worker) one(in int) bool { return w.random.IntN(in) == 0 }

// ask makes a call, again under its request while the outcome is not known, and mostly until it is.
// again is how often it was made.
func (w *worker) ask(ctx context.Context, call func(ctx context.Context) error) (answer Answer, err error) {
	unknown := false
	for range 40 {
		try, cancel := ctx, context.CancelFunc(func() {})
		if w.h.c.Faults && w.one(4) { // it has no patience
			try, cancel = context.WithTimeout(ctx, time.Duration(1+w.random.IntN(15))*time.Millisecond)
		}
		err = call(try)
		cancel()
		switch r := alloc.ReasonOf(err); r {
		case alloc.ReasonUnknownOutcome:
			unknown = true
			w.h.c.unknown.Add(1)
		case alloc.ReasonUnavailable, alloc.ReasonConflict:
		case "", alloc.ReasonMalformed, alloc.ReasonInvalid:
			return AnswerOf(err), err
		default:
			if unknown {
				// The refusal is of what stands there now; it may be the lost one's own effect.
				return "", nil
			}
			return AnswerOf(err), nil
		}
		if w.one(8) || unknown && w.one(4) {
			break // it gives up, as a host that is switched off does
		}
		pause(ctx, time.Duration(1+w.random.IntN(20))*time.Millisecond)
	}
	if unknown {
		return "", nil
	}
	return AnswerOf(err), nil
}

// move does one thing.
func (w *worker) move(ctx context.Context) error {
	switch {
	case w.one(8):
		return w.allocate(ctx)
	case w.h.life.Load() == 0 || w.one(60):
		return w.hello(ctx)
	}
	at := &w.h.c.slots[w.random.IntN(sandboxesOfCrowd)]
	at.mu.Lock()
	serial := at.serial
	at.mu.Unlock()
	if serial == 0 {
		return w.register(ctx, at, 0)
	}
	now := w.last[serial]
	if now.State == "" || !w.one(4) {
		seen, err := w.get(ctx, serial)
		if err != nil || seen == nil || seen.State == "" {
			return err
		}
		now = *seen
	}
	if now.State == "ended" && now.Images != "copy" {
		return w.register(ctx, at, serial) // over for good
	}
	return w.say(ctx, at, serial, now)
}

func (w *worker) remember(s alloc.Serial, seen Seen) {
	if w.last == nil {
		w.last = map[alloc.Serial]Seen{}
	}
	w.last[s] = seen
}

func (w *worker) get(ctx context.Context, serial alloc.Serial) (*Seen, error) {
	var seen *Seen
	began := w.h.c.clock.Add(1)
	answer, err := w.ask(ctx, func(ctx context.Context) error {
		began = w.h.c.clock.Add(1)
		sb, c, err := w.Look(ctx, serial)
		if seen = See(sb, c); errors.Is(err, alloc.ErrSandboxNotFound) {
			return nil
		}
		return err
	})
	if err != nil || answer != Done {
		return nil, err
	}
	w.h.c.move(w.id, began, asked{serial, Command{What: "get"}}, told{Done, seen})
	w.remember(serial, *seen)
	return seen, nil
}

func (w *worker) allocate(ctx context.Context) error {
	cmd := alloc.AllocateCommand{RequestID: w.h.c.request(), Caller: "host/" + w.h.name, Count: 1 + w.random.Uint64N(50)}
	began := w.h.c.clock.Add(1)
	var got alloc.Ranges
	answer, err := w.ask(ctx, func(ctx context.Context) (err error) { got, err = w.Allocate(ctx, cmd); return err })
	if answer == Done && err == nil {
		if got.Count() != cmd.Count {
			return fmt.Errorf("asked for %d serials and got %v", cmd.Count, got)
		}
		for _, r := range got {
			w.h.c.issued(w.id, began, r)
		}
	}
	return err
}

// hold waits for the turn to spend.
func (h *crowdHost) hold(ctx context.Context) (func(), error) {
	select {
	case h.spending <- struct{}{}:
		return func() { <-h.spending }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// hello begins a new life of the host: what an older one still has under way counts no more.
func (w *worker) hello(ctx context.Context) error {
	done, err := w.h.hold(ctx)
	if err != nil {
		return err
	}
	defer done()
	return w.newLife(ctx)
}

// newLife is by the holder of spending.
func (w *worker) newLife(ctx context.Context) error {
	c := w.h.c
	cmd := alloc.HelloCommand{RequestID: c.request(), Host: w.h.name, BootID: w.h.boot}
	cmd.Nonce = "a-life-of-" + w.h.name + "-" + cmd.RequestID
	var host *alloc.Host
	began := c.clock.Add(1)
	answer, err := w.ask(ctx, func(ctx context.Context) (err error) { host, _, err = w.Hello(ctx, cmd); return err })
	if err != nil {
		return err
	}
	in := Command{What: "hello", Host: w.h.name}
	if answer == Done {
		in.Life = int(uint64(host.Incarnation) & alloc.MaxCounter)
		w.h.life.Store(uint64(host.Incarnation))
		w.h.ranges, w.h.stale = host.Granted, false
	}
	w.h.stale = w.h.stale || answer == ""
	if answer == Done || answer == "" {
		w.h.c.move(w.id, began, asked{0, in}, told{answer: answer})
	}
	return nil
}

// outlived has the host begin a new life, where it still is in one that the pool refuses.
func (h *crowdHost) outlived(life int) {
	now := h.life.Load()
	if int(now&alloc.MaxCounter) == life {
		h.life.CompareAndSwap(now, 0)
	}
}

// take is the next n serials of the host, by the holder of spending; false when there are none to be had.
func (w *worker) take(ctx context.Context, n uint64) (alloc.Ranges, bool, error) {
	h := w.h
	for range 3 {
		if spend, _, ok := h.ranges.Take(n); ok && !h.stale {
			return spend, true, nil
		}
		if h.life.Load() == 0 || len(h.ranges) >= alloc.MaxGrantedRanges {
			if err := w.newLife(ctx); err != nil {
				return nil, false, err
			}
		}
		cmd := alloc.GrantCommand{Mutation: w.mutation(), Count: 50}
		var got alloc.Ranges
		began := h.c.clock.Add(1)
		answer, err := w.ask(ctx, func(ctx context.Context) (err error) { got, err = w.Grant(ctx, cmd); return err })
		switch {
		case err != nil:
			return nil, false, err
		case answer == Done && len(got) > 0:
			h.ranges, h.stale = got, false
			h.c.issued(w.id, began, got[len(got)-1])
		case answer == Answer(alloc.ReasonExhausted), answer == Answer(alloc.ReasonStaleIncarnation):
			h.life.Store(0)
		}
	}
	return nil, false, nil
}

func (w *worker) mutation() alloc.Mutation {
	return alloc.Mutation{RequestID: w.h.c.request(), Host: w.h.name, Incarnation: alloc.Incarnation(w.h.life.Load())}
}

// kernel is the namespace that a run makes for a serial: the same whoever asks.
func (h *crowdHost) kernel(run string, of alloc.Serial) alloc.KernelID {
	hash := fnv.New64a()
	_, _ = fmt.Fprint(hash, h.name, run, of)
	id := hash.Sum64()>>1 | 1
	return alloc.KernelID{BootID: h.boot, ID: id, Inode: 4026532000 + id%1e6}
}
