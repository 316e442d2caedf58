package alloctest

import (
	"context"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// cutting is a store that is gone after some commits.
type cutting struct {
	alloc.Store
	commits int
}

func (s *cutting) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	if s.commits--; s.commits < 0 {
		return 0, alloc.ErrUnavailable
	}
	return s.Store.Commit(ctx, tx)
}
