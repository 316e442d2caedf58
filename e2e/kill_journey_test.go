package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/internal/killpoint"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// journey is a way on which a point is passed: what is prepared while nothing goes wrong, and the one
// operation during which the point is armed.
type journey struct {
	prepare func(*cellRun)
	// fault is put in place before the operation, and healed when the point was hit or the operation is over.
	fault func(*cellRun) (heal func())
	// op is what an operator does. Its error says nothing: ownership follows what is seen of processes.
	op func(*cellRun) error
	// arms: op arms the point itself, when nothing but what it is for can pass it any more.
	arms bool
	// holds says what else must be, when processes and store agree.
	holds func(*cellRun) error
	// ends: the operation is the container's end, and nothing is to be continued.
	ends bool
	// last: its pool has taken a generation by itself, and takes no other one for minutes: the next cell gets a pool
	// of its own.
	last bool
	// clones: the operation restores images of a container that goes on, which gives a clone beside it.
	clones bool
}

var journeys = map[string]journey{
	"start":    {op: (*cellRun).start},
	"allocate": {prepare: (*cellRun).prepareAllocate, op: (*cellRun).allocate, holds: (*cellRun).allocatedOnce},
	"mend":     {prepare: (*cellRun).prepareMend, op: (*cellRun).mend, holds: (*cellRun).mendedOnce},
	"policy":   {prepare: (*cellRun).preparePolicy, op: (*cellRun).setPolicy, holds: (*cellRun).policySet},
	"remove":   {prepare: (*cellRun).prepareUnlist, op: (*cellRun).unlist, holds: (*cellRun).unlistedOnce},
	"again":    {prepare: func(c *cellRun) { c.must(c.start()) }, op: (*cellRun).recover, holds: (*cellRun).settled},
	"waive":    {prepare: (*cellRun).prepareWaive, op: (*cellRun).waive, holds: (*cellRun).waived},
	"dump": {
		prepare: func(c *cellRun) { c.must(c.start()) },
		op:      func(c *cellRun) error { return c.dump("a") },
	},
	"restore": {
		prepare: func(c *cellRun) { c.must(c.start(), c.dumpAndMove()) },
		op:      func(c *cellRun) error { return c.restore("b", "") },
	},
	// The tree runs on after its dump.
	"leave-running": {
		prepare: func(c *cellRun) { c.must(c.start()) },
		op:      func(c *cellRun) error { return c.dump("a", "--leave-running") },
	},
	// CRIU dies when the hook has let the tree run and before it does: the tree is left parked.
	"parked": {
		prepare: func(c *cellRun) { c.must(c.start(), c.dumpAndMove()) },
		fault:   func(c *cellRun) func() { return c.p.at("b", "post-restore", afterHook, killCRIU) },
		op:      func(c *cellRun) error { return c.restore("b", "") },
	},
	"end-a": {
		prepare: func(c *cellRun) { c.must(c.start()) },
		op:      func(c *cellRun) error { return c.end("a") },
		ends:    true,
	},
	"end-b": {
		prepare: func(c *cellRun) { c.must(c.start(), c.dumpAndMove(), c.restore("b", "")) },
		op:      func(c *cellRun) error { return c.end("b") },
		ends:    true,
	},
	// Images of a container that lives.
	"clone": {
		prepare: func(c *cellRun) { c.must(c.start(), c.dump("a", "--leave-running"), c.transfer()) },
		op:      func(c *cellRun) error { return c.restore("b", "") },
		clones:  true,
	},
	// The agent's disk is lost: it begins a new life, without ranges, and has something to number.
	"lost-disk-a": {
		op: func(c *cellRun) error { return errors.Join(c.loseDisk("a"), c.start()) },
	},
	"lost-disk-b": {
		prepare: func(c *cellRun) { c.must(c.start(), c.dumpAndMove()) },
		op:      func(c *cellRun) error { return errors.Join(c.loseDisk("b"), c.restore("b", "")) },
	},
	// The agent dies in the middle of a hand-off, and what it had noted of that is damaged when the next begins.
	"damaged-a": {
		prepare: func(c *cellRun) {
			c.must(c.start())
			c.dies("a", "agent/Abort/sending", func() error { return c.dump("a", "--leave-running") })
			c.must(c.damage("a"))
		},
		op: func(c *cellRun) error { return c.p.StartAgent(c.p.ctx(), "a") },
	},
	"damaged-b": {
		prepare: func(c *cellRun) {
			c.must(c.start(), c.dumpAndMove())
			c.dies("b", "agent/Claim/received", func() error { return c.restore("b", "") })
			c.must(c.damage("b"))
		},
		op: func(c *cellRun) error { return c.p.StartAgent(c.p.ctx(), "b") },
	},
	// Another agent has said Hello in this host's name: ours finds itself fenced.
	"other-life-a": {
		prepare: func(c *cellRun) { c.must(c.start(), c.otherLife("a")) },
		op:      func(c *cellRun) error { return c.dump("a") },
	},
	"other-life-b": {
		prepare: func(c *cellRun) { c.must(c.start(), c.dumpAndMove(), c.otherLife("b")) },
		op:      func(c *cellRun) error { return c.restore("b", "") },
	},
	// The hook dies while the agent commits the checkpoint: nobody takes the 0.
	"untaken": {
		prepare: func(c *cellRun) { c.must(c.start()) },
		op:      (*cellRun).dumpUntaken,
	},
	// The server is started again, and a container is born meanwhile.
	"begin": {op: (*cellRun).beginServer},
	// The server's etcd is put back to a copy from before the container: the server takes a generation, and the host
	// registers again what lives on it.
	"put-back": {prepare: (*cellRun).preparePutBack, op: (*cellRun).putBack, holds: (*cellRun).cameBack, last: true},
	// The pool cannot be reached: the dump is refused before anything is frozen.
	"pool-away": {
		prepare: func(c *cellRun) { c.must(c.start()) },
		fault: func(c *cellRun) func() {
			c.must(c.p.KillServer())
			return func() { c.must(c.p.StartServer(c.p.ctx())) }
		},
		op: func(c *cellRun) error { return c.dump("a") },
	},
	// A container is born while the pool is away: its serials are provisional.
	"born-away": {
		fault: func(c *cellRun) func() {
			c.must(c.p.KillServer())
			return func() { c.must(c.p.StartServer(c.p.ctx())) }
		},
		op: func(c *cellRun) error {
			c.arm("a", string(c.point))
			return c.start()
		},
		arms: true,
	},
	// A network namespace that was handed in parts from the container that is dumped.
	"part": {
		prepare: (*cellRun).prepareParted,
		op:      (*cellRun).dumpParting,
		arms:    true,
		holds:   (*cellRun).partedOnce,
	},
	// An operator's bypass lets a restored tree run while the agent is dead: the next one binds it late.
	"late": {
		prepare: (*cellRun).prepareLate,
		op:      func(c *cellRun) error { return c.p.StartAgent(c.p.ctx(), "b") },
	},
	// Agent and CRIU die in post-restore, the tree is left parked, and what the agent had noted is damaged: the
	// next one finds a claim that no run knows, and gives it back.
	"orphan": {
		prepare: func(c *cellRun) { c.prepareOrphan(beforeHook) },
		op:      func(c *cellRun) error { return c.p.StartAgent(c.p.ctx(), "b") },
	},
	// The same after the hook's 0: it finds a sandbox that runs, and takes that back.
	"bound-orphan": {
		prepare: func(c *cellRun) { c.prepareOrphan(afterHook) },
		op:      func(c *cellRun) error { return c.p.StartAgent(c.p.ctx(), "b") },
	},
	// More runs are over than the agent keeps.
	"forget": {
		prepare: func(c *cellRun) { c.must(c.start(), c.manyRuns()) },
		op:      func(c *cellRun) error { return c.dump("a") },
	},
}

