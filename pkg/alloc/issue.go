package alloc

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"time"
)

const (
	// maxBatch is how many Allocate calls share one transaction: each has a guard and a record. With the
	// pool, the counter, the sweep's mark and the lane they fit etcd's 128 operations.
	maxBatch = 120
	// maxQueue bounds the calls that wait in one server.
	maxQueue = 10_000
	// maxLanes is how many transactions one server has under way for them at once.
	maxLanes = 4
	// maxWaiting bounds those that wait for a place in the queue.
	maxWaiting = 10_000
	// slow is after what time a lane that is in a transaction is not counted on any more: others begin.
	slow = 100 * time.Millisecond
	// tryTimeout bounds one try of a shared transaction, so that a store which does not answer can be asked
	// again, over another connection, while its callers wait.
	tryTimeout = 3 * time.Second
	// issueTimeout bounds one shared transaction with its retries; it is not the callers' deadline,
	// because they share it.
	issueTimeout = 10 * time.Second
	// repeatedAfter is from what age on a request is looked for before it joins others: most that are older are
	// asked again. One of a caller whose clock is behind costs a read more.
	repeatedAfter = 250 * time.Millisecond
)

// AllocateCommand asks for serials that belong to nothing yet.
type AllocateCommand struct {
	RequestID string `json:"-"`
	Caller    string `json:"caller"`
	Count     uint64 `json:"count"`
}

// allocation is one call on its way. After done was closed ranges and err are the caller's to read.
type allocation struct {
	cmd    AllocateCommand
	digest Digest
	ctx    context.Context // the caller's
	turn   atomic.Int32
	ranges Ranges
	err    error
	done   chan struct{}
}

// The turns of an allocation. Whoever moves it from waiting decides: a call that left before its turn was
// not begun, and that is certain.
const (
	waiting int32 = iota
	begun
	left
)

func (a *allocation) answer(r Ranges, err error) {
	a.ranges, a.err = r, err
	close(a.done)
}

// Allocate issues serials. Calls that wait at the same time share one transaction. When maxQueue calls
// wait, it waits for a place among them, until the caller's deadline, as one of maxWaiting.
//
// Committed when it returns: the serials are taken for ever, and for RequestLife any server answers
// the same to the same request id. Errors: ErrInvalid, ErrRequestExpired, ErrRequestReused,
// ErrExhausted (no serials are left, or with RetryAfter: its turn did not come; nothing was issued),
// ErrConflict, ErrUnavailable (nothing was issued, try again), ErrUnknownOutcome (ask again with the same id).
func (s *Service) Allocate(ctx context.Context, cmd AllocateCommand) (Ranges, error) {
	if cmd.Count == 0 || cmd.Count > MaxAllocate {
		return nil, invalid("count", fmt.Sprintf("%d is not in 1..%d", cmd.Count, MaxAllocate))
	}
	if err := s.checkRequest(cmd.RequestID); err != nil {
		return nil, err
	}
	digest, err := digestOf(cmd)
	if err != nil {
		return nil, err
	}
	if err := context.Cause(ctx); err != nil {
		return nil, &Error{Reason: ReasonUnavailable, Subject: "request " + cmd.RequestID, Msg: "the caller had left already; nothing was issued", Err: err}
	}
	if r, err := s.answered(ctx, cmd.RequestID, digest); r != nil || err != nil {
		return r, err
	}
	a := &allocation{cmd: cmd, digest: digest, ctx: ctx, done: make(chan struct{})}
	select {
	case s.queue <- a:
	default:
		if s.waiting.Add(1) > maxWaiting {
			s.waiting.Add(-1)
			return nil, &Error{Reason: ReasonExhausted, Subject: "request " + cmd.RequestID, Msg: fmt.Sprintf("%d calls wait in this server already; nothing was issued", maxQueue+maxWaiting),
				Fix: "try again", RetryAfter: retrySoon}
		}
		defer s.waiting.Add(-1)
		select {
		case s.queue <- a:
		case <-ctx.Done():
			return nil, a.late()
		}
	}
	s.wake()
	select {
	case <-a.done:
		return a.ranges, a.err
	case <-ctx.Done():
	}
	if a.turn.CompareAndSwap(waiting, left) {
		return nil, a.late()
	}
	select {
	case <-a.done: // both: the answer says more
		return a.ranges, a.err
	default:
	}
	return nil, &Error{Reason: ReasonUnknownOutcome, Subject: "request " + cmd.RequestID, Msg: "the caller's deadline passed before the store answered",
		Fix: "ask again with the same request id", Err: context.Cause(ctx)}
}

// answered looks for what was committed for a request that is asked again, alone: in a batch it would make that
// conflict, and all of its calls be read and committed again. That nothing is found decides nothing.
func (s *Service) answered(ctx context.Context, id string, d Digest) (Ranges, error) {
	at, err := requestTime(id)
	if err != nil || s.now().Sub(at) < repeatedAfter {
		return nil, err
	}
	entries, _, err := s.store.Get(ctx, Key{Kind: KindRequest, ID: id})
	if err != nil {
		return nil, err // nothing was issued for this try
	}
	found, ok := entries[0].Record.(*Request)
	if !ok {
		return nil, entries[0].Err
	}
	if err := sameBody(id, found.Digest, d); err != nil {
		return nil, err
	}
	if err := s.stillThere(ctx, entries); err != nil {
		if ReasonOf(err) == ReasonConflict {
			return nil, nil // it was swept, or the store put back: that is looked at with the others
		}
		return nil, err
	}
	return found.Ranges, nil
}

