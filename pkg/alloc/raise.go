package alloc

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"time"
)

// RaiseEvery is the least time between two generations that servers take by themselves: a mistake that repeats
// itself must not use up the generations, of which there are 32,767.
const RaiseEvery = 10 * time.Minute

// Raise is the transaction by which a server that has asked all others takes generation to and opens the pool
// in it. pool and counter are as they were read; both are compared. What is left of all ranges of earlier
// generations is burned by it, and all other records stay as they are: hosts register anew what lives on them.
// No serial that was issued is issued again: if to is later than all that anybody has seen, because nobody has
// issued in it; otherwise by the odds of the random point at which its counter begins.
//
// now is when, by the server's clock (Pool.Raised).
//
// Errors: ErrPoolMissing; ErrExhausted when so few generations are left that only an operator may take one
// (nsalloc pool recover); ErrInvalid for a generation that is not later than the pool's and its Target.
func Raise(pool, counter Entry, to Generation, now time.Time) (Tx, error) {
	p, err := poolOf(pool)
	switch {
	case err != nil:
		return Tx{}, err
	case to <= p.Generation || to < p.Target:
		return Tx{}, invalid("generation", fmt.Sprintf("%d is not later than the pool's %d, or before its target %d", to, p.Generation, p.Target))
	case to > MaxGeneration-FewGenerations:
		return Tx{}, &Error{Reason: ReasonExhausted, Subject: "pool " + p.UUID, Msg: fmt.Sprintf("generation %d would leave fewer than %d, and no server takes one of those by itself", to, FewGenerations),
			Fix: "find out why the generation rises; an operator may take the next one: nsalloc pool recover"}
	}
	next := raised(p, to)
	next.Raised = now
	return Tx{
		Guards: []Guard{{pool.Key, pool.Token}, {counter.Key, counter.Token}},
		Put:    []Record{next, atStart(counter, to, randomStart())},
	}, nil
}

// raised is the pool, open in a later generation.
func raised(now *Pool, to Generation) *Pool {
	p := *now
	p.Generation, p.Nonce = to, newNonce()
	p.State, p.Target = PoolOpen, 0
	p.Settled = min(p.Settled, to-1)
	return &p
}

// atStart is the counter as it begins a generation, whatever stands there now.
func atStart(now Entry, g Generation, start uint64) *Counter {
	c := Counter{}
	if before, ok := now.Record.(*Counter); ok {
		c = *before
	}
	c.Generation, c.Next, c.Nonce = g, start, newNonce()
	return &c
}

// randomStart is where the counter of a generation begins that is not the pool's first: somewhere in its
// lower half. A store that was put back does not know of the generations that it has had since, and would
// number the next one as one of those.
func randomStart() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return 1 + binary.BigEndian.Uint64(b[:])%(MaxCounter/2)
}