// place is where a point is passed: by whom, and on which journey.
type place struct {
	role    string // source, target or server
	journey string
}

// host is where the process is that dies; "" for the server.
func (p place) host() string { return map[string]string{"source": "a", "target": "b"}[p.role] }

var (
	onDump    = []place{{"source", "dump"}}
	onRestore = []place{{"target", "restore"}}
	onEnd     = []place{{"source", "end-a"}, {"target", "end-b"}}
	onDamaged = []place{{"source", "damaged-a"}, {"target", "damaged-b"}}
	onLost    = []place{{"source", "lost-disk-a"}, {"target", "lost-disk-b"}}
)

// byRPC is where an agent or an operator makes each call; a server answers it on the first of them.
var byRPC = map[string][]place{
	"Allocate": {{"server", "allocate"}}, "Mend": {{"server", "mend"}}, "SetPolicy": {{"server", "policy"}}, "Remove": {{"server", "remove"}},
	"Waive": {{"server", "waive"}}, "RegisterAgain": {{"source", "again"}},
	"Hello": onLost, "Grant": onLost, "Register": {{"source", "start"}, {"target", "clone"}}, "End": onEnd,
	"Open": onDump, "Confirm": onDump, "Abort": {{"source", "leave-running"}},
	"Claim": onRestore, "Bind": onRestore, "Release": {{"target", "parked"}},
}

