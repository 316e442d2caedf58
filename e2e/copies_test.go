package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// copiedHost is host a, whose agent's state is lost and copied.
type copiedHost struct {
	*pool
	seen *seenSerials
	own  int       // namespaces of the host itself
	all  []*births // what was spawned
}

// committed waits until each namespace that lives has a committed serial.
func (c *copiedHost) committed(what string) {
	c.t.Helper()
	live := c.own
	for _, b := range c.all {
		live += len(b.cmds) * ownTypes
	}
	c.eventually(what, func() error {
		provisional, n, err := c.seen.look(c.pool, "a")
		if err == nil && (provisional > 0 || n == 0 || live > 0 && n != live) {
			err = fmt.Errorf("of %d namespaces %d are provisional, %d committed", live, provisional, n)
		}
		return err
	})
}

// born starts processes in namespaces of their own.
func (c *copiedHost) born() *births {
	c.t.Helper()
	b, done := c.spawn("a", 3)
	if <-done; b.err != nil {
		c.t.Fatal(b.err)
	}
	c.all = append(c.all, b)
	return b
}

func (c *copiedHost) incarnation() alloc.Incarnation {
	c.t.Helper()
	h, err := c.Client().Host(c.ctx(), "a")
	if err != nil {
		c.t.Fatal(err)
	}
	return h.Incarnation
}

func (c *copiedHost) sh(script string) {
	c.t.Helper()
	if out, err := c.Host("a").Command(c.ctx(), "sh", "-c", script).CombinedOutput(); err != nil {
		c.t.Fatalf("%s: %v\n%s", script, err, out)
	}
}

// says waits until some daemon's log has it.
func (c *copiedHost) says(what string) {
	c.t.Helper()
	c.eventually("somebody says "+what, func() error {
		if log := c.Logs(); !strings.Contains(log, what) {
			return errors.New(log)
		}
		return nil
	})
}

func (c *copiedHost) must(errs ...error) {
	c.t.Helper()
	if err := errors.Join(errs...); err != nil {
		c.t.Fatal(err)
	}
}

// TestAgentStateCopied: an agent's state is deleted, put back to an older copy while the pool is away, and started as a
// second machine of the same name while the first one runs. No serial is committed for two namespaces, and who lost begins
// a new life and says so. What lives on the host keeps its serials, as long as nobody else says that the host was booted anew.
func TestAgentStateCopied(t *testing.T) {
	c := &copiedHost{pool: newPool(t, "a", "b"), seen: newSeen()}
	c.must(c.StopAgent("b")) // host b is only a place: for a second machine that says it is a
	c.committed("the host's own are committed")
	c.own = len(c.seen.committed)
	c.born()
	c.committed("what is born is committed")

	first := c.incarnation()
	c.must(c.KillAgent("a"))
	c.sh("rm -r " + agentState)
	c.must(c.StartAgent(c.ctx(), "a"))
	c.born()
	c.committed("all is committed without the state that was")
	second := c.incarnation()
	if second <= first {
		t.Errorf("without its state it is in incarnation %s, and was in %s", second, first)
	}

	// The older copy numbers from what was spent since it was made.
	c.sh("cp -a " + agentState + " /run/older")
	spent := c.born()
	c.committed("what is born after the copy is committed")
	spent.end()
	c.committed("it is over")
	c.must(c.KillAgent("a"), c.KillServer())
	c.sh("rm -r " + agentState + " && mv /run/older " + agentState)
	c.must(c.StartAgentAway(c.ctx(), "a"))
	c.born()
	away := newSeen() // what is provisional may change
	c.eventually("what is born while the pool is away has serials", func() error {
		n, _, err := away.look(c.pool, "a")
		if err == nil && n < 3*ownTypes {
			err = fmt.Errorf("%d have provisional ones", n)
		}
		return err
	})
	c.must(c.StartServer(c.ctx()))
	c.committed("all is committed when the pool is back")
	for _, what := range c.seen.changed {
		t.Error(what)
	}
	c.says("provisional serials are void; the namespaces that live under them get others")

	// A second machine with a copy of the state. To the pool it is host a, booted anew.
	a, b := c.Host("a"), c.Host("b")
	c.must(c.KillAgent("a"), os.RemoveAll(b.Path(agentState)), b.CopyDir(a, agentState, agentState),
		b.WriteFile("/etc/nsalloc/agent.yaml", []byte("host: a\nserver: "+c.ServerAddr()+"\ninsecure: true\n"), 0o644),
		c.StartAgent(c.ctx(), "a"), c.StartAgent(c.ctx(), "b"))
	twin := newSeen()
	c.eventually("the second machine's are committed", func() error {
		provisional, n, err := twin.look(c.pool, "b")
		if err == nil && (provisional > 0 || n == 0) {
			err = fmt.Errorf("%d are provisional, %d committed", provisional, n)
		}
		return err
	})
	c.born()
	c.says("another life of its agent's state has spent them")
	// Of the two one may be down by now, and would wait for minutes before it takes the other one's place.
	c.must(c.KillAgent("b"), c.KillAgent("a"), c.StartAgent(c.ctx(), "a"))
	c.committed("the one that is left has all committed")
	for serial, of := range c.seen.of {
		if other, ok := twin.of[serial]; ok {
			t.Errorf("%s was committed for %s and, by the second machine, for %s", serial, of, other)
		}
	}
	c.check()
}

