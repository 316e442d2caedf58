package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/health/grpc_health_v1"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

type devFlags struct {
	dir        string
	host       string
	listen     string
	hookSocket string
	serverOnly bool
}

func (c *cli) devCommand() *cobra.Command {
	var f devFlags
	cmd := &cobra.Command{
		Use:   "dev [--dir DIR] [--server-only]",
		Short: "Run a pool of one host on this machine, to try things",
		Long: `Run a server with an etcd of its own and an agent for this machine, until ^C.

Everything is below one directory: a temporary one that goes away at the end, or --dir, which stays and
can be used again. Neither /etc/nsalloc nor /run/nsalloc is touched. CRIU's hook knows one socket only,
` + criuhook.SocketPath + `: to try hand-offs too, say --hook-socket ` + criuhook.SocketPath + `.`,
		Example: `  nsalloc dev
  nsalloc dev --dir ~/nsalloc --listen 7070`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return c.dev(cmd.Context(), f) },
	}
	fl := cmd.Flags()
	fl.StringVar(&f.dir, "dir", "", "keep everything in this `DIR` (default: a temporary one)")
	fl.StringVar(&f.host, "host", "", "this host's `NAME` (default: the machine's)")
	fl.StringVar(&f.listen, "listen", "", "let the server listen at this `ADDRESS` too: HOST:PORT, or a port of 127.0.0.1")
	fl.StringVar(&f.hookSocket, "hook-socket", "", "where the agent listens for the hook (default: in DIR)")
	fl.BoolVar(&f.serverOnly, "server-only", false, "no agent: it needs root, the server does not")
	return cmd
}

// How long a daemon may take to be ready, and to stop.
const (
	readyWithin = 30 * time.Second
	stopWithin  = 15 * time.Second
)

func (c *cli) dev(ctx context.Context, f devFlags) error {
	// The kernel kills the children with the thread that made them (see startDaemon), so that thread has
	// to be this one, and to stay.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	if os.Geteuid() != 0 && !f.serverOnly {
		return fail(exitError, "the agent reads the namespaces of every process, which takes root; run it as root, or say --server-only")
	}
	listen, err := listenAddress(f.listen)
	if err != nil {
		return err
	}
	server, err := c.beside("nsalloc-server")
	if err != nil {
		return fail(exitError, "%w; `make build` puts all of them into bin/", err)
	}
	agent := ""
	if !f.serverOnly {
		if agent, err = c.beside("nsalloc-agent"); err != nil {
			return fail(exitError, "%w; `make build` puts all of them into bin/, --server-only does without", err)
		}
	}
	d, err := newDevDir(f)
	if err != nil {
		return err
	}
	defer d.remove()

	log := &devLog{out: c.out, paint: c.paint(c.out)}
	var running []*daemon
	defer func() {
		for i := len(running) - 1; i >= 0; i-- { // the agent first: it says goodbye to the server
			running[i].stop(stopWithin)
		}
	}()
	start := func(name string, s style, program string, args ...string) (*daemon, error) {
		p, err := startDaemon(log.prefixed(name, s), name, program, args...)
		if err != nil {
			return nil, fail(exitError, "%s did not start: %w", name, err)
		}
		running = append(running, p)
		return p, nil
	}

	c.server, c.agent = "unix://"+d.serverSocket, "unix://"+d.agentSocket
	args := []string{"--data-dir", d.serverData, "--listen", c.server}
	if listen != "" {
		args = append(args, "--listen", listen)
	}
	p, err := start("server", styleKey, server, args...)
	if err != nil {
		return err
	}
	if err := ready(ctx, p, c.serverReady); err != nil {
		return err
	}
	if agent != "" {
		if p, err = start("agent", styleWarn, agent, "--config", d.agentConfig); err != nil {
			return err
		}
		if err := ready(ctx, p, c.agentReady); err != nil {
			return err
		}
	}
	log.say(c.devReady(d, agent != ""))
	return watch(ctx, running)
}

// listenAddress takes a bare port as one of this machine alone.
func listenAddress(text string) (string, error) {
	port, err := strconv.Atoi(text)
	switch {
	case err != nil:
		return text, nil // the server says what is wrong with it
	case port < 1 || port > 65535:
		return "", usage("--listen %s is no port; write one of 1 to 65535, such as 7070", text)
	}
	return fmt.Sprintf("127.0.0.1:%d", port), nil
}

// devDir is where one `nsalloc dev` has everything.
type devDir struct {
	lock                                  *os.File
	path                                  string
	temporary                             bool
	serverData, agentData                 string
	serverSocket, agentSocket, hookSocket string
	agentConfig                           string
}

// maxSocketPath is what the kernel takes (sun_path).
const maxSocketPath = 107

