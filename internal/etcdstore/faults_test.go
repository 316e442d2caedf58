package etcdstore

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/nsalloc/nsalloc/internal/lossy"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// marker is in the request that a test loses.
const marker = "the-request-in-question"

// through is a store behind a proxy, connected, and one that sees the truth.
func through(t *testing.T) (*lossy.Proxy, *Store, *Store) {
	t.Helper()
	p := lossy.New(t, shared.Endpoint(), marker)
	s := newStore(t, p.Endpoint)
	truth := newStore(t, shared.Endpoint())
	truth.keys = s.keys
	put(t, s, host("a", "0"))
	return p, s, truth
}

// commitAsync commits a host, guarded by its old value.
func commitAsync(t *testing.T, s *Store, p *lossy.Proxy, mode lossy.Mode, nonce string) <-chan error {
	t.Helper()
	entries, _, err := s.Get(t.Context(), alloc.HostKey("a"))
	if err != nil {
		t.Fatal(err)
	}
	p.Set(mode)
	done := make(chan error, 1)
	go func() {
		_, err := s.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{host("a", nonce)},
			Guards: []alloc.Guard{{Key: entries[0].Key, Token: entries[0].Token}}})
		done <- err
	}()
	return done
}

func TestAnswerLost(t *testing.T) {
	p, s, truth := through(t)
	if err := <-commitAsync(t, s, p, lossy.Pass, "1"); err != nil {
		t.Fatal(err) // the pair: the same without a fault
	}
	done := commitAsync(t, s, p, lossy.DropAnswers, "2")
	eventually(t, "etcd committed", func() bool { return nonce(t, truth, "a") == "2" })
	p.Cut()
	if err := <-done; !errors.Is(err, alloc.ErrUnknownOutcome) {
		t.Errorf("the answer was lost: %v", err)
	}
	if got := nonce(t, s, "a"); got != "2" {
		t.Errorf("reading back gives %q", got)
	}
}

func TestRequestLost(t *testing.T) {
	p, s, _ := through(t)
	done := commitAsync(t, s, p, lossy.DropRequests, marker)
	<-p.Taken
	p.Cut()
	// From here, it cannot be told from a lost answer.
	if err := <-done; !errors.Is(err, alloc.ErrUnknownOutcome) {
		t.Errorf("the request was lost: %v", err)
	}
	if got := nonce(t, s, "a"); got != "0" {
		t.Errorf("reading back gives %q", got)
	}
}

// The third outcome: not committed when the caller looks, and committed a moment later. Guards are
// what keeps it from doing harm.
func TestRequestDelayed(t *testing.T) {
	p, s, truth := through(t)
	done := commitAsync(t, s, p, lossy.HoldRequests, marker)
	<-p.Taken
	p.Cut()
	if err := <-done; !errors.Is(err, alloc.ErrUnknownOutcome) {
		t.Errorf("the request is under way: %v", err)
	}
	if got := nonce(t, s, "a"); got != "0" {
		t.Errorf("reading back gives %q", got)
	}
	p.Release()
	eventually(t, "the request arrived", func() bool { return nonce(t, truth, "a") == marker })
}

// The deadline of a commit whose answer does not come.
func TestDeadlineDuringCommit(t *testing.T) {
	p, s, _ := through(t)
	p.Set(lossy.DropRequests)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := s.Commit(ctx, alloc.Tx{Put: []alloc.Record{host("a", "1")}})
	if !errors.Is(err, alloc.ErrUnknownOutcome) {
		t.Error(err)
	}
	p.Cut()
	if got := nonce(t, s, "a"); got != "0" {
		t.Errorf("reading back gives %q", got)
	}
}

