package witness

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// maxSlots is how many writes of one server are on their way at once; the others wait.
const maxSlots = 64

// retrySoon is the pause that a refused caller is asked to make.
const retrySoon = time.Second

// Store is an alloc.Store that a witness watches. Reads pass as they are.
type Store struct {
	alloc.Store
	name string
	file *File
	log  *slog.Logger
	now  func() time.Time

	verifying chan struct{} // one slot, held by who verifies

	mu       sync.Mutex
	made     uint64 // guarded by mu: connections that were made
	verified uint64 // guarded by mu: how many of them there were when the store was found sound
	taken    error  // guarded by mu: another life has this server's name; nothing is written any more
	said     string // guarded by mu: what was logged last
	server   alloc.Server
	free     []*slot       // guarded by mu
	all      []*slot       // guarded by mu: of this life
	freed    chan struct{} // guarded by mu: closed when a slot is given back
}

// slot is a place of this life. It is held by one write at a time.
type slot struct {
	rec   alloc.Slot
	token alloc.Token // of rec, "" before its first write
	// pending are writes whose outcome is unknown: each compares token, and one of them at most is done.
	pending []pending
}

type pending struct {
	rec   alloc.Slot
	token alloc.Token
}

// New puts a witness between a server and its store. name is the server's in the pool; "" is the one that the
// witness has, or, when it is new, one that is made of the machine's name and never changes.
func New(store alloc.Store, name string, file *File, log *slog.Logger, now func() time.Time) (*Store, error) {
	name, err := named(name, file)
	if err != nil {
		return nil, err
	}
	if now == nil {
		now = time.Now
	}
	return &Store{Store: store, name: name, file: file, log: log, now: func() time.Time { return now().UTC().Round(0) },
		verifying: make(chan struct{}, 1), made: 1, freed: make(chan struct{})}, nil
}

// named settles the server's name, on disk.
func named(name string, file *File) (string, error) {
	had := file.Seen().Server
	switch {
	case name == "" && had != "":
		return had, nil
	case name == "":
		host, _ := os.Hostname()
		host = strings.Trim(notInNames.ReplaceAllString(strings.ToLower(host), "-"), ".-")
		name = strings.TrimLeft(host[:min(len(host), 50)]+"-", "-") + newNonce()[:8]
	case had != "" && had != name:
		return "", &alloc.Error{Reason: alloc.ReasonInvalid, Subject: "server " + name, Msg: fmt.Sprintf("the witness %s is of server %s", file.path, had),
			Fix: "give it that --name, or a state directory of its own"}
	}
	if err := alloc.ValidateName("server name", name); err != nil {
		return "", err
	}
	return name, file.Update(func(seen *Seen) { seen.Server = name })
}

var notInNames = regexp.MustCompile(`[^a-z0-9.-]`)

// verifyEvery is the pause between two looks at a store that is not sound.
const verifyEvery = time.Second

// Run verifies the store after each new connection, until ctx ends, so that it is known before anybody
// writes whether that store is sound.
func (s *Store) Run(ctx context.Context) {
	t := time.NewTicker(verifyEvery)
	defer t.Stop()
	for {
		once, cancel := context.WithTimeout(ctx, 10*time.Second)
		_, _ = s.sound(once) // it says in the log what is wrong
		cancel()
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

// Name is the server's.
func (s *Store) Name() string { return s.name }

// Connected says that a connection to the store was made, over which nothing is to be written before it is
// verified. It does not block.
func (s *Store) Connected() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.made++
}

// Get implements alloc.Store. What is read decides what is acknowledged: it waits for a witness that could not be
// written, and gives ErrUnavailable while it cannot.
func (s *Store) Get(ctx context.Context, keys ...alloc.Key) ([]alloc.Entry, alloc.Revision, error) {
	if err := s.file.Kept(); err != nil {
		return nil, 0, s.unwritable(err)
	}
	return s.Store.Get(ctx, keys...)
}

func (s *Store) unwritable(err error) *alloc.Error {
	return &alloc.Error{Reason: alloc.ReasonUnavailable, Subject: "server " + s.name, Msg: "its witness cannot be written: " + err.Error() + "; nothing was written to the store",
		Fix: "make room on its disk", RetryAfter: retrySoon}
}

// Commit implements alloc.Store. Besides the errors of the store below it gives ErrRecovering while the store
// is behind what was seen, and ErrUnavailable when another server has this one's name, or when the witness
// cannot be written: nothing was written to the store.
func (s *Store) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	if slices.ContainsFunc(tx.Put, func(r alloc.Record) bool { _, ok := r.(*alloc.Pool); return ok }) {
		// The way out of recovering, decided by an operator: what it changes, it compares. All servers look at
		// the store anew afterwards, each by the nonce of the generation that it finds.
		defer s.doubt()
		return s.Store.Commit(ctx, tx)
	}
	for {
		made, err := s.sound(ctx)
		if err != nil {
			return 0, err
		}
		sl, err := s.take(ctx)
		if err != nil {
			return 0, err
		}
		rev, again, err := s.through(ctx, sl, made, tx)
		s.give(sl)
		if !again {
			return rev, err
		}
	}
}

