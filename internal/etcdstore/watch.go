package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// askAgain is how long a watch that Sync waits for leaves a request for progress unanswered. etcd
// answers none while a watch of the stream is behind (progressIfSync in storage/mvcc/
// watchable_store.go), or while the member itself is.
const askAgain = 50 * time.Millisecond

// watch is one running Watch.
type watch struct {
	delivered atomic.Int64  // the last revision that apply was called for
	target    atomic.Int64  // the revision that Sync wants delivered
	wake      chan struct{} // one slot: target has grown
}

func (w *watch) behind() bool { return w.delivered.Load() < w.target.Load() }

func (w *watch) want(rev int64) {
	for {
		old := w.target.Load()
		if old >= rev || w.target.CompareAndSwap(old, rev) {
			break
		}
	}
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// Sync implements alloc.Store: it reads the newest revision and has every running watch ask etcd for
// its progress until it delivered that revision. It does not wait for them: apply may call Sync.
func (s *Store) Sync(ctx context.Context) (alloc.Revision, error) {
	rev, err := s.revision(ctx)
	if err != nil {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range s.watches {
		w.want(rev)
	}
	return alloc.Revision(rev), nil
}

var (
	errNotCreated = errors.New("etcd did not confirm the watch in time")
	errEnded      = errors.New("the watch has ended")
)

// Watch implements alloc.Store. It speaks etcd's stream itself, one stream for one watch: the
// client's own watcher reconnects and resumes silently, also at a store that was put back to an
// older snapshot, where it would wait for a future revision in silence. This one ends with its
// stream, and whoever watches again is told.
func (s *Store) Watch(ctx context.Context, from alloc.Revision, apply func(alloc.Revision, []alloc.Change)) error {
	w := &watch{wake: make(chan struct{}, 1)}
	w.delivered.Store(int64(from))
	s.mu.Lock()
	s.watches[w] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.watches, w)
		s.mu.Unlock()
	}()

	ctx, cancel := context.WithCancelCause(clientv3.WithRequireLeader(ctx))
	defer cancel(errEnded)
	// A stream has no deadline; its beginning has.
	created := time.AfterFunc(s.client.timeout, func() { cancel(errNotCreated) })
	defer created.Stop()
	stream, err := pb.NewWatchClient(s.client.etcd.ActiveConnection()).Watch(ctx, callOptions...)
	if err != nil {
		return watchError(ctx, err)
	}
	first, end := s.keys.watched()
	// An error of Send is not the stream's; Recv has that one.
	_ = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key: first, RangeEnd: end, StartRevision: int64(from) + 1, ProgressNotify: true, Fragment: true}}})

	var asking sync.WaitGroup
	defer asking.Wait()
	defer cancel(errEnded)
	var pending []*mvccpb.Event // of fragments whose last one has not come
	for {
		resp, err := stream.Recv()
		switch {
		case err != nil:
			return watchError(ctx, err)
		case resp.CompactRevision != 0:
			return gone(fmt.Errorf("revision %d was compacted, the oldest is %d", w.delivered.Load(), resp.CompactRevision))
		case resp.Canceled:
			return unavailable("store watch", "etcd ended it", errors.New(resp.CancelReason))
		case resp.Created:
			if !created.Stop() {
				return watchError(ctx, errNotCreated)
			}
			if err := s.notBehind(ctx, int64(from), resp.Header.Revision); err != nil {
				return err
			}
			asking.Go(func() { w.ask(ctx, stream) })
			continue
		}
		pending = append(pending, resp.Events...)
		if resp.Fragment {
			continue
		}
		if len(pending) == 0 {
			// Progress: all events up to this revision have come, on this stream, before.
			if rev := resp.Header.Revision; rev > w.delivered.Load() {
				apply(alloc.Revision(rev), nil)
				w.delivered.Store(rev)
			}
			continue
		}
		s.deliver(w, pending, apply)
		pending = nil
	}
}

// notBehind refuses a store whose newest revision is less than the one to watch from: it was put back
// to a snapshot, and etcd would wait until it gets there again. A member that only lags passes.
func (s *Store) notBehind(ctx context.Context, from, member int64) error {
	if member >= from {
		return nil
	}
	rev, err := s.revision(ctx)
	if err != nil {
		return err
	}
	if rev < from {
		return gone(fmt.Errorf("the store is at revision %d, before %d", rev, from))
	}
	return nil
}

// ask requests progress while Sync wants more than was delivered. It owns the sending side of the
// stream once the watch is created.
func (w *watch) ask(ctx context.Context, stream pb.Watch_WatchClient) {
	again := time.NewTimer(askAgain)
	defer again.Stop()
	for {
		if w.behind() {
			if stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}}) != nil {
				return // Recv gets the stream's error
			}
			again.Reset(askAgain)
		}
		select {
		case <-ctx.Done():
			return
		case <-w.wake:
		case <-again.C:
		}
	}
}

// deliver calls apply once for each revision of events. etcd never splits a revision over two
// responses, apart from fragments, which Watch has put together.
func (s *Store) deliver(w *watch, events []*mvccpb.Event, apply func(alloc.Revision, []alloc.Change)) {
	for len(events) > 0 {
		rev, n := events[0].Kv.ModRevision, 1
		for n < len(events) && events[n].Kv.ModRevision == rev {
			n++
		}
		var changes []alloc.Change
		for _, ev := range events[:n] {
			key, ok := s.keys.parse(ev.Kv.Key)
			if !ok {
				continue // of a newer version; the revision moves on all the same
			}
			c := alloc.Change{Key: key, Revision: alloc.Revision(rev)}
			if ev.Type == mvccpb.Event_PUT {
				if token, sb := s.own.take(key, ev.Kv.Value); sb != nil {
					c.Record, c.Token = sb, token
					changes = append(changes, c)
					continue
				}
				e := entry(key, ev.Kv)
				c.Record, c.Token, c.Err, c.Owner = e.Record, e.Token, e.Err, e.Owner
			}
			changes = append(changes, c)
		}
		events = events[n:]
		// Some servers repeat old events to a watch that began at a lagging member (etcd issue 20221).
		if rev > w.delivered.Load() {
			apply(alloc.Revision(rev), changes)
			w.delivered.Store(rev)
		}
	}
}

func watchError(ctx context.Context, err error) *alloc.Error {
	if cause := context.Cause(ctx); cause != nil {
		err = cause // says more than the stream's Canceled
	}
	return unavailable("store watch", "it has ended", err)
}
