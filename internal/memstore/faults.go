package memstore

import (
	"context"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Op is a call of the store that a fault can hit: a Commit, or a read (Get or List).
type Op struct {
	Commit bool
	// N counts the calls of its sort, from 1 on.
	N int
}

// Outcome is what becomes of a call.
type Outcome int

// The outcomes. Reads know OK and Unavailable only.
const (
	// OK: as it should be.
	OK Outcome = iota
	// Stored: committed if its guards hold, and the answer is lost: ErrUnknownOutcome.
	Stored
	// Lost: not committed, now or ever: ErrUnknownOutcome.
	Lost
	// Delayed: ErrUnknownOutcome, and Fault.After further calls later committed, if its guards hold then.
	Delayed
	// Unavailable: not committed: ErrUnavailable.
	Unavailable
	// Conflict: not committed: ErrConflict.
	Conflict
)

func (o Outcome) String() string {
	return [...]string{"ok", "stored", "lost", "delayed", "unavailable", "conflict"}[o]
}

// Fault is what happens to one call.
type Fault struct {
	Outcome Outcome
	// After is for Delayed: 1 commits before the next call is looked at, 2 before the one after it.
	After int
}

// delayed is a transaction on its way.
type delayed struct {
	write
	after int
}

// SetFaults asks decide about every call from now on; nil ends it. decide must not call the store.
func (s *Store) SetFaults(decide func(Op) Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = decide
}

// Ops is how many reads and commits there were.
func (s *Store) Ops() (reads, commits int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reads, s.commits
}

// Settle commits, in order, what is still on its way and whose guards hold. It returns how many did.
func (s *Store) Settle() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, d := range s.late {
		if s.apply(d.write) {
			n++
		}
	}
	s.late = nil
	return n
}

// arrive commits what is due, before the next call is looked at.
func (s *Store) arrive() {
	var rest []*delayed
	for _, d := range s.late {
		if d.after--; d.after > 0 {
			rest = append(rest, d)
			continue
		}
		s.apply(d.write)
	}
	s.late = rest
}

func (s *Store) fault(op Op) Fault {
	if s.faults == nil {
		return Fault{}
	}
	return s.faults(op)
}

func (s *Store) beginRead(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return unavailable(err)
	}
	s.arrive()
	s.reads++
	if s.fault(Op{N: s.reads}).Outcome == Unavailable {
		return unavailable(nil)
	}
	return nil
}

func (s *Store) faulty(op Op, w write) (alloc.Revision, error) {
	s.arrive()
	lost := &alloc.Error{Reason: alloc.ReasonUnknownOutcome, Subject: "store transaction", Msg: "the answer was lost: it was committed, or not, or will be"}
	conflict := &alloc.Error{Reason: alloc.ReasonConflict, Subject: "store transaction", Msg: "a record changed since it was read, nothing was written"}
	switch f := s.fault(op); f.Outcome {
	case Stored:
		s.apply(w)
		return 0, lost
	case Lost:
		return 0, lost
	case Delayed:
		s.late = append(s.late, &delayed{w, max(f.After, 1)})
		return 0, lost
	case Unavailable:
		return 0, unavailable(nil)
	case Conflict:
		return 0, conflict
	}
	if !s.apply(w) {
		return 0, conflict
	}
	return s.revision(), nil
}
