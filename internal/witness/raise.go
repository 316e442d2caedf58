package witness

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nsalloc/nsalloc/internal/killpoint"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// What follows from what was seen, here and by the others.
//
//	                  | heard, sound | somebody is behind | not heard             | a witness is lost
//	pool open         | go on        | close the pool     | as the policy says:   | take a generation
//	pool recovering   | take a generation                 | count it out, or wait | take a generation
//
// A generation is taken without closing the pool first where it is this server that cannot be sure: the others
// go on until then.

// act does what the others' answers ask for while the pool is open. again as in verifyOnce.
func (s *Store) act(ctx context.Context, l look, seen Seen, f findings, due Due) (again bool, err error) {
	switch {
	case f.behind != "":
		_, err := s.close(ctx, l, max(seen.Generation, f.generation)+1, "the store has lost history: "+f.behind)
		return err == nil, err
	case f.waits(l.pool.Policy):
		return false, s.wait(f)
	}
	var why, fix string
	switch {
	case len(f.unheard) > 0:
		why = fmt.Sprintf("it has not heard what %s has seen of the store, which may be more than it has seen itself", strings.Join(f.unheard, ", "))
		fix = "start it; if it is gone for good: " + removal(f.names)
	case len(f.lost) > 0:
		why = fmt.Sprintf("server %s has lost its witness, and with it what it had seen of the store", strings.Join(f.lost, ", "))
	case due == DueGeneration:
		why = "its witness is lost, and with it what it had seen of the store"
	case due == DueHeard && f.sound == 0:
		why = "it is new, and there is nobody who could say that the store has lost nothing"
	default:
		return false, nil
	}
	return s.raise(ctx, l, max(seen.Generation, f.generation, l.pool.Generation)+1, why, fix)
}

// recover opens a pool that was closed because its store has lost history. Whoever has asked all others takes the
// next generation; of several one wins, and the rest follow it.
func (s *Store) recover(ctx context.Context, l look, seen Seen, why string) (again bool, err error) {
	const fix = "put back a newer snapshot of the etcd"
	if err := s.tooSoon(l, why, fix); err != nil {
		return false, err // and there is no need to ask
	}
	var f findings
	if others := seen.others(l.servers); len(others) > 0 {
		nonce := newNonce()
		if err := s.announce(ctx, l, nonce); err != nil {
			return false, err
		}
		if f, err = s.consult(ctx, others, l.pool, nonce, nil); err != nil {
			return false, err
		}
	}
	if f.waits(l.pool.Policy) {
		return false, s.wait(f)
	}
	return s.raise(ctx, l, max(seen.Generation, f.generation, l.pool.Generation, max(l.pool.Target, 1)-1)+1, why, fix)
}

// waits reports whether the policy has this server wait for one that was not heard.
func (f findings) waits(p alloc.Policy) bool {
	return len(f.unheard) > 0 && p.UnheardWitness == alloc.UnheardWait
}

// wait is the refusal until all others were heard.
func (s *Store) wait(f findings) error {
	s.mayRaise(time.Time{})
	return s.refuse(fmt.Sprintf("it waits for %s, which it has not heard, and which may have seen more of the store (policy unheard-witness: wait)", strings.Join(f.unheard, ", ")),
		alloc.ReasonRecovering, "start it; if it is gone for good: "+removal(f.names))
}

func removal(names []string) string { return "nsalloc server remove " + strings.Join(names, " ") }

// mayRaise notes when a generation may be taken; the zero time for nothing that is known.
func (s *Store) mayRaise(at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.standing.NotBefore = at
}

