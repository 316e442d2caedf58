// Package baddisk is a real disk whose fsync fails when a test says so: ext4, without a journal that would give up, on a
// loop device, over a file with holes on a small tmpfs. While that is full, a write into a block that has no room there
// succeeds, as on every disk with a cache; the fsync after it fails; and one of the next succeeds, although nothing was
// written: what Linux does after an error. It takes root and mkfs.ext4.
package baddisk

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	size      = 16 << 20 // of the disk, in bytes
	room      = "size=2m,mode=700"
	blockSize = 4096
	// fitrim and fibmap are FITRIM and FIBMAP of linux/fs.h.
	fitrim = 0xc0185879
	fibmap = 1
)

// Disk is mounted at Dir until its test ends.
type Disk struct {
	Dir     string
	t       testing.TB
	backing string
}

// New makes a disk, mounted at dir, which it makes. It skips the test where that cannot be had; with CI=true it fails it.
func New(t testing.TB, dir string) *Disk {
	t.Helper()
	d := &Disk{Dir: dir, t: t, backing: dir + ".backing"}
	if _, err := exec.LookPath("mkfs.ext4"); err != nil || os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatalf("it takes root and mkfs.ext4: %v", err)
		}
		t.Skipf("it takes root and mkfs.ext4: %v", err)
	}
	d.must(os.MkdirAll(dir, 0o700), os.MkdirAll(d.backing, 0o700))
	d.must(unix.Mount("tmpfs", d.backing, "tmpfs", 0, room))
	t.Cleanup(func() { d.may(unix.Unmount(d.backing, unix.MNT_DETACH), os.Remove(d.backing)) })
	d.must(os.WriteFile(d.image(), nil, 0o600), os.Truncate(d.image(), size))
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", "-b", fmt.Sprint(blockSize), "-O", "^has_journal", "-E", "lazy_itable_init=0,root_owner=0:0", d.image()).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	d.must(d.mount())
	t.Cleanup(func() { d.may(unix.Unmount(dir, unix.MNT_DETACH)) })
	return d
}

func (d *Disk) image() string   { return filepath.Join(d.backing, "image") }
func (d *Disk) ballast() string { return filepath.Join(d.backing, "ballast") }

func (d *Disk) must(errs ...error) {
	d.t.Helper()
	if err := errors.Join(errs...); err != nil {
		d.t.Fatal(err)
	}
}

func (d *Disk) may(errs ...error) {
	if err := errors.Join(errs...); err != nil {
		d.t.Error(err)
	}
}

// mount mounts the image over a loop device that goes with the mount.
func (d *Disk) mount() error {
	image, err := os.OpenFile(d.image(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer image.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer control.Close()
	for range 100 { // another process may take the one that is free
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return fmt.Errorf("find a loop device: %w", err)
		}
		path := fmt.Sprintf("/dev/loop%d", n)
		loop, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &unix.LoopConfig{Fd: uint32(image.Fd()), Size: blockSize, Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}})
		if err == nil {
			err = unix.Mount(path, d.Dir, "ext4", 0, "")
		}
		_ = loop.Close() // from here on the mount keeps it
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	return errors.New("no loop device is free")
}

// Fail has what is written from now on into blocks that no file has yet be lost, and its fsync fail.
func (d *Disk) Fail() error {
	dir, err := os.Open(d.Dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return err
	}
	all := struct{ start, length, least uint64 }{length: 1<<64 - 1}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, dir.Fd(), fitrim, uintptr(unsafe.Pointer(&all))); errno != 0 {
		return &os.PathError{Op: "FITRIM", Path: d.Dir, Err: errno}
	}
	f, err := os.Create(d.ballast())
	if err != nil {
		return err
	}
	defer f.Close()
	for err == nil {
		_, err = f.Write(make([]byte, blockSize))
	}
	if !errors.Is(err, unix.ENOSPC) {
		return err
	}
	return d.probe()
}

// probe shows that a write succeeds and its fsync fails.
func (d *Disk) probe() error {
	path := filepath.Join(d.Dir, "probe")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(make([]byte, 2*blockSize)); err != nil {
		return fmt.Errorf("a write fails already: %w", err)
	}
	if err := f.Sync(); err == nil {
		return errors.New("an fsync succeeds")
	}
	return os.Remove(path)
}

// FailAt has a block that a file has already, the one at that offset, be lost too, with what is in it.
// Call it before Fail.
func (d *Disk) FailAt(path string, offset int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return err
	}
	block := int32(offset / blockSize)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fibmap, uintptr(unsafe.Pointer(&block))); errno != 0 {
		return &os.PathError{Op: "FIBMAP", Path: path, Err: errno}
	}
	if block == 0 {
		return fmt.Errorf("%s has no block at %d", path, offset)
	}
	image, err := os.OpenFile(d.image(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer image.Close()
	return unix.Fallocate(int(image.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(block)*blockSize, blockSize)
}

// Heal has writes succeed again. What was lost stays lost.
func (d *Disk) Heal() error { return os.Remove(d.ballast()) }

// Remount shows what is on the disk, as a machine does that was cut off: what only a cache had is gone. Nobody may have
// a file of it open.
func (d *Disk) Remount() error {
	if err := unix.Unmount(d.Dir, 0); err != nil {
		return fmt.Errorf("unmount %s: %w", d.Dir, err)
	}
	return d.mount()
}
