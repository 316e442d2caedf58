package server

import (
	"context"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
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
