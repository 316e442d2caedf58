package alloc

import (
	"context"
	"fmt"
	"slices"
	"time"
)

const (
	// maxBatch is how many Allocate calls share one transaction: each has a guard and a record, and
	// etcd takes 128 operations.
	maxBatch = 60
	// maxQueue bounds the calls that wait in one server.
	maxQueue = 10_000
	// issueTimeout bounds one shared transaction with its retries; it is not the callers' deadline,
	// because they share it.
	issueTimeout = 10 * time.Second
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
	ctx    context.Context // the caller's: a call that nobody waits for is not begun
	ranges Ranges
	err    error
	done   chan struct{}
}

func (a *allocation) answer(r Ranges, err error) {
	a.ranges, a.err = r, err
	close(a.done)
}

// Allocate issues serials. Calls that wait at the same time share one transaction.
//
// Committed when it returns: the serials are taken for ever, and for RequestLife any server answers
// the same to the same request id. Errors: ErrInvalid, ErrRequestExpired, ErrRequestReused,
// ErrExhausted (nothing was issued), ErrConflict, ErrUnavailable (nothing was issued, try again),
// ErrUnknownOutcome (ask again with the same id).
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
	a := &allocation{cmd: cmd, digest: digest, ctx: ctx, done: make(chan struct{})}
	if err := s.enqueue(a); err != nil {
		return nil, err
	}
	select {
	case <-a.done:
		return a.ranges, a.err
	case <-ctx.Done():
		select {
		case <-a.done: // both: the answer says more
			return a.ranges, a.err
		default:
		}
		return nil, &Error{Reason: ReasonUnknownOutcome, Subject: "request " + cmd.RequestID, Msg: "the caller's deadline passed before the store answered",
			Fix: "ask again with the same request id", Err: context.Cause(ctx)}
	}
}

func (s *Service) enqueue(a *allocation) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) >= maxQueue {
		return &Error{Reason: ReasonExhausted, Msg: fmt.Sprintf("%d calls wait in this server already", maxQueue), Fix: "try again", RetryAfter: retrySoon}
	}
	s.queue = append(s.queue, a)
	if !s.issuing {
		s.issuing = true
		go s.drain()
	}
	return nil
}

// drain issues batches until nobody waits. What arrives while a transaction is under way makes the
// next batch, so that batches grow with the load and no timer is needed.
func (s *Service) drain() {
	for {
		s.mu.Lock()
		n := min(len(s.queue), maxBatch)
		if n == 0 {
			s.queue, s.issuing = nil, false
			s.mu.Unlock()
			return
		}
		batch := append([]*allocation(nil), s.queue[:n]...)
		s.queue = s.queue[n:]
		s.mu.Unlock()
		s.issue(batch)
	}
}

// issue answers every call of a batch, once.
func (s *Service) issue(batch []*allocation) {
	// What the first call's context carries says for whom this is done; its end is not the batch's.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(batch[0].ctx), issueTimeout)
	defer cancel()
	open := make(map[string]*allocation, len(batch))
	followers := map[string][]*allocation{} // the same id twice in one batch: one effect, the same answer
	var order []*allocation
	for _, a := range batch {
		switch first := open[a.cmd.RequestID]; {
		case a.ctx.Err() != nil:
			a.answer(nil, &Error{Reason: ReasonUnavailable, Msg: "the caller left before its turn; nothing was issued", Err: context.Cause(a.ctx)})
		case first == nil:
			open[a.cmd.RequestID], order = a, append(order, a)
		case first.digest != a.digest:
			a.answer(nil, sameBody(a.cmd.RequestID, first.digest, a.digest))
		default:
			followers[a.cmd.RequestID] = append(followers[a.cmd.RequestID], a)
		}
	}
	answer := func(a *allocation, r Ranges, err error) {
		delete(open, a.cmd.RequestID)
		a.answer(r, err)
		for _, f := range followers[a.cmd.RequestID] {
			f.answer(slices.Clone(r), err)
		}
	}
	release, err := s.holdCounter(ctx)
	if err == nil {
		err = s.issueTries(ctx, order, open, answer)
		release()
	}
	for _, a := range order {
		if open[a.cmd.RequestID] != nil {
			answer(a, nil, err)
		}
	}
}

