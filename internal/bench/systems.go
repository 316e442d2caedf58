package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// system is what callers ask: a server in a process of its own.
type system struct {
	address string
	version string
	like    *transaction // what registrations are measured against
	etcd    *etcdMeter
	pid     int // of its one process; 0 where there are more
	end     func()
}

// systems are those that a run has started.
type systems struct {
	ctx     context.Context
	dir     string
	server  string
	started map[string]*system
	missing map[string]string // and why
	order   []string
}

// starters start them. Registrations have a server of their own, so that others do not meet what they
// leave in its memory. An errMissing is of one that this machine has not.
var starters = map[string]func(*systems, string) (*system, error){
	"nsalloc":          startNsalloc,
	"nsalloc-register": startNsalloc,
	"echo":             startEcho,
	"etcd":             startEtcd,
	"redis-aof-always": startRedis,
	"redis-aof-off":    startRedis,
	"postgres":         startPostgres,
}

var errMissing = errors.New("not installed; `make bench-deps` installs it")

// start starts a system if it was not; "" is none.
func (s *systems) start(name string) error {
	if name == "" || s.started[name] != nil || s.missing[name] != "" {
		return nil
	}
	dir := filepath.Join(s.dir, name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	sys, err := starters[name](s, dir)
	if errors.Is(err, errMissing) {
		s.missing[name] = errMissing.Error()
		return nil
	}
	if err != nil {
		return err
	}
	s.started[name], s.order = sys, append(s.order, name)
	return nil
}

// versions are those of the systems that say one.
func (s *systems) versions() (lines []string) {
	for _, name := range s.order {
		if v := s.started[name].version; v != "" && !slices.Contains(lines, v) {
			lines = append(lines, v)
		}
	}
	return lines
}

func (s *systems) stop() {
	for _, name := range slices.Backward(s.order) {
		s.started[name].end()
	}
}

// grace is how long a server has to end when it is told to.
const grace = 10 * time.Second

// spawn starts a server that ends with a signal, also when this process is killed.
func (s *systems) spawn(cmd *exec.Cmd, end syscall.Signal) (*process, func(), error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	}
	cmd.SysProcAttr.Pdeathsig = end
	p, err := startProcess(cmd)
	if err != nil {
		return nil, nil, err
	}
	return p, func() {
		_ = cmd.Process.Signal(end)
		_ = p.in.Close()
		kill := time.AfterFunc(grace, func() { _ = cmd.Process.Kill() })
		defer kill.Stop()
		_, _ = io.Copy(io.Discard, p.out)
		_ = cmd.Wait()
	}, nil
}

func startNsalloc(s *systems, dir string) (*system, error) {
	cmd := exec.Command(s.server, "--data-dir", dir, "--listen", "127.0.0.1:0", "--log-level", "error")
	cmd.Stderr = os.Stderr
	p, end, err := s.spawn(cmd, syscall.SIGTERM)
	if err != nil {
		return nil, fmt.Errorf("%w (`make build` builds it; -server names another)", err)
	}
	sys := &system{pid: p.cmd.Process.Pid, end: end}
	for {
		line, err := p.line()
		if err != nil {
			end()
			return nil, fmt.Errorf("%s ended before it was ready", s.server)
		}
		if a, ok := strings.CutPrefix(line, "listen "); ok {
			sys.address = strings.TrimSpace(a)
		}
		if line == "ready\n" {
			break
		}
	}
	if sys.etcd, err = newEtcdMeter(s.ctx, "unix://"+filepath.Join(dir, "etcd.sock")); err != nil {
		end()
	}
	return sys, err
}

// startSelf starts this program in a role, which says its address first.
func (s *systems) startSelf(role string, args ...string) (*system, error) {
	cmd, err := roleCommand(context.WithoutCancel(s.ctx), role, args...)
	if err != nil {
		return nil, err
	}
	p, end, err := s.spawn(cmd, syscall.Signal(0)) // it ends when its input does
	if err != nil {
		return nil, err
	}
	line, err := p.line()
	if err != nil {
		end()
		return nil, fmt.Errorf("it ended before it was ready: %w", err)
	}
	return &system{address: strings.TrimSpace(line), pid: p.cmd.Process.Pid, end: end}, nil
}

func startEcho(s *systems, _ string) (*system, error) { return s.startSelf("echo") }

func startEtcd(s *systems, dir string) (*system, error) {
	sys, err := s.startSelf("etcd", dir)
	if err != nil {
		return nil, err
	}
	if sys.like, err = recordRegistration(s.ctx, sys.address); err == nil {
		sys.etcd, err = newEtcdMeter(s.ctx, sys.address)
	}
	if err == nil {
		sys.version, err = sys.etcd.version(s.ctx)
	}
	if err != nil {
		sys.end()
	}
	return sys, err
}

