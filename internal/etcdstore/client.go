package etcdstore

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/stats"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// DefaultTimeout bounds a call whose context has no deadline. It is less than etcd's own limit for a
// request (5 s and two election timeouts), so that a caller never waits for an etcd that gave up.
const DefaultTimeout = 5 * time.Second

// Keepalive finds a peer that is gone without a word: without it a third of the reads timed out
// while one follower of three was stopped.
const (
	keepaliveTime    = 10 * time.Second
	keepaliveTimeout = 3 * time.Second
)

// Config says where the store is.
type Config struct {
	// Endpoints are etcd's client URLs: http://, https:// or unix:///path.
	Endpoints []string
	// TLS is for https endpoints; prefer client certificates to passwords.
	TLS *tls.Config
	// Username and Password are for an etcd with users.
	Username, Password string
	// Timeout replaces DefaultTimeout.
	Timeout time.Duration
	// Connected is called for every new connection to an endpoint before any request uses it. The
	// client reconnects by itself, possibly to a store that was put back to an older snapshot
	// meanwhile, and this is how to notice. It must not block and must not call the store.
	Connected func()
}

// Client is a connection to etcd. clientv3 dials, balances and authenticates; the requests are made
// here, because two of its habits break the Store contract: it repeats a transaction when a server or
// a proxy answered Canceled or DeadlineExceeded while the caller's context lives
// (clientv3/retry_interceptor.go, "try again"), although that one may have been applied; and it
// resumes a broken watch silently.
type Client struct {
	etcd    *clientv3.Client
	timeout time.Duration
	// unwatched is the configuration of etcd without what notices connections.
	unwatched clientv3.Config
}

// Dial makes a client. It connects in the background: a server that is down shows in the first call.
func Dial(cfg Config) (*Client, error) {
	if len(cfg.Endpoints) == 0 {
		return nil, &alloc.Error{Reason: alloc.ReasonInvalid, Subject: "etcd", Msg: "no endpoint", Fix: "name at least one client URL"}
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = DefaultTimeout
	}
	unwatched := clientv3.Config{
		Endpoints:            cfg.Endpoints,
		TLS:                  cfg.TLS,
		Username:             cfg.Username,
		Password:             cfg.Password,
		DialTimeout:          cfg.Timeout,
		DialKeepAliveTime:    keepaliveTime,
		DialKeepAliveTimeout: keepaliveTimeout,
		// One try a call, see Client. What may be repeated, reads, is repeated by us.
		MaxUnaryRetries: 1,
		Logger:          zap.NewNop(), // every error reaches the caller
	}
	watched := unwatched
	watched.DialOptions = []grpc.DialOption{grpc.WithStatsHandler(wire{cfg.Connected})}
	etcd, err := clientv3.New(watched)
	if err != nil {
		return nil, unavailable("etcd "+strings.Join(cfg.Endpoints, ","), "the client cannot be made", err)
	}
	return &Client{etcd: etcd, timeout: cfg.Timeout, unwatched: unwatched}, nil
}

// Close ends all calls and watches.
func (c *Client) Close() error { return c.etcd.Close() }

// bound gives a call its deadline, and refuses it at a member that has no leader instead of waiting
// there for one.
func (c *Client) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx = clientv3.WithRequireLeader(ctx)
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, c.timeout)
}

// callOptions: wait for a connection until the deadline, so that a reconnect is not an error, and
// take answers of any size; a page of large sandboxes is far over gRPC's 4 MiB.
var callOptions = []grpc.CallOption{grpc.WaitForReady(true), grpc.MaxCallRecvMsgSize(math.MaxInt32), grpc.MaxCallSendMsgSize(math.MaxInt32)}

// sent is set when a request was put on a connection. While it is not, etcd cannot know of it.
type sent struct{ atomic.Bool }

type sentKey struct{}

func withSent(ctx context.Context) (context.Context, *sent) {
	s := new(sent)
	return context.WithValue(ctx, sentKey{}, s), s
}

// wire watches gRPC's connections. A stats handler is the one place that sees every try of a call,
// also those that gRPC repeats itself because the server said that it had not looked at them.
type wire struct{ connected func() }

func (wire) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }

// HandleRPC: OutHeader comes when the request's header has been queued on a connection
// (grpc/internal/transport/http2_client.go, NewStream), before the message is.
func (wire) HandleRPC(ctx context.Context, s stats.RPCStats) {
	if _, ok := s.(*stats.OutHeader); !ok {
		return
	}
	if s, ok := ctx.Value(sentKey{}).(*sent); ok {
		s.Store(true)
	}
}

func (wire) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

func (w wire) HandleConn(_ context.Context, s stats.ConnStats) {
	if _, ok := s.(*stats.ConnBegin); ok && w.connected != nil {
		w.connected()
	}
}

// CheckServer asks every endpoint for its version. It returns a warning for each that is out of
// support or does not answer, and an error when none answers or one is too old to work.
//
// It asks over connections of its own, over which nothing is written: Config.Connected does not hear of them.
func (c *Client) CheckServer(ctx context.Context) (warnings []string, err error) {
	ctx, cancel := c.bound(ctx)
	defer cancel()
	endpoints := c.etcd.Endpoints()
	etcd, err := clientv3.New(c.unwatched)
	if err != nil {
		return nil, unavailable("etcd "+strings.Join(endpoints, ","), "the client cannot be made", err)
	}
	defer func() { err = errors.Join(err, etcd.Close()) }()
	versions, errs := make([]string, len(endpoints)), make([]error, len(endpoints))
	var wg sync.WaitGroup
	for i, ep := range endpoints {
		wg.Go(func() {
			st, err := etcd.Status(ctx, ep)
			if err != nil {
				errs[i] = err
				return
			}
			versions[i] = st.Version
		})
	}
	wg.Wait()
	answered := false
	for i, ep := range endpoints {
		if errs[i] != nil {
			warnings = append(warnings, fmt.Sprintf("etcd %s does not answer: %v", ep, errs[i]))
			continue
		}
		answered = true
		warning, err := assess(versions[i])
		if err != nil {
			return warnings, &alloc.Error{Reason: alloc.ReasonUnavailable, Subject: "etcd " + ep, Msg: "its version does not work", Err: err,
				Fix: "run etcd 3.5, 3.6 or 3.7"}
		}
		if warning != "" {
			warnings = append(warnings, fmt.Sprintf("etcd %s: %s", ep, warning))
		}
	}
	if !answered {
		return nil, unavailable("etcd "+strings.Join(endpoints, ","), "no endpoint answers", errs[0])
	}
	return warnings, nil
}

// assess says what is wrong with a version of the server.
func assess(version string) (warning string, err error) {
	var major, minor, patch int
	if _, err := fmt.Sscanf(version, "%d.%d.%d", &major, &minor, &patch); err != nil {
		return fmt.Sprintf("its version %q is not understood; 3.5, 3.6 and 3.7 are supported", version), nil
	}
	switch {
	case major != 3 || minor < 4:
		return "", fmt.Errorf("version %s is not 3.5, 3.6 or 3.7", version)
	case minor == 4:
		return "version " + version + " is out of support: reads can be stale after a pause, and permissions can be bypassed; upgrade to 3.5 or later", nil
	case minor == 5 && patch < 8:
		return "version " + version + " can announce a watch's progress before its events (etcd issue 15220), and then caches miss changes; upgrade to the last 3.5 or later", nil
	case minor > 7:
		return "version " + version + " is newer than what was tested, 3.5 to 3.7", nil
	}
	return "", nil
}
