package server

import (
	"context"
	"time"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

type allocator struct {
	nsallocv1.UnimplementedAllocatorServer
	*Server
}

func (s allocator) Allocate(ctx context.Context, req *nsallocv1.AllocateRequest) (*nsallocv1.AllocateResponse, error) {
	ctx, cancel := early(ctx)
	defer cancel()
	ranges, err := s.service.Allocate(ctx, wire.AllocateCommand(req, caller(ctx).String()))
	if err != nil {
		return nil, err
	}
	s.metrics.allocate.Add(float64(ranges.Count()))
	return &nsallocv1.AllocateResponse{Ranges: wire.RangesToWire(ranges)}, nil
}

// early ends a moment before ctx does, so that a call whose turn did not come is told so, with when to try
// again, before its caller gives up.
func early(ctx context.Context) (context.Context, context.CancelFunc) {
	deadline, ok := ctx.Deadline()
	if !ok {
		return context.WithCancel(ctx)
	}
	return context.WithDeadline(ctx, deadline.Add(-min(time.Until(deadline)/5, time.Second)))
}

func (s allocator) GetPool(ctx context.Context, _ *nsallocv1.GetPoolRequest) (*nsallocv1.GetPoolResponse, error) {
	var pool *alloc.Pool
	var unreadable uint64
	var level *nsallocv1.PoolLevel
	rev, err := s.view.read(ctx, false, func(ix *index) error {
		if ix.counter != nil {
			level = wire.LevelToWire(s.view.gauge.Level(ix.counter, s.view.now()))
		}
		pool, unreadable = ix.pool, uint64(len(ix.unreadable)) // not the pool itself, or there is no answer
		return nil
	})
	if err != nil {
		return nil, err
	}
	resp := &nsallocv1.GetPoolResponse{Pool: wire.PoolToWire(pool), Revision: int64(rev), Unreadable: unreadable, Level: level}
	if s.cfg.Witness != nil {
		resp.Standing = wire.StandingToWire(s.cfg.Witness.Standing())
	}
	return resp, nil
}
