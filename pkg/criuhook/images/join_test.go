//go:build linux

package images

import (
	"strings"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// pair is a tree of two tasks and a zombie, and its processes; each task in a network namespace of its own.
func pair() (*Set, []Process) {
	ids := func(net uint32) map[alloc.NamespaceType]uint32 {
		return map[alloc.NamespaceType]uint32{alloc.Net: net, alloc.UTS: 3}
	}
	live := func(net uint64) map[alloc.NamespaceType]alloc.KernelID {
		return map[alloc.NamespaceType]alloc.KernelID{
			alloc.Net: {BootID: "b", ID: net, Inode: 9}, alloc.UTS: {BootID: "b", ID: 30, Inode: 9}, alloc.Time: {BootID: "b", ID: 40},
		}
	}
	s := &Set{
		Host:  map[alloc.NamespaceType]uint32{alloc.UTS: 3},
		Tasks: []Task{{VPID: 1, IDs: ids(10)}, {VPID: 2, PPID: 1, IDs: ids(11)}, {VPID: 3, PPID: 1}},
	}
	return s, []Process{
		{PID: 101, VPIDs: []int{101, 1}, Namespaces: live(100)},
		{PID: 102, VPIDs: []int{102, 2}, Namespaces: live(110)},
	}
}

func TestJoin(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(s *Set, p []Process) []Process
		extra  int
		bad    string // what the error names
	}{
		{name: "straight", change: func(s *Set, p []Process) []Process { return p }},
		{name: "zombie alive", change: func(s *Set, p []Process) []Process {
			return append(p, Process{PID: 103, VPIDs: []int{103, 3}})
		}},
		{name: "the host's pid namespace", change: func(s *Set, p []Process) []Process {
			p[0].VPIDs, p[1].VPIDs = []int{1}, []int{2}
			return p
		}},
		{name: "named twice", change: func(s *Set, p []Process) []Process { return append(p, p[0]) }},
		{name: "helper", extra: 1, change: func(s *Set, p []Process) []Process {
			return append(p, Process{PID: 104, VPIDs: []int{104, 4}})
		}},
		{name: "missing", bad: "task 2", change: func(s *Set, p []Process) []Process { return p[:1] }},
		{name: "ambiguous", bad: "process 105", change: func(s *Set, p []Process) []Process {
			return append(p, Process{PID: 105, VPIDs: []int{105, 2}})
		}},
		{name: "no NSpid", bad: "process 102", change: func(s *Set, p []Process) []Process { p[1].VPIDs = nil; return p }},
		{name: "dead by now", bad: "process 102", change: func(s *Set, p []Process) []Process { p[1].Namespaces = nil; return p }},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, procs := pair()
			j, err := Join(s, c.change(s, procs))
			if c.bad != "" {
				if err == nil || !strings.Contains(err.Error(), c.bad) {
					t.Errorf("error %v, want one that names %s", err, c.bad)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if len(j.Extra) != c.extra || j.Live[1].PID != 101 || j.Live[2].PID != 102 {
				t.Errorf("%+v", j)
			}
			list, err := Namespaces(s, j)
			if err != nil || len(list) != 3 || list[0].ID.Type != alloc.UTS || !list[0].OfHost || list[2].ID.CRIU != 11 {
				t.Errorf("%+v, %v", list, err)
			}
		})
	}
}

// TestPartition: ids and live namespaces must divide the tasks in the same way.
func TestPartition(t *testing.T) {
	for name, change := range map[string]func(s *Set, j *Joined){
		"one id, two namespaces":  func(s *Set, j *Joined) { s.Tasks[1].IDs[alloc.Net] = 10 },
		"two ids, one namespace":  func(s *Set, j *Joined) { j.Live[2].Namespaces[alloc.Net] = j.Live[1].Namespaces[alloc.Net] },
		"crossed":                 func(s *Set, j *Joined) { third(s, j, 10, 110) },
		"no such namespace alive": func(s *Set, j *Joined) { delete(j.Live[2].Namespaces, alloc.Net) },
		"not joined":              func(s *Set, j *Joined) { delete(j.Live, 2) },
		"crossed the other way":   func(s *Set, j *Joined) { third(s, j, 11, 100) },
	} {
		t.Run(name, func(t *testing.T) {
			s, procs := pair()
			j, err := Join(s, procs)
			if err != nil {
				t.Fatal(err)
			}
			change(s, j)
			if list, err := Namespaces(s, j); err == nil {
				t.Errorf("accepted: %+v", list)
			}
		})
	}
	t.Run("a type that the source did not have", func(t *testing.T) {
		s, procs := pair()
		delete(s.Tasks[0].IDs, alloc.UTS)
		delete(s.Tasks[1].IDs, alloc.UTS)
		j, err := Join(s, procs)
		if err != nil {
			t.Fatal(err)
		}
		if list, err := Namespaces(s, j); err != nil || len(list) != 2 {
			t.Errorf("%+v, %v", list, err)
		}
	})
}

// third adds a live task that is in both.
func third(s *Set, j *Joined, id uint32, kernel uint64) {
	s.Tasks[2].IDs = map[alloc.NamespaceType]uint32{alloc.Net: id}
	j.Live[3] = Process{PID: 103, Namespaces: map[alloc.NamespaceType]alloc.KernelID{alloc.Net: {BootID: "b", ID: kernel}}}
}

func TestOwn(t *testing.T) {
	s, _ := pair()
	s.Host = map[alloc.NamespaceType]uint32{alloc.UTS: 3, alloc.Net: 10}
	if !s.Own() {
		t.Error("the second task's network namespace is not the host's")
	}
	s.Tasks[1].IDs[alloc.Net] = 10
	if s.Own() {
		t.Error("all namespaces are the host's")
	}
}
