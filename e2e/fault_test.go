package e2e

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/nsalloc/nsalloc/internal/testhost"
	"github.com/nsalloc/nsalloc/internal/testpool"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// When a script of ours runs: CRIU runs the one that was added last first.
const (
	beforeHook = iota
	afterHook
)

// at runs shell commands on a host at one of CRIU's actions, before or after the hook. There $PPID is
// CRIU. heal takes the script out again.
func (p *pool) at(host, action string, when int, commands string) (heal func()) {
	p.t.Helper()
	h := p.Host(host)
	const path = "/usr/local/bin/at-action"
	script := fmt.Sprintf("#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" = %s ] || exit 0\n%s\nexit 0\n", action, commands)
	if err := h.WriteFile(path, []byte(script), 0o755); err != nil {
		p.t.Fatal(err)
	}
	hook, err := h.ReadFile("/etc/criu/default.conf")
	if err != nil {
		p.t.Fatal(err)
	}
	conf := bytes.Join([][]byte{hook, []byte("action-script " + path + "\n")}, nil)
	if when == afterHook {
		conf = bytes.Join([][]byte{[]byte("action-script " + path + "\n"), hook}, nil)
	}
	if err := h.WriteFile("/etc/criu/default.conf", conf, 0o644); err != nil {
		p.t.Fatal(err)
	}
	return func() {
		p.t.Helper()
		if err := h.WriteFile("/etc/criu/default.conf", hook, 0o644); err != nil {
			p.t.Fatal(err)
		}
	}
}

// killCRIU ends CRIU from its own script.
const killCRIU = "kill -9 $PPID"

// killAgent ends a host's agent from a script.
func (p *pool) killAgent(host string) string {
	p.t.Helper()
	var out bytes.Buffer
	if err := testpool.Output(p.Host(host).Command(p.ctx(), "pgrep", "-x", "nsalloc-agent"), &out); err != nil {
		p.t.Fatal(err)
	}
	return "kill -9 " + strings.TrimSpace(out.String())
}

// restartAgent starts an agent that a script has killed.
func (p *pool) restartAgent(host string) {
	p.t.Helper()
	if err := p.KillAgent(host); err != nil { // waits for its end
		p.t.Fatal(err)
	}
	if err := p.StartAgent(p.ctx(), host); err != nil {
		p.t.Fatal(err)
	}
}

// subject is a container with what is known of it before something goes wrong.
type subject struct {
	*container
	p      *pool
	ns     namespaces
	source *alloc.Sandbox
	count  int
}

func (p *pool) subject() *subject {
	p.t.Helper()
	c := p.container("ctr", "a", testhost.BundleOptions{})
	ns := c.identify("a", c.id)
	return &subject{container: c, p: p, ns: ns, source: p.stored(ns.sandbox()).Sandbox, count: c.countsOn("a", 2)}
}

// runsOnA proves that nothing has changed but the images, which are as given.
func (s *subject) runsOnA(images alloc.CheckpointState) {
	s.p.t.Helper()
	f := s.p.reaches(s.source.Serial, alloc.StateRunning, "a")
	if f.Sandbox.Epoch != s.source.Epoch {
		s.p.t.Errorf("epoch %s became %s", s.source.Epoch, f.Sandbox.Epoch)
	}
	switch {
	case images == "" && f.Checkpoint != nil, images != "" && (f.Checkpoint == nil || f.Checkpoint.State != images):
		s.p.t.Errorf("its checkpoint is %+v, want %q", f.Checkpoint, images)
	}
	s.count = s.countsOn("a", s.count)
	after := s.identify("a", s.id)
	for typ, n := range s.ns {
		if after[typ] != n {
			s.p.t.Errorf("%s: %+v became %+v", typ, n, after[typ])
		}
	}
}

// waitsForRestore proves that nothing of it lives on b, and that the images can be claimed again.
func (s *subject) waitsForRestore() {
	s.p.t.Helper()
	f := s.p.reaches(s.source.Serial, alloc.StateInTransit, "b")
	if f.Checkpoint.State != alloc.CheckpointOpen || f.Checkpoint.Claimant != nil || f.Sandbox.Epoch <= s.source.Epoch {
		s.p.t.Errorf("given back: checkpoint %+v, epoch %s after %s", f.Checkpoint, f.Sandbox.Epoch, s.source.Epoch)
	}
	if pid, err := s.p.Host("b").ContainerPID(s.p.ctx(), s.id); err == nil {
		s.p.t.Errorf("process %d of it lives on b", pid)
	}
	s.remove("b", s.id)
}

