package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.uber.org/goleak"

	"github.com/nsalloc/nsalloc/internal/etcdembed"
	"github.com/nsalloc/nsalloc/internal/etcdstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// One etcd serves all tests; each has a pool of its own in it.
var (
	shared  *etcdembed.Server
	poolNum atomic.Int64
)

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "srv")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	if shared, err = etcdembed.Start(context.Background(), etcdembed.Config{Dir: dir}); err != nil {
		panic(err)
	}
	code := m.Run()
	if err := shared.Close(); err != nil {
		panic(err)
	}
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// newPool is the name of a pool that no other test uses.
func newPool() string { return fmt.Sprintf("p%d", poolNum.Add(1)) }

// openPool is a connection to etcd of its own, as every server has one.
func openPool(t testing.TB, endpoint, pool string) *etcdstore.Store {
	t.Helper()
	c, err := etcdstore.Dial(etcdstore.Config{Endpoints: []string{endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	st, err := etcdstore.New(c, pool)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// initPool makes the pool.
func initPool(t testing.TB, st alloc.Store) *alloc.Pool {
	t.Helper()
	p, err := alloc.NewService(st, nil).InitPool(t.Context(), alloc.DefaultPolicy())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// checked proves, when the test ends, that the pool's records keep the promises: all that Check reads, at one
// revision, with what cannot be read.
func checked(t testing.TB, st alloc.Store) {
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		report, err := alloc.NewService(st, nil).Check(ctx)
		if err != nil {
			t.Errorf("check: %v", err)
		}
		for _, f := range report.Findings {
			t.Errorf("check: %s %s: %s", f.Promise, f.Subject, f.Evidence)
		}
	})
}

// running is a server under test, on a unix socket and on loopback.
type running struct {
	*Server
	t    testing.TB
	unix string
	tcp  string
	log  *safeBuffer
	stop func() error // idempotent
}

func start(t testing.TB, cfg Config) *running {
	t.Helper()
	dir, err := os.MkdirTemp("", "s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "s.sock")
	u, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	log := new(safeBuffer)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	if cfg.Grace == 0 {
		cfg.Grace = time.Second
	}
	r := &running{Server: New(cfg), t: t, unix: "unix://" + path, tcp: l.Addr().String(), log: log}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx, u, l) }()
	var once sync.Once
	var result error
	r.stop = func() error {
		once.Do(func() {
			cancel()
			select {
			case result = <-done:
			case <-time.After(20 * time.Second):
				result = fmt.Errorf("the server does not stop")
			}
		})
		return result
	}
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("server log:\n%.20000s", log)
		}
	})
	return r
}

// serving is a server over a new pool, and the pool's store.
func serving(t testing.TB) (*running, *etcdstore.Store) {
	t.Helper()
	st := openPool(t, shared.Endpoint(), newPool())
	initPool(t, st)
	checked(t, st)
	r := start(t, Config{Store: st})
	r.waitLoaded()
	return r, st
}

func (r *running) waitLoaded() {
	r.t.Helper()
	select {
	case <-r.Loaded():
	case <-time.After(10 * time.Second):
		r.t.Fatalf("the view was not loaded; log:\n%s", r.log)
	}
}

// dial is a client on the unix socket; host "" is an operator.
func (r *running) dial(host string) *client.Client { return dialTo(r.t, r.unix, host) }

