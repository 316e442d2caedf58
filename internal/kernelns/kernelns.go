//go:build linux

// Package kernelns is how the agent sees kernel namespaces: which process is in which, whether one
// still lives, and in which order processes died.
//
// It exists because the kernel's own names for these things are treacherous, and every caller would
// have to know all of the following:
//
//   - An nsfs inode number is reused at once, so it never identifies a namespace. Since Linux 6.18 each
//     namespace has a 64-bit id that is unique for one boot (NS_GET_ID); with the boot id it is an
//     alloc.KernelID. On older kernels an identity is the inode number and is marked Weak.
//   - Anything that holds a namespace open keeps it alive. Nothing in this package does so for longer
//     than one system call needs: liveness is asked through nsfs file handles, which do not pin.
//   - A pid is reused too. Every read of a process goes through one descriptor of its /proc/PID
//     directory, which is bound to that process and fails with ESRCH for a successor of the same
//     number. A process is named outside by (pid, start time), or by a pidfd.
//   - Exit codes and polling say that a process is over, not what was over first. Exits reports in the
//     kernel's order.
//
// What it cannot see: namespaces that only a thread other than the leader is in, lives shorter than the
// time between two sweeps, and namespaces without any task (bind mounts, open descriptors). The eight
// links of one process are read one after the other: a process that calls unshare or setns meanwhile
// can show a mixture, as it does to every reader of /proc.
//
// Pids are those of the pid namespace that the given proc file system belongs to.
package kernelns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

var (
	// ErrGone says that the process is no longer there, or that its pid now belongs to another one.
	// It matches fs.ErrNotExist.
	ErrGone = fmt.Errorf("process is gone: %w", fs.ErrNotExist)

	// ErrCannotTell says that a namespace may be alive or gone and that this kernel, or this process's
	// privileges, do not let us know. It is never evidence of death.
	ErrCannotTell = errors.New("cannot tell whether the namespace is alive")
)

// Features says what the kernel offers to this process; see Kernel.Features.
type Features struct {
	// KernelIDs: NS_GET_ID works (Linux >= 6.18). Without it identities are Weak, except those of mount
	// namespaces from Linux 6.11 on.
	KernelIDs bool
	// Handles: nsfs has file handles (Linux >= 6.18), so one system call reads an identity.
	Handles bool
	// Liveness is nil if Alive can be answered; otherwise it says what is in the way.
	Liveness error
}

// Kernel is one kernel in one boot, seen through one proc file system. It is safe for concurrent use.
type Kernel struct {
	proc     string                // root of the proc file system
	bootID   string                // as the kernel prints it
	types    []alloc.NamespaceType // those that this kernel was built with
	features Features
	self     handle // our own UTS namespace: alive as long as we are

	sweeping sync.Mutex      // held during Sweep
	seen     map[int]Process // by pid, as of the last sweep; owned by sweeping
}

var uuid = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// Open looks at the kernel through the proc file system mounted at procRoot ("" means /proc) and finds
// out what it offers. There is nothing to close.
func Open(procRoot string) (*Kernel, error) {
	if procRoot == "" {
		procRoot = "/proc"
	}
	k := &Kernel{proc: procRoot}
	path := filepath.Join(procRoot, "sys/kernel/random/boot_id")
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the boot id: %w (mount a whole proc file system at %s, without subset=pid)", err, procRoot)
	}
	if k.bootID = strings.TrimSpace(string(b)); !uuid.MatchString(k.bootID) {
		return nil, fmt.Errorf("%s holds %q, which is not a boot id (is something else mounted over it?)", path, k.bootID)
	}
	for _, t := range alloc.NamespaceTypes() {
		_, err := os.Lstat(filepath.Join(procRoot, "self/ns", string(t)))
		switch {
		case err == nil:
			k.types = append(k.types, t)
		case !errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("look for %s namespaces: %w", t, err)
		}
	}
	if len(k.types) == 0 {
		return nil, fmt.Errorf("%s/self/ns is empty or missing: mount a proc file system that shows this process there", procRoot)
	}
	if err := k.probe(); err != nil {
		return nil, err
	}
	return k, nil
}

// BootID is this boot's UUID.
func (k *Kernel) BootID() string { return k.bootID }

// Features says what was found when the kernel was opened.
func (k *Kernel) Features() Features { return k.features }

// Host gives the identities of the host's own namespaces, read now: those of pid 1. Where pid 1 cannot
// be read (a security module may forbid it), those of the kernel thread pid 2 serve: on a machine's
// initial pid namespace both are the same unless pid 1 left them, and no container has a kernel thread.
func (k *Kernel) Host() (map[alloc.NamespaceType]alloc.KernelID, error) {
	p, err := k.read(1, nil, nil)
	if err != nil {
		return nil, fmt.Errorf("read the host's namespaces: %w", err)
	}
	if p.Err == nil {
		return p.Namespaces, nil
	}
	if !errors.Is(p.Err, fs.ErrPermission) {
		return nil, fmt.Errorf("read the host's namespaces: %w", p.Err)
	}
	dir, err := k.openDir(2)
	if err != nil {
		return nil, fmt.Errorf("read the host's namespaces: %w", p.Err)
	}
	defer unix.Close(dir)
	st, err := readStat(dir, nil)
	if err != nil || !st.kernelThread {
		return nil, fmt.Errorf("read the host's namespaces: %w", p.Err)
	}
	ids, err := k.namespaces(dir, "ns/")
	if err != nil {
		return nil, fmt.Errorf("read the host's namespaces: %w; and those of pid 2: %w", p.Err, err)
	}
	return ids, nil
}
