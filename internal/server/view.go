package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

const (
	loadPage     = 1000
	firstBackoff = 50 * time.Millisecond
	maxBackoff   = 2 * time.Second
)

// view is the pool's records in memory, fed by one watch: what reads are answered from.
//
//	loading --all pages at one revision--> following --the stream broke--> following again, from there
//	following --the revision is compacted--> loading
//
// While it follows, and also while its stream is broken, reads are answered with the revision that
// they reflect; a linearizable one asks the store first and waits for that revision. While it loads
// there is no answer: why it loads again is that what it held may never have been.
//
// A record that cannot be read is left out of every list, and is never taken for absent: who asks for it
// gets its error (index.unreadable), and a list of a host's sandboxes says so if it may be that host's. When it changes or is deleted, the view follows as always.
type view struct {
	store alloc.Store
	log   *slog.Logger

	mu      sync.RWMutex
	ix      *index                  // guarded by mu; its maps too
	rev     alloc.Revision          // guarded by mu: what ix reflects
	loaded  bool                    // guarded by mu
	trouble error                   // guarded by mu: why it is not loaded; nil before the first try ended
	moved   chan struct{}           // guarded by mu: closed at the next move; nil when nobody waits
	relist  context.CancelCauseFunc // guarded by mu: ends the watch under way

	loads int // guarded by mu

	gauge alloc.Gauge // guarded by mu
	now   func() time.Time

	told map[alloc.Key]string // run's: the records that cannot be read and were logged, with the error

	newest atomic.Int64 // the highest revision that Sync has answered

	first   chan struct{} // closed when it was loaded once
	changed chan struct{} // one slot: something that health rests on changed
}

func newView(store alloc.Store, log *slog.Logger) *view {
	return &view{store: store, log: log, now: time.Now, ix: newIndex(), told: map[alloc.Key]string{}, first: make(chan struct{}), changed: make(chan struct{}, 1)}
}

var errBack = errors.New("the store answers from before what it has said: it was put back")

// run loads and follows until ctx ends.
func (v *view) run(ctx context.Context) error {
	backoff := firstBackoff
	for ctx.Err() == nil {
		began := time.Now()
		err := v.follow(ctx)
		if ctx.Err() != nil {
			break
		}
		if time.Since(began) > maxBackoff {
			backoff = firstBackoff
		}
		v.log.WarnContext(ctx, "the view of the store is interrupted", "error", err, "again_in", backoff)
		v.poke()
		if !sleep(ctx, backoff/2+rand.N(backoff/2+1)) {
			break
		}
		backoff = min(2*backoff, maxBackoff)
	}
	return nil
}

// follow loads when it must, and watches until that ends.
func (v *view) follow(ctx context.Context) error {
	v.mu.RLock()
	loaded, rev := v.loaded, v.rev
	v.mu.RUnlock()
	if !loaded {
		var err error
		if rev, err = v.load(ctx); err != nil {
			v.lost(err)
			return err
		}
	}
	watching, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	v.mu.Lock()
	v.relist = stop
	v.mu.Unlock()
	var broken error // of apply, which cannot return one
	err := v.store.Watch(watching, rev, func(rev alloc.Revision, changes []alloc.Change) {
		if broken == nil {
			if broken = v.apply(rev, changes); broken != nil {
				stop(broken)
			}
		}
	})
	switch cause := context.Cause(watching); {
	case broken != nil:
		err = broken
	case ctx.Err() == nil && cause != nil:
		err = cause
	}
	// A store that was only away is watched again from where we are. Anything else, such as a revision
	// that it has no more, puts what we hold in doubt.
	if alloc.ReasonOf(err) != alloc.ReasonUnavailable {
		v.lost(err)
	}
	return err
}

