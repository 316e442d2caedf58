package alloctest

import (
	"context"
	"runtime"
	"strings"
	"sync"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Fault is what becomes of a call of a store: what a network does to it, and the worst above all, an
// answer that is lost, of a transaction that takes effect a while later, if its guards still hold.
type Fault struct {
	// What is "" for none; for a commit stored, lost, delayed, unavailable or conflict; for a read
	// unavailable.
	What string
	// After is for delayed: 1 commits before the next call is looked at, 2 before the one after it.
	After int
}

// EveryFault is what a commit can meet. A delayed one arrives before the next read, before the next
// commit, or after it.
var EveryFault = []Fault{
	{}, {What: "stored"}, {What: "lost"}, {What: "unavailable"}, {What: "conflict"},
	{"delayed", 1}, {"delayed", 2}, {"delayed", 3}, {"delayed", 4}, {"delayed", 5}, {"delayed", 100},
}

// Pair is the shortest list that has an answer lost of what was stored, of what was not, and of what will
// be.
var Pair = []Fault{{}, {What: "stored"}, {What: "lost"}, {"delayed", 2}}

// faulty is a store that is in trouble.
type faulty struct {
	alloc.Store
	mu      sync.Mutex
	decide  func(commit bool, n int) Fault // guarded by mu; nil for none; n counts commits and reads apart, from 1 on
	commits int                            // guarded by mu
	reads   int                            // guarded by mu
	late    []delayed                      // guarded by mu
	met     func(at write, f Fault)
}

type delayed struct {
	tx    alloc.Tx
	after int
}

// write is where a commit was made: FILE:LINE, and the use case.
type write struct {
	file    string
	line    int
	useCase string
}

// caller finds the commit in pkg/alloc that led here, and the exported method of the service around it.
func caller() (w write) {
	var pcs [32]uintptr
	frames := runtime.CallersFrames(pcs[:runtime.Callers(3, pcs[:])])
	for {
		f, more := frames.Next()
		_, in, ok := strings.Cut(f.Function, "/pkg/alloc.(*Service).")
		if !ok {
			_, _, ok = strings.Cut(f.Function, "/pkg/alloc.(*lane).")
		}
		if ok {
			if w.file == "" {
				w.file, w.line = f.File[strings.LastIndex(f.File, "/")+1:], f.Line
			}
			if name, _, _ := strings.Cut(in, "."); name != "" && name[0] >= 'A' && name[0] <= 'Z' {
				w.useCase = name
			}
		}
		if !more {
			return w
		}
	}
}

// trouble begins, and counts from here; nil ends it.
func (s *faulty) trouble(decide func(commit bool, n int) Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.decide, s.commits, s.reads = decide, 0, 0
}

// arrive commits what is due; all of it when everything is.
func (s *faulty) arrive(everything bool) {
	var rest []delayed
	for _, d := range s.late {
		if d.after--; d.after > 0 && !everything {
			rest = append(rest, d)
			continue
		}
		_, _ = s.Store.Commit(context.Background(), d.tx) // its caller has left
	}
	s.late = rest
}

// settle lets all arrive that is on its way.
func (s *faulty) settle() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.arrive(true)
}

func (s *faulty) beginRead() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.arrive(false)
	if s.reads++; s.decide != nil && s.decide(false, s.reads).What != "" {
		return alloc.ErrUnavailable
	}
	return nil
}

// Get implements alloc.Store.
func (s *faulty) Get(ctx context.Context, keys ...alloc.Key) ([]alloc.Entry, alloc.Revision, error) {
	if err := s.beginRead(); err != nil {
		return nil, 0, err
	}
	return s.Store.Get(ctx, keys...)
}

// List implements alloc.Store.
func (s *faulty) List(ctx context.Context, kind alloc.Kind, after string, limit int, at alloc.Revision) ([]alloc.Entry, alloc.Revision, error) {
	if err := s.beginRead(); err != nil {
		return nil, 0, err
	}
	return s.Store.List(ctx, kind, after, limit, at)
}

// Commit implements alloc.Store.
func (s *faulty) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.arrive(false)
	s.commits++
	var f Fault
	if s.decide != nil {
		f = s.decide(true, s.commits)
		s.met(caller(), f)
	}
	switch f.What {
	case "stored":
		_, _ = s.Store.Commit(ctx, tx)
		return 0, alloc.ErrUnknownOutcome
	case "delayed":
		s.late = append(s.late, delayed{tx, f.After})
		return 0, alloc.ErrUnknownOutcome
	case "lost":
		return 0, alloc.ErrUnknownOutcome
	case "unavailable":
		return 0, alloc.ErrUnavailable
	case "conflict":
		return 0, alloc.ErrConflict
	}
	return s.Store.Commit(ctx, tx)
}
