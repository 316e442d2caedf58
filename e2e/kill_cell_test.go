package e2e

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/internal/killpoint"
	"github.com/nsalloc/nsalloc/internal/testhost"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// cell is one row of the matrix.
type cell struct {
	point killpoint.Point
	place
	// lost: the server's store loses the answer of the first commit of every RPC from the operation on.
	lost bool
}

// name is the point, the role, and which way to it was taken where there are several.
func (c cell) name() string {
	return strings.TrimRight(string(c.point)+" "+c.role+" "+c.way(), " ")
}

func (c cell) String() string {
	if c.lost {
		return c.name() + " lost"
	}
	return c.name()
}

// result is what became of a cell.
type result struct {
	hit     bool
	before  []string      // RPCs of which an answer was lost before the point struck
	after   []string      // and after it
	verdict string        // what was seen when processes and store agreed
	where   string        // the host where it ran at the end
	agreed  time.Duration // from the restart of what was killed
	took    time.Duration
}

// cellRun is a cell under way, with its container.
type cellRun struct {
	*container
	cell
	p      *pool
	kernel *kernelns.Kernel
	j      journey
	result result

	armed  bool // the operation has begun
	ns     namespaces
	source *alloc.Sandbox
	count  int

	request   string // of an operator
	allocated alloc.Ranges
	before    alloc.Range // what was allocated before allocated
	mending   string      // the mend's request
	mended    alloc.Mended
	quota     uint64 // that the policy is set to
}

const killBundle = "/var/lib/bundles/kill"

func (c *cellRun) must(errs ...error) {
	c.p.t.Helper()
	for _, err := range errs {
		if err != nil {
			c.p.t.Fatal(err)
		}
	}
}

// directory is where a process's points are armed.
func (c *cellRun) directory(host string) string { return c.p.Killpoints(host) }

func (c *cellRun) arm(host string, names ...string) {
	c.p.t.Helper()
	for _, name := range names {
		path := filepath.Join(c.directory(host), name)
		c.must(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, nil, 0o600))
	}
}

// hit reports whether an armed point was taken.
func (c *cellRun) hit(host, name string) bool {
	_, err := os.Stat(filepath.Join(c.directory(host), name) + ".hit")
	return err == nil
}

// disarm takes back what was armed on every process.
func (c *cellRun) disarm() {
	for _, host := range []string{"", "a", "b"} {
		c.must(os.RemoveAll(c.directory(host)))
	}
}

// run is a cell from its container's start to its end.
func (c *cellRun) run() {
	began := time.Now()
	j := c.j
	c.disarm()
	c.agree() // whatever was before is over
	if j.prepare != nil {
		j.prepare(c)
	}
	moved := c.watch()
	defer moved()
	restarted := c.strike(j)
	o := c.agree()
	c.result.verdict = c.verdict(o)
	if strings.HasPrefix(c.result.verdict, string(alloc.StateClaimed)) {
		// A hook that was killed had asked, and its agent claimed after the first look; it gives the claim back.
		o = c.agree()
		c.result.verdict = c.verdict(o)
	}
	if order := moved(); len(order) > 2 && !j.clones {
		c.p.t.Errorf("two copies ran at once: the counters moved on %s", strings.Join(order, ", then on "))
	}
	c.result.agreed = time.Since(restarted)
	if c.result.agreed > settledIn {
		c.p.t.Errorf("processes and store agreed %v after the restart, %v are allowed", c.result.agreed, settledIn)
	}
	if want, ok := c.mayShow(c.result.verdict); !ok {
		c.p.t.Errorf("it shows %q, the model says %q", c.result.verdict, want)
	}
	if c.ns == nil && o.runsOn() == "a" {
		c.must(c.remember())
	}
	if j.holds != nil {
		c.must(j.holds(c))
	}
	if c.result.verdict == onAVoid {
		c.restoreVoid()
	}
	c.finish(j, o)
	if c.lost {
		c.checkLost()
	}
	c.disarm()
	c.p.check()
	c.clear()
	c.result.took = time.Since(began)
}