// byServer is where a server writes of its own.
var byServer = map[string][]place{
	"witness": {{"server", "allocate"}}, "life": {{"server", "begin"}},
	"close": {{"server", "put-back"}}, "generation": {{"server", "put-back"}},
}

// otherWays is where an agent comes to a request, or to a write, by code of its own; names of cells tell which.
var otherWays = map[string][]place{
	"Register": {{"source", "part"}}, "Bind": {{"target", "late"}},
	"Release": {{"target", "orphan"}, {"target", "bound-orphan"}},
	"serials": {{"source", "born-away"}},
}

// way is the journey of a place in otherWays, "" for all others.
func (p place) way() string {
	for _, others := range otherWays {
		for _, o := range others {
			if o.journey == p.journey {
				return p.journey
			}
		}
	}
	return ""
}

// byAction is where CRIU brings each action.
var byAction = map[string][]place{
	"pre-dump": onDump, "network-lock": onDump, "post-dump": onDump,
	"network-unlock": {{"source", "leave-running"}, {"target", "restore"}},
	"pre-restore":    onRestore, "setup-namespaces": onRestore, "post-setup-namespaces": onRestore,
	"post-restore": onRestore, "pre-resume": onRestore, "post-resume": onRestore,
}

// byWrite is where the agent writes what.
var byWrite = map[string][]place{
	"nonce": onLost, "identity": onLost, "new-life": {{"source", "other-life-a"}, {"target", "other-life-b"}},
	"serials": {{"source", "dump"}, {"target", "restore"}}, "lost-life": onDamaged, "aside": onDamaged,
	"manifest": onDump, "checkpoint": onDump, "untaken": {{"source", "untaken"}},
	"claim": onRestore, "root": onRestore, "tree": onRestore, "parked": {{"target", "parked"}},
	"outcome": {{"source", "dump"}, {"target", "restore"}}, "run": {{"source", "forget"}},
}

// places says where a point is passed; none for one that nobody thought of.
func places(p killpoint.Point) []place {
	part := strings.Split(string(p), "/")
	role, what, step := part[0], part[1], part[2]
	switch {
	case role == "hook":
		return byAction[what]
	case role == "server" && byRPC[what] != nil:
		at := []place{{"server", byRPC[what][0].journey}}
		for _, other := range otherWays[what] {
			at = append(at, place{"server", other.journey})
		}
		return at
	case role == "server":
		return byServer[what]
	case what == "pre-dump" && strings.HasPrefix(step, "verdict"):
		return []place{{"source", "pool-away"}} // only a veto is written there
	case byRPC[what] != nil:
		return slices.Concat(byRPC[what], otherWays[what])
	case byAction[what] != nil:
		return byAction[what]
	}
	return slices.Concat(byWrite[what], otherWays[what])
}

// start runs the container on a.
func (c *cellRun) start() error {
	if err := c.p.Host("a").Runc(c.p.ctx(), "run", "-d", "--bundle", c.bundle, c.id); err != nil {
		return err
	}
	if c.armed {
		return nil
	}
	return c.remember()
}

// remember notes what has to stay the same.
func (c *cellRun) remember() error {
	o := c.agree()
	if o.runsOn() != "a" {
		return fmt.Errorf("it runs on %q", o.runsOn())
	}
	c.ns = c.identify("a", c.id)
	c.source, c.count = o.of["a"], o.count["a"]
	return nil
}

// dumpAndMove dumps without a fault and brings the images to b.
func (c *cellRun) dumpAndMove() error {
	if err := c.dump("a"); err != nil {
		return err
	}
	if o := c.agree(); o.runsOn() != "" {
		return fmt.Errorf("dumped, it runs on %q", o.runsOn())
	}
	return c.transfer()
}

// transfer brings the images to b.
func (c *cellRun) transfer() error {
	b := c.p.Host("b")
	for _, dir := range []string{c.images, c.images + "-restore"} {
		if err := os.RemoveAll(b.Path(dir)); err != nil {
			return err
		}
	}
	return b.CopyDir(c.p.Host("a"), c.images, c.images)
}

// end kills the container.
func (c *cellRun) end(on string) error {
	return c.p.Host(on).Runc(c.p.ctx(), "delete", "--force", c.id)
}

