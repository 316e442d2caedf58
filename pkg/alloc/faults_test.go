package alloc_test

import (
	"encoding/json"
	"testing"
	"testing/synctest"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

func ok[T any](t testing.TB) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// dump is all that a store has but its random numbers: it is equal exactly if the same happened.
func dump(t *testing.T, s alloc.Store) string {
	t.Helper()
	r, err := alloctest.Everything(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	r.Pool = nil
	return asJSON(t, r)
}

func asJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestFaults: every write meets every pair of faults.
func TestFaults(t *testing.T) {
	alloctest.TestFaults(t, alloctest.Trouble{
		Run:    func(t *testing.T, f func(t *testing.T)) { synctest.Test(t, f) },
		Store:  func(*testing.T) alloc.Store { return memstore.New() },
		Faults: alloctest.EveryFault,
		Source: ".",
	})
}
