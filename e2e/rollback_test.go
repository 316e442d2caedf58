package e2e

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/internal/testpool"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// rollback is one way to put a pool's etcd back.
type rollback struct {
	name    string
	members int
	// bump: restored with --bump-revision --mark-compacted.
	bump bool
	// times is how often it is put back to the same snapshot.
	times int
	// servers is what becomes of them while etcd is away.
	servers serversMeanwhile
}

type serversMeanwhile string

const (
	running   serversMeanwhile = "servers run"
	restarted serversMeanwhile = "servers restarted"
	// oneFresh: both are gone for good, with all that they had; one comes in their place.
	oneFresh serversMeanwhile = "one fresh server"
)

var rollbacks = []rollback{
	{"plain", 1, false, 1, running},
	{"bumped", 1, true, 1, running},
	{"twice", 1, false, 2, running},
	{"plain, restarted", 1, false, 1, restarted},
	{"bumped, restarted", 3, true, 1, restarted},
	{"twice, restarted", 1, true, 2, restarted},
	{"plain, fresh", 1, false, 1, oneFresh},
	{"bumped, fresh", 1, true, 1, oneFresh},
	{"twice, fresh", 1, false, 2, oneFresh},
}

// rollbackSize is how much the store forgets.
type rollbackSize struct {
	serials   uint64 // answered to callers
	sandboxes int    // registered, and live
}

var (
	wholeRollback = rollbackSize{100_000, 500}
	smallRollback = rollbackSize{10_000, 20}
)

// everyRunRollback selects what every test run has.
const everyRunRollback = `^(bumped|plain, fresh)$`

// TestRollback: an etcd is put back to a snapshot from before serials were answered and sandboxes registered,
// while callers go on asking. No serial is acknowledged twice, no committed namespace gets another, the sandboxes
// come back, and the pool issues again. NSALLOC_ROLLBACK is a regular expression that selects ways by their names,
// with 500 sandboxes; without it, it is a small one.
func TestRollback(t *testing.T) {
	size, selected := smallRollback, everyRunRollback
	if set := os.Getenv("NSALLOC_ROLLBACK"); set != "" {
		size, selected = wholeRollback, set
	}
	ways, err := regexp.Compile(selected)
	if err != nil {
		t.Fatalf("NSALLOC_ROLLBACK: %v", err)
	}
	for _, w := range rollbacks {
		if !ways.MatchString(w.name) {
			continue
		}
		t.Run(strings.ReplaceAll(w.name, ", ", "-"), func(t *testing.T) {
			w.run(t, size)
		})
	}
}

// told is every serial that anybody was told as committed, with who was told.
type told struct {
	mu     sync.Mutex
	ranges []toldRange // guarded by mu
}

type toldRange struct {
	alloc.Range
	who string
	at  time.Time
}

func (l *told) note(who string, rs ...alloc.Range) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range rs {
		l.ranges = append(l.ranges, toldRange{r, who, time.Now()})
	}
}

// first is the first answer after a moment that is of a later generation than g.
func (l *told) first(after time.Time, g alloc.Generation) (found toldRange) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.ranges {
		if r.at.After(after) && r.First.Generation() > g && (found.Count == 0 || r.at.Before(found.at)) {
			found = r
		}
	}
	return found
}

// latest is the latest generation.
func (l *told) latest() (g alloc.Generation) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.ranges {
		g = max(g, r.First.Generation())
	}
	return g
}

// serials is how many there are.
func (l *told) serials() (n uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.ranges {
		n += r.Count
	}
	return n
}

// twice compares all of them, of all generations.
func (l *told) twice() (found []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	sorted := slices.SortedFunc(slices.Values(l.ranges), func(a, b toldRange) int { return cmp.Compare(a.First, b.First) })
	var last toldRange // the one of those before that reaches furthest
	for _, r := range sorted {
		if last.Count > 0 && r.First <= last.Last() {
			found = append(found, fmt.Sprintf("%s was told %s, and %s %s", last.who, last.Range, r.who, r.Range))
		}
		if last.Count == 0 || r.Last() > last.Last() {
			last = r
		}
	}
	return found
}

