package testhost

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Options describe a pool.
type Options struct {
	RootFS string    // of all hosts; "" calls RootFS
	Hosts  []string  // names of the first hosts; AddHost makes more
	Env    []string  // more environment, KEY=VALUE, of every command in a host
	Log    io.Writer // progress; nil discards it
}

// Pool is a network of hosts, and the namespaces in which their server runs.
type Pool struct {
	rootfs      string
	rootfsLock  *os.File // shared: keeps RootFS from removing it as outdated
	hierarchies []cgroupMount
	env         []string
	state       *state
	box         *box

	mu     sync.Mutex
	hosts  []*Host // guarded by mu
	closed bool    // guarded by mu; takes no more hosts
}

// NewPool makes a pool. The context bounds the making, not the life: call
// Close. After an error nothing is left over.
func NewPool(ctx context.Context, o Options) (_ *Pool, err error) {
	if o.Log == nil {
		o.Log = io.Discard
	}
	if err := checkMachine(); err != nil {
		return nil, err
	}
	if err := Reap(); err != nil {
		return nil, fmt.Errorf("cannot clean up after an earlier program: %w", err)
	}
	p := &Pool{rootfs: o.RootFS, env: o.Env}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	if p.rootfs == "" {
		if p.rootfs, err = RootFS(ctx, o.Log); err != nil {
			return nil, err
		}
	}
	if p.rootfsLock, err = lockRootFS(p.rootfs, unix.LOCK_SH); err != nil {
		return nil, err
	}
	if p.hierarchies, err = cgroupMounts(); err != nil {
		return nil, err
	}
	if p.state, err = newState(p.hierarchies); err != nil {
		return nil, err
	}
	dir := filepath.Join(p.state.dir, ".pool")
	if err := os.MkdirAll(filepath.Join(dir, "data"), 0o755); err != nil {
		return nil, err
	}
	p.box, err = startBox(ctx, boxSpec{dir: dir, namespace: unix.CLONE_NEWNET, prepare: makeBridge})
	if err != nil {
		return nil, fmt.Errorf("cannot make the pool's network: %w", err)
	}
	// All names first, so that every /etc/hosts has them.
	for _, name := range o.Hosts {
		if _, err := p.addHost(name); err != nil {
			return nil, err
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, h := range p.Hosts() {
		g.Go(func() error { return h.Boot(ctx) })
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	fmt.Fprintf(o.Log, "pool %s: hosts %s on %s\n", p.state.id, strings.Join(o.Hosts, ", "), p.rootfs)
	return p, nil
}

// Addr is the bridge's address, where the server listens.
func (p *Pool) Addr() netip.Addr { return bridgeAddr }

// Dir is a directory of the machine that Close removes, for the server's data.
func (p *Pool) Dir() string { return filepath.Join(p.state.dir, ".pool", "data") }

// Command is a command on the machine's file system in the pool's network. It
// inherits this process's environment, and runs in a PID namespace that ends
// with the pool. All that Host.Command says holds here too.
func (p *Pool) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return relayCommand(ctx, p.box.dir, os.Environ(), name, args)
}

// Host returns a host by its name, or nil.
func (p *Pool) Host(name string) *Host {
	hosts := p.Hosts()
	if i := slices.IndexFunc(hosts, func(h *Host) bool { return h.name == name }); i >= 0 {
		return hosts[i]
	}
	return nil
}

// Hosts returns all hosts, in the order in which they were asked for.
func (p *Pool) Hosts() []*Host {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.hosts)
}

var hostName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`)

// AddHost makes another host and boots it. Hosts learn of each other's names
// when they boot.
func (p *Pool) AddHost(ctx context.Context, name string) (*Host, error) {
	h, err := p.addHost(name)
	if err != nil {
		return nil, err
	}
	if err := h.Boot(ctx); err != nil {
		return nil, err
	}
	return h, nil
}

// addHost makes a host's directories; from then on Close removes it.
func (p *Pool) addHost(name string) (*Host, error) {
	if !hostName.MatchString(name) {
		return nil, fmt.Errorf("host name %q: use up to 32 of a-z, 0-9 and -, with no - at the ends", name)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		return nil, fmt.Errorf("cannot add host %s: the pool is closed", name)
	case slices.ContainsFunc(p.hosts, func(h *Host) bool { return h.name == name }):
		return nil, fmt.Errorf("the pool has a host %s already: choose another name", name)
	case len(p.hosts) >= maxHosts:
		return nil, fmt.Errorf("the pool has %d hosts, its network takes no more: make another pool", maxHosts)
	}
	addr := bridgeAddr.As4()
	addr[3] += byte(len(p.hosts) + 1)
	h := &Host{pool: p, name: name, addr: netip.AddrFrom4(addr)}
	for _, sub := range []string{"upper", "work", "merged"} {
		if err := os.MkdirAll(filepath.Join(h.dir(), sub), 0o755); err != nil {
			return nil, fmt.Errorf("cannot make host %s: %w", name, err)
		}
	}
	p.hosts = append(p.hosts, h)
	return h, nil
}

// Close removes everything: processes, namespaces with their mounts and links,
// cgroups, directories. It may be called again, and tries again what failed.
func (p *Pool) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
	defer cancel()
	p.mu.Lock()
	p.closed = true
	hosts := p.hosts
	p.mu.Unlock()
	var g errgroup.Group
	for _, h := range hosts {
		g.Go(func() error { return h.halt(ctx, true) })
	}
	err := g.Wait()
	if p.box != nil {
		err = errors.Join(err, p.box.stop(ctx))
	}
	if err != nil {
		return err
	}
	if p.state != nil {
		if err := p.state.remove(); err != nil {
			return err
		}
	}
	if p.rootfsLock != nil {
		_ = p.rootfsLock.Close()
		p.rootfsLock = nil
	}
	return nil
}
