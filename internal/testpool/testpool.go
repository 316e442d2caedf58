// Package testpool runs nsalloc itself on test hosts: the real server beside the hosts' bridge, and on
// each host the real agent and the real hook, installed as an operator would. The demo and the e2e
// tests stand on it; what they show is what the released binaries do.
//
// Everything is started by this process and ended by Close, by what was started and nothing else.
// The daemons' logs are kept in the pool's scratch directory until then; Logs returns them.
package testpool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/internal/killpoint"
	"github.com/nsalloc/nsalloc/internal/testhost"
	"github.com/nsalloc/nsalloc/pkg/client"
)

const (
	serverPort = "7000"
	agentSock  = "/run/nsalloc/agent.sock"
	binDir     = "/usr/local/bin"
	// killpointDir is a host's directory of armed points.
	killpointDir = "/run/killpoints"
	// readyIn bounds how long a daemon may take to answer after its start.
	readyIn = 30 * time.Second
)

// Options say what to run.
type Options struct {
	// Bin is the directory of the built binaries.
	Bin string
	// Hosts are the hosts' names.
	Hosts []string
	// RootFS is as in testhost.Options.
	RootFS string
	// Log takes the progress of what can take long.
	Log io.Writer
	// AgentArgs are more arguments for every agent.
	AgentArgs []string
	// Killpoints says that the binaries have the build tag killpoints: Killpoints then names directories.
	Killpoints bool
	// Servers, if it is set, starts the pool's servers, which are its own then, once there are hosts: in the
	// pool's network, one of them at ServerAddr. It returns where they listen; the hosts' agents use them in turn.
	Servers func(ctx context.Context, p *Pool) (addresses []string, err error)
}

// Pool is a running pool. It is safe for concurrent use.
type Pool struct {
	*testhost.Pool
	o      Options
	client *client.Client

	mu     sync.Mutex
	server *daemon            // guarded by mu
	agents map[string]*daemon // guarded by mu
	conns  map[string]*grpc.ClientConn
}

// daemon is a started process with its log.
type daemon struct {
	cmd  *exec.Cmd
	stop context.CancelFunc
	log  *os.File
	done chan struct{} // closed when it has ended; err is set then
	err  error
}

// Start makes the hosts, starts server and agents, and waits until every agent has joined and swept.
func Start(ctx context.Context, o Options) (*Pool, error) {
	var env []string
	if o.Killpoints {
		env = []string{killpoint.Env + "=" + killpointDir}
	}
	hosts, err := testhost.NewPool(ctx, testhost.Options{RootFS: o.RootFS, Hosts: o.Hosts, Env: env, Log: o.Log})
	if err != nil {
		return nil, err
	}
	p := &Pool{Pool: hosts, o: o, agents: map[string]*daemon{}, conns: map[string]*grpc.ClientConn{}}
	fail := func(err error) (*Pool, error) {
		err = fmt.Errorf("%w\n%s", err, p.Logs())
		return nil, errors.Join(err, p.Close())
	}
	p.client, err = client.Dial(p.ServerAddr(), client.WithInsecure(), client.WithDialOptions(grpc.WithContextDialer(p.dial)))
	if err != nil {
		return fail(err)
	}
	servers := []string{p.ServerAddr()}
	if o.Servers == nil {
		err = p.StartServer(ctx)
	} else {
		servers, err = o.Servers(ctx, p)
	}
	if err != nil {
		return fail(err)
	}
	for i, h := range hosts.Hosts() {
		if err := p.install(ctx, h, servers[i%len(servers)]); err != nil {
			return fail(err)
		}
		if err := p.StartAgent(ctx, h.Name()); err != nil {
			return fail(err)
		}
	}
	return p, nil
}

// ServerAddr is where the server listens, as hosts reach it.
func (p *Pool) ServerAddr() string { return net.JoinHostPort(p.Addr().String(), serverPort) }

func (p *Pool) dial(ctx context.Context, addr string) (net.Conn, error) {
	return p.DialContext(ctx, "tcp", strings.TrimPrefix(addr, "passthrough:///"))
}

// Client speaks to the server as an operator.
func (p *Pool) Client() *client.Client { return p.client }