// TestToldTwice: ranges that overlap are found, in whatever order they were told.
func TestToldTwice(t *testing.T) {
	for _, c := range []struct {
		ranges []alloc.Range
		twice  int
	}{
		{[]alloc.Range{{First: 1, Count: 5}, {First: 6, Count: 1}}, 0},
		{[]alloc.Range{{First: 6, Count: 1}, {First: 1, Count: 5}, {First: 5, Count: 1}}, 1},
		{[]alloc.Range{{First: 1, Count: 100}, {First: 7, Count: 1}, {First: 50, Count: 2}}, 2},
		{[]alloc.Range{{First: 7, Count: 1}, {First: 7, Count: 1}}, 1},
	} {
		var l told
		l.note("somebody", c.ranges...)
		if got := l.twice(); len(got) != c.twice {
			t.Errorf("%v: %q", c.ranges, got)
		}
	}
}

// putBackRun is a way under way.
type putBackRun struct {
	rollback
	*pool
	c     *cluster
	doors [2]*client.Client
	told  told
	seen  map[string]*seenSerials // by host
	alive map[string][]*births    // by host: what was spawned there
	own   map[string]int          // by host: namespaces of the host itself
}

func (w rollback) run(t *testing.T, size rollbackSize) {
	needHosts(t)
	r := &putBackRun{rollback: w, seen: map[string]*seenSerials{}, alive: map[string][]*births{}, own: map[string]int{}}
	hosts := []string{"a", "b"}
	r.pool = startPool(t, testpool.Options{Hosts: hosts, Servers: func(_ context.Context, p *testpool.Pool) ([]string, error) {
		addresses := []string{p.ServerAddr(), net.JoinHostPort(p.Addr().String(), "7001")}
		r.c = clusterOptions{members: w.members, command: p.Command, dial: p.DialContext, listen: func(i int) []string { return addresses[i : i+1] }}.start(t)
		return addresses, nil
	}})
	for i := range r.doors {
		r.doors[i] = r.c.dial(i, "")
	}
	for _, h := range hosts {
		r.seen[h] = newSeen()
	}
	began := time.Now()

	r.committed("the hosts' own are committed")
	for h, seen := range r.seen {
		r.own[h] = len(seen.committed)
	}

	// What the snapshot has: some of it ends before it is restored, and must not come back to life.
	ends := r.spawnEverywhere(hosts, 6)
	r.spawnEverywhere(hosts, 4)
	r.issue(1000)
	r.committed("what was before is committed")
	snapshot := r.c.snapshot()

	// What it has not.
	for _, b := range ends {
		b.end()
	}
	r.spawnEverywhere(hosts, size.sandboxes)
	for r.told.serials() < size.serials+2000 {
		r.issue(5000)
	}
	r.committed("what the snapshot has not is committed")
	live := r.pooled()
	t.Logf("%d serials answered and %d sandboxes registered after the snapshot, %v after the hosts were there; %d namespaces are live",
		r.told.serials()-2000, size.sandboxes, time.Since(began).Round(time.Millisecond), len(live))

	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var busy sync.WaitGroup
	for i, door := range r.doors { // they ask all the while, of servers that have noticed and that have not
		busy.Go(func() { r.ask(ctx, fmt.Sprintf("a caller of server %d", i), door) })
	}
	for n := range w.times {
		before, away := r.told.latest(), time.Now()
		if w.servers == oneFresh {
			before = 1 // it knows no more than the snapshot
		}
		back := r.c.putBack(snapshot, w.bump, r.meanwhile)
		r.back()
		// What servers know of a generation that was taken minutes ago, they take no other by themselves.
		open := r.open(away, before, n > 0 && w.servers != oneFresh)
		t.Logf("put back %d of %d: issues again, in generation %d, %v after etcd was back", n+1, w.times, open.First.Generation(), open.at.Sub(back).Round(10*time.Millisecond))
		r.issue(5000)
		r.within(time.Minute, "what lives is in the pool", func() error { return r.returned(live) })
		t.Logf("all %d namespaces in the pool %v after etcd was back", len(live), time.Since(back).Round(10*time.Millisecond))
		r.committed("all live on, and are committed")
	}
	r.spawnEverywhere(hosts, 4)
	r.committed("what is born afterwards is committed")
	stop()
	busy.Wait()
	r.holds(live)
}

