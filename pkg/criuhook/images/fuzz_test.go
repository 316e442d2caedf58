//go:build linux

package images

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// FuzzJoin pairs tasks of images with processes of any shape, and compares with what the pairing is defined
// to be, asked of every pair of tasks.
func FuzzJoin(f *testing.F) {
	f.Add([]byte("\x02\x00\x01\x11\x11\x11\x01\x12\x11\x11\x02\x01\x11\x11\x11\x02\x12\x11\x11"))
	f.Add([]byte("\x03\x01\x01\x11\x22\x33\x00\x01\x11\x22\x00\x01\x12\x22\x33\x03\x01\x11\x22\x33\x02\x11\x22\x00\x03\x12\x22\x33"))
	for _, dir := range []string{"testdata/nested", "testdata/shared"} {
		f.Add(spell(mustRead(f, dir)))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, procs := world(b)
		live, joins := livePIDs(s, procs)
		j, err := Join(s, procs)
		if (err == nil) != joins {
			t.Fatalf("Join says %v, by definition it succeeds: %v\n%+v\n%+v", err, joins, s, procs)
		}
		if err != nil {
			checkSaid(t, err)
			return
		}
		for vpid, p := range j.Live {
			if !slices.Contains(live[vpid], p.PID) {
				t.Errorf("task %d is process %d, its processes are %v", vpid, p.PID, live[vpid])
			}
		}
		list, err := Namespaces(s, j)
		if why := partition(s, j); (err == nil) != (why == "") {
			t.Fatalf("Namespaces says %v, by definition: %q\n%+v\n%+v", err, why, s, j)
		}
		if err != nil {
			checkSaid(t, err)
			return
		}
		checkNamespaces(t, s, j, list)
	})
}

// types are those that the fuzzer plays with: what joins one joins all.
var types = []alloc.NamespaceType{alloc.Mnt, alloc.Net, alloc.PID}

// world makes images of a few tasks and a few processes of bytes, all small numbers, so that many of them meet.
func world(b []byte) (*Set, []Process) {
	next := func(most int) int {
		if len(b) == 0 {
			return 0
		}
		v := int(b[0]) % (most + 1)
		b = b[1:]
		return v
	}
	s := &Set{Host: map[alloc.NamespaceType]uint32{}, External: map[ID]string{}}
	tasks := 1 + next(4)
	for _, t := range types {
		if id := next(3); id > 0 {
			s.Host[t] = uint32(id)
		}
	}
	for i := range tasks {
		task := Task{VPID: i + 1, PPID: min(i, 1)}
		if next(7) > 0 || i == 0 {
			task.IDs = map[alloc.NamespaceType]uint32{}
			for _, t := range types {
				if id := next(3); id > 0 {
					task.IDs[t] = uint32(id)
				}
			}
		}
		s.Tasks = append(s.Tasks, task)
	}
	if next(1) == 1 {
		s.External[ID{alloc.Net, uint32(1 + next(2))}] = "key"
	}
	var procs []Process
	for range next(6) {
		p := Process{PID: 100 + next(6), Namespaces: map[alloc.NamespaceType]alloc.KernelID{}}
		for range next(2) {
			p.VPIDs = append(p.VPIDs, 1+next(5))
		}
		for _, t := range types {
			switch n := next(5); n {
			case 0:
			case 4, 5: // the kernel has no ids: the inode tells
				p.Namespaces[t] = alloc.KernelID{BootID: "b", Inode: uint64(n), Weak: true}
			default:
				p.Namespaces[t] = alloc.KernelID{BootID: "b", ID: uint64(n), Inode: 1}
			}
		}
		procs = append(procs, p)
	}
	return s, procs
}

