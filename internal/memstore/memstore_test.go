package memstore_test

import (
	"context"
	"errors"
	"testing"

	"go.uber.org/goleak"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestStore(t *testing.T) {
	alloctest.TestStore(t, func(*testing.T) alloctest.Planter { return memstore.New() })
}

func host(nonce string) *alloc.Host { return &alloc.Host{Name: "a", Nonce: nonce} }

func nonce(t *testing.T, s *memstore.Store) string {
	t.Helper()
	entries, _, err := s.Get(t.Context(), alloc.HostKey("a"))
	if err != nil {
		t.Fatal(err)
	}
	if h, ok := entries[0].Record.(*alloc.Host); ok {
		return h.Nonce
	}
	return ""
}

// next makes the next commit end as f, with a guard on the record that is there.
func next(t *testing.T, s *memstore.Store, f memstore.Fault, to string) error {
	t.Helper()
	entries, _, err := s.Get(t.Context(), alloc.HostKey("a"))
	if err != nil {
		t.Fatal(err)
	}
	s.SetFaults(func(op memstore.Op) memstore.Fault {
		if op.Commit {
			return f
		}
		return memstore.Fault{}
	})
	defer s.SetFaults(nil)
	_, err = s.Commit(t.Context(), alloc.Tx{Guards: []alloc.Guard{{Key: entries[0].Key, Token: entries[0].Token}}, Put: []alloc.Record{host(to)}})
	return err
}

func TestFaults(t *testing.T) {
	for _, c := range []struct {
		fault memstore.Outcome
		want  *alloc.Error
		after string
	}{
		{memstore.OK, nil, "1"},
		{memstore.Stored, alloc.ErrUnknownOutcome, "1"},
		{memstore.Lost, alloc.ErrUnknownOutcome, ""},
		{memstore.Unavailable, alloc.ErrUnavailable, ""},
		{memstore.Conflict, alloc.ErrConflict, ""},
	} {
		t.Run(c.fault.String(), func(t *testing.T) {
			s := memstore.New()
			err := next(t, s, memstore.Fault{Outcome: c.fault}, "1")
			if (err == nil) != (c.want == nil) || err != nil && !errors.Is(err, c.want) {
				t.Errorf("answered %v, want %v", err, c.want)
			}
			if got := nonce(t, s); got != c.after {
				t.Errorf("the record is at %q, want %q", got, c.after)
			}
		})
	}
}

func TestDelayed(t *testing.T) {
	t.Run("arrives", func(t *testing.T) {
		s := memstore.New()
		if err := next(t, s, memstore.Fault{Outcome: memstore.Delayed, After: 2}, "1"); !errors.Is(err, alloc.ErrUnknownOutcome) {
			t.Fatal(err)
		}
		if before, then := nonce(t, s), nonce(t, s); before != "" || then != "1" {
			t.Errorf("the record is at %q, then at %q", before, then)
		}
	})
	t.Run("arrives too late", func(t *testing.T) {
		s := memstore.New()
		_ = next(t, s, memstore.Fault{Outcome: memstore.Delayed, After: 100}, "1")
		if err := next(t, s, memstore.Fault{}, "2"); err != nil {
			t.Fatal(err)
		}
		if n := s.Settle(); n != 0 || nonce(t, s) != "2" {
			t.Errorf("%d arrived, the record is at %q", n, nonce(t, s))
		}
	})
	t.Run("settles", func(t *testing.T) {
		s := memstore.New()
		_ = next(t, s, memstore.Fault{Outcome: memstore.Delayed, After: 100}, "1")
		if n := s.Settle(); n != 1 || nonce(t, s) != "1" {
			t.Errorf("%d arrived, the record is at %q", n, nonce(t, s))
		}
	})
}

func TestReadFault(t *testing.T) {
	s := memstore.New()
	s.SetFaults(func(op memstore.Op) memstore.Fault {
		if !op.Commit && op.N == 2 {
			return memstore.Fault{Outcome: memstore.Unavailable}
		}
		return memstore.Fault{}
	})
	for i, want := range []error{nil, alloc.ErrUnavailable, nil} {
		if _, _, err := s.Get(t.Context(), alloc.HostKey("a")); !errors.Is(err, want) {
			t.Errorf("read %d: %v, want %v", i+1, err, want)
		}
	}
}

func TestCompact(t *testing.T) {
	s := memstore.New()
	old, err := s.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{host("1")}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{host("2")}}); err != nil {
		t.Fatal(err)
	}
	s.Compact()
	if _, _, err := s.List(t.Context(), alloc.KindHost, "", 1, old); !errors.Is(err, alloc.ErrConflict) {
		t.Errorf("List: %v", err)
	}
	if err := s.Watch(t.Context(), old, nil); !errors.Is(err, alloc.ErrConflict) {
		t.Errorf("Watch: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var got alloc.Revision
	rev, err := s.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{host("3")}})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Watch(ctx, old+1, func(rev alloc.Revision, _ []alloc.Change) { got = rev; cancel() }); !errors.Is(err, alloc.ErrUnavailable) || got != rev {
		t.Errorf("after the compaction the watch delivered %d and ended with %v", got, err)
	}
}

func TestTooLarge(t *testing.T) {
	s := memstore.New()
	var many alloc.Tx
	for i := range 129 {
		many.Put = append(many.Put, &alloc.Request{ID: string(rune('0' + i))})
	}
	for name, tx := range map[string]alloc.Tx{
		"operations": many,
		"bytes":      {Put: []alloc.Record{&alloc.Host{Name: "a", Extra: make([]byte, 2<<20)}}},
	} {
		if _, err := s.Commit(t.Context(), tx); !errors.Is(err, alloc.ErrTooLarge) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
