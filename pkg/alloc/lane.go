package alloc

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

// Lane is what one lane of one server issues from: a range that it took from the pool's counter. Only the
// goroutine that holds the lane writes its record, each time with a fresh nonce and guarded by the value that
// it wrote before. So no two servers race on a key, and yet a server that is a copy of another, or whose
// store was put back, finds another value there and loses.
type Lane struct {
	// ID is random, 32 hex digits, one for each life of a lane. A lane that lost begins another life: what
	// is left of the range is burned.
	ID string `json:"id"`
	// Left is what was not issued yet, used from the front. Ranges of an older generation are burned.
	Left  Ranges `json:"left"`
	Nonce string `json:"-"`
	// At is the last write, by the server's clock. One that is old is of a server that is gone.
	At    time.Time `json:"at"`
	Extra []byte    `json:"-"`
}

// Sizes of the ranges that lanes take from the counter. They are about ten seconds of use: few enough
// transactions on the counter, and little to burn.
const (
	minLaneRange = 1 << 10
	maxLaneRange = 1 << 22
	laneRangeUse = 10 * time.Second
)

// maxPending is after how many lost answers in a row a lane begins another life.
const maxPending = 100

// lane is a Lane with what its server knows, so that issuing needs no read. It is held by one goroutine at
// a time.
type lane struct {
	Lane
	// The values that the next transaction compares. known is false until they were read, and after every
	// commit that did not go through.
	known             bool
	pool, mark, token Token
	generation        Generation
	swept             string // the beginning of the last request id whose record may have been deleted
	// pending are the tokens of writes whose outcome is unknown; each of them compares token.
	pending []Token

	size  uint64    // of the next range
	taken time.Time // when the last one was
	// low is how little is left when the next range is taken ahead. It is drawn for each, so that lanes that began
	// together do not take theirs together.
	low uint64
}

// try commits the calls that have no answer yet in one transaction, and answers them.
//
// Guards exclude that two tries both take effect: both compare the lane's record and change it, and each
// compares the absence of its calls' request records. A try after a lost one reads first, and finds those
// records or a value on which the lost one takes effect no more.
//
// One record for a whole batch would cost a tenth of the bytes, and 6% less processor time a call; but two servers
// that have the same request in different batches would then write no key in common, and both take effect.
func (l *lane) try(ctx context.Context, s *Service, c *calls) (bool, error) {
	if !l.known {
		if err := l.look(ctx, s, c); err != nil {
			return false, err
		}
	}
	open := c.waiting()
	if len(open) == 0 {
		return true, nil
	}
	var need uint64
	for _, a := range open {
		if l.swept != "" && a.cmd.RequestID[:len(l.swept)] <= l.swept { // that there is no record says nothing of this one
			if err := l.look(ctx, s, c); err != nil {
				return false, err
			}
			if open, need = c.waiting(), 0; len(open) == 0 {
				return true, nil
			}
			for _, a := range open {
				need += a.cmd.Count
			}
			break
		}
		need += a.cmd.Count
	}
	now := s.now()
	next := l.Lane
	next.Nonce, next.At = newNonce(), now
	tx := Tx{Guards: []Guard{{Key{Kind: KindPool}, l.pool}, {Key{Kind: KindRequest, ID: sweptID}, l.mark}, {l.Key(), l.token}}}
	size := l.size
	release, err := l.turn(ctx, s, need)
	if err != nil {
		return false, err
	}
	filled := release != nil
	if filled {
		defer release()
		have := next.Left.Count()
		if size, err = l.fill(ctx, s, &next, &tx, need-min(need, have), now); err != nil && have < need {
			return false, err
		}
		filled = err == nil // else it was ahead of time
	}
	grants := make([]Ranges, len(open))
	for i, a := range open {
		taken, rest, ok := next.Left.Take(a.cmd.Count)
		if !ok {
			continue
		}
		next.Left, grants[i] = rest, taken
		tx.Guards = append(tx.Guards, Guard{Key: Key{Kind: KindRequest, ID: a.cmd.RequestID}})
		tx.Put = append(tx.Put, &Request{ID: a.cmd.RequestID, Digest: a.digest, Ranges: taken, At: now})
	}
	tx.Put = append(tx.Put, &next)
	token, err := s.store.Token(&next)
	if err != nil {
		return false, err
	}
	if _, err := s.store.Commit(ctx, tx); err != nil {
		l.known = false
		if ReasonOf(err) == ReasonUnknownOutcome {
			l.pending = append(l.pending, token)
		}
		if len(l.pending) > maxPending {
			l.begin() // each of them compares the record that is left behind
		}
		return false, err
	}
	if filled {
		s.counters.took(tx)
		l.size, l.taken, l.low = size, now, size/8+rand.N(size/8)
	}
	l.Lane, l.token, l.pending = next, token, nil
	for i, a := range open {
		if grants[i] == nil {
			c.answer(a, nil, exhausted(l.generation, a.cmd.Count, next.Left.Count()))
			continue
		}
		c.answer(a, grants[i], nil)
	}
	return true, nil
}

// turn is the counter's, when this transaction is to take from it: release is nil when it is not. What one lane needs
// of the counter no other lane of this server needs at the same time. It is waited for only where there is too little
// left for need: a lane whose range runs low takes the next one when the counter is free.
func (l *lane) turn(ctx context.Context, s *Service, need uint64) (release func(), err error) {
	have := l.Left.Count()
	if have < need {
		return s.holdCounter(ctx)
	}
	if have-need < l.low {
		release, _ = s.tryCounter()
	}
	return release, nil
}