// Install puts the binaries and their configuration on a host, and the hook into CRIU's, by the
// operator's own command.
func (p *Pool) Install(ctx context.Context, h *testhost.Host) error {
	return p.install(ctx, h, p.ServerAddr())
}

func (p *Pool) install(ctx context.Context, h *testhost.Host, server string) error {
	for _, name := range []string{"nsalloc", "nsalloc-agent", "nsalloc-hook"} {
		if err := h.CopyIn(filepath.Join(p.o.Bin, name), filepath.Join(binDir, name), 0o755); err != nil {
			return fmt.Errorf("install %s: %w; build the binaries first: make build", name, err)
		}
	}
	if err := h.MkdirAll("/etc/nsalloc", 0o755); err != nil {
		return err
	}
	conf := fmt.Sprintf("host: %s\nserver: %s\ninsecure: true\n", h.Name(), server)
	if err := h.WriteFile("/etc/nsalloc/agent.yaml", []byte(conf), 0o644); err != nil {
		return err
	}
	return p.InstallHook(ctx, h)
}

// InstallHook puts the hook into the host's CRIU configuration.
func (p *Pool) InstallHook(ctx context.Context, h *testhost.Host) error {
	return Output(h.Command(ctx, binDir+"/nsalloc", "hook", "install", "--yes", "--hook", binDir+"/nsalloc-hook"), nil)
}

// Output runs cmd and keeps what it prints in out; its error carries what cmd said.
func Output(cmd *exec.Cmd, out *bytes.Buffer) error {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if out != nil {
		out.Write(stdout.Bytes())
	}
	if err != nil {
		return fmt.Errorf("%s: %w\n%s%s", strings.Join(cmd.Args, " "), err, stdout.Bytes(), stderr.Bytes())
	}
	return nil
}

// StartServer starts the server on the data that it had, and waits until it serves.
func (p *Pool) StartServer(ctx context.Context) error {
	d, err := p.start("server", func(ctx context.Context) *exec.Cmd {
		cmd := p.Command(ctx, filepath.Join(p.o.Bin, "nsalloc-server"),
			"--data-dir", filepath.Join(p.Dir(), "server"), "--listen", p.ServerAddr(), "--insecure")
		if p.o.Killpoints {
			cmd.Env = append(cmd.Env, killpoint.Env+"="+p.Killpoints(""))
		}
		return cmd
	})
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.server = d
	p.mu.Unlock()
	return d.until(ctx, "server", func(ctx context.Context) error {
		_, _, err := p.client.Pool(ctx)
		return err
	})
}

// StartAgent starts a host's agent on the state that it had, and waits until it has joined the pool and
// swept once.
func (p *Pool) StartAgent(ctx context.Context, host string) error {
	began := time.Now()
	return p.startAgent(ctx, host, func(s *nsallocv1.StatusResponse) error {
		if !s.GetConnected() || s.GetSwept() == nil || s.GetSwept().AsTime().Before(began) {
			return fmt.Errorf("it has not joined and swept yet: %s", s.GetTrouble())
		}
		return nil
	})
}

// StartAgentAway is StartAgent while the pool is away: it waits until the agent answers.
func (p *Pool) StartAgentAway(ctx context.Context, host string) error {
	return p.startAgent(ctx, host, func(*nsallocv1.StatusResponse) error { return nil })
}

func (p *Pool) startAgent(ctx context.Context, host string, ready func(*nsallocv1.StatusResponse) error) error {
	h := p.Host(host)
	d, err := p.start("agent-"+host, func(ctx context.Context) *exec.Cmd {
		return h.Command(ctx, binDir+"/nsalloc-agent", p.o.AgentArgs...)
	})
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.agents[host] = d
	p.mu.Unlock()
	return d.until(ctx, "agent of host "+host, func(ctx context.Context) error {
		a, err := p.Agent(host)
		if err != nil {
			return err
		}
		s, err := a.Status(ctx, &nsallocv1.StatusRequest{})
		if err != nil {
			return err
		}
		return ready(s)
	})
}

