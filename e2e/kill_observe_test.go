package e2e

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/internal/testhost"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// seenProc is one process of a host, read from the host's own process table.
type seenProc struct {
	host string
	pid  int    // in the host
	ns   []int  // NSpid from the host's PID namespace down
	comm string // what it calls itself
	exe  string // what it executes
}

// liveTree is a counter that was seen to run.
type liveTree struct {
	host    string
	root    seenProc
	count   int
	kernels map[alloc.NamespaceType]alloc.KernelID
}

// processes lists what runs on a host besides its init and its agent. Matrix cells run one after the other,
// so all of it is the cell's: the container, and what is left of CRIU, runc and hook.
func processes(h *testhost.Host) ([]seenProc, error) {
	dir := h.Path("/proc")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var list []seenProc
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == 1 {
			continue
		}
		p := seenProc{host: h.Name(), pid: pid}
		status, err := os.ReadFile(filepath.Join(dir, e.Name(), "status"))
		if err != nil {
			continue // gone since
		}
		for line := range strings.Lines(string(status)) {
			key, value, _ := strings.Cut(line, ":")
			switch key {
			case "Name":
				p.comm = strings.TrimSpace(value)
			case "NSpid":
				for _, f := range strings.Fields(value) {
					n, _ := strconv.Atoi(f)
					p.ns = append(p.ns, n)
				}
			}
		}
		// NSpid begins in the namespace of the table's mount.
		p.exe, _ = os.Readlink(filepath.Join(dir, e.Name(), "exe"))
		if p.comm == "nsalloc-agent" {
			continue
		}
		list = append(list, p)
	}
	return list, nil
}

func (p seenProc) String() string {
	return fmt.Sprintf("%s on host %s (pid %d, executes %q)", p.comm, p.host, p.pid, p.exe)
}

// isRoot reports whether a process is the first of a PID namespace of its own.
func (p seenProc) isRoot() bool { return len(p.ns) > 1 && p.ns[len(p.ns)-1] == 1 }

// liveOn finds the container that runs on a host: nil for none. What is not a running container, such as
// a tree that CRIU has half built or parked, or CRIU itself, is an error: it must be gone.
func liveOn(kernel *kernelns.Kernel, h *testhost.Host) (*liveTree, error) {
	procs, err := processes(h)
	if err != nil || len(procs) == 0 {
		return nil, err
	}
	var tree *liveTree
	for _, p := range procs {
		if filepath.Base(p.exe) != "busybox" || len(p.ns) < 2 {
			return nil, fmt.Errorf("there is %s", p)
		}
		if p.isRoot() {
			if tree != nil {
				return nil, fmt.Errorf("two containers: %s and %s", tree.root, p)
			}
			tree = &liveTree{host: h.Name(), root: p}
		}
	}
	if tree == nil {
		return nil, fmt.Errorf("a task without its root: %s", procs[0])
	}
	dir := h.Path("/proc/" + strconv.Itoa(tree.root.pid))
	b, err := os.ReadFile(dir + "/root/count/n")
	if err != nil {
		return nil, err
	}
	if tree.count, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
		return nil, err
	}
	tree.kernels = map[alloc.NamespaceType]alloc.KernelID{}
	for _, t := range runtimeTypes(false) {
		_, id, err := kernel.ByPath(dir + "/ns/" + string(t))
		if err != nil {
			return nil, err
		}
		id.BootID = h.BootID()
		tree.kernels[t] = id
	}
	return tree, nil
}

// observation is what processes and store show at a moment at which they agree.
type observation struct {
	live  []liveTree                          // in the order of hosts
	of    map[string]*alloc.Sandbox           // by host: whose serials the tree there has
	count map[string]int                      // by host
	owned map[alloc.Serial]alloc.SandboxState // every sandbox that is not over and not a host's own
}

// runsOn is the one host where a container runs; "" for none.
func (o *observation) runsOn() string {
	hosts := make([]string, 0, len(o.live))
	for _, l := range o.live {
		hosts = append(hosts, l.host)
	}
	return strings.Join(hosts, "+")
}

// observe looks at every host's processes, twice so that a count is seen to move, and at the store. An
// error says in what the two do not agree: each tree that lives is one running sandbox of its host, with
// the tree's namespaces bound in it, and the store has no other sandbox that runs, is dumped, or is claimed.
//
// External are the types of namespaces that a container was handed in. Such a one lives on without it, in a
// running sandbox of its own or in the container's.
func (p *pool) observe(kernel *kernelns.Kernel, before map[string]int, external map[alloc.NamespaceType]bool) (*observation, error) {
	o := &observation{of: map[string]*alloc.Sandbox{}, count: map[string]int{}, owned: map[alloc.Serial]alloc.SandboxState{}}
	for _, h := range p.Hosts() {
		l, err := liveOn(kernel, h)
		if err != nil {
			return nil, fmt.Errorf("host %s: %w", h.Name(), err)
		}
		if l != nil {
			o.live = append(o.live, *l)
			o.count[l.host] = l.count
		}
	}
	var stored []*alloc.Sandbox
	for s, err := range p.Client().Sandboxes(p.ctx(), client.Filter{
		States: []alloc.SandboxState{alloc.StateRunning, alloc.StateDumped, alloc.StateClaimed}, Linearizable: true,
	}) {
		if err != nil {
			return nil, err
		}
		if !s.OfHost {
			stored = append(stored, s)
			o.owned[s.Serial] = s.State
		}
	}
	given, err := p.given(kernel, external)
	if err != nil {
		return nil, err
	}
	if stored, err = withoutGiven(stored, given); err != nil {
		return nil, err
	}
	for _, l := range o.live {
		for t := range external {
			delete(l.kernels, t)
		}
		i := slices.IndexFunc(stored, func(s *alloc.Sandbox) bool { return s.Owner == l.host && s.State == alloc.StateRunning && binds(s, l) })
		if i < 0 {
			return nil, fmt.Errorf("the store has no running sandbox of host %s for %s; it has %s", l.host, l.root, describe(stored))
		}
		o.of[l.host] = stored[i]
		stored = slices.Delete(stored, i, i+1)
	}
	if len(stored) > 0 {
		return nil, fmt.Errorf("the store has %s, and no such process is seen", describe(stored))
	}
	for host, n := range o.count {
		if last, seen := before[host]; !seen || n <= last {
			before[host] = min(n, cmp.Or(last, n))
			return o, errors.New("host " + host + ": the counter was not seen to count")
		}
	}
	return o, nil
}

// binds reports whether every own namespace of a tree is bound in a sandbox.
func binds(s *alloc.Sandbox, l liveTree) bool {
	for t, id := range l.kernels {
		if !slices.ContainsFunc(s.Bindings, func(b alloc.Binding) bool { return b.Live() && b.Type == t && b.Kernel.Key(t) == id.Key(t) }) {
			return false
		}
	}
	return true
}

func describe(list []*alloc.Sandbox) string {
	var all []string
	for _, s := range list {
		all = append(all, fmt.Sprintf("sandbox %s %s on host %s", s.Serial, s.State, s.Owner))
	}
	return cmp.Or(strings.Join(all, ", "), "none")
}
