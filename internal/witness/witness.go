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
//   - It follows the pool, the counter and the servers by a watch, and writes down what it sees.
//
// # The others
//
// One server may have seen nothing of what the store has forgotten. So each asks all others on each new connection:
// those that the store lists and those that its witness has seen, because the store's list may be the older one. It
// writes a nonce into its own record, and who is asked reads that in its own store before it answers. So an old
// and a restored cluster that are alive together are told apart, and the judgement of the one that is asked
// is of the asker's store. Nobody need judge another one's slots.
//
//	new connection --look--> behind? --no--> ask all --all heard, sound--> trusted
//	                           |               |
//	                          yes              +--behind--> close the pool
//	                           v               +--not heard, policy new-generation--> take a generation --> look
//	                     close the pool        +--not heard, policy wait--> refuse, and ask again
//
//	pool recovering --> ask all --> take the generation after all that was heard of, open --> look
//
// # New generations
//
// A store that is behind gets its pool record set to recovering, so that nothing is issued or moved by anybody.
// Whoever notices, by a watch or by what it reads, asks all others again and takes the next generation: after all
// that anybody has seen, with a counter that begins at a random point (alloc.Raise). Of several servers one wins. That
// is once in ten minutes and six times in a row, by what the store says and by what the witness remembers, because a
// store can be put back twice; and not with few generations left. Otherwise an operator does it: nsalloc pool recover.
//
// A server without a witness trusts nobody, and takes a generation first. There are two exceptions: the pool was made
// a moment ago and nobody has done anything in it; or the server is new to the pool and all others say that the
// store has what they have seen: each acknowledgement there ever was is one of theirs (Due).
//
// A server that finds another life under its name writes nothing more until it is started again.
package witness

import (
	"fmt"
	"maps"
	"slices"
	"time"

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
	// Others are the other servers of the pool, by name, as the store had them when it was last found sound.
	Others map[string]Peer `json:"others,omitempty"`
	// Due is what is owed before this server trusts its store.
	Due Due `json:"due,omitempty"`
	// Raised is the latest Pool.Raised that was seen: the store may have forgotten.
	Raised time.Time `json:"raised,omitzero"`
}

// Peer is another server: where it is asked, and which of its lives that was.
type Peer struct {
	Address string `json:"address"`
	Life    uint64 `json:"life"`
}

// Due is what a server that had no witness owes before it trusts its store.
type Due string

// What can be due. It is on disk before the server writes anything to the store, so that a second start does not
// take the first one's beginning for a witness.
const (
	// DueNothing: it has a witness, or the pool was made a moment ago.
	DueNothing Due = ""
	// DueHeard: it is new to the pool. Whatever was acknowledged was acknowledged by one of the others; when all
	// of them say that the store has what they have seen, it has everything. So a new replica costs no generation.
	DueHeard Due = "all others heard"
	// DueGeneration: it was of the pool before and has lost its witness, or has nobody to ask. What it had
	// seen nobody can know; only a generation that it never issued in makes up for that.
	DueGeneration Due = "a new generation"
)

func (s Seen) clone() Seen {
	s.Slots, s.Others = slices.Clone(s.Slots), maps.Clone(s.Others)
	return s
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
	servers []*alloc.Server
	entries [3]alloc.Entry // of pool, counter and server
}

// judge compares what was seen with what a store has; alive says that the life of Seen is this process, whose
// pending writes may be there as well: pending says whether a slot may be as it was found.
func (s Seen) judge(l look, alive bool, pending func(n int, found *alloc.Slot) bool) (Verdict, string) {
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
		case has.Nonce == mark.Nonce || pending(n, has):
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
	if l.pool.Raised.After(s.Raised) {
		s.Raised = l.pool.Raised
	}
}

// follows takes over which other servers a sound store has.
func (s *Seen) follows(servers []*alloc.Server) {
	s.Others = map[string]Peer{}
	for _, rec := range servers {
		if rec.Name != s.Server && rec.Listed() {
			s.Others[rec.Name] = Peer{rec.Address, rec.Incarnation}
		}
	}
}

// follow takes over what a sound store has of one server.
func (s *Seen) follow(rec *alloc.Server) {
	switch had, ok := s.Others[rec.Name]; {
	case rec.Name == s.Server:
	case rec.Listed():
		if s.Others == nil {
			s.Others = map[string]Peer{}
		}
		s.Others[rec.Name] = Peer{rec.Address, rec.Incarnation}
	case ok && rec.Removed >= had.Life:
		delete(s.Others, rec.Name)
	}
}

// others are the servers to be asked, by name: those that the store lists, which may have forgotten some, and
// those that were seen and not removed since.
func (s Seen) others(servers []*alloc.Server) map[string]Peer {
	all := map[string]Peer{}
	removed := map[string]uint64{}
	for _, rec := range servers {
		if removed[rec.Name] = rec.Removed; rec.Listed() {
			all[rec.Name] = Peer{rec.Address, rec.Incarnation}
		}
	}
	for name, seen := range s.Others {
		if listed, ok := all[name]; ok && listed.Life >= seen.Life || !ok && removed[name] >= max(seen.Life, 1) {
			continue
		}
		all[name] = seen
	}
	delete(all, s.Server)
	return all
}
