package witness

import (
	"context"
	"fmt"
	"slices"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// maxSlots is how many writes of one server are on their way at once; the others wait.
const maxSlots = 64

// slot is a place of this life. It is held by one write at a time.
type slot struct {
	rec   alloc.Slot
	token alloc.Token // of rec, "" before its first write
	// pending are writes whose outcome is unknown: each compares token, and one of them at most is done.
	pending []pending
}

type pending struct {
	rec   alloc.Slot
	token alloc.Token
}

// through writes tx through a slot. again says that nothing was written because the slot was not as expected.
func (s *Store) through(ctx context.Context, sl *slot, made uint64, tx alloc.Tx) (rev alloc.Revision, again bool, err error) {
	if len(sl.pending) > 0 {
		if ok, err := s.settle(ctx, sl); err != nil || !ok {
			return 0, err == nil, err
		}
	}
	next := sl.rec
	next.Writes, next.Nonce = sl.rec.Writes+1, newNonce()
	token, err := s.Token(&next)
	if err != nil {
		return 0, false, err
	}
	own := tx
	own.Guards = append(slices.Clip(tx.Guards), alloc.Guard{Key: next.Key(), Token: sl.token})
	own.Put = append(slices.Clip(tx.Put), &next)
	rev, err = s.Store.Commit(ctx, own)
	switch alloc.ReasonOf(err) {
	case alloc.ReasonUnknownOutcome:
		sl.pending = append(sl.pending, pending{next, token})
		return 0, false, err
	case alloc.ReasonConflict:
		// Mostly somebody else's record. If it is this slot's, the store is to be looked at.
		entries, _, readErr := s.Store.Get(ctx, next.Key())
		if readErr == nil && entries[0].Token != sl.token {
			s.doubt()
			return 0, true, nil
		}
		return 0, false, err
	}
	if err != nil {
		return 0, false, err
	}
	sl.rec, sl.token, sl.pending = next, token, nil
	if err := s.file.Update(func(seen *Seen) { seen.wrote(next, tx) }); err != nil {
		s.doubt() // nothing more is written before the disk takes it
		return 0, false, unknown("it was committed, and the witness of this server could not be written: "+err.Error(), "make room on its disk, then ask again with the same request id")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.made != made {
		return 0, false, unknown("the connection to the store was made anew before the answer was believed", "ask again with the same request id")
	}
	return rev, false, nil
}

func unknown(msg, fix string) error {
	return &alloc.Error{Reason: alloc.ReasonUnknownOutcome, Subject: "store transaction", Msg: msg, Fix: fix}
}

// wrote notes a write of this life, and the counter that it moved.
func (s *Seen) wrote(sl alloc.Slot, tx alloc.Tx) {
	if sl.Life != s.Life {
		return // of a life before
	}
	for len(s.Slots) <= sl.N {
		s.Slots = append(s.Slots, Mark{})
	}
	s.Slots[sl.N] = Mark{sl.Writes, sl.Nonce}
	for _, rec := range tx.Put {
		switch r := rec.(type) {
		case *alloc.Pool:
			s.sees(look{pool: r})
		case *alloc.Counter:
			if r.Generation == s.Generation {
				s.Counter = max(s.Counter, r.Next)
			}
		}
	}
}

// settle finds out what became of a slot's pending write: done, or it takes effect no more once the next write
// does. It reports false when the slot is neither.
func (s *Store) settle(ctx context.Context, sl *slot) (bool, error) {
	entries, _, err := s.Store.Get(ctx, sl.rec.Key())
	if err != nil {
		return false, err
	}
	if entries[0].Token == sl.token {
		return true, nil // one may still come, and then the next write conflicts with it
	}
	for _, p := range sl.pending {
		if p.token == entries[0].Token {
			sl.rec, sl.token, sl.pending = p.rec, p.token, nil
			return true, nil
		}
	}
	s.doubt()
	return false, nil
}

// take holds a slot of this life; give gives it back.
func (s *Store) take(ctx context.Context) (*slot, error) {
	for {
		s.mu.Lock()
		if n := len(s.free); n > 0 {
			sl := s.free[n-1]
			s.free = s.free[:n-1]
			s.mu.Unlock()
			return sl, nil
		}
		if len(s.all) < maxSlots {
			sl := &slot{rec: alloc.Slot{Server: s.name, Life: s.server.Nonce, N: len(s.all)}}
			s.all = append(s.all, sl)
			s.mu.Unlock()
			return sl, nil
		}
		freed := s.freed
		s.mu.Unlock()
		select {
		case <-freed:
		case <-ctx.Done():
			return nil, &alloc.Error{Reason: alloc.ReasonUnavailable, Msg: fmt.Sprintf("the deadline passed while %d writes of this server were under way; nothing was written", maxSlots),
				Fix: "try again", RetryAfter: retrySoon, Err: context.Cause(ctx)}
		}
	}
}

func (s *Store) give(sl *slot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sl.rec.Life != s.server.Nonce {
		return // of a life before
	}
	s.free = append(s.free, sl)
	close(s.freed)
	s.freed = make(chan struct{})
}

// pending reports whether a slot may be as it is found in the store because of what this process wrote: a write
// that is under way, one whose outcome is not known yet, or one that came through after the witness was looked at.
func (s *Store) pending(n int, found *alloc.Slot) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n >= len(s.all) {
		return false
	}
	sl := s.all[n]
	if !slices.Contains(s.free, sl) {
		return true // a write is under way in it
	}
	// Each write compares the one before: what this process has built upon is its own.
	return found.Writes < sl.rec.Writes || found.Nonce == sl.rec.Nonce ||
		slices.ContainsFunc(sl.pending, func(p pending) bool { return p.rec.Nonce == found.Nonce })
}
