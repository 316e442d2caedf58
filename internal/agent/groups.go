package agent

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// group is the processes that make one sandbox: a tree whose members all have namespaces that are
// not the host's, and one PID namespace.
type group struct {
	root  kernelns.Process
	procs []kernelns.Process
}

// groups splits what a sweep saw. A PID namespace is a border, because a dump cannot cross it; without
// one of its own, a tree reaches as far as namespaces of its own do. Oldest root first, so that a
// process that entered a container later finds the container's namespaces numbered with the container.
func (a *Agent) groups(procs []kernelns.Process) []group {
	byPID := make(map[int]int, len(procs))
	for i, p := range procs {
		byPID[p.PID] = i
	}
	roots := make([]int, len(procs)) // index of the root of each; -1 not known yet, -2 none
	for i := range roots {
		roots[i] = -1
	}
	var rootOf func(i, depth int) int
	rootOf = func(i, depth int) int {
		if roots[i] != -1 {
			return roots[i]
		}
		p := procs[i]
		roots[i] = -2
		if !a.ownsNamespace(p) {
			return -2
		}
		roots[i] = i
		// A pid that was reused during the sweep could close a circle of parents; depth ends it.
		if parent, ok := byPID[p.PPID]; ok && parent != i && depth < len(procs) && procs[parent].Namespaces[alloc.PID] == p.Namespaces[alloc.PID] {
			if r := rootOf(parent, depth+1); r >= 0 {
				roots[i] = r
			}
		}
		return roots[i]
	}
	byRoot := map[int]*group{}
	for i, p := range procs {
		r := rootOf(i, 0)
		if r < 0 {
			continue
		}
		g := byRoot[r]
		if g == nil {
			g = &group{root: procs[r]}
			byRoot[r] = g
		}
		g.procs = append(g.procs, p)
	}
	list := make([]group, 0, len(byRoot))
	for _, g := range byRoot {
		list = append(list, *g)
	}
	slices.SortFunc(list, func(x, y group) int {
		return cmp.Or(cmp.Compare(x.root.StartTime, y.root.StartTime), cmp.Compare(x.root.PID, y.root.PID))
	})
	return list
}

// ownsNamespace reports whether p is in a namespace that is not the host's.
func (a *Agent) ownsNamespace(p kernelns.Process) bool {
	for t, k := range p.Namespaces {
		if !a.isHosts(t, k) {
			return true
		}
	}
	return false
}

func (a *Agent) isHosts(t alloc.NamespaceType, k alloc.KernelID) bool {
	return a.host[t].Key(t) == k.Key(t)
}

// leading is the order in which a root's namespaces say which sandbox it is: containers of a pod share
// net, ipc and uts with each other, but hardly ever mnt.
var leading = []alloc.NamespaceType{alloc.Mnt, alloc.PID, alloc.Net, alloc.IPC, alloc.UTS, alloc.Cgroup, alloc.User, alloc.Time}

// sandboxOf finds the sandbox that a tree belongs to, by its root: the one that holds the root's first
// own namespace; nil for none yet. Where the first has no serial, the tree may have made it after the
// sweep saw the others: then its sandbox is the one of a later type that has no live namespace of the
// first. A pod's sandbox does not pass for its containers': it has one; nor does that of a namespace that
// was handed in.
func (a *Agent) sandboxOf(root kernelns.Process) *alloc.Sandbox {
	var without []alloc.NamespaceType
	for _, t := range leading {
		k, ok := root.Namespaces[t]
		if !ok || a.isHosts(t, k) {
			continue
		}
		p, ok := a.book.find(t, k)
		if !ok {
			without = append(without, t)
			continue
		}
		s := a.book.sandbox(p.sandbox)
		if s == nil || len(without) > 0 && (s.OfHost || s.Labels[labelHandedIn] != "" || a.hasAny(s, without)) {
			return nil
		}
		return s
	}
	return nil
}

// hasAny reports whether a sandbox has a namespace of one of the types that lives, or may.
func (a *Agent) hasAny(s *alloc.Sandbox, types []alloc.NamespaceType) bool {
	for _, b := range s.Bindings {
		if !b.Live() || !slices.Contains(types, b.Type) {
			continue
		}
		if alive, err := a.kernel.Alive(b.Type, b.Kernel); alive || err != nil {
			return true
		}
	}
	return false
}

// unnumbered is a namespace of a tree that has no serial yet.
type unnumbered struct {
	t alloc.NamespaceType
	k alloc.KernelID
}

// missing lists the own namespaces of procs that the book does not know, in the order of types.
func (a *Agent) missing(procs []kernelns.Process) []unnumbered {
	seen := map[string]bool{}
	var list []unnumbered
	for _, t := range alloc.NamespaceTypes() {
		for _, p := range procs {
			k, ok := p.Namespaces[t]
			if !ok || a.isHosts(t, k) || seen[k.Key(t)] {
				continue
			}
			seen[k.Key(t)] = true
			if _, ok := a.book.find(t, k); !ok {
				list = append(list, unnumbered{t, k})
			}
		}
	}
	return list
}

// labelsOf is what the pool is told of a tree, for people to recognize it. A process calls itself what it
// likes; the pool takes text.
func labelsOf(root kernelns.Process) map[string]string {
	labels := map[string]string{"command": clip(root.Comm)}
	if root.Cgroup != "" && root.Cgroup != "/" {
		labels["cgroup"] = clip(root.Cgroup)
	}
	return labels
}

// clip makes a label's value what the pool takes: at most 256 bytes of UTF-8 in which everything prints.
func clip(s string) string {
	const most = 256
	s = strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !strconv.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
	for len(s) > most { // the end of a cgroup path names the container
		_, size := utf8.DecodeRuneInString(s)
		s = s[size:]
	}
	return s
}
