// Package lossy is a network that loses what it is told to: a proxy between two unix sockets, for tests
// of what a lost, a late and a broken answer does to real clients and real servers.
//
// A connection that has lost bytes never passes any again: what would come through is not what was sent.
package lossy

import (
	"bytes"
	"context"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Mode is what a proxy does with the bytes that come.
type Mode int32

// The modes.
const (
	Pass        Mode = iota
	DropAnswers      // of the server
	DropRequests
	// HoldRequests keeps requests until Release; they arrive also when their client is gone by then.
	HoldRequests
)

// Proxy stands between clients and a server.
type Proxy struct {
	// Endpoint is where clients connect: unix:///PATH.
	Endpoint string
	// Taken is closed when the bytes of the marker were dropped, or are held.
	Taken chan struct{}

	backend  string
	marker   []byte
	listener net.Listener
	mode     atomic.Int32
	wg       sync.WaitGroup

	mu       sync.Mutex
	taken    bool          // guarded by mu
	released chan struct{} // guarded by mu: closed by Release, and replaced
	over     bool          // guarded by mu: nothing is held any more
	clients  []net.Conn    // guarded by mu
	servers  []net.Conn    // guarded by mu
}

// New is a proxy before the server at a unix:// endpoint; it ends with the test. marker is in the request
// that matters to the test: bytes as such are no sign of it, a connection carries more than requests.
func New(t testing.TB, backend, marker string) *Proxy {
	t.Helper()
	dir, err := os.MkdirTemp("", "lossy")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "proxy.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{Endpoint: "unix://" + path, Taken: make(chan struct{}), backend: strings.TrimPrefix(backend, "unix://"), marker: []byte(marker),
		listener: l, released: make(chan struct{})}
	p.wg.Go(p.accept)
	t.Cleanup(func() {
		_ = l.Close()
		p.Cut()
		p.mu.Lock()
		p.over = true
		close(p.released)
		for _, c := range p.servers {
			_ = c.Close()
		}
		p.mu.Unlock()
		p.wg.Wait()
	})
	return p
}

// Set is the mode from now on.
func (p *Proxy) Set(m Mode) { p.mode.Store(int32(m)) }

// Release lets what is held go on its way.
func (p *Proxy) Release() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.over {
		close(p.released)
		p.released = make(chan struct{})
	}
}

// Cut breaks all connections of clients, and passes from then on.
func (p *Proxy) Cut() {
	p.Set(Pass)
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.clients {
		_ = c.Close()
	}
	p.clients = nil
}

// Trouble makes some of every sort, again and again with at most rest in between, until ctx ends; then it
// passes.
func (p *Proxy) Trouble(ctx context.Context, seed uint64, rest time.Duration) {
	random := rand.New(rand.NewPCG(seed, 11))
	wait := func(most time.Duration) {
		t := time.NewTimer(1 + time.Duration(random.Int64N(int64(most))))
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
		}
	}
	for ctx.Err() == nil {
		wait(rest)
		p.Set(Mode(random.IntN(4)))
		wait(15 * time.Millisecond)
		p.Cut()
		wait(10 * time.Millisecond)
		p.Release()
	}
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("unix", p.backend)
		if err != nil {
			_ = client.Close()
			continue
		}
		p.mu.Lock()
		p.clients, p.servers = append(p.clients, client), append(p.servers, server)
		p.mu.Unlock()
		p.wg.Go(func() { p.requests(server, client) })
		p.wg.Go(func() { p.answers(client, server) })
	}
}

func (p *Proxy) requests(server, client net.Conn) {
	var swallowed []byte
	var released chan struct{} // of what is held
	lost := false
	buf := make([]byte, 32*1024)
	for {
		n, err := client.Read(buf)
		switch mode := Mode(p.mode.Load()); {
		case lost || released != nil || mode == DropRequests || mode == HoldRequests:
			if mode == HoldRequests && !lost && released == nil {
				p.mu.Lock()
				released = p.released
				p.mu.Unlock()
			}
			lost = released == nil
			swallowed = append(swallowed, buf[:n]...)
			p.look(swallowed)
		default:
			_, _ = server.Write(buf[:n])
		}
		if err != nil {
			break
		}
	}
	if released != nil {
		// The client is gone; the network still has its request.
		<-released
		_, _ = server.Write(swallowed)
		return
	}
	_ = server.Close()
}

// look tells that the request in question is not with the server.
func (p *Proxy) look(swallowed []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.taken && len(p.marker) > 0 && bytes.Contains(swallowed, p.marker) {
		p.taken = true
		close(p.Taken)
	}
}

func (p *Proxy) answers(client, server net.Conn) {
	lost := false
	buf := make([]byte, 32*1024)
	for {
		n, err := server.Read(buf)
		lost = lost || n > 0 && Mode(p.mode.Load()) == DropAnswers
		if n > 0 && !lost {
			_, _ = client.Write(buf[:n])
		}
		if err != nil {
			_ = client.Close()
			return
		}
	}
}
