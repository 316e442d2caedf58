package server

import (
	"context"
	"fmt"
	"slices"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

type handoff struct {
	nsallocv1.UnimplementedHandoffServer
	*Server
}

// maxRunID is what Open takes.
const maxRunID = 64

func (s handoff) Open(ctx context.Context, req *nsallocv1.OpenRequest) (*nsallocv1.OpenResponse, error) {
	cmd, err := wire.OpenCommand(req, caller(ctx).Name)
	if err != nil {
		return nil, err
	}
	h, err := s.service.Open(ctx, cmd)
	if err != nil {
		return nil, err
	}
	return &nsallocv1.OpenResponse{Sandbox: wire.SandboxToWire(&h.Sandbox), Checkpoint: wire.CheckpointToWire(h.Checkpoint)}, nil
}

func (s handoff) Confirm(ctx context.Context, req *nsallocv1.ConfirmRequest) (*nsallocv1.ConfirmResponse, error) {
	h, err := s.service.Confirm(ctx, wire.ConfirmCommand(req, caller(ctx).Name))
	if err != nil {
		return nil, err
	}
	return &nsallocv1.ConfirmResponse{Sandbox: wire.SandboxToWire(&h.Sandbox), Checkpoint: wire.CheckpointToWire(h.Checkpoint)}, nil
}

func (s handoff) Abort(ctx context.Context, req *nsallocv1.AbortRequest) (*nsallocv1.AbortResponse, error) {
	h, err := s.service.Abort(ctx, wire.AbortCommand(req, caller(ctx).Name))
	if err != nil {
		return nil, err
	}
	return &nsallocv1.AbortResponse{Sandbox: wire.SandboxToWire(&h.Sandbox), Checkpoint: wire.CheckpointToWire(h.Checkpoint)}, nil
}

func (s handoff) Claim(ctx context.Context, req *nsallocv1.ClaimRequest) (*nsallocv1.ClaimResponse, error) {
	cmd, err := wire.ClaimCommand(req, caller(ctx).Name)
	if err != nil {
		return nil, err
	}
	answer, err := s.service.Claim(ctx, cmd)
	if err != nil {
		return nil, err
	}
	return wire.ClaimResponse(answer), nil
}

func (s handoff) Bind(ctx context.Context, req *nsallocv1.BindRequest) (*nsallocv1.BindResponse, error) {
	h, granted, err := s.service.Bind(ctx, wire.BindCommand(req, caller(ctx).Name))
	if err != nil {
		return nil, err
	}
	return &nsallocv1.BindResponse{Sandbox: wire.SandboxToWire(&h.Sandbox), Checkpoint: wire.CheckpointToWire(h.Checkpoint), Granted: wire.RangesToWire(granted)}, nil
}

func (s handoff) Release(ctx context.Context, req *nsallocv1.ReleaseRequest) (*nsallocv1.ReleaseResponse, error) {
	h, err := s.service.Release(ctx, wire.ReleaseCommand(req, caller(ctx).Name))
	if err != nil {
		return nil, err
	}
	return &nsallocv1.ReleaseResponse{Sandbox: wire.SandboxToWire(&h.Sandbox), Checkpoint: wire.CheckpointToWire(h.Checkpoint)}, nil
}

// Find is linearizable: an agent asks it at a restore, often moments after another host has dumped,
// and what it does not find it takes for images that the pool never heard of.
func (s handoff) Find(ctx context.Context, req *nsallocv1.FindRequest) (*nsallocv1.FindResponse, error) {
	var about string
	switch by := req.GetBy().(type) {
	case *nsallocv1.FindRequest_Serial:
		serial := alloc.Serial(by.Serial)
		if !serial.Valid() {
			return nil, invalid("serial", fmt.Sprintf("%d is out of range: generation and counter start at 1, the first bit is 0", by.Serial))
		}
		about = "checkpoint " + serial.String()
	case *nsallocv1.FindRequest_RunId:
		if by.RunId == "" || len(by.RunId) > maxRunID {
			return nil, invalid("run_id", fmt.Sprintf("it has %d bytes, 1 to %d are allowed", len(by.RunId), maxRunID))
		}
		about = "CRIU run " + by.RunId
	default:
		return nil, invalid("request", "it names neither a serial nor a run id")
	}
	var found *alloc.Checkpoint
	rev, err := s.view.read(ctx, true, func(ix *index) error {
		serial := alloc.Serial(req.GetSerial())
		if req.GetRunId() != "" {
			serial = ix.byRun[req.GetRunId()]
		}
		if found = ix.checkpoints[serial]; found == nil {
			notFound := &alloc.Error{Reason: alloc.ReasonCheckpointNotFound, Subject: about, Msg: "the pool has no such checkpoint", Fix: "check that the images are of this pool"}
			if req.GetRunId() != "" {
				return ix.hidden(notFound, alloc.KindCheckpoint)
			}
			return ix.missing(notFound, alloc.CheckpointKey(serial))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &nsallocv1.FindResponse{Checkpoint: wire.CheckpointToWire(found), Revision: int64(rev)}, nil
}

func (s handoff) ListCheckpoints(ctx context.Context, req *nsallocv1.ListCheckpointsRequest) (*nsallocv1.ListCheckpointsResponse, error) {
	size, err := pageSize(req.GetPageSize())
	if err != nil {
		return nil, err
	}
	after, err := afterSerial("checkpoints", req.GetPageToken())
	if err != nil {
		return nil, err
	}
	resp := &nsallocv1.ListCheckpointsResponse{}
	rev, err := s.view.read(ctx, false, func(ix *index) error {
		resp.Unreadable = ix.unread[alloc.KindCheckpoint]
		list := ix.cpOrder
		if req.GetSandbox() != 0 {
			list = ix.cpsOf[alloc.Serial(req.GetSandbox())]
		}
		at, there := slices.BinarySearch(list, after)
		if there {
			at++
		}
		for _, serial := range list[at:] {
			if len(resp.Checkpoints) == size {
				resp.NextPageToken = pageToken("checkpoints", alloc.Serial(resp.Checkpoints[size-1].GetSerial()).String())
				break
			}
			resp.Checkpoints = append(resp.Checkpoints, wire.CheckpointToWire(ix.checkpoints[serial]))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	resp.Revision = int64(rev)
	return resp, nil
}
