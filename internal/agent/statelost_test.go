package agent

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

func (h *host) stateDir() string { return h.config().StateDir }

// runRecords are the paths of the runs' records.
func (h *host) runRecords() []string {
	h.t.Helper()
	list, err := filepath.Glob(filepath.Join(h.stateDir(), runsDir, "*"+runSuffix))
	if err != nil {
		h.t.Fatal(err)
	}
	return list
}

// losses are the ways to lose what the agent remembers of its runs.
var losses = map[string]func(h *host) error{
	"everything": func(h *host) error { return os.RemoveAll(h.stateDir()) },
	"the runs":   func(h *host) error { return os.RemoveAll(filepath.Join(h.stateDir(), runsDir)) },
	"records cut": func(h *host) error {
		var errs []error
		for _, path := range h.runRecords() {
			errs = append(errs, os.Truncate(path, 30))
		}
		return errors.Join(errs...)
	},
}

// handoffs are the places in a hand-off at which what is remembered may be lost. act goes there and
// returns the dump that it began with, and after what goes on once the agent is back.
var handoffs = map[string]struct {
	act    func(h *host) (d *dumped, after func())
	state  alloc.SandboxState
	images alloc.CheckpointState
	resume bool // the images restore under the serials that they had
}{
	"dumped, runs on": {func(h *host) (*dumped, func()) {
		d := h.dump()
		return d, d.end
	}, alloc.StateRunning, alloc.CheckpointCopy, false},
	"dumped, killed meanwhile": {func(h *host) (*dumped, func()) {
		d := h.dump()
		h.mustStop()
		d.tree.end()
		d.end()
		return d, func() {}
	}, alloc.StateEnded, alloc.CheckpointCopy, true},
	"dumped, killed later": {func(h *host) (*dumped, func()) {
		d := h.dump()
		return d, func() { d.tree.end(); d.end() }
	}, alloc.StateEnded, alloc.CheckpointCopy, true},
	"claimed, CRIU gone": {func(h *host) (*dumped, func()) {
		d := h.moved()
		c := h.criu()
		c.passes(criuhook.PreRestore, 0, d.images)
		h.mustStop()
		c.end()
		return d, func() {}
	}, alloc.StateInTransit, alloc.CheckpointOpen, true},
	"claimed, parked": {func(h *host) (*dumped, func()) {
		d := h.moved()
		c := h.parked(d, false)
		root := c.root
		var own []unnumbered
		for typ, k := range h.namespaces(root.PID) {
			if !h.isHosts(typ, k) {
				own = append(own, unnumbered{typ, k})
			}
		}
		h.mustStop()
		c.end()
		return d, func() {
			h.reaches(d.sandbox, alloc.StateInTransit)
			if !h.gone(root) {
				h.t.Error("the claim was given back while the tree stood there")
			}
			for _, u := range own {
				if serial := h.pool.everBound(u); serial != 0 {
					h.t.Errorf("the %s namespace of the half-built tree got serial %s", u.t, serial)
				}
			}
			kill(root.PID) // it has become ours to reap
		}
	}, alloc.StateInTransit, alloc.CheckpointOpen, true},
	"claimed, CRIU goes on": {func(h *host) (*dumped, func()) {
		d := h.moved()
		c := h.criu()
		c.passes(criuhook.PreRestore, 0, d.images)
		pid := c.tree(containerFlags, false)
		return d, func() {
			// CRIU builds it still: the sweep that the agent began with has left it alone.
			for typ, k := range h.namespaces(pid) {
				if p, ok := h.book.find(typ, k); ok && !h.isHosts(typ, k) {
					h.t.Errorf("%s of the tree under way has serial %s", typ, p.binding.Serial)
				}
			}
			// A restore of which nothing is remembered commits nothing.
			if s := c.bring(criuhook.PostRestore, pid, d.images); s.Verdict != criuhook.Veto {
				h.t.Errorf("%+v", s)
			}
			kill(pid) // as CRIU does, which reaps it
			h.eventually("the tree is gone", func() error {
				if _, err := os.Stat(filepath.Join("/proc", strconv.Itoa(pid))); err == nil {
					return errors.New("it is not reaped")
				}
				return nil
			})
			c.end()
		}
	}, alloc.StateInTransit, alloc.CheckpointOpen, true},
	"restored": {func(h *host) (*dumped, func()) {
		d := h.moved()
		c, _ := h.restored(d.images)
		return d, c.end
	}, alloc.StateRunning, alloc.CheckpointConsumed, false},
}

