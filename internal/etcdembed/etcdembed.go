// Package etcdembed runs a single-member etcd inside of this process, for a pool that needs no
// cluster of its own, for development and for tests.
//
// It is the real thing: it syncs every write to disk before it acknowledges it, and its directory is
// an ordinary etcd data directory. It has no peer listener at all, and it serves clients on a unix
// socket or on loopback only, without TLS: who may reach it is decided by the permissions of the
// directory, or of the machine.
//
// When its disk fails, etcd ends the process, on purpose: to go on would acknowledge what is not
// durable. The reason is in the log before.
package etcdembed

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

const (
	// startTimeout bounds a start whose context has no deadline. A large database takes a while.
	startTimeout = time.Minute
	// graceful is how long Close lets requests finish. Watches never do, and are cut.
	graceful = 250 * time.Millisecond
	// maxSocketPath is what the kernel takes in sockaddr_un, without its final zero.
	maxSocketPath = 107

	quota        = 8 << 30
	retention    = "15m"  // a watch that was away for longer reads all anew; a longer one fills the disk with old requests
	snapshots    = 10_000 // entries of the raft log between two snapshots
	catchUp      = 5_000  // entries kept behind a snapshot; there is no follower to catch up
	socketName   = "etcd.sock"
	lockName     = "nsalloc.lock"
	dataName     = "etcd"
	memberName   = "embedded"
	advertisedAt = "http://localhost:2380" // a form etcd wants; nobody listens there, or dials it
)

// Config says where the server lives.
type Config struct {
	// Dir holds everything; it is made with mode 0700.
	Dir string
	// Listen is a unix socket's absolute path, or http://127.0.0.1:PORT, where port 0 takes a free
	// one. Empty is etcd.sock in Dir.
	Listen string
	// Quota is how many bytes the database takes before writes are refused (etcd's NOSPACE); 0 is 8 GiB.
	Quota int64
	// Logger gets etcd's warnings and errors; nil is none.
	Logger *slog.Logger
}

// Server is a running etcd.
type Server struct {
	etcd     *embed.Etcd
	grpc     *grpc.Server
	lock     *os.File
	endpoint string
	close    sync.Once
	closing  *atomic.Bool
}

// Start starts a server and waits until it is ready, ctx ends, or a minute is over. A directory is
// served by one process at a time; the kernel ends the lock with the process, so that a start after
// a crash finds it free, and etcd recovers every write that it acknowledged.
func Start(ctx context.Context, cfg Config) (*Server, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, startTimeout)
		defer cancel()
	}
	dir, err := filepath.Abs(cfg.Dir)
	if err != nil || cfg.Dir == "" {
		return nil, fmt.Errorf("embedded etcd: directory %q: it must be a path: %w", cfg.Dir, err)
	}
	listen, err := listenURL(cfg.Listen, dir)
	if err != nil {
		return nil, fmt.Errorf("embedded etcd: %w", err)
	}
	// Mode 0700 from the beginning, also for one that somebody made before: the socket has no other guard.
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("embedded etcd: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("embedded etcd: %w", err)
	}
	// etcd has a lock of its own, but waits for it for ever, and before it does, it takes the socket
	// away from the server that holds it.
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	closing := new(atomic.Bool)
	s, err := start(ctx, settings(dir, listen, cmp.Or(cfg.Quota, quota), zapTo(cfg.Logger, closing)), listen)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("embedded etcd in %s: %w", dir, err), lock.Close())
	}
	s.lock, s.closing = lock, closing
	return s, nil
}

func lockDir(dir string) (*os.File, error) {
	path := filepath.Join(dir, lockName)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("embedded etcd: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("embedded etcd: %s is served already, by the process that holds %s; stop that one, or use another directory", dir, path)
		}
		return nil, fmt.Errorf("embedded etcd: lock %s: %w", path, err)
	}
	return f, nil
}