// through writes tx through a slot. again says that nothing was written because the slot was not as expected.
func (s *Store) through(ctx context.Context, sl *slot, made uint64, tx alloc.Tx) (rev alloc.Revision, again bool, err error) {
	if len(sl.pending) > 0 {
		if ok, err := s.settle(ctx, sl); err != nil || !ok {
			return 0, err == nil, err
		}
	}
	next := sl.rec
	next.Writes, next.Nonce = sl.rec.Writes+1, newNonce()
	token, err := s.Token(&next)
	if err != nil {
		return 0, false, err
	}
	own := tx
	own.Guards = append(slices.Clip(tx.Guards), alloc.Guard{Key: next.Key(), Token: sl.token})
	own.Put = append(slices.Clip(tx.Put), &next)
	rev, err = s.Store.Commit(ctx, own)
	switch alloc.ReasonOf(err) {
	case alloc.ReasonUnknownOutcome:
		sl.pending = append(sl.pending, pending{next, token})
		return 0, false, err
	case alloc.ReasonConflict:
		// Mostly somebody else's record. If it is this slot's, the store is to be looked at.
		entries, _, readErr := s.Store.Get(ctx, next.Key())
		if readErr == nil && entries[0].Token != sl.token {
			s.doubt()
			return 0, true, nil
		}
		return 0, false, err
	}
	if err != nil {
		return 0, false, err
	}
	sl.rec, sl.token, sl.pending = next, token, nil
	if err := s.file.Update(func(seen *Seen) { seen.wrote(next, tx) }); err != nil {
		s.doubt() // nothing more is written before the disk takes it
		return 0, false, unknown("it was committed, and the witness of this server could not be written: "+err.Error(), "make room on its disk, then ask again with the same request id")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.made != made {
		return 0, false, unknown("the connection to the store was made anew before the answer was believed", "ask again with the same request id")
	}
	return rev, false, nil
}

func unknown(msg, fix string) error {
	return &alloc.Error{Reason: alloc.ReasonUnknownOutcome, Subject: "store transaction", Msg: msg, Fix: fix}
}

// wrote notes a write of this life, and the counter that it moved.
func (s *Seen) wrote(sl alloc.Slot, tx alloc.Tx) {
	if sl.Life != s.Life {
		return // of a life before
	}
	for len(s.Slots) <= sl.N {
		s.Slots = append(s.Slots, Mark{})
	}
	s.Slots[sl.N] = Mark{sl.Writes, sl.Nonce}
	for _, rec := range tx.Put {
		switch r := rec.(type) {
		case *alloc.Pool:
			s.sees(look{pool: r})
		case *alloc.Counter:
			if r.Generation == s.Generation {
				s.Counter = max(s.Counter, r.Next)
			}
		}
	}
}

// settle finds out what became of a slot's pending write: done, or it takes effect no more once the next write
// does. It reports false when the slot is neither.
func (s *Store) settle(ctx context.Context, sl *slot) (bool, error) {
	entries, _, err := s.Store.Get(ctx, sl.rec.Key())
	if err != nil {
		return false, err
	}
	if entries[0].Token == sl.token {
		return true, nil // one may still come, and then the next write conflicts with it
	}
	for _, p := range sl.pending {
		if p.token == entries[0].Token {
			sl.rec, sl.token, sl.pending = p.rec, p.token, nil
			return true, nil
		}
	}
	s.doubt()
	return false, nil
}

// doubt has the store verified again before the next write.
func (s *Store) doubt() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.made++
}

