package alloctest

import (
	"context"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Everything reads all records of a pool that is quiet. One that cannot be read is an error.
func Everything(ctx context.Context, s alloc.Store) (r alloc.Records, err error) {
	single, _, err := s.Get(ctx, alloc.Key{Kind: alloc.KindPool}, alloc.Key{Kind: alloc.KindCounter})
	if err != nil {
		return r, err
	}
	for _, e := range single {
		if e.Err != nil {
			return r, e.Err
		}
	}
	r.Pool, _ = single[0].Record.(*alloc.Pool)
	r.Counter, _ = single[1].Record.(*alloc.Counter)
	var at alloc.Revision
	for _, kind := range alloc.Kinds() {
		const page = 1000
		for after := ""; ; {
			entries, rev, err := s.List(ctx, kind, after, page, at)
			if err != nil {
				return r, err
			}
			at = rev
			for _, e := range entries {
				if e.Err != nil {
					return r, e.Err
				}
				r = with(r, e.Record)
				after = e.Key.ID
			}
			if len(entries) < page {
				break
			}
		}
	}
	return r, nil
}

func with(r alloc.Records, rec alloc.Record) alloc.Records {
	switch rec := rec.(type) {
	case *alloc.Lane:
		r.Lanes = append(r.Lanes, rec)
	case *alloc.Host:
		r.Hosts = append(r.Hosts, rec)
	case *alloc.Sandbox:
		r.Sandboxes = append(r.Sandboxes, rec)
	case *alloc.OldStint:
		r.OldStints = append(r.OldStints, rec)
	case *alloc.Checkpoint:
		r.Checkpoints = append(r.Checkpoints, rec)
	case *alloc.Request:
		r.Requests = append(r.Requests, rec)
	}
	return r
}

// Check fails the test when the store's records break a promise. Every test of a store ends with it.
func Check(t testing.TB, s alloc.Store) {
	t.Helper()
	// The test's own context may be over by now.
	r, err := Everything(context.WithoutCancel(t.Context()), s)
	if err != nil {
		t.Error(err)
		return
	}
	for _, f := range alloc.Check(r) {
		t.Errorf("%s: %s: %s", f.Promise, f.Subject, f.Evidence)
	}
}
