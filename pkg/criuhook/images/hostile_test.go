//go:build linux

package images

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// files is a source in memory.
type files map[string][]byte

func (m files) read(name string, most int64) ([]byte, error) {
	b, ok := m[name]
	if !ok {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	if int64(len(b)) > most {
		return nil, tooLarge(name, most)
	}
	return b, nil
}

func load(t testing.TB, dir string) files {
	t.Helper()
	m := files{}
	names, err := filepath.Glob(dir + "/*.img")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		m[filepath.Base(name)] = b
	}
	return m
}

func image(magic uint32, entries ...[]byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, magicCommon)
	b = binary.LittleEndian.AppendUint32(b, magic)
	for _, e := range entries {
		b = append(binary.LittleEndian.AppendUint32(b, uint32(len(e))), e...)
	}
	return b
}

// message makes a message of varints, as pairs of field and value.
func message(pairs ...uint64) []byte {
	var b []byte
	for i := 0; i < len(pairs); i += 2 {
		b = protowire.AppendVarint(protowire.AppendTag(b, protowire.Number(pairs[i]), protowire.VarintType), pairs[i+1])
	}
	return b
}

func task(pid, ppid uint64) []byte { return message(1, pid, 2, ppid, 3, 1, 4, 1) }

func TestHostileImages(t *testing.T) {
	good := load(t, "testdata/shared")
	root := mustRead(t, "testdata/shared").Root()
	ids, pid := idsName(root), uint64(root.VPID)
	for name, change := range map[string]func(m files){
		"no inventory":         func(m files) { delete(m, "inventory.img") },
		"no pstree":            func(m files) { delete(m, "pstree.img") },
		"no ids of the root":   func(m files) { delete(m, ids) },
		"empty file":           func(m files) { m["pstree.img"] = nil },
		"magic only":           func(m files) { m["pstree.img"] = image(magicPSTree) },
		"another image":        func(m files) { m["pstree.img"] = m["inventory.img"] },
		"cut short":            func(m files) { m["inventory.img"] = m["inventory.img"][:40] },
		"size of 4 GiB":        func(m files) { m[ids] = append(image(magicIDs), 0xff, 0xff, 0xff, 0xff, 1) },
		"two entries":          func(m files) { m[ids] = append(m[ids], m[ids][8:]...) },
		"required fields gone": func(m files) { m[ids] = image(magicIDs, nil) },
		"no namespaces":        func(m files) { m[ids] = image(magicIDs, message(1, 1, 2, 1, 3, 1, 4, 1)) },
		"no root_ids":          func(m files) { m["inventory.img"] = image(magicInventory, message(1, 2)) },
		"garbage":              func(m files) { m["inventory.img"] = image(magicInventory, []byte{0xff, 0xff, 0xff}) },
		"too large":            func(m files) { m["inventory.img"] = make([]byte, maxInventory+1) },
		"ids too large":        func(m files) { m[ids] = image(magicIDs, append(m[ids][12:], padding(maxIDs)...)) },
		"run id not text": func(m files) {
			m["inventory.img"] = image(magicInventory, append(m["inventory.img"][8:], fieldRunID<<3|2, 1, 0xff))
		},
		"run id too long": func(m files) {
			m["inventory.img"] = image(magicInventory, append(append(m["inventory.img"][8:], fieldRunID<<3|2, 65), make([]byte, 65)...))
		},
		"pid 0":          func(m files) { m["pstree.img"] = image(magicPSTree, task(0, 0)) },
		"pid too large":  func(m files) { m["pstree.img"] = image(magicPSTree, task(1<<31, 0)) },
		"pid twice":      func(m files) { m["pstree.img"] = image(magicPSTree, task(pid, 0), task(pid, pid)) },
		"two roots":      func(m files) { m["pstree.img"] = image(magicPSTree, task(pid, 0), task(pid+1, 0)) },
		"no root":        func(m files) { m["pstree.img"] = image(magicPSTree, task(pid, pid)) },
		"unknown parent": func(m files) { m["pstree.img"] = image(magicPSTree, task(pid, 0), task(pid+1, pid+2)) },
		"too many tasks": func(m files) {
			m["pstree.img"] = append(image(magicPSTree), make([]byte, 4*(maxTasks+1))...)
		},
		"external key not text": func(m files) { m["netns-9.img"] = image(magicNetNS, []byte{8<<3 | 2, 1, 0xff}) },
		"external key too long": func(m files) {
			m["netns-9.img"] = image(magicNetNS, protowire.AppendString([]byte{8<<3 | 2}, strings.Repeat("k", maxText+1)))
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := files{}
			for k, v := range good {
				m[k] = bytes.Clone(v)
			}
			change(m)
			s, err := read(t.Context(), m)
			if err == nil {
				t.Errorf("accepted: %+v", s)
			}
			if strings.HasPrefix(name, "no inv") && !errors.Is(err, ErrIncomplete) {
				t.Errorf("%v does not match ErrIncomplete", err)
			}
		})
	}
	t.Run("run id of CRIU before 4.1", func(t *testing.T) {
		m := load(t, "testdata/shared")
		var b []byte
		for rest := m["inventory.img"][8:]; len(rest) > 0; {
			num, _, n := protowire.ConsumeField(rest)
			if num != fieldRunID {
				b = append(b, rest[:n]...)
			}
			rest = rest[n:]
		}
		m["inventory.img"] = image(magicInventory, b)
		if s, err := read(t.Context(), m); err != nil || s.RunID != "" {
			t.Error(s, err)
		}
	})
}