// fill has tx take a range from the counter for next, of need at least while the counter has as much. It
// returns the size of the lane's ranges from now on.
func (l *lane) fill(ctx context.Context, s *Service, next *Lane, tx *Tx, need uint64, now time.Time) (uint64, error) {
	entries, _, err := s.get(ctx, Key{Kind: KindPool}, Key{Kind: KindCounter})
	if err != nil {
		return 0, err
	}
	counter, err := counterOf(entries)
	if err != nil {
		return 0, err
	}
	size := max(l.size, minLaneRange)
	switch age := now.Sub(l.taken); {
	case l.size == 0:
	case age < laneRangeUse/2:
		size = min(2*size, maxLaneRange)
	case age > 2*laneRangeUse:
		size = max(size/2, minLaneRange)
	}
	before := *counter
	r, err := counter.take(min(max(size, need), max(counter.left(), 1)))
	if ReasonOf(err) == ReasonExhausted {
		return size, nil // some calls may do with what the lane has
	}
	if err != nil {
		return 0, err
	}
	if err := s.counters.see(entries[0].Record.(*Pool), &before); err != nil {
		return 0, err
	}
	counter.Nonce = newNonce()
	next.Left = append(slices.Clone(next.Left), r)
	tx.Guards = append(tx.Guards, Guard{entries[1].Key, entries[1].Token})
	tx.Put = append(tx.Put, counter)
	return size, nil
}

// look reads what the next transaction compares, and answers the calls that were answered before.
func (l *lane) look(ctx context.Context, s *Service, c *calls) error {
	if l.ID == "" {
		l.begin()
	}
	keys := []Key{{Kind: KindPool}, {Kind: KindRequest, ID: sweptID}, l.Key()}
	for _, a := range c.waiting() {
		keys = append(keys, Key{Kind: KindRequest, ID: a.cmd.RequestID})
	}
	entries, _, err := s.store.Get(ctx, keys...)
	if err != nil {
		return err
	}
	// A request's record that cannot be read is that caller's trouble and nobody else's.
	if err := readable(entries[:2]); err != nil {
		return err
	}
	pool, err := openPool(entries[0])
	if err != nil {
		return err
	}
	l.pool, l.mark, l.generation, l.swept = entries[0].Token, entries[1].Token, pool.Generation, sweptThrough(entries[1])
	switch found := entries[2]; {
	case found.Token == l.token: // as it was; what is pending may still come, and compares the same
	case slices.Contains(l.pending, found.Token):
		l.Lane, l.token, l.pending = *found.Record.(*Lane), found.Token, nil
	default:
		// Somebody else wrote it, or swept it: a copy of this server, or this one was away for long.
		if s.LaneLost != nil {
			s.LaneLost(l.ID, found.Token == "")
		}
		l.begin()
	}
	l.Left = l.Left.in(pool.Generation)
	if err := s.stillThere(ctx, entries[3:]); err != nil {
		return err
	}
	for _, e := range entries[3:] {
		a := c.open[e.Key.ID]
		switch found, ok := e.Record.(*Request); {
		case e.Err != nil:
			c.answer(a, nil, e.Err)
		case ok && found.Digest != a.digest:
			c.answer(a, nil, sameBody(found.ID, found.Digest, a.digest))
		case ok:
			c.answer(a, found.Ranges, nil)
		case swept(entries[1], e.Key.ID):
			c.answer(a, nil, requestExpired(e.Key.ID))
		}
	}
	l.known = true
	return nil
}

// begin is a new life.
func (l *lane) begin() {
	l.Lane, l.token, l.pending = Lane{ID: newNonce()}, "", nil
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

// exhausted is the answer when a generation has no serials left.
func exhausted(g Generation, n, left uint64) error {
	e := &Error{Reason: ReasonExhausted, Subject: fmt.Sprintf("generation %d", g), Msg: fmt.Sprintf("%d serials are asked for, %d are left", n, left),
		Fix: "begin the next generation: nsalloc mend counter --force; nsalloc pool status says what is left"}
	if g >= MaxGeneration {
		e.Fix = noGeneration
	}
	return e
}

// noGeneration is what to do when the last generation is used up.
const noGeneration = "this pool issues no more serials, and what it has issued stays: create another pool (nsalloc pool init --pool NAME), and have hosts join it when nothing of theirs is handed off"

// left is how many serials the generation has left.
func (c *Counter) left() uint64 { return MaxCounter + 1 - min(c.Next, MaxCounter+1) }

// take moves the counter on. What it returns is issued only when the counter's record has committed.
func (c *Counter) take(n uint64) (Range, error) {
	if left := c.left(); left < n {
		return Range{}, exhausted(c.Generation, n, left)
	}
	first, err := NewSerial(c.Generation, c.Next)
	if err != nil {
		return Range{}, err
	}
	c.Next += n
	return Range{First: first, Count: n}, nil
}

// seenCounter is the highest that this process has seen the pool's counter at. One that is lower is of a store
// that was put back: to take from it would be to issue again.
type seenCounter struct {
	mu    sync.Mutex
	nonce string // guarded by mu: the pool's, of the generation
	next  uint64 // guarded by mu
}

func (c *seenCounter) see(pool *Pool, now *Counter) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if pool.Nonce == c.nonce && now.Next < c.next {
		return &Error{Reason: ReasonRecovering, Subject: "counter", Msg: fmt.Sprintf("it is at %x, and this server has seen it at %x: the store was put back to an older snapshot; nothing was issued", now.Next, c.next),
			Fix: "put back a newer snapshot of the etcd; if there is none: nsalloc mend counter --force", RetryAfter: retrySoon}
	}
	c.nonce, c.next = pool.Nonce, now.Next
	return nil
}

// took notes the counter of a transaction that has committed.
func (c *seenCounter) took(tx Tx) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, rec := range tx.Put {
		if now, ok := rec.(*Counter); ok {
			c.next = max(c.next, now.Next)
		}
	}
}
