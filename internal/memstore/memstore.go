// Package memstore keeps a pool's records in memory: an alloc.Store for tests, with faults.
//
// It keeps the whole contract of alloc.Store and nothing of the records it is given: a record is
// encoded when it comes in and decoded when it goes out, so that tests which share or change a record
// show. Its revisions are dense: one for every transaction that changed something.
//
// Faults are what a real store's network does to a transaction, above all the worst: an answer that is
// lost, of a transaction that takes effect a while later, if its guards still hold.
package memstore

import (
	"context"
	"fmt"
	"slices"
	"sort"
	"sync"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Limits of one transaction; those of etcd, so that a test with memory fails where a pool would.
const (
	maxOps   = 128
	maxBytes = 1536 * 1024
	maxPage  = 1000
)

// Store is an alloc.Store. Make one with New.
type Store struct {
	mu        sync.Mutex
	kinds     map[alloc.Kind]*kind // guarded by mu
	log       []commit             // guarded by mu: every revision after compacted, in order
	compacted alloc.Revision       // guarded by mu: the newest revision that the log does not have
	grown     chan struct{}        // guarded by mu: closed and replaced when log grows
	faults    func(op Op) Fault    // guarded by mu; nil for none
	reads     int                  // guarded by mu
	commits   int                  // guarded by mu
	late      []*delayed           // guarded by mu: in the order in which they were sent
}

var _ alloc.Store = (*Store)(nil)

// kind is the records of one kind.
type kind struct {
	ids      []string             // every id that ever was, sorted
	versions map[string][]version // by id, oldest first
}

// version is a value from a revision on; value is nil when the record was deleted there.
type version struct {
	rev   alloc.Revision
	value []byte
}

type commit struct {
	rev     alloc.Revision
	changes []change
}

type change struct {
	key   alloc.Key
	value []byte
}

// New makes an empty store.
func New() *Store {
	return &Store{kinds: map[alloc.Kind]*kind{}, grown: make(chan struct{})}
}

// revision is the newest one.
func (s *Store) revision() alloc.Revision { return s.compacted + alloc.Revision(len(s.log)) }

// value is what stood under a key at a revision.
func (s *Store) value(k alloc.Key, at alloc.Revision) version {
	of := s.kinds[k.Kind]
	if of == nil {
		return version{}
	}
	vs := of.versions[k.ID]
	i := sort.Search(len(vs), func(i int) bool { return vs[i].rev > at })
	if i == 0 || vs[i-1].value == nil {
		return version{}
	}
	return vs[i-1]
}

func (s *Store) entry(k alloc.Key, at alloc.Revision) alloc.Entry {
	v := s.value(k, at)
	if v.value == nil {
		return alloc.Entry{Key: k}
	}
	e := alloc.Entry{Key: k, Token: alloc.Token(v.value), Revision: v.rev}
	e.Record, e.Owner, e.Err = decode(k, v.value)
	return e
}

// Get implements alloc.Store.
func (s *Store) Get(ctx context.Context, keys ...alloc.Key) ([]alloc.Entry, alloc.Revision, error) {
	for _, k := range keys {
		if err := validKey(k); err != nil {
			return nil, 0, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.beginRead(ctx); err != nil {
		return nil, 0, err
	}
	entries := make([]alloc.Entry, len(keys))
	for i, k := range keys {
		entries[i] = s.entry(k, s.revision())
	}
	return entries, s.revision(), nil
}

// List implements alloc.Store.
func (s *Store) List(ctx context.Context, of alloc.Kind, after string, limit int, at alloc.Revision) ([]alloc.Entry, alloc.Revision, error) {
	if limit < 1 || limit > maxPage {
		return nil, 0, invalid("limit", fmt.Sprintf("%d is not in 1..%d", limit, maxPage))
	}
	if !known(of) || singleton(of) {
		return nil, 0, invalid("kind "+string(of), "it cannot be listed")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.beginRead(ctx); err != nil {
		return nil, 0, err
	}
	if at == 0 {
		at = s.revision()
	}
	if at < s.compacted || at > s.revision() {
		return nil, 0, gone(at)
	}
	var entries []alloc.Entry
	if k := s.kinds[of]; k != nil {
		first, found := slices.BinarySearch(k.ids, after)
		if found {
			first++
		}
		for _, id := range k.ids[first:] {
			e := s.entry(alloc.Key{Kind: of, ID: id}, at)
			if e.Token == "" {
				continue
			}
			if entries = append(entries, e); len(entries) == limit {
				break
			}
		}
	}
	return entries, at, nil
}

// Commit implements alloc.Store.
func (s *Store) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	w, err := prepare(tx)
	if err != nil {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return 0, unavailable(err)
	}
	s.commits++
	return s.faulty(Op{Commit: true, N: s.commits}, w)
}

// write is a transaction in its stored form.
type write struct {
	guards  []alloc.Guard
	changes []change
	spans   []alloc.Span
}

// prepare encodes a transaction and refuses what no store takes.
func prepare(tx alloc.Tx) (write, error) {
	w := write{guards: slices.Clone(tx.Guards)}
	size, seen := 0, map[alloc.Key]bool{}
	for _, g := range tx.Guards {
		if err := validKey(g.Key); err != nil {
			return write{}, err
		}
		size += len(g.Token) + len(g.Key.ID)
	}
	add := func(k alloc.Key, value []byte) error {
		if seen[k] {
			return invalid("key "+k.String(), "it stands twice in one transaction")
		}
		seen[k] = true
		size += len(value) + len(k.ID)
		w.changes = append(w.changes, change{k, value})
		return validKey(k)
	}
	for _, rec := range tx.Put {
		value, err := encode(rec)
		if err != nil {
			return write{}, err
		}
		if err := add(rec.Key(), value); err != nil {
			return write{}, err
		}
	}
	for _, k := range tx.Delete {
		if err := add(k, nil); err != nil {
			return write{}, err
		}
	}
	for _, span := range tx.DeleteSpans {
		if !known(span.Kind) || singleton(span.Kind) {
			return write{}, invalid("kind "+string(span.Kind), "it has no ids")
		}
		for k := range seen {
			if k.Kind == span.Kind && k.ID > span.After && k.ID <= span.Through {
				return write{}, invalid("key "+k.String(), "it stands twice in one transaction")
			}
		}
		w.spans = append(w.spans, span)
	}
	if writes := len(w.changes) + len(w.spans); len(w.guards) > maxOps || writes > maxOps || size > maxBytes {
		return write{}, &alloc.Error{Reason: alloc.ReasonTooLarge, Subject: "store transaction",
			Msg: fmt.Sprintf("%d guards, %d writes, %d bytes; nothing was written", len(w.guards), writes, size), Fix: "split it"}
	}
	return w, nil
}

// apply makes w happen, or reports false when a guard does not hold.
func (s *Store) apply(w write) bool {
	now := s.revision()
	for _, g := range w.guards {
		if string(s.value(g.Key, now).value) != string(g.Token) {
			return false
		}
	}
	changes := w.changes
	for _, span := range w.spans {
		if of := s.kinds[span.Kind]; of != nil {
			for _, id := range of.ids {
				if id > span.After && id <= span.Through {
					changes = append(slices.Clip(changes), change{key: alloc.Key{Kind: span.Kind, ID: id}})
				}
			}
		}
	}
	var did []change
	for _, c := range changes {
		if c.value == nil && s.value(c.key, now).value == nil {
			continue // deleting what is not there is no change
		}
		did = append(did, c)
		of := s.kinds[c.key.Kind]
		if of == nil {
			of = &kind{versions: map[string][]version{}}
			s.kinds[c.key.Kind] = of
		}
		if i, found := slices.BinarySearch(of.ids, c.key.ID); !found {
			of.ids = slices.Insert(of.ids, i, c.key.ID)
		}
		of.versions[c.key.ID] = append(of.versions[c.key.ID], version{now + 1, c.value})
	}
	if len(did) > 0 {
		s.log = append(s.log, commit{now + 1, did})
		close(s.grown)
		s.grown = make(chan struct{})
	}
	return true
}

// Token implements alloc.Store.
func (s *Store) Token(rec alloc.Record) (alloc.Token, error) {
	value, err := encode(rec)
	return alloc.Token(value), err
}

// Watch implements alloc.Store.
func (s *Store) Watch(ctx context.Context, from alloc.Revision, apply func(alloc.Revision, []alloc.Change)) error {
	for {
		if err := ctx.Err(); err != nil {
			return unavailable(err)
		}
		s.mu.Lock()
		if from < s.compacted || from > s.revision() {
			s.mu.Unlock()
			return gone(from)
		}
		news := s.log[from-s.compacted:]
		grown := s.grown
		s.mu.Unlock()
		for _, c := range news {
			changes := make([]alloc.Change, 0, len(c.changes))
			for _, ch := range c.changes {
				if !ch.key.Kind.Watched() {
					continue
				}
				out := alloc.Change{Key: ch.key, Revision: c.rev}
				if ch.value != nil {
					out.Token = alloc.Token(ch.value)
					out.Record, out.Owner, out.Err = decode(ch.key, ch.value)
				}
				changes = append(changes, out)
			}
			if err := ctx.Err(); err != nil {
				return unavailable(err)
			}
			apply(c.rev, changes)
			from = c.rev
		}
		if len(news) > 0 {
			continue
		}
		select {
		case <-grown:
		case <-ctx.Done():
		}
	}
}

// Sync implements alloc.Store. Watches run as fast as they can; there is nothing to push.
func (s *Store) Sync(ctx context.Context) (alloc.Revision, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return 0, unavailable(err)
	}
	return s.revision(), nil
}

// Plant puts value under key, byte by byte: what only a defect, another program or a newer version
// leaves there. It is not empty.
func (s *Store) Plant(_ context.Context, key alloc.Key, value []byte) error {
	if err := validKey(key); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.apply(write{changes: []change{{key, slices.Clone(value)}}})
	return nil
}

// Newer is rec as a newer version would store it, in a way that this one cannot read. It panics for what
// is no record.
func (s *Store) Newer(rec alloc.Record) ([]byte, bool) {
	value, err := encode(rec)
	if err != nil {
		panic(err)
	}
	value[0]++
	return value, true
}

// Compact forgets what was before the newest revision: older pins and watches get ErrConflict.
func (s *Store) Compact() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.compacted, s.log = s.revision(), nil
}

func invalid(subject, msg string) error {
	return &alloc.Error{Reason: alloc.ReasonInvalid, Subject: subject, Msg: msg}
}

func unavailable(err error) error {
	return &alloc.Error{Reason: alloc.ReasonUnavailable, Subject: "store", Msg: "it was not reached; nothing was written", Err: err}
}

func gone(rev alloc.Revision) error {
	return &alloc.Error{Reason: alloc.ReasonConflict, Subject: "store revision", Msg: fmt.Sprintf("the store has no revision %d any more, or not yet", rev), Fix: "list again"}
}
