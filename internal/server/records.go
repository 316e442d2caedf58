package server

import (
	"context"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

type records struct {
	nsallocv1.UnimplementedRecordsServer
	*Server
}

func (s records) Check(ctx context.Context, _ *nsallocv1.CheckRequest) (*nsallocv1.CheckResponse, error) {
	report, err := s.service.Check(ctx)
	if err != nil {
		return nil, err
	}
	return wire.ReportToWire(report), nil
}

func (s records) Mend(ctx context.Context, req *nsallocv1.MendRequest) (*nsallocv1.MendResponse, error) {
	cmd := wire.MendCommand(req, caller(ctx).String())
	done, err := s.service.Mend(ctx, cmd)
	if err != nil {
		return nil, err
	}
	s.log.WarnContext(ctx, "mended, and what was there put aside", "kind", cmd.Kind, "id", cmd.ID, "records", len(done.Changed), "request", cmd.RequestID, "by", cmd.Actor)
	return wire.MendedToWire(done), nil
}

func (s records) SetPolicy(ctx context.Context, req *nsallocv1.SetPolicyRequest) (*nsallocv1.SetPolicyResponse, error) {
	pool, before, err := s.service.SetPolicy(ctx, wire.SetPolicyCommand(req))
	if err != nil {
		return nil, err
	}
	for _, f := range alloc.PolicyFields() {
		if was, is := f.Of(before), f.Of(pool.Policy); was != is {
			s.log.WarnContext(ctx, "the pool's policy was changed", "field", f.Name, "was", was, "is", is, "request", req.GetRequestId(), "by", caller(ctx).String())
		}
	}
	return &nsallocv1.SetPolicyResponse{Pool: wire.PoolToWire(pool)}, nil
}
