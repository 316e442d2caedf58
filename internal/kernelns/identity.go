//go:build linux

package kernelns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Values of the kernel that x/sys does not have: the first is of enum fid_type, the others of
// include/uapi/linux/nsfs.h.
const (
	fileidNSFS     = 0xf1       // FILEID_NSFS: the type of an nsfs file handle
	userNSInitIno  = 0xEFFFFFFD // USER_NS_INIT_INO, the same on every kernel since 3.8
	nsfsHandleSize = 16         // NSFS_FILE_HANDLE_SIZE_VER0
)

var cloneFlags = map[alloc.NamespaceType]uint32{
	alloc.Mnt:    unix.CLONE_NEWNS,
	alloc.UTS:    unix.CLONE_NEWUTS,
	alloc.IPC:    unix.CLONE_NEWIPC,
	alloc.PID:    unix.CLONE_NEWPID,
	alloc.Net:    unix.CLONE_NEWNET,
	alloc.Cgroup: unix.CLONE_NEWCGROUP,
	alloc.User:   unix.CLONE_NEWUSER,
	alloc.Time:   unix.CLONE_NEWTIME,
}

func typeOf(flag uint32) (alloc.NamespaceType, error) {
	for t, f := range cloneFlags {
		if f == flag {
			return t, nil
		}
	}
	return "", fmt.Errorf("namespace type %#x is unknown here: the kernel is newer than this program", flag)
}

// handle is struct nsfs_file_handle (include/uapi/linux/nsfs.h), an interface that user space may build
// by hand. The kernel opens it only if all three parts match (fs/nsfs.c, nsfs_fh_to_dentry).
type handle struct {
	id    uint64
	flag  uint32
	inode uint32
}

func (h handle) open() (int, error) {
	b := make([]byte, 0, nsfsHandleSize)
	b = binary.NativeEndian.AppendUint64(b, h.id)
	b = binary.NativeEndian.AppendUint32(b, h.flag)
	b = binary.NativeEndian.AppendUint32(b, h.inode)
	return unix.OpenByHandleAt(unix.FD_NSFS_ROOT, unix.NewFileHandle(fileidNSFS, b), unix.O_RDONLY|unix.O_CLOEXEC)
}

// handleAt reads the handle of a namespace in one system call, without opening it.
func handleAt(dir int, path string, flags int) (handle, error) {
	fh, _, err := unix.NameToHandleAt(dir, path, flags)
	if err != nil {
		return handle{}, err
	}
	if b := fh.Bytes(); fh.Type() == fileidNSFS && len(b) >= nsfsHandleSize {
		return handle{
			id:    binary.NativeEndian.Uint64(b),
			flag:  binary.NativeEndian.Uint32(b[8:]),
			inode: binary.NativeEndian.Uint32(b[12:]),
		}, nil
	}
	return handle{}, fmt.Errorf("%q is not a namespace: its file handle is of type %#x", path, fh.Type())
}

// probe finds out which of the kernel's ways work.
func (k *Kernel) probe() error {
	path := filepath.Join(k.proc, "self/ns", string(k.types[0]))
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	_, err = ioctlUint64(fd, unix.NS_GET_ID)
	k.features.KernelIDs = err == nil
	if k.features.KernelIDs {
		_, err = handleAt(fd, "", unix.AT_EMPTY_PATH)
		k.features.Handles = err == nil
	}
	k.features.Liveness = k.probeLiveness()
	return nil
}

// probeLiveness proves that a handle of a live namespace opens for us, whoever's namespace it is.
//
// open_by_handle_at answers ESTALE for a namespace that is gone and for one that the caller may not
// open alike (fs/fhandle.c, do_handle_to_path), so that without this proof ESTALE means nothing. Our own
// namespaces prove nothing: the kernel exempts them from the check. So a thread makes a fresh one and
// this one opens it; the kernel frees it with the thread. What that cannot cover are namespaces owned by
// user namespaces beside ours, hence the demand to be in the initial one, whose CAP_SYS_ADMIN covers all.
func (k *Kernel) probeLiveness() error {
	if !k.features.Handles {
		return errors.New("the kernel has no nsfs file handles (Linux >= 6.18 does), or name_to_handle_at is filtered")
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(k.proc, "self/ns/user"), &st); err == nil && st.Ino != userNSInitIno {
		return errors.New("this process is not in the initial user namespace, so that the kernel may hide live namespaces from it: run the agent outside of user namespaces")
	}
	var err error
	if k.self, err = handleAt(unix.AT_FDCWD, filepath.Join(k.proc, "self/ns", string(k.types[0])), unix.AT_SYMLINK_FOLLOW); err != nil {
		return fmt.Errorf("read our own namespace's handle: %w", err)
	}
	type answer struct {
		h   handle
		err error
	}
	made, opened := make(chan answer), make(chan struct{})
	var probe func()
	probe = func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine, in no other's hands
		if unix.Gettid() == unix.Getpid() {
			// The process's first thread does not end, and its namespaces are what /proc shows of the whole
			// process. It is held here, so that the next goroutine gets another one.
			defer runtime.UnlockOSThread()
			next := make(chan struct{})
			go func() { defer close(next); probe() }()
			<-next
			return
		}
		if err := unix.Unshare(unix.CLONE_NEWUTS); err != nil {
			made <- answer{err: fmt.Errorf("unshare a UTS namespace: %w (it takes CAP_SYS_ADMIN)", err)}
			return
		}
		h, err := handleAt(unix.AT_FDCWD, filepath.Join(k.proc, "thread-self/ns/uts"), unix.AT_SYMLINK_FOLLOW)
		made <- answer{h, err}
		<-opened // the namespace lives until then
	}
	go probe()
	a := <-made
	defer close(opened)
	if a.err != nil {
		return fmt.Errorf("make a namespace to try handles on: %w", a.err)
	}
	fd, err := a.h.open()
	if err != nil {
		return fmt.Errorf("open a live namespace by its handle: %w (newer kernels want CAP_SYS_ADMIN and the initial pid namespace: run the agent there)", err)
	}
	unix.Close(fd)
	return nil
}