func (h *host) mustStop() {
	h.t.Helper()
	if err := h.stop(); err != nil {
		h.t.Fatal(err)
	}
}

// TestStateLost: an agent that remembers nothing, or nothing of its hand-offs, has every sandbox that lives
// on its host under the serials that it had, settles what the pool has under its name, and gives no
// serial out that it may have given before.
func TestStateLost(t *testing.T) {
	for what, lose := range losses {
		for where, c := range handoffs {
			t.Run(what+"/"+where, func(t *testing.T) {
				h := newHost(t)
				bystander := container(t, containerFlags)
				before := serialsOf(h.serials(bystander.pid))
				life, spent := h.registrar.life.Load(), h.granted()
				d, after := c.act(h)
				h.mustStop()
				if err := lose(h); err != nil {
					t.Fatal(err)
				}
				h.start()
				after()
				s, cp := h.reaches(d.sandbox, c.state)
				h.settled()
				h.consistent()
				if s.Checkpoint != 0 && cp.State != c.images {
					t.Errorf("the images are %s", cp.State)
				}
				same(t, before, serialsOf(h.serials(bystander.pid)))
				if h.registrar.life.Load() <= life {
					t.Errorf("incarnation %d after %d", h.registrar.life.Load(), life)
				}
				fresh := serialsOf(h.serials(container(t, containerFlags).pid))
				for _, typ := range containerTypes {
					for _, r := range spent {
						if serial := fresh[typ]; r.Contains(serial) {
							t.Errorf("%s %s is of the ranges of the life that was lost", typ, serial)
						}
					}
				}
				if c.resume {
					again, pid := h.restored(d.images)
					again.end()
					h.reaches(d.sandbox, alloc.StateRunning)
					same(t, d.before, serialsOf(h.serials(pid)))
					h.settled()
					h.consistent()
				}
			})
		}
	}
}

