package e2e

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/internal/testpool"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// What an agent does that has several ways to one request: a namespace that was handed in, a tree that ran
// unasked, and a restore that nobody remembers.

// givenNetNS is a network namespace that is made beforehand, and givenBundle what runs in it.
const (
	givenNetNS  = "/run/netns/kill"
	givenBundle = killBundle + "-given"
)

// eachGiven makes the given namespace on both hosts, or deletes it.
func (c *cellRun) eachGiven(action string) (err error) {
	for _, h := range c.p.Hosts() {
		err = errors.Join(err, testpool.Output(h.Command(c.p.ctx(), "ip", "netns", action, path.Base(givenNetNS)), nil))
	}
	return err
}

// prepareParted runs a container in the given namespace: it has that for its own until a dump's images say
// otherwise.
func (c *cellRun) prepareParted() {
	c.p.t.Helper()
	c.must(c.eachGiven("add"))
	c.bundle, c.external = givenBundle, map[alloc.NamespaceType]bool{alloc.Net: true}
	c.must(c.start())
	if n := c.ns[alloc.Net]; n.sandbox != c.source.Serial {
		c.p.t.Fatalf("the namespace that was handed in is %+v, the container %s", n, c.source.Serial)
	}
}

// dumpParting dumps, and arms the point when CRIU is at post-dump: before that the agent may register what it
// had not seen yet.
func (c *cellRun) dumpParting() error {
	const here, leave = "/run/parting", "/run/parting-leave"
	a := c.p.Host("a")
	c.must(os.RemoveAll(a.Path(here)), os.RemoveAll(a.Path(leave)))
	heal := c.p.at("a", "post-dump", beforeHook, ": >"+here+"; i=0; until [ -e "+leave+" ] || [ $i = 400 ]; do sleep 0.02; i=$((i+1)); done")
	wait := inBackground(func() error { return c.dump("a") })
	c.p.eventually("CRIU is at post-dump", func() error {
		_, err := os.Stat(a.Path(here))
		return err
	})
	heal()
	c.arm(c.host(), string(c.point))
	return errors.Join(a.WriteFile(leave, nil, 0o644), wait())
}

// partedOnce: the namespace has the serial that it had. It is in a sandbox of its own on its host since before
// the point struck, where that was after the commit; where it was before, no earlier, if at all.
func (c *cellRun) partedOnce() error {
	was := c.ns[alloc.Net]
	s := c.p.stored(was.serial).Sandbox
	b, ok := s.Binding(was.serial)
	if !ok || !b.Live() || b.Kernel.Key(alloc.Net) != was.kernel.Key(alloc.Net) || s.State != alloc.StateRunning || s.Owner != "a" {
		return fmt.Errorf("the namespace was %+v, the store has it as %+v in sandbox %s, %s on host %s", was, b, s.Serial, s.State, s.Owner)
	}
	var struck unix.Stat_t
	if err := unix.Stat(filepath.Join(c.directory(c.host()), string(c.point))+".hit", &struck); err != nil {
		return err
	}
	const tick = 20 * time.Millisecond // a file's time is that of the kernel's last tick, and no restart is as fast
	at := time.Unix(struck.Ctim.Unix())
	parted := s.Serial != c.source.Serial
	before := parted && s.Created.Before(at.Add(tick))
	step := path.Base(string(c.point))
	if want := step == "committed" || step == "received"; before != want {
		return fmt.Errorf("parted: %v, at %v; struck at %v", parted, s.Created, at)
	}
	return nil
}

// removeGiven deletes the given namespace where there is one, and waits until the pool knows.
func (c *cellRun) removeGiven() {
	if c.external == nil {
		return
	}
	c.p.t.Helper()
	parted := c.p.stored(c.ns[alloc.Net].serial).Sandbox
	if parted.Serial == c.source.Serial {
		c.p.t.Errorf("the container %s is gone and still has what it was handed in", parted.Serial)
	}
	c.must(c.eachGiven("del"))
	c.p.reaches(parted.Serial, alloc.StateEnded, "a")
	c.external = nil
	c.agree()
}

// given finds the given namespace of each host, by host.
func (p *pool) given(kernel *kernelns.Kernel, external map[alloc.NamespaceType]bool) (map[string]alloc.KernelID, error) {
	found := map[string]alloc.KernelID{}
	if !external[alloc.Net] {
		return found, nil
	}
	for _, h := range p.Hosts() {
		_, id, err := kernel.ByPath(h.Path(givenNetNS))
		if err != nil {
			return nil, err
		}
		id.BootID = h.BootID()
		found[h.Name()] = id
	}
	return found, nil
}

// withoutGiven takes the sandboxes out of a list that are of a given namespace alone. One such namespace in two
// sandboxes is an error.
func withoutGiven(stored []*alloc.Sandbox, given map[string]alloc.KernelID) (rest []*alloc.Sandbox, err error) {
	holds := map[string]alloc.Serial{}
	for _, s := range stored {
		live := slices.DeleteFunc(slices.Clone(s.Bindings), func(b alloc.Binding) bool { return !b.Live() })
		id, ok := given[s.Owner]
		i := slices.IndexFunc(live, func(b alloc.Binding) bool { return ok && b.Type == alloc.Net && b.Kernel.Key(b.Type) == id.Key(b.Type) })
		if i >= 0 {
			if other, ok := holds[s.Owner]; ok {
				return nil, fmt.Errorf("sandboxes %s and %s both have what host %s was given", other, s.Serial, s.Owner)
			}
			holds[s.Owner] = s.Serial
		}
		if i < 0 || len(live) > 1 || s.State != alloc.StateRunning {
			rest = append(rest, s)
		}
	}
	return rest, nil
}

// prepareLate restores on b while its agent is dead and an operator lets CRIU go on.
func (c *cellRun) prepareLate() {
	c.p.t.Helper()
	const bypass = "/run/nsalloc/bypass"
	c.must(c.start(), c.dumpAndMove())
	if c.lost {
		c.arm("", "lose/Claim") // a server that dies at the one commit that is left loses that answer itself
	}
	heal := c.p.at("b", "post-restore", beforeHook, "touch "+bypass+"; "+c.p.killAgent("b"))
	err := c.restore("b", "")
	heal()
	c.must(err, c.p.KillAgent("b")) // waits for its end
	c.must(testpool.Output(c.p.Host("b").Command(c.p.ctx(), "rm", bypass), nil))
	if s := c.p.stored(c.source.Serial).Sandbox; s.State != alloc.StateClaimed {
		c.p.t.Fatalf("restored unasked, the sandbox is %s", s.State)
	}
}

// prepareOrphan restores on b, where agent and CRIU die around the last veto, and damages what the agent noted.
func (c *cellRun) prepareOrphan(when int) {
	c.p.t.Helper()
	c.must(c.start(), c.dumpAndMove())
	heal := c.p.at("b", "post-restore", when, c.p.killAgent("b")+"; "+killCRIU)
	err := c.restore("b", "")
	heal()
	if err == nil {
		c.p.t.Fatal("a restore went through whose CRIU was dead")
	}
	c.must(c.p.KillAgent("b"), c.damage("b"))
	want := map[int]alloc.SandboxState{beforeHook: alloc.StateClaimed, afterHook: alloc.StateRunning}[when]
	if s := c.p.stored(c.source.Serial).Sandbox; s.State != want {
		c.p.t.Fatalf("left behind, the sandbox is %s, not %s", s.State, want)
	}
}
