package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/nsalloc/nsalloc/pkg/client"
)

// program is a process of a cluster that is killed and started again.
type program struct {
	name string
	args []string
	cmd  *exec.Cmd
	log  *safeLog
	// alive waits until it answers.
	alive func(ctx context.Context) error
}

// safeLog keeps the end of what a process says.
type safeLog struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

const keptLog = 64 << 10

func (l *safeLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b.Write(p)
	if over := l.b.Len() - keptLog; over > 0 {
		l.b.Next(over)
	}
	return len(p), nil
}

func (l *safeLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// start starts it and does not wait until it answers.
func (p *program) start() error {
	p.cmd = exec.Command(p.args[0], p.args[1:]...)
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return p.cmd.Start()
}

// kill ends it as a power cut does, and returns when it is gone.
func (p *program) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// cluster is an etcd with its data on disk, and two servers over it.
type cluster struct {
	t         testing.TB
	dir       string
	endpoints []string
	members   []*program
	servers   []*program
}

// newCluster starts one of so many members.
func newCluster(t testing.TB, members int) *cluster {
	t.Helper()
	c := &cluster{t: t, dir: t.TempDir()}
	etcd := filepath.Join(c.dir, "etcd")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", etcd, "./etcd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build etcd: %v\n%s", err, out)
	}
	t.Cleanup(func() {
		for _, p := range append(c.servers, c.members...) {
			if p.cmd != nil && p.cmd.Process != nil {
				p.kill()
			}
			if t.Failed() {
				t.Logf("%s:\n%s", p.name, p.log)
			}
		}
	})
	var initial []string
	ports := freePorts(t, 2*members)
	for i := range members {
		initial = append(initial, fmt.Sprintf("m%d=http://127.0.0.1:%d", i, ports[2*i+1]))
	}
	for i := range members {
		name, url, peer := fmt.Sprintf("m%d", i), fmt.Sprintf("http://127.0.0.1:%d", ports[2*i]), fmt.Sprintf("http://127.0.0.1:%d", ports[2*i+1])
		c.endpoints = append(c.endpoints, url)
		c.members = append(c.members, &program{name: name, log: new(safeLog), alive: c.answers(url), args: []string{etcd,
			"--name", name, "--data-dir", filepath.Join(c.dir, name), "--log-level", "error",
			"--listen-client-urls", url, "--advertise-client-urls", url, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
			"--initial-cluster", strings.Join(initial, ","), "--initial-cluster-token", "t", "--initial-cluster-state", "new",
			"--heartbeat-interval", "50", "--election-timeout", "500",
		}})
	}
	c.begin(c.members...)
	if out, err := exec.CommandContext(t.Context(), filepath.Join(binaries, "nsalloc"), "pool", "init", "--etcd", strings.Join(c.endpoints, ",")).CombinedOutput(); err != nil {
		t.Fatalf("pool init: %v\n%s", err, out)
	}
	for i := range 2 {
		socket := "unix://" + filepath.Join(c.dir, fmt.Sprintf("s%d.sock", i))
		c.servers = append(c.servers, &program{name: fmt.Sprintf("s%d", i), log: new(safeLog), alive: c.serves(socket), args: []string{
			filepath.Join(binaries, "nsalloc-server"), "--etcd", strings.Join(c.endpoints, ","), "--listen", socket,
			"--data-dir", filepath.Join(c.dir, fmt.Sprintf("s%d", i))}})
	}
	c.begin(c.servers...)
	return c
}

// begin starts programs and waits until each answers.
func (c *cluster) begin(ps ...*program) {
	c.t.Helper()
	for _, p := range ps {
		if err := p.start(); err != nil {
			c.t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	for _, p := range ps {
		if err := p.alive(ctx); err != nil {
			c.t.Fatalf("%s: %v", p.name, err)
		}
	}
}

// answers waits until a member of etcd answers a linearizable read.
func (c *cluster) answers(url string) func(context.Context) error {
	return func(ctx context.Context) error {
		etcd, err := clientv3.New(clientv3.Config{Endpoints: []string{url}, Logger: zap.NewNop()})
		if err != nil {
			return err
		}
		defer etcd.Close()
		return until(ctx, func(ctx context.Context) error { _, err := etcd.Get(ctx, "x"); return err })
	}
}

// serves waits until a server answers from the store.
func (c *cluster) serves(address string) func(context.Context) error {
	return func(ctx context.Context) error {
		s, err := client.Dial(address)
		if err != nil {
			return err
		}
		defer s.Close()
		return until(ctx, func(ctx context.Context) error { _, _, err := s.Pool(ctx); return err })
	}
}

// until tries until it works, or gives up with ctx.
func until(ctx context.Context, try func(context.Context) error) error {
	for {
		once, cancel := context.WithTimeout(ctx, 2*time.Second)
		err := try(once)
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ctx.Err(), err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// address is where a server listens.
func (c *cluster) address(i int) string {
	return "unix://" + filepath.Join(c.dir, fmt.Sprintf("s%d.sock", i))
}

// dial connects to a server, in a host's name if that is not "".
func (c *cluster) dial(i int, host string) *client.Client {
	c.t.Helper()
	var opts []client.Option
	if host != "" {
		opts = append(opts, client.WithHost(host))
	}
	s, err := client.Dial(c.address(i), opts...)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = s.Close() })
	return s
}

// freePorts are ports of the loopback that nobody listens on.
func freePorts(t testing.TB, n int) (ports []int) {
	t.Helper()
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close() // at the end, so that they differ
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports
}
