package witness

import (
	"context"
	"crypto/rand"
	"encoding/hex"
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

// retrySoon is the pause that a refused caller is asked to make.
const retrySoon = time.Second

// Store is an alloc.Store that a witness watches. Reads pass as they are.
type Store struct {
	alloc.Store
	name string
	file *File
	log  *slog.Logger
	now  func() time.Time

	// Set by Join, before anything else is called.
	address  string
	asks     Asker
	patience time.Duration

	base context.Context // of verifications
	stop context.CancelFunc

	mu        sync.Mutex
	made      uint64        // guarded by mu: how often there was a reason to verify the store
	connected uint64        // guarded by mu: connections that were made; each counts in made, too
	verified  uint64        // guarded by mu: what made was when the store was found sound
	heard     uint64        // guarded by mu: what connected was when all others were heard
	nonce     string        // guarded by mu: of the pool that was found sound
	taking    taking        // guarded by mu: the generation that this server has taken, until it is found sound
	under     *verification // guarded by mu: the one under way, if any
	trouble   error         // guarded by mu: why the last verification failed; nil when it did not
	troubled  uint64        // guarded by mu: what made was when that one began
	taken     error         // guarded by mu: another life has this server's name; nothing is written any more
	said      string        // guarded by mu: what was logged last
	standing  alloc.Standing
	server    alloc.Server  // guarded by mu: this life, "" its Nonce before it has begun
	free      []*slot       // guarded by mu
	all       []*slot       // guarded by mu: of this life
	freed     chan struct{} // guarded by mu: closed when a slot is given back

	watched watched

	// Of the verification under way.
	ahead aheadOfClock
	spoke spoken
}

// taking is a generation that this server takes: the pool's nonce in it, and what connected was before it was written.
type taking struct {
	nonce     string
	connected uint64
}

// verification is one look at the store, which all share that wait for one.
type verification struct {
	done chan struct{} // closed at its end; err is set then
	err  error
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
	s := &Store{Store: store, name: name, file: file, log: log, now: func() time.Time { return now().UTC().Round(0) },
		made: 1, connected: 1, freed: make(chan struct{}), patience: patience}
	s.standing.Server = name
	s.base, s.stop = context.WithCancel(context.Background())
	s.watched.some = make(chan struct{}, 1)
	return s, nil
}

// Join says where other servers reach this one, and how it reaches them. Without it nobody is heard. It is called
// before anything else.
func (s *Store) Join(address string, asks Asker) { s.address, s.asks = address, asks }

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
// writes whether that store is sound; it goes on asking while that is not known, and writes down what watches
// deliver.
func (s *Store) Run(ctx context.Context) {
	t := time.NewTicker(verifyEvery)
	defer t.Stop()
	var keep <-chan time.Time
	for {
		s.verifyAlone()
		select {
		case <-t.C:
		case <-s.watched.some:
			if keep == nil {
				keep = time.After(keepAfter)
			}
		case <-keep:
			keep = nil
			s.keepWatched()
		case <-ctx.Done():
			return
		}
	}
}

// Close ends what is under way of verifications, and begins no more: the file can be closed then. What was
// verified stays so.
func (s *Store) Close() {
	s.stop()
	s.mu.Lock()
	v := s.under
	s.mu.Unlock()
	if v != nil {
		<-v.done
	}
}

// verifyAlone begins a verification that is needed, and does not wait for it.
func (s *Store) verifyAlone() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.taken == nil && s.verified != s.made {
		s.begins()
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
	s.connected++
}

// doubt has the store verified again before the next write. What is under way is an unknown outcome.
func (s *Store) doubt() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.made++
}

// notice has the store verified when it has another pool than the one that was found sound, or a closed one.
func (s *Store) notice(p *alloc.Pool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.taken == nil && s.verified == s.made && (p == nil || p.State != alloc.PoolOpen || p.Nonce != s.nonce) {
		s.made++
		s.begins()
	}
}

// Get implements alloc.Store. What is read decides what is acknowledged: it waits for a witness that could not be
// written, and gives ErrUnavailable while it cannot.
func (s *Store) Get(ctx context.Context, keys ...alloc.Key) ([]alloc.Entry, alloc.Revision, error) {
	if err := s.file.Kept(); err != nil {
		return nil, 0, s.unwritable(err)
	}
	entries, rev, err := s.Store.Get(ctx, keys...)
	for _, e := range entries {
		if e.Key.Kind == alloc.KindPool && e.Err == nil {
			p, _ := e.Record.(*alloc.Pool)
			s.notice(p)
		}
	}
	return entries, rev, err
}

