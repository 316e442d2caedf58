package etcdstore

import (
	"bytes"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// What a proxy does with the bytes that come.
const (
	pass        = iota
	dropAnswers // of the server
	dropRequests
	holdRequests // until release
)

// marker is in the request that the proxy loses. Bytes as such are no sign of it: a connection
// carries more than requests.
const marker = "the-request-in-question"

// proxy stands between a client and an etcd and loses what it is told to.
type proxy struct {
	endpoint string
	backend  string
	listener net.Listener
	mode     atomic.Int32
	taken    chan struct{} // closed when the bytes of marker were dropped or are held
	released chan struct{}
	release  func() // closes released, once
	wg       sync.WaitGroup

	mu      sync.Mutex
	clients []net.Conn // guarded by mu
	servers []net.Conn // guarded by mu
}

func newProxy(t *testing.T, backend string) *proxy {
	t.Helper()
	path := filepath.Join(shortDir(t), "proxy.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{endpoint: "unix://" + path, backend: strings.TrimPrefix(backend, "unix://"), listener: l,
		taken: make(chan struct{}), released: make(chan struct{})}
	p.release = sync.OnceFunc(func() { close(p.released) })
	p.wg.Go(p.accept)
	t.Cleanup(func() {
		_ = l.Close()
		p.release()
		p.cut()
		p.mu.Lock()
		for _, c := range p.servers {
			_ = c.Close()
		}
		p.mu.Unlock()
		p.wg.Wait()
	})
	return p
}

func (p *proxy) accept() {
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

func (p *proxy) requests(server, client net.Conn) {
	var swallowed []byte
	hold, taken := false, false
	buf := make([]byte, 32*1024)
	for {
		n, err := client.Read(buf)
		if mode := p.mode.Load(); mode == dropRequests || mode == holdRequests {
			hold = mode == holdRequests
			swallowed = append(swallowed, buf[:n]...)
			if !taken && bytes.Contains(swallowed, []byte(marker)) {
				taken = true
				close(p.taken)
			}
		} else {
			_, _ = server.Write(buf[:n])
		}
		if err != nil {
			break
		}
	}
	if hold && taken {
		// The client is gone; the network still has its request.
		<-p.released
		_, _ = server.Write(swallowed)
		return
	}
	_ = server.Close()
}

func (p *proxy) answers(client, server net.Conn) {
	buf := make([]byte, 32*1024)
	for {
		n, err := server.Read(buf)
		if n > 0 && p.mode.Load() != dropAnswers {
			_, _ = client.Write(buf[:n])
		}
		if err != nil {
			_ = client.Close()
			return
		}
	}
}

// cut breaks all connections of clients, and passes from then on.
func (p *proxy) cut() {
	p.mode.Store(pass)
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.clients {
		_ = c.Close()
	}
	p.clients = nil
}