func TestNobodyThere(t *testing.T) {
	c := dial(t, Config{Endpoints: []string{"unix://" + filepath.Join(shortDir(t), "none.sock")}, Timeout: 300 * time.Millisecond})
	s := open(t, c, "default")
	_, err := s.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{host("a", "1")}})
	if !errors.Is(err, alloc.ErrUnavailable) || !strings.Contains(err.Error(), "none.sock") {
		t.Errorf("a commit: %v", err)
	}
	if _, _, err := s.Get(t.Context(), alloc.HostKey("a")); !errors.Is(err, alloc.ErrUnavailable) {
		t.Errorf("a read: %v", err)
	}
	if err := s.Watch(t.Context(), 1, func(alloc.Revision, []alloc.Change) {}); !errors.Is(err, alloc.ErrUnavailable) {
		t.Errorf("a watch: %v", err)
	}
}

// A server that stops and comes back: whatever a commit says meanwhile has to be true.
func TestServerRestarts(t *testing.T) {
	dir := shortDir(t)
	srv := startEtcd(t, dir)
	var connections atomic.Int64
	c := dial(t, Config{Endpoints: []string{srv.Endpoint()}, Connected: func() { connections.Add(1) }})
	s := open(t, c, "default")
	from := put(t, s, host("a", "0"))
	watch := make(chan error, 1)
	running := make(chan struct{}, 1)
	go func() {
		watch <- s.Watch(t.Context(), from, func(alloc.Revision, []alloc.Change) {
			select {
			case running <- struct{}{}:
			default:
			}
		})
	}()
	put(t, s, host("a", "1"))
	<-running
	if n := connections.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
	if err := srv.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-watch; !errors.Is(err, alloc.ErrUnavailable) {
		t.Errorf("the watch: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err := s.Commit(ctx, alloc.Tx{Put: []alloc.Record{host("a", "2")}})
	if !errors.Is(err, alloc.ErrUnavailable) && !errors.Is(err, alloc.ErrUnknownOutcome) {
		t.Errorf("a commit while the server is down: %v", err)
	}
	startEtcd(t, dir)
	if got := nonce(t, s, "a"); got != "1" && (got != "2" || errors.Is(err, alloc.ErrUnavailable)) {
		t.Errorf("after %v the host is at %q", err, got)
	}
	if n := connections.Load(); n < 2 {
		t.Errorf("the reconnect was not noticed: %d connections", n)
	}
}

func TestWatchEndsWithItsConnection(t *testing.T) {
	p, s, truth := through(t)
	at := make(chan alloc.Revision, 100)
	watch := func(from alloc.Revision) chan error {
		ended := make(chan error, 1)
		go func() {
			ended <- s.Watch(t.Context(), from, func(rev alloc.Revision, _ []alloc.Change) { at <- rev })
		}()
		return ended
	}
	ended := watch(put(t, truth, host("a", "1")))
	put(t, truth, host("a", "2"))
	last := <-at
	p.Cut()
	if err := <-ended; !errors.Is(err, alloc.ErrUnavailable) {
		t.Errorf("the watch ended with %v", err)
	}
	// It goes on where it was, by its caller's will.
	missed := put(t, truth, host("a", "3"))
	ended = watch(last)
	if rev := <-at; rev != missed {
		t.Errorf("went on at %d, %d was next", rev, missed)
	}
	p.Cut()
	if err := <-ended; !errors.Is(err, alloc.ErrUnavailable) {
		t.Errorf("the second watch ended with %v", err)
	}
}

// lying is an etcd, or a proxy in front of one, that applies a transaction and then answers an error.
type lying struct {
	pb.UnimplementedKVServer
	real  pb.KVClient
	err   error
	calls atomic.Int64
}

func (l *lying) Txn(ctx context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	if len(r.Success) == 0 { // it asks, and changes nothing
		return l.real.Txn(ctx, r)
	}
	l.calls.Add(1)
	if _, err := l.real.Txn(ctx, r); err != nil {
		return nil, err
	}
	return nil, l.err
}

// A transaction that may have been applied is never sent again, whatever the error: the second one
// would fail its guard, and be reported as a conflict in which nothing was written.
func TestCommitsAreSentOnce(t *testing.T) {
	for _, answer := range []error{
		status.Error(codes.Canceled, "context canceled"),
		status.Error(codes.DeadlineExceeded, "context deadline exceeded"),
		status.Error(codes.Unavailable, "there is no connection available"),
		status.Error(codes.Unavailable, "transport is closing"),
		status.Error(codes.Unknown, "raft proposal dropped"),
		status.Error(codes.Internal, "stream terminated"),
		status.Error(codes.ResourceExhausted, "grpc: received message larger than max"),
		rpctypes.ErrGRPCTimeout, rpctypes.ErrGRPCTimeoutDueToLeaderFail, rpctypes.ErrGRPCTimeoutDueToConnectionLost,
		rpctypes.ErrGRPCLeaderChanged, rpctypes.ErrGRPCStopped, rpctypes.ErrGRPCNoSpace, rpctypes.ErrGRPCCorrupt, rpctypes.ErrGRPCUnhealthy,
	} {
		t.Run(answer.Error(), func(t *testing.T) {
			truth := newStore(t, shared.Endpoint())
			l, err := net.Listen("unix", filepath.Join(shortDir(t), "lying.sock"))
			if err != nil {
				t.Fatal(err)
			}
			server := &lying{real: truth.kv, err: answer}
			g := grpc.NewServer()
			pb.RegisterKVServer(g, server)
			served := make(chan error, 1)
			go func() { served <- g.Serve(l) }()
			t.Cleanup(func() {
				g.Stop()
				if err := <-served; err != nil && !errors.Is(err, io.EOF) {
					t.Error(err)
				}
			})
			s := newStore(t, "unix://"+l.Addr().String())
			s.keys = truth.keys
			_, err = s.Commit(t.Context(), alloc.Tx{Guards: []alloc.Guard{{Key: alloc.HostKey("a")}}, Put: []alloc.Record{host("a", "1")}})
			if !errors.Is(err, alloc.ErrUnknownOutcome) {
				t.Errorf("%v, want %s", err, alloc.ReasonUnknownOutcome)
			}
			if n := server.calls.Load(); n != 1 {
				t.Errorf("the transaction was sent %d times", n)
			}
			if got := nonce(t, truth, "a"); got != "1" {
				t.Errorf("the host is at %q", got)
			}
		})
	}
}

func TestCommitError(t *testing.T) {
	for _, c := range []struct {
		err    error
		onWire bool
		want   *alloc.Error
	}{
		{context.DeadlineExceeded, false, alloc.ErrUnavailable},
		{context.DeadlineExceeded, true, alloc.ErrUnknownOutcome},
		{rpctypes.ErrGRPCTooManyOps, true, alloc.ErrTooLarge},
		{rpctypes.ErrGRPCRequestTooLarge, true, alloc.ErrTooLarge},
		{rpctypes.ErrGRPCNoLeader, true, alloc.ErrUnavailable},
		{rpctypes.ErrGRPCNotCapable, true, alloc.ErrUnavailable},
		{rpctypes.ErrGRPCNotSupportedForLearner, true, alloc.ErrUnavailable},
		{rpctypes.ErrGRPCRequestTooManyRequests, true, alloc.ErrUnavailable},
		{rpctypes.ErrGRPCPermissionDenied, true, alloc.ErrUnavailable},
		{rpctypes.ErrGRPCInvalidAuthToken, true, alloc.ErrUnavailable},
		{rpctypes.ErrGRPCAuthOldRevision, true, alloc.ErrUnavailable},
		{rpctypes.ErrGRPCNoSpace, true, alloc.ErrUnknownOutcome},
		{rpctypes.ErrGRPCNotLeader, true, alloc.ErrUnknownOutcome},
	} {
		if err := commitError(c.err, c.onWire); !errors.Is(err, c.want) {
			t.Errorf("%v, on the wire %v: %s, want %s", c.err, c.onWire, err.Reason, c.want.Reason)
		}
	}
	for _, err := range []error{rpctypes.ErrGRPCNoSpace, rpctypes.ErrGRPCPermissionDenied, rpctypes.ErrGRPCNoLeader, rpctypes.ErrGRPCTimeout} {
		if commitError(err, true).Fix == "" || readError(err).Fix == "" {
			t.Errorf("%v says nothing about what to do", err)
		}
	}
}
