package main

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// peer is whom a connection is to, for messages.
type peer struct {
	what    string // "server", "agent"
	address string
}

var daemonOf = map[string]string{"server": "nsalloc-server", "agent": "nsalloc-agent (as root)"}

func (c *cli) dialPool() (*client.Client, error) {
	if c.server == "" {
		c.settleHere()
	}
	to := peer{"server", c.server}
	p, err := client.Dial(to.address, c.options(to)...)
	return p, to.mine(err)
}

// host is a connection to this host's agent.
type host struct {
	nsallocv1.AgentClient
	conn *grpc.ClientConn
}

func (h *host) Close() error { return h.conn.Close() }

func (c *cli) dialAgent() (*host, error) {
	if c.agent == "" {
		c.settleHere()
	}
	to := peer{"agent", c.agent}
	conn, err := client.DialConn(to.address, c.options(to)...)
	if err != nil {
		return nil, to.mine(err)
	}
	return &host{nsallocv1.NewAgentClient(conn), conn}, nil
}

func (c *cli) options(to peer) []client.Option {
	opts := []client.Option{client.WithDialOptions(grpc.WithChainUnaryInterceptor(to.explain))}
	if c.insecure {
		opts = append(opts, client.WithInsecure())
	}
	return opts
}

// withPool runs a verb that asks a server.
func (c *cli) withPool(ctx context.Context, do func(context.Context, *client.Client) error) error {
	p, err := c.dialPool()
	if err != nil {
		return err
	}
	defer p.Close()
	ctx, cancel := c.deadline(ctx)
	defer cancel()
	return do(ctx, p)
}

// withAgent runs a verb that asks this host's agent.
func (c *cli) withAgent(ctx context.Context, do func(context.Context, *host) error) error {
	h, err := c.dialAgent()
	if err != nil {
		return err
	}
	defer h.Close()
	ctx, cancel := c.deadline(ctx)
	defer cancel()
	return do(ctx, h)
}

// mine makes a refused address the usage error that it is here.
func (to peer) mine(err error) error {
	if e, ok := errors.AsType[*alloc.Error](err); ok {
		return usage("%s address %q: %s; %s", to.what, to.address, e.Msg, e.Fix)
	}
	return err
}

// explain is an interceptor that says of what no server has said, the transport's own failures, who was
// tried and how to start one.
func (to peer) explain(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	err := invoke(ctx, method, req, reply, cc, opts...)
	s := status.Convert(err)
	switch {
	case err == nil || len(s.Details()) > 0:
		return err
	// The other side knows the deadline too, and its clock may strike first.
	case s.Code() == codes.DeadlineExceeded, errors.Is(context.Cause(ctx), errTimeout):
		return fail(exitUnavailable, "the %s at %s has not answered in time; ask again with a longer --timeout, or look at its log", to.what, to.address)
	case ctx.Err() != nil:
		return fail(exitError, "interrupted")
	case s.Code() == codes.Unavailable && transportCause(s.Message()) == syscall.EACCES.Error():
		return fail(exitUnavailable, "the %s at %s answers root only; run it as root (sudo)", to.what, to.address)
	case s.Code() == codes.Unavailable:
		return fail(exitUnavailable, "no %s answers at %s: %s; start %s, try things with `nsalloc dev`, or name another with --%s",
			to.what, to.address, transportCause(s.Message()), daemonOf[to.what], to.what)
	case s.Code() == codes.Unimplemented:
		return &failure{code: exitError, cause: err, message: fmt.Sprintf(
			"the %s at %s does not know this call (%s); install nsalloc, nsalloc-server and nsalloc-agent of one release", to.what, to.address, s.Message())}
	}
	return err
}

// transportCause is the last link of gRPC's chain: the system's own words.
func transportCause(msg string) string {
	msg = strings.Trim(msg, `"`)
	for _, cut := range []string{"connect: ", "Error while dialing: ", "desc = "} {
		if i := strings.LastIndex(msg, cut); i >= 0 {
			return strings.Trim(msg[i+len(cut):], `"`)
		}
	}
	return msg
}

// all collects a listing.
func all[T any](list iter.Seq2[T, error]) (items []T, err error) {
	for item, err := range list {
		if err != nil {
			return items, err
		}
		items = append(items, item)
	}
	return items, nil
}

// legible reads a list for a person to see: of what the server cannot read it says how much there is.
func legible[T any](c *cli, list iter.Seq2[T, error]) ([]T, error) {
	items, err := all(list)
	if errors.Is(err, client.ErrIncomplete) {
		c.warn("%v", err)
		return items, nil
	}
	return items, err
}

// parseSerial reads a serial argument. Only a bare counter needs to know the pool's generation.
func parseSerial(ctx context.Context, p *client.Client, text string) (alloc.Serial, error) {
	var current alloc.Generation
	if isBare(text) {
		if _, err := alloc.ParseSerial(text, 1); err != nil { // wrong in any generation: do not ask
			return 0, err
		}
		pool, _, err := p.Pool(ctx)
		if err != nil {
			return 0, err
		}
		current = pool.Generation
	}
	return alloc.ParseSerial(text, current)
}

func isBare(serial string) bool { return len(serial) != 16 && !strings.Contains(serial, ":") }

// errMissing is for an answer without what was asked for.
func errMissing(what string) error {
	return fmt.Errorf("the server answered without a %s; install nsalloc and nsalloc-server of one release", what)
}