// padding is a field that nobody knows, of n bytes and a few.
func padding(n int) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, 999, protowire.BytesType), make([]byte, n))
}

// crowd is a source of maxTasks tasks, each with namespaces of its own. Their images are as large as they
// may be, or small; done is called with the number of files that were read.
type crowd struct {
	large bool
	n     int
	done  func(n int)
}

func (c *crowd) read(name string, most int64) ([]byte, error) {
	if c.n++; c.done != nil {
		c.done(c.n)
	}
	var b []byte
	switch {
	case name == "inventory.img":
		b = image(magicInventory, protowire.AppendBytes(protowire.AppendTag(message(1, 2), 3, protowire.BytesType), message(1, 1, 2, 1, 3, 1, 4, 1)))
	case name == "pstree.img":
		tasks := [][]byte{task(1, 0)}
		for pid := uint64(2); pid <= maxTasks; pid++ {
			tasks = append(tasks, task(pid, 1))
		}
		return image(magicPSTree, tasks...), nil
	default:
		ids := message(1, 1, 2, 1, 3, 1, 4, 1, 5, uint64(c.n), 6, uint64(c.n))
		if c.large {
			ids = append(ids, padding(int(most)-64)...)
		}
		b = image(magicIDs, ids)
		if !strings.HasPrefix(name, "ids-") {
			return nil, fs.ErrNotExist
		}
	}
	if int64(len(b)) > most {
		return nil, tooLarge(name, most)
	}
	return b, nil
}

