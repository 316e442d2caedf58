package witness

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Asker puts a question to the server at an address. An empty nonce asks only who is there.
type Asker func(ctx context.Context, address string, q alloc.Question) (alloc.Testimony, error)

const (
	// patience is how long another server is waited for.
	patience = 5 * time.Second
	// askAgain is the pause between two tries within that time.
	askAgain = 200 * time.Millisecond
)

// findings is what the others said.
type findings struct {
	others     []alloc.Other
	behind     string   // what the store has forgotten, by one of them; "" when nobody says so
	lost       []string // servers whose witness is lost
	unheard    []string // with their addresses
	names      []string // of unheard
	sound      int
	generation alloc.Generation // the highest that one of them has seen
}

// spoken is who has found the store sound, of the verification under way: as long as the connection lasts, that
// holds.
type spoken struct {
	connected uint64
	sound     map[string]alloc.Other
}

// on is who has spoken of a connection.
func (s *spoken) on(connected uint64) map[string]alloc.Other {
	if s.connected != connected || s.sound == nil {
		s.connected, s.sound = connected, map[string]alloc.Other{}
	}
	return s.sound
}

// consult asks all others at once. They read nonce in this server's record before they answer; so what they say
// is of the store that this server has. Who is in spoke has found it sound before and is not asked again; who
// does so now is added.
func (s *Store) consult(ctx context.Context, others map[string]Peer, pool *alloc.Pool, nonce string, spoke map[string]alloc.Other) (f findings, err error) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	for name, peer := range others {
		if o, ok := spoke[name]; ok {
			f.others = append(f.others, o)
			continue
		}
		wg.Go(func() {
			o := s.ask(ctx, name, peer.Address, alloc.Question{From: s.name, Pool: pool.UUID, Nonce: nonce})
			mu.Lock()
			defer mu.Unlock()
			f.others = append(f.others, o)
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		// It was not they who took too long.
		return f, &alloc.Error{Reason: alloc.ReasonUnavailable, Subject: "server " + s.name, Msg: "it ends, or its store was too slow, while the other servers were asked; nothing was written",
			Fix: "try again", RetryAfter: retrySoon, Err: context.Cause(ctx)}
	}
	slices.SortFunc(f.others, func(a, b alloc.Other) int { return strings.Compare(a.Server, b.Server) })
	for _, o := range f.others {
		f.generation = max(f.generation, o.Generation)
		switch o.Says {
		case alloc.SaysSound:
			if f.sound++; spoke != nil {
				spoke[o.Server] = o
			}
		case alloc.SaysNew: // it has acknowledged nothing
		case alloc.SaysBehind:
			f.behind = fmt.Sprintf("server %s: %s", o.Server, o.Why)
		case alloc.SaysLost:
			f.lost = append(f.lost, o.Server)
		default:
			f.names = append(f.names, o.Server)
			f.unheard = append(f.unheard, fmt.Sprintf("%s (%s)", o.Server, o.Address))
			s.log.WarnContext(ctx, "another server was not heard", "server", o.Server, "address", o.Address, "says", o.Says, "why", o.Why)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.standing.Others = f.others
	return f, nil
}

// ask asks one server until it answers, or patience ends.
func (s *Store) ask(ctx context.Context, name, address string, q alloc.Question) alloc.Other {
	o := alloc.Other{Testimony: alloc.Testimony{Server: name, Says: alloc.SaysNothing}, Address: address, Asked: s.now()}
	switch {
	case address == "":
		o.Why = "it has said no address to the pool"
		return o
	case s.asks == nil:
		o.Why = "this server asks nobody"
		return o
	}
	ctx, cancel := context.WithTimeout(ctx, s.patience)
	defer cancel()
	for {
		t, err := s.asks(ctx, address, q)
		switch {
		case err == nil && t.Server == name:
			o.Testimony = t
			return o
		case err == nil:
			o.Why = "server " + t.Server + " answers at its address"
		case o.Why == "" || ctx.Err() == nil: // the deadline's own error says less than the one before
			o.Why = err.Error()
		}
		again := time.NewTimer(askAgain)
		select {
		case <-again.C:
		case <-ctx.Done():
			again.Stop()
			return o
		}
	}
}

// Present asks who answers at an address.
func (s *Store) Present(ctx context.Context, address string) (string, error) {
	if s.asks == nil {
		return "", &alloc.Error{Reason: alloc.ReasonUnavailable, Subject: "server " + s.name, Msg: "it asks nobody"}
	}
	t, err := s.asks(ctx, address, alloc.Question{From: s.name})
	return t.Server, err
}

// Known is the last life of another server that this one has seen.
func (s *Store) Known(name string) (uint64, bool) {
	peer, ok := s.file.Seen().Others[name]
	return peer.Life, ok
}

// Answer says what this server's witness says of the asker's store.
//
// What this server has under way counts as begun on an older connection from here on: were the store put back
// between its commit and its answer, the asker would have been told too little. It does not ask others because of
// that, or there would be no end to it.
//
// Errors: ErrInvalid; ErrUnavailable when its store is not reached, or another life has its name.
func (s *Store) Answer(ctx context.Context, q alloc.Question) (alloc.Testimony, error) {
	t := alloc.Testimony{Server: s.name, Says: alloc.SaysNothing}
	if q.Nonce == "" {
		return t, nil
	}
	if err := alloc.ValidateName("server name", q.From); err != nil {
		return t, err
	}
	s.mu.Lock()
	taken, alive := s.taken, s.server.Nonce != ""
	s.mu.Unlock()
	if taken != nil {
		return t, taken
	}
	if same, err := s.reads(ctx, q); err != nil || !same {
		t.Says, t.Why = alloc.SaysElsewhere, "it does not find in its store what server "+q.From+" has written: they have different ones"
		return t, err
	}
	s.doubt()
	seen := s.file.Seen()
	t.Generation = seen.Generation
	l, err := s.look(ctx, seen)
	if err != nil {
		return t, err
	}
	verdict, why := seen.judge(l, alive, s.pending)
	switch {
	case verdict == Behind:
		t.Says, t.Why = alloc.SaysBehind, why
		if _, err := s.close(ctx, l, seen.Generation+1, "the store has lost history: "+why); err != nil {
			s.log.WarnContext(ctx, "the pool is not closed yet; this server tries again", "error", err)
		}
	case verdict == Foreign:
		t.Says, t.Why = alloc.SaysElsewhere, why
	case verdict == Taken:
		// Its slots are gone, and so nobody can tell what it has seen.
		return t, &alloc.Error{Reason: alloc.ReasonUnavailable, Subject: "server " + s.name, Msg: why, Fix: "ask again"}
	case seen.Pool == "" && l.server != nil && l.server.Listed(), seen.Due == DueGeneration && verdict != Recovered:
		t.Says = alloc.SaysLost
	case seen.Pool == "", seen.Due == DueHeard:
		t.Says = alloc.SaysNew
	default:
		t.Says = alloc.SaysSound
	}
	return t, nil
}

// reads reports whether the asker's nonce is in this server's store: twice, because a commit of the asker's may
// be a moment away.
func (s *Store) reads(ctx context.Context, q alloc.Question) (bool, error) {
	for range 2 {
		entries, _, err := s.Store.Get(ctx, alloc.Key{Kind: alloc.KindPool}, alloc.Key{Kind: alloc.KindServer, ID: q.From})
		if err != nil {
			return false, err
		}
		pool, _ := entries[0].Record.(*alloc.Pool)
		rec, _ := entries[1].Record.(*alloc.Server)
		if pool != nil && rec != nil && pool.UUID == q.Pool && rec.Asked == q.Nonce {
			return true, nil
		}
	}
	return false, nil
}
