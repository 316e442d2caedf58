//go:build linux

package images

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Process is a live process of the tree that the images are of: its root and every descendant.
type Process struct {
	PID int
	// VPIDs is the line NSpid of /proc/PID/status: the process's pids from the reader's PID namespace
	// inwards.
	VPIDs []int
	// Namespaces need not be there for a zombie (the kernel still shows two of its links).
	Namespaces map[alloc.NamespaceType]alloc.KernelID
}

// Joined is a set of images together with the processes that they are of.
type Joined struct {
	// Live has the process of each task, by the task's VPID. Tasks that CRIU dumped dead may be
	// missing; no others are.
	Live map[int]Process
	// Extra are processes that no task stands for. There are none while the tree is frozen. After a
	// restore there may be: helpers that CRIU forks for session leaders that are long dead, and that end
	// before the tree runs.
	Extra []Process
}

// Join finds the process of each task: the one whose innermost pid is the task's. That holds also for a
// tree in the host's PID namespace, where the innermost pid is the only one; CRIU asks the task itself
// (getpid) and refuses trees with nested PID namespaces.
//
// It fails if a task that CRIU dumped alive has no process, or two: then these are not the images of
// this tree.
func Join(s *Set, procs []Process) (*Joined, error) {
	tasks := make(map[int]Task, len(s.Tasks))
	for _, t := range s.Tasks {
		tasks[t.VPID] = t
	}
	j := &Joined{Live: make(map[int]Process, len(s.Tasks))}
	for _, p := range procs {
		if len(p.VPIDs) == 0 {
			return nil, fmt.Errorf("process %d has no pid in its own PID namespace: its status was not read (line NSpid)", p.PID)
		}
		vpid := p.VPIDs[len(p.VPIDs)-1]
		if _, ok := tasks[vpid]; !ok {
			j.Extra = append(j.Extra, p)
			continue
		}
		if other, ok := j.Live[vpid]; ok && other.PID != p.PID {
			return nil, fmt.Errorf("task %d of the images is both process %d and process %d: the tree has nested PID namespaces, or two trees were taken for one", vpid, other.PID, p.PID)
		}
		j.Live[vpid] = p
	}
	for _, t := range s.Tasks {
		if t.Dead() {
			continue
		}
		p, ok := j.Live[t.VPID]
		if !ok {
			return nil, fmt.Errorf("task %d of the images has no live process: it ended, or the images are not of this tree", t.VPID)
		}
		if len(p.Namespaces) == 0 {
			return nil, fmt.Errorf("task %d of the images is process %d, which is dead or whose namespaces could not be read", t.VPID, p.PID)
		}
	}
	return j, nil
}

// Namespace is one namespace of a dump, with the kernel namespace that it is, at the time and place of
// the processes that it was joined with.
type Namespace struct {
	ID ID
	// OfHost: the dumping CRIU was in it too, so its serial does not move. Kernel is then the reader's
	// host's own, but not always: CRIU (4.1, 4.2) restores a tree from the host's time namespace into a
	// new one. Nor is Kernel always another than the host's where OfHost is false: with
	// --manage-cgroups=ignore CRIU restores no cgroup namespace, and the tree is left in its own. So
	// whoever restores compares Kernel with what the host is in.
	OfHost bool
	// External: CRIU was told to join it, not to restore it; Set.External has the key.
	External bool
	Kernel   alloc.KernelID
	// VPIDs are the tasks in it, in the order of the images.
	VPIDs []int
}

// Namespaces lists the namespaces of the images in the order of alloc.NamespaceTypes, then of CRIU's
// ids. It fails unless the ids of a type and its live namespaces are the same partition of the tasks:
// one id in two namespaces, or two ids in one, mean that images and processes are not of the same tree.
// Dead tasks say nothing.
func Namespaces(s *Set, j *Joined) ([]Namespace, error) {
	type live struct {
		t   alloc.NamespaceType
		key string
	}
	byID := map[ID]*Namespace{}
	byLive := map[live]*Namespace{}
	for _, task := range s.Tasks {
		p, ok := j.Live[task.VPID]
		if task.Dead() {
			continue
		}
		if !ok {
			return nil, fmt.Errorf("task %d of the images was not joined with a process", task.VPID)
		}
		for _, t := range alloc.NamespaceTypes() {
			id := ID{t, task.IDs[t]}
			k, ok := p.Namespaces[t]
			if id.CRIU == 0 {
				continue // the source's kernel had no such type
			}
			if !ok {
				return nil, fmt.Errorf("task %d is in %s, but nothing is known of the %s namespace of its process %d", task.VPID, id, t, p.PID)
			}
			n, l := byID[id], live{t, k.Key(t)}
			switch other := byLive[l]; {
			case n == nil && other == nil:
				_, external := s.External[id]
				n = &Namespace{ID: id, OfHost: s.Host[t] == id.CRIU, External: external, Kernel: k}
				byID[id], byLive[l] = n, n
			case n == nil:
				return nil, fmt.Errorf("task %d is in %s, but its process %d shares %s with task %d, which is in %s", task.VPID, id, p.PID, l.key, other.VPIDs[0], other.ID)
			case n != other:
				return nil, fmt.Errorf("task %d is in %s together with task %d, but its process %d is in %s and the other's in %s", task.VPID, id, n.VPIDs[0], p.PID, l.key, n.Kernel.Key(t))
			}
			n.VPIDs = append(n.VPIDs, task.VPID)
		}
	}
	list := make([]Namespace, 0, len(byID))
	for _, n := range byID {
		list = append(list, *n)
	}
	order := alloc.NamespaceTypes()
	slices.SortFunc(list, func(a, b Namespace) int {
		if d := slices.Index(order, a.ID.Type) - slices.Index(order, b.ID.Type); d != 0 {
			return d
		}
		return cmp.Compare(a.ID.CRIU, b.ID.CRIU)
	})
	return list, nil
}
