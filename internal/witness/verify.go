package witness

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nsalloc/nsalloc/internal/killpoint"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// verifyWithin bounds one verification: what the store may take, and twice asking the others.
const verifyWithin = 4 * patience

// maxServerRecords is how many servers' records one look reads.
const maxServerRecords = 1000

// looksMost is how often one verification looks at the store anew because of what it has done there itself.
const looksMost = 5

// verify looks at the store, and does what it takes to trust it: begins a life, asks the others, closes the pool,
// takes a generation. It returns nil when the store is sound.
//
// Only one is under way at a time.
func (s *Store) verify(ctx context.Context) error {
	for range looksMost {
		again, err := s.verifyOnce(ctx)
		if err != nil || !again {
			return err
		}
	}
	return &alloc.Error{Reason: alloc.ReasonUnavailable, Subject: "server " + s.name, Msg: "others change the pool's record again and again; nothing was written", Fix: "try again", RetryAfter: retrySoon}
}

// verifyOnce is one look. again says that the store is another one now, and is to be looked at again.
func (s *Store) verifyOnce(ctx context.Context) (again bool, err error) {
	s.mu.Lock()
	made, connected, heard, alive := s.made, s.connected, s.heard, s.server.Nonce != ""
	s.mu.Unlock()
	// What is sound by now is so for the connections made until now: the read comes after.
	seen := s.file.Seen()
	l, err := s.look(ctx, seen)
	switch {
	case err != nil:
		return false, err
	case l.pool == nil && seen.Pool == "":
		return false, &alloc.Error{Reason: alloc.ReasonPoolMissing, Msg: "the store holds no pool", Fix: "check that it is the right etcd and pool name; create a new pool with: nsalloc pool init"}
	case l.pool != nil && l.pool.Format > alloc.FormatVersion:
		return false, &alloc.Error{Reason: alloc.ReasonFormat, Subject: "pool " + l.pool.UUID, Msg: fmt.Sprintf("the store has format %d, this version writes %d", l.pool.Format, alloc.FormatVersion),
			Fix: "run servers of the version that wrote it, or a newer one"}
	case seen.Pool == "":
		if seen, err = s.first(l); err != nil {
			return false, err
		}
	}
	verdict, why := seen.judge(l, alive, s.pending)
	switch verdict {
	case Foreign:
		return false, s.refuse(why, alloc.ReasonPoolMissing, "point this server at the etcd of its own pool, or give it an empty state directory")
	case Behind:
		closed, err := s.close(ctx, l, seen.Generation+1, "the store has lost history: "+why)
		if err != nil || closed {
			return closed, err
		}
	case Taken:
		if alive {
			taken := s.refuse(why, alloc.ReasonUnavailable, "end the other one, or give one of the two a --name and a state directory of its own, and start this one again")
			s.mu.Lock()
			defer s.mu.Unlock()
			s.taken = taken
			return false, taken
		}
		s.log.WarnContext(ctx, "a later life of this server has been at work than its witness knows: it was cut off when it began, or this is an older copy of its state directory. "+
			"If the other one is alive it writes nothing from now on", "server", s.name, "why", why)
	}
	if l.pool.State == alloc.PoolRecovering {
		if why == "" {
			why = "another server, or a host, has seen what it has not"
		}
		return s.recover(ctx, l, seen, "the pool is recovering, its store has lost history: "+why)
	}

	due := seen.Due
	if verdict == Recovered {
		due = DueNothing // a generation that nobody issued in whom this server had been
	}
	s.mu.Lock()
	if s.taking.nonce != "" && s.taking.nonce == l.pool.Nonce {
		// The generation is this server's own: whatever the others had seen by then was of earlier ones, and this
		// look is at a store that has it. So no connection of before it needs to be asked about. One that was made
		// since does: others may have issued in it, and the store have forgotten that.
		heard = max(heard, s.taking.connected)
	}
	s.mu.Unlock()
	others := seen.others(l.servers)
	ask := (heard != connected || due != DueNothing) && len(others) > 0
	nonce := newNonce()
	switch {
	case !alive || verdict == Recovered || l.server == nil || !l.server.Listed():
		err = s.begin(ctx, l, nonce)
	case ask:
		err = s.announce(ctx, l, nonce)
	}
	if err != nil {
		return false, err
	}
	if ask || due != DueNothing {
		f, err := s.consult(ctx, others, l.pool, nonce, s.spoke.on(connected))
		if err != nil {
			return false, err
		}
		if again, err := s.act(ctx, l, seen, f, due); err != nil || again {
			return again, err
		}
	}
	err = s.file.Update(func(seen *Seen) {
		seen.sees(l)
		seen.follows(l.servers)
		seen.Due = DueNothing
	})
	if err != nil {
		return false, s.unwritable(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.verified, s.heard, s.nonce, s.said, s.taking = made, connected, l.pool.Nonce, "", taking{}
	return false, nil
}

// look reads what seen is compared with, and which servers there are.
func (s *Store) look(ctx context.Context, seen Seen) (l look, err error) {
	keys := []alloc.Key{{Kind: alloc.KindPool}, {Kind: alloc.KindCounter}, {Kind: alloc.KindServer, ID: s.name}}
	for n := range seen.Slots {
		keys = append(keys, (&alloc.Slot{Server: s.name, Life: seen.Life, N: n}).Key())
	}
	entries, _, err := s.Store.Get(ctx, keys...)
	if err != nil {
		return l, err
	}
	for i, e := range entries {
		if e.Err != nil && i != 1 { // without the counter nothing is issued anyhow
			return l, e.Err
		}
	}
	l.entries = [3]alloc.Entry(entries)
	l.pool, _ = entries[0].Record.(*alloc.Pool)
	l.counter, _ = entries[1].Record.(*alloc.Counter)
	l.server, _ = entries[2].Record.(*alloc.Server)
	for _, e := range entries[3:] {
		sl, _ := e.Record.(*alloc.Slot)
		l.slots = append(l.slots, sl)
	}
	if entries[1].Err != nil {
		l.counter = &alloc.Counter{Generation: seen.Generation, Next: seen.Counter} // check and mend have that
	}
	servers, _, err := s.Store.List(ctx, alloc.KindServer, "", maxServerRecords, 0)
	if err != nil {
		return l, err
	}
	for _, e := range servers {
		if e.Err != nil {
			return l, e.Err
		}
		l.servers = append(l.servers, e.Record.(*alloc.Server))
	}
	return l, nil
}

// newPoolAge is how old a pool is at most that a server without a witness takes for a new one.
const newPoolAge = 10 * time.Minute

// first settles, on disk, what a server owes that has no witness. A pool that was made a moment ago, and in which
// nobody has done anything, has nothing to lose.
func (s *Store) first(l look) (Seen, error) {
	listed := 0
	for _, rec := range l.servers {
		if rec.Listed() {
			listed++
		}
	}
	due, age := DueHeard, s.now().Sub(l.pool.Created)
	switch {
	case l.server != nil && l.server.Listed():
		due = DueGeneration
	case listed == 0 && l.pool.Generation == 1 && next(l.counter) == 1 && !l.pool.Created.IsZero() && age.Abs() <= newPoolAge:
		due = DueNothing
	}
	if err := s.file.Update(func(seen *Seen) { seen.sees(l); seen.Due = due }); err != nil {
		return Seen{}, s.unwritable(err)
	}
	if due == DueGeneration {
		s.log.Warn("this server is of the pool and its witness is lost: it takes a new generation before it issues", "server", s.name)
	}
	return s.file.Seen(), nil
}

// begin is a new life: its record, and its first slots, are this process's alone. nonce is the one that others
// are asked under.
//
// If the process dies after the commit, its witness knows the life before: the next start says so, and goes on.
func (s *Store) begin(ctx context.Context, l look, nonce string) error {
	life := alloc.Server{Name: s.name, Incarnation: 1, Nonce: newNonce(), Started: s.now(), Address: s.address, Asked: nonce}
	if l.server != nil {
		life.Incarnation, life.Removed, life.Extra = max(l.server.Incarnation, l.server.Removed)+1, l.server.Removed, l.server.Extra
	} else if err := s.room(l.servers); err != nil {
		return err
	}
	killpoint.At(killpoint.ServerLifeCommitting)
	_, err := s.Store.Commit(ctx, alloc.Tx{
		Guards: []alloc.Guard{{Key: alloc.Key{Kind: alloc.KindPool}, Token: l.entries[0].Token}, {Key: life.Key(), Token: l.entries[2].Token}},
		Put:    []alloc.Record{&life},
		// The slots of lives before. '0' is the character after '/'.
		DeleteSpans: []alloc.Span{{Kind: alloc.KindSlot, After: s.name + "/", Through: s.name + "0"}},
	})
	if err != nil {
		return notBegun(err)
	}
	killpoint.At(killpoint.ServerLifeCommitted)
	err = s.file.Update(func(seen *Seen) {
		if seen.Generation < l.pool.Generation {
			seen.Due = DueNothing // this one it has never issued in
		}
		seen.sees(l)
		seen.Incarnation, seen.Life, seen.Slots = life.Incarnation, life.Nonce, nil
	})
	if err != nil {
		return s.unwritable(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.server, s.all, s.free = life, nil, nil
	s.log.InfoContext(ctx, "this server's life in the pool begins", "server", s.name, "life", life.Incarnation, "generation", l.pool.Generation)
	return nil
}

// room refuses one more server where the pool has as many as the others can remember, or as many records, which stay
// of those that were removed, as one read gives.
func (s *Store) room(servers []*alloc.Server) error {
	listed, removed := 0, ""
	for _, rec := range servers {
		if rec.Listed() {
			listed++
		} else {
			removed = rec.Name
		}
	}
	e := &alloc.Error{Reason: alloc.ReasonInvalid, Subject: "server " + s.name}
	switch {
	case listed >= alloc.MaxServers:
		e.Msg = fmt.Sprintf("the pool has %d servers, and takes no more", listed)
		e.Fix = "remove those that are gone for good: nsalloc server list, nsalloc server remove NAME"
	case len(servers) >= maxServerRecords-alloc.MaxServers: // others may begin at the same time
		e.Msg = fmt.Sprintf("the pool has records of %d servers, also of those that were removed, and takes no new name", len(servers))
		e.Fix = "give this one an empty --data-dir and the name of one that was removed: --name " + removed
	default:
		return nil
	}
	return e
}

// announce writes into this server's record what the others are asked under, and nothing else: of a store that
// is behind it makes no better one.
func (s *Store) announce(ctx context.Context, l look, nonce string) error {
	rec := alloc.Server{Name: s.name}
	if l.server != nil {
		rec = *l.server
	}
	rec.Address, rec.Asked = s.address, nonce
	if _, err := s.Store.Commit(ctx, alloc.Tx{Guards: []alloc.Guard{{Key: rec.Key(), Token: l.entries[2].Token}}, Put: []alloc.Record{&rec}}); err != nil {
		return notBegun(err)
	}
	return nil
}

// notBegun is what a caller learns whose own transaction was not sent: nothing of it was written.
func notBegun(err error) error {
	return &alloc.Error{Reason: alloc.ReasonUnavailable, Msg: "this server has not begun its life in the pool; nothing was written", Fix: "try again", RetryAfter: retrySoon, Err: errors.New(err.Error())}
}