// spawnEverywhere starts n processes in namespaces of their own, on all hosts together, and waits for them.
func (r *putBackRun) spawnEverywhere(hosts []string, n int) (all []*births) {
	r.t.Helper()
	var wait []<-chan struct{}
	for i, h := range hosts {
		b, done := r.spawn(h, n/len(hosts)+min(1, max(0, n%len(hosts)-i)))
		r.alive[h] = append(r.alive[h], b)
		all, wait = append(all, b), append(wait, done)
	}
	for i, done := range wait {
		<-done
		if all[i].err != nil {
			r.t.Fatal(all[i].err)
		}
	}
	return all
}

// issue asks both servers for n serials each, or the one that there is.
func (r *putBackRun) issue(n uint64) {
	r.t.Helper()
	for i, door := range r.doors {
		if r.c.servers[i].cmd == nil {
			continue
		}
		ctx, cancel := context.WithTimeout(r.t.Context(), settledIn)
		got, err := door.Serials(ctx, n)
		cancel()
		if err != nil {
			r.t.Fatalf("server %d: %v", i, err)
		}
		r.told.note(fmt.Sprintf("the test at server %d", i), got...)
	}
}

// ask asks without an end, and minds no refusal.
func (r *putBackRun) ask(ctx context.Context, who string, door *client.Client) {
	for n := uint64(1); ctx.Err() == nil; n = n%300 + 7 {
		once, cancel := context.WithTimeout(ctx, 3*time.Second)
		got, err := door.Serials(once, n)
		cancel()
		if err == nil {
			r.told.note(who, got...)
		}
		select {
		case <-ctx.Done():
		case <-time.After(5 * time.Millisecond): // a load, and not all that the machine can do
		}
	}
}

// committed waits until every namespace that lives has a committed serial, and notes what the agents say.
func (r *putBackRun) committed(what string) {
	r.t.Helper()
	for host, seen := range r.seen {
		live := r.own[host]
		for _, b := range r.alive[host] {
			live += len(b.cmds) * ownTypes
		}
		r.within(time.Minute, what+" on host "+host, func() error {
			provisional, committed, err := seen.look(r.pool, host)
			if err == nil && (provisional > 0 || committed == 0 || live > 0 && committed != live) {
				err = fmt.Errorf("of %d namespaces %d are provisional, %d committed", live, provisional, committed)
			}
			return err
		})
	}
}

// within waits until try succeeds.
func (r *putBackRun) within(limit time.Duration, what string, try func() error) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), limit)
	defer cancel()
	if err := until(ctx, func(context.Context) error { return try() }); err != nil {
		r.t.Fatalf("%s: %v", what, err)
	}
}

// pooled is where a namespace is in the pool.
type pooled struct {
	sandbox, serial alloc.Serial
	host            string
}

// pooled is what the pool has of live namespaces, by host and kernel identity.
func (r *putBackRun) pooled() map[string]pooled {
	r.t.Helper()
	all := map[string]pooled{}
	for s, err := range r.Client().Sandboxes(r.ctx(), client.Filter{States: []alloc.SandboxState{alloc.StateRunning}, Linearizable: true}) {
		if err != nil {
			r.t.Fatal(err)
		}
		for _, b := range s.Bindings {
			if b.Live() {
				all[s.Owner+" "+b.Kernel.Key(b.Type)] = pooled{s.Serial, b.Serial, s.Owner}
			}
		}
	}
	return all
}

