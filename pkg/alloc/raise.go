package alloc

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"time"
)

// Servers take one generation in RaiseEvery by themselves, and RaiseBurst in a row after a quiet hour: a mistake that
// repeats itself must not use up the generations, of which there are 32,767, and an etcd whose members are upgraded one
// after the other while a server is down must not stand still between them.
const (
	RaiseEvery = 10 * time.Minute
	RaiseBurst = 6
)

// NotBefore is when servers may take the next generation by themselves, of what a pool, or a witness, has as Pool.Raised.
func NotBefore(raised time.Time) time.Time {
	if raised.IsZero() {
		return raised
	}
	return raised.Add(-(RaiseBurst - 1) * RaiseEvery)
}

// raisedAt is Pool.Raised after one more generation.
func raisedAt(raised, now time.Time) time.Time {
	if raised.Before(now) {
		raised = now
	}
	return raised.Add(RaiseEvery)
}

// Raise is the transaction by which a server that has asked all others takes generation to and opens the pool
// in it. pool and counter are as they were read; both are compared. What is left of all ranges of earlier
// generations is burned by it, and all other records stay as they are: hosts register anew what lives on them.
// No serial that was issued is issued again: if to is later than all that anybody has seen, because nobody has
// issued in it; otherwise by the odds of the random point at which its counter begins.
//
// now is when, by the server's clock; raisedBefore is the latest Pool.Raised that the server knows of, from its witness, or
// from the pool. Whether it may be taken now is for the caller to ask (NotBefore).
//
// Errors: ErrPoolMissing; ErrExhausted when so few generations are left that only an operator may take one
// (nsalloc pool recover); ErrInvalid for a generation that is not later than the pool's and its Target.
func Raise(pool, counter Entry, to Generation, raisedBefore, now time.Time) (Tx, error) {
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
	next.Raised = raisedAt(raisedBefore, now)
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
