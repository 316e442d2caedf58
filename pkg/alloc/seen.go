package alloc

import (
	"context"
	"fmt"
	"slices"
)

// witnessed compares what an agent has seen with pool, host and counter as they were read, and closes the pool
// where the store knows less. It reports whether the refusal is its decision.
func (s *Service) witnessed(ctx context.Context, cmd HelloCommand, entries []Entry) (decided bool, err error) {
	pool, err := poolOf(entries[0])
	if err != nil || pool.Format > FormatVersion || cmd.PoolUUID != pool.UUID {
		return false, err
	}
	host, _ := entries[1].Record.(*Host)
	counter, _ := entries[2].Record.(*Counter)
	var sandbox *Sandbox
	if len(entries) > 3 {
		sandbox, _ = entries[3].Record.(*Sandbox)
	}
	why := cmd.more(pool, host, counter, sandbox)
	if why == "" {
		return false, nil
	}
	target := max(cmd.Seen.Generation, pool.Generation) + 1
	switch {
	case cmd.Seen.Generation > pool.Generation+maxAhead:
		return true, invalid("host "+cmd.Host, fmt.Sprintf("its agent's state has seen generation %d of the pool, which is in generation %d: more than %d ahead are not believed; if it is true, put back a newer snapshot of the etcd, else give the agent an empty state directory",
			cmd.Seen.Generation, pool.Generation, maxAhead))
	case target > MaxGeneration:
		return true, refuse(ReasonExhausted, "pool "+pool.UUID, "%s, and no generation is left", why)
	}
	refusal := &Error{Reason: ReasonRecovering, Subject: "pool " + pool.UUID, Msg: "the store has lost history: " + why,
		Fix: "put back a newer snapshot of the etcd; if there is none: nsalloc pool recover", RetryAfter: retrySoon}
	if pool.State != PoolOpen && pool.Target >= target {
		return true, refusal
	}
	closed := *pool
	closed.State, closed.Target = PoolRecovering, max(pool.Target, target)
	if _, err := s.store.Commit(ctx, Tx{Guards: []Guard{{entries[0].Key, entries[0].Token}}, Put: []Record{&closed}}); err != nil {
		return false, err
	}
	if s.Behind != nil {
		s.Behind(cmd.Host, why)
	}
	return true, refusal
}

// more says what of an agent's witness the store does not know; "" for nothing. host, counter and sandbox are nil when
// the store has none.
func (cmd HelloCommand) more(pool *Pool, host *Host, counter *Counter, sandbox *Sandbox) string {
	seen := cmd.Seen
	var life Incarnation
	if host != nil {
		life = host.Incarnation
	}
	switch {
	case seen.Generation > pool.Generation:
		return fmt.Sprintf("the agent of host %s has been in generation %d of the pool, and the store is in generation %d", cmd.Host, seen.Generation, pool.Generation)
	case seen.Generation < pool.Generation:
		return "" // the pool has gone on since, and has renounced what it had issued by then
	case cmd.Incarnation > life:
		return fmt.Sprintf("the agent of host %s has been in incarnation %s, and the store knows it in incarnation %s", cmd.Host, cmd.Incarnation, life)
	case seen.Highest.Generation() == pool.Generation && counter != nil && counter.Generation == pool.Generation && seen.Highest.Counter() >= counter.Next:
		return fmt.Sprintf("host %s was granted serial %s, and the counter is at %x", cmd.Host, seen.Highest, counter.Next)
	case host != nil && seen.Spent.Generation() == pool.Generation && slices.ContainsFunc(host.Granted.in(pool.Generation), func(r Range) bool { return r.First <= seen.Spent }):
		return fmt.Sprintf("host %s has spent serial %s, and the store holds it for spending", cmd.Host, seen.Spent)
	}
	if sandbox != nil && sandbox.Epoch < seen.Epoch && seen.Epoch.Generation() <= pool.Generation {
		return fmt.Sprintf("host %s has had %s in epoch %s, and the store has it in epoch %s", cmd.Host, subject(sandbox), seen.Epoch, sandbox.Epoch)
	}
	return ""
}
