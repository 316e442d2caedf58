//go:build linux

package kernelns

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
)

// Sweep reads every process that the proc file system shows, in order of pid. Processes that vanish
// meanwhile are left out; one whose namespaces cannot be read carries the reason in Err.
//
// It is no snapshot: a process born during the sweep may be missed although its parent is there.
//
// The namespaces are read anew each time, whatever was seen before: a process may have left its
// namespaces since, and equal inode numbers do not show that it has not, because the kernel gives a
// freed number to the next namespace at once. What a process cannot change is remembered from sweep to
// sweep under (pid, start time), for live processes only.
func (k *Kernel) Sweep(ctx context.Context) ([]Process, error) {
	k.sweeping.Lock()
	defer k.sweeping.Unlock()
	pids, err := k.pids()
	if err != nil {
		return nil, err
	}
	procs := make([]Process, 0, len(pids))
	seen := make(map[int]Process, len(pids))
	buf := make([]byte, 0, 4096)
	for _, pid := range pids {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("sweep of %s stopped half way: %w", k.proc, context.Cause(ctx))
		}
		var known *Process
		if p, ok := k.seen[pid]; ok {
			known = &p
		}
		p, err := k.read(pid, known, buf)
		if errors.Is(err, ErrGone) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("sweep: %w", err)
		}
		procs = append(procs, p)
		seen[pid] = p
	}
	k.seen = seen
	return procs, nil
}

func (k *Kernel) pids() ([]int, error) {
	d, err := os.Open(k.proc)
	if err != nil {
		return nil, fmt.Errorf("sweep: %w", err)
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("sweep: list %s: %w", k.proc, err)
	}
	pids := make([]int, 0, len(names))
	for _, n := range names {
		if pid, err := strconv.Atoi(n); err == nil {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids, nil
}

// unchanged reports whether p shows no sign that it was moved to another cgroup since it was seen as
// was. A runtime moves a container's first process while that is still called after the runtime, or
// makes its namespaces then.
func (was *Process) unchanged(p Process) bool {
	return was.Comm == p.Comm && was.PPID == p.PPID && maps.Equal(was.Namespaces, p.Namespaces)
}

// Descendants returns the process root and everything below it by parent, parents first; nil if root is
// not among procs. A process whose parent died hangs below the reaper it was given: inside a pid
// namespace that is the namespace's init, without one it may be outside of the tree.
func Descendants(procs []Process, root int) []Process {
	children := make(map[int][]int, len(procs))
	var tree []Process
	for i, p := range procs {
		if p.PID == root {
			tree = append(tree, p)
		} else {
			children[p.PPID] = append(children[p.PPID], i)
		}
	}
	for i := 0; i < len(tree); i++ {
		below := children[tree[i].PID]
		delete(children, tree[i].PID) // procs that contradict themselves must not make us loop
		for _, c := range below {
			tree = append(tree, procs[c])
		}
	}
	return tree
}