// TestCrowd: as many tasks as there may be are read; not if each costs as much as one may; and not when
// nobody waits any more.
func TestCrowd(t *testing.T) {
	if s, err := read(t.Context(), &crowd{}); err != nil || len(s.Tasks) != maxTasks {
		t.Error(err)
	}
	large := &crowd{large: true}
	if _, err := read(t.Context(), large); err == nil || !strings.Contains(err.Error(), "bytes were read") || large.n > maxTotal/(maxIDs-100)+3 {
		t.Errorf("%v after %d files", err, large.n)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	left := errors.New("left")
	c := &crowd{done: func(n int) {
		if n == 1000 {
			cancel(left)
		}
	}}
	if _, err := read(ctx, c); !errors.Is(err, left) || c.n != 1000 {
		t.Errorf("%v after %d files", err, c.n)
	}
}

// TestSparseCrowd is a forged directory: one file says that there are maxTasks tasks, and the ids of each
// are as large as they may be, or sparse and larger. It costs little time to refuse it.
func TestSparseCrowd(t *testing.T) {
	dir := t.TempDir()
	c := &crowd{large: true}
	for name, most := range map[string]int64{"inventory.img": maxInventory, "pstree.img": maxPSTree, "ids-1.img": maxIDs} {
		b, err := c.read(name, most)
		if err = errors.Join(err, os.WriteFile(filepath.Join(dir, name), b, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	for pid := 2; pid <= maxTasks; pid++ {
		name := filepath.Join(dir, idsName(Task{VPID: pid}))
		err := os.Link(filepath.Join(dir, "ids-1.img"), name)
		if errors.Is(err, syscall.EMLINK) {
			err = os.Symlink("ids-1.img", name) // never reached: the budget is spent long before
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	_, err := Read(open(t, dir))
	// A second or two by far; the race detector on a busy machine gets more.
	took := time.Since(began)
	t.Log(took)
	if err == nil || !strings.Contains(err.Error(), "bytes were read") || took > 10*time.Second {
		t.Errorf("%v after %v", err, took)
	}
	for i := range 2 {
		name := filepath.Join(dir, idsName(Task{VPID: i + 1}))
		if err := errors.Join(os.Remove(name), os.WriteFile(name, nil, 0o600), os.Truncate(name, 1<<20)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Read(open(t, dir)); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("sparse ids: %v", err)
	}
}

// TestHostileFiles is about what else can stand in the place of an image.
func TestHostileFiles(t *testing.T) {
	for name, put := range map[string]func(path string) error{
		"symbolic link": func(p string) error {
			abs, err := filepath.Abs("testdata/shared/inventory.img")
			return errors.Join(err, os.Symlink(abs, p))
		},
		"fifo":        func(p string) error { return syscall.Mkfifo(p, 0o600) },
		"directory":   func(p string) error { return os.Mkdir(p, 0o700) },
		"sparse file": func(p string) error { return errors.Join(os.WriteFile(p, nil, 0o600), os.Truncate(p, 1<<40)) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.CopyFS(dir, os.DirFS("testdata/shared")); err != nil {
				t.Fatal(err)
			}
			p := filepath.Join(dir, "inventory.img")
			if err := errors.Join(os.Remove(p), put(p)); err != nil {
				t.Fatal(err)
			}
			if s, err := Read(open(t, dir)); err == nil {
				t.Errorf("accepted: %+v", s)
			}
		})
	}
	t.Run("O_PATH", func(t *testing.T) {
		fd, err := unix.Open("testdata/shared", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "images")
		defer f.Close()
		if _, err := Read(f); err != nil {
			t.Error(err)
		}
	})
	t.Run("no directory", func(t *testing.T) {
		if _, err := Read(open(t, "testdata/shared/pstree.img")); err == nil {
			t.Error("accepted a file")
		}
		f := open(t, "testdata/shared")
		f.Close()
		if _, err := Read(f); err == nil {
			t.Error("accepted a closed file")
		}
	})
}

// FuzzRead makes images of anything. What is understood must hold together.
func FuzzRead(f *testing.F) {
	for _, dir := range []string{"testdata/nested", "testdata/shared"} {
		m := load(f, dir)
		f.Add(m["inventory.img"], m["pstree.img"], m[idsName(mustRead(f, dir).Root())], m["netns-9.img"])
	}
	f.Fuzz(func(t *testing.T, inventory, pstree, ids, netns []byte) {
		s, err := read(t.Context(), fuzzed{inventory, pstree, ids, netns})
		if err != nil {
			return
		}
		if len(s.Tasks) == 0 || s.Root().PPID != 0 || s.Root().Dead() || len(s.RunID) > 64 {
			t.Errorf("%+v", s)
		}
		// Processes made of the images themselves join, and give back what the images say.
		var procs []Process
		for _, task := range s.Tasks {
			p := Process{PID: 1000 + task.VPID, VPIDs: []int{1000 + task.VPID, task.VPID}, Namespaces: map[alloc.NamespaceType]alloc.KernelID{}}
			for typ, id := range task.IDs {
				p.Namespaces[typ] = alloc.KernelID{ID: uint64(id), Inode: 1}
			}
			procs = append(procs, p)
		}
		j, err := Join(s, procs)
		if err != nil {
			t.Fatal(err)
		}
		list, err := Namespaces(s, j)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range list {
			if uint64(n.ID.CRIU) != n.Kernel.ID || len(n.VPIDs) == 0 {
				t.Errorf("%+v", n)
			}
		}
	})
}

// fuzzed has the same ids and netns image under every number.
type fuzzed struct{ inventory, pstree, ids, netns []byte }

func (f fuzzed) read(name string, most int64) ([]byte, error) {
	m := files{"inventory.img": f.inventory, "pstree.img": f.pstree}
	switch {
	case strings.HasPrefix(name, "ids-"):
		m[name] = f.ids
	case strings.HasPrefix(name, "netns-"):
		m[name] = f.netns
	}
	return m.read(name, most)
}
