package alloc

import (
	"context"
	"crypto/rand"
	"fmt"
	"math/big"
	"time"
)

// conflictTries bounds how often a change starts anew because others wrote the same records.
const conflictTries = 16

// settle calls try until it settles. Each try reads, decides and commits anew. It reports true when
// its error, or nil, is what it decided from the records, and false when it comes from the store.
//
// A try that met a conflict is repeated, and also one whose outcome is unknown: whatever the lost
// transaction does, it and its successor never both take effect, because each changes a value that
// the other one compares; and a try that finds the effect of the lost one says so. So a decision is
// final also after an unknown outcome: had it read what the lost transaction compares, it would have
// decided the same; it read something else, so that transaction takes effect no more. That holds where a
// transaction is guarded by all that was read for it; else try calls nothing decided.
//
// An error of the store is not: while an outcome is unknown, nothing else is answered that would say
// that nothing was written.
func settle(ctx context.Context, try func() (decided bool, err error)) error {
	var unknown error
	for n := range conflictTries {
		if n > 0 {
			if err := pause(ctx, n); err != nil {
				return orUnknown(unknown, &Error{Reason: ReasonUnavailable, Msg: "the caller's deadline passed while others changed the same records; nothing was changed",
					Fix: "try again", RetryAfter: retrySoon, Err: err})
			}
		}
		decided, err := try()
		switch reason := ReasonOf(err); {
		case decided || err == nil:
			return err
		case reason == ReasonConflict:
		case reason == ReasonUnknownOutcome:
			unknown = err
		default:
			return orUnknown(unknown, err)
		}
	}
	return orUnknown(unknown, &Error{Reason: ReasonConflict, Msg: "others changed the same records again and again; nothing was changed",
		Fix: "try again", RetryAfter: retrySoon})
}

func orUnknown(unknown, err error) error {
	if unknown != nil {
		return unknown
	}
	return err
}

// pause waits a random moment that grows with the tries, so that two who collided part.
func pause(ctx context.Context, try int) error {
	most := big.NewInt(int64(min(try, 8)) * int64(4*time.Millisecond))
	d, err := rand.Int(rand.Reader, most)
	if err != nil {
		return err
	}
	t := time.NewTimer(time.Duration(d.Int64()))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// world is the records that one change read, and what it wants to write. Records that were read are
// never changed, only replaced: whoever else reads the store may share them.
type world struct {
	pool   *Pool
	host   *Host // a copy of the caller's record
	moment Moment
	get    map[Key]Entry
	// parents are the sandboxes that clones are made from, read before and not guarded: what was a serial of
	// theirs is a parent also if it was parted from them since, and a checkpoint never gets another sandbox.
	parents map[Serial]*Sandbox
	// parted are the bindings that items have taken out of their sandboxes, for later items to add.
	parted map[Serial]Binding
	tx     Tx
}

func (w *world) sandbox(serial Serial) (*Sandbox, error) {
	if s, ok := w.get[SandboxKey(serial)].Record.(*Sandbox); ok {
		return s, nil
	}
	return nil, refuse(ReasonSandboxNotFound, "sandbox "+serial.String(), "the pool has no such sandbox")
}

func (w *world) checkpoint(serial Serial) (*Checkpoint, error) {
	if c, ok := w.get[CheckpointKey(serial)].Record.(*Checkpoint); ok {
		return c, nil
	}
	return nil, refuse(ReasonCheckpointNotFound, "checkpoint "+serial.String(), "the pool has no such checkpoint")
}

// put writes r in this transaction.
func (w *world) put(r Record) { w.tx.Put = append(w.tx.Put, r) }

// spend takes serials from the front of the host's ranges.
func (w *world) spend(spent Ranges) error {
	if len(spent) == 0 {
		return nil
	}
	rest, ok := w.host.Granted.Spend(spent)
	if !ok {
		return &Error{Reason: ReasonRange, Subject: "host " + w.host.Name,
			Msg: fmt.Sprintf("serials %v are not next in its ranges %v: another life of its agent's state has spent them, or a new generation ended them", spent, w.host.Granted),
			Fix: "say Hello with a new nonce"}
	}
	w.host.Granted = rest
	w.put(w.host)
	return nil
}

// change reads the pool, the caller's host and what keys names, lets decide fill in a transaction, and
// commits it guarded by all that was read, until it settles. An error of decide is its decision.
//
// If the process dies here, the transaction was committed as a whole or not at all.
func (s *Service) change(ctx context.Context, m Mutation, keys func() ([]Key, error), decide func(*world) error) error {
	return settle(ctx, func() (bool, error) {
		more, err := keys()
		if err != nil {
			return false, err
		}
		w, err := s.read(ctx, m, more)
		if err != nil {
			return false, err
		}
		if err := decide(w); err != nil {
			return err != error(errMoved), err
		}
		if len(w.tx.Put) == 0 && len(w.tx.Delete) == 0 {
			return true, nil
		}
		_, err = s.store.Commit(ctx, w.tx)
		return false, err
	})
}

func (s *Service) read(ctx context.Context, m Mutation, keys []Key) (*world, error) {
	all := append([]Key{{Kind: KindPool}, HostKey(m.Host)}, keys...)
	entries, _, err := s.get(ctx, all...)
	if err != nil {
		return nil, err
	}
	w := &world{get: make(map[Key]Entry, len(entries))}
	for _, e := range entries {
		w.get[e.Key] = e
		w.tx.Guards = append(w.tx.Guards, Guard{Key: e.Key, Token: e.Token})
	}
	if w.pool, err = openPool(entries[0]); err != nil {
		return nil, err
	}
	w.moment = Moment{Now: s.now(), Generation: w.pool.Generation, Policy: w.pool.Policy, Actor: m.actor()}
	host, ok := entries[1].Record.(*Host)
	if !ok {
		return nil, &Error{Reason: ReasonHostUnknown, Subject: "host " + m.Host, Msg: "the pool does not know it", Fix: "start its nsalloc-agent, which says Hello first"}
	}
	if m.Incarnation > host.Incarnation {
		// No life comes before its Hello has committed: to call it stale would have it begin another one.
		return nil, &Error{Reason: ReasonRecovering, Subject: "host " + m.Host, RetryAfter: retrySoon,
			Msg: fmt.Sprintf("it is in incarnation %s by the store, and this request is of incarnation %s: the store has lost history; nothing was changed", host.Incarnation, m.Incarnation),
			Fix: "say Hello with what the agent has seen, which closes the pool until it is in a later generation"}
	}
	if host.Incarnation != m.Incarnation {
		return nil, staleIncarnation(m.Host, fmt.Sprintf("it is in incarnation %s, this request is of incarnation %s", host.Incarnation, m.Incarnation))
	}
	w.host = host.in(w.pool.Generation)
	return w, nil
}

func staleIncarnation(host, msg string) error {
	return &Error{Reason: ReasonStaleIncarnation, Subject: "host " + host, Msg: msg,
		Fix: "if two machines share this name or this agent state, give one its own; then start its agent again"}
}
