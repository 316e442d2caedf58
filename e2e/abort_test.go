package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/nsalloc/nsalloc/internal/testhost"
	"github.com/nsalloc/nsalloc/internal/testpool"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// loseAnswers makes a host lose every answer of the server from one of CRIU's actions on: a script that
// CRIU runs before the hook drops what comes in. So the pool commits what the agent asks for, and the
// agent cannot know: the hardest case of a veto. heal lets answers in again.
func (p *pool) loseAnswers(host string, from string) (heal func()) {
	p.t.Helper()
	h := p.Host(host)
	drop := "INPUT -p tcp -s " + p.Addr().String() + " -j DROP"
	script := fmt.Sprintf("#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" = %s ] && iptables -w -I %s\nexit 0\n", from, drop)
	const path = "/usr/local/bin/lose-answers"
	if err := h.WriteFile(path, []byte(script), 0o755); err != nil {
		p.t.Fatal(err)
	}
	conf, err := h.ReadFile("/etc/criu/default.conf")
	if err != nil {
		p.t.Fatal(err)
	}
	// CRIU runs the script that was added last first.
	if err := h.WriteFile("/etc/criu/default.conf", append(conf, []byte("action-script "+path+"\n")...), 0o644); err != nil {
		p.t.Fatal(err)
	}
	return func() {
		p.t.Helper()
		if err := h.WriteFile("/etc/criu/default.conf", conf, 0o644); err != nil {
			p.t.Fatal(err)
		}
		if err := testpool.Output(h.Command(p.ctx(), "sh", "-c", "iptables -w -D "+drop), nil); err != nil {
			p.t.Fatalf("the script never ran: %v", err)
		}
	}
}

// TestVetoAtPostDump: the checkpoint is committed, the answer is lost, so the agent vetoes. The
// container runs on where it was, under its old epoch, and its images are void.
func TestVetoAtPostDump(t *testing.T) {
	p := newPool(t, "a", "b")
	c := p.container("ctr", "a", testhost.BundleOptions{})
	before := c.identify("a", c.id)
	source := p.stored(before.sandbox()).Sandbox
	count := c.countsOn("a", 2)

	heal := p.loseAnswers("a", "post-dump")
	err := c.dump("a")
	heal()
	if err == nil {
		t.Fatal("a dump went through whose checkpoint nobody confirmed")
	}
	f := p.reaches(source.Serial, alloc.StateRunning, "a")
	if f.Sandbox.Epoch != source.Epoch {
		t.Errorf("epoch %s became %s", source.Epoch, f.Sandbox.Epoch)
	}
	if f.Checkpoint == nil || f.Checkpoint.State != alloc.CheckpointVoid {
		t.Fatalf("its checkpoint is %+v", f.Checkpoint)
	}
	c.countsOn("a", count)
	after := c.identify("a", c.id)
	for typ, n := range before {
		if after[typ] != n {
			t.Errorf("%s: %+v became %+v", typ, n, after[typ])
		}
	}

	c.move("a", "b")
	if err := c.restore("b", ""); err == nil || !strings.Contains(err.Error(), "vetoed") {
		t.Errorf("restore of void images: %v", err)
	}
	c.remove("b", c.id)

	// The next dump goes through.
	if err := c.dump("a"); err != nil {
		t.Fatal(err)
	}
	c.move("a", "b")
	if err := c.restore("b", ""); err != nil {
		t.Fatal(err)
	}
	p.reaches(source.Serial, alloc.StateRunning, "b")
	checkMoved(t, before, c.identify("b", c.id), runtimeTypes(false))
	c.countsOn("b", count)
	p.check()
}

// TestVetoAtPostRestore: the binding is committed, the answer is lost, so the agent vetoes and CRIU ends
// the tree. Nothing runs on b, the checkpoint can be claimed again, and the next restore goes through.
func TestVetoAtPostRestore(t *testing.T) {
	p := newPool(t, "a", "b")
	c := p.container("ctr", "a", testhost.BundleOptions{})
	before := c.identify("a", c.id)
	source := p.stored(before.sandbox()).Sandbox
	count := c.countsOn("a", 2)
	if err := c.dump("a"); err != nil {
		t.Fatal(err)
	}
	p.reaches(source.Serial, alloc.StateInTransit, "a")
	c.move("a", "b")

	heal := p.loseAnswers("b", "post-restore")
	err := c.restore("b", "")
	heal()
	if err == nil {
		t.Fatal("a restore went through whose binding nobody confirmed")
	}
	f := p.reaches(source.Serial, alloc.StateInTransit, "b")
	if f.Checkpoint.State != alloc.CheckpointOpen || f.Checkpoint.Claimant != nil || f.Sandbox.Epoch <= source.Epoch {
		t.Errorf("given back: checkpoint %+v, epoch %s after %s", f.Checkpoint, f.Sandbox.Epoch, source.Epoch)
	}
	if pid, err := p.Host("b").ContainerPID(p.ctx(), c.id); err == nil {
		t.Errorf("process %d of it runs on b", pid)
	}
	c.remove("b", c.id)

	if err := c.restore("b", ""); err != nil {
		t.Fatal(err)
	}
	again := p.reaches(source.Serial, alloc.StateRunning, "b")
	if again.Sandbox.Epoch <= f.Sandbox.Epoch || again.Checkpoint.State != alloc.CheckpointConsumed {
		t.Errorf("restored: epoch %s after %s, checkpoint %s", again.Sandbox.Epoch, f.Sandbox.Epoch, again.Checkpoint.State)
	}
	checkMoved(t, before, c.identify("b", c.id), runtimeTypes(false))
	c.countsOn("b", count)
	p.check()
}

