// Package client speaks to nsalloc's servers in the domain's words: its methods are those of
// alloc.Service, and its errors are *alloc.Error, with the reasons of the other side.
//
//	c, err := client.Dial("unix:///run/nsalloc/server.sock")
//	...
//	got, err := c.Serials(ctx, 5)
//	...
//	for serial := range got.All() {
//		fmt.Println(serial)
//	}
//
// Serials is all that most programs need: many goroutines may call it at once, and share requests. The
// other mutations are as the servers have them. Each is sent once. When its answer is lost the error is
// alloc.ErrUnknownOutcome, never a guess; Retry asks again under the same request id until the outcome is
// known. Reads repeat by themselves for a moment while the server is away.
package client

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/stats"
	"google.golang.org/protobuf/proto"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

// HostMetadata is the metadata key under which a host says its name on a plain-text connection.
const HostMetadata = "nsalloc-host"

const (
	// maxAnswer bounds one answer. A page is a megabyte or so; one registration's answer can be larger.
	maxAnswer = 32 << 20
	// maxRequest is what a server takes. Found here it is a clear refusal; the transport's would leave open
	// whether it came before or after the commit.
	maxRequest = 4 << 20
	// maxCall bounds one call, however far the caller's own deadline is: what waits at a server that is
	// gone without a word is asked again elsewhere.
	maxCall = 10 * time.Second
	// maxLook bounds those that read all records of a pool.
	maxLook = 10 * time.Minute
	// Keepalive finds such a server also where nothing is asked. Servers allow a ping each 5 s.
	keepaliveTime    = 10 * time.Second
	keepaliveTimeout = 3 * time.Second
)

// reads are the methods that change nothing, of the server's services and of the agent's. They may be
// repeated; every other method is a mutation.
var reads = map[string][]string{
	"nsalloc.v1.Allocator": {"GetPool"},
	"nsalloc.v1.Sandboxes": {"Get", "List", "History"},
	"nsalloc.v1.Handoff":   {"Find", "ListCheckpoints"},
	"nsalloc.v1.Hosts":     {"Get", "List"},
	"nsalloc.v1.Records":   {"Check"},
	"nsalloc.v1.Servers":   {"List", "Witness"},
	"nsalloc.v1.Agent":     {"Status", "ListNamespaces", "Identify", "ListRuns"},
}

// Client is a connection to a server. It is safe for concurrent use.
type Client struct {
	conn      *grpc.ClientConn
	allocator nsallocv1.AllocatorClient
	sandboxes nsallocv1.SandboxesClient
	handoff   nsallocv1.HandoffClient
	hosts     nsallocv1.HostsClient
	records   nsallocv1.RecordsClient
	servers   nsallocv1.ServersClient
	gather    gatherer
}

type options struct {
	host     string
	server   string
	insecure bool
	grpc     []grpc.DialOption
}

// Option changes how Dial connects.
type Option func(*options)

// WithHost says in whose name the calls are made: this host's. Without it they are an operator's.
func WithHost(name string) Option { return func(o *options) { o.host = name } }

// WithServer says that the calls are made by a server of the pool: the one of this name.
func WithServer(name string) Option { return func(o *options) { o.server = name } }

// WithInsecure allows plain text to another machine.
func WithInsecure() Option { return func(o *options) { o.insecure = true } }

// WithDialOptions adds options of gRPC.
func WithDialOptions(opts ...grpc.DialOption) Option {
	return func(o *options) { o.grpc = append(o.grpc, opts...) }
}

// Dial makes a client for unix:///PATH or HOST:PORT. It connects with the first call, so that a server
// that is down shows there. Plain text goes to unix sockets and loopback only, unless WithInsecure.
func Dial(target string, opts ...Option) (*Client, error) {
	conn, err := DialConn(target, opts...)
	if err != nil {
		return nil, err
	}
	return &Client{
		conn:      conn,
		allocator: nsallocv1.NewAllocatorClient(conn),
		sandboxes: nsallocv1.NewSandboxesClient(conn),
		handoff:   nsallocv1.NewHandoffClient(conn),
		hosts:     nsallocv1.NewHostsClient(conn),
		records:   nsallocv1.NewRecordsClient(conn),
		servers:   nsallocv1.NewServersClient(conn),
	}, nil
}

