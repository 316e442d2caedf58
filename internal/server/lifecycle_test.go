package server

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/internal/identity"
	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// TestPermissions: every method that a server offers has its row in the table, read from the server itself.
func TestPermissions(t *testing.T) {
	s := New(Config{Store: memstore.New()})
	defer s.grpc.Stop() // it does not run
	n := 0
	for service, info := range s.grpc.GetServiceInfo() {
		for _, m := range info.Methods {
			n++
			if method := "/" + service + "/" + m.Name; !identity.Listed(method) {
				t.Errorf("%s has no row in the table of permissions", method)
			}
		}
	}
	if n < 18 {
		t.Errorf("only %d methods", n)
	}
}

// TestWithoutPool: the server runs, says what is missing, and serves as soon as it is there.
func TestWithoutPool(t *testing.T) {
	st := openPool(t, shared.Endpoint(), newPool())
	r := start(t, Config{Store: st})
	r.waitLoaded()
	c := r.dial("a")
	ctx := t.Context()
	watch, err := healthv1.NewHealthClient(c.Conn()).Watch(ctx, &healthv1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := watch.Recv(); err != nil || got.GetStatus() != healthv1.HealthCheckResponse_NOT_SERVING {
		t.Fatalf("health without a pool: %v, %v", got, err)
	}
	_, _, readErr := c.Pool(ctx)
	_, writeErr := c.Allocate(ctx, alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 1})
	_, findErr := c.Sandbox(ctx, 1<<48+1, true)
	for _, err := range []error{readErr, writeErr, findErr} {
		if !errors.Is(err, alloc.ErrPoolMissing) || !strings.Contains(err.Error(), "nsalloc pool init") {
			t.Errorf("without a pool: %v", err)
		}
	}
	initPool(t, st)
	if got, err := watch.Recv(); err != nil || got.GetStatus() != healthv1.HealthCheckResponse_SERVING {
		t.Fatalf("health with a pool: %v, %v", got, err)
	}
	join(t, c, "a").register()
	for _, name := range services {
		got, err := healthv1.NewHealthClient(c.Conn()).Check(ctx, &healthv1.HealthCheckRequest{Service: name})
		if err != nil || got.GetStatus() != healthv1.HealthCheckResponse_SERVING {
			t.Errorf("health of %q: %v, %v", name, got, err)
		}
	}
}