// TestServerDirectoryCopied: a server's data directory is started elsewhere while the server runs, put back to an older
// copy, and deleted. No serial is given twice; of two at work the one that was there first writes no more and says so.
func TestServerDirectoryCopied(t *testing.T) {
	if testing.Short() {
		t.Skip("starts and stops servers")
	}
	t.Parallel()
	r := newTrial(newCluster(t, 1))
	s := r.servers[0]
	// another is the same server with another directory, and the address of server 1.
	removed := false
	another := func(dir string) *program {
		r.servers[1].kill()
		if !removed { // it does not come back, and would be missed
			r.remove(0, 1)
			removed = true
		}
		args := slices.Clone(s.args)
		args[slices.Index(args, "--listen")+1] = r.address(1)
		args[slices.Index(args, "--data-dir")+1] = dir
		r.servers[1].args = args
		r.begin(r.servers[1])
		return r.servers[1]
	}
	copyTo := func(name string) string {
		t.Helper()
		to := filepath.Join(r.dir, name)
		if err := os.CopyFS(to, os.DirFS(r.dataDir(0))); err != nil {
			t.Fatal(err)
		}
		return to
	}
	issue := func(i int) {
		t.Helper()
		for range 3 {
			if err := r.ask(i, settledIn); err != nil {
				t.Fatalf("server %d: %v", i, err)
			}
		}
	}
	issue(0)
	older := copyTo("older")
	issue(0)
	another(copyTo("copy"))
	issue(1)
	for range 2 {
		says(t, r.ask(0, settledIn), alloc.ReasonUnavailable, "life 2 of a server of this name has begun", "nothing was written", "--name", "directory of its own")
	}
	issue(1)

	s.kill() // the first one, started again, is the later life
	r.begin(s)
	issue(0)
	says(t, r.ask(1, settledIn), alloc.ReasonUnavailable, "life 3", "nothing was written")
	another(older)
	issue(1)
	says(t, r.ask(0, settledIn), alloc.ReasonUnavailable, "life 4", "nothing was written")
	if log := r.servers[1].log.String(); !strings.Contains(log, "older copy of its state directory") {
		t.Errorf("who was started from an older copy says\n%s", log)
	}

	s.kill()
	if err := os.RemoveAll(r.dataDir(0)); err != nil {
		t.Fatal(err)
	}
	r.begin(s)
	r.healed("one was started without its directory")
}