// Agent speaks to a host's agent.
func (p *Pool) Agent(host string) (nsallocv1.AgentClient, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.conns[host]; c != nil {
		return nsallocv1.NewAgentClient(c), nil
	}
	// The path goes through /proc/PID/root and changes when the host boots anew: look it up each time.
	h := p.Host(host)
	c, err := client.DialConn("unix://"+agentSock, client.WithDialOptions(grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", h.Path(agentSock))
	})))
	if err != nil {
		return nil, err
	}
	p.conns[host] = c
	return nsallocv1.NewAgentClient(c), nil
}

// Killpoints is the directory, as this process reaches it, in which the points of a host's agent and hook
// are armed; "" for the server's.
func (p *Pool) Killpoints(host string) string {
	if host == "" {
		return filepath.Join(p.Dir(), "killpoints")
	}
	return p.Host(host).Path(killpointDir)
}

// AgentEnded is closed when the agent that was started last on a host has ended.
func (p *Pool) AgentEnded(host string) <-chan struct{} { return p.agent(host).done }

// ServerEnded is closed when the server that was started last has ended.
func (p *Pool) ServerEnded() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.server.done
}

// KillAgent ends a host's agent with SIGKILL; StopAgent asks it to end.
func (p *Pool) KillAgent(host string) error { return p.agent(host).kill() }

// StopAgent ends a host's agent with SIGTERM.
func (p *Pool) StopAgent(host string) error { return p.agent(host).terminate() }

// KillServer ends the server with SIGKILL.
func (p *Pool) KillServer() error {
	p.mu.Lock()
	d := p.server
	p.mu.Unlock()
	return d.kill()
}

func (p *Pool) agent(host string) *daemon {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.agents[host]
}

// start runs a command with its log in the scratch directory.
func (p *Pool) start(name string, command func(context.Context) *exec.Cmd) (*daemon, error) {
	log, err := os.OpenFile(filepath.Join(p.Dir(), name+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	d := &daemon{cmd: command(ctx), stop: stop, log: log, done: make(chan struct{})}
	d.cmd.Stdout, d.cmd.Stderr = log, log
	if err := d.cmd.Start(); err != nil {
		stop()
		log.Close()
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		d.err = d.cmd.Wait()
		log.Close()
		close(d.done)
	}()
	return d, nil
}

func (d *daemon) kill() error {
	if d == nil {
		return nil
	}
	d.stop()
	<-d.done
	return nil
}

// terminate asks the process to end and waits for it.
func (d *daemon) terminate() error {
	if d == nil {
		return nil
	}
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-d.done:
		d.stop()
		return d.err
	case <-time.After(readyIn):
		return errors.Join(errors.New("it did not end on SIGTERM"), d.kill())
	}
}

// until waits for a daemon's answer, and not for one that has ended.
func (d *daemon) until(ctx context.Context, what string, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, readyIn)
	defer cancel()
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	for {
		once, done := context.WithTimeout(ctx, time.Second)
		err := try(once)
		done()
		if err == nil {
			return nil
		}
		select {
		case <-t.C:
		case <-d.done:
			return fmt.Errorf("the %s ended: %w", what, d.err)
		case <-ctx.Done():
			return fmt.Errorf("the %s is not ready: %w", what, err)
		}
	}
}

// Logs is what the daemons wrote, for a failure's report.
func (p *Pool) Logs() string {
	var b strings.Builder
	paths, _ := filepath.Glob(filepath.Join(p.Dir(), "*.log"))
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err == nil {
			fmt.Fprintf(&b, "--- %s\n%s", strings.TrimSuffix(filepath.Base(path), ".log"), data)
		}
	}
	return b.String()
}

// Close ends everything that Start and its like began.
func (p *Pool) Close() error {
	p.mu.Lock()
	daemons := []*daemon{p.server}
	for _, d := range p.agents {
		daemons = append(daemons, d)
	}
	conns := p.conns
	p.conns = map[string]*grpc.ClientConn{}
	p.mu.Unlock()
	for _, c := range conns {
		c.Close()
	}
	if p.client != nil {
		p.client.Close()
	}
	for _, d := range daemons {
		_ = d.kill()
	}
	return p.Pool.Close()
}