// TestLeaveRunning: the source goes on as the owner; the images are a copy and restore as a clone.
func TestLeaveRunning(t *testing.T) {
	p := newPool(t, "a", "b")
	c := p.container("ctr", "a", testhost.BundleOptions{})
	before := c.identify("a", c.id)
	source := p.stored(before.sandbox()).Sandbox
	if err := c.dump("a", "--leave-running"); err != nil {
		t.Fatal(err)
	}
	f := p.reaches(source.Serial, alloc.StateRunning, "a")
	if f.Sandbox.Epoch != source.Epoch || f.Checkpoint == nil || f.Checkpoint.State != alloc.CheckpointCopy {
		t.Fatalf("epoch %s became %s, checkpoint %+v", source.Epoch, f.Sandbox.Epoch, f.Checkpoint)
	}
	c.countsOn("a", c.countsOn("a", 2))
	c.move("a", "b")
	if err := c.restore("b", ""); err != nil {
		t.Fatal(err)
	}
	clone := c.identify("b", c.id)
	for _, typ := range runtimeTypes(false) {
		if clone[typ].serial == before[typ].serial || clone[typ].parent != before[typ].serial {
			t.Errorf("%s: serial %s, parent %s; the original has %s", typ, clone[typ].serial, clone[typ].parent, before[typ].serial)
		}
	}
	p.reaches(source.Serial, alloc.StateRunning, "a")
	c.countsOn("b", 2)
	p.check()
}

// TestHooksTwice: runc 1.1 reads runc.conf twice, and default.conf names the hook too, so every action
// comes three times. The end is the same.
func TestHooksTwice(t *testing.T) {
	p := newPool(t, "a", "b")
	for _, h := range p.Hosts() {
		conf, err := h.ReadFile("/etc/criu/default.conf")
		if err != nil {
			t.Fatal(err)
		}
		if err := h.WriteFile("/etc/criu/runc.conf", conf, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	c := p.container("ctr", "a", testhost.BundleOptions{})
	before := c.identify("a", c.id)
	count := c.countsOn("a", 2)
	if err := c.dump("a"); err != nil {
		t.Fatal(err)
	}
	p.reaches(before.sandbox(), alloc.StateInTransit, "a")
	c.move("a", "b")
	if err := c.restore("b", ""); err != nil {
		t.Fatal(err)
	}
	f := p.reaches(before.sandbox(), alloc.StateRunning, "b")
	if n := len(f.Sandbox.Stints); n != 2 {
		t.Errorf("%d stints: %+v", n, f.Sandbox.Stints)
	}
	checkMoved(t, before, c.identify("b", c.id), runtimeTypes(false))
	c.countsOn("b", count)
	if !strings.Contains(p.Logs(), "came again") {
		t.Error("no action came twice: the test shows nothing")
	}
	p.check()
}

// TestAdopt: images that were made without the hook are adopted with fresh serials and a warning.
func TestAdopt(t *testing.T) {
	p := newPool(t, "a", "b")
	if err := p.Host("a").WriteFile("/etc/criu/default.conf", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	c := p.container("ctr", "a", testhost.BundleOptions{})
	before := c.identify("a", c.id)
	if err := c.dump("a"); err != nil {
		t.Fatal(err)
	}
	p.reaches(before.sandbox(), alloc.StateEnded, "a")
	c.move("a", "b")
	if err := c.restore("b", ""); err != nil {
		t.Fatal(err)
	}
	after := c.identify("b", c.id)
	for _, typ := range runtimeTypes(false) {
		if after[typ].serial == before[typ].serial || after[typ].parent != 0 {
			t.Errorf("%s: serial %s, parent %s", typ, after[typ].serial, after[typ].parent)
		}
	}
	if s := p.stored(after.sandbox()).Sandbox; s.Labels["adopted"] != "true" {
		t.Errorf("labels: %v", s.Labels)
	}
	log, err := p.Host("b").ReadFile(c.images + "-restore/restore.log")
	if err != nil || !strings.Contains(string(log), "adopted") {
		t.Errorf("CRIU's log does not warn (%v)", err)
	}
	c.countsOn("b", 2)
	p.check()
}
