package alloc

import (
	"context"
	"fmt"
	"maps"
)

// HelloCommand is an agent's first word.
type HelloCommand struct {
	RequestID   string            `json:"-"`
	Host        string            `json:"host"`
	BootID      string            `json:"boot_id"`
	Incarnation Incarnation       `json:"incarnation"` // what the agent's state holds; 0 for none
	Nonce       string            `json:"nonce"`
	PoolUUID    string            `json:"pool_uuid"` // what the agent's state is of; "" for none
	Labels      map[string]string `json:"labels"`
	// Seen is what the agent's state has seen of the pool; see Service.Hello.
	Seen Seen `json:"seen,omitzero"`
}

// Seen is an agent's witness of its pool: what the store must know, or it has forgotten.
type Seen struct {
	// Generation is the one in which the state has last joined the pool, in the incarnation that it says; 0 when
	// it never has, and then nothing else counts.
	Generation Generation `json:"generation"`
	// Highest is the highest serial that the host was ever granted, in any generation; 0 for none.
	Highest Serial `json:"highest,omitempty"`
	// Spent is a serial before all that the host had left to spend when it heard last: those up to it, of its
	// generation, are spent or burned. 0 for none.
	Spent Serial `json:"spent,omitempty"`
	// Sandbox is one that the store has in an older epoch than Epoch, in which the host has had it; 0 for none.
	Sandbox Serial `json:"sandbox,omitempty"`
	Epoch   Epoch  `json:"epoch,omitempty"`
}

// maxAhead is by how many generations an agent can have seen more than the store, so that one that lies, or
// whose state is damaged, does not use them up.
const maxAhead = 16

func (c HelloCommand) validate() error {
	if err := ValidateName("host name", c.Host); err != nil {
		return err
	}
	if err := ValidateBootID(c.BootID); err != nil {
		return err
	}
	if err := validText("nonce", c.Nonce, 16, 64); err != nil {
		return err
	}
	return validateLabels("host "+c.Host, c.Labels)
}

