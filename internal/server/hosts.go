package server

import (
	"context"
	"slices"

	"google.golang.org/protobuf/proto"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

type hosts struct {
	nsallocv1.UnimplementedHostsServer
	*Server
}

func (s hosts) Hello(ctx context.Context, req *nsallocv1.HelloRequest) (*nsallocv1.HelloResponse, error) {
	cmd := wire.HelloCommand(req, caller(ctx).Name)
	var before *alloc.Host
	_, unseen := s.view.read(ctx, false, func(ix *index) error { before = ix.hosts[cmd.Host]; return nil })
	host, pool, err := s.service.Hello(ctx, cmd)
	if err != nil {
		return nil, err
	}
	if unseen == nil && cmd.Incarnation != host.Incarnation {
		s.logLife(ctx, before, host)
	}
	return &nsallocv1.HelloResponse{Host: wire.HostToWire(host), Pool: wire.PoolToWire(pool)}, nil
}

// logLife says that a life of a host's agent state has begun. before is the host as the view had it.
func (s hosts) logLife(ctx context.Context, before, host *alloc.Host) {
	switch {
	case before == nil:
		s.log.InfoContext(ctx, "a host joined", "host", host.Name, "incarnation", host.Incarnation, "boot_id", host.BootID)
	case before.Incarnation == host.Incarnation: // its first answer was lost
	case before.BootID == host.BootID:
		s.metrics.lives.Inc()
		s.log.WarnContext(ctx, "a host began a new incarnation within one boot: its agent's state was lost, or two agents have one name",
			"host", host.Name, "old", before.Incarnation, "new", host.Incarnation, "boot_id", host.BootID)
	default:
		s.metrics.lives.Inc()
		s.log.InfoContext(ctx, "a host began a new incarnation", "host", host.Name, "old", before.Incarnation, "new", host.Incarnation, "boot_id", host.BootID)
	}
}

func (s hosts) Grant(ctx context.Context, req *nsallocv1.GrantRequest) (*nsallocv1.GrantResponse, error) {
	granted, err := s.service.Grant(ctx, wire.GrantCommand(req, caller(ctx).Name))
	if err != nil {
		return nil, err
	}
	s.metrics.serials.WithLabelValues("grant").Add(float64(req.GetCount()))
	return &nsallocv1.GrantResponse{Granted: wire.RangesToWire(granted)}, nil
}

// maxWaitsFor is how many hosts an answer names.
const maxWaitsFor = 100

func (s hosts) Waive(ctx context.Context, req *nsallocv1.WaiveRequest) (*nsallocv1.WaiveResponse, error) {
	cmd := wire.WaiveCommand(req, caller(ctx).String())
	host, waitsFor, err := s.service.Waive(ctx, cmd)
	if err != nil {
		return nil, err
	}
	s.log.WarnContext(ctx, "nobody waits for a host any more to say what lives on it", "host", host.Name, "generation", host.Waived, "waits_for", len(waitsFor), "request", cmd.RequestID, "by", cmd.Actor)
	return &nsallocv1.WaiveResponse{Host: wire.HostToWire(host), WaitsFor: waitsFor[:min(len(waitsFor), maxWaitsFor)]}, nil
}

func (s hosts) Get(ctx context.Context, req *nsallocv1.HostsGetRequest) (*nsallocv1.HostsGetResponse, error) {
	if err := alloc.ValidateName("host name", req.GetName()); err != nil {
		return nil, err
	}
	var host *alloc.Host
	rev, err := s.view.read(ctx, false, func(ix *index) error {
		if host = ix.hosts[req.GetName()]; host == nil {
			return ix.missing(&alloc.Error{Reason: alloc.ReasonHostUnknown, Subject: "host " + req.GetName(), Msg: "the pool does not know it",
				Fix: "start its nsalloc-agent, which says Hello first"}, alloc.HostKey(req.GetName()))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &nsallocv1.HostsGetResponse{Host: wire.HostToWire(host), Revision: int64(rev)}, nil
}

func (s hosts) List(ctx context.Context, req *nsallocv1.HostsListRequest) (*nsallocv1.HostsListResponse, error) {
	size, err := pageSize(req.GetPageSize())
	if err != nil {
		return nil, err
	}
	after, err := afterToken("hosts", req.GetPageToken())
	if err != nil {
		return nil, err
	}
	var found []*alloc.Host
	var unreadable uint64
	rev, err := s.view.read(ctx, false, func(ix *index) error {
		unreadable = ix.unread[alloc.KindHost]
		at, there := slices.BinarySearch(ix.hostOrder, after)
		if there {
			at++
		}
		for ; at < len(ix.hostOrder) && len(found) <= size; at++ {
			found = append(found, ix.hosts[ix.hostOrder[at]])
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	resp := &nsallocv1.HostsListResponse{Revision: int64(rev), Unreadable: unreadable}
	bytes := 0
	for i, h := range found {
		if i == size || bytes > maxPageBytes {
			resp.NextPageToken = pageToken("hosts", found[i-1].Name)
			break
		}
		msg := wire.HostToWire(h)
		bytes += proto.Size(msg)
		resp.Hosts = append(resp.Hosts, msg)
	}
	return resp, nil
}