// load reads everything as of one revision into a new index and puts it in place of the old one.
func (v *view) load(ctx context.Context) (alloc.Revision, error) {
	began := time.Now()
	ix := newIndex()
	put := func(entries []alloc.Entry) error {
		for _, e := range entries {
			if e.Record == nil && e.Err == nil {
				continue
			}
			u, err := ix.prepare(alloc.Change{Key: e.Key, Record: e.Record, Err: e.Err, Owner: e.Owner})
			if err != nil {
				return err
			}
			ix.apply(u)
		}
		return nil
	}
	entries, rev, err := v.store.Get(ctx, alloc.Key{Kind: alloc.KindPool}, alloc.Key{Kind: alloc.KindCounter})
	if err != nil {
		return 0, err
	}
	if err := put(entries); err != nil {
		return 0, err
	}
	// The next page is read while this one is indexed.
	pages := make(chan []alloc.Entry, 2)
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(pages)
		for _, kind := range []alloc.Kind{alloc.KindHost, alloc.KindSandbox, alloc.KindCheckpoint} {
			for after := ""; ; {
				page, _, err := v.store.List(gctx, kind, after, loadPage, rev)
				if err != nil {
					return err
				}
				select {
				case pages <- page:
				case <-gctx.Done():
					return gctx.Err()
				}
				if len(page) < loadPage {
					break
				}
				after = page[len(page)-1].Key.ID
			}
		}
		return nil
	})
	g.Go(func() error {
		for page := range pages {
			if err := put(page); err != nil {
				return err
			}
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		return 0, err
	}
	v.mu.Lock()
	v.ix, v.rev, v.loaded, v.trouble = ix, rev, true, nil
	v.gaugeCounter()
	v.loads++
	v.wake()
	once := v.loads == 1
	v.mu.Unlock()
	if once {
		close(v.first)
	}
	v.poke()
	v.tellAllUnreadable()
	v.log.InfoContext(ctx, "the view of the store is loaded", "revision", rev, "pool", poolName(ix.pool), "hosts", len(ix.hosts),
		"sandboxes", ix.order.Len(), "checkpoints", len(ix.checkpoints), "took", time.Since(began).Round(time.Millisecond))
	return rev, nil
}

func poolName(p *alloc.Pool) string {
	if p == nil {
		return "none"
	}
	return p.UUID
}

// apply is the watch's. All changes of a revision become visible together.
func (v *view) apply(rev alloc.Revision, changes []alloc.Change) error {
	updates := make([]update, 0, len(changes))
	poke := false
	for _, c := range changes {
		u, err := v.ix.prepare(c) // reading ix needs no lock here: this is its writer
		if err != nil {
			return err
		}
		updates = append(updates, u)
		poke = poke || c.Key.Kind == alloc.KindPool
	}
	v.mu.Lock()
	for _, u := range updates {
		v.ix.apply(u)
		if u.key.Kind == alloc.KindCounter {
			v.gaugeCounter()
		}
	}
	v.rev = rev
	v.wake()
	v.mu.Unlock()
	v.tellUnreadable(changes)
	if poke {
		v.poke()
	}
	return nil
}

// gaugeCounter notes how far the counter is. The caller holds mu.
func (v *view) gaugeCounter() {
	if v.ix.counter != nil {
		v.gauge.See(v.ix.counter, v.now())
	}
}

// wake lets those who wait for a revision look again. The caller holds mu.
func (v *view) wake() {
	if v.moved != nil {
		close(v.moved)
		v.moved = nil
	}
}

func (v *view) poke() {
	select {
	case v.changed <- struct{}{}:
	default:
	}
}

// lost ends answering from what is held.
func (v *view) lost(err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.loaded, v.trouble = false, err
	v.wake()
}

// read calls ask with the index under the lock, if it may be answered from, and returns the revision
// that the answer reflects. ask keeps nothing of the index but records and copies of entries.
func (v *view) read(ctx context.Context, linearizable bool, ask func(*index) error) (alloc.Revision, error) {
	if linearizable {
		if err := v.catchUp(ctx); err != nil {
			return 0, err
		}
	}
	v.mu.RLock()
	defer v.mu.RUnlock()
	if err := v.usable(); err != nil {
		return 0, err
	}
	return v.rev, ask(v.ix)
}

// usable says why there is no answer. That the counter cannot be read is no reason: only issuing needs it,
// and reads it in the store. The caller holds mu.
func (v *view) usable() error {
	switch r := alloc.ReasonOf(v.trouble); {
	case v.loaded && v.ix.unreadable[alloc.Key{Kind: alloc.KindPool}] != nil:
		return v.ix.unreadable[alloc.Key{Kind: alloc.KindPool}]
	case v.loaded && v.ix.pool == nil:
		return &alloc.Error{Reason: alloc.ReasonPoolMissing, Msg: "the store holds no pool",
			Fix: "check that it is the right etcd and pool name; create a new pool with: nsalloc pool init"}
	case v.loaded && v.ix.pool.Format > alloc.FormatVersion:
		return &alloc.Error{Reason: alloc.ReasonFormat, Subject: "pool " + v.ix.pool.UUID,
			Msg: fmt.Sprintf("the store has format %d, this version reads %d", v.ix.pool.Format, alloc.FormatVersion),
			Fix: "run servers of the version that wrote it, or a newer one"}
	case v.loaded:
		return nil
	case r == alloc.ReasonMalformed || r == alloc.ReasonFormat:
		return v.trouble
	}
	return &alloc.Error{Reason: alloc.ReasonUnavailable, Msg: "this server has not read the store yet", Fix: "try again", Err: v.trouble}
}

// catchUp waits until the view reflects everything that was committed before it was called.
func (v *view) catchUp(ctx context.Context) error {
	before := v.revision()
	rev, err := v.store.Sync(ctx)
	if err != nil {
		return err
	}
	for known := v.newest.Load(); known < int64(rev) && !v.newest.CompareAndSwap(known, int64(rev)); known = v.newest.Load() {
	}
	if rev < before {
		// What we hold was read from a history that is gone; the stream may not have noticed.
		v.mu.Lock()
		if v.relist != nil {
			v.relist(errBack)
		}
		v.mu.Unlock()
		return &alloc.Error{Reason: alloc.ReasonUnavailable, Msg: errBack.Error(), Fix: "try again"}
	}
	return v.wait(ctx, rev)
}

func (v *view) wait(ctx context.Context, rev alloc.Revision) error {
	for {
		v.mu.Lock()
		// Not loaded is no reason to wait: read says why.
		if v.rev >= rev || !v.loaded {
			v.mu.Unlock()
			return nil
		}
		if v.moved == nil {
			v.moved = make(chan struct{})
		}
		moved := v.moved
		v.mu.Unlock()
		select {
		case <-moved:
		case <-ctx.Done():
			return &alloc.Error{Reason: alloc.ReasonUnavailable, Msg: fmt.Sprintf("this server's view has not reached revision %d in time", rev),
				Fix: "try again, or ask without linearizable", Err: context.Cause(ctx)}
		}
	}
}

func (v *view) revision() alloc.Revision {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.rev
}

// sleep waits, and reports whether it did so to the end.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