func newDevDir(f devFlags) (*devDir, error) {
	d := &devDir{path: f.dir}
	var err error
	if d.path == "" {
		d.temporary = true
		d.path, err = os.MkdirTemp("", "nsalloc-dev-")
	} else if d.path, err = filepath.Abs(d.path); err == nil {
		err = os.MkdirAll(d.path, 0o700)
	}
	if err != nil {
		return nil, fail(exitError, "%w; name another directory with --dir", err)
	}
	if err := d.take(); err != nil {
		d.remove()
		return nil, err
	}
	in := func(name string) string { return filepath.Join(d.path, name) }
	d.serverData, d.agentData = in("server"), in("agent")
	d.serverSocket, d.agentSocket, d.hookSocket = in("server.sock"), in("agent.sock"), in("hook.sock")
	d.agentConfig = in("agent.yaml")
	if f.hookSocket != "" {
		if d.hookSocket, err = filepath.Abs(f.hookSocket); err != nil {
			d.remove()
			return nil, err
		}
	}
	if len(d.serverSocket) > maxSocketPath {
		d.remove()
		return nil, usage("directory %s is too long for sockets in it (%d bytes are allowed); name a shorter one with --dir", d.path, maxSocketPath)
	}
	host := f.host
	if host == "" {
		host = hostName()
	}
	if err := alloc.ValidateName("host", host); err != nil {
		d.remove()
		return nil, usage("%w; say another one with --host", err)
	}
	// The file and not flags: whoever looks at how to write one finds it here.
	text := fmt.Sprintf("# Written by nsalloc dev.\nhost: %s\nserver: unix://%s\nstate_dir: %s\nagent_socket: %s\nhook_socket: %s\n",
		host, d.serverSocket, d.agentData, d.agentSocket, d.hookSocket)
	err = os.WriteFile(d.agentConfig, []byte(text), 0o600)
	for _, dir := range []string{d.serverData, d.agentData, filepath.Dir(d.hookSocket)} {
		if err == nil {
			err = os.MkdirAll(dir, 0o700)
		}
	}
	if err != nil {
		d.remove()
		return nil, fail(exitError, "%w; name another directory with --dir", err)
	}
	return d, nil
}

// take locks the directory before anything in it is touched: what another one there has written would be
// overwritten, and its server would be taken for ours. The lock ends with this process.
func (d *devDir) take() error {
	dir, err := os.Open(d.path)
	if err == nil {
		if err = unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
			d.lock = dir
			return nil
		}
		dir.Close()
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fail(exitConflict, "another nsalloc dev uses %s; stop it, or name another directory with --dir", d.path)
	}
	return fail(exitError, "directory %s: %w; name another one with --dir", d.path, err)
}

// remove gives the directory free, and takes a temporary one away.
func (d *devDir) remove() {
	if d.temporary {
		os.RemoveAll(d.path)
	}
	if d.lock != nil {
		d.lock.Close()
	}
}

var notInNames = regexp.MustCompile(`[^a-z0-9.-]+`)

// hostName makes a name of the pool out of the machine's.
func hostName() string {
	name, _ := os.Hostname()
	name = notInNames.ReplaceAllString(strings.ToLower(name), "-")
	if len(name) > 63 {
		name = name[:63]
	}
	if name = strings.Trim(name, ".-"); name == "" {
		return "localhost"
	}
	return name
}

func (c *cli) serverReady(ctx context.Context) error {
	p, err := c.dialPool()
	if err != nil {
		return err
	}
	defer p.Close()
	got, err := grpc_health_v1.NewHealthClient(p.Conn()).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	if err == nil && got.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		err = fmt.Errorf("its health is %s", got.GetStatus())
	}
	return err
}

func (c *cli) agentReady(ctx context.Context) error {
	h, err := c.dialAgent()
	if err != nil {
		return err
	}
	defer h.Close()
	st, err := h.Status(ctx, &nsallocv1.StatusRequest{})
	if err == nil && !st.GetConnected() {
		err = errors.New("it does not reach the server: " + st.GetTrouble())
	}
	return err
}

// ready waits until a daemon answers well, or is no more.
func ready(ctx context.Context, p *daemon, ask func(context.Context) error) error {
	limit := time.NewTimer(readyWithin)
	defer limit.Stop()
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	var last error
	for {
		try, cancel := context.WithTimeout(ctx, 2*time.Second)
		last = ask(try)
		cancel()
		if last == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fail(exitError, "interrupted before nsalloc-%s was ready", p.name)
		case <-p.done:
			return p.died()
		case <-limit.C:
			return fail(exitUnavailable, "nsalloc-%s was not ready within %s: %w; its log is above", p.name, readyWithin, last)
		case <-again.C:
		}
	}
}

// watch returns nil when ctx ends, or how the first daemon died.
func watch(ctx context.Context, all []*daemon) error {
	gone := make(chan *daemon, len(all))
	for _, p := range all {
		go func() {
			<-p.done
			gone <- p
		}()
	}
	select {
	case <-ctx.Done():
		return nil
	case p := <-gone:
		return p.died()
	}
}

// devReady says what to paste: whole commands, because sudo passes neither the environment on nor a PATH
// that has this program in it.
func (c *cli) devReady(d *devDir, agent bool) string {
	p := c.paint(c.out)
	self, err := os.Executable()
	if err != nil {
		self = "nsalloc"
	}
	self = shellWord(self)
	if c.getenv("SUDO_UID") != "" { // the other terminal is not root's either
		self = "sudo " + self
	}
	var b strings.Builder
	fmt.Fprintf(&b, "\n%s In another terminal:\n\n", p.do(styleGood, "Ready."))
	if agent {
		to := shellWord("unix://" + d.agentSocket)
		fmt.Fprintf(&b, "  %s ps --agent %s\n", self, to)
		fmt.Fprintf(&b, "  %s who $$ --agent %s\n", self, to)
	}
	fmt.Fprintf(&b, "  %s sandbox list --server %s\n\n", self, shellWord("unix://"+d.serverSocket))
	if os.Geteuid() == 0 {
		fmt.Fprintf(&b, "The sockets answer root only.\n")
	}
	if d.temporary {
		fmt.Fprintf(&b, "Everything is in %s and goes away at the end (--dir keeps it). ^C stops it.\n", d.path)
	} else {
		fmt.Fprintf(&b, "Everything is in %s. ^C stops it.\n", d.path)
	}
	return b.String()
}

var plainWord = regexp.MustCompile(`^[A-Za-z0-9_./:@%+=,-]+$`)

// shellWord quotes what a shell would take apart.
func shellWord(text string) string {
	if plainWord.MatchString(text) {
		return text
	}
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}
