package e2e

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// healing is how long callers may wait for their next answer when nothing is killed any more (P14).
const healing = 10 * time.Second

// load is callers that ask for one serial each, wait for it, and ask for the next.
type load struct {
	got    [][]alloc.Serial // by caller
	rounds []atomic.Int64   // answers by caller
}

// run asks until ctx ends. Whoever is refused asks again: nothing that passes is an error.
func (l *load) run(ctx context.Context, t testing.TB, caller int, c *client.Client) {
	for ctx.Err() == nil {
		got, err := c.Serials(ctx, 1)
		switch {
		case err == nil:
			l.got[caller] = append(l.got[caller], got[0].First)
			l.rounds[caller].Add(1)
		case ctx.Err() == nil:
			t.Errorf("caller %d: %v", caller, err)
			return
		}
	}
}

func (l *load) answers() (n int64) {
	for i := range l.rounds {
		n += l.rounds[i].Load()
	}
	return n
}

// rate is answers a second, over a while.
func (l *load) rate(over time.Duration) float64 {
	before, began := l.answers(), time.Now()
	time.Sleep(over) // a measurement, nothing is waited for
	return float64(l.answers()-before) / time.Since(began).Seconds()
}

// asks is requests under ids that the callers keep: whatever was unknown is found when it is asked again, at
// either server.
type asks struct {
	mu      sync.Mutex
	answers map[string]alloc.Ranges // guarded by mu
	unknown map[string]bool         // guarded by mu: an answer of it was lost
}

func (a *asks) note(id string, got alloc.Ranges) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if got == nil {
		a.unknown[id] = true
		return
	}
	a.answers[id] = got
}

func (a *asks) run(ctx context.Context, t testing.TB, seed uint64, doors [2]*client.Client) {
	random := rand.New(rand.NewPCG(seed, 1))
	for ctx.Err() == nil {
		id, count := client.NewRequestID(), 1+random.Uint64N(20)
		var got alloc.Ranges
		n := 0
		err := client.RetryID(t.Context(), id, func(id string) (err error) {
			got, err = doors[(int(seed)+n)%2].Allocate(t.Context(), alloc.AllocateCommand{RequestID: id, Count: count})
			n++
			if errors.Is(err, alloc.ErrUnknownOutcome) {
				a.note(id, nil)
			}
			return err
		})
		if err != nil || got.Count() != count {
			t.Errorf("request %s for %d: %v, %v", id, count, got, err)
			return
		}
		a.note(id, got)
	}
}

