//go:build linux

package images

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// The directories nested and shared in testdata are of real dumps and restores (CRIU 4.1.1): images, and
// what /proc said of the tree at both stages. TestCRIU makes them.

func open(t testing.TB, dir string) *os.File {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func mustRead(t testing.TB, dir string) *Set {
	t.Helper()
	s, err := Read(open(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// recorded is what testdata/tree wrote down.
type recorded struct {
	Tree []recordedProcess
	CRIU recordedProcess
}

type recordedProcess struct {
	PID        int
	State      string
	VPIDs      []int
	Namespaces map[alloc.NamespaceType]uint64
}

func (p recordedProcess) process() Process {
	q := Process{PID: p.PID, VPIDs: p.VPIDs, Namespaces: map[alloc.NamespaceType]alloc.KernelID{}}
	for t, ino := range p.Namespaces {
		q.Namespaces[t] = alloc.KernelID{BootID: "test", Inode: ino, Weak: true}
	}
	return q
}

func processes(t testing.TB, file string) (tree []Process, criu Process) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var r recorded
	if err := json.Unmarshal(b, &r); err != nil {
		t.Fatal(err)
	}
	for _, p := range r.Tree {
		tree = append(tree, p.process())
	}
	return tree, r.CRIU.process()
}

func joined(t testing.TB, s *Set, file string) ([]Namespace, Process) {
	t.Helper()
	tree, criu := processes(t, file)
	j, err := Join(s, tree)
	if err != nil {
		t.Fatal(err)
	}
	if len(j.Extra) != 0 {
		t.Errorf("%s: processes that no task stands for: %v", file, j.Extra)
	}
	list, err := Namespaces(s, j)
	if err != nil {
		t.Fatal(err)
	}
	return list, criu
}

func TestNested(t *testing.T) { checkNested(t, "testdata/nested") }

// checkNested is of the tree that testdata/tree calls nested.
func checkNested(t *testing.T, dir string) {
	s := mustRead(t, dir)
	if len(s.RunID) != 36 {
		t.Errorf("run id %q is no UUID", s.RunID)
	}
	if len(s.Tasks) != 6 || s.Root().VPID != 1 || !s.Own() || len(s.External) != 0 {
		t.Errorf("unexpected set: %+v", s)
	}
	dead := slices.DeleteFunc(slices.Clone(s.Tasks), func(t Task) bool { return !t.Dead() })
	if len(dead) != 1 {
		t.Errorf("dead tasks %v, want one", dead)
	}
	for _, action := range []string{"post-dump", "post-restore"} {
		list, criu := joined(t, s, filepath.Join(dir, action+".json"))
		count := map[alloc.NamespaceType]int{}
		for _, n := range list {
			count[n.ID.Type]++
			if n.External {
				t.Errorf("%s: %s is external", action, n.ID)
			}
			if shared := n.ID.Type == alloc.User || n.ID.Type == alloc.Time; n.OfHost != shared {
				t.Errorf("%s: %s of host: %v", action, n.ID, n.OfHost)
			}
			of := n.Kernel == criu.Namespaces[n.ID.Type]
			want := n.OfHost
			if action == "post-restore" {
				switch n.ID.Type {
				case alloc.Time:
					want = false // CRIU makes a new one
				case alloc.Cgroup:
					want = true // CRIU leaves it out with --manage-cgroups=ignore
				}
			}
			if of != want {
				t.Errorf("%s: %s is CRIU's own: %v, want %v", action, n.ID, of, want)
			}
		}
		want := map[alloc.NamespaceType]int{alloc.Mnt: 2, alloc.Net: 2, alloc.UTS: 1, alloc.IPC: 1, alloc.PID: 1, alloc.Cgroup: 1, alloc.User: 1, alloc.Time: 1}
		if !reflect.DeepEqual(count, want) {
			t.Errorf("%s: namespaces %v, want %v", action, count, want)
		}
		if list[0].ID.Type != alloc.Mnt || len(list[0].VPIDs)+len(list[1].VPIDs) != 5 || len(list[1].VPIDs) != 2 {
			t.Errorf("%s: mount namespaces %v, %v: want 3 and 2 tasks", action, list[0], list[1])
		}
	}
}

func TestShared(t *testing.T) { checkShared(t, "testdata/shared") }

func checkShared(t *testing.T, dir string) {
	s := mustRead(t, dir)
	if len(s.Tasks) != 1 || !s.Own() {
		t.Errorf("unexpected set: %+v", s)
	}
	for _, action := range []string{"post-dump", "post-restore"} {
		list, criu := joined(t, s, filepath.Join(dir, action+".json"))
		if len(list) != 8 {
			t.Errorf("%s: namespaces %v, want 8", action, list)
		}
		for _, n := range list {
			if own := n.ID.Type == alloc.UTS || n.ID.Type == alloc.Net; n.OfHost == own {
				t.Errorf("%s: %s of host: %v", action, n.ID, n.OfHost)
			}
			if n.External != (n.ID.Type == alloc.Net) {
				t.Errorf("%s: %s external: %v", action, n.ID, n.External)
			}
			if n.External && s.External[n.ID] != "outside" {
				t.Errorf("%s: key %q", action, s.External[n.ID])
			}
			if n.OfHost && n.Kernel != criu.Namespaces[n.ID.Type] && !(n.ID.Type == alloc.Time && action == "post-restore") {
				t.Errorf("%s: %s is not CRIU's own", action, n.ID)
			}
		}
	}
}

// TestDigest: every byte of each image that says who is who counts, and nothing else does.
func TestDigest(t *testing.T) {
	before := mustRead(t, "testdata/nested").Digest
	names, err := filepath.Glob("testdata/nested/*.img")
	if err != nil || len(names) < 6 {
		t.Fatal(names, err)
	}
	for _, name := range names {
		m := load(t, "testdata/nested")
		name = filepath.Base(name)
		b := m[name]
		b[len(b)-1] ^= 1
		s, err := read(t.Context(), m)
		counts := !strings.HasPrefix(name, "netns-")
		if changed := err != nil || s.Digest != before; changed != counts {
			t.Errorf("%s: after a change of one bit: digest changed %v (%v)", name, changed, err)
		}
	}
	// A task whose ids image is cut short is damaged, not dead.
	m := load(t, "testdata/nested")
	tasks := mustRead(t, "testdata/nested").Tasks
	m[idsName(tasks[1])] = m[idsName(tasks[1])][:20]
	if s, err := read(t.Context(), m); err == nil {
		t.Errorf("accepted: %+v", s)
	}
	// Without its ids image a live task looks dead, so that must show too.
	delete(m, idsName(tasks[1]))
	if s, err := read(t.Context(), m); err != nil || s.Digest == before {
		t.Errorf("an ids image was removed: %v", err)
	}
}