// granted is what the host may spend.
func (h *host) granted() alloc.Ranges {
	h.t.Helper()
	done, err := h.registrar.hold(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	defer done()
	return h.registrar.ranges
}

// same compares the serials of two processes in containers.
func same(t *testing.T, before, after map[alloc.NamespaceType]alloc.Serial) {
	t.Helper()
	for _, typ := range containerTypes {
		if after[typ] != before[typ] {
			t.Errorf("%s: %s became %s", typ, before[typ], after[typ])
		}
	}
}

// TestVetoIsNotForgotten: a record that cannot be read may have held a veto. Its CRIU gets nothing more,
// also from the agent after the next; a dump by another CRIU does.
func TestVetoIsNotForgotten(t *testing.T) {
	h := newHost(t)
	tree := container(t, containerFlags)
	sandbox := h.sandbox(tree.pid)
	images := writeImages(t, "run", containerTypes...)
	c := h.criu()
	c.passes(criuhook.PreDump, tree.pid, images)
	c.vetoed(criuhook.PostDump, tree.pid, t.TempDir(), "images in")
	h.mustStop()
	records := h.runRecords()
	if len(records) != 1 {
		t.Fatalf("%q", records)
	}
	if err := os.Truncate(records[0], 0); err != nil {
		t.Fatal(err)
	}
	lost, err := ExamineState(h.stateDir(), "a")
	if err != nil || len(lost) != 1 || !strings.Contains(lost[0].Error(), "it is empty; look at the disk and start the agent") {
		t.Errorf("before the start: %v, %v", lost, err)
	}
	for range 2 {
		h.start()
		c.vetoed(criuhook.PostDump, tree.pid, images, "was damaged and counts as lost; begin this dump or restore anew")
		lost, err := ExamineState(h.stateDir(), "a")
		if err != nil || len(lost) != 1 {
			t.Fatalf("%v, %v", lost, err)
		}
		h.mustStop()
	}
	if !strings.Contains(h.logs.String(), "the record of a run is damaged and counts as lost; look at the disk") {
		t.Error("the log has nothing of it")
	}
	life := h.registrar.life.Load()
	h.start()
	if h.registrar.life.Load() != life {
		t.Error("each start begins a new life")
	}
	c.end()
	next := h.criu()
	next.passes(criuhook.PreDump, tree.pid, images)
	next.passes(criuhook.PostDump, tree.pid, images)
	tree.end()
	next.end()
	h.reaches(sandbox, alloc.StateInTransit)
	h.settled()
	h.consistent()
	if lost, err = ExamineState(h.stateDir(), "a"); err != nil || len(lost) != 1 {
		t.Fatalf("%v, %v", lost, err)
	}
	obey(t, lost[0])
	if lost, err = ExamineState(h.stateDir(), "a"); err != nil || len(lost) != 0 {
		t.Errorf("%v, %v", lost, err)
	}
	h.restart()
	h.consistent()
}

// TestDamagedRun: no kind of damage to a run's record keeps an agent from serving the others.
func TestDamagedRun(t *testing.T) {
	for name, c := range damages {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			bystander := container(t, containerFlags)
			before := serialsOf(h.serials(bystander.pid))
			d := h.dump()
			h.mustStop()
			records := h.runRecords()
			good, err := os.ReadFile(records[0])
			if err != nil || len(records) != 1 {
				t.Fatal(records, err)
			}
			if err := c.do(records[0], good); err != nil {
				t.Fatal(err)
			}
			h.start()
			d.end()
			if _, cp := h.reaches(d.sandbox, alloc.StateRunning); cp.State != alloc.CheckpointCopy {
				t.Errorf("the images are %s", cp.State)
			}
			same(t, before, serialsOf(h.serials(bystander.pid)))
			same(t, d.before, serialsOf(h.serials(d.tree.pid)))
			h.settled()
			h.consistent()
		})
	}
}