// TestServersAndMembersKilled: 1,000 callers, callers who keep their request ids, and hosts that move
// sandboxes about, while servers and members of etcd are killed at random. No serial is acknowledged twice,
// what was unknown is found, some order of single steps explains the moves, and ten seconds after the last
// kill everybody is answered again. NSALLOC_FAULTS is how long the killing lasts, 10s when it is not set.
func TestServersAndMembersKilled(t *testing.T) {
	if testing.Short() {
		t.Skip("kills processes for seconds")
	}
	last := 10 * time.Second
	if s := os.Getenv("NSALLOC_FAULTS"); s != "" {
		var err error
		if last, err = time.ParseDuration(s); err != nil {
			t.Fatalf("NSALLOC_FAULTS: %v", err)
		}
	}
	c := newCluster(t, 3)
	doors := [2]*client.Client{c.dial(0, ""), c.dial(1, "")}
	ctx, end := context.WithCancel(t.Context())
	defer end()
	const callers = 1000
	l := &load{got: make([][]alloc.Serial, callers), rounds: make([]atomic.Int64, callers)}
	a := &asks{answers: map[string]alloc.Ranges{}, unknown: map[string]bool{}}
	var busy sync.WaitGroup
	for i := range callers {
		busy.Go(func() { l.run(ctx, t, i, doors[i%2]) })
	}
	for i := range uint64(8) {
		busy.Go(func() { a.run(ctx, t, i, doors) })
	}
	l.rate(time.Second) // warm
	calm := l.rate(2 * time.Second)

	clients := map[string][2]*client.Client{}
	for _, host := range []string{"a", "b", "c"} {
		clients[host] = [2]*client.Client{c.dial(0, host), c.dial(1, host)}
	}
	moved := make(chan *alloctest.History, 1)
	go func() {
		moved <- alloctest.Crowd{
			Doors: func(host string) (two [2]alloctest.Door) {
				for i, s := range clients[host] {
					two[i] = alloctest.Door{Calls: s, Look: func(ctx context.Context, serial alloc.Serial) (*alloc.Sandbox, *alloc.Checkpoint, error) {
						found, err := s.Sandbox(ctx, serial, true)
						return found.Sandbox, found.Checkpoint, err
					}}
				}
				return two
			},
			Policy: alloc.DefaultPolicy(), Now: time.Now, Faults: true, Moves: 4 * int(last.Seconds()), Seed: 1,
		}.Record(t)
	}()
	killed := c.trouble(last)

	// Nothing is killed any more: everybody gets an answer.
	before := make([]int64, callers)
	for i := range before {
		before[i] = l.rounds[i].Load()
	}
	healed := time.Now()
	waiting := func() (n int) {
		for i := range before {
			if l.rounds[i].Load() == before[i] {
				n++
			}
		}
		return n
	}
	for waiting() > 0 {
		if time.Since(healed) > healing {
			t.Errorf("%d of %d callers have no answer %s after the last kill", waiting(), callers, healing)
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	took := time.Since(healed)
	again := l.rate(2 * time.Second)
	h := <-moved
	end()
	busy.Wait()
	h.Check(t)

	all := slices.Concat(l.got...)
	issued, asked := len(all), 0
	for id, ranges := range a.answers {
		for s := range ranges.All() {
			all = append(all, s)
		}
		if asked++; asked > 500 && !a.unknown[id] {
			continue
		}
		for i, s := range doors { // found at both, from the store
			if got, err := s.Allocate(t.Context(), alloc.AllocateCommand{RequestID: id, Count: ranges.Count()}); err != nil || !slices.Equal(got, ranges) {
				t.Errorf("request %s was answered %v, and server %d says %v, %v", id, ranges, i, got, err)
			}
		}
	}
	slices.Sort(all)
	for i := 1; i < len(all); i++ {
		if all[i] == all[i-1] {
			t.Errorf("serial %s was acknowledged twice", all[i])
		}
	}
	if out, err := exec.CommandContext(t.Context(), filepath.Join(binaries, "nsalloc"), "--server", c.address(0), "check").CombinedOutput(); err != nil {
		t.Errorf("check: %v\n%s", err, out)
	}
	t.Logf("killed %v; %d serials to callers, %d requests kept, %d of them unknown at first, %d of the moves'",
		killed, issued, len(a.answers), len(a.unknown), h.Lost())
	t.Logf("everybody was answered %s after the last kill; %.0f serials/s before, %.0f/s after: %.2f", took.Round(time.Millisecond), calm, again, again/calm)
	if h.Lost() == 0 && len(a.unknown) == 0 {
		t.Error("no answer was lost: the faults hit nothing")
	}
}

// trouble kills a server or a member every second or so, and starts it again a moment later; of the members
// one at a time, so that there is a quorum or soon will be. It returns, by name, how often each was killed,
// when all are started again.
func (c *cluster) trouble(last time.Duration) map[string]int {
	c.t.Helper()
	random := rand.New(rand.NewPCG(7, uint64(time.Now().UnixNano())))
	killed := map[string]int{}
	all := append(slices.Clone(c.servers), c.members...)
	for ends := time.Now().Add(last); time.Now().Before(ends); {
		victims := []*program{all[random.IntN(len(all))]}
		if random.IntN(4) == 0 { // both servers, or a server and a member
			victims = append(victims, c.servers[random.IntN(len(c.servers))])
		}
		for i, v := range victims {
			if i == 0 || v != victims[0] {
				v.kill()
				killed[v.name]++
			}
		}
		time.Sleep(time.Duration(200+random.IntN(600)) * time.Millisecond) // the outage
		for i, v := range victims {
			if i == 0 || v != victims[0] {
				if err := v.start(); err != nil {
					c.t.Fatal(err)
				}
			}
		}
		time.Sleep(time.Duration(200+random.IntN(800)) * time.Millisecond) // the pause between two
	}
	return killed
}
