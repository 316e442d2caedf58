package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/internal/testhost"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// disk is a small file system in memory.
type disk struct {
	t    *testing.T
	path string
}

const fillName = "somebody-elses"

// newDisk mounts one; it goes with the test.
func newDisk(t *testing.T, size string) *disk {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounts a file system")
	}
	d := &disk{t: t, path: t.TempDir()}
	if err := unix.Mount("tmpfs", d.path, "tmpfs", unix.MS_NOSUID, "mode=0700,size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(d.path, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return d
}

// fill leaves no byte.
func (d *disk) fill() {
	d.t.Helper()
	f, err := os.OpenFile(filepath.Join(d.path, fillName), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	for size := 1 << 20; size > 0; { // at the end what a page and less takes
		if _, err = f.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
	if !errors.Is(err, unix.ENOSPC) {
		d.t.Fatalf("the disk is not full: %v", err)
	}
}

// free makes room.
func (d *disk) free() {
	d.t.Helper()
	if err := os.Remove(filepath.Join(d.path, fillName)); err != nil {
		d.t.Fatal(err)
	}
}

// trial is callers of a cluster in trouble: all that they are told is kept.
type trial struct {
	*cluster
	doors [2]*client.Client
	told  told
}

func newTrial(c *cluster) *trial {
	return &trial{cluster: c, doors: [2]*client.Client{c.dial(0, ""), c.dial(1, "")}}
}

// ask asks a server once, for at most limit.
func (r *trial) ask(i int, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(r.t.Context(), limit)
	defer cancel()
	got, err := r.doors[i].Allocate(ctx, alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 100})
	r.told.note(r.servers[i].name, got...)
	return err
}

// healed waits until both servers answer, as long as P14 says, and proves that nothing was given twice or lost.
func (r *trial) healed(why string) {
	r.t.Helper()
	began := time.Now()
	for i := range r.doors {
		ctx, cancel := context.WithTimeout(r.t.Context(), healing)
		err := until(ctx, func(context.Context) error { return r.ask(i, time.Second) })
		cancel()
		if err != nil {
			r.t.Fatalf("server %d, %s: %v", i, why, err)
		}
	}
	r.t.Logf("both servers answer %v after %s; %d serials told", time.Since(began).Round(time.Millisecond), why, r.told.serials())
	for _, what := range r.told.twice() {
		r.t.Error(what)
	}
	r.run("--server", r.address(0), "check")
}

// says fails the test unless an error is of a reason and names each of words.
func says(t *testing.T, err error, reason alloc.Reason, words ...string) {
	t.Helper()
	if alloc.ReasonOf(err) != reason {
		t.Errorf("it is %v, not %s", err, reason)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("it says nothing of %q: %v", w, err)
		}
	}
}