// meanwhile is what becomes of the servers while etcd is away.
func (r *putBackRun) meanwhile() {
	if r.servers == running {
		return
	}
	for i, s := range r.c.servers {
		if s.cmd != nil {
			s.kill()
		}
		if r.servers == oneFresh {
			s.cmd = nil
			if err := os.RemoveAll(r.c.dataDir(i)); err != nil {
				r.t.Fatal(err)
			}
		}
	}
}

// back starts the servers that come back.
func (r *putBackRun) back() {
	switch r.servers {
	case restarted:
		r.c.begin(r.c.servers...)
	case oneFresh: // the hosts reach it where both were
		fresh := r.c.servers[0]
		if !slices.Contains(fresh.args, r.c.o.listen(1)[0]) {
			fresh.args = append(fresh.args, "--listen", r.c.o.listen(1)[0])
		}
		r.c.begin(fresh)
	}
}

// open waits until the pool issues in a generation that is later than before, and returns what was told first of
// that since etcd went away. An operator recovers it where servers do not by themselves.
func (r *putBackRun) open(away time.Time, before alloc.Generation, operator bool) (first toldRange) {
	r.t.Helper()
	r.within(time.Minute, "the pool issues again", func() error {
		if first = r.told.first(away, before); first.Count > 0 {
			return nil
		}
		p, _, err := r.doors[0].Pool(r.ctx())
		if err == nil && p.State == alloc.PoolRecovering && operator {
			var out string
			out, err = r.c.try("--server", r.c.address(0), "pool", "recover", "--yes")
			err = cmp.Or(err, errors.New(out))
		}
		return cmp.Or(err, fmt.Errorf("the pool is %+v", p))
	})
	return first
}

// returned compares what lived when the store forgot with what the pool has now.
func (r *putBackRun) returned(live map[string]pooled) error {
	r.t.Helper()
	now := r.pooled()
	var lost, other []string
	for key, was := range live {
		switch is, ok := now[key]; {
		case !ok:
			lost = append(lost, fmt.Sprintf("%s had serial %s in sandbox %s, and the pool has it no more", key, was.serial, was.sandbox))
		case is != was:
			other = append(other, fmt.Sprintf("%s had serial %s in sandbox %s, and has %s in %s", key, was.serial, was.sandbox, is.serial, is.sandbox))
		}
	}
	if n := len(lost) + len(other); n > 0 {
		return fmt.Errorf("of %d namespaces %d are not what they were: %s", len(live), n, strings.Join(slices.Concat(lost, other)[:min(n, 3)], "; "))
	}
	return nil
}

// holds compares what was with what is.
func (r *putBackRun) holds(live map[string]pooled) {
	r.t.Helper()
	for host, seen := range r.seen {
		seen.mu.Lock()
		for kernel, serial := range seen.committed {
			r.told.note("host "+host+" for "+kernel, alloc.Range{First: serial, Count: 1})
		}
		for _, what := range seen.changed {
			r.t.Errorf("host %s: %s", host, what)
		}
		seen.mu.Unlock()
	}
	for _, what := range r.told.twice() {
		r.t.Error(what)
	}
	if err := r.returned(live); err != nil {
		r.t.Error(err)
	}
	now := r.pooled()
	for key := range now { // what ended, ended
		if host, kernel, _ := strings.Cut(key, " "); r.seen[host] != nil {
			if _, ok := r.seen[host].committed[kernel]; !ok {
				r.t.Errorf("%s is live in the pool, and no agent says so", key)
			}
		}
	}
	r.t.Logf("%d serials told; %d namespaces were live, and %d are", r.told.serials(), len(live), len(now))
	r.within(settledIn, "check finds nothing", func() error {
		out, err := r.c.try("--server", r.c.address(0), "check")
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, out)
		}
		return err
	})
}
