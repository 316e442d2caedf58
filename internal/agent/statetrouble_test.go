package agent

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/internal/baddisk"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// ownDisk gives the agent's state a small file system of its own: root writes through every permission.
func (h *host) ownDisk() {
	h.t.Helper()
	dir := h.stateDir()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		h.t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=700,size=128k,nr_inodes=64"); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { // before the host's directory is removed: cleanups run from the last to the first
		if err := errors.Join(h.stop(), unix.Unmount(dir, unix.MNT_DETACH)); err != nil {
			h.t.Error(err)
		}
	})
}

// trouble keeps a disk from taking writes.
type trouble struct {
	reason string
	begin  func(dir string) error
	end    func(dir string) error
}

// badDisk gives the agent's state a disk whose fsync can fail.
func (h *host) badDisk() *baddisk.Disk {
	h.t.Helper()
	d := baddisk.New(h.t, h.stateDir())
	h.t.Cleanup(func() { // before it is unmounted
		if err := h.stop(); err != nil {
			h.t.Error(err)
		}
	})
	return d
}

// troubles are those of a disk of ownDisk, and how they end.
var troubles = map[string]trouble{
	"full": {"free space, or inodes, on its disk", func(dir string) error {
		f, err := os.Create(filepath.Join(dir, "ballast"))
		if err != nil {
			return err
		}
		defer f.Close()
		for err == nil {
			_, err = f.Write(make([]byte, 4096))
		}
		if !errors.Is(err, unix.ENOSPC) {
			return err
		}
		return nil
	}, func(dir string) error { return os.Remove(filepath.Join(dir, "ballast")) }},
	"no inodes": {"free space, or inodes, on its disk", func(dir string) error {
		var err error
		for i := 0; err == nil; i++ {
			var f *os.File
			if f, err = os.Create(filepath.Join(dir, fmt.Sprintf("ballast%d", i))); err == nil {
				err = f.Close()
			}
		}
		if !errors.Is(err, unix.ENOSPC) {
			return err
		}
		return nil
	}, func(dir string) error {
		names, err := filepath.Glob(filepath.Join(dir, "ballast*"))
		for _, name := range names {
			err = errors.Join(err, os.Remove(name))
		}
		return err
	}},
	// Only the runs' directory: the lock is open for writing, and a file system with such a file does not
	// become read-only while nothing is wrong with it.
	"read-only": {"have it mounted writable again", func(dir string) error {
		runs := filepath.Join(dir, runsDir)
		return errors.Join(unix.Mount(runs, runs, "", unix.MS_BIND, ""), unix.Mount("", runs, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	}, func(dir string) error { return unix.Unmount(filepath.Join(dir, runsDir), unix.MNT_DETACH) }},
}

// TestDiskTrouble: each durable write of a hand-off meets a disk that takes none. What can be vetoed is,
// with the disk's reason, and what is under way goes back; what has happened is told when the disk takes
// writes again. Nothing of it needs a restart, and the next hand-off goes through.
func TestDiskTrouble(t *testing.T) {
	kinds := maps.Clone(troubles)
	kinds["an fsync fails"] = trouble{reason: "free space, or inodes, on its disk"} // as the device says
	for kind, disk := range kinds {
		for where, c := range map[string]struct {
			// meet goes to the write that fails; hit makes it fail, mended is closed when it does not any more.
			meet  func(h *host, d *dumped, hit func(), want string)
			dump  bool // d is of a container that runs; else its images are in transit
			state alloc.SandboxState
			// images are what the dump's are in the end; "" when there was no checkpoint
			images alloc.CheckpointState
		}{
			"checkpoint": {func(h *host, d *dumped, hit func(), want string) {
				d.passes(criuhook.PreDump, d.tree.pid, d.images)
				hit()
				d.vetoed(criuhook.PostDump, d.tree.pid, d.images, want)
			}, true, alloc.StateRunning, ""},
			"0 of a dump": {func(h *host, d *dumped, hit func(), want string) {
				d.passes(criuhook.PreDump, d.tree.pid, d.images)
				h.pool.before("Open", hit)
				d.vetoed(criuhook.PostDump, d.tree.pid, d.images, want)
			}, true, alloc.StateRunning, alloc.CheckpointVoid},
			"outcome: it runs on": {func(h *host, d *dumped, hit func(), _ string) {
				h.pool.before("Abort", hit)
				d.passes(criuhook.PreDump, d.tree.pid, d.images)
				d.passes(criuhook.PostDump, d.tree.pid, d.images)
			}, true, alloc.StateRunning, alloc.CheckpointCopy},
			"outcome: it is stopped": {func(h *host, d *dumped, hit func(), _ string) {
				h.pool.before("Confirm", hit)
				d.passes(criuhook.PreDump, d.tree.pid, d.images)
				d.passes(criuhook.PostDump, d.tree.pid, d.images)
				d.tree.end()
			}, true, alloc.StateInTransit, alloc.CheckpointOpen},
			"an action out of turn, after 0 of a dump": {func(h *host, d *dumped, hit func(), want string) {
				d.passes(criuhook.PreDump, d.tree.pid, d.images)
				d.passes(criuhook.PostDump, d.tree.pid, d.images)
				hit()
				d.vetoed(criuhook.PreRestore, 0, d.images, want)
				d.tree.end()
			}, true, alloc.StateInTransit, alloc.CheckpointOpen},
			"claim": {func(h *host, d *dumped, hit func(), want string) {
				hit()
				d.vetoed(criuhook.PreRestore, 0, d.images, want)
			}, false, alloc.StateInTransit, alloc.CheckpointOpen},
			"0 of a claim": {func(h *host, d *dumped, hit func(), want string) {
				h.pool.before("Claim", hit)
				d.vetoed(criuhook.PreRestore, 0, d.images, want)
			}, false, alloc.StateInTransit, alloc.CheckpointOpen},
			"root": {func(h *host, d *dumped, hit func(), want string) {
				d.passes(criuhook.PreRestore, 0, d.images)
				pid := d.criu.tree(containerFlags, false)
				hit()
				d.vetoed(criuhook.SetupNamespaces, pid, d.images, want)
				d.kills(pid)
			}, false, alloc.StateInTransit, alloc.CheckpointOpen},
			"tree": {func(h *host, d *dumped, hit func(), want string) {
				d.passes(criuhook.PreRestore, 0, d.images)
				pid := d.criu.tree(containerFlags, false)
				d.passes(criuhook.SetupNamespaces, pid, d.images)
				hit()
				d.vetoed(criuhook.PostRestore, pid, d.images, want)
				d.kills(pid)
			}, false, alloc.StateInTransit, alloc.CheckpointOpen},
			"0 of a restore": {func(h *host, d *dumped, hit func(), want string) {
				d.passes(criuhook.PreRestore, 0, d.images)
				pid := d.criu.tree(containerFlags, false)
				d.passes(criuhook.SetupNamespaces, pid, d.images)
				h.pool.before("Bind", hit)
				d.vetoed(criuhook.PostRestore, pid, d.images, want)
				d.kills(pid)
			}, false, alloc.StateInTransit, alloc.CheckpointOpen},
			"outcome: given back": {func(h *host, d *dumped, hit func(), _ string) {
				h.pool.before("Release", hit)
				d.passes(criuhook.PreRestore, 0, d.images)
			}, false, alloc.StateInTransit, alloc.CheckpointOpen},
		} {
			t.Run(kind+"/"+where, func(t *testing.T) {
				h, disk := idleHost(t), disk
				if disk.begin == nil {
					bad := h.badDisk()
					disk.begin, disk.end = func(string) error { return bad.Fail() }, func(string) error { return bad.Heal() }
				} else {
					h.ownDisk()
				}
				h.start()
				var d *dumped
				if c.dump {
					tree := container(t, containerFlags)
					places := h.serials(tree.pid)
					d = &dumped{tree: tree, sandbox: places[alloc.Mnt].sandbox, before: serialsOf(places), images: writeImages(t, "run", containerTypes...)}
				} else {
					d = h.moved()
					h.settled()
				}
				d.criu = h.criu()
				hit := make(chan struct{})
				c.meet(h, d, func() {
					if err := disk.begin(h.stateDir()); err != nil {
						t.Errorf("make trouble: %v", err)
					}
					close(hit)
				}, disk.reason)
				d.end()
				h.eventually("the disk fails and the run waits for it", func() error {
					select {
					case <-hit:
					default:
						return errors.New("no write has failed")
					}
					if n := len(h.runs.open()); n != 1 {
						return fmt.Errorf("%d runs are open", n)
					}
					return nil
				})
				if err := disk.end(h.stateDir()); err != nil {
					t.Fatal(err)
				}
				h.settled()
				s, cp := h.reaches(d.sandbox, c.state)
				if (s.Checkpoint == 0) != (c.images == "") || cp != nil && cp.State != c.images {
					t.Errorf("the images are %+v, want %q", cp, c.images)
				}
				h.consistent()
				if c.state == alloc.StateRunning {
					next := h.criu()
					d.images = writeImages(t, "next", containerTypes...)
					next.passes(criuhook.PreDump, d.tree.pid, d.images)
					next.passes(criuhook.PostDump, d.tree.pid, d.images)
					d.tree.end()
					h.reaches(d.sandbox, alloc.StateInTransit)
					next.end()
				}
				back, pid := h.restored(d.images)
				back.end()
				h.reaches(d.sandbox, alloc.StateRunning)
				same(t, d.before, serialsOf(h.serials(pid)))
				h.settled()
				h.consistent()
			})
		}
	}
}

// kills ends a tree of its own, as CRIU does after a veto, and reaps it.
func (c *criu) kills(pid int) {
	c.t.Helper()
	kill(pid)
	c.h.eventually("the tree is gone", func() error {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
			return errors.New("it is not reaped")
		}
		return nil
	})
}

// TestJoinOnFullDisk: what the first Hello answered cannot be written. The agent has not joined, says why,
// asks for no further life of its host meanwhile, and joins by itself when there is space.
func TestJoinOnFullDisk(t *testing.T) {
	h := idleHost(t)
	h.ownDisk()
	full := troubles["full"]
	h.pool.before("Hello", func() {
		if err := full.begin(h.stateDir()); err != nil {
			t.Error(err)
		}
	})
	h.startOnly()
	h.eventually("the agent says what is wrong", func() error {
		if why := h.trouble.Load(); why == nil || !strings.Contains(*why, full.reason) {
			return fmt.Errorf("its trouble is %v", why)
		}
		return nil
	})
	if h.isJoined() {
		t.Error("it has joined")
	}
	if err := full.end(h.stateDir()); err != nil {
		t.Fatal(err)
	}
	h.eventually("it joins", func() error {
		if !h.isJoined() {
			return errors.New("it has not")
		}
		return nil
	})
	h.sandbox(container(t, containerFlags).pid)
	if n := h.hellos(); n != 1 {
		t.Errorf("the pool has begun %d lives of the host", n)
	}
	h.consistent()
}

// TestNewLifeOnFullDisk: another life of this host has taken over, and the disk is full. One new life is
// asked for, however long that lasts.
func TestNewLifeOnFullDisk(t *testing.T) {
	h := idleHost(t)
	h.ownDisk()
	h.start()
	tree := container(t, containerFlags)
	before := serialsOf(h.serials(tree.pid))
	full := troubles["full"]
	if err := full.begin(h.stateDir()); err != nil {
		t.Fatal(err)
	}
	if _, _, err := h.pool.Hello(t.Context(), alloc.HelloCommand{Host: "a", BootID: h.bootID(), Nonce: newNonce()}); err != nil {
		t.Fatal(err)
	}
	lives := h.hellos()
	container(t, containerFlags) // has the agent ask for something
	h.eventually("the agent says what is wrong", func() error {
		if why := h.trouble.Load(); why == nil || !strings.Contains(*why, full.reason) {
			return fmt.Errorf("its trouble is %v", why)
		}
		return nil
	})
	for range 3 {
		if err := h.registrar.join(t.Context()); err == nil {
			t.Error("it joins as a life that is not on its disk")
		}
	}
	if err := full.end(h.stateDir()); err != nil {
		t.Fatal(err)
	}
	h.consistent()
	same(t, before, serialsOf(h.serials(tree.pid)))
	if n := h.hellos(); n != lives+1 {
		t.Errorf("the pool has begun %d more lives of the host", n-lives)
	}
}

// hellos counts the lives that the pool has begun of the host.
func (h *host) hellos() uint64 {
	h.t.Helper()
	entries, _, err := h.pool.store.Get(h.t.Context(), alloc.HostKey("a"))
	if err != nil {
		h.t.Fatal(err)
	}
	record, ok := entries[0].Record.(*alloc.Host)
	if !ok {
		return 0
	}
	return uint64(record.Incarnation) & (1<<48 - 1)
}

// TestStartOnTrouble: a directory that takes no writes. Where there is a state already a full disk does not
// keep the agent from serving what needs no write; a read-only one is refused with its reason.
func TestStartOnTrouble(t *testing.T) {
	h := idleHost(t)
	h.ownDisk()
	full := troubles["full"]
	if err := full.begin(h.stateDir()); err != nil {
		t.Fatal(err)
	}
	if _, err := New(h.config(), h.pool); err == nil || !strings.Contains(err.Error(), full.reason) {
		t.Errorf("a new state on a full disk: %v", err)
	}
	if err := full.end(h.stateDir()); err != nil {
		t.Fatal(err)
	}
	h.start()
	tree := container(t, containerFlags)
	before := serialsOf(h.serials(tree.pid))
	h.mustStop()
	if err := full.begin(h.stateDir()); err != nil {
		t.Fatal(err)
	}
	h.start()
	same(t, before, serialsOf(h.serials(tree.pid)))
	h.sandbox(container(t, containerFlags).pid)
	h.mustStop()
	if err := full.end(h.stateDir()); err != nil {
		t.Fatal(err)
	}
	dir := h.stateDir()
	if err := errors.Join(unix.Mount(dir, dir, "", unix.MS_BIND, ""), unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")); err != nil {
		t.Fatal(err)
	}
	_, err := New(h.config(), h.pool)
	if err == nil || !strings.Contains(err.Error(), "read-only file system; have it mounted writable again") {
		t.Errorf("a read-only directory: %v", err)
	}
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	h.start()
	h.consistent()
}

// TestClockSetBack: how old the agent's copy of the pool's records is does not depend on a clock that
// somebody sets.
func TestClockSetBack(t *testing.T) {
	h := newHost(t)
	at := h.registrar.read.Load()
	if at == nil || *at == at.Round(0) {
		t.Fatalf("%v has no monotonic reading", at)
	}
	if h.registrar.age() > time.Minute {
		t.Errorf("%v", h.registrar.age())
	}
}

// TestFsyncFails: the pool is away, and the disk takes writes into its cache and loses them. No serial is given that
// only the cache has: after the machine was cut off, what was given is there, and what was not is numbered anew.
func TestFsyncFails(t *testing.T) {
	h := idleHost(t)
	bad := h.badDisk()
	h.start()
	h.pool.setAway(true)
	h.eventually("the pool is away", func() error {
		if !h.away() {
			return errors.New("it is not")
		}
		return nil
	})
	given := container(t, containerFlags)
	before := serialsOf(h.serials(given.pid))
	if err := bad.Fail(); err != nil {
		t.Fatal(err)
	}
	denied := container(t, containerFlags)
	h.logged("sweep: some namespaces have to wait for the next one")
	for typ, k := range h.namespaces(denied.pid) {
		if p, ok := h.book.find(typ, k); ok && p.sandbox != h.book.ofHost(h.bootID()).Serial {
			t.Errorf("%s has serial %s, which is on no disk", typ, p.binding.Serial)
		}
	}
	h.mustStop()
	if err := bad.Remount(); err != nil {
		t.Fatal(err)
	}
	if err := bad.Heal(); err != nil {
		t.Fatal(err)
	}
	h.startOnly()
	h.serials(denied.pid)
	same(t, before, serialsOf(h.serials(given.pid)))
	after := serialsOf(h.serials(denied.pid))
	for _, typ := range containerTypes {
		if after[typ] == before[typ] {
			t.Errorf("%s: %s was given twice", typ, after[typ])
		}
	}
	h.pool.setAway(false)
	h.eventually("all of it is committed", func() error {
		if n := h.registrar.uncommitted.Load(); n > 0 {
			return fmt.Errorf("%d serials are provisional", n)
		}
		return nil
	})
	same(t, before, serialsOf(h.serials(given.pid)))
	same(t, after, serialsOf(h.serials(denied.pid)))
	h.consistent()
}
