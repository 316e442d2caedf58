//go:build linux

package kernelns

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// TestInodeReuse is why this package exists: the kernel hands the inode number of a freed namespace on.
func TestInodeReuse(t *testing.T) {
	needRoot(t)
	needKernel(t, 6, 18, "NS_GET_ID")
	k := openKernel(t)
	found := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread and its namespace end here
		byInode := map[uint64]uint64{}
		ids := map[uint64]bool{}
		for range 10_000 {
			if err := unix.Unshare(unix.CLONE_NEWUTS); err != nil {
				found <- err
				return
			}
			_, id, err := k.ByPath("/proc/thread-self/ns/uts")
			if err != nil {
				found <- err
				return
			}
			if ids[id.ID] {
				found <- errors.New("NS_GET_ID gave the same number twice")
				return
			}
			ids[id.ID] = true
			if other, ok := byInode[id.Inode]; ok && other != id.ID {
				found <- nil
				return
			}
			byInode[id.Inode] = id.ID
		}
		found <- errors.New("10,000 namespaces in a row had 10,000 inode numbers: kernel.md is out of date")
	}()
	if err := <-found; err != nil {
		t.Fatal(err)
	}
}

func TestAlive(t *testing.T) {
	needRoot(t)
	needKernel(t, 6, 18, "nsfs file handles")
	k := openKernel(t)
	if err := k.Features().Liveness; err != nil {
		skip(t, "the machine does not let us ask: %v", err)
	}
	c := spawnCat(t, allNamespaces)
	p, err := k.Process(c.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Namespaces) != len(k.types) {
		t.Fatalf("saw %d namespaces, want %d", len(p.Namespaces), len(k.types))
	}
	for ns, id := range p.Namespaces {
		if ok, err := k.Alive(ns, id); err != nil || !ok {
			t.Errorf("%s of a live process: alive = %v, %v", ns, ok, err)
		}
		other := id
		other.Inode++
		if ok, err := k.Alive(ns, other); err != nil || ok {
			t.Errorf("%s with another inode number: alive = %v, %v", ns, ok, err)
		}
		other = id
		other.BootID = "00000000-0000-0000-0000-000000000000"
		if ok, err := k.Alive(ns, other); err != nil || ok {
			t.Errorf("%s of another boot: alive = %v, %v", ns, ok, err)
		}
		weak := id
		weak.ID, weak.Weak = 0, true
		if _, err := k.Alive(ns, weak); !errors.Is(err, ErrCannotTell) {
			t.Errorf("%s known by inode only: %v, want ErrCannotTell", ns, err)
		}
	}
	end(c)
	for ns, id := range p.Namespaces {
		eventually(t, string(ns)+" is gone", func() bool {
			ok, err := k.Alive(ns, id)
			if err != nil {
				t.Fatal(err)
			}
			return !ok
		})
	}
}

// TestAliveDoubt: where access is not proven, ESTALE must not be read as death.
func TestAliveDoubt(t *testing.T) {
	needRoot(t)
	k := openKernel(t)
	id := alloc.KernelID{BootID: k.bootID, ID: 1<<62 + 1, Inode: 4_000_000_000}
	k.features.Liveness = errors.New("not proven")
	if _, err := k.Alive(alloc.UTS, id); !errors.Is(err, ErrCannotTell) {
		t.Errorf("without proof: %v, want ErrCannotTell", err)
	}
	k.features.Liveness = nil
	k.self = handle{id: 1<<62 + 2, flag: unix.CLONE_NEWUTS, inode: 4_000_000_001}
	if _, err := k.Alive(alloc.UTS, id); !errors.Is(err, ErrCannotTell) {
		t.Errorf("when our own namespace does not open: %v, want ErrCannotTell", err)
	}
	for _, bad := range []alloc.KernelID{{BootID: k.bootID, ID: 7}, {BootID: k.bootID, ID: 7, Inode: 1 << 33}} {
		if _, err := k.Alive(alloc.UTS, bad); !errors.Is(err, ErrCannotTell) {
			t.Errorf("%+v: %v, want ErrCannotTell", bad, err)
		}
	}
	if _, err := k.Alive("tty", id); !errors.Is(err, ErrCannotTell) {
		t.Errorf("unknown type: %v, want ErrCannotTell", err)
	}
}