// TestEtcdQuota: etcd's database reaches its quota. Whoever asks is refused at once and is told what to do; and when
// an operator has done it, all goes on, with nothing given twice.
func TestEtcdQuota(t *testing.T) {
	if testing.Short() {
		t.Skip("fills an etcd")
	}
	t.Parallel()
	r := newTrial(clusterOptions{members: 3, etcdArgs: []string{"--quota-backend-bytes", "16777216"}}.start(t))
	for i := range r.doors {
		if err := r.ask(i, settledIn); err != nil {
			t.Fatal(err)
		}
	}
	etcd, err := r.client(r.endpoints...)
	if err != nil {
		t.Fatal(err)
	}
	defer etcd.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for full := false; !full; {
		_, err := etcd.Put(ctx, "somebody-elses", strings.Repeat("x", 1<<20))
		if full = err != nil && strings.Contains(err.Error(), "database space exceeded"); err != nil && !full {
			t.Fatal(err)
		}
	}
	for i := range r.doors {
		for n := range 3 {
			began := time.Now()
			err := r.ask(i, settledIn)
			says(t, err, alloc.ReasonUnavailable, "full", "NOSPACE", "nothing was written", "compact", "defragment", "disarm")
			if took := time.Since(began); n > 0 && took > 2*time.Second {
				t.Errorf("server %d refused after %v", i, took)
			}
		}
	}
	if out, err := r.try("--server", r.address(0), "pool", "status"); err != nil {
		t.Errorf("reads do not go on: %v\n%s", err, out)
	}
	now, err := etcd.Get(ctx, "somebody-elses")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := etcd.Compact(ctx, now.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	for _, e := range r.endpoints {
		if _, err := etcd.Defragment(ctx, e); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := etcd.AlarmDisarm(ctx, &clientv3.AlarmMember{}); err != nil {
		t.Fatal(err)
	}
	r.healed("the alarm was disarmed")
}

// TestEtcdDiskFull: the file system of etcd's data is full, and etcd ends. Whoever asks is told where to look, and
// when there is room and etcd runs again, all goes on, with nothing given twice.
func TestEtcdDiskFull(t *testing.T) {
	if testing.Short() {
		t.Skip("fills a disk")
	}
	t.Parallel()
	d := newDisk(t, "160m")
	r := newTrial(clusterOptions{members: 1, data: filepath.Join(d.path, "etcd")}.start(t))
	for i := range r.doors {
		if err := r.ask(i, settledIn); err != nil {
			t.Fatal(err)
		}
	}
	d.fill()
	member := r.members[0]
	ended := make(chan struct{})
	go func() { _ = member.cmd.Wait(); close(ended) }()
	etcd, err := r.client(r.endpoints...)
	if err != nil {
		t.Fatal(err)
	}
	defer etcd.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for over := false; !over; { // what is written until there is no page left for it
		_, _ = etcd.Put(ctx, "somebody-elses", strings.Repeat("x", 1<<20))
		_ = r.ask(0, 100*time.Millisecond)
		select {
		case <-ended:
			over = true
		case <-ctx.Done():
			t.Fatal("etcd goes on")
		default:
		}
	}
	if !strings.Contains(member.log.String(), "no space left on device") {
		t.Errorf("etcd ended otherwise: %s", member.log)
	}
	var asking sync.WaitGroup
	for i := range r.doors {
		asking.Go(func() {
			began := time.Now()
			err := r.ask(i, settledIn)
			says(t, err, alloc.ReasonUnavailable, "etcd runs", "disk", "log")
			t.Logf("server %d refused after %v", i, time.Since(began).Round(time.Millisecond))
		})
	}
	asking.Wait()
	d.free()
	r.begin(member)
	r.healed("etcd was started on a disk with room")
}

// TestOwnEtcdDiskFull: the same of a server that keeps an etcd of its own: it ends, says why, and goes on when it is
// started on a disk with room.
func TestOwnEtcdDiskFull(t *testing.T) {
	if testing.Short() {
		t.Skip("fills a disk")
	}
	t.Parallel()
	d := newDisk(t, "160m")
	dir := t.TempDir()
	c := &cluster{t: t, dir: dir}
	s := &program{name: "s0", log: new(safeLog), command: onMachine, args: []string{filepath.Join(binaries, "nsalloc-server"), "--listen", c.address(0), "--data-dir", d.path}}
	s.alive = c.serves(c.address(0))
	c.o.command, c.servers = onMachine, []*program{s}
	t.Cleanup(c.close)
	c.begin(s)
	r := &trial{cluster: c, doors: [2]*client.Client{c.dial(0, ""), c.dial(0, "")}}
	if err := r.ask(0, settledIn); err != nil {
		t.Fatal(err)
	}
	d.fill()
	ended := make(chan error, 1)
	go func() { ended <- s.cmd.Wait() }()
	deadline := time.After(time.Minute)
	for over := false; !over; {
		_ = r.ask(0, 100*time.Millisecond)
		select {
		case err := <-ended:
			over = true
			if err == nil {
				t.Error("it ends as if it had been told to")
			}
		case <-deadline:
			t.Fatal("it goes on")
		default:
		}
	}
	if !strings.Contains(s.log.String(), "no space left on device") {
		t.Errorf("it says\n%s", s.log)
	}
	d.free()
	c.begin(s)
	c.servers = append(c.servers, s) // for the second door
	r.healed("it was started on a disk with room")
	c.servers = c.servers[:1]
}

// TestWitnessDiskFull: the disk of a server's data directory is full. A new server does not begin there; one that has
// its witness goes on where the file system writes in place, and where it does not, it refuses, until there is room.
func TestWitnessDiskFull(t *testing.T) {
	if testing.Short() {
		t.Skip("fills a disk")
	}
	t.Parallel()
	d := newDisk(t, "1m")
	r := newTrial(newCluster(t, 1))
	s := r.servers[0]
	s.kill()
	r.remove(1, 0)                                                          // what comes in its place has another directory
	s.args = append(s.args[:len(s.args):len(s.args)], "--data-dir", d.path) // the last one holds
	d.fill()
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Wait(); err == nil {
		t.Error("a server begins without a witness")
	}
	for _, want := range []string{"no space left on device", d.path, "make room"} {
		if !strings.Contains(s.log.String(), want) {
			t.Errorf("it says nothing of %q:\n%s", want, s.log)
		}
	}
	d.free()
	r.begin(s)
	if err := r.ask(0, settledIn); err != nil {
		t.Fatal(err)
	}
	d.fill()
	for range 10 {
		if err := r.ask(0, settledIn); err != nil {
			t.Errorf("it writes where it has written before: %v", err)
		}
	}

	// As on a file system that writes elsewhere: no page of the file is left.
	file, err := os.OpenFile(filepath.Join(d.path, "witness", "witness"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	size, err := file.Seek(0, io.SeekEnd)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Fallocate(int(file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, size); err != nil {
		t.Fatal(err)
	}
	d.fill()
	began := time.Now()
	_ = r.ask(0, settledIn) // was committed, and then could not be written down: its outcome is unknown
	says(t, r.ask(0, settledIn), alloc.ReasonUnavailable, "witness", "no space left on device", d.path, "nothing was written", "make room")
	t.Logf("two were refused within %v", time.Since(began).Round(time.Millisecond))
	d.free()
	r.healed("there was room")
}

// TestAgentDiskFull: the disk of an agent's state is full. What lives keeps its serials, what is born gets its own
// while the pool is there, a dump is refused and says why, a restart changes nothing of it; and when there is room, all
// goes on without one.
func TestAgentDiskFull(t *testing.T) {
	p := newPool(t, "a")
	h := p.Host("a")
	if err := p.KillAgent("a"); err != nil {
		t.Fatal(err)
	}
	script := "cp -a " + agentState + " /run/state && mount -t tmpfs -o size=1m,mode=0700 tmpfs " + agentState + " && cp -a /run/state/. " + agentState
	if out, err := h.Command(p.ctx(), "sh", "-c", script).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := p.StartAgent(p.ctx(), "a"); err != nil {
		t.Fatal(err)
	}
	d := &disk{t, h.Path(agentState)}
	c := p.container("full", "a", testhost.BundleOptions{})
	before := c.identify("a", c.id)
	seen := newSeen()
	committed := func(what string) {
		t.Helper()
		p.eventually(what, func() error {
			provisional, committed, err := seen.look(p, "a")
			if err == nil && (provisional > 0 || committed == 0) {
				err = fmt.Errorf("%d are provisional, %d committed", provisional, committed)
			}
			return err
		})
	}
	doctor := func() string {
		out, _ := h.Command(p.ctx(), "nsalloc", "doctor").CombinedOutput() // it fails when it finds something
		return string(out)
	}
	refused := func(when string) {
		t.Helper()
		err := c.dump("a")
		if err == nil {
			t.Fatalf("%s: a dump goes through that is written down nowhere", when)
		}
		log, readErr := os.ReadFile(h.Path(c.images + "-dump/dump.log"))
		if said := err.Error() + string(log); !strings.Contains(said, "no space left on device") {
			t.Errorf("%s: the dump says nothing of the disk: %v, %v\n%s", when, err, readErr, log)
		}
		if got := c.identify("a", c.id); !maps.Equal(got, before) {
			t.Errorf("%s: it was %v and is %v", when, before, got)
		}
	}
	committed("what lives is committed")

	d.fill()
	refused("the disk is full")
	if said := doctor(); !strings.Contains(said, "no space left on device") && !strings.Contains(said, "is full") {
		t.Errorf("doctor says\n%s", said)
	}
	born, done := p.spawn("a", 3)
	if <-done; born.err != nil {
		t.Fatal(born.err)
	}
	p.eventually("what is born has serials", func() error {
		_, n, err := seen.look(p, "a")
		if err == nil && n < 3*ownTypes {
			err = fmt.Errorf("%d have", n)
		}
		return err
	})
	committed("what is born is committed")
	if err := errors.Join(p.KillAgent("a"), p.StartAgent(p.ctx(), "a")); err != nil {
		t.Fatal(err)
	}
	committed("all is as it was after a restart")
	refused("after a restart")
	d.free()
	p.eventually("doctor finds the disk in order", func() error {
		if said := doctor(); strings.Contains(said, "no space left") || strings.Contains(said, "is full") {
			return errors.New(said)
		}
		return nil
	})
	if err := c.dump("a"); err != nil {
		t.Errorf("there is room again: %v", err)
	}
	for _, what := range seen.changed {
		t.Error(what)
	}
	p.check()
}
