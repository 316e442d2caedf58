// Package server is nsalloc's service: it answers the gRPC services of api/proto over an alloc.Store.
//
// It holds no rule and no state of its own. A mutation is one use case of alloc.Service, which decides
// and commits in the store; a read is answered from a view of the store in memory that one watch feeds,
// with the revision that it reflects. So servers are replicas of each other, in any number, and one that
// is killed loses nothing.
//
// # Files
//
// Each service has its file, which converts, calls and converts back. Who calls is settled before
// (calls.go, package identity), and what an error means on the wire after (calls.go, package wire).
//
// # Without a pool
//
// A server over a store without a pool runs, says NOT_SERVING, and answers POOL_MISSING. It begins to
// serve when the pool is created, and needs no restart.
package server

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/netutil"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/internal/identity"
	"github.com/nsalloc/nsalloc/internal/killpoint"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// What one caller can take. A pool has up to 10,000 hosts with a connection each.
const (
	maxMessage     = 4 << 20
	maxHeader      = 16 << 10
	maxStreams     = 1024 // of one connection
	maxConnections = 16_384
	// workers serve calls one after the other, so that not each call grows a stack of its own through gRPC and what
	// stands before a handler: a tenth of what a small call costs. When all of them wait, others begin.
	workers = 256

	handshakeTimeout = 10 * time.Second
	keepaliveTime    = 30 * time.Second
	keepaliveTimeout = 10 * time.Second
	minPing          = 5 * time.Second
	maxIdle          = time.Hour

	// callTimeout is for callers who set no deadline.
	callTimeout = 10 * time.Second
	// grace is how long calls under way may go on when the server stops.
	grace = 5 * time.Second
	// sweepEvery is the pause between two sweeps of old request records.
	sweepEvery = 30 * time.Second
	sweepBatch = 1000
)

// Config is what a server needs. Store is all that it cannot do without.
type Config struct {
	Store alloc.Store
	// Witness is what this server has seen of Store; nil for none.
	Witness Witness
	// Insecure believes host names in plain text from other machines.
	Insecure bool
	// Logger is slog.Default when nil.
	Logger *slog.Logger
	// Registry gets the metrics; nil makes one.
	Registry *prometheus.Registry
	// Metrics, if not nil, is where they are served.
	Metrics net.Listener
	// CallTimeout and Grace replace the defaults of 10 s and 5 s.
	CallTimeout, Grace time.Duration
	// Now replaces the clock that stamps records.
	Now func() time.Time
}

// Server is the service. Run runs it, once.
type Server struct {
	cfg     Config
	log     *slog.Logger
	rules   identity.Rules
	service *alloc.Service
	view    *view
	metrics *metrics
	health  *health.Server
	grpc    *grpc.Server
	ending  chan struct{} // closed when shutdown begins: streams end
}

// New makes a server, whose workers wait until Run has ended.
func New(cfg Config) *Server {
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.Registry == nil {
		cfg.Registry = prometheus.NewRegistry()
	}
	if cfg.CallTimeout == 0 {
		cfg.CallTimeout = callTimeout
	}
	if cfg.Grace == 0 {
		cfg.Grace = grace
	}
	s := &Server{cfg: cfg, log: cfg.Logger, rules: identity.Rules{Insecure: cfg.Insecure}, ending: make(chan struct{})}
	s.view = newView(cfg.Store, cfg.Logger)
	s.metrics = newMetrics(cfg.Registry, s.view, cfg.Witness)
	store := cfg.Store
	if killpoint.Enabled {
		store = mortal{store}
	}
	s.service = alloc.NewService(measured{store, s.metrics}, cfg.Now)
	s.service.LaneLost = s.laneLost
	s.service.Behind = s.behind
	s.grpc = grpc.NewServer(
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeader),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveTime, Timeout: keepaliveTimeout, MaxConnectionIdle: maxIdle}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPing, PermitWithoutStream: true}),
		grpc.NumStreamWorkers(workers),
		grpc.WaitForHandlers(true), // Run returns when nothing uses the store any more
		grpc.ChainUnaryInterceptor(s.metrics.grpc.UnaryServerInterceptor(), s.unary, s.recoverUnary()),
		grpc.ChainStreamInterceptor(s.metrics.grpc.StreamServerInterceptor(), s.stream, s.recoverStream()),
	)
	nsallocv1.RegisterAllocatorServer(s.grpc, allocator{Server: s})
	nsallocv1.RegisterSandboxesServer(s.grpc, sandboxes{Server: s})
	nsallocv1.RegisterHandoffServer(s.grpc, handoff{Server: s})
	nsallocv1.RegisterHostsServer(s.grpc, hosts{Server: s})
	nsallocv1.RegisterRecordsServer(s.grpc, records{Server: s})
	nsallocv1.RegisterServersServer(s.grpc, servers{Server: s})
	s.health = health.NewServer()
	s.setHealth(healthv1.HealthCheckResponse_NOT_SERVING)
	healthv1.RegisterHealthServer(s.grpc, s.health)
	reflection.Register(s.grpc)
	s.metrics.grpc.InitializeMetrics(s.grpc)
	return s
}

