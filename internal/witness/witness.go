// Package witness notices that a store forgets, and that a server has a double.
//
// An etcd that was put back to an older snapshot answers as if nothing had happened: the same cluster, the
// same term, older values. So a server keeps a witness on its own disk: which pool, which generation of it, how
// far the pool's counter was, and for each place that its own writes go through (alloc.Slot) how many there
// were, and the last one's nonce. Store puts it between a server and its store:
//
//   - Every transaction goes through a slot of this server's: it compares the slot by value and writes it
//     with one more write and a fresh nonce. A store that was put back has an older slot there, or none, whatever
//     its revision says; and of two copies of one server the slower finds the quicker one's nonce.
//   - What a transaction did is on the witness's disk before it is acknowledged.
//   - Each new connection to the store is verified before anything is written over it: gRPC reconnects
//     silently, perhaps to a store that was put back meanwhile. What was on its way on an older connection is
//     an unknown outcome, whatever was answered.
//
// A store that is behind gets its pool record set to recovering, so that nothing is issued or moved by
// anybody, and stays so until the pool is in a later generation (nsalloc pool recover). A server that finds
// another life under its name writes nothing more until it is started again.
package witness

import (
	"fmt"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Seen is what a server remembers of its pool. The zero Seen remembers nothing.
type Seen struct {
	// Server is the server's name.
	Server string `json:"server"`
	// Pool is the pool's UUID, Generation and PoolNonce are those of its record.
	Pool       string           `json:"pool"`
	Generation alloc.Generation `json:"generation"`
	PoolNonce  string           `json:"pool_nonce"`
	// Counter is the highest that the pool's counter was in that generation.
	Counter uint64 `json:"counter"`
	// Incarnation and Life are the last life of this server (alloc.Server).
	Incarnation uint64 `json:"incarnation"`
	Life        string `json:"life"`
	// Slots are the life's slots, by number.
	Slots []Mark `json:"slots"`
}

// Mark is the last write through a slot.
type Mark struct {
	Writes uint64 `json:"writes"`
	Nonce  string `json:"nonce"`
}

// Verdict is what a look at the store means.
type Verdict int

// The verdicts.
const (
	// Sound: the store has all that was seen.
	Sound Verdict = iota
	// Recovered: the pool is in a later generation: what was seen of the older one counts no more.
	Recovered
	// Behind: the store has forgotten what was seen.
	Behind
	// Taken: another life of this server is at work.
	Taken
	// Foreign: it is the store of another pool.
	Foreign
)

// look is what a store has, as of one revision. Absent records are nil.
type look struct {
	pool    *alloc.Pool
	counter *alloc.Counter
	server  *alloc.Server
	slots   []*alloc.Slot // as many as Seen has
}

// judge compares what was seen with what a store has; alive says that the life of Seen is this process, whose
// pending writes may be there as well: pending[n] are the nonces that slot n may have.
func (s Seen) judge(l look, alive bool, pending func(n int, nonce string) bool) (Verdict, string) {
	switch {
	case s.Pool == "":
		return Sound, "" // nothing was seen
	case l.pool == nil:
		return Behind, fmt.Sprintf("it holds no pool, and was seen to hold pool %s", s.Pool)
	case l.pool.UUID != s.Pool:
		return Foreign, fmt.Sprintf("it holds pool %s, and this server's witness is of pool %s", l.pool.UUID, s.Pool)
	case l.pool.Generation > s.Generation:
		return Recovered, ""
	case l.pool.Generation < s.Generation:
		return Behind, fmt.Sprintf("its pool is in generation %d, and was seen in generation %d", l.pool.Generation, s.Generation)
	case l.pool.Nonce != s.PoolNonce:
		return Behind, fmt.Sprintf("its generation %d is not the one that was seen, but another of that number", l.pool.Generation)
	case l.counter == nil || l.counter.Generation == s.Generation && l.counter.Next < s.Counter:
		return Behind, fmt.Sprintf("its counter is at %x, and was seen at %x", next(l.counter), s.Counter)
	case s.Incarnation == 0:
		return Sound, ""
	case l.server == nil || l.server.Incarnation < s.Incarnation:
		return Behind, fmt.Sprintf("it has not heard of life %d of this server", s.Incarnation)
	case l.server.Incarnation > s.Incarnation:
		return Taken, fmt.Sprintf("life %d of a server of this name has begun, this one is life %d", l.server.Incarnation, s.Incarnation)
	case l.server.Nonce != s.Life:
		return Behind, fmt.Sprintf("life %d of this server is not the one that was seen, but another of that number", s.Incarnation)
	}
	for n, mark := range s.Slots {
		switch has := l.slots[n]; {
		case mark.Writes == 0:
		case has == nil || has.Writes < mark.Writes:
			return Behind, fmt.Sprintf("it has %d writes of this server's slot %d, and was seen to have %d", writes(has), n, mark.Writes)
		case has.Nonce == mark.Nonce || pending(n, has.Nonce):
		case has.Writes == mark.Writes:
			return Behind, fmt.Sprintf("write %d through this server's slot %d is not the one that was seen", mark.Writes, n)
		case alive:
			return Taken, fmt.Sprintf("somebody else wrote slot %d of this life of this server: a copy of this process", n)
		}
	}
	return Sound, ""
}

func next(c *alloc.Counter) uint64 {
	if c == nil {
		return 0
	}
	return c.Next
}

func writes(s *alloc.Slot) uint64 {
	if s == nil {
		return 0
	}
	return s.Writes
}

// sees takes a sound store in. What was seen stays: nothing goes back.
func (s *Seen) sees(l look) {
	if l.pool == nil {
		return
	}
	if l.pool.Generation != s.Generation || s.Pool == "" {
		s.Pool, s.Generation, s.PoolNonce, s.Counter = l.pool.UUID, l.pool.Generation, l.pool.Nonce, 0
	}
	if l.counter != nil && l.counter.Generation == s.Generation {
		s.Counter = max(s.Counter, l.counter.Next)
	}
}