// issueTries commits the calls in open and answers those that got their serials. Guards exclude that
// two tries both take effect: both need the counter at the value that they read, and change it. A try
// after a lost one first looks for the request records of that one.
func (s *Service) issueTries(ctx context.Context, order []*allocation, open map[string]*allocation, answer func(*allocation, Ranges, error)) error {
	return settle(ctx, func() (bool, error) {
		b, err := s.plan(ctx, order, open, answer)
		if err != nil || len(b.grants) == 0 {
			return false, err
		}
		if _, err = s.store.Commit(ctx, b.tx); err != nil {
			return false, err
		}
		for a, r := range b.grants {
			answer(a, r, nil)
		}
		return true, nil
	})
}

// batchPlan is one transaction and who gets what when it commits.
type batchPlan struct {
	tx     Tx
	grants map[*allocation]Ranges
}

func (s *Service) plan(ctx context.Context, order []*allocation, open map[string]*allocation, answer func(*allocation, Ranges, error)) (*batchPlan, error) {
	keys := []Key{{Kind: KindPool}, {Kind: KindCounter}, {Kind: KindRequest, ID: sweptID}}
	for _, a := range order {
		if open[a.cmd.RequestID] != nil {
			keys = append(keys, Key{Kind: KindRequest, ID: a.cmd.RequestID})
		}
	}
	entries, _, err := s.store.Get(ctx, keys...)
	if err != nil {
		return nil, err
	}
	// A request's record that cannot be read is that caller's trouble and nobody else's.
	if err := readable(entries[:3]); err != nil {
		return nil, err
	}
	counter, err := counterOf(entries)
	if err != nil {
		return nil, err
	}
	p := &batchPlan{grants: map[*allocation]Ranges{}}
	p.tx.Guards = []Guard{{Key: entries[0].Key, Token: entries[0].Token}, {Key: entries[1].Key, Token: entries[1].Token}}
	now := s.now()
	for _, e := range entries[3:] {
		a := open[e.Key.ID]
		if e.Err != nil {
			answer(a, nil, e.Err)
			continue
		}
		if found, ok := e.Record.(*Request); ok {
			if err := sameBody(found.ID, found.Digest, a.digest); err != nil {
				answer(a, nil, err)
			} else {
				answer(a, found.Ranges, nil)
			}
			continue
		}
		if swept(entries[2], e.Key.ID) {
			answer(a, nil, requestExpired(e.Key.ID))
			continue
		}
		r, err := counter.take(a.cmd.Count)
		if err != nil {
			answer(a, nil, err)
			continue
		}
		p.grants[a] = Ranges{r}
		p.tx.Guards = append(p.tx.Guards, Guard{Key: e.Key})
		p.tx.Put = append(p.tx.Put, &Request{ID: a.cmd.RequestID, Digest: a.digest, Ranges: Ranges{r}, At: now})
	}
	counter.Nonce = newNonce()
	p.tx.Put = append(p.tx.Put, counter)
	return p, nil
}

// counterOf reads pool and counter from the first two entries and refuses what must not be issued from.
func counterOf(entries []Entry) (*Counter, error) {
	pool, err := openPool(entries[0])
	if err != nil {
		return nil, err
	}
	c, ok := entries[1].Record.(*Counter)
	if !ok || c.Generation != pool.Generation || c.Next == 0 {
		return nil, &Error{Reason: ReasonMalformed, Subject: "pool " + pool.UUID,
			Msg: fmt.Sprintf("its counter is missing or not of generation %d", pool.Generation),
			Fix: "restore the store from a newer snapshot; nothing is issued from this one"}
	}
	counter := *c
	return &counter, nil
}

// take moves the counter on. What it returns is issued only when the counter's record has committed.
func (c *Counter) take(n uint64) (Range, error) {
	if c.Next > MaxCounter || MaxCounter-c.Next+1 < n {
		return Range{}, refuse(ReasonExhausted, fmt.Sprintf("generation %d", c.Generation), "%d serials are asked for, %d are left", n, MaxCounter-min(c.Next, MaxCounter+1)+1)
	}
	first, err := NewSerial(c.Generation, c.Next)
	if err != nil {
		return Range{}, err
	}
	c.Next += n
	return Range{First: first, Count: n}, nil
}