// TestHealthFollowsTheStore: a store that is away is seen, and its return too.
func TestHealthFollowsTheStore(t *testing.T) {
	st := memstore.New()
	initPool(t, st)
	both := &switched{now: st}
	r := start(t, Config{Store: both})
	watch, err := healthv1.NewHealthClient(r.dial("").Conn()).Watch(t.Context(), &healthv1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	expect := func(want healthv1.HealthCheckResponse_ServingStatus) {
		t.Helper()
		for {
			got, err := watch.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if got.GetStatus() == want {
				return
			}
		}
	}
	expect(healthv1.HealthCheckResponse_SERVING)
	both.mu.Lock()
	both.now = unreachable{}
	both.mu.Unlock()
	expect(healthv1.HealthCheckResponse_NOT_SERVING)
	both.mu.Lock()
	both.now = st
	both.mu.Unlock()
	expect(healthv1.HealthCheckResponse_SERVING)
}

// unreachable is a store that nobody reaches.
type unreachable struct{}

var errAway = &alloc.Error{Reason: alloc.ReasonUnavailable, Msg: "away"}

func (unreachable) Get(context.Context, ...alloc.Key) ([]alloc.Entry, alloc.Revision, error) {
	return nil, 0, errAway
}
func (unreachable) List(context.Context, alloc.Kind, string, int, alloc.Revision) ([]alloc.Entry, alloc.Revision, error) {
	return nil, 0, errAway
}
func (unreachable) Commit(context.Context, alloc.Tx) (alloc.Revision, error) { return 0, errAway }
func (unreachable) Token(alloc.Record) (alloc.Token, error)                  { return "", errAway }
func (unreachable) Watch(ctx context.Context, _ alloc.Revision, _ func(alloc.Revision, []alloc.Change)) error {
	return errAway
}
func (unreachable) Sync(context.Context) (alloc.Revision, error) { return 0, errAway }

// TestStoreAway: a server whose store was never reached says so, and is not in the way.
func TestStoreAway(t *testing.T) {
	r := start(t, Config{Store: unreachable{}})
	c := r.dial("")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	for what, err := range map[string]error{
		"Allocate":     call(c.Allocate(ctx, alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 1})),
		"Get":          call(c.Sandbox(ctx, 1<<48+1, false)),
		"linearizable": call(c.Sandbox(ctx, 1<<48+1, true)),
	} {
		if !errors.Is(err, alloc.ErrUnavailable) || !client.Again(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// slow is a store whose commits wait until they are let go.
type slow struct {
	alloc.Store
	begun chan struct{}
	once  sync.Once
	let   chan struct{}
}

func (s *slow) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	s.once.Do(func() { close(s.begun) })
	select {
	case <-s.let:
		return s.Store.Commit(ctx, tx)
	case <-ctx.Done():
		return 0, &alloc.Error{Reason: alloc.ReasonUnknownOutcome, Msg: "cut off", Err: context.Cause(ctx)}
	}
}

// TestShutdown: a call under way when the server stops gets its answer; streams end; new calls find
// nobody.
func TestShutdown(t *testing.T) {
	mem := memstore.New()
	initPool(t, mem)
	st := &slow{Store: mem, begun: make(chan struct{}), let: make(chan struct{})}
	r := start(t, Config{Store: st, Grace: 10 * time.Second})
	r.waitLoaded()
	c := r.dial("")
	watch, err := healthv1.NewHealthClient(c.Conn()).Watch(t.Context(), &healthv1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	answered := make(chan error, 1)
	go func() {
		_, err := c.Allocate(t.Context(), alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 1})
		answered <- err
	}()
	<-st.begun
	stopped := make(chan error, 1)
	go func() { stopped <- r.stop() }()
	for err == nil {
		_, err = watch.Recv()
	}
	close(st.let)
	if err := <-answered; err != nil {
		t.Errorf("the call under way: %v", err)
	}
	began := time.Now()
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it stopped after %v", took)
	}
	_, err = dialTo(t, r.unix, "").Allocate(t.Context(), alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 1})
	if !errors.Is(err, alloc.ErrUnavailable) {
		t.Errorf("a server that is gone was never reached, so that nothing is unknown: %v", err)
	}
}

// TestShutdownCutsOff: what does not end in time is cut off, and its caller learns that the outcome is unknown.
func TestShutdownCutsOff(t *testing.T) {
	mem := memstore.New()
	initPool(t, mem)
	st := &slow{Store: mem, begun: make(chan struct{}), let: make(chan struct{})}
	r := start(t, Config{Store: st, Grace: 50 * time.Millisecond})
	r.waitLoaded()
	c := r.dial("")
	answered := make(chan error, 1)
	go func() {
		_, err := c.Allocate(t.Context(), alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 1})
		answered <- err
	}()
	<-st.begun
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	if err := <-answered; !errors.Is(err, alloc.ErrUnknownOutcome) {
		t.Errorf("the call that was cut off: %v", err)
	}
	close(st.let)
}

// panicky panics at every commit.
type panicky struct{ alloc.Store }

func (panicky) Get(context.Context, ...alloc.Key) ([]alloc.Entry, alloc.Revision, error) {
	panic("a bug")
}

