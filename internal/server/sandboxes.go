package server

import (
	"context"
	"fmt"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

type sandboxes struct {
	nsallocv1.UnimplementedSandboxesServer
	*Server
}

func (s sandboxes) Register(ctx context.Context, req *nsallocv1.RegisterRequest) (*nsallocv1.RegisterResponse, error) {
	cmd := wire.RegisterCommand(req, caller(ctx).Name)
	committed, granted, err := s.service.Register(ctx, cmd)
	if err != nil {
		return nil, err
	}
	return wire.RegisterResponse(cmd, committed, granted, req.GetBrief()), nil
}

func (s sandboxes) RegisterAgain(ctx context.Context, req *nsallocv1.RegisterAgainRequest) (*nsallocv1.RegisterAgainResponse, error) {
	cmd, err := wire.AgainCommand(req, caller(ctx).Name)
	if err != nil {
		return nil, err
	}
	answers, err := s.service.RegisterAgain(ctx, cmd)
	if err != nil {
		return nil, err
	}
	refused := 0
	for i, a := range answers {
		if a.Err != nil && len(cmd.Items[i].Bindings) > 0 && cmd.Items[i].Dump == nil {
			refused++
			s.log.ErrorContext(ctx, "a host registers a sandbox again that has gone on elsewhere, or is over: what lives of it there becomes a clone",
				"host", cmd.Host, "sandbox", cmd.Items[i].Sandbox, "epoch", cmd.Items[i].Epoch, "cause", a.Err)
		}
	}
	if cmd.Last {
		s.log.InfoContext(ctx, "a host has said what lives on it", "host", cmd.Host)
	}
	s.metrics.again.WithLabelValues(againDone).Add(float64(len(answers) - refused))
	s.metrics.again.WithLabelValues(againRefused).Add(float64(refused))
	return wire.AgainResponse(answers), nil
}

func (s sandboxes) End(ctx context.Context, req *nsallocv1.EndRequest) (*nsallocv1.EndResponse, error) {
	sb, err := s.service.End(ctx, wire.EndCommand(req, caller(ctx).Name))
	if err != nil {
		return nil, err
	}
	return &nsallocv1.EndResponse{Sandbox: wire.SandboxToWire(sb)}, nil
}

func (s sandboxes) Get(ctx context.Context, req *nsallocv1.SandboxesGetRequest) (*nsallocv1.SandboxesGetResponse, error) {
	find, err := question(req)
	if err != nil {
		return nil, err
	}
	resp := &nsallocv1.SandboxesGetResponse{}
	rev, err := s.view.read(ctx, req.GetLinearizable(), func(ix *index) error {
		e, err := find(ix)
		if err != nil {
			return err
		}
		// Under the lock, because which checkpoint is current stands in the packed record, and both must
		// be of one revision.
		if resp.Sandbox, err = e.unpack(); err != nil {
			return err
		}
		current := alloc.Serial(resp.Sandbox.GetCheckpoint())
		resp.Checkpoint = wire.CheckpointToWire(ix.checkpoints[current])
		// One that cannot be read is not none: an agent would take the dump for one that was never recorded.
		return ix.missing(nil, alloc.CheckpointKey(current))
	})
	if err != nil {
		return nil, err
	}
	resp.Revision = int64(rev)
	return resp, nil
}

// question checks what Get asks for and says how to find it.
func question(req *nsallocv1.SandboxesGetRequest) (func(*index) (*entry, error), error) {
	switch by := req.GetBy().(type) {
	case *nsallocv1.SandboxesGetRequest_Serial:
		serial := alloc.Serial(by.Serial)
		if !serial.Valid() {
			return nil, invalid("serial", fmt.Sprintf("%d is out of range: generation and counter start at 1, the first bit is 0", by.Serial))
		}
		return func(ix *index) (*entry, error) {
			if e := ix.sandbox(serial); e != nil {
				return e, nil
			}
			notFound := &alloc.Error{Reason: alloc.ReasonSerialNotFound, Subject: "serial " + serial.String(),
				Msg: "no sandbox, namespace or checkpoint of this pool has it", Fix: "check its digits, and that it is of this pool"}
			keys := []alloc.Key{alloc.SandboxKey(serial), alloc.CheckpointKey(serial)}
			if c := ix.checkpoints[serial]; c != nil {
				keys = append(keys, alloc.SandboxKey(c.Sandbox))
			}
			return nil, ix.missing(ix.hidden(notFound, alloc.KindSandbox), keys...)
		}, nil
	case *nsallocv1.SandboxesGetRequest_Namespace:
		ns := by.Namespace
		if err := alloc.ValidateName("host name", ns.GetHost()); err != nil {
			return nil, err
		}
		t := wire.NamespaceTypeFromWire(ns.GetType())
		switch {
		case !t.Valid():
			return nil, invalid("namespace type", fmt.Sprintf("%q is not one of %v", t, alloc.NamespaceTypes()))
		case ns.GetKernel().GetId() == 0 && ns.GetKernel().GetInode() == 0:
			return nil, invalid("namespace", "it names none: both kernel id and inode are 0")
		}
		if err := alloc.ValidateBootID(ns.GetKernel().GetBootId()); err != nil {
			return nil, err
		}
		return func(ix *index) (*entry, error) {
			if e := ix.namespace(ns.GetHost(), ns.GetType(), ns.GetKernel()); e != nil {
				return e, nil
			}
			return nil, ix.hidden(&alloc.Error{Reason: alloc.ReasonSerialNotFound,
				Subject: fmt.Sprintf("%s namespace %s", t, wire.KernelIDFromWire(ns.GetKernel()).Key(t)),
				Msg:     "no sandbox that is on host " + ns.GetHost() + " has it", Fix: "see `nsalloc ps` on that host"}, alloc.KindSandbox)
		}, nil
	}
	return nil, invalid("request", "it names neither a serial nor a namespace")
}

func (s sandboxes) List(ctx context.Context, req *nsallocv1.SandboxesListRequest) (*nsallocv1.SandboxesListResponse, error) {
	size, err := pageSize(req.GetPageSize())
	if err != nil {
		return nil, err
	}
	after, err := afterSerial("sandboxes", req.GetPageToken())
	if err != nil {
		return nil, err
	}
	if req.GetOwner() != "" {
		if err := alloc.ValidateName("host name", req.GetOwner()); err != nil {
			return nil, err
		}
	}
	var states [8]bool
	for _, st := range req.GetStates() {
		if _, known := nsallocv1.SandboxState_name[int32(st)]; !known || st == 0 {
			return nil, invalid("states", fmt.Sprintf("state %d is not known", st))
		}
		states[st] = true
	}
	var found []entry
	var unreadable uint64
	more := false
	rev, err := s.view.read(ctx, req.GetLinearizable(), func(ix *index) error {
		unreadable = ix.leftOut(req.GetOwner())
		bytes := 0
		for e := range ix.after(req.GetOwner(), after) {
			if len(req.GetStates()) > 0 && !states[e.state&7] {
				continue
			}
			if more = len(found) == size || bytes > maxPageBytes; more {
				break
			}
			found = append(found, *e)
			bytes += len(e.packed)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	resp := &nsallocv1.SandboxesListResponse{Revision: int64(rev), Unreadable: unreadable}
	for _, e := range found {
		sb, err := e.unpack()
		if err != nil {
			return nil, err
		}
		resp.Sandboxes = append(resp.Sandboxes, sb)
	}
	if more {
		resp.NextPageToken = pageToken("sandboxes", found[len(found)-1].serial.String())
	}
	return resp, nil
}

// History is read from the store itself: the view holds the records, and older stints are none.
func (s sandboxes) History(ctx context.Context, req *nsallocv1.SandboxesHistoryRequest) (*nsallocv1.SandboxesHistoryResponse, error) {
	serial := alloc.Serial(req.GetSerial())
	if !serial.Valid() {
		return nil, invalid("serial", fmt.Sprintf("%d is out of range: generation and counter start at 1, the first bit is 0", req.GetSerial()))
	}
	limit := int(req.GetLimit())
	if limit == 0 {
		limit = alloc.MaxHistory
	}
	stints, rev, err := s.service.History(ctx, serial, alloc.Epoch(req.GetAfter()), limit)
	if err != nil {
		return nil, err
	}
	resp := &nsallocv1.SandboxesHistoryResponse{Revision: int64(rev)}
	for _, st := range stints {
		resp.Stints = append(resp.Stints, wire.StintToWire(st))
	}
	return resp, nil
}
