package alloc

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
)

// What is held after the store has forgotten history.
//
// The records of a store that was put back are of a moment that is over: a sandbox that runs on one host there may
// have moved to another since. Whoever has it says so by itself (RegisterAgain), under the epoch that it has, and the
// higher epoch wins. But a host that is away says nothing, and what it has looks as if it were where the store says.
// So until every host of the pool has said what lives on it, in this generation, two things wait: nobody ends what
// the store says lives on a host and that host has not confirmed; and nobody restores images from before. All else
// goes on at once: what hosts have confirmed, what is born, and hand-offs that begin in this generation. These
// need no waiting, because the source shows by dumping it that it has the tree, and of the trees that were ever
// acknowledged one at most lives, unless its host was fenced.
//
// A host that is gone for good is waived by an operator. If it comes back, what has gone on elsewhere meanwhile has a
// higher epoch, and its own trees become clones.

// IsSettled reports whether every host has said in the pool's generation what lives on it, or was waived. A
// pool that is in its first generation has never forgotten anything.
func (p *Pool) IsSettled() bool { return p.Generation <= 1 || p.Settled >= p.Generation }

// Missing reports whether nobody knows if a sandbox still is where its record says: it is of before the pool's
// generation began, its owner has not said since that it lives there, and another host may yet say that it has it.
func (p *Pool) Missing(s *Sandbox) bool { return !p.IsSettled() && s.Unconfirmed(p.Generation) }

// Unconfirmed reports whether a sandbox that has an owner is of before generation g, in which the owner has not said
// that it lives there. In generation g a host that has said everything does not have it.
func (s *Sandbox) Unconfirmed(g Generation) bool {
	return g > 1 && s.owned() && s.Epoch.Generation() < g && s.Again < g
}

// retrySettling is the pause between two looks at whether the hosts have come.
const retrySettling = time.Second

// settling is the refusal of what has to wait until the pool is settled.
func settling(about, what string) *Error {
	return &Error{Reason: ReasonSettling, Subject: about, Msg: what, RetryAfter: retrySettling,
		Fix: "wait until every host has come back (nsalloc pool status names those that have not); a host that is gone for good: nsalloc host waive NAME"}
}

// known refuses to move a sandbox of which nobody knows whether it still is where its record says.
func (w *world) known(s *Sandbox) error {
	if !w.pool.Missing(s) {
		return nil
	}
	return settling(subject(s), fmt.Sprintf("the pool's store has forgotten history, and host %s has not registered it again in generation %d: it may live on another host, which would say so", s.Owner, w.pool.Generation))
}

// knownEvent is known for a sandbox that an event is about to move.
func (w *world) knownEvent(serial Serial, e Event) (Event, error) {
	sb, err := w.sandbox(serial)
	if err != nil {
		return nil, err
	}
	return e, w.known(sb)
}

// hold keeps a restore from claiming images of before the pool's generation, while a host may have gone on from
// them.
func (w *world) hold(c *Checkpoint) error {
	if w.pool.IsSettled() || c.Serial.Generation() >= w.pool.Generation {
		return nil
	}
	return settling("checkpoint "+c.Serial.String(), fmt.Sprintf("the pool's store has forgotten history, and these images are of before generation %d: a host that has not come back may have restored them already", w.pool.Generation))
}

// Settle raises Pool.Settled where every host has said what lives on it, or was waived. It returns those that the
// pool waits for, in the order of their names; none when it is settled.
//
// A host never becomes unsettled within a generation, and one that is new begins settled: so what was listed
// holds until the pool's record, which is compared, has changed.
//
// Errors: ErrPoolMissing, ErrRecovering, ErrConflict, ErrUnavailable, ErrUnknownOutcome.
func (s *Service) Settle(ctx context.Context) (missing []string, err error) {
	err = settle(ctx, func() (bool, error) {
		entries, _, err := s.get(ctx, Key{Kind: KindPool})
		if err != nil {
			return false, err
		}
		pool, err := openPool(entries[0])
		if err != nil {
			return false, err
		}
		missing = nil
		if pool.IsSettled() {
			return true, nil
		}
		err = s.list(ctx, KindHost, "", 0, func(e Entry) bool {
			if h, ok := e.Record.(*Host); !ok || !h.answered(pool.Generation) {
				missing = append(missing, e.Key.ID)
			}
			return true
		})
		if err != nil || len(missing) > 0 {
			return err == nil, err
		}
		raised := *pool
		raised.Settled = pool.Generation
		_, err = s.store.Commit(ctx, Tx{Guards: []Guard{{entries[0].Key, entries[0].Token}}, Put: []Record{&raised}})
		return false, err
	})
	slices.Sort(missing)
	return missing, err
}

