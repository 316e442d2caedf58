package agent

import (
	"context"
	"fmt"
	"slices"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// refuseStrays refuses the dump of a tree in the host's PID namespace that has processes outside of it: in
// its namespaces, but not below its root, because their parent died and the host's PID 1 took them, or
// because they entered. CRIU dumps what is below the root and knows of no others, and nothing ends them
// with the root: they would live on in namespaces whose serials are on another host. A PID namespace
// of its own takes its orphans, and the others with it when it goes.
func (a *Agent) refuseStrays(ctx context.Context, n *run, s *alloc.Sandbox, root kernelns.Process) error {
	if !a.isHosts(alloc.PID, root.Namespaces[alloc.PID]) {
		return nil
	}
	// The tree is not frozen yet. A process that it starts or loses while it is swept can look like a stray
	// once; one that is seen so twice is.
	seen, err := a.strays(ctx, n, s, root)
	if err != nil || len(seen) == 0 {
		return err
	}
	still, err := a.strays(ctx, n, s, root)
	if err != nil {
		return err
	}
	for _, p := range still {
		if slices.ContainsFunc(seen, func(q kernelns.Process) bool { return q.PID == p.PID && q.StartTime == p.StartTime }) {
			return fmt.Errorf("process %d (%s) lives in the container's namespaces and not below its first process %d, so the dump would leave it behind; end it, or give the container a PID namespace of its own", p.PID, p.Comm, root.PID)
		}
	}
	return nil
}

// strays looks once for the processes that refuseStrays refuses.
func (a *Agent) strays(ctx context.Context, n *run, s *alloc.Sandbox, root kernelns.Process) ([]kernelns.Process, error) {
	procs, err := a.kernel.Sweep(ctx)
	if err != nil {
		return nil, err
	}
	in := map[int]bool{}
	for _, top := range []int{root.PID, n.rec.CRIUPID} {
		for _, p := range kernelns.Descendants(procs, top) {
			in[p.PID] = true
		}
	}
	var found []kernelns.Process
	for _, p := range procs {
		if in[p.PID] || !a.ownsNamespace(p) || isDying(task{p.PID, p.StartTime}) {
			continue
		}
		if of := a.sandboxOf(p); of != nil && of.Serial == s.Serial {
			found = append(found, p)
		}
	}
	return found, nil
}
