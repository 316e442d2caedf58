package alloc_test

import (
	"context"
	"encoding/json"
	"sync"
	"testing"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

func TestService(t *testing.T) {
	alloctest.TestService(t, func(t *testing.T) alloctest.Planter { return guarded{share(t, memstore.New()), t} })
}

// guarded holds every transaction of the use cases against the rule that makes retries safe: what is
// written was read before, or is new, and is compared, and so are the pool, and both records of a hand-off when one
// of them changes. Several guards often exclude the same; the rule does not rest on which.
type guarded struct {
	alloctest.Planter
	t *testing.T
}

func (g guarded) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	compares := map[alloc.Key]bool{}
	for _, x := range tx.Guards {
		compares[x.Key] = true
	}
	need := func(k alloc.Key, why string) {
		if !compares[k] {
			g.t.Errorf("a transaction does not compare %s, %s; it compares %v", k, why, compares)
		}
	}
	for _, rec := range tx.Put {
		if len(tx.Guards) == 0 {
			break // a test that writes by itself
		}
		switch r := rec.(type) {
		case *alloc.OldStint: // moves with its sandbox
			need(alloc.SandboxKey(r.Sandbox), "whose stint it moves")
			continue
		case *alloc.Aside: // a mend's; that it was refused is true of any pool
			need(rec.Key(), "which it writes")
			continue
		case *alloc.Sandbox:
			if r.Checkpoint != 0 && r.State != alloc.StateRunning { // Register changes what runs without its images
				need(alloc.CheckpointKey(r.Checkpoint), "the current one of what it writes")
			}
		case *alloc.Checkpoint:
			need(alloc.SandboxKey(r.Sandbox), "whose checkpoint it writes")
		}
		need(rec.Key(), "which it writes")
		if q, ok := rec.(*alloc.Request); !ok || len(q.Ranges) > 0 { // not what a sweep leaves
			need(alloc.Key{Kind: alloc.KindPool}, "which must be open")
		}
	}
	return g.Planter.Commit(ctx, tx)
}

// sharing hands out the same records again and again, as a cache does. Whoever changes what it read
// changes it for all, and is found out when the test ends.
type sharing struct {
	alloctest.Planter
	mu   sync.Mutex
	seen map[alloc.Key]map[alloc.Token]shared
	put  []shared
}

type shared struct {
	record alloc.Record
	text   string
}

func share(t *testing.T, s alloctest.Planter) *sharing {
	sh := &sharing{Planter: s, seen: map[alloc.Key]map[alloc.Token]shared{}}
	t.Cleanup(func() {
		for _, r := range sh.put {
			if now := text(r.record); now != r.text {
				t.Errorf("%s was changed after it was handed to Commit:\n%s\n%s", r.record.Key(), r.text, now)
			}
		}
		for key, of := range sh.seen {
			for _, r := range of {
				if now := text(r.record); now != r.text {
					t.Errorf("%s was changed by who read it:\n%s\n%s", key, r.text, now)
				}
			}
		}
	})
	return sh
}

// text is all that use cases could change in a record.
func text(r alloc.Record) string {
	var marks alloc.RequestLog
	switch r := r.(type) {
	case *alloc.Sandbox:
		marks = r.Requests
	case *alloc.Host:
		marks = r.Requests
	}
	b, _ := json.Marshal(struct {
		R alloc.Record
		M alloc.RequestLog
	}{r, marks})
	return string(b)
}

func (s *sharing) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	s.mu.Lock()
	for _, r := range tx.Put {
		if len(tx.Guards) > 0 { // else it is a test's own
			s.put = append(s.put, shared{r, text(r)})
		}
	}
	s.mu.Unlock()
	return s.Planter.Commit(ctx, tx)
}

func (s *sharing) Get(ctx context.Context, keys ...alloc.Key) ([]alloc.Entry, alloc.Revision, error) {
	entries, rev, err := s.Planter.Get(ctx, keys...)
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, e := range entries {
		if e.Record == nil {
			continue
		}
		if s.seen[e.Key] == nil {
			s.seen[e.Key] = map[alloc.Token]shared{}
		}
		r, ok := s.seen[e.Key][e.Token]
		if !ok {
			r = shared{e.Record, text(e.Record)}
			s.seen[e.Key][e.Token] = r
		}
		entries[i].Record = r.record
	}
	return entries, rev, err
}
