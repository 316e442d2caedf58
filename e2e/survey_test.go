package e2e

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

// survey is every task of a container that stays, by the pid that it sees itself under: what the kernel
// says of it, and what the host's agent says of its namespaces.
type survey struct {
	root  int // the vpid of the container's first process
	tasks map[int]seenTask
}

// seenTask is one process. parent, group and session are pids as it sees them; those that it cannot see
// are 0, and so are a zombie's namespaces.
type seenTask struct {
	kinship
	pid, outer int // in the host's numbers, and in the machine's
	ns         namespaces
}

// kinship is what a move does not change.
type kinship struct {
	parent, group, session int
	zombie                 bool
	command                string
}

// survey looks at a container on a host. What the workload starts and ends all the time is left out: only
// tasks count that are there before and after it has counted on.
func (c *container) survey(host string) survey {
	c.p.t.Helper()
	first := c.look(host)
	from := c.countsOn(host, 0)
	c.countsOn(host, from+2)
	last := c.look(host)
	s := survey{tasks: map[int]seenTask{}}
	for _, p := range last {
		if !slices.ContainsFunc(first, func(q kernelns.Process) bool { return q.PID == p.PID && q.StartTime == p.StartTime }) {
			continue
		}
		vpid := p.VPIDs[len(p.VPIDs)-1]
		seen := seenTask{kinship: kinshipOf(p), pid: p.VPIDs[1], outer: p.PID}
		if !seen.zombie {
			seen.ns = c.identifyPID(host, seen.pid)
		}
		if s.root == 0 {
			s.root, seen.parent = vpid, 0 // its parent is the host's
		}
		s.tasks[vpid] = seen
	}
	return s
}

// look reads the container's tree as the machine sees it, its first process first.
func (c *container) look(host string) []kernelns.Process {
	c.p.t.Helper()
	pid, err := c.p.Host(host).ContainerPID(c.p.ctx(), c.id)
	if err != nil {
		c.p.t.Fatal(err)
	}
	outer, err := c.p.Host(host).OuterPID(pid)
	if err != nil {
		c.p.t.Fatal(err)
	}
	procs, err := c.p.kernel().Sweep(c.p.ctx())
	if err != nil {
		c.p.t.Fatal(err)
	}
	return kernelns.Descendants(procs, outer)
}

// kernel reads the machine's /proc, in which every host's processes are.
func (p *pool) kernel() *kernelns.Kernel {
	p.t.Helper()
	kernel, err := kernelns.Open("/proc")
	if err != nil {
		p.t.Fatal(err)
	}
	return kernel
}

// kinshipOf reads a task's place from /proc/PID/status, where a pid stands once for each PID namespace.
func kinshipOf(p kernelns.Process) kinship {
	innermost := func(pid int, field string) int {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return 0
		}
		for line := range strings.Lines(string(status)) {
			if f := strings.Fields(line); len(f) > 1 && f[0] == field+":" {
				n, _ := strconv.Atoi(f[len(f)-1])
				return n
			}
		}
		return 0
	}
	return kinship{
		parent: innermost(p.PPID, "NSpid"), group: innermost(p.PID, "NSpgid"), session: innermost(p.PID, "NSsid"),
		zombie: p.State == 'Z', command: p.Comm,
	}
}

// identifyPID asks a host's agent for the namespaces of one of the host's pids, and proves that it says
// of each what the kernel says of the process itself.
func (c *container) identifyPID(host string, pid int) namespaces {
	c.p.t.Helper()
	h := c.p.Host(host)
	a, err := c.p.Agent(host)
	if err != nil {
		c.p.t.Fatal(err)
	}
	resp, err := a.Identify(c.p.ctx(), &nsallocv1.IdentifyRequest{Pid: int32(pid)})
	if err != nil {
		c.p.t.Fatal(err)
	}
	outer, err := h.OuterPID(pid)
	if err != nil {
		c.p.t.Fatal(err)
	}
	kernel := c.p.kernel()
	ns := namespaces{}
	for _, n := range resp.GetNamespaces() {
		b := wire.BindingFromWire(n.GetBinding())
		ns[b.Type] = identified{b.Serial, alloc.Serial(n.GetSandbox()), b.Kernel, b.Parent, n.GetOfHost()}
		_, seen, err := kernel.ByPath(fmt.Sprintf("/proc/%d/ns/%s", outer, b.Type))
		if err != nil {
			c.p.t.Fatal(err)
		}
		if seen.ID != b.Kernel.ID || seen.Inode != b.Kernel.Inode {
			c.p.t.Errorf("host %s, %s: the agent says kernel id %d inode %d, the process is in %d, %d", host, b.Type, b.Kernel.ID, b.Kernel.Inode, seen.ID, seen.Inode)
		}
		if b.Kernel.BootID != h.BootID() {
			c.p.t.Errorf("host %s, %s: boot id %s, the host's is %s", host, b.Type, b.Kernel.BootID, h.BootID())
		}
	}
	if len(ns) != len(alloc.NamespaceTypes()) {
		c.p.t.Fatalf("host %s identifies %d namespaces of pid %d: %v", host, len(ns), pid, slices.Collect(maps.Keys(ns)))
	}
	return ns
}

// forgets waits until a host's agent lists nothing of a sandbox: the pool knows it a moment before the agent
// has the pool's answer.
func (p *pool) forgets(host string, sandbox alloc.Serial) {
	p.t.Helper()
	a, err := p.Agent(host)
	if err != nil {
		p.t.Fatal(err)
	}
	p.eventually("the agent of host "+host+" lists no more", func() error {
		resp, err := a.ListNamespaces(p.ctx(), &nsallocv1.ListNamespacesRequest{Sandbox: uint64(sandbox)})
		if list := resp.GetNamespaces(); err == nil && len(list) > 0 {
			err = fmt.Errorf("it lists %v", list)
		}
		return err
	})
}