// take holds a slot of this life; give gives it back.
func (s *Store) take(ctx context.Context) (*slot, error) {
	for {
		s.mu.Lock()
		if n := len(s.free); n > 0 {
			sl := s.free[n-1]
			s.free = s.free[:n-1]
			s.mu.Unlock()
			return sl, nil
		}
		if len(s.all) < maxSlots {
			sl := &slot{rec: alloc.Slot{Server: s.name, Life: s.server.Nonce, N: len(s.all)}}
			s.all = append(s.all, sl)
			s.mu.Unlock()
			return sl, nil
		}
		freed := s.freed
		s.mu.Unlock()
		select {
		case <-freed:
		case <-ctx.Done():
			return nil, &alloc.Error{Reason: alloc.ReasonUnavailable, Msg: fmt.Sprintf("the deadline passed while %d writes of this server were under way; nothing was written", maxSlots),
				Fix: "try again", RetryAfter: retrySoon, Err: context.Cause(ctx)}
		}
	}
}

func (s *Store) give(sl *slot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sl.rec.Life != s.server.Nonce {
		return // of a life before
	}
	s.free = append(s.free, sl)
	close(s.freed)
	s.freed = make(chan struct{})
}

// sound returns when the store is verified over every connection that was made, and tells how many those are.
func (s *Store) sound(ctx context.Context) (made uint64, err error) {
	for {
		s.mu.Lock()
		made, verified, taken := s.made, s.verified, s.taken
		s.mu.Unlock()
		if taken != nil {
			return 0, taken
		}
		if verified == made {
			return made, nil
		}
		select {
		case s.verifying <- struct{}{}:
		case <-ctx.Done():
			return 0, &alloc.Error{Reason: alloc.ReasonUnavailable, Msg: "the deadline passed while the store was verified; nothing was written",
				Fix:        "check that etcd runs, is reached, and has room on its disk (its log says why it ended); try again",
				RetryAfter: retrySoon, Err: context.Cause(ctx)}
		}
		err := s.verify(ctx)
		<-s.verifying
		if err != nil {
			return 0, err
		}
	}
}