// another runs a new container under the name of one that is over: it has serials of its own.
func (c *cellRun) another() error {
	old := c.ns
	if err := c.p.Host("a").Runc(c.p.ctx(), "run", "-d", "--bundle", c.bundle, c.id); err != nil {
		return err
	}
	if err := c.remember(); err != nil {
		return err
	}
	for _, typ := range runtimeTypes(false) {
		if c.ns[typ].serial == old[typ].serial {
			return fmt.Errorf("%s: serial %s is of the container that was", typ, old[typ].serial)
		}
	}
	return nil
}

// dumpUntaken dumps, and kills the hook while the agent waits for the answer to its commit.
func (c *cellRun) dumpUntaken() error {
	heal := c.p.loseAnswers("a", "post-dump")
	wait := inBackground(func() error { return c.dump("a") })
	c.p.reaches(c.source.Serial, alloc.StateDumped, "a")
	procs, err := processes(c.p.Host("a"))
	for _, p := range procs {
		if p.comm == "nsalloc-hook" {
			err = errors.Join(err, c.p.Host("a").Command(c.p.ctx(), "kill", "-9", strconv.Itoa(p.pid)).Run())
		}
	}
	heal()
	return errors.Join(err, wait())
}

const agentState = "/var/lib/nsalloc/agent"

func (c *cellRun) loseDisk(host string) error {
	if err := c.p.KillAgent(host); err != nil {
		return err
	}
	if err := os.RemoveAll(c.p.Host(host).Path(agentState)); err != nil {
		return err
	}
	return c.p.StartAgent(c.p.ctx(), host)
}

// dies lets a host's agent die at a point of its own during an operation, and leaves it dead.
func (c *cellRun) dies(host, point string, op func() error) {
	c.p.t.Helper()
	c.arm(host, point)
	wait := inBackground(op)
	select {
	case <-c.p.AgentEnded(host):
	case <-time.After(settledIn):
		c.p.t.Fatalf("the agent of host %s does not come to %s: %v", host, point, wait())
	}
	_ = wait() // whatever came of it
}

// damage cuts the newest record of a run off that a host's agent has.
func (c *cellRun) damage(host string) error {
	runs, err := filepath.Glob(c.p.Host(host).Path(agentState) + "/runs/*.run")
	if err != nil {
		return err
	}
	newest, at := "", time.Time{}
	for _, run := range runs {
		if info, err := os.Stat(run); err == nil && info.ModTime().After(at) {
			newest, at = run, info.ModTime()
		}
	}
	return os.Truncate(newest, 100)
}

// syncBuffer is a log that is read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// otherLife lets a second agent with a state of its own join in a host's name, and ends it.
func (c *cellRun) otherLife(host string) error {
	cmd := c.p.Host(host).Command(c.p.ctx(), "nsalloc-agent", "--state-dir", "/run/other/state", "--hook-socket", "/run/other/hook.sock", "--agent-socket", "/run/other/agent.sock")
	cmd.Env = slices.DeleteFunc(cmd.Env, func(e string) bool { return strings.HasPrefix(e, killpoint.Env+"=") })
	log := &syncBuffer{}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	defer os.RemoveAll(c.p.Host(host).Path("/run/other"))
	c.p.eventually("another agent joins as host "+host, func() error {
		if !strings.Contains(log.String(), "joined the pool") {
			return errors.New(log.String())
		}
		return nil
	})
	if err := cmd.Process.Kill(); err != nil {
		return err
	}
	_ = cmd.Wait() // killed
	return nil
}

// manyRuns makes sure that the agent of a has as many runs that are over as it keeps: each a dump of a
// process without namespaces of its own, which the hook lets pass, and which need not succeed.
func (c *cellRun) manyRuns() error {
	a, err := c.p.Agent("a")
	if err != nil {
		return err
	}
	known, err := a.ListRuns(c.p.ctx(), &nsallocv1.ListRunsRequest{})
	if err != nil || len(known.GetRuns()) >= 100 {
		return err
	}
	script := fmt.Sprintf(`mkdir -p /run/many; i=0; while [ $i -lt %d ]; do
		sleep 100 & criu dump -t $! -D /run/many >/dev/null 2>&1; kill $!; wait; i=$((i+1))
	done; rm -rf /run/many`, 101-len(known.GetRuns()))
	out, err := c.p.Host("a").Command(c.p.ctx(), "sh", "-c", script).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return nil
}