// answered reports whether nobody has to wait for a host in a generation.
func (h *Host) answered(g Generation) bool { return max(h.Settled, h.Waived) >= g }

// waitsFor is the refusal err with the names of the hosts that it waits for.
func waitsFor(err error, missing []string) error {
	e, ok := err.(*Error)
	if !ok || e.Reason != ReasonSettling || len(missing) == 0 {
		return err
	}
	const most = 5
	names := strings.Join(missing[:min(len(missing), most)], ", ")
	if more := len(missing) - most; more > 0 {
		names += fmt.Sprintf(" and %d more", more)
	}
	named := *e
	named.Fix = fmt.Sprintf("wait until these hosts have come back: %s; for one that is gone for good: nsalloc host waive %s", names, missing[0])
	return &named
}

// WaiveCommand says that nobody waits for a host.
type WaiveCommand struct {
	RequestID string `json:"-"`
	// Actor is who says so, such as operator/local.
	Actor string `json:"-"`
	Host  string `json:"host"`
}

// Waive says that the pool need not wait for a host to say what lives on it, in this generation. What lives there
// all the same and has been restored elsewhere meanwhile becomes a clone when the host comes back.
//
// Committed when it returns: the waiver. It also returns the hosts that the pool still waits for, as far as that could
// be read. Errors: ErrInvalid, ErrHostUnknown, ErrWrongState (nobody waits for it),
// ErrRecovering, ErrRequestReused, ErrRequestExpired, ErrConflict, ErrUnknownOutcome.
func (s *Service) Waive(ctx context.Context, cmd WaiveCommand) (*Host, []string, error) {
	if err := ValidateName("host name", cmd.Host); err != nil {
		return nil, nil, err
	}
	if err := s.checkRequest(cmd.RequestID); err != nil {
		return nil, nil, err
	}
	digest, err := digestOf(cmd)
	if err != nil {
		return nil, nil, err
	}
	var host *Host
	err = settle(ctx, func() (bool, error) {
		entries, _, err := s.get(ctx, Key{Kind: KindPool}, HostKey(cmd.Host))
		if err != nil {
			return false, err
		}
		pool, err := openPool(entries[0])
		if err != nil {
			return false, err
		}
		found, ok := entries[1].Record.(*Host)
		if !ok {
			return true, refuse(ReasonHostUnknown, "host "+cmd.Host, "the pool does not know it")
		}
		host = found.in(pool.Generation)
		done, err := host.Requests.find(cmd.RequestID, digest)
		switch {
		case done || err != nil:
			return true, err
		case pool.IsSettled() || host.Settled >= pool.Generation:
			return true, refuse(ReasonWrongState, "host "+cmd.Host, "nobody waits for it: it has said in generation %d what lives on it, or nothing was forgotten; nothing was changed", pool.Generation)
		}
		host.Waived = pool.Generation
		host.Requests = host.Requests.with(cmd.RequestID, digest, s.now())
		_, err = s.store.Commit(ctx, Tx{Guards: []Guard{{entries[0].Key, entries[0].Token}, {entries[1].Key, entries[1].Token}}, Put: []Record{host}})
		return false, err
	})
	if err != nil {
		return nil, nil, err
	}
	missing, _ := s.Settle(ctx) // else the next sweep of a server does it
	return host, missing, nil
}