// DialConn is Dial for a program that uses the stubs itself, such as those of the agent's service.
// Errors of its calls are *alloc.Error too.
func DialConn(target string, opts ...Option) (*grpc.ClientConn, error) {
	var o options
	for _, opt := range opts {
		opt(&o)
	}
	if o.host != "" {
		if err := alloc.ValidateName("host name", o.host); err != nil {
			return nil, err
		}
	}
	resolved, err := resolve(target, o.insecure)
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient(resolved, append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(serviceConfig()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithConnectParams(grpc.ConnectParams{
			// gRPC's own limit is two minutes, far longer than a server takes to come back.
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 3 * time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout, PermitWithoutStream: true}),
		grpc.WithChainUnaryInterceptor(convert, identify(o)),
		grpc.WithStatsHandler(onConnection{}),
	}, o.grpc...)...)
	if err != nil {
		return nil, fmt.Errorf("server address %q: %w", target, err)
	}
	return conn, nil
}

// Conn is the connection, for what has no method here.
func (c *Client) Conn() *grpc.ClientConn { return c.conn }

// Close ends the connection and all calls on it.
func (c *Client) Close() error {
	c.gather.close()
	return c.conn.Close()
}

func resolve(target string, plainAnywhere bool) (string, error) {
	refuse := func(msg, fix string) (string, error) {
		return "", &alloc.Error{Reason: alloc.ReasonInvalid, Subject: fmt.Sprintf("server address %q", target), Msg: msg, Fix: fix}
	}
	if path, ok := strings.CutPrefix(target, "unix://"); ok {
		if !filepath.IsAbs(path) {
			return refuse("the path is not absolute", "write unix:///PATH")
		}
		return target, nil
	}
	host, port, err := net.SplitHostPort(target)
	if err != nil || host == "" || port == "" || strings.Contains(target, "/") {
		return refuse("it is not an address", "write unix:///PATH or HOST:PORT")
	}
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) && !plainAnywhere {
		return refuse("it is another machine's, and everything would be sent in plain text", "use a unix socket or a tunnel, or allow it with --insecure")
	}
	return "dns:///" + target, nil
}

// serviceConfig has gRPC repeat reads, and nothing else: a mutation is repeated by who knows its
// request id. gRPC knows when a request never left, and repeats it by itself then.
func serviceConfig() string {
	type name struct {
		Service string `json:"service"`
		Method  string `json:"method"`
	}
	var names []name
	for service, methods := range reads {
		for _, m := range methods {
			names = append(names, name{service, m})
		}
	}
	b, err := json.Marshal(map[string]any{"methodConfig": []any{map[string]any{
		"name": names,
		"retryPolicy": map[string]any{
			"maxAttempts": 4, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2,
			"retryableStatusCodes": []string{"UNAVAILABLE"},
		},
	}}})
	if err != nil {
		panic(err) // constants
	}
	return string(b)
}

func isRead(fullMethod string) bool {
	service, method, _ := strings.Cut(strings.TrimPrefix(fullMethod, "/"), "/")
	for _, m := range reads[service] {
		if m == method {
			return true
		}
	}
	return false
}

func identify(o options) grpc.UnaryClientInterceptor {
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if o.host != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, HostMetadata, o.host)
		}
		if o.server != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, ServerMetadata, o.server)
		}
		return invoke(ctx, method, req, reply, cc, opts...)
	}
}

// convert makes every error of a call the domain's.
func convert(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if m, ok := req.(proto.Message); ok {
		if n := proto.Size(m); n > maxRequest {
			return &alloc.Error{Reason: alloc.ReasonTooLarge, Msg: fmt.Sprintf("the request has %d bytes, a server takes %d; nothing was sent", n, maxRequest),
				Fix: "split it"}
		}
	}
	most := maxCall
	if strings.HasPrefix(method, "/"+nsallocv1.Records_ServiceDesc.ServiceName+"/") {
		most = maxLook
	}
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	left := new(atomic.Bool)
	err := invoke(context.WithValue(ctx, leftKey{}, left), method, req, reply, cc, opts...)
	sent := wire.MaybeSent
	switch {
	case isRead(method):
		sent = wire.NothingToLose
	case !left.Load():
		sent = wire.NotSent
	}
	return wire.FromError(err, sent)
}

// leftKey finds the *atomic.Bool that is set when a request was put on a connection. While it is not,
// no server can know of the request: a server that is down is not an unknown outcome.
type leftKey struct{}

// onConnection is a stats handler, the one place that sees every try of a call, also those that gRPC
// repeats by itself.
type onConnection struct{}

func (onConnection) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }

// HandleRPC: OutHeader comes when the header has been queued on a connection, before the message is.
func (onConnection) HandleRPC(ctx context.Context, s stats.RPCStats) {
	if _, ok := s.(*stats.OutHeader); !ok {
		return
	}
	if left, ok := ctx.Value(leftKey{}).(*atomic.Bool); ok {
		left.Store(true)
	}
}

func (onConnection) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (onConnection) HandleConn(context.Context, stats.ConnStats)                       {}