// TestForeignRuns: records that are sound and not what they are called, or of another boot, or of a newer
// agent.
func TestForeignRuns(t *testing.T) {
	h := newHost(t)
	d := h.dump()
	h.mustStop()
	mine := h.runRecords()[0]
	data, err := os.ReadFile(mine)
	if err != nil {
		t.Fatal(err)
	}
	_, body, err := unseal(data)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(mine)
	put := func(name string, data []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// A newer one that is sound: this agent does not know how that run is settled, and says who does.
	put(filepath.Base(mine), seal(stateFormat+1, body))
	a, err := New(h.config(), h.pool)
	if err != nil {
		t.Fatal(err)
	}
	err = a.Run(t.Context())
	if err == nil || !strings.Contains(err.Error(), mine+": it has format 2, this agent reads up to 1; run the agent that wrote it") {
		t.Errorf("%v", err)
	}
	if now, err := os.ReadFile(mine); err != nil || string(now) != string(seal(stateFormat+1, body)) {
		t.Errorf("it was changed: %q, %v", now, err)
	}
	put(filepath.Base(mine), data)
	// Under names that are not theirs.
	const other = "11111111-2222-4333-8444-555555555555"
	put(other+"-1-2"+runSuffix, data)           // of another boot
	put(h.bootID()+"-999999-2"+runSuffix, data) // of another CRIU
	put("copy"+runSuffix, data)                 // a person's
	h.start()
	d.tree.end()
	d.end()
	h.reaches(d.sandbox, alloc.StateEnded) // nobody watched; that another's record was damaged takes nothing away
	h.settled()
	h.consistent()
	for name, there := range map[string]bool{
		filepath.Base(mine): true, "copy" + runSuffix: true, other + "-1-2" + runSuffix: false, other + "-1-2" + runSuffix + damagedSuffix: true,
		h.bootID() + "-999999-2" + runSuffix + damagedSuffix: true,
	} {
		if _, err := os.Lstat(filepath.Join(dir, name)); (err == nil) != there {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestIdentityLost: the agent does not start on an identity that it cannot read; the command that its error
// names brings everything back.
func TestIdentityLost(t *testing.T) {
	h := newHost(t)
	d := h.dump()
	h.mustStop()
	if err := os.Truncate(filepath.Join(h.stateDir(), identityFile), 50); err != nil {
		t.Fatal(err)
	}
	_, err := New(h.config(), h.pool)
	if err == nil {
		t.Fatal("it starts")
	}
	obey(t, err)
	h.start()
	d.end()
	h.reaches(d.sandbox, alloc.StateRunning)
	same(t, d.before, serialsOf(h.serials(d.tree.pid)))
	h.settled()
	h.consistent()
}

// TestCopiedState: a copy of the directory at work elsewhere under the same name is found out by the pool,
// and neither gives a serial out that the other gave.
func TestCopiedState(t *testing.T) {
	h := newHost(t)
	tree := container(t, containerFlags)
	before := serialsOf(h.serials(tree.pid))
	life := h.registrar.life.Load()
	h.mustStop()
	copied := filepath.Join(h.dir, "copied")
	if err := os.CopyFS(copied, os.DirFS(h.stateDir())); err != nil {
		t.Fatal(err)
	}
	// The host itself begins a new life, as after the identity was lost; then the copy comes.
	if err := os.RemoveAll(h.stateDir()); err != nil {
		t.Fatal(err)
	}
	h.start()
	between := serialsOf(h.serials(container(t, containerFlags).pid))
	h.mustStop()
	if err := os.RemoveAll(h.stateDir()); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(copied, h.stateDir()); err != nil {
		t.Fatal(err)
	}
	h.start()
	if h.registrar.life.Load() < life+2 {
		t.Errorf("incarnation %d, then %d", life, h.registrar.life.Load())
	}
	after := serialsOf(h.serials(container(t, containerFlags).pid))
	for _, typ := range containerTypes {
		if after[typ] == between[typ] || after[typ] == before[typ] {
			t.Errorf("%s: %s was given twice", typ, after[typ])
		}
	}
	same(t, before, serialsOf(h.serials(tree.pid)))
	h.consistent()
}

// TestStateRemoved: the directory goes while the agent runs. Nothing is promised any more, the agent says
// so and ends, and the next one finds everything again.
func TestStateRemoved(t *testing.T) {
	for name, remove := range map[string]func(h *host) error{
		"everything":    func(h *host) error { return os.RemoveAll(h.stateDir()) },
		"the runs":      func(h *host) error { return os.RemoveAll(filepath.Join(h.stateDir(), runsDir)) },
		"put elsewhere": func(h *host) error { return os.Rename(h.stateDir(), h.stateDir()+".old") },
		"another in its place": func(h *host) error {
			return errors.Join(os.Rename(h.stateDir(), h.stateDir()+".old"), os.CopyFS(h.stateDir(), os.DirFS(h.stateDir()+".old")))
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			tree := container(t, containerFlags)
			before := serialsOf(h.serials(tree.pid))
			images := writeImages(t, "run", containerTypes...)
			c := h.criu()
			c.passes(criuhook.PreDump, tree.pid, images)
			if err := remove(h); err != nil {
				t.Fatal(err)
			}
			// A veto with the reason; or nobody answers any more, which the hook takes for one.
			if s := c.bring(criuhook.PostDump, tree.pid, images); s.Verdict == criuhook.Pass && s.Err == "" || s.Err == "" && !strings.Contains(s.Message, "removed or replaced") {
				t.Errorf("%+v", s)
			}
			c.end()
			if err := h.ends(); err == nil || !strings.Contains(err.Error(), h.stateDir()) || !strings.Contains(err.Error(), "it was removed or replaced while the agent used it; start the agent again") {
				t.Errorf("it ended with %v", err)
			}
			h.start()
			same(t, before, serialsOf(h.serials(tree.pid)))
			h.settled()
			h.consistent()
		})
	}
}