// dumped dumps it on a and brings the images to b.
func (s *subject) dumped() {
	s.p.t.Helper()
	if err := s.dump("a"); err != nil {
		s.p.t.Fatal(err)
	}
	s.p.reaches(s.source.Serial, alloc.StateInTransit, "a")
	s.move("a", "b")
}

// goesOnAtB restores it on b, under its serials.
func (s *subject) goesOnAtB() {
	s.p.t.Helper()
	if err := s.restore("b", ""); err != nil {
		s.p.t.Fatal(err)
	}
	s.livesOnB()
}

func (s *subject) livesOnB() {
	s.p.t.Helper()
	f := s.p.reaches(s.source.Serial, alloc.StateRunning, "b")
	if f.Checkpoint.State != alloc.CheckpointConsumed {
		s.p.t.Errorf("its checkpoint is %s", f.Checkpoint.State)
	}
	checkMoved(s.p.t, s.ns, s.identify("b", s.id), runtimeTypes(false))
	s.countsOn("b", s.count)
	s.p.check()
}

// inBackground runs what blocks while the test acts.
func inBackground(do func() error) (wait func() error) {
	done := make(chan error, 1)
	go func() { done <- do() }()
	return func() error { return <-done }
}

// TestAgentKilledInPostDump: the agent dies when its checkpoint is committed and 0 not yet on disk. The
// hook vetoes, the source runs on, and the next agent voids the images.
func TestAgentKilledInPostDump(t *testing.T) {
	p := newPool(t, "a", "b")
	s := p.subject()
	heal := p.loseAnswers("a", "post-dump")
	wait := inBackground(func() error { return s.dump("a") })
	p.reaches(s.source.Serial, alloc.StateDumped, "a")
	if err := p.KillAgent("a"); err != nil {
		t.Fatal(err)
	}
	if wait() == nil {
		t.Error("a dump went through whose agent was dead")
	}
	heal()
	p.restartAgent("a")
	s.runsOnA(alloc.CheckpointVoid)
	s.dumped()
	s.goesOnAtB()
}

// TestAgentKilledAfterDump: the agent dies when 0 is given and the source still lives. Nobody saw in
// which order tree and CRIU ended, so the sandbox is over and its images a copy, which the pool's policy
// resumes.
func TestAgentKilledAfterDump(t *testing.T) {
	p := newPool(t, "a", "b")
	s := p.subject()
	heal := p.at("a", "post-dump", afterHook, p.killAgent("a"))
	if err := s.dump("a"); err != nil {
		t.Fatal(err)
	}
	heal()
	p.restartAgent("a")
	if f := p.reaches(s.source.Serial, alloc.StateEnded, "a"); f.Checkpoint == nil || f.Checkpoint.State != alloc.CheckpointCopy {
		t.Fatalf("its checkpoint is %+v", f.Checkpoint)
	}
	s.move("a", "b")
	s.goesOnAtB()
}

// TestCRIUKilledInPostDump: CRIU dies while the source is frozen, before or after the hook's 0. The
// source runs again, under its serials.
func TestCRIUKilledInPostDump(t *testing.T) {
	p := newPool(t, "a", "b")
	s := p.subject()
	for when, images := range []alloc.CheckpointState{beforeHook: "", afterHook: alloc.CheckpointCopy} {
		heal := p.at("a", "post-dump", when, killCRIU)
		if s.dump("a") == nil {
			t.Fatal("a dump went through whose CRIU was dead")
		}
		heal()
		s.runsOnA(images)
	}
	// What it left is complete: a copy of a sandbox that lives.
	s.move("a", "b")
	if err := s.restore("b", ""); err != nil {
		t.Fatal(err)
	}
	clone := s.identify("b", s.id)
	for _, typ := range runtimeTypes(false) {
		if clone[typ].serial == s.ns[typ].serial || clone[typ].parent != s.ns[typ].serial {
			t.Errorf("%s: serial %s, parent %s; the original has %s", typ, clone[typ].serial, clone[typ].parent, s.ns[typ].serial)
		}
	}
	s.runsOnA(alloc.CheckpointCopy)
	p.check()
}

// TestRuncKilledInPostDump: runc dies while the hook answers 0, and reports a failure. CRIU kills the
// source all the same: that counts.
func TestRuncKilledInPostDump(t *testing.T) {
	p := newPool(t, "a", "b")
	s := p.subject()
	heal := p.at("a", "post-dump", beforeHook, "kill -9 $(ps -o ppid= -p $PPID)")
	if s.dump("a") == nil {
		t.Error("runc was killed and reports success")
	}
	heal()
	p.reaches(s.source.Serial, alloc.StateInTransit, "a")
	s.remove("a", s.id)
	s.move("a", "b")
	s.goesOnAtB()
}