func dialTo(t testing.TB, target, host string) *client.Client {
	t.Helper()
	var opts []client.Option
	if host != "" {
		opts = append(opts, client.WithHost(host))
	}
	c, err := client.Dial(target, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// machine is a host of the pool, as its agent sees it.
type machine struct {
	*client.Client
	t       testing.TB
	name    string
	boot    string
	nonce   string
	life    alloc.Incarnation
	granted alloc.Ranges
	inode   uint64
}

// join says Hello for a new host and gets it a range.
func join(t testing.TB, c *client.Client, name string) *machine {
	t.Helper()
	m := &machine{Client: c, t: t, name: name, boot: uuid.NewString(), nonce: uuid.NewString()}
	h, _, err := c.Hello(t.Context(), alloc.HelloCommand{RequestID: client.NewRequestID(), BootID: m.boot, Nonce: m.nonce})
	if err != nil {
		t.Fatal(err)
	}
	m.life = h.Incarnation
	m.grant(1000)
	return m
}

func (m *machine) grant(n uint64) {
	m.t.Helper()
	var err error
	if m.granted, err = m.Grant(m.t.Context(), alloc.GrantCommand{Mutation: m.mutation(), Count: n}); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) mutation() alloc.Mutation {
	return alloc.Mutation{RequestID: client.NewRequestID(), Incarnation: m.life}
}

// take spends n serials in the machine's own books.
func (m *machine) take(n uint64) alloc.Ranges {
	m.t.Helper()
	taken, rest, ok := m.granted.Take(n)
	if !ok {
		m.t.Fatalf("host %s has less than %d serials left", m.name, n)
	}
	m.granted = rest
	return taken
}

func (m *machine) kernel() alloc.KernelID {
	m.inode++
	return alloc.KernelID{BootID: m.boot, ID: m.inode, Inode: 4026531840 + m.inode}
}

// newSandbox is a registration of one sandbox with net and pid namespaces.
func (m *machine) newSandbox(labels map[string]string) alloc.RegisterCommand {
	m.t.Helper()
	spend := m.take(3)
	first := spend[0].First
	return alloc.RegisterCommand{Mutation: m.mutation(), Spend: spend, Items: []alloc.RegisterItem{{
		Sandbox: first, Labels: labels,
		Add: []alloc.Binding{
			{Serial: first + 1, Type: alloc.Net, Kernel: m.kernel()},
			{Serial: first + 2, Type: alloc.PID, Kernel: m.kernel()},
		},
	}}}
}

func (m *machine) register() *alloc.Sandbox {
	m.t.Helper()
	got, _, err := m.Register(m.t.Context(), m.newSandbox(nil))
	if err != nil {
		m.t.Fatal(err)
	}
	return got[0]
}

func digest(s string) alloc.Digest { return sha256.Sum256([]byte(s)) }

func (m *machine) openCommand(sb *alloc.Sandbox) alloc.OpenCommand {
	m.t.Helper()
	spend := m.take(1)
	return alloc.OpenCommand{Mutation: m.mutation(), Spend: spend, Sandbox: sb.Serial, Epoch: sb.Epoch, Checkpoint: spend[0].First,
		RunID: uuid.NewString(), Digest: digest(spend[0].First.String())}
}

func (m *machine) dump(sb *alloc.Sandbox) alloc.Handoff {
	m.t.Helper()
	h, err := m.Open(m.t.Context(), m.openCommand(sb))
	if err != nil {
		m.t.Fatal(err)
	}
	return h
}

func (m *machine) confirm(h alloc.Handoff, e alloc.Evidence) alloc.Handoff {
	m.t.Helper()
	h, err := m.Confirm(m.t.Context(), alloc.ConfirmCommand{Mutation: m.mutation(), Sandbox: h.Sandbox.Serial, Epoch: h.Sandbox.Epoch, Checkpoint: h.Checkpoint.Serial, Evidence: e})
	if err != nil {
		m.t.Fatal(err)
	}
	return h
}

func (m *machine) claimCommand(c *alloc.Checkpoint, run string) alloc.ClaimCommand {
	return alloc.ClaimCommand{Mutation: m.mutation(), Checkpoint: c.Serial, Digest: c.Digest, BootID: m.boot, Run: run}
}

func (m *machine) claim(c *alloc.Checkpoint, run string) alloc.ClaimAnswer {
	m.t.Helper()
	a, err := m.Claim(m.t.Context(), m.claimCommand(c, run))
	if err != nil {
		m.t.Fatal(err)
	}
	return a
}

// bindCommand gives every namespace of the claimed sandbox an identity on this machine.
func (m *machine) bindCommand(sb alloc.Sandbox, run string) alloc.BindCommand {
	cmd := alloc.BindCommand{Mutation: m.mutation(), Sandbox: sb.Serial, Epoch: sb.Epoch, BootID: m.boot, Run: run}
	for _, b := range sb.Bindings {
		if b.Live() {
			cmd.Bindings = append(cmd.Bindings, alloc.Binding{Serial: b.Serial, Type: b.Type, Kernel: m.kernel()})
		}
	}
	return cmd
}

// requestAt is a request id as it was drawn at a moment.
func requestAt(at time.Time) string {
	id := uuid.Must(uuid.NewV7())
	ms := at.UnixMilli()
	for i := range 6 {
		id[i] = byte(ms >> (40 - 8*i))
	}
	return id.String()
}

// safeBuffer is a log that a test can read while it grows.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func (s *safeBuffer) has(text string) bool { return strings.Contains(s.String(), text) }

// eventually waits for what a server does in its own time.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it did not happen in 10 s: %s", what)
		}
	}
}