// strike arms the point, begins the operation, and starts what was killed anew as soon as it was. It returns
// when the operation is over, with the moment of the restart.
func (c *cellRun) strike(j journey) time.Time {
	c.p.t.Helper()
	if c.lost {
		for rpc := range byRPC {
			c.arm("", "lose/"+rpc)
		}
	}
	host := c.host()
	if !j.arms {
		c.arm(host, string(c.point))
	}
	c.armed = true
	heal := func() {}
	if j.fault != nil {
		heal = j.fault(c)
	}
	wait := make(chan error, 1)
	go func() { wait <- j.op(c) }()
	restarted, over := time.Time{}, false
	var opErr error
	deadline := time.Now().Add(time.Minute)
	t := time.NewTicker(5 * time.Millisecond)
	defer t.Stop()
	for restarted.IsZero() {
		select {
		case opErr = <-wait:
			wait, over = nil, true
			deadline = time.Now().Add(settledIn) // what is settled afterwards has its time
		case <-t.C:
		}
		if c.hit(host, string(c.point)) {
			c.result.hit = true
			restarted = c.restart(heal)
		} else if time.Now().After(deadline) {
			c.p.t.Fatalf("the point was not hit; the operation: over %v, %v", over, opErr)
		}
	}
	if !over {
		select {
		case opErr = <-wait:
		case <-time.After(time.Minute):
			c.p.t.Fatal("the operation does not end")
		}
	}
	if opErr != nil {
		c.p.t.Logf("the operation: %v", opErr)
	}
	return restarted
}

// restart starts the process anew that was killed, as a service manager does; a hook has none.
func (c *cellRun) restart(heal func()) time.Time {
	c.p.t.Helper()
	role, _, _ := strings.Cut(string(c.point), "/")
	var ended <-chan struct{}
	switch role {
	case "server":
		ended = c.p.ServerEnded()
	case "agent":
		ended = c.p.AgentEnded(c.host())
	}
	if ended != nil {
		select {
		case <-ended:
		case <-time.After(settledIn):
			c.p.t.Fatal("the point was hit and the process lives")
		}
	}
	heal()
	began := time.Now()
	switch role {
	case "server":
		c.must(c.p.StartServer(c.p.ctx()))
	case "agent":
		c.must(c.p.StartAgent(c.p.ctx(), c.host()))
	}
	return began
}

// agree waits until what is seen of processes and what the store says are the same.
func (c *cellRun) agree() *observation {
	c.p.t.Helper()
	before := map[string]int{}
	var o *observation
	c.p.eventually("processes and store agree", func() (err error) {
		o, err = c.p.observe(c.kernel, before, c.external)
		return err
	})
	most := 1
	if c.j.clones {
		most = 2
	}
	if len(o.live) > most {
		c.p.t.Fatalf("%d copies live, on %s", len(o.live), o.runsOn())
	}
	return o
}

// verdict says what was seen.
func (c *cellRun) verdict(o *observation) string {
	says := "nothing runs"
	if c.source != nil {
		f := c.p.stored(c.source.Serial)
		says = string(f.Sandbox.State)
		if on := o.runsOn(); on != "" {
			says = "runs on " + on
		}
		if f.Checkpoint != nil {
			says += ", images " + string(f.Checkpoint.State)
		}
	} else if on := o.runsOn(); on != "" {
		says = "runs on " + on
	}
	return says
}

// finish goes on as an operator would who tries again, until the container runs on b: with its serials,
// but where the model orders a clone.
func (c *cellRun) finish(j journey, o *observation) {
	c.p.t.Helper()
	if j.ends {
		if s := c.p.stored(c.source.Serial).Sandbox; o.runsOn() != "" || s.State != alloc.StateEnded {
			c.p.t.Errorf("it was ended, and runs on %q, the store says %s", o.runsOn(), s.State)
		}
		c.must(c.another())
		c.result.where = "over"
		return
	}
	for range 3 {
		var err error
		switch o.runsOn() {
		case "b", "a+b":
			c.finished(j, o)
			return
		case "a":
			if j.clones {
				c.remove("b", c.id)
				err = c.restore("b", "")
			} else {
				err = c.dump("a")
			}
		case "":
			c.remove("a", c.id)
			c.remove("b", c.id)
			c.must(c.transfer())
			err = c.restore("b", "")
		}
		if err != nil {
			c.p.t.Errorf("tried again without a fault: %v", err)
		}
		o = c.agree()
	}
	c.p.t.Errorf("it runs on %q after all was tried again", o.runsOn())
}