// listenURL is where clients are served. It refuses what others than this machine could reach.
func listenURL(listen, dir string) (*url.URL, error) {
	if listen == "" {
		listen = filepath.Join(dir, socketName)
	}
	if path := strings.TrimPrefix(listen, "unix://"); filepath.IsAbs(path) {
		if len(path) > maxSocketPath {
			return nil, fmt.Errorf("socket %s has %d bytes, the kernel takes %d; listen on a shorter path", path, len(path), maxSocketPath)
		}
		return &url.URL{Scheme: "unix", Path: path}, nil
	}
	u, err := url.Parse(listen)
	if err != nil || u.Scheme != "http" || u.Port() == "" || u.Path != "" {
		return nil, fmt.Errorf("listen address %q is neither an absolute path nor http://127.0.0.1:PORT", listen)
	}
	if ip := net.ParseIP(u.Hostname()); ip == nil || !ip.IsLoopback() {
		return nil, fmt.Errorf("listen address %q is not loopback; without TLS, nothing else is served: run an etcd of your own for that", listen)
	}
	return u, nil
}

func settings(dir string, listen *url.URL, quota int64, logger *zap.Logger) *embed.Config {
	cfg := embed.NewConfig()
	cfg.Name = memberName
	cfg.Dir = filepath.Join(dir, dataName)
	cfg.ListenClientUrls = []url.URL{*listen}
	cfg.AdvertiseClientUrls = []url.URL{*listen}
	cfg.ListenPeerUrls = nil
	peer, err := url.Parse(advertisedAt)
	if err != nil {
		panic(err)
	}
	cfg.AdvertisePeerUrls = []url.URL{*peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.EnableGRPCGateway = false
	cfg.AutoCompactionMode = embed.CompactorModePeriodic
	cfg.AutoCompactionRetention = retention
	cfg.QuotaBackendBytes = quota
	cfg.SnapshotCount = snapshots
	cfg.SnapshotCatchUpEntries = catchUp
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(logger)
	return cfg
}

// start runs etcd and waits for it. etcd cannot be told to stop while it opens its database, so that
// a start that ctx gave up on ends, and closes, in the background.
func start(ctx context.Context, cfg *embed.Config, listen *url.URL) (*Server, error) {
	s := &Server{}
	registered := make(chan *grpc.Server, 1)
	cfg.ServiceRegister = func(g *grpc.Server) { registered <- g }
	type result struct {
		etcd *embed.Etcd
		err  error
	}
	started := make(chan result, 1)
	go func() {
		etcd, err := embed.StartEtcd(cfg)
		started <- result{etcd, err}
	}()
	select {
	case r := <-started:
		if r.err != nil {
			return nil, r.err
		}
		s.etcd = r.etcd
	case <-ctx.Done():
		go func() {
			if r := <-started; r.err == nil {
				r.etcd.Close()
			}
		}()
		return nil, fmt.Errorf("it did not open its database in time: %w", ctx.Err())
	}
	fail := func(err error) (*Server, error) {
		s.etcd.Close()
		return nil, err
	}
	select {
	case s.grpc = <-registered: // served from the moment that the member is ready
	case err := <-s.etcd.Err():
		return fail(err)
	case <-s.etcd.Server.StopNotify():
		return fail(errors.New("it stopped while it started"))
	case <-ctx.Done():
		return fail(fmt.Errorf("it was not ready in time: %w", ctx.Err()))
	}
	if listen.Scheme == "unix" {
		s.endpoint = "unix://" + listen.Path
		// Only this matters for a socket outside of Dir.
		if err := os.Chmod(listen.Path, 0o600); err != nil {
			return fail(err)
		}
	} else {
		s.endpoint = "http://" + s.etcd.Clients[0].Addr().String()
	}
	return s, nil
}

// Endpoint is the client URL.
func (s *Server) Endpoint() string { return s.endpoint }

// Done is closed when the server has stopped, by Close or by itself.
func (s *Server) Done() <-chan struct{} { return s.etcd.Server.StopNotify() }

// Close stops the server and gives the directory free. Requests under way get a moment to finish; an
// answer that is cut off is an unknown outcome to its client, as with any lost connection.
func (s *Server) Close() error {
	var err error
	s.close.Do(func() {
		s.closing.Store(true)
		done := make(chan struct{})
		go func() { defer close(done); s.grpc.GracefulStop() }()
		select {
		case <-done:
		case <-time.After(graceful):
			// Left to itself, etcd waits 7 s for the watches.
			s.grpc.Stop()
			<-done
		}
		s.etcd.Close()
		err = s.lock.Close()
	})
	return err
}