// stillThere has a write of this server's own come after the requests that were read, before they are acknowledged: its
// witness does not know of them where another server has written them, or where the answer to its own write was lost,
// and would not notice that the store forgets them. It writes nothing where nothing was found. ErrConflict when one of
// them is not there any more.
func (s *Service) stillThere(ctx context.Context, requests []Entry) error {
	var found []Guard
	for _, e := range requests {
		if _, ok := e.Record.(*Request); ok && e.Err == nil {
			found = append(found, Guard{e.Key, e.Token})
		}
	}
	if len(found) == 0 {
		return nil
	}
	_, err := s.store.Commit(ctx, Tx{Guards: found})
	return err
}

// late is the answer to a call whose turn did not come.
func (a *allocation) late() error {
	return &Error{Reason: ReasonExhausted, Subject: "request " + a.cmd.RequestID, Msg: "the caller's deadline passed before its turn came; nothing was issued",
		Fix: "try again", RetryAfter: retrySoon, Err: context.Cause(a.ctx)}
}

// wake has a lane drain the queue, if there is need of one. All lanes but one are at work only while more
// waits than one transaction takes: where one is enough, two would make small transactions of large ones.
func (s *Service) wake() {
	s.mu.Lock()
	defer s.mu.Unlock()
	waits, idle, enough := len(s.queue), len(s.idle), 1
	if idle+s.slow < maxLanes { // one at work takes what is left over, and each that was woken a batch
		enough = maxBatch * (s.waking + 1)
	}
	if idle == 0 || waits < enough {
		return
	}
	// The one that was at work last: the others keep what they have for when they are needed.
	l := s.idle[idle-1]
	s.idle = s.idle[:idle-1]
	s.waking++
	go s.drain(l)
}

// drain issues batches until nobody waits. What arrives while a transaction is under way makes the
// next batch, so that batches grow with the load and no timer is needed.
func (s *Service) drain(l *lane) {
	for batch := s.next(l, true); batch != nil; batch = s.next(l, false) {
		done := s.watch()
		s.issue(l, batch)
		done()
	}
}

// next is a lane's next batch, or nil: then the lane is idle. Whoever wakes lanes sees the queue before it or
// after it, so that no call is left behind, and of two lanes one takes all that waits for one.
func (s *Service) next(l *lane, woken bool) []*allocation {
	s.mu.Lock()
	defer s.mu.Unlock()
	if woken {
		s.waking--
	}
	batch := s.batch()
	if batch == nil {
		s.idle = append(s.idle, l)
	}
	return batch
}

// watch sees to it that nobody waits for a lane that is slow: the store may hang, or be slow for one key.
func (s *Service) watch() (done func()) {
	isSlow := false // guarded by mu
	over := false   // guarded by mu
	t := time.AfterFunc(slow, func() {
		s.mu.Lock()
		if !over {
			isSlow = true
			s.slow++
		}
		s.mu.Unlock()
		s.wake()
	})
	return func() {
		t.Stop()
		s.mu.Lock()
		defer s.mu.Unlock()
		over = true
		if isSlow {
			s.slow--
		}
	}
}

// batch is the next calls whose callers still wait.
func (s *Service) batch() []*allocation {
	var batch []*allocation
	for len(batch) < maxBatch {
		select {
		case a := <-s.queue:
			if a.turn.CompareAndSwap(waiting, begun) {
				batch = append(batch, a)
			}
		default:
			return batch
		}
	}
	return batch
}

// calls are the calls of one batch that have no answer yet.
type calls struct {
	open      map[string]*allocation
	followers map[string][]*allocation // the same id twice in one batch: one effect, the same answer
	order     []*allocation
}

func newCalls(batch []*allocation) *calls {
	c := &calls{open: make(map[string]*allocation, len(batch)), followers: map[string][]*allocation{}}
	for _, a := range batch {
		switch first := c.open[a.cmd.RequestID]; {
		case first == nil:
			c.open[a.cmd.RequestID], c.order = a, append(c.order, a)
		case first.digest != a.digest:
			a.answer(nil, sameBody(a.cmd.RequestID, first.digest, a.digest))
		default:
			c.followers[a.cmd.RequestID] = append(c.followers[a.cmd.RequestID], a)
		}
	}
	return c
}

func (c *calls) answer(a *allocation, r Ranges, err error) {
	delete(c.open, a.cmd.RequestID)
	a.answer(r, err)
	for _, f := range c.followers[a.cmd.RequestID] {
		f.answer(slices.Clone(r), err)
	}
}

// waiting calls, in their order.
func (c *calls) waiting() []*allocation {
	c.order = slices.DeleteFunc(c.order, func(a *allocation) bool { return c.open[a.cmd.RequestID] == nil })
	return c.order
}

// issue answers every call of a batch, once.
func (s *Service) issue(l *lane, batch []*allocation) {
	// What the first call's context carries says for whom this is done; its end is not the batch's.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(batch[0].ctx), issueTimeout)
	defer cancel()
	c := newCalls(batch)
	err := settle(ctx, func() (bool, error) {
		ctx, cancel := context.WithTimeout(ctx, tryTimeout)
		defer cancel()
		return l.try(ctx, s, c)
	})
	for _, a := range c.waiting() {
		c.answer(a, nil, err)
	}
}