// Alive reports whether a namespace still exists, for whatever reason: a task, a descriptor, a mount.
// It holds the namespace only for the moment of asking. False is certain; an error (ErrCannotTell) says
// that nothing is known. An identity of another boot is not alive on this one; whether it is another
// machine's is for the caller to know.
func (k *Kernel) Alive(t alloc.NamespaceType, id alloc.KernelID) (bool, error) {
	if id.BootID != k.bootID {
		return false, nil
	}
	switch {
	case id.Weak || id.ID == 0:
		return false, fmt.Errorf("%w: %s %d is known by its inode number only, which the kernel reuses", ErrCannotTell, t, id.Inode)
	case k.features.Liveness != nil:
		return false, fmt.Errorf("%w: %w", ErrCannotTell, k.features.Liveness)
	}
	flag, ok := cloneFlags[t]
	if !ok {
		return false, fmt.Errorf("%w: %q is not one of the types %v", ErrCannotTell, t, alloc.NamespaceTypes())
	}
	if id.Inode == 0 || id.Inode > 1<<32-1 {
		return false, fmt.Errorf("%w: %d is not the inode number of a namespace", ErrCannotTell, id.Inode)
	}
	fd, err := handle{id.ID, flag, uint32(id.Inode)}.open()
	if err == nil {
		unix.Close(fd)
		return true, nil
	}
	if !errors.Is(err, unix.ESTALE) {
		return false, fmt.Errorf("%w: open %s %d by its handle: %w", ErrCannotTell, t, id.ID, err)
	}
	// The way must still work now, not only when it was probed: a filter may have come since.
	if fd, err = k.self.open(); err != nil {
		return false, fmt.Errorf("%w: our own namespace does not open by its handle any more: %w (was the agent confined while it ran?)", ErrCannotTell, err)
	}
	unix.Close(fd)
	return false, nil
}

// ByFD identifies the namespace behind an nsfs descriptor, such as one that was opened below
// /proc/PID/ns or received over a socket.
func (k *Kernel) ByFD(fd int) (alloc.NamespaceType, alloc.KernelID, error) {
	t, id, err := k.byFD(fd)
	if err != nil {
		return "", alloc.KernelID{}, fmt.Errorf("identify the namespace behind a descriptor: %w", err)
	}
	return t, id, nil
}

// ByPath identifies the namespace behind a path: a link in /proc/PID/ns, or a bind mount of one.
func (k *Kernel) ByPath(path string) (alloc.NamespaceType, alloc.KernelID, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", alloc.KernelID{}, fmt.Errorf("identify a namespace: %w", err)
	}
	defer f.Close()
	t, id, err := k.byFD(int(f.Fd()))
	if err != nil {
		return "", alloc.KernelID{}, fmt.Errorf("identify the namespace behind %s: %w", path, err)
	}
	return t, id, nil
}

func (k *Kernel) byFD(fd int) (alloc.NamespaceType, alloc.KernelID, error) {
	var fsys unix.Statfs_t
	if err := unix.Fstatfs(fd, &fsys); err != nil {
		return "", alloc.KernelID{}, err
	}
	if fsys.Type != unix.NSFS_MAGIC {
		return "", alloc.KernelID{}, errors.New("it is not a namespace: give a link in /proc/PID/ns, or a bind mount of one")
	}
	flag, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
	if err != nil {
		return "", alloc.KernelID{}, fmt.Errorf("NS_GET_NSTYPE: %w", err)
	}
	t, err := typeOf(uint32(flag))
	if err != nil {
		return "", alloc.KernelID{}, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", alloc.KernelID{}, err
	}
	id := alloc.KernelID{BootID: k.bootID, Inode: st.Ino}
	switch {
	case k.features.KernelIDs:
		id.ID, err = ioctlUint64(fd, unix.NS_GET_ID)
		if err != nil {
			return "", alloc.KernelID{}, fmt.Errorf("NS_GET_ID: %w", err)
		}
	case t == alloc.Mnt:
		// Linux 6.11 to 6.17 number mount namespaces alone, just as uniquely.
		if id.ID, err = ioctlUint64(fd, unix.NS_GET_MNTNS_ID); err != nil {
			id.ID = 0
		}
	}
	id.Weak = id.ID == 0
	return t, id, nil
}

// identify reads one link below a directory: one system call where the kernel has handles, which
// measured a third less than open, NS_GET_ID and close, and does not pin the namespace even briefly.
func (k *Kernel) identify(dir int, link string) (alloc.KernelID, error) {
	if k.features.Handles {
		h, err := handleAt(dir, link, unix.AT_SYMLINK_FOLLOW)
		if err != nil {
			return alloc.KernelID{}, err
		}
		return alloc.KernelID{BootID: k.bootID, ID: h.id, Inode: uint64(h.inode)}, nil
	}
	fd, err := unix.Openat(dir, link, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return alloc.KernelID{}, err
	}
	defer unix.Close(fd)
	_, id, err := k.byFD(fd)
	return id, err
}

// ioctlUint64 exists because x/sys reads into a Go int, which is too small for 64 bits on some machines.
func ioctlUint64(fd int, req uint) (uint64, error) {
	var v uint64
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(unsafe.Pointer(&v)))
	if errno != 0 {
		return 0, errno
	}
	return v, nil
}
