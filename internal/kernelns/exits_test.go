//go:build linux

package kernelns

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func newExits(t *testing.T) *Exits[int] {
	t.Helper()
	x, err := NewExits[int]()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { x.Close() })
	return x
}

func add(t *testing.T, x *Exits[int], label int, c *exec.Cmd) WatchID {
	t.Helper()
	fd, err := unix.PidfdOpen(c.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd) // Exits has its own
	id, err := x.Add(label, fd)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func labels(exits []Exit[int]) []int {
	var l []int
	for _, e := range exits {
		l = append(l, e.Label)
	}
	return l
}

// TestExitsOrder holds the promise of Exits against the running kernel: processes are killed in a random
// order, each seen dead before the next is killed, some reaped at once and some not, and nobody waits
// until all is over. A few are over before they are added: they come in the order of the adding.
func TestExitsOrder(t *testing.T) {
	rounds := 300
	if testing.Short() {
		rounds = 30
	}
	const n, late = 6, 2
	for round := range rounds {
		x := newExits(t)
		var procs []*exec.Cmd
		for label := range n + late {
			procs = append(procs, spawnCat(t, 0))
			if label < n {
				add(t, x, label, procs[label])
			}
		}
		// The late ones die first and are added in the middle, in reverse.
		for label := n; label < n+late; label++ {
			kill(t, procs[label])
		}
		want := rand.Perm(n)
		for _, label := range want[:n/2] {
			kill(t, procs[label])
			if rand.IntN(2) == 0 {
				end(procs[label])
			}
		}
		var middle []int
		for label := n + late - 1; label >= n; label-- {
			add(t, x, label, procs[label])
			middle = append(middle, label)
		}
		for _, label := range want[n/2:] {
			kill(t, procs[label])
			if rand.IntN(2) == 0 {
				end(procs[label])
			}
		}
		want = slices.Insert(want, n/2, middle...)
		for _, c := range procs {
			end(c) // reaping wakes the waiters again; it must not change the order
		}
		got, err := x.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(labels(got), want) {
			t.Fatalf("round %d: reported %v, died %v", round, labels(got), want)
		}
		for _, e := range got {
			if e.AtAdd != (e.Label >= n) {
				t.Fatalf("round %d: %+v", round, e)
			}
		}
		if err := x.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestExitsMany has more exits than one epoll_wait returns.
func TestExitsMany(t *testing.T) {
	const n = 300
	x := newExits(t)
	var procs []*exec.Cmd
	for label := range n {
		procs = append(procs, spawnCat(t, 0))
		add(t, x, label, procs[label])
	}
	want := rand.Perm(n)
	for _, label := range want {
		kill(t, procs[label])
	}
	got, err := x.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(labels(got), want) {
		t.Errorf("reported %v, died %v", labels(got), want)
	}
}

// TestExitsWaiting is the same with a waiter that is woken all the time.
func TestExitsWaiting(t *testing.T) {
	const n = 200
	x := newExits(t)
	var procs []*exec.Cmd
	for label := range n {
		procs = append(procs, spawnCat(t, 0))
		add(t, x, label, procs[label])
	}
	want := rand.Perm(n)
	got := make(chan []int)
	go func() {
		var all []int
		for len(all) < n {
			exits, err := x.Next(context.Background())
			if err != nil {
				t.Error(err)
				break
			}
			all = append(all, labels(exits)...)
		}
		got <- all
	}()
	for _, label := range want {
		kill(t, procs[label])
	}
	if all := <-got; !slices.Equal(all, want) {
		t.Errorf("reported %v, died %v", all, want)
	}
}

// TestExitsLeader: a leader's end is not its process's, and must not give it an earlier place.
func TestExitsLeader(t *testing.T) {
	needRoot(t)
	needKernel(t, 6, 15, "correct notice of a leader's early end")
	k := openKernel(t)
	for range 10 {
		x := newExits(t)
		out, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		c := command(t, "/proc/self/exe", 0)
		c.Env = append(os.Environ(), roleVar+"=leaderless")
		c.Stdout = w
		spawn(t, c)
		w.Close()
		add(t, x, 0, c) // before the leader is known to have ended
		if _, err := out.Read(make([]byte, 16)); err != nil {
			t.Fatal(err)
		}
		out.Close()
		eventually(t, "the leader ends", func() bool {
			p, err := k.Process(c.Process.Pid)
			if err != nil {
				t.Fatal(err)
			}
			return p.State == 'Z'
		})
		other := spawnCat(t, 0)
		add(t, x, 1, other)
		kill(t, other)
		kill(t, c)
		got, err := x.Next(t.Context())
		if err != nil || !slices.Equal(labels(got), []int{1, 0}) {
			t.Fatalf("reported %v, %v, died [1 0]", labels(got), err)
		}
	}
}

func TestExitsNext(t *testing.T) {
	x := newExits(t)
	a, b, c := spawnCat(t, 0), spawnCat(t, 0), spawnCat(t, 0)
	add(t, x, 0, a)
	removed := add(t, x, 1, b)
	add(t, x, 2, c)
	add(t, x, 3, c) // twice

	for range 20 {
		ctx, cancel := context.WithCancelCause(t.Context())
		why := errors.New("why")
		go cancel(why)
		if got, err := x.Next(ctx); !errors.Is(err, why) {
			t.Fatalf("cancelled: %v, %v", got, err)
		}
	}

	if !x.Remove(removed) || x.Remove(removed) {
		t.Error("Remove does not say what it did")
	}
	kill(t, b)
	kill(t, c)
	if got, err := x.Next(t.Context()); err != nil || !slices.Equal(labels(got), []int{2, 3}) && !slices.Equal(labels(got), []int{3, 2}) {
		t.Errorf("reported %v, %v, want 2 and 3", labels(got), err)
	}
	end(c) // must not be reported again
	kill(t, a)
	if got, err := x.Next(t.Context()); err != nil || !slices.Equal(labels(got), []int{0}) {
		t.Errorf("reported %v, %v, want 0", labels(got), err)
	}

	closed := make(chan error)
	go func() {
		_, err := x.Next(context.Background())
		closed <- err
	}()
	if err := x.Close(); err != nil {
		t.Error(err)
	}
	if err := <-closed; !errors.Is(err, os.ErrClosed) {
		t.Errorf("Next of a closed set: %v", err)
	}
	if _, err := x.Add(4, int(pidfd(t, os.Getpid()).Fd())); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Add to a closed set: %v", err)
	}
}