// Loaded is closed when the store has been read once.
func (s *Server) Loaded() <-chan struct{} { return s.view.first }

// Run serves on the listeners, which it closes, until ctx ends; then it lets calls under way finish
// for a while. It returns nil after such an end.
func (s *Server) Run(ctx context.Context, listeners ...net.Listener) error {
	// Not ctx: calls that are under way when it ends still need what runs in the background.
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	g, background := errgroup.WithContext(background)
	for _, subsystem := range []func(context.Context) error{
		s.view.run,
		s.watchHealth,
		s.sweepRequests,
		s.serveMetrics,
	} {
		g.Go(func() error { return subsystem(background) })
	}
	for _, l := range listeners {
		g.Go(func() error {
			if err := s.grpc.Serve(netutil.LimitListener(l, maxConnections)); !errors.Is(err, grpc.ErrServerStopped) {
				return err
			}
			return nil
		})
	}
	g.Go(func() error {
		select {
		case <-ctx.Done():
		case <-background.Done():
		}
		s.shutdown()
		stop()
		return nil
	})
	return g.Wait()
}

// shutdown says NOT_SERVING first, so that who balances over several servers goes elsewhere.
func (s *Server) shutdown() {
	s.health.Shutdown()
	close(s.ending)
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.grpc.GracefulStop()
	}()
	t := time.NewTimer(s.cfg.Grace)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
		s.log.Warn("calls under way are cut off; their callers ask again with the same request id", "after", s.cfg.Grace)
		s.grpc.Stop()
		<-done
	}
}

// sweepRequests deletes what nobody can ask for any more. Servers that sweep at the same time do not
// disturb each other.
func (s *Server) sweepRequests(ctx context.Context) error {
	for sleep(ctx, sweepEvery) {
		s.sweepOnce(ctx)
	}
	return nil
}

// laneLost tells of the one sign that a copy of this server is at work, or of a store that was put back.
func (s *Server) laneLost(id string, swept bool) {
	if swept {
		s.metrics.lanes.WithLabelValues(laneSwept).Inc()
		s.log.Info("a lane was not used for long and was swept; the next call begins another", "lane", id)
		return
	}
	s.metrics.lanes.WithLabelValues(laneTaken).Inc()
	s.log.Error("somebody else wrote this server's lane, which it gives up with the rest of its range: another copy of this server is at work, or the store was put back to an older snapshot. "+
		"If this machine was cloned, end one of the two", "lane", id)
}

// behind tells of a store that knows less of the pool than the agent of a host.
func (s *Server) behind(host, why string) {
	s.log.Error("the store has lost history, as an agent's state shows: the pool is closed, and opens in a later generation", "host", host, "why", why)
}

func (s *Server) sweepOnce(ctx context.Context) {
	if missing, err := s.service.Settle(ctx); err != nil {
		s.log.DebugContext(ctx, "whether the pool is settled is seen at the next sweep", "error", err)
	} else if len(missing) > 0 {
		s.log.WarnContext(ctx, "the store has forgotten history, and hosts have not said yet what lives on them: older images wait for them, and nothing that the store says lives there is ended. For one that is gone for good: nsalloc host waive NAME",
			"hosts", len(missing), "first", missing[0])
	}
	if _, err := s.service.SweepLanes(ctx); err != nil {
		s.log.DebugContext(ctx, "the lanes of servers that are gone stay until the next sweep", "error", err)
	}
	for n := sweepBatch; n == sweepBatch && ctx.Err() == nil; {
		var err error
		if n, err = s.service.SweepRequests(ctx, sweepBatch); err != nil {
			s.log.DebugContext(ctx, "old request records stay until the next sweep", "error", err)
			return
		}
		s.metrics.swept.Add(float64(n))
	}
}