// verify looks at the store, and begins a life where there is none.
func (s *Store) verify(ctx context.Context) error {
	s.mu.Lock()
	made, alive := s.made, s.server.Nonce != ""
	if s.verified == made {
		s.mu.Unlock()
		return nil // somebody else did
	}
	s.mu.Unlock()
	// What is sound by now is so for the connections made until now: the read comes after.
	seen := s.file.Seen()
	l, tokens, err := s.look(ctx, seen)
	if err != nil {
		return err
	}
	if l.pool == nil && seen.Pool == "" {
		return &alloc.Error{Reason: alloc.ReasonPoolMissing, Msg: "the store holds no pool", Fix: "check that it is the right etcd and pool name; create a new pool with: nsalloc pool init"}
	}
	verdict, why := seen.judge(l, alive, s.pending)
	switch verdict {
	case Foreign:
		return s.refuse(why, alloc.ReasonPoolMissing, "point this server at the etcd of its own pool, or give it an empty state directory")
	case Behind:
		return s.behind(ctx, l, tokens[0], why)
	case Taken:
		if alive {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.taken = s.refuse(why, alloc.ReasonUnavailable, "end the other one, or give one of the two a --name and a state directory of its own, and start this one again")
			return s.taken
		}
		s.log.WarnContext(ctx, "a later life of this server has been at work than its witness knows: it was cut off when it began, or this is an older copy of its state directory. "+
			"If the other one is alive it writes nothing from now on", "server", s.name, "why", why)
	}
	if l.pool.State == alloc.PoolRecovering {
		return s.refuse("the pool is recovering: its store may have lost history", alloc.ReasonRecovering, "see the servers' logs; when the store is the right one: nsalloc pool recover")
	}
	if !alive || verdict == Recovered {
		if err := s.begin(ctx, l, tokens); err != nil {
			return err
		}
	}
	if err := s.file.Update(func(seen *Seen) { seen.sees(l) }); err != nil {
		return s.unwritable(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.verified, s.said = made, ""
	return nil
}

// look reads what seen is compared with, and the tokens of the pool and of this server's record.
func (s *Store) look(ctx context.Context, seen Seen) (l look, tokens [2]alloc.Token, err error) {
	keys := []alloc.Key{{Kind: alloc.KindPool}, {Kind: alloc.KindCounter}, {Kind: alloc.KindServer, ID: s.name}}
	for n := range seen.Slots {
		keys = append(keys, (&alloc.Slot{Server: s.name, Life: seen.Life, N: n}).Key())
	}
	entries, _, err := s.Store.Get(ctx, keys...)
	if err != nil {
		return l, tokens, err
	}
	for i, e := range entries {
		if e.Err != nil && i != 1 { // without the counter nothing is issued anyhow
			return l, tokens, e.Err
		}
	}
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
	return l, [2]alloc.Token{entries[0].Token, entries[2].Token}, nil
}

// pending reports whether a slot may have a nonce because of a write whose outcome is not known here yet.
func (s *Store) pending(n int, nonce string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n >= len(s.all) {
		return false
	}
	sl := s.all[n]
	if !slices.Contains(s.free, sl) {
		return true // a write is under way in it
	}
	return slices.ContainsFunc(sl.pending, func(p pending) bool { return p.rec.Nonce == nonce })
}

// begin is a new life: its record, and its first slots, are this process's alone.
//
// If the process dies after the commit, its witness knows the life before: the next start says so, and goes on.
func (s *Store) begin(ctx context.Context, l look, tokens [2]alloc.Token) error {
	life := alloc.Server{Name: s.name, Incarnation: 1, Nonce: newNonce(), Started: s.now()}
	if l.server != nil {
		life.Incarnation, life.Extra = l.server.Incarnation+1, l.server.Extra
	}
	_, err := s.Store.Commit(ctx, alloc.Tx{
		Guards: []alloc.Guard{{Key: alloc.Key{Kind: alloc.KindPool}, Token: tokens[0]}, {Key: life.Key(), Token: tokens[1]}},
		Put:    []alloc.Record{&life},
		// The slots of lives before. '0' is the character after '/'.
		DeleteSpans: []alloc.Span{{Kind: alloc.KindSlot, After: s.name + "/", Through: s.name + "0"}},
	})
	if err != nil {
		return notBegun(err)
	}
	err = s.file.Update(func(seen *Seen) {
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

// notBegun is what a caller learns whose own transaction was not sent: nothing of it was written.
func notBegun(err error) error {
	return &alloc.Error{Reason: alloc.ReasonUnavailable, Msg: "this server has not begun its life in the pool; nothing was written", Fix: "try again", RetryAfter: retrySoon, Err: errors.New(err.Error())}
}

// behind closes the pool, so that no server issues from a store that has forgotten what this one has seen.
func (s *Store) behind(ctx context.Context, l look, token alloc.Token, why string) error {
	target := s.file.Seen().Generation + 1
	if l.pool != nil && (l.pool.State == alloc.PoolOpen || l.pool.Target < target) {
		closed := *l.pool
		closed.State, closed.Target = alloc.PoolRecovering, max(closed.Target, target)
		if _, err := s.Store.Commit(ctx, alloc.Tx{Guards: []alloc.Guard{{Key: closed.Key(), Token: token}}, Put: []alloc.Record{&closed}}); err != nil {
			s.log.ErrorContext(ctx, "the pool could not be closed; this server tries again", "error", err)
		}
	}
	return s.refuse("the store has lost history: "+why, alloc.ReasonRecovering, "put back a newer snapshot of the etcd; if there is none: nsalloc pool recover")
}

// refuse says it in the log, once, and to the caller.
func (s *Store) refuse(why string, reason alloc.Reason, fix string) *alloc.Error {
	if s.said != why {
		s.said = why
		s.log.Error("this server writes nothing: "+why, "server", s.name, "fix", fix)
	}
	return &alloc.Error{Reason: reason, Subject: "server " + s.name, Msg: why + "; nothing was written", Fix: fix, RetryAfter: retrySoon}
}

func newNonce() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}