// Hello begins a life of a host's agent state, or goes on with one. The state is told by its nonce: a
// record with the same nonce and incarnation is the same life, also when it is a clone of the state that
// said so before: then the one that spends first goes on, and the other gets ErrRange. A state that never heard its incarnation
// (the first answer was lost) is told by its nonce alone. Any other state is a new life: a higher
// incarnation, and what was left of the older one's ranges is burned.
//
// A host that the pool does not know, and whose state has never been in it, is settled from the start: there is
// nothing that it would have to register again. Any other one is as settled as its record says.
//
// An agent that has seen more than the store knows shows that the store was put back: a later generation of the
// pool, a later incarnation of its host in the pool's generation, a serial of that generation that the counter has not
// come to, or that is spent and stands in the host's ranges, or a later epoch of a sandbox. Then the pool is closed
// (recovering), to be opened in a generation after all that was seen, and the answer is ErrRecovering. That is all that
// an agent which lies can do by it; how often servers begin a generation by themselves is bounded (RaiseEvery,
// RaiseBurst), and one that is more than 16 ahead of the pool's is refused as invalid.
//
// Committed when it returns: incarnation, nonce, boot id, labels. Errors: ErrInvalid, ErrPoolMissing
// (the state is of another pool), ErrStaleIncarnation (a newer life has said Hello since this request),
// ErrRecovering, ErrRequestReused, ErrRequestExpired, ErrConflict, ErrUnknownOutcome.
func (s *Service) Hello(ctx context.Context, cmd HelloCommand) (*Host, *Pool, error) {
	if err := cmd.validate(); err != nil {
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
	var pool *Pool
	err = settle(ctx, func() (bool, error) {
		keys := []Key{{Kind: KindPool}, HostKey(cmd.Host), {Kind: KindCounter}}
		if cmd.Seen.Sandbox != 0 {
			keys = append(keys, SandboxKey(cmd.Seen.Sandbox))
		}
		entries, _, err := s.store.Get(ctx, keys...)
		if err == nil {
			err = readable(entries[:2])
		}
		if err != nil {
			return false, err
		}
		if done, err := s.witnessed(ctx, cmd, entries); done || err != nil {
			return done, err
		}
		if pool, err = openPool(entries[0]); err != nil {
			return false, err
		}
		entries = entries[:2] // the others were only looked at
		known, ok := entries[1].Record.(*Host)
		if !ok {
			known = &Host{Name: cmd.Host}
			if cmd.Incarnation == 0 && cmd.PoolUUID == "" {
				known.Settled = pool.Generation
			}
		}
		var changed bool
		if host, changed, err = s.hello(pool, known, cmd, digest); err != nil || !changed {
			return true, err
		}
		tx := Tx{Put: []Record{host}}
		for _, e := range entries {
			tx.Guards = append(tx.Guards, Guard{Key: e.Key, Token: e.Token})
		}
		_, err = s.store.Commit(ctx, tx)
		return false, err
	})
	if err != nil {
		return nil, nil, err
	}
	if !pool.IsSettled() && host.answered(pool.Generation) {
		_, _ = s.Settle(ctx) // who answered its last request may have died on it
	}
	return host, pool, nil
}

// hello is the host's record after cmd, and whether it has changed.
func (s *Service) hello(pool *Pool, known *Host, cmd HelloCommand, digest Digest) (*Host, bool, error) {
	if cmd.PoolUUID != "" && cmd.PoolUUID != pool.UUID {
		return nil, false, &Error{Reason: ReasonPoolMissing, Subject: "host " + cmd.Host,
			Msg: fmt.Sprintf("its agent's state is of pool %.80q, this server keeps pool %s", cmd.PoolUUID, pool.UUID),
			Fix: "point the agent at the servers of its own pool, or give it an empty state directory"}
	}
	host := known.in(pool.Generation)
	found, err := host.Requests.find(cmd.RequestID, digest)
	if err == nil && found && host.Nonce != cmd.Nonce {
		// To answer the record as it is would give this life the incarnation and the ranges of the other.
		err = staleIncarnation(cmd.Host, "another life of its agent's state has said Hello since this request")
	}
	if found || err != nil {
		return host, false, err
	}
	goesOn := host.Incarnation != 0 && host.Nonce == cmd.Nonce && (cmd.Incarnation == host.Incarnation || cmd.Incarnation == 0)
	if goesOn && host.BootID == cmd.BootID && maps.Equal(host.Labels, cmd.Labels) {
		return host, false, nil
	}
	if !goesOn {
		host.Nonce, host.Granted = cmd.Nonce, nil
		host.Incarnation = host.Incarnation.next(pool.Generation)
	}
	host.BootID, host.Labels, host.Hello = cmd.BootID, maps.Clone(cmd.Labels), s.now()
	host.Requests = host.Requests.with(cmd.RequestID, digest, host.Hello)
	return host, true, nil
}

// GrantCommand asks for a range for the caller's host.
type GrantCommand struct {
	Mutation
	Count uint64 `json:"count"`
}

// Grant issues a range to a host, behind what it still holds, and returns all that it holds.
//
// Committed when it returns: that the range is the host's. Errors: ErrInvalid, ErrStaleIncarnation,
// ErrHostUnknown, ErrExhausted (the generation is used up, the host holds MaxGrantedRanges, or with RetryAfter: its
// quota is), ErrRequestReused, ErrRequestExpired, ErrConflict, ErrUnknownOutcome.
func (s *Service) Grant(ctx context.Context, cmd GrantCommand) (Ranges, error) {
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
	release, err := s.holdCounter(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	var granted Ranges
	var took Tx
	counterKey := Key{Kind: KindCounter}
	keys := func() ([]Key, error) { return []Key{counterKey}, nil }
	err = s.change(ctx, cmd.Mutation, keys, func(w *world) error {
		granted = w.host.Granted
		if found, err := w.host.Requests.find(cmd.RequestID, digest); found || err != nil {
			return err
		}
		if len(w.host.Granted) >= MaxGrantedRanges {
			return refuse(ReasonExhausted, "host "+cmd.Host, "it holds %d unfinished ranges", len(w.host.Granted))
		}
		quota, err := w.host.Quota.grant(cmd.Host, w.pool.Policy, cmd.Count, w.moment.Now)
		if err != nil {
			return err
		}
		counter, err := counterOf([]Entry{w.get[Key{Kind: KindPool}], w.get[counterKey]})
		if err != nil {
			return err
		}
		if err := s.counters.see(w.pool, counter); err != nil {
			return err
		}
		r, err := counter.take(cmd.Count)
		if err != nil {
			return err
		}
		counter.Nonce = newNonce()
		w.host.Quota = quota
		w.host.Granted = append(append(Ranges(nil), w.host.Granted...), r)
		w.host.Requests = w.host.Requests.with(cmd.RequestID, digest, w.moment.Now)
		granted = w.host.Granted
		w.put(counter)
		w.put(w.host)
		took = w.tx
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.counters.took(took)
	return granted, nil
}