func (s *Store) unwritable(err error) *alloc.Error {
	return &alloc.Error{Reason: alloc.ReasonUnavailable, Subject: "server " + s.name, Msg: "its witness cannot be written: " + err.Error() + "; nothing was written to the store",
		Fix: "make room on its disk", RetryAfter: retrySoon}
}

// Commit implements alloc.Store. Besides the errors of the store below it gives ErrRecovering while the store
// is behind what was seen, here or by another server, or while it is not known whether it is; and ErrUnavailable
// when another server has this one's name, or when the witness cannot be written: nothing was written to the store.
func (s *Store) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	if slices.ContainsFunc(tx.Put, wayOut) {
		// What it changes, it compares. All servers look at the store anew afterwards, each by the nonce of the
		// generation that it finds.
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

// wayOut reports whether a record is one of those by which a pool is opened or closed, or a server removed:
// that is written although this server does not trust its store.
func wayOut(rec alloc.Record) bool {
	switch rec.(type) {
	case *alloc.Pool, *alloc.Server:
		return true
	}
	return false
}

// sound returns when the store is verified over every connection that was made, and tells what made is. While it
// is known why it is not, and somebody looks whether that has changed, that is the answer at once.
func (s *Store) sound(ctx context.Context) (made uint64, err error) {
	for {
		s.mu.Lock()
		switch {
		case s.taken != nil:
			defer s.mu.Unlock()
			return 0, s.taken
		case s.verified == s.made:
			defer s.mu.Unlock()
			return s.made, nil
		case s.under != nil && s.troubled == s.made && alloc.ReasonOf(s.trouble) == alloc.ReasonRecovering:
			defer s.mu.Unlock()
			return 0, s.trouble
		}
		v := s.begins()
		s.mu.Unlock()
		select {
		case <-v.done:
			if v.err != nil {
				return 0, v.err
			}
		case <-ctx.Done():
			return 0, &alloc.Error{Reason: alloc.ReasonUnavailable, Msg: "the deadline passed while the store was verified; nothing was written",
				Fix:        "check that etcd runs, is reached, and has room on its disk (its log says why it ended); try again",
				RetryAfter: retrySoon, Err: context.Cause(ctx)}
		}
	}
}

// begins is the verification under way, or a new one. It lasts beyond the call that it is for: that a caller had
// little time says nothing of the servers that are asked. The caller holds mu.
func (s *Store) begins() *verification {
	if s.under != nil {
		return s.under
	}
	v, made := &verification{done: make(chan struct{})}, s.made
	if s.base.Err() != nil {
		v.err = &alloc.Error{Reason: alloc.ReasonUnavailable, Subject: "server " + s.name, Msg: "it ends; nothing was written", Fix: "ask another server"}
		close(v.done)
		return v
	}
	s.under = v
	go func() {
		ctx, cancel := context.WithTimeout(s.base, verifyWithin)
		defer cancel()
		v.err = s.verify(ctx)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.under, s.trouble, s.troubled = nil, v.err, made
		close(v.done)
	}()
	return v
}

// Standing says whether this server trusts its store.
func (s *Store) Standing() alloc.Standing {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.standing
	st.Others = slices.Clone(st.Others)
	switch trouble := s.trouble; {
	case s.taken != nil:
		st.Why = s.taken.Error()
	case trouble != nil:
		st.Why = trouble.Error()
	case s.verified == 0:
		st.Why = "it has not looked at its store yet"
	default:
		st.Trusts, st.NotBefore = true, time.Time{}
	}
	return st
}

// refuse says it in the log, once, and to the caller.
func (s *Store) refuse(why string, reason alloc.Reason, fix string) *alloc.Error {
	s.mu.Lock()
	again := s.said == why
	s.said = why
	s.mu.Unlock()
	if !again {
		s.log.Error("this server writes nothing: "+why, "server", s.name, "fix", fix)
	}
	return &alloc.Error{Reason: reason, Subject: "server " + s.name, Msg: why + "; nothing was written", Fix: fix, RetryAfter: retrySoon}
}

func newNonce() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}
