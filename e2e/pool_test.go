package e2e

import (
	"bytes"
	"context"
	"fmt"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/internal/testhost"
	"github.com/nsalloc/nsalloc/internal/testpool"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// settledIn is how long pool and processes may take to agree after a step.
const settledIn = 10 * time.Second

// pool is a running pool with a test's questions.
type pool struct {
	*testpool.Pool
	t *testing.T
}

func (p *pool) ctx() context.Context {
	ctx, cancel := context.WithTimeout(p.t.Context(), time.Minute)
	p.t.Cleanup(cancel)
	return ctx
}

// eventually waits until try succeeds, for settledIn at most.
func (p *pool) eventually(what string, try func() error) {
	p.t.Helper()
	deadline := time.Now().Add(settledIn)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("%s: not within %v: %v", what, settledIn, err)
		}
		<-tick.C
	}
}

// container is one runc container with its places on the hosts.
type container struct {
	p      *pool
	id     string
	bundle string
	images string
	// external are the types of namespaces that the container was handed in and that stay on each host.
	external map[alloc.NamespaceType]bool
}

// container writes the bundle on every host and runs it on one.
func (p *pool) container(id, on string, o testhost.BundleOptions) *container {
	p.t.Helper()
	c := &container{p: p, id: id, bundle: "/var/lib/bundles/" + id, images: "/var/lib/images/" + id}
	for _, h := range p.Hosts() {
		if err := h.WriteBundle(c.bundle, o); err != nil {
			p.t.Fatal(err)
		}
		if err := h.MkdirAll(path.Dir(c.images), 0o755); err != nil {
			p.t.Fatal(err)
		}
	}
	if err := p.Host(on).Runc(p.ctx(), "run", "-d", "--bundle", c.bundle, id); err != nil {
		p.t.Fatal(err)
	}
	c.countsOn(on, 2)
	return c
}

// dump checkpoints the container; more are arguments of runc checkpoint.
func (c *container) dump(on string, more ...string) error {
	if err := c.p.Host(on).MkdirAll(c.images, 0o755); err != nil {
		return err
	}
	args := append([]string{"checkpoint", "--image-path", c.images, "--work-path", c.images + "-dump"}, more...)
	return c.p.Host(on).Runc(c.p.ctx(), append(args, c.id)...)
}

// move copies the images.
func (c *container) move(from, to string) {
	c.p.t.Helper()
	if err := c.p.Host(to).CopyDir(c.p.Host(from), c.images, c.images); err != nil {
		c.p.t.Fatal(err)
	}
}

// restore restores the images under an id, "" for the container's own.
func (c *container) restore(on, id string) error {
	if id == "" {
		id = c.id
	}
	return c.p.Host(on).Runc(c.p.ctx(), "restore", "-d", "--bundle", c.bundle, "--image-path", c.images, "--work-path", c.images+"-restore", id)
}

// remove deletes what runc still knows of a container that failed or ended.
func (c *container) remove(on, id string) {
	_ = c.p.Host(on).Runc(c.p.ctx(), "delete", "--force", id)
}

// countsOn waits until the workload counts beyond from, and returns the count.
func (c *container) countsOn(host string, from int) int { return c.counts(host, c.id, from) }

func (c *container) counts(host, id string, from int) int {
	c.p.t.Helper()
	n := 0
	c.p.eventually(fmt.Sprintf("%s on host %s counts beyond %d", id, host, from), func() (err error) {
		if n, err = c.p.Host(host).Counter(c.p.ctx(), id); err == nil && n <= from {
			err = fmt.Errorf("the count is %d", n)
		}
		return err
	})
	return n
}

// namespaces is what a host's agent says of a container's init.
type namespaces map[alloc.NamespaceType]identified

type identified struct {
	serial  alloc.Serial
	sandbox alloc.Serial
	kernel  alloc.KernelID
	parent  alloc.Serial
	ofHost  bool
}

// identify asks the agent about a container's first process; see identifyPID.
func (c *container) identify(host, id string) namespaces {
	c.p.t.Helper()
	h := c.p.Host(host)
	pid, err := h.ContainerPID(c.p.ctx(), id)
	if err != nil {
		c.p.t.Fatal(err)
	}
	return c.identifyPID(host, pid)
}

// sandbox is the sandbox that holds the container's mount namespace.
func (ns namespaces) sandbox() alloc.Serial { return ns[alloc.Mnt].sandbox }

// stored reads a sandbox from the server, as of everything committed.
func (p *pool) stored(s alloc.Serial) client.Found {
	p.t.Helper()
	f, err := p.Client().Sandbox(p.ctx(), s, true)
	if err != nil {
		p.t.Fatal(err)
	}
	return f
}

// reaches waits until a sandbox is in a state on a host, and returns it.
func (p *pool) reaches(s alloc.Serial, state alloc.SandboxState, host string) client.Found {
	p.t.Helper()
	var f client.Found
	p.eventually(fmt.Sprintf("sandbox %s is %s on host %s", s, state, host), func() (err error) {
		if f, err = p.Client().Sandbox(p.ctx(), s, true); err != nil {
			return err
		}
		if f.Sandbox.State != state || f.Sandbox.Owner != host {
			return fmt.Errorf("it is %s on host %s, epoch %s", f.Sandbox.State, f.Sandbox.Owner, f.Sandbox.Epoch)
		}
		return nil
	})
	return f
}

// checkStored proves that the store says of a running sandbox what the agent says.
func (p *pool) checkStored(ns namespaces, types []alloc.NamespaceType) {
	p.t.Helper()
	s := p.stored(ns.sandbox()).Sandbox
	for _, t := range types {
		b, ok := s.Binding(ns[t].serial)
		if !ok || !b.Live() || b.Type != t || b.Kernel.Key(t) != ns[t].kernel.Key(t) {
			p.t.Errorf("%s: the store has %+v, the agent says %+v", t, b, ns[t])
		}
	}
}

// check runs `nsalloc check` on a host and expects no findings.
func (p *pool) check() {
	p.t.Helper()
	var out bytes.Buffer
	h := p.Hosts()[0]
	if err := testpool.Output(h.Command(p.ctx(), "/usr/local/bin/nsalloc", "check", "--server", p.ServerAddr(), "--insecure"), &out); err != nil {
		p.t.Errorf("check: %v", err)
	}
	if !strings.Contains(out.String(), "no findings") {
		p.t.Errorf("check: %s", out.String())
	}
}

// runtimeTypes are the namespaces that a runc container has of its own.
func runtimeTypes(userns bool) []alloc.NamespaceType {
	types := []alloc.NamespaceType{alloc.Mnt, alloc.UTS, alloc.IPC, alloc.PID, alloc.Net, alloc.Cgroup}
	if userns {
		types = append(types, alloc.User)
	}
	return types
}
