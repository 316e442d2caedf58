package alloc_test

import (
	"context"
	"errors"
	"testing"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// counting counts the sandboxes that are asked for.
type counting struct {
	alloc.Store
	sandboxes int
}

func (s *counting) Get(ctx context.Context, keys ...alloc.Key) ([]alloc.Entry, alloc.Revision, error) {
	for _, k := range keys {
		if k.Kind == alloc.KindSandbox {
			s.sandboxes++
		}
	}
	return s.Store.Get(ctx, keys...)
}

// TestRegisterUnread: a new sandbox's place is not read, and what stands there all the same is not
// written over; nor is a request done twice.
func TestRegisterUnread(t *testing.T) {
	s := &counting{Store: memstore.New()}
	p := alloctest.NewPool(t, s, alloc.DefaultPolicy())
	a := p.Agent("a")
	cmd := a.New()
	s.sandboxes = 0
	made, _, err := p.Register(t.Context(), cmd)
	if err != nil || s.sandboxes != 0 {
		t.Fatalf("%v, %d sandboxes were read", err, s.sandboxes)
	}
	again, _, err := p.Register(t.Context(), cmd)
	if err != nil || len(again) != 1 || again[0].Serial != made[0].Serial || s.sandboxes != 1 {
		t.Errorf("asked again: %v, %v, %d sandboxes were read", again, err, s.sandboxes)
	}
	cmd = a.New()
	other := *made[0]
	other.Serial, other.Bindings = cmd.Items[0].Sandbox, nil
	if _, err := s.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{&other}}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := p.Register(t.Context(), cmd); !errors.Is(err, alloc.ErrBound) {
		t.Errorf("where a sandbox stands: %v", err)
	}
	// As the store was, for the check that follows.
	if _, err := s.Commit(t.Context(), alloc.Tx{Delete: []alloc.Key{other.Key()}}); err != nil {
		t.Fatal(err)
	}
}
