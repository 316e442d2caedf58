package main

import (
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/internal/etcdembed"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// TestTwoServers: two real servers over one etcd find each other by the pool's records, and ask each other over
// gRPC. A new one beside one that answers costs no generation; one that is gone is missed by who connects next, and
// not when it was removed.
func TestTwoServers(t *testing.T) {
	etcd, err := etcdembed.Start(t.Context(), etcdembed.Config{Dir: tempDir(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer etcd.Close()
	st, err := etcdFlags{urls: []string{etcd.Endpoint()}, pool: "p"}.open()
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	policy := alloc.DefaultPolicy()
	policy.UnheardWitness = alloc.UnheardWait
	if _, err := alloc.NewService(st, func() time.Time { return time.Now().Add(-time.Hour) }).InitPool(t.Context(), policy); err != nil {
		t.Fatal(err)
	}
	dirs := map[string]string{"one": tempDir(t), "two": tempDir(t)}
	begin := func(name string) (*process, *client.Client) {
		p := launch(t, "--etcd", etcd.Endpoint(), "--pool", "p", "--listen", "127.0.0.1:0", "--name", name, "--data-dir", dirs[name])
		return p, dial(t, p.lines[0])
	}
	in := func(c *client.Client, want alloc.Generation) {
		t.Helper()
		var got alloc.Ranges
		err := client.Retry(t.Context(), func(id string) (err error) {
			got, err = c.Allocate(t.Context(), alloc.AllocateCommand{RequestID: id, Count: 1})
			return err
		})
		if err != nil || got[0].First.Generation() != want {
			t.Fatalf("issued %v, %v; want generation %d", got, err, want)
		}
	}
	p1, one := begin("one")
	in(one, 2) // the pool is an hour old, and there is nobody to ask
	p2, two := begin("two")
	in(two, 2)
	found, err := two.Servers(t.Context())
	if err != nil || len(found) != 2 || !found[0].Answers || !found[1].Answers || "listen "+found[0].Address != p1.lines[0] || found[0].Name != "one" || found[0].Life == 0 || found[0].Started.IsZero() {
		t.Errorf("the servers are %+v, %v", found, err)
	}
	if err := one.RemoveServer(t.Context(), "two", found[1].Life, false); !errors.Is(err, alloc.ErrServerAnswers) {
		t.Errorf("removed while it answers: %v", err)
	}
	if err := one.RemoveServer(t.Context(), "three", 1, false); alloc.ReasonOf(err) != alloc.ReasonRecordNotFound {
		t.Errorf("removed, and there is none: %v", err)
	}
	status, err := two.PoolStatus(t.Context())
	if s := status.Standing; err != nil || s == nil || !s.Trusts || len(s.Others) != 1 || s.Others[0].Server != "one" || s.Others[0].Says != alloc.SaysSound {
		t.Errorf("it says of itself %+v, %v", s, err)
	}
	// A restart beside one that answers: nothing is waited for.
	if err := p1.stop(); err != nil {
		t.Fatal(err)
	}
	p1, one = begin("one")
	began := time.Now()
	in(one, 2)
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("it took %v to restart", took)
	}
	// One that is gone is waited for, as the policy says.
	if err := errors.Join(p1.stop(), p2.stop()); err != nil {
		t.Fatal(err)
	}
	_, two = begin("two")
	for deadline := time.Now().Add(20 * time.Second); ; {
		_, err := two.Allocate(t.Context(), alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 1})
		if errors.Is(err, alloc.ErrRecovering) && strings.Contains(err.Error(), "nsalloc server remove one") {
			break
		}
		if err == nil || time.Now().After(deadline) {
			t.Fatalf("beside a server that is not heard: %v", err)
		}
	}
	if found, err = two.Servers(t.Context()); err != nil || found[0].Answers || found[0].Trouble == "" {
		t.Errorf("the servers are %+v, %v", found, err)
	}
	if err := two.RemoveServer(t.Context(), "one", found[0].Life, false); err != nil {
		t.Fatal(err)
	}
	in(two, 2)
	// It comes back, and is listed again.
	_, one = begin("one")
	in(one, 2)
	if found, err = two.Servers(t.Context()); err != nil || len(found) != 2 {
		t.Errorf("the servers are %+v, %v", found, err)
	}
}

// TestAdvertised: what others reach a server at, when nobody says it.
func TestAdvertised(t *testing.T) {
	at := func(name, ip string) listener {
		if ip == "" {
			return listener{Listener: fixed{&net.UnixAddr{}}, name: name}
		}
		return listener{Listener: fixed{&net.TCPAddr{IP: net.ParseIP(ip), Port: 7000}}, name: name}
	}
	socket, local, all := at("unix:///s", ""), at("192.0.2.1:7000", "192.0.2.1"), at("[::]:7000", "::")
	for _, c := range []struct {
		said      string
		listeners []listener
		want      string
	}{
		{"a:1", []listener{socket, local}, "a:1"},
		{"", []listener{socket, local}, "192.0.2.1:7000"},
		{"", []listener{socket}, "unix:///s"},
	} {
		if got := advertised(c.said, c.listeners); got != c.want {
			t.Errorf("%q and %v: %s, want %s", c.said, c.listeners, got, c.want)
		}
	}
	if got := advertised("", []listener{all}); strings.HasPrefix(got, "[::]") || !strings.HasSuffix(got, ":7000") {
		t.Errorf("on all addresses: %s", got)
	}
	for _, wrong := range []string{"x", ":7000", "unix://x", "http://a:1"} {
		if err := (config{advertise: wrong, dataDir: "d", listen: []string{":0"}, etcd: etcdFlags{pool: "p"}}).check(); err == nil || exitCode(err) != 2 {
			t.Errorf("--advertise %s: %v", wrong, err)
		}
	}
}

// fixed is a listener at an address.
type fixed struct{ addr net.Addr }

func (fixed) Accept() (net.Conn, error) { return nil, net.ErrClosed }
func (fixed) Close() error              { return nil }
func (f fixed) Addr() net.Addr          { return f.addr }
