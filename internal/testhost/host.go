package testhost

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// Host is one "machine" of a pool. Its disk (the overlay) lives as long as the
// pool; all else (processes, /run, /tmp, cgroups, links, boot id) only until
// it is halted.
type Host struct {
	pool *Pool
	name string
	addr netip.Addr

	mu     sync.Mutex
	box    *box   // guarded by mu; nil while halted
	bootID string // guarded by mu
	closed bool   // guarded by mu; never boots again
}

// hostNamespaces are the kinds a host has its own of. The cgroup namespace
// makes the paths in /proc/PID/cgroup, and so in CRIU's images, the same on
// every host, although the machine keeps hosts' cgroups apart.
const hostNamespaces = unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWCGROUP

// Name is the host's name, in the pool and in its UTS namespace.
func (h *Host) Name() string { return h.name }

// Addr is the host's address on the bridge.
func (h *Host) Addr() netip.Addr { return h.addr }

// BootID is what /proc/sys/kernel/random/boot_id reads in the host; each Boot
// makes a new one.
func (h *Host) BootID() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.bootID
}

// dir is the host's directory on the machine.
func (h *Host) dir() string { return filepath.Join(h.pool.state.dir, h.name) }

// cgroups are the host's, one in each of the machine's hierarchies.
func (h *Host) cgroups() []string {
	var dirs []string
	for _, dir := range h.pool.state.cgroups {
		dirs = append(dirs, filepath.Join(dir, h.name))
	}
	return dirs
}

// Boot starts a host that was halted: the same disk, another boot id, nothing
// else of the life before.
func (h *Host) Boot(ctx context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return fmt.Errorf("cannot boot host %s: the pool is closed", h.name)
	}
	if h.box != nil {
		return fmt.Errorf("host %s runs already: halt it first", h.name)
	}
	cgroups := h.cgroups()
	for _, dir := range cgroups {
		if err := makeCgroup(dir); err != nil {
			return err
		}
	}
	h.bootID = uuid.NewString()
	b, err := startBox(ctx, boxSpec{
		dir:       h.dir(),
		namespace: hostNamespaces,
		config: bootConfig{
			Name:     h.name,
			Dir:      h.dir(),
			RootFS:   h.pool.rootfs,
			BootID:   h.bootID,
			Hosts:    h.pool.etcHosts(),
			Cgroups:  h.pool.hierarchies,
			LeafInit: onlyVersion2(h.pool.hierarchies),
		},
		prepare: func(pid int) error {
			for _, dir := range cgroups {
				if err := joinCgroup(dir, pid); err != nil {
					return err
				}
			}
			return plug(h.pool.box.pid(), pid, h.addr)
		},
	})
	if err != nil {
		return fmt.Errorf("cannot boot host: %w", err)
	}
	h.box = b
	return nil
}

func (p *Pool) etcHosts() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var b strings.Builder
	fmt.Fprintf(&b, "127.0.0.1 localhost\n%s server\n", bridgeAddr)
	for _, h := range p.hosts {
		fmt.Fprintf(&b, "%s %s\n", h.addr, h.name)
	}
	return b.String()
}

// Halt is a power failure: everything in the host dies at once, and the disk
// keeps what the kernel has been given. A host that is halted is left so.
func (h *Host) Halt(ctx context.Context) error { return h.halt(ctx, false) }

func (h *Host) halt(ctx context.Context, forGood bool) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = h.closed || forGood
	if h.box == nil {
		return nil
	}
	cgroups := h.cgroups()
	if err := h.box.stop(ctx, cgroups...); err != nil {
		return err
	}
	var errs []error
	for _, dir := range cgroups {
		errs = append(errs, removeCgroup(ctx, dir))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("host %s: %w", h.name, err)
	}
	h.box = nil
	return nil
}

// running returns the host's PID 1.
func (h *Host) running() (*box, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.box == nil {
		return nil, fmt.Errorf("host %s is halted: boot it first", h.name)
	}
	return h.box, nil
}

// Command is a command inside the host, as a child of its PID 1. The process
// that is started on the machine is a relay, with these consequences:
//
//   - Stdin, Stdout, Stderr, ExtraFiles, Env, exit code and signals work as
//     ever; Process.Pid is the relay's. SIGSTOP stops the relay only.
//   - Env starts out as PATH, HOME, LANG and Options.Env only. Append to it;
//     setting it to nil passes this process's environment.
//   - Leave Dir alone: the command starts in /.
//   - When the context is over, or the relay is killed, the command and its
//     process group get SIGKILL. In the first case Wait returns after the
//     command is gone.
//   - Exit code 127 means that there is no such command, 125 that the host is
//     not there; the reason is on Stderr.
func (h *Host) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	env := append([]string{"PATH=" + defaultPath, "HOME=/root", "LANG=C.UTF-8"}, h.pool.env...)
	return relayCommand(ctx, h.dir(), env, name, args)
}

// InitPID is the host's PID 1 as the machine numbers it; 0 while halted.
func (h *Host) InitPID() int {
	b, err := h.running()
	if err != nil {
		return 0
	}
	return b.pid()
}

// OuterPID translates a process number of the host into the machine's.
func (h *Host) OuterPID(inner int) (int, error) {
	b, err := h.running()
	if err != nil {
		return 0, err
	}
	_, files, err := b.ask(request{Op: "open-pid", PID: inner})
	if err != nil {
		return 0, fmt.Errorf("host %s: %w", h.name, err)
	}
	defer closeAll(files)
	if len(files) != 1 {
		return 0, fmt.Errorf("host %s sent %d files for process %d, want 1", h.name, len(files), inner)
	}
	return pidOf(files[0])
}

// InnerPID translates a process number of the machine into the host's.
func (h *Host) InnerPID(outer int) (int, error) {
	b, err := h.running()
	if err != nil {
		return 0, err
	}
	fd, err := unix.PidfdOpen(outer, 0)
	if err != nil {
		return 0, fmt.Errorf("no process %d on the machine: %w", outer, err)
	}
	defer unix.Close(fd)
	rep, _, err := b.ask(request{Op: "tell-pid"}, fd)
	if err != nil {
		return 0, fmt.Errorf("host %s, process %d of the machine: %w", h.name, outer, err)
	}
	return rep.PID, nil
}