func startRedis(s *systems, dir string) (*system, error) {
	path, err := exec.LookPath("redis-server")
	if err != nil {
		return nil, errMissing
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	args := []string{"--bind", "127.0.0.1", "--port", port, "--dir", dir, "--save", "", "--loglevel", "warning", "--appendonly", "no"}
	if strings.HasSuffix(dir, "always") {
		args = append(args[:len(args)-1], "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0")
	}
	p, end, err := s.spawn(exec.Command(path, args...), syscall.SIGTERM)
	if err != nil {
		return nil, err
	}
	sys := &system{address: "127.0.0.1:" + port, pid: p.cmd.Process.Pid, end: end, version: versionOf(path)}
	return sys, s.await(sys, func(ctx context.Context) error {
		r, err := dialRedis(ctx, sys.address)
		if err != nil {
			return err
		}
		_, err = r.incrBy(1)
		return errors.Join(err, r.conn.Close())
	})
}

// startPostgres starts an instance of our own. PostgreSQL refuses to be root, so that root gives it to the
// user that Debian makes for it.
func startPostgres(s *systems, dir string) (*system, error) {
	bin, err := postgresBin()
	if err != nil {
		return nil, err
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	attr := &syscall.SysProcAttr{Setpgid: true}
	if os.Geteuid() == 0 {
		u, err := user.Lookup("postgres")
		if err != nil {
			return nil, errMissing
		}
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		if err := os.Chown(dir, uid, gid); err != nil {
			return nil, err
		}
		attr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	data := filepath.Join(dir, "data")
	initdb := exec.CommandContext(s.ctx, filepath.Join(bin, "initdb"), "-D", data, "-A", "trust", "-U", postgresUser, "--no-sync", "--no-locale")
	initdb.Dir, initdb.SysProcAttr = dir, attr
	if out, err := initdb.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("initdb: %w: %s", err, out)
	}
	// No checkpoint comes in between, and all callers may connect.
	cmd := exec.Command(filepath.Join(bin, "postgres"), "-D", data, "-p", port, "-c", "listen_addresses=127.0.0.1", "-k", "",
		"-c", "max_connections=300", "-c", "fsync=on", "-c", "checkpoint_timeout=1h", "-c", "log_min_messages=fatal")
	cmd.Dir, cmd.SysProcAttr = dir, attr
	_, end, err := s.spawn(cmd, syscall.SIGINT) // at once, whoever is connected
	if err != nil {
		return nil, err
	}
	sys := &system{address: "127.0.0.1:" + port, end: end, version: versionOf(cmd.Path)}
	return sys, s.await(sys, func(ctx context.Context) error {
		p, err := dialPostgres(ctx, sys.address)
		if err != nil {
			return err
		}
		_, err = p.ask(message('Q', sequence))
		return errors.Join(err, p.conn.Close())
	})
}

// postgresBin is where the server is: Debian keeps it out of PATH.
func postgresBin() (string, error) {
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if path, lookErr := exec.LookPath("initdb"); lookErr == nil {
		found = append(found, path)
	}
	if err != nil || len(found) == 0 {
		return "", errMissing
	}
	return filepath.Dir(found[len(found)-1]), nil
}

// await tries until the system answers.
func (s *systems) await(sys *system, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(s.ctx, patience)
	defer cancel()
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		timer := time.NewTimer(50 * time.Millisecond)
		select {
		case <-timer.C:
		case <-ctx.Done():
			sys.end()
			return fmt.Errorf("it did not become ready: %w", err)
		}
	}
}

// freePort is a port that nobody has at the moment.
func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	_, port, err := net.SplitHostPort(l.Addr().String())
	return port, errors.Join(err, l.Close())
}

func versionOf(path string) string {
	out, err := exec.Command(path, "--version").Output()
	if err != nil {
		return "of unknown version"
	}
	scanner := bufio.NewScanner(strings.NewReader(string(out)))
	scanner.Scan()
	return scanner.Text()
}

// etcdMeter reads an etcd's own figures.
type etcdMeter struct {
	client   *clientv3.Client
	endpoint string
}

// etcdRate is what it did a second: revisions are transactions that changed something; entries are all that
// its raft log took, with those whose comparisons failed.
type etcdRate struct{ revisions, entries float64 }

func newEtcdMeter(ctx context.Context, endpoint string) (*etcdMeter, error) {
	c, err := dialEtcd(ctx, endpoint)
	return &etcdMeter{c, endpoint}, err
}

func (m *etcdMeter) version(ctx context.Context) (string, error) {
	st, err := m.client.Status(ctx, m.endpoint)
	if err != nil {
		return "", err
	}
	return "etcd " + st.Version, nil
}

func (m *etcdMeter) rate(ctx context.Context, during func() error) (etcdRate, error) {
	before, err := m.client.Status(ctx, m.endpoint)
	if err != nil {
		return etcdRate{}, err
	}
	began := time.Now()
	if err := during(); err != nil {
		return etcdRate{}, err
	}
	after, err := m.client.Status(ctx, m.endpoint)
	if err != nil {
		return etcdRate{}, err
	}
	took := time.Since(began).Seconds()
	return etcdRate{float64(after.Header.Revision-before.Header.Revision) / took, float64(after.RaftIndex-before.RaftIndex) / took}, nil
}
