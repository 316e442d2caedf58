package alloc

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// Service is the use cases of a pool over its Store. It is safe for concurrent use, and several of
// them, in as many servers, may work on one store.
type Service struct {
	store Store
	now   func() time.Time

	counter chan struct{} // one slot, held by whoever moves the pool's counter: callers in one process never race on that key

	checking chan struct{} // one slot, held by whoever reads all records

	// Behind is called when an agent has seen more of the pool than the store knows, and the pool was closed for
	// it; why says what. Set it before the first call; it must not block.
	Behind func(host, why string)

	// LaneLost is called when a lane's record was not the one that it wrote last: a copy of this server took
	// its range, or the store was put back, or (swept) the lane was not used for long. Set it before the first
	// call; it must not block.
	LaneLost func(id string, swept bool)

	queue  chan *allocation
	mu     sync.Mutex
	idle   []*lane // guarded by mu: nobody drains the queue with them
	waking int     // guarded by mu: lanes that will look at the queue soon
	slow   int     // guarded by mu: lanes that nobody counts on for now

	waiting atomic.Int64 // calls that wait for a place in queue

	counters seenCounter
}

// NewService makes the use cases over store. now is the clock that stamps records; nothing but those
// stamps and the age of request ids rests on it. nil means time.Now.
func NewService(store Store, now func() time.Time) *Service {
	if now == nil {
		now = time.Now
	}
	s := &Service{store: store, counter: make(chan struct{}, 1), checking: make(chan struct{}, 1), now: func() time.Time { return now().UTC().Round(0) },
		queue: make(chan *allocation, maxQueue)}
	for range maxLanes {
		s.idle = append(s.idle, new(lane))
	}
	return s
}

// Mutation is what every change by a host carries.
type Mutation struct {
	// RequestID is a UUIDv7, one for one intent.
	RequestID string `json:"-"`
	// Host is the caller, from its certificate and never from the request's body.
	Host string `json:"host"`
	// Incarnation is the caller's life.
	Incarnation Incarnation `json:"incarnation"`
}

func (m Mutation) actor() string { return "host/" + m.Host }

// holdCounter waits for the counter's turn, as long as ctx lasts.
func (s *Service) holdCounter(ctx context.Context) (release func(), err error) {
	select {
	case s.counter <- struct{}{}:
		return func() { <-s.counter }, nil
	case <-ctx.Done():
		return nil, &Error{Reason: ReasonUnavailable, Msg: "the deadline passed while others took serials; nothing was issued",
			Fix: "try again", RetryAfter: retrySoon, Err: context.Cause(ctx)}
	}
}

// tryCounter is holdCounter where nobody holds it.
func (s *Service) tryCounter() (release func(), ok bool) {
	select {
	case s.counter <- struct{}{}:
		return func() { <-s.counter }, true
	default:
		return nil, false
	}
}

// get reads what a decision rests on. A record that cannot be understood is that decision's error: it is
// never taken for an absent one.
func (s *Service) get(ctx context.Context, keys ...Key) ([]Entry, Revision, error) {
	entries, rev, err := s.store.Get(ctx, keys...)
	if err != nil {
		return nil, 0, err
	}
	return entries, rev, readable(entries)
}

// readable is the error of the first record that cannot be understood.
func readable(entries []Entry) error {
	for _, e := range entries {
		if e.Err != nil {
			return e.Err
		}
	}
	return nil
}

// InitPool creates the pool in an empty store, in generation 1 with the given policy. It refuses with
// ErrPoolExists where a pool is: an empty store is never taken for a new pool by any other call. It
// refuses with ErrMalformed where records are without their pool: a new one would begin at serial 1
// again.
func (s *Service) InitPool(ctx context.Context, p Policy) (*Pool, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	if err := s.empty(ctx); err != nil {
		return nil, err
	}
	pool := &Pool{UUID: newUUID(), Generation: 1, State: PoolOpen, Policy: p, Format: FormatVersion, Nonce: newNonce(), Settled: 1, Created: s.now()}
	counter := &Counter{Generation: 1, Next: 1, Nonce: newNonce()}
	_, err := s.store.Commit(ctx, Tx{
		Guards: []Guard{{Key: pool.Key()}, {Key: counter.Key()}},
		Put:    []Record{pool, counter},
	})
	if ReasonOf(err) == ReasonUnknownOutcome || ReasonOf(err) == ReasonConflict {
		// Ours is told from another's by its UUID. Asking again is safe: one pool at most gets in.
		found, _, readErr := s.Pool(ctx)
		if readErr == nil && found.UUID == pool.UUID {
			return found, nil
		}
		if readErr == nil {
			return nil, poolExists(found)
		}
	}
	if err != nil {
		return nil, err
	}
	return pool, nil
}

// empty refuses a store that holds anything of a pool.
func (s *Service) empty(ctx context.Context) error {
	found, _, err := s.Pool(ctx)
	switch {
	case err == nil:
		return poolExists(found)
	case ReasonOf(err) != ReasonPoolMissing:
		return err
	}
	leftovers, _, err := s.store.Get(ctx, Key{Kind: KindCounter})
	if err != nil {
		return err
	}
	for _, kind := range Kinds() {
		entries, _, err := s.store.List(ctx, kind, "", 1, 0)
		if err != nil {
			return err
		}
		leftovers = append(leftovers, entries...)
	}
	for _, e := range leftovers {
		if e.Token != "" || e.Err != nil {
			return &Error{Reason: ReasonMalformed, Subject: "record " + e.Key.String(), Msg: "the store holds it but not the pool that it is of; nothing was changed",
				Fix: "restore the store from a snapshot, or name another pool"}
		}
	}
	return nil
}

func poolExists(p *Pool) error {
	return refuse(ReasonPoolExists, "pool "+p.UUID, "the store holds this pool already; nothing was changed")
}

// Pool reads the pool's record. ErrPoolMissing when there is none.
func (s *Service) Pool(ctx context.Context) (*Pool, Revision, error) {
	entries, rev, err := s.get(ctx, Key{Kind: KindPool})
	if err != nil {
		return nil, 0, err
	}
	pool, err := poolOf(entries[0])
	return pool, rev, err
}

func poolOf(e Entry) (*Pool, error) {
	pool, ok := e.Record.(*Pool)
	if !ok {
		return nil, &Error{Reason: ReasonPoolMissing, Msg: "the store holds no pool",
			Fix: "check that it is the right etcd and pool name; create a new pool with: nsalloc pool init"}
	}
	return pool, nil
}

// openPool is the pool, when this version may write to it.
func openPool(e Entry) (*Pool, error) {
	pool, err := poolOf(e)
	if err != nil {
		return nil, err
	}
	return pool, pool.check()
}

// newNonce is 128 random bits in hex.
func newNonce() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}

// newUUID is a random UUID (version 4).
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
