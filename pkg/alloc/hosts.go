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
}

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
// Committed when it returns: incarnation, nonce, boot id, labels. Errors: ErrInvalid, ErrPoolMissing
// (the state is of another pool), ErrStaleIncarnation (a newer life has said Hello since this request),
// ErrRequestReused, ErrRequestExpired, ErrConflict, ErrUnknownOutcome.
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
		entries, _, err := s.get(ctx, Key{Kind: KindPool}, HostKey(cmd.Host))
		if err != nil {
			return false, err
		}
		if pool, err = openPool(entries[0]); err != nil {
			return false, err
		}
		known, ok := entries[1].Record.(*Host)
		if !ok {
			known = &Host{Name: cmd.Host}
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