// spell is the bytes of which world makes a set of the shape of s, with processes that are its tasks.
func spell(s *Set) []byte {
	small := map[alloc.NamespaceType]map[uint32]byte{}
	id := func(t alloc.NamespaceType, n uint32) byte {
		if small[t] == nil {
			small[t] = map[uint32]byte{}
		}
		if _, ok := small[t][n]; !ok {
			small[t][n] = byte(len(small[t]) + 1)
		}
		return small[t][n]
	}
	tasks := s.Tasks[:min(len(s.Tasks), 5)]
	b := []byte{byte(len(tasks) - 1)}
	for _, t := range types {
		b = append(b, id(t, s.Host[t]))
	}
	var procs []byte
	for i, task := range tasks {
		if task.Dead() {
			b = append(b, 0)
			continue
		}
		b = append(b, 1)
		procs = append(procs, byte(i), 1, byte(i))
		for _, t := range types {
			b, procs = append(b, id(t, task.IDs[t])), append(procs, id(t, task.IDs[t]))
		}
	}
	return append(append(b, 0, byte(len(procs)/6)), procs...)
}

// livePIDs finds the processes of each task, and whether each task has the one that it must have.
func livePIDs(s *Set, procs []Process) (map[int][]int, bool) {
	live, ok := map[int][]int{}, true
	named := map[int]bool{}
	for _, p := range procs {
		if len(p.VPIDs) == 0 {
			return nil, false
		}
		vpid := p.VPIDs[len(p.VPIDs)-1]
		if vpid > len(s.Tasks) {
			continue
		}
		if !slices.Contains(live[vpid], p.PID) {
			live[vpid] = append(live[vpid], p.PID)
		}
		named[vpid] = len(p.Namespaces) > 0 // of the same process twice, the last counts
	}
	for _, t := range s.Tasks {
		if len(live[t.VPID]) > 1 || !t.Dead() && (len(live[t.VPID]) == 0 || !named[t.VPID]) {
			ok = false
		}
	}
	return live, ok
}

// partition says why ids and live namespaces do not divide the tasks in the same way; "" if they do.
func partition(s *Set, j *Joined) string {
	for _, typ := range types {
		for _, a := range s.Tasks {
			ka, ok := j.Live[a.VPID].Namespaces[typ]
			if a.IDs[typ] == 0 {
				continue
			}
			if !ok {
				return fmt.Sprintf("task %d has no %s", a.VPID, typ)
			}
			for _, b := range s.Tasks {
				kb := j.Live[b.VPID].Namespaces[typ]
				if b.IDs[typ] != 0 && (a.IDs[typ] == b.IDs[typ]) != (ka.Key(typ) == kb.Key(typ)) {
					return fmt.Sprintf("tasks %d and %d differ in %s", a.VPID, b.VPID, typ)
				}
			}
		}
	}
	return ""
}

func checkNamespaces(t *testing.T, s *Set, j *Joined, list []Namespace) {
	t.Helper()
	ids, kernel := map[ID]bool{}, map[string]bool{}
	for _, n := range list {
		key := n.Kernel.Key(n.ID.Type)
		if ids[n.ID] || kernel[key] {
			t.Errorf("%s or its namespace stands twice", n.ID)
		}
		ids[n.ID], kernel[key] = true, true
		if _, external := s.External[n.ID]; n.External != external || n.OfHost != (s.Host[n.ID.Type] == n.ID.CRIU) {
			t.Errorf("%+v", n)
		}
		var in []int
		for _, task := range s.Tasks {
			if task.IDs[n.ID.Type] == n.ID.CRIU {
				in = append(in, task.VPID)
				if j.Live[task.VPID].Namespaces[n.ID.Type].Key(n.ID.Type) != key {
					t.Errorf("task %d is not in %s", task.VPID, key)
				}
			}
		}
		if !slices.Equal(in, n.VPIDs) {
			t.Errorf("%s: tasks %v, want %v", n.ID, n.VPIDs, in)
		}
	}
	for _, task := range s.Tasks {
		for typ, id := range task.IDs {
			if !ids[ID{typ, id}] {
				t.Errorf("task %d is in %s %d, which is not listed", task.VPID, typ, id)
			}
		}
	}
}

// checkSaid: an error names the task or process and is one short line.
func checkSaid(t *testing.T, err error) {
	t.Helper()
	if s := err.Error(); len(s) > 500 || strings.Contains(s, "\n") || !strings.Contains(s, "task") && !strings.Contains(s, "process") {
		t.Errorf("refused with %q", s)
	}
}