// sandbox is the container's.
func (s survey) sandbox() alloc.Serial { return s.tasks[s.root].ns.sandbox() }

// hop moves a container by dump, copy and restore, and looks at three places before and after: the
// processes, the agents, and the store. It returns what it saw after.
func (c *container) hop(before survey, from, to string) survey {
	c.p.t.Helper()
	source := c.p.stored(before.sandbox()).Sandbox
	count := c.countsOn(from, 0)
	if err := c.dump(from); err != nil {
		c.p.t.Fatal(err)
	}
	c.left(before, from)
	c.move(from, to)
	if err := c.restore(to, ""); err != nil {
		c.p.t.Fatal(err)
	}
	return c.arrived(before, source, count, to)
}

// arrived proves that a container is on a host as it was on the one before: its sandbox in the next epoch,
// from a checkpoint that it consumed, and its workload beyond the count that it had.
func (c *container) arrived(before survey, source *alloc.Sandbox, count int, to string) survey {
	c.p.t.Helper()
	f := c.p.reaches(source.Serial, alloc.StateRunning, to)
	if f.Sandbox.Epoch != source.Epoch+1 || f.Checkpoint == nil || f.Checkpoint.State != alloc.CheckpointConsumed {
		c.p.t.Errorf("on host %s: epoch %s after %s, checkpoint %+v", to, f.Sandbox.Epoch, source.Epoch, f.Checkpoint)
	}
	c.countsOn(to, count)
	after := c.survey(to)
	c.compare(before, after, source.Owner, to)
	return after
}

// left proves that a container that was dumped is in transit, that no task and no namespace of it is left on
// its source, and that neither the agent nor the runtime there knows of any.
func (c *container) left(before survey, from string) {
	c.p.t.Helper()
	c.p.reaches(before.sandbox(), alloc.StateInTransit, from)
	kernel := c.p.kernel()
	sandbox := before.sandbox()
	for vpid, task := range before.tasks {
		if p, err := kernel.Process(task.outer); err == nil && p.VPIDs[len(p.VPIDs)-1] == vpid && !p.Ended {
			c.p.t.Errorf("host %s: task %d (%s) still runs", from, vpid, task.command)
		}
		for typ, n := range task.ns {
			if n.sandbox != sandbox || c.external[typ] {
				continue
			}
			c.p.eventually(fmt.Sprintf("%s namespace of task %d is gone from host %s", typ, vpid, from), func() error {
				alive, err := kernel.Alive(typ, n.kernel)
				if err == nil && alive {
					err = fmt.Errorf("kernel id %d lives", n.kernel.ID)
				}
				return err
			})
		}
	}
	c.p.forgets(from, sandbox)
	if pid, err := c.p.Host(from).ContainerPID(c.p.ctx(), c.id); err == nil {
		c.p.t.Errorf("host %s: runc still has process %d", from, pid)
	}
}

// compare proves that the same tasks stand in the same places, in the same namespaces by serial and in
// others by the kernel's own id; that what is a host's is each host's; and that the store says so too.
func (c *container) compare(before, after survey, from, to string) {
	t := c.p.t
	t.Helper()
	if before.root != after.root || len(before.tasks) != len(after.tasks) {
		t.Errorf("%d tasks below %d on host %s, %d below %d on host %s", len(before.tasks), before.root, from, len(after.tasks), after.root, to)
	}
	sandbox := before.sandbox()
	stored := c.p.stored(sandbox).Sandbox
	for vpid, x := range before.tasks {
		y, ok := after.tasks[vpid]
		if !ok {
			t.Errorf("task %d (%s) is not on host %s", vpid, x.command, to)
			continue
		}
		if x.kinship != y.kinship {
			t.Errorf("task %d: %+v became %+v", vpid, x.kinship, y.kinship)
		}
		for _, typ := range alloc.NamespaceTypes() {
			if x.zombie || y.zombie {
				break
			}
			c.compareNamespace(fmt.Sprintf("task %d (%s), %s", vpid, x.command, typ), typ, x.ns[typ], y.ns[typ], sandbox)
			if n := y.ns[typ]; n.sandbox == sandbox {
				b, ok := stored.Binding(n.serial)
				if !ok || !b.Live() || b.Type != typ || b.Kernel.Key(typ) != n.kernel.Key(typ) {
					t.Errorf("task %d, %s: the store has %+v, the agent of host %s says %+v", vpid, typ, b, to, n)
				}
			}
		}
	}
}

func (c *container) compareNamespace(what string, typ alloc.NamespaceType, x, y identified, sandbox alloc.Serial) {
	t := c.p.t
	t.Helper()
	same := !x.kernel.Weak && x.kernel.ID == y.kernel.ID
	switch {
	case c.external[typ]:
		if y.ofHost || y.sandbox == sandbox || x.serial == y.serial || same {
			t.Errorf("%s was handed in and stays on its host: %+v became %+v", what, x, y)
		}
	case x.sandbox == sandbox:
		if x.serial != y.serial || y.sandbox != sandbox || same {
			t.Errorf("%s is the container's own: %+v became %+v", what, x, y)
		}
	case typ == alloc.Time:
		// CRIU restores the host's time namespace as a new one, which is the container's from then on.
		if !x.ofHost || y.ofHost || y.sandbox != sandbox || x.serial == y.serial {
			t.Errorf("%s: %+v became %+v", what, x, y)
		}
	default:
		// The initial user namespace is one for all hosts of a kernel: ids say nothing there.
		if !x.ofHost || !y.ofHost || x.serial == y.serial {
			t.Errorf("%s is the host's on both sides and has each host's serial: %+v became %+v", what, x, y)
		}
	}
}