// raise takes a generation, unless that is up to an operator. again as in verifyOnce.
//
// If the process dies after the commit, the pool is open and says when it was raised; the next start follows it.
func (s *Store) raise(ctx context.Context, l look, to alloc.Generation, why, fix string) (again bool, err error) {
	if err := s.tooSoon(l, why, fix); err != nil {
		return false, err
	}
	tx, err := alloc.Raise(l.entries[0], l.entries[1], to, s.lastRaised(l), s.now())
	if e, ok := errors.AsType[*alloc.Error](err); ok && e.Reason == alloc.ReasonExhausted {
		return false, s.refuse(why+"; "+e.Msg, alloc.ReasonRecovering, or(fix, e.Fix))
	}
	if err != nil {
		return false, err
	}
	taken := tx.Put[0].(*alloc.Pool)
	s.mu.Lock()
	s.taking = taking{taken.Nonce, s.connected}
	s.mu.Unlock()
	killpoint.At(killpoint.ServerGenerationCommitting)
	_, err = s.Store.Commit(ctx, tx)
	switch alloc.ReasonOf(err) {
	case alloc.ReasonConflict, alloc.ReasonUnknownOutcome:
		return true, nil // another server was faster, or this one was: the next look tells
	}
	if err != nil {
		return false, err
	}
	killpoint.At(killpoint.ServerGenerationCommitted)
	s.log.WarnContext(ctx, "a new generation was taken: "+why, "server", s.name, "generation", to, "before", l.pool.Generation)
	if err := s.file.Update(func(seen *Seen) { seen.Raised = taken.Raised }); err != nil {
		return false, s.unwritable(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.standing.Raised++
	return true, nil
}

// lastRaised is the latest Pool.Raised that counts: of the store, or of the witness where that has forgotten.
func (s *Store) lastRaised(l look) time.Time {
	return s.ahead.counts(slices.MaxFunc([]time.Time{s.file.Seen().Raised, l.pool.Raised}, time.Time.Compare), s.now())
}

// tooSoon refuses while servers have taken as many generations by themselves as they may.
func (s *Store) tooSoon(l look, why, fix string) error {
	now := s.now()
	at := alloc.NotBefore(s.lastRaised(l))
	if !at.After(now) {
		s.mayRaise(time.Time{})
		return nil
	}
	s.mayRaise(at)
	return s.refuse(fmt.Sprintf("%s; the servers take one generation in %s by themselves, %d in a row, the next not before %s", why, minutes(alloc.RaiseEvery), alloc.RaiseBurst, at.Format(time.RFC3339)),
		alloc.ReasonRecovering, or(fix, "to go on now: nsalloc pool recover"))
}

// or is two ways out.
func or(fix, other string) string {
	if fix == "" {
		return other
	}
	return fix + "; or " + other
}

func minutes(d time.Duration) string { return fmt.Sprintf("%d minutes", int(d.Minutes())) }

// aheadOfClock is a Pool.Raised that lies further in the future than it can by this server's clock, and when that was
// seen first: a clock that was set back must not keep a pool closed for as long.
type aheadOfClock struct{ raised, first time.Time }

// counts is raised, or the most that it can be.
func (a *aheadOfClock) counts(raised, now time.Time) time.Time {
	const most = alloc.RaiseBurst * alloc.RaiseEvery
	if !raised.After(now.Add(most)) {
		return raised
	}
	if !a.raised.Equal(raised) {
		a.raised, a.first = raised, now
	}
	return a.first.Add(most)
}

// close closes the pool, so that no server issues from a store that has forgotten what was seen. closed says that
// its record is another one now.
func (s *Store) close(ctx context.Context, l look, target alloc.Generation, why string) (closed bool, err error) {
	switch {
	case l.pool == nil:
		return false, s.refuse(why, alloc.ReasonRecovering, "put back a newer snapshot of the etcd; if there is none, what was in the pool is lost: start the servers with empty state directories, and create a new one: nsalloc pool init")
	case l.pool.State == alloc.PoolRecovering && l.pool.Target >= target:
		return false, nil
	}
	s.log.ErrorContext(ctx, "the pool is closed: "+why, "server", s.name)
	rec := *l.pool
	rec.State, rec.Target = alloc.PoolRecovering, max(rec.Target, target)
	killpoint.At(killpoint.ServerCloseCommitting)
	_, err = s.Store.Commit(ctx, alloc.Tx{Guards: []alloc.Guard{{Key: rec.Key(), Token: l.entries[0].Token}}, Put: []alloc.Record{&rec}})
	switch alloc.ReasonOf(err) {
	case alloc.ReasonConflict, alloc.ReasonUnknownOutcome:
		return true, nil
	}
	if err != nil {
		return false, s.refuse(why+"; and the pool could not be closed: "+err.Error(), alloc.ReasonRecovering, "see the etcd's logs; this server tries again")
	}
	killpoint.At(killpoint.ServerCloseCommitted)
	return true, nil
}
