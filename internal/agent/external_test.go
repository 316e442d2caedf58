package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// madeNet makes a network namespace that no task lives in, as CNI does; it lives until the test is over.
func madeNet(t *testing.T) (path string) {
	t.Helper()
	done := make(chan error)
	var f *os.File
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			f, err = os.Open("/proc/thread-self/ns/net")
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())
}

const withoutNet = containerFlags &^ unix.CLONE_NEWNET

// handedIn is a container, in a network namespace that was made before, whose dump has passed.
func (h *host) handedIn(net string) *dumped {
	h.t.Helper()
	tree := withNet(h.t, net, withoutNet)
	places := h.serials(tree.pid)
	d := &dumped{
		criu: h.criu(), tree: tree, sandbox: places[alloc.Mnt].sandbox, before: serialsOf(places),
		images: external(h.t, writeImages(h.t, "run-"+places[alloc.Mnt].sandbox.String(), containerTypes...), alloc.Net),
	}
	d.passes(criuhook.PreDump, tree.pid, d.images)
	d.passes(criuhook.PostDump, tree.pid, d.images)
	return d
}

// TestHandedIn: a namespace that CRIU joins instead of restoring it stays on its host under its serial, and
// has nothing to do with the container any more.
func TestHandedIn(t *testing.T) {
	h := newHost(t)
	here, there := madeNet(t), madeNet(t)
	d := h.handedIn(here)
	after := h.serials(d.tree.pid)
	for _, typ := range containerTypes {
		if serial := after[typ].binding.Serial; serial != d.before[typ] {
			t.Errorf("%s: serial %s became %s", typ, d.before[typ], serial)
		}
		if own := after[typ].sandbox == d.sandbox; own == (typ == alloc.Net) {
			t.Errorf("%s is in sandbox %s, the container's is %s", typ, after[typ].sandbox, d.sandbox)
		}
	}
	d.tree.end()
	h.reaches(d.sandbox, alloc.StateInTransit)
	d.end()

	// The next container in it has a sandbox of its own, too.
	next := withNet(t, here, unix.CLONE_NEWNS|unix.CLONE_NEWPID)
	places := h.serials(next.pid)
	if !reflect.DeepEqual(places[alloc.Net], after[alloc.Net]) || places[alloc.Mnt].sandbox == after[alloc.Net].sandbox {
		t.Errorf("the next container is in %+v, mnt in %+v", places[alloc.Net], places[alloc.Mnt])
	}

	// Restored into another namespace, which nobody has seen yet; then dumped, and back where it was.
	for _, net := range []string{there, here} {
		c := h.criu()
		c.passes(criuhook.PreRestore, 0, d.images)
		s := c.order(order{Tree: withoutNet, Net: net})
		if s.Err != "" {
			t.Fatal(s.Err)
		}
		t.Cleanup(func() { kill(s.PID) })
		c.passes(criuhook.SetupNamespaces, s.PID, d.images)
		c.passes(criuhook.PostRestore, s.PID, d.images)
		c.end()
		h.reaches(d.sandbox, alloc.StateRunning)
		h.settled()
		now := h.serials(s.PID)
		for _, typ := range containerTypes {
			if typ != alloc.Net && (now[typ].binding.Serial != d.before[typ] || now[typ].sandbox != d.sandbox) {
				t.Errorf("%s: serial %s became %+v", typ, d.before[typ], now[typ])
			}
		}
		n := now[alloc.Net]
		if known := n.binding.Serial == d.before[alloc.Net]; n.sandbox == d.sandbox || known != (net == here) {
			t.Errorf("net: %+v, the one that the container had first is serial %s", n, d.before[alloc.Net])
		}
		if s := h.book.sandbox(n.sandbox); s.Labels[labelHandedIn] != d.sandbox.String() {
			t.Errorf("its sandbox has the labels %v", s.Labels)
		}
		if net == here {
			break
		}
		back := h.criu()
		d.images = external(t, writeImages(t, "back", containerTypes...), alloc.Net)
		back.passes(criuhook.PreDump, s.PID, d.images)
		back.passes(criuhook.PostDump, s.PID, d.images)
		kill(s.PID)
		h.reaches(d.sandbox, alloc.StateInTransit)
		back.end()
	}
}

// TestHandedInStaysBehind: what a container was handed in lives on, and is no sign that the container does.
func TestHandedInStaysBehind(t *testing.T) {
	h := newHost(t)
	net := madeNet(t)
	d := h.handedIn(net)
	if err := h.stop(); err != nil {
		t.Fatal(err)
	}
	d.tree.end()
	d.end()
	neighbour := withNet(t, net, 0)
	if err := os.RemoveAll(filepath.Join(h.dir, "state")); err != nil {
		t.Fatal(err)
	}
	h.start()
	h.reaches(d.sandbox, alloc.StateEnded)
	if p := h.serials(neighbour.pid)[alloc.Net]; p.binding.Serial != d.before[alloc.Net] {
		t.Errorf("net: serial %s became %+v", d.before[alloc.Net], p)
	}
	h.consistent()
}

// TestNothingMoves: a tree that has nothing but what it was handed in is dumped without a checkpoint.
func TestNothingMoves(t *testing.T) {
	h := newHost(t)
	tree := withNet(t, madeNet(t), unix.CLONE_NEWPID)
	before := h.serials(tree.pid)[alloc.Net]
	images := external(t, writeImages(t, "nothing", alloc.Net, alloc.PID), alloc.Net, alloc.PID)
	c := h.criu()
	c.passes(criuhook.PreDump, tree.pid, images)
	c.passes(criuhook.PostDump, tree.pid, images)
	if _, err := os.Stat(filepath.Join(images, criuhook.ManifestName)); err == nil {
		t.Error("it has a manifest")
	}
	c.end()
	h.settled()
	if after := h.serials(tree.pid)[alloc.Net]; !reflect.DeepEqual(after, before) {
		t.Errorf("%+v became %+v", before, after)
	}
	h.consistent()
}

// TestCloneAfterParting: images that carried a namespace, which a later dump called external, still restore.
func TestCloneAfterParting(t *testing.T) {
	h := newHost(t)
	tree := withNet(t, madeNet(t), withoutNet)
	before := h.serials(tree.pid)
	carried := writeImages(t, "carried", containerTypes...)
	for _, images := range []string{carried, external(t, writeImages(t, "external", containerTypes...), alloc.Net)} {
		c := h.criu()
		c.passes(criuhook.PreDump, tree.pid, images)
		c.passes(criuhook.PostDump, tree.pid, images)
		c.end()
		h.settled() // it runs on
	}
	c, twin := h.restored(carried)
	c.end()
	for typ, p := range h.serials(twin) {
		if want := before[typ].binding.Serial; slices.Contains(containerTypes, typ) && (typ == alloc.Net) == (p.binding.Parent == want) {
			t.Errorf("%s: parent %s, the original is %s", typ, p.binding.Parent, want)
		}
	}
	h.settled()
	h.consistent()
}