// finished holds what has come to run on b against what it was.
func (c *cellRun) finished(j journey, o *observation) {
	c.p.t.Helper()
	c.result.where = o.runsOn()
	after := c.identify("b", c.id)
	if o.of["b"].Serial != after.sandbox() {
		c.p.t.Errorf("the agent says sandbox %s, the store %s", after.sandbox(), o.of["b"].Serial)
	}
	if c.ns == nil {
		c.p.t.Fatal("it was never seen on a")
	}
	if o.count["b"] < c.count {
		c.p.t.Errorf("it counted to %d and is at %d", c.count, o.count["b"])
	}
	if !j.clones && c.result.verdict != overOnB {
		if c.external == nil {
			checkMoved(c.p.t, c.ns, after, runtimeTypes(false))
		} else {
			for _, typ := range alloc.NamespaceTypes() {
				c.compareNamespace(string(typ), typ, c.ns[typ], after[typ], c.source.Serial)
			}
		}
		s := o.of["b"]
		if s.Serial != c.source.Serial || s.Epoch <= c.source.Epoch {
			c.p.t.Errorf("sandbox %s of epoch %s became %s of epoch %s", c.source.Serial, c.source.Epoch, s.Serial, s.Epoch)
		}
		return
	}
	c.result.where += " (clone)"
	for _, typ := range runtimeTypes(false) {
		if after[typ].serial == c.ns[typ].serial || after[typ].parent != c.ns[typ].serial {
			c.p.t.Errorf("%s: serial %s, parent %s; the original has %s", typ, after[typ].serial, after[typ].parent, c.ns[typ].serial)
		}
	}
	original := c.p.stored(c.source.Serial).Sandbox
	if want := map[bool]alloc.SandboxState{true: alloc.StateRunning, false: alloc.StateEnded}[j.clones]; original.State != want {
		c.p.t.Errorf("the original is %s, not %s", original.State, want)
	}
}

// checkLost holds against the table what was lost before the point struck.
func (c *cellRun) checkLost() {
	c.p.t.Helper()
	c.result.before, c.result.after = c.losses()
	if len(c.result.before)+len(c.result.after) == 0 {
		c.p.t.Error("no answer of the store was lost: the cell shows nothing")
	}
	for _, row := range lostFirst {
		if !regexp.MustCompile(row.cells).MatchString(c.name()) {
			continue
		}
		for _, rpc := range row.rpcs {
			if !slices.Contains(c.result.before, rpc) {
				c.p.t.Errorf("no answer to %s was lost before the point struck, but to %v", rpc, c.result.before)
			}
		}
		return
	}
}

// restoreVoid tries images of a dump that was vetoed: they are refused for that.
func (c *cellRun) restoreVoid() {
	c.p.t.Helper()
	c.must(c.transfer())
	if err := c.restore("b", ""); err == nil || !strings.Contains(err.Error(), "vetoed") {
		c.p.t.Errorf("restore of void images: %v", err)
	}
	c.remove("b", c.id)
	c.agree()
}

// clear removes the container, for the next cell.
func (c *cellRun) clear() {
	defer c.removeGiven()
	for _, h := range c.p.Hosts() {
		c.remove(h.Name(), c.id)
		for _, dir := range []string{c.images, c.images + "-dump", c.images + "-restore"} {
			c.must(os.RemoveAll(h.Path(dir)))
		}
	}
}

// bundles writes what every cell's container is made of.
func (p *pool) killBundles() {
	p.t.Helper()
	for _, h := range p.Hosts() {
		for dir, o := range map[string]testhost.BundleOptions{killBundle: {}, givenBundle: {NetNS: givenNetNS}} {
			if err := h.WriteBundle(dir, o); err != nil {
				p.t.Fatal(err)
			}
		}
		if err := h.MkdirAll("/var/lib/images", 0o755); err != nil {
			p.t.Fatal(err)
		}
	}
}