// TestWaysAgree: handles, ioctls and paths give one identity; without both it is weak.
func TestWaysAgree(t *testing.T) {
	needRoot(t)
	k := openKernel(t)
	c := spawnCat(t, allNamespaces)
	pid := c.Process.Pid
	want, err := k.Process(pid)
	if err != nil {
		t.Fatal(err)
	}
	for ns, id := range want.Namespaces {
		path := filepath.Join("/proc", strconv.Itoa(pid), "ns", string(ns))
		typ, got, err := k.ByPath(path)
		if err != nil || typ != ns || got != id {
			t.Errorf("ByPath(%s) = %v, %+v, %v, want %+v", path, typ, got, err, id)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		typ, got, err = k.ByFD(int(f.Fd()))
		f.Close()
		if err != nil || typ != ns || got != id {
			t.Errorf("ByFD(%s) = %v, %+v, %v, want %+v", ns, typ, got, err, id)
		}
	}
	k.features.Handles = false
	if got, err := k.Process(pid); err != nil || !maps.Equal(got.Namespaces, want.Namespaces) {
		t.Errorf("by ioctl %v, %v; by handle %v", got.Namespaces, err, want.Namespaces)
	}
	k.features.KernelIDs = false
	got, err := k.Process(pid)
	if err != nil {
		t.Fatal(err)
	}
	for ns, id := range got.Namespaces {
		if id.Inode != want.Namespaces[ns].Inode || id.BootID != k.BootID() {
			t.Errorf("%s as an older kernel shows it: %+v, want the inode of %+v", ns, id, want.Namespaces[ns])
		}
		if id.Weak != (id.ID == 0) || ns != alloc.Mnt && !id.Weak {
			t.Errorf("%s as an older kernel shows it: %+v is not marked weak", ns, id)
		}
	}
}

func TestNotANamespace(t *testing.T) {
	k := openKernel(t)
	if _, _, err := k.ByPath("/proc/self/status"); err == nil {
		t.Error("a file was taken for a namespace")
	}
	if _, _, err := k.ByPath("/proc/self/ns/none"); err == nil {
		t.Error("a missing file was taken for a namespace")
	}
	if _, err := Open(t.TempDir()); err == nil {
		t.Error("an empty directory was taken for a proc file system")
	}
}

func BenchmarkIdentify(b *testing.B) {
	k := openKernel(b)
	dir, err := k.openDir(os.Getpid())
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(dir)
	run := func(name string, handles bool) {
		b.Run(name, func(b *testing.B) {
			if handles && !k.features.Handles {
				b.Skip("the kernel has no nsfs file handles")
			}
			k := &Kernel{bootID: k.bootID, features: k.features}
			k.features.Handles = handles
			b.ReportAllocs()
			for b.Loop() {
				if _, err := k.identify(dir, "ns/mnt"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	run("handle", true)
	run("ioctl", false)
}

func BenchmarkAlive(b *testing.B) {
	k := openKernel(b)
	if err := k.Features().Liveness; err != nil {
		b.Skip(err)
	}
	_, id, err := k.ByPath("/proc/self/ns/uts")
	if err != nil {
		b.Fatal(err)
	}
	gone := id
	gone.ID = 1<<62 + 1
	for name, id := range map[string]alloc.KernelID{"alive": id, "gone": gone} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if ok, err := k.Alive(alloc.UTS, id); err != nil || ok != (name == "alive") {
					b.Fatal(ok, err)
				}
			}
		})
	}
}
