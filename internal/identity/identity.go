// Package identity says who calls, and who may call what. Both are one function and one table:
// Identify turns a connection into a Caller, and permissions names the kinds of callers of each method.
// Services take the Caller from the context and never look at a connection or at metadata.
//
// # How a caller is known
//
// There is plain text only, on unix sockets and on loopback, where the machine's administrator decides
// who gets through; anywhere else only with Insecure. There a host says its name in the metadata
// nsalloc-host, a server in nsalloc-server, and is believed; who says none is the local operator. Certificates will answer the same
// question in Identify, and nothing else changes.
//
// # What is allowed
//
// A method that has no row in the table is refused. A host acts for itself: its name is the Caller's,
// and no request carries one.
package identity

import (
	"context"
	"fmt"
	"net"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// hostMetadata and serverMetadata are where a host and a server say their name on a plain-text connection
// (client.HostMetadata, client.ServerMetadata).
const (
	hostMetadata   = "nsalloc-host"
	serverMetadata = "nsalloc-server"
)

// Kind is what a caller is.
type Kind string

// The kinds of callers.
const (
	Host     Kind = "host"     // an agent, in the name of its host
	Client   Kind = "client"   // a program that allocates and reads
	Operator Kind = "operator" // a person, or what acts for one
	Server   Kind = "server"   // another server of the pool, which asks what this one has seen
)

// Caller is who made a call.
type Caller struct {
	Kind Kind
	Name string
}

// String is KIND/NAME, as histories and logs show it.
func (c Caller) String() string { return string(c.Kind) + "/" + c.Name }

// local is who calls without a name from this machine.
var local = Caller{Kind: Operator, Name: "local"}

// Rules is what Identify needs to know of the server.
type Rules struct {
	// Insecure believes plain text from other machines.
	Insecure bool
}

// Identify says who made the call that ctx belongs to.
func (r Rules) Identify(ctx context.Context) (Caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Caller{}, refuse("caller", "it has no connection", "")
	}
	if !r.Insecure && !sameMachine(p.Addr) {
		return Caller{}, refuse("caller", fmt.Sprintf("plain text from %s is not believed", p.Addr), "connect from this machine, or start the server with --insecure")
	}
	md, _ := metadata.FromIncomingContext(ctx)
	said := local
	for key, kind := range map[string]Kind{hostMetadata: Host, serverMetadata: Server} {
		switch names := md.Get(key); {
		case len(names) == 0:
		case len(names) > 1:
			return Caller{}, refuse("caller", fmt.Sprintf("it says %d %s names in the metadata %s", len(names), kind, key), "say one")
		case said != local:
			return Caller{}, refuse("caller", fmt.Sprintf("it says the name of a host and of a server, in the metadata %s and %s", hostMetadata, serverMetadata), "say one")
		default:
			if err := alloc.ValidateName(string(kind)+" name", names[0]); err != nil {
				return Caller{}, refuse("caller", err.Error(), "")
			}
			said = Caller{Kind: kind, Name: names[0]}
		}
	}
	return said, nil
}

func sameMachine(addr net.Addr) bool {
	switch a := addr.(type) {
	case *net.UnixAddr:
		return true
	case *net.TCPAddr:
		return a.IP.IsLoopback()
	}
	return false
}

type callerKey struct{}

// NewContext is ctx with its caller.
func NewContext(ctx context.Context, c Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, c)
}

// FromContext is the caller that NewContext put in; ok is false in a context without one.
func FromContext(ctx context.Context) (c Caller, ok bool) {
	c, ok = ctx.Value(callerKey{}).(Caller)
	return c, ok
}

func refuse(subject, msg, fix string) *alloc.Error {
	return &alloc.Error{Reason: alloc.ReasonCaller, Subject: subject, Msg: msg, Fix: fix}
}
