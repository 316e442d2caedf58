package main

import (
	"context"
	"net"
	"os"
	"strings"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// asker asks other servers in the name of this one, over a connection for each question: there are few, and what a
// connection of before has seen is of no use.
func asker(name string, insecure bool) func(context.Context, string, alloc.Question) (alloc.Testimony, error) {
	return func(ctx context.Context, address string, q alloc.Question) (alloc.Testimony, error) {
		opts := []client.Option{client.WithServer(name)}
		if insecure {
			opts = append(opts, client.WithInsecure())
		}
		c, err := client.Dial(address, opts...)
		if err != nil {
			return alloc.Testimony{}, err
		}
		defer c.Close()
		return c.Witness(ctx, q)
	}
}

// advertised is the address at which other servers reach this one: the one that was said, else the first TCP
// address that it listens on, with its real port, else the first unix socket.
func advertised(said string, listeners []listener) string {
	if said != "" {
		return said
	}
	for _, l := range listeners {
		if tcp, ok := l.Addr().(*net.TCPAddr); ok {
			if !tcp.IP.IsUnspecified() {
				return l.name
			}
			_, port, _ := net.SplitHostPort(l.name)
			if host, err := os.Hostname(); err == nil { // that means all addresses of this machine
				return net.JoinHostPort(strings.ToLower(host), port)
			}
			return l.name
		}
	}
	return listeners[0].name
}
