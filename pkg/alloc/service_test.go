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
	alloctest.TestService(t, func(t *testing.T) alloc.Store { return share(t, memstore.New()) })
}

// sharing hands out the same records again and again, as a cache does. Whoever changes what it read
// changes it for all, and is found out when the test ends.
type sharing struct {
	alloc.Store
	mu   sync.Mutex
	seen map[alloc.Key]map[alloc.Token]shared
}

type shared struct {
	record alloc.Record
	text   string
}

func share(t *testing.T, s alloc.Store) *sharing {
	sh := &sharing{Store: s, seen: map[alloc.Key]map[alloc.Token]shared{}}
	t.Cleanup(func() {
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
	var marks []alloc.RequestMark
	switch r := r.(type) {
	case *alloc.Sandbox:
		marks = r.Requests
	case *alloc.Host:
		marks = r.Requests
	}
	b, _ := json.Marshal(struct {
		R alloc.Record
		M []alloc.RequestMark
	}{r, marks})
	return string(b)
}

func (s *sharing) Get(ctx context.Context, keys ...alloc.Key) ([]alloc.Entry, alloc.Revision, error) {
	entries, rev, err := s.Store.Get(ctx, keys...)
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