// TestPanic: one call's bug is one call's, and in the log.
func TestPanic(t *testing.T) {
	mem := memstore.New()
	initPool(t, mem)
	r := start(t, Config{Store: mem})
	r.waitLoaded()
	r.service = alloc.NewService(panicky{mem}, nil)
	c := r.dial("a")
	conn := c.Conn()
	_, err := nsallocv1.NewHostsClient(conn).Hello(t.Context(), &nsallocv1.HelloRequest{
		RequestId: client.NewRequestID(), BootId: "0b9e3bd4-8a3c-4f0a-9a52-2b3f6f3f7a11", Nonce: strings.Repeat("n", 16)})
	if status.Code(err) != codes.Internal || !errors.Is(err, alloc.ErrUnknownOutcome) || strings.Contains(err.Error(), "a bug") {
		t.Errorf("a panic was answered %v", err)
	}
	if !r.log.has("a bug") || !r.log.has("panicky") {
		t.Errorf("the log has no stack: %s", r.log)
	}
	if _, _, err := c.Pool(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestLives: a host that joins, and each further life of its agent's state, is in the log once.
func TestLives(t *testing.T) {
	mem := memstore.New()
	initPool(t, mem)
	r := start(t, Config{Store: mem})
	r.waitLoaded()
	a := join(t, r.dial("a"), "a")
	hello := func(cmd alloc.HelloCommand) alloc.Incarnation {
		cmd.RequestID = client.NewRequestID()
		h, _, err := a.Hello(t.Context(), cmd)
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, "the view has it", func() bool {
			seen, err := a.Host(t.Context(), "a")
			return err == nil && seen.Incarnation == h.Incarnation
		})
		return h.Incarnation
	}
	hello(alloc.HelloCommand{BootID: a.boot, Nonce: a.nonce, Incarnation: a.life})
	nonce := uuid.NewString()
	life := hello(alloc.HelloCommand{BootID: a.boot, Nonce: nonce})
	hello(alloc.HelloCommand{BootID: a.boot, Nonce: nonce, Incarnation: life})
	hello(alloc.HelloCommand{BootID: uuid.NewString(), Nonce: uuid.NewString()})
	for _, want := range []string{
		`level=INFO msg="a host joined" host=a`,
		`level=WARN msg="a host began a new incarnation within one boot: `,
		`level=INFO msg="a host began a new incarnation" host=a`,
	} {
		if n := strings.Count(r.log.String(), want); n != 1 {
			t.Errorf("the log has %q %d times:\n%s", want, n, r.log)
		}
	}
}

// TestLogAndMetrics: a call leaves its line and its numbers.
func TestLogAndMetrics(t *testing.T) {
	st := openPool(t, shared.Endpoint(), newPool())
	initPool(t, st)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := start(t, Config{Store: st, Metrics: l})
	r.waitLoaded()
	a := join(t, r.dial("a"), "a")
	a.register()
	_, _ = a.Grant(t.Context(), alloc.GrantCommand{Mutation: a.mutation()})
	for _, want := range []string{"method=/nsalloc.v1.Hosts/Hello caller=host/a code=OK", "code=InvalidArgument"} {
		if !r.log.has(want) {
			t.Errorf("the log lacks %q:\n%s", want, r.log)
		}
	}
	want := []string{
		`nsalloc_serials_issued_total{to="grant"} 1000`, `nsalloc_refusals_total{reason="INVALID_ARGUMENT"} 1`, "nsalloc_pool_counter 1001",
		`nsalloc_store_commit_seconds_count{outcome="ok"} 3`, `nsalloc_view_records{kind="namespace"} 2`, "nsalloc_view_loads_total 1",
		"nsalloc_serving 1", `grpc_server_handled_total{grpc_code="OK",grpc_method="Register"`,
	}
	var text string
	eventually(t, "the metrics", func() bool {
		resp, err := http.Get("http://" + l.Addr().String() + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		text = string(body)
		for _, w := range want {
			if !strings.Contains(text, w) {
				return false
			}
		}
		return true
	})
	if strings.Contains(text, "0001000000000001") || strings.Contains(text, "host/a") {
		t.Error("a serial or a caller became a label")
	}
	http.DefaultClient.CloseIdleConnections()
}

func TestReflection(t *testing.T) {
	r, _ := serving(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s, err := reflectionv1.NewServerReflectionClient(r.dial("").Conn()).ServerReflectionInfo(ctx, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	got, err := s.Recv()
	if err != nil || len(got.GetListServicesResponse().GetService()) < 5 {
		t.Errorf("%v, %v", got, err)
	}
}

// TestSweepRequests: what is too old to be asked for goes, the rest stays.
func TestSweepRequests(t *testing.T) {
	mem := memstore.New()
	initPool(t, mem)
	now := time.Now()
	var mu sync.Mutex
	clock := func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	service := alloc.NewService(mem, clock)
	asked := map[string]bool{}
	for range 3 {
		id := client.NewRequestID()
		asked[id] = true
		if _, err := service.Allocate(t.Context(), alloc.AllocateCommand{RequestID: id, Caller: "t", Count: 1}); err != nil {
			t.Fatal(err)
		}
	}
	mu.Lock()
	now = now.Add(3 * alloc.RequestLife)
	mu.Unlock()
	s := New(Config{Store: mem, Now: clock})
	defer s.grpc.Stop() // it does not run
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s.sweepOnce(ctx)
	left, _, err := mem.List(t.Context(), alloc.KindRequest, "", 10, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range left {
		if asked[e.Key.ID] {
			t.Errorf("%s is left", e.Key)
		}
	}
}
