package alloc

import (
	"context"
	"time"
)

// What the servers of a pool ask each other. Each has a witness, on its own disk, of what it has seen in the
// store; together they notice a store that was put back also where one of them has seen nothing of what is lost.

// MaxServers is how many servers a pool has at most: each remembers the others.
const MaxServers = 100

// Question is what a server asks another one, on each new connection to its store.
type Question struct {
	// From is the asker, by its own word, and Pool the UUID of its pool.
	From, Pool string
	// Nonce stands in the asker's record (Server.Asked). The asked one reads it in its own store, so that the
	// two speak of the same one. Empty: the question is only whether anybody is there.
	Nonce string
}

// Saying is what a witness says of the store.
type Saying string

// What witnesses say.
const (
	// SaysSound: the store has all that this witness has seen.
	SaysSound Saying = "sound"
	// SaysBehind: the store has forgotten what this witness has seen.
	SaysBehind Saying = "behind"
	// SaysNew: it is the witness of a server that is new to the pool, and has acknowledged nothing.
	SaysNew Saying = "new"
	// SaysLost: it is of a server of the pool that has lost what it had seen: only a new generation makes up
	// for it.
	SaysLost Saying = "lost"
	// SaysElsewhere: the nonce is not in its store: it is another one than the asker's.
	SaysElsewhere Saying = "another store"
	// SaysNothing: it was not heard. Nobody answers that.
	SaysNothing Saying = "not heard"
)

// Heard reports whether the witness spoke of the asker's store.
func (s Saying) Heard() bool { return s != SaysElsewhere && s != SaysNothing && s != "" }

// Testimony is a server's answer to a Question.
type Testimony struct {
	// Server is who answers.
	Server string
	Says   Saying
	// Why says what the store has forgotten, or why the witness was not heard.
	Why string
	// Generation is the highest that the witness has seen; 0 when it has seen none.
	Generation Generation
}

// Standing is whether a server trusts its store, and why not.
type Standing struct {
	// Server is its name.
	Server string
	// Trusts: it issues, as far as the pool is open.
	Trusts bool
	// Why says what it waits for; empty when it trusts.
	Why string
	// NotBefore is when it may take a new generation by itself; zero when nothing but what Why says keeps it,
	// and when it needs none.
	NotBefore time.Time
	// Others are the other servers with what they said when they were asked last, in the order of their names.
	Others []Other
	// Raised is how many generations this process has taken by itself.
	Raised uint64
}

// Other is another server as its witness was heard last.
type Other struct {
	Testimony
	Address string
	// Asked is when.
	Asked time.Time
}

// RemoveServer unlists a server that is gone for good, through a life of it: the others do not ask it any
// more what it has seen. What it alone had seen is lost with it. When it begins another life it is listed
// again. Removing a server that is removed, or that the store does not know, is no error: the store may have
// forgotten it, and others remember it.
//
// Committed when it returns: that it is not listed. A repetition changes nothing more.
//
// Errors: ErrInvalid, ErrConflict when a later life has begun, ErrPoolMissing, ErrMalformed, ErrUnavailable,
// ErrUnknownOutcome.
func (s *Service) RemoveServer(ctx context.Context, name string, life uint64) (*Server, error) {
	if err := ValidateName("server name", name); err != nil {
		return nil, err
	}
	key := Key{Kind: KindServer, ID: name}
	var done *Server
	err := settle(ctx, func() (bool, error) {
		entries, _, err := s.get(ctx, Key{Kind: KindPool}, key)
		if err != nil {
			return false, err
		}
		if _, err := poolOf(entries[0]); err != nil {
			return false, err
		}
		rec := Server{Name: name}
		if found, ok := entries[1].Record.(*Server); ok {
			rec = *found
		}
		if rec.Incarnation > life {
			return true, refuse(ReasonConflict, "server "+name, "life %d of it has begun, after life %d, which was to be removed; nothing was changed", rec.Incarnation, life)
		}
		done = &rec
		if rec.Removed >= max(life, 1) {
			return true, nil
		}
		rec.Removed = max(life, 1)
		_, err = s.store.Commit(ctx, Tx{Guards: []Guard{{entries[0].Key, entries[0].Token}, {key, entries[1].Token}}, Put: []Record{&rec}})
		return false, err
	})
	if err != nil {
		return nil, err
	}
	return done, nil
}

// Servers are the records of the pool's servers, also of those that were removed.
func (s *Service) Servers(ctx context.Context) (found []*Server, err error) {
	var failed error
	err = s.list(ctx, KindServer, "", 0, func(e Entry) bool {
		if failed = e.Err; failed != nil {
			return false
		}
		found = append(found, e.Record.(*Server))
		return true
	})
	if err == nil {
		err = failed
	}
	return found, err
}

// ValidateAddress checks an address at which a server is reached, of those that it says to others.
func ValidateAddress(address string) error {
	return validText("server address", address, 1, maxAddress)
}

const maxAddress = 128
