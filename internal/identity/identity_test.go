package identity

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

func TestIdentify(t *testing.T) {
	unix := &net.UnixAddr{Net: "unix"}
	loop := &net.TCPAddr{IP: net.ParseIP("127.0.0.9")}
	loop6 := &net.TCPAddr{IP: net.ParseIP("::1")}
	mapped := &net.TCPAddr{IP: net.ParseIP("::ffff:127.0.0.1")}
	other := &net.TCPAddr{IP: net.ParseIP("192.0.2.7")}
	for _, c := range []struct {
		addr     net.Addr
		insecure bool
		names    []string
		want     string // "" for refused
	}{
		{unix, false, nil, "operator/local"},
		{unix, false, []string{"a"}, "host/a"},
		{loop, false, []string{"a"}, "host/a"},
		{loop6, false, nil, "operator/local"},
		{mapped, false, nil, "operator/local"},
		{other, false, nil, ""},
		{other, false, []string{"a"}, ""},
		{other, true, []string{"a"}, "host/a"},
		{other, true, nil, "operator/local"},
		{unix, false, []string{"a", "b"}, ""},
		{unix, false, []string{""}, ""},
		{unix, false, []string{"../a"}, ""},
		{unix, false, []string{"A"}, ""},
		{unix, false, []string{strings.Repeat("a", 64)}, ""},
		{&net.IPAddr{IP: net.ParseIP("127.0.0.1")}, false, nil, ""},
	} {
		ctx := peer.NewContext(t.Context(), &peer.Peer{Addr: c.addr})
		if c.names != nil {
			ctx = metadata.NewIncomingContext(ctx, metadata.MD{hostMetadata: c.names})
		}
		got, err := Rules{Insecure: c.insecure}.Identify(ctx)
		switch {
		case c.want == "" && !errors.Is(err, alloc.ErrCaller):
			t.Errorf("%v %v %q: %v, %v; want a refusal", c.addr, c.insecure, c.names, got, err)
		case c.want != "" && (err != nil || got.String() != c.want):
			t.Errorf("%v %v %q: %v, %v; want %s", c.addr, c.insecure, c.names, got, err, c.want)
		}
	}
	if _, err := (Rules{Insecure: true}).Identify(context.Background()); !errors.Is(err, alloc.ErrCaller) {
		t.Errorf("no connection: %v", err)
	}
}

// The table is also written here, from the other side: what a kind may do, method by method.
func TestCheck(t *testing.T) {
	mutations := []string{
		"Sandboxes/Register", "Sandboxes/RegisterAgain", "Sandboxes/End", "Hosts/Hello", "Hosts/Grant",
		"Handoff/Open", "Handoff/Confirm", "Handoff/Abort", "Handoff/Claim", "Handoff/Bind", "Handoff/Release",
	}
	free := []string{
		"Allocator/Allocate", "Allocator/GetPool", "Sandboxes/Get", "Sandboxes/List", "Sandboxes/History",
		"Handoff/Find", "Handoff/ListCheckpoints", "Hosts/Get", "Hosts/List", "Servers/List",
	}
	for kind, allowed := range map[Kind][]string{
		Host:     append(append([]string{}, mutations...), free...),
		Client:   free,
		Operator: append([]string{"Records/Check", "Records/Mend", "Records/SetPolicy", "Servers/Remove", "Hosts/Waive"}, free...),
		Server:   {"Servers/Witness"},
		"":       nil,
	} {
		may := map[string]bool{}
		for _, m := range allowed {
			may["/nsalloc.v1."+m] = true
		}
		for method := range permissions {
			if !strings.HasPrefix(method, "/nsalloc.v1.") {
				continue
			}
			if err := Check(method, Caller{kind, "x"}); (err == nil) != may[method] {
				t.Errorf("%q calls %s: %v", kind, method, err)
			}
		}
	}
	for _, method := range []string{"", "/nsalloc.v1.Hosts/Nothing", "/nsalloc.v1.Hosts", "nsalloc.v1.Hosts/Get", "/nsalloc.v1.Agent/Status"} {
		if err := Check(method, Caller{Host, "x"}); !errors.Is(err, alloc.ErrCaller) {
			t.Errorf("%q: %v", method, err)
		}
	}
}
