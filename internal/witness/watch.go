package witness

import (
	"context"
	"sync"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// keepAfter is how soon what a watch delivered is written down: long enough for many changes to share a write,
// and for this server's own, which are on disk before they are acknowledged, to need none.
const keepAfter = 100 * time.Millisecond

// watched is what a watch has delivered and is not written down yet.
type watched struct {
	some chan struct{} // one slot: there is something

	mu      sync.Mutex
	counter *alloc.Counter           // guarded by mu
	servers map[string]*alloc.Server // guarded by mu
}

// Watch implements alloc.Store. What it delivers of the pool, the counter and the servers, the witness has seen:
// it is on disk soon, and nothing waits for that.
func (s *Store) Watch(ctx context.Context, from alloc.Revision, apply func(alloc.Revision, []alloc.Change)) error {
	return s.Store.Watch(ctx, from, func(rev alloc.Revision, changes []alloc.Change) {
		for _, c := range changes {
			s.saw(c)
		}
		apply(rev, changes)
	})
}

func (s *Store) saw(c alloc.Change) {
	switch rec := c.Record.(type) {
	case *alloc.Pool:
		s.notice(rec)
	case *alloc.Counter:
		s.watched.mu.Lock()
		s.watched.counter = rec
		s.watched.mu.Unlock()
	case *alloc.Server:
		if rec.Name == s.name && !rec.Listed() {
			s.doubt() // somebody took this life for gone: it begins another, and is listed again
		}
		s.watched.mu.Lock()
		if s.watched.servers == nil {
			s.watched.servers = map[string]*alloc.Server{}
		}
		s.watched.servers[rec.Name] = rec
		s.watched.mu.Unlock()
	default:
		return
	}
	select {
	case s.watched.some <- struct{}{}:
	default:
	}
}

// keepWatched writes down what watches have delivered. Of a store that is not sound it takes the counter, which
// only rises, and leaves out the servers, which it may have forgotten.
func (s *Store) keepWatched() {
	s.watched.mu.Lock()
	counter, servers := s.watched.counter, s.watched.servers
	s.watched.counter, s.watched.servers = nil, nil
	s.watched.mu.Unlock()
	s.mu.Lock()
	if s.verified != s.made {
		servers = nil
	}
	s.mu.Unlock()
	seen := s.file.Seen()
	news := counter != nil && counter.Generation == seen.Generation && counter.Next > seen.Counter
	for _, rec := range servers {
		had, ok := seen.Others[rec.Name]
		news = news || rec.Name != s.name && (rec.Listed() != ok || ok && had != Peer{rec.Address, rec.Incarnation})
	}
	if !news {
		return
	}
	err := s.file.Update(func(seen *Seen) {
		if counter != nil && counter.Generation == seen.Generation {
			seen.Counter = max(seen.Counter, counter.Next)
		}
		for _, rec := range servers {
			seen.follow(rec)
		}
	})
	if err != nil {
		s.log.Warn("what other servers do is not on this one's disk", "error", err) // nothing is acknowledged until it is (Get, through)
	}
}