// TestAgentKilledInPostRestore: the agent dies when its binding is committed and 0 not yet on disk. CRIU
// ends the tree, and the next agent gives the claim back.
func TestAgentKilledInPostRestore(t *testing.T) {
	p := newPool(t, "a", "b")
	s := p.subject()
	s.dumped()
	heal := p.loseAnswers("b", "post-restore")
	wait := inBackground(func() error { return s.restore("b", "") })
	p.reaches(s.source.Serial, alloc.StateRunning, "b")
	if err := p.KillAgent("b"); err != nil {
		t.Fatal(err)
	}
	if wait() == nil {
		t.Error("a restore went through whose agent was dead")
	}
	heal()
	p.restartAgent("b")
	s.waitsForRestore()
	s.goesOnAtB()
}

// TestCRIUKilledInPostRestore: CRIU dies and leaves the tree parked: before the root has its namespaces,
// before the hook's answer, after its 0, with the agent gone too, and with
// the agent's disk lost. The tree never ran; the agent ends
// it, and the images can be restored again.
func TestCRIUKilledInPostRestore(t *testing.T) {
	p := newPool(t, "a", "b")
	s := p.subject()
	s.dumped()
	for _, c := range []struct {
		action string
		when   int
		agent  bool // the agent is killed before
		disk   bool // and loses its disk
	}{
		{"setup-namespaces", afterHook, false, false},
		{"post-restore", beforeHook, false, false},
		{"post-restore", afterHook, false, false},
		{"post-restore", afterHook, true, false},
		{"post-restore", beforeHook, true, true},
	} {
		commands := killCRIU
		if c.disk {
			commands = "rm -rf /var/lib/nsalloc/agent; " + commands
		}
		if c.agent {
			commands = p.killAgent("b") + "; " + commands
		}
		heal := p.at("b", c.action, c.when, commands)
		if s.restore("b", "") == nil {
			t.Fatal("a restore went through whose CRIU was dead")
		}
		heal()
		if c.agent {
			p.restartAgent("b")
		}
		s.waitsForRestore()
	}
	s.goesOnAtB()
}

// TestCRIUKilledInSetupNamespaces: CRIU dies while the root of the tree still executes CRIU's own program, and
// the agent dies with its disk: only the pool's claim knows of the restore. runc, which waits for the root,
// reports a failure once the next agent has ended it, and the images can be restored again.
func TestCRIUKilledInSetupNamespaces(t *testing.T) {
	p := newPool(t, "a", "b")
	s := p.subject()
	s.dumped()
	const done = "/run/setup-namespaces-done"
	heal := p.at("b", "setup-namespaces", afterHook, "rm -rf /var/lib/nsalloc/agent; "+p.killAgent("b")+"; "+killCRIU+"; touch "+done)
	wait := inBackground(func() error { return s.restore("b", "") })
	p.eventually("CRIU is killed", func() error {
		_, err := p.Host("b").ReadFile(done)
		return err
	})
	criu := func() string {
		var out bytes.Buffer
		_ = testpool.Output(p.Host("b").Command(p.ctx(), "pgrep", "-x", "criu"), &out) // it fails when there is none
		return out.String()
	}
	if criu() == "" {
		t.Fatal("no half-built tree was left: this proves nothing")
	}
	p.restartAgent("b")
	if wait() == nil {
		t.Error("a restore went through whose CRIU was dead")
	}
	heal()
	s.waitsForRestore()
	if left := criu(); left != "" {
		t.Errorf("processes of CRIU's are left: %s", left)
	}
	s.goesOnAtB()
}

// TestBypassInPostRestore: the agent is gone and an operator lets CRIU go on. The container runs under a
// claim that nobody bound; the next agent commits it late, and does not take it for a parked one.
func TestBypassInPostRestore(t *testing.T) {
	p := newPool(t, "a", "b")
	s := p.subject()
	s.dumped()
	heal := p.at("b", "post-restore", beforeHook, "touch /run/nsalloc/bypass; "+p.killAgent("b"))
	if err := s.restore("b", ""); err != nil {
		t.Fatal(err)
	}
	heal()
	if err := testpool.Output(p.Host("b").Command(p.ctx(), "rm", "/run/nsalloc/bypass"), nil); err != nil {
		t.Fatal(err)
	}
	p.restartAgent("b")
	s.livesOnB()
}
