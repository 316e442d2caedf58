package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"github.com/nsalloc/nsalloc/pkg/client"
)

// program is a process of a cluster that is killed and started again.
type program struct {
	name string
	args []string
	cmd  *exec.Cmd
	stop context.CancelFunc
	log  *safeLog
	// command makes the command of args, which ends with its context.
	command func(ctx context.Context, name string, args ...string) *exec.Cmd
	// alive waits until it answers.
	alive func(ctx context.Context) error
}

// onMachine is a command that runs here, and not for longer than this process.
func onMachine(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
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
	ctx, stop := context.WithCancel(context.Background())
	p.cmd, p.stop = p.command(ctx, p.args[0], p.args[1:]...), stop
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	return p.cmd.Start()
}

// kill ends it as a power cut does, and returns when it is gone.
func (p *program) kill() {
	p.stop()
	_ = p.cmd.Wait()
}

// cluster is an etcd with its data on disk, and two servers over it.
type cluster struct {
	t         testing.TB
	o         clusterOptions
	dir       string
	etcd      string // the program
	endpoints []string
	members   []*program
	servers   []*program
}

// clusterOptions say how many members an etcd has, and where all of it runs.
type clusterOptions struct {
	members int
	// data is a directory of a member's data, "" for one of the test's own.
	data string
	// etcdArgs are more arguments for every member.
	etcdArgs []string
	// command is how programs are run, dial how the network is reached where they run; nil: on this machine.
	command func(ctx context.Context, name string, args ...string) *exec.Cmd
	dial    func(ctx context.Context, network, address string) (net.Conn, error)
	// listen is where server i listens, besides its socket.
	listen func(i int) []string
}

// newCluster starts one of so many members.
func newCluster(t testing.TB, members int) *cluster {
	t.Helper()
	return clusterOptions{members: members}.start(t)
}

func (o clusterOptions) start(t testing.TB) *cluster {
	t.Helper()
	if o.command == nil {
		o.command, o.dial = onMachine, (&net.Dialer{}).DialContext
	}
	c := &cluster{t: t, o: o, dir: t.TempDir()}
	var err error
	if c.etcd, err = buildEtcd(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.close)
	c.defineMembers()
	c.begin(c.members...)
	c.run("pool", "init", "--etcd", strings.Join(c.endpoints, ","))
	c.defineServers()
	c.begin(c.servers...)
	return c
}

// buildEtcd builds it once for all tests, into a directory that run removes.
var buildEtcd = sync.OnceValues(func() (string, error) {
	path := filepath.Join(scratch, "etcd")
	build := exec.Command("go", "build", "-o", path, "./etcd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build etcd: %w\n%s", err, out)
	}
	return path, nil
})

// close ends what runs, and shows what it said when the test has failed.
func (c *cluster) close() {
	for _, p := range append(c.servers, c.members...) {
		if p.cmd != nil && p.cmd.Process != nil {
			p.kill()
		}
		if c.t.Failed() {
			c.t.Logf("%s:\n%s", p.name, p.log)
		}
	}
}

// run runs nsalloc, to its end, and returns what it says.
func (c *cluster) run(args ...string) string {
	c.t.Helper()
	out, err := c.try(args...)
	if err != nil {
		c.t.Fatalf("nsalloc %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (c *cluster) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	out, err := c.o.command(ctx, filepath.Join(binaries, "nsalloc"), args...).CombinedOutput()
	return string(out), err
}

// defineMembers says what the members of etcd are.
func (c *cluster) defineMembers() {
	c.t.Helper()
	members := c.o.members
	var initial []string
	ports := freePorts(c.t, 2*members)
	for i := range members {
		initial = append(initial, fmt.Sprintf("m%d=http://127.0.0.1:%d", i, ports[2*i+1]))
	}
	for i := range members {
		name, url, peer := fmt.Sprintf("m%d", i), fmt.Sprintf("http://127.0.0.1:%d", ports[2*i]), fmt.Sprintf("http://127.0.0.1:%d", ports[2*i+1])
		c.endpoints = append(c.endpoints, url)
		data := c.o.data
		if data == "" {
			data = filepath.Join(c.dir, name)
		}
		c.members = append(c.members, &program{name: name, log: new(safeLog), command: c.o.command, alive: c.answers(url), args: append([]string{c.etcd,
			"--name", name, "--data-dir", data, "--log-level", "error",
			"--listen-client-urls", url, "--advertise-client-urls", url, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
			"--initial-cluster", strings.Join(initial, ","), "--initial-cluster-token", "t", "--initial-cluster-state", "new",
			"--heartbeat-interval", "50", "--election-timeout", "500",
		}, c.o.etcdArgs...)})
	}
}

// defineServers says what the servers are.
func (c *cluster) defineServers() {
	for i := range 2 {
		args := []string{filepath.Join(binaries, "nsalloc-server"), "--etcd", strings.Join(c.endpoints, ","), "--listen", c.address(i),
			"--data-dir", c.dataDir(i)}
		if c.o.listen != nil {
			args = append(args, "--insecure")
			for _, address := range c.o.listen(i) {
				args = append(args, "--listen", address)
			}
		}
		c.servers = append(c.servers, &program{name: fmt.Sprintf("s%d", i), log: new(safeLog), command: c.o.command, alive: c.serves(c.address(i)), args: args})
	}
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
		etcd, err := c.client(url)
		if err != nil {
			return err
		}
		defer etcd.Close()
		return until(ctx, func(ctx context.Context) error { _, err := etcd.Get(ctx, "x"); return err })
	}
}

// client speaks to etcd itself.
func (c *cluster) client(urls ...string) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{Endpoints: urls, Logger: zap.NewNop(), DialOptions: []grpc.DialOption{
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) { return c.o.dial(ctx, "tcp", address) }),
		// It is to be noticed at once that a member is back.
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.2, MaxDelay: 50 * time.Millisecond}, MinConnectTimeout: time.Second}),
	}})
}

// remove takes a server that is gone for good out of the pool, through another.
func (c *cluster) remove(through, gone int) {
	c.t.Helper()
	found, err := c.dial(through, "").Servers(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	i := slices.IndexFunc(found, func(s client.ServerStatus) bool { return s.Address == c.address(gone) })
	if i < 0 {
		c.t.Fatalf("server %d is not listed: %+v", gone, found)
	}
	c.run("--server", c.address(through), "server", "remove", found[i].Name)
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

// dataDir is a server's.
func (c *cluster) dataDir(i int) string { return filepath.Join(c.dir, fmt.Sprintf("s%d", i)) }

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

var givenPorts sync.Map // by port: no two tests get one

// freePorts are ports of the loopback that nobody listens on, nor will for another test.
func freePorts(t testing.TB, n int) (ports []int) {
	t.Helper()
	for len(ports) < n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close() // at the end, so that they differ
		port := l.Addr().(*net.TCPAddr).Port
		if _, given := givenPorts.LoadOrStore(port, true); !given {
			ports = append(ports, port)
		}
	}
	return ports
}
