package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// simKernel makes a simulation's namespaces.
type simKernel interface {
	// about says in a sentence where the numbers come from; stands, what stands for a container.
	about() string
	stands() string
	// host is the namespaces of a host; start makes those of a container, until end or close.
	host() numbers
	start() (ids numbers, end func(), err error)
	close()
}

// newSimKernel takes the kernel's own namespaces where this process may make any.
func newSimKernel() simKernel {
	if k, err := newChildren(); err == nil {
		return k
	}
	return &invented{next: inventedFirst}
}

// children are processes in namespaces of their own that do nothing: cat waits for the end of its input,
// which comes when this process is gone, however that happens.
type children struct {
	kernel *kernelns.Kernel
	mine   numbers
	flags  uintptr
	live   []*child
}

type child struct {
	cmd   *exec.Cmd
	stdin io.Closer
	once  sync.Once
}

const containerFlags = unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWCGROUP

func newChildren() (*children, error) {
	kernel, err := kernelns.Open("/proc")
	if err != nil {
		return nil, err
	}
	k := &children{kernel: kernel}
	if k.mine, err = k.identify("self"); err != nil {
		return nil, err
	}
	// Without root a user namespace around them may still allow it. Only trying tells: security modules
	// and sysctls have their say.
	for _, more := range []uintptr{0, unix.CLONE_NEWUSER} {
		k.flags = containerFlags | more
		var end func()
		if _, end, err = k.start(); err == nil {
			end()
			return k, nil
		}
	}
	return nil, err
}

func (k *children) about() string {
	return "The namespaces are real ones of this kernel, of child processes that do nothing, so inode numbers and kernel ids are the kernel's."
}

func (k *children) stands() string { return "a process in fresh namespaces" }

func (k *children) host() numbers { return k.mine }

func (k *children) start() (numbers, func(), error) {
	c := &child{cmd: exec.Command("cat")}
	stdin, err := c.cmd.StdinPipe()
	if err != nil {
		return nil, nil, err
	}
	c.stdin = stdin
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: k.flags, Setpgid: true}
	if k.flags&unix.CLONE_NEWUSER != 0 {
		c.cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		c.cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	if err := c.cmd.Start(); err != nil {
		return nil, nil, fmt.Errorf("start a process in fresh namespaces: %w", err)
	}
	all, err := k.identify(fmt.Sprint(c.cmd.Process.Pid))
	if err != nil {
		c.end()
		return nil, nil, err
	}
	own := numbers{}
	for t, id := range all {
		if id.Key(t) != k.mine[t].Key(t) {
			own[t] = id
		}
	}
	k.live = append(k.live, c)
	return own, c.end, nil
}

func (k *children) identify(pid string) (numbers, error) {
	ids := numbers{}
	for _, t := range alloc.NamespaceTypes() {
		path := "/proc/" + pid + "/ns/" + string(t)
		if _, err := os.Lstat(path); os.IsNotExist(err) {
			continue // this kernel was built without
		}
		_, id, err := k.kernel.ByPath(path)
		if err != nil {
			return nil, err
		}
		ids[t] = id
	}
	return ids, nil
}

func (c *child) end() {
	c.once.Do(func() {
		c.stdin.Close()
		_ = c.cmd.Process.Kill()
		_ = c.cmd.Wait() // killed
	})
}

func (k *children) close() {
	for _, c := range k.live {
		c.end()
	}
}

// invented is for where not even namespaces can be made: numbers as Linux gives them. An inode number that
// is free is given again at once, lowest first; a kernel id never.
type invented struct {
	machine numbers
	taken   []uint64 // inode numbers
	next    uint64   // kernel id
}

const (
	inventedFirst = 1000
	inventedInode = 4026532500
)

func (k *invented) about() string {
	return "This process may not make namespaces either, so inode numbers and kernel ids are made up, in the kernel's manner."
}

func (k *invented) stands() string { return "numbers only" }

func (k *invented) host() numbers {
	if k.machine == nil {
		k.machine = numbers{}
		for i, t := range alloc.NamespaceTypes() {
			k.machine[t] = alloc.KernelID{ID: uint64(i + 1), Inode: 4026531833 + uint64(i)}
		}
	}
	return k.machine
}

func (k *invented) start() (numbers, func(), error) {
	ids := numbers{}
	for _, t := range []alloc.NamespaceType{alloc.Mnt, alloc.UTS, alloc.IPC, alloc.PID, alloc.Net, alloc.Cgroup} {
		inode := uint64(inventedInode)
		for slices.Contains(k.taken, inode) {
			inode++
		}
		k.taken = append(k.taken, inode)
		ids[t] = alloc.KernelID{ID: k.next, Inode: inode}
		k.next++
	}
	return ids, func() {
		k.taken = slices.DeleteFunc(k.taken, func(n uint64) bool {
			for _, id := range ids {
				if id.Inode == n {
					return true
				}
			}
			return false
		})
	}, nil
}

func (k *invented) close() {}
