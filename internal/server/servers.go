package server

import (
	"context"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

// Witness is what this server has seen of its store, and how it asks others for theirs.
type Witness interface {
	// Answer says what this server's witness says of the asker's store; see Servers.Witness.
	Answer(ctx context.Context, q alloc.Question) (alloc.Testimony, error)
	// Standing says whether this server trusts its store.
	Standing() alloc.Standing
	// Present asks who answers at an address.
	Present(ctx context.Context, address string) (name string, err error)
	// Known is the last life of another server that this one has seen; ok is false for one that it does not know.
	Known(name string) (life uint64, ok bool)
}

type servers struct {
	nsallocv1.UnimplementedServersServer
	*Server
}

// presentIn is how long a server is asked whether it answers.
const presentIn = 2 * time.Second

func (s servers) Witness(ctx context.Context, req *nsallocv1.WitnessRequest) (*nsallocv1.WitnessResponse, error) {
	if s.cfg.Witness == nil {
		return nil, errNoWitness
	}
	t, err := s.cfg.Witness.Answer(ctx, wire.QuestionFromWire(req, caller(ctx).Name))
	if err != nil {
		return nil, err
	}
	return wire.TestimonyToWire(t), nil
}

var errNoWitness = &alloc.Error{Reason: alloc.ReasonUnavailable, Msg: "this server has no witness", Fix: "ask another one"}

func (s servers) List(ctx context.Context, _ *nsallocv1.ServersListRequest) (*nsallocv1.ServersListResponse, error) {
	found, err := s.service.Servers(ctx)
	if err != nil {
		return nil, err
	}
	resp := &nsallocv1.ServersListResponse{}
	var wg sync.WaitGroup
	for _, rec := range found {
		if !rec.Listed() {
			continue
		}
		info := &nsallocv1.ServerInfo{Name: rec.Name, Address: rec.Address, Life: rec.Incarnation}
		if !rec.Started.IsZero() {
			info.Started = timestamppb.New(rec.Started)
		}
		resp.Servers = append(resp.Servers, info)
		wg.Go(func() {
			if err := s.present(ctx, rec); err != nil {
				info.Trouble = err.Error()
				return
			}
			info.Answers = true
		})
	}
	wg.Wait()
	return resp, nil
}

// present asks a server whether it is there.
func (s servers) present(ctx context.Context, rec *alloc.Server) error {
	switch {
	case s.cfg.Witness == nil:
		return errNoWitness
	case rec.Name == s.cfg.Witness.Standing().Server:
		return nil
	case rec.Address == "":
		return &alloc.Error{Reason: alloc.ReasonUnavailable, Subject: "server " + rec.Name, Msg: "it has said no address"}
	}
	ctx, cancel := context.WithTimeout(ctx, presentIn)
	defer cancel()
	name, err := s.cfg.Witness.Present(ctx, rec.Address)
	if err == nil && name != rec.Name {
		err = &alloc.Error{Reason: alloc.ReasonUnavailable, Subject: "server " + rec.Name, Msg: "at " + rec.Address + " server " + name + " answers"}
	}
	return err
}

func (s servers) Remove(ctx context.Context, req *nsallocv1.ServersRemoveRequest) (*nsallocv1.ServersRemoveResponse, error) {
	if err := alloc.ValidateName("server name", req.GetName()); err != nil {
		return nil, err
	}
	found, err := s.service.Servers(ctx)
	if err != nil {
		return nil, err
	}
	life, known := req.GetLife(), req.GetForce()
	if i := slices.IndexFunc(found, func(rec *alloc.Server) bool { return rec.Name == req.GetName() }); i >= 0 {
		known = true
		if !req.GetForce() && found[i].Listed() && s.present(ctx, found[i]) == nil {
			return nil, &alloc.Error{Reason: alloc.ReasonServerAnswers, Subject: "server " + req.GetName(), Msg: "it answers at " + found[i].Address + "; nothing was changed",
				Fix: "end it first; or, if what it has seen of the store may be lost: --force"}
		}
	}
	if s.cfg.Witness != nil {
		seen, ok := s.cfg.Witness.Known(req.GetName())
		life, known = max(life, seen), known || ok
	}
	if !known {
		return nil, &alloc.Error{Reason: alloc.ReasonRecordNotFound, Subject: "server " + req.GetName(), Msg: "the pool has no such server",
			Fix: "nsalloc server list shows them; one that the store has forgotten, and other servers wait for, is removed with --force"}
	}
	if _, err := s.service.RemoveServer(ctx, req.GetName(), life); err != nil {
		return nil, err
	}
	s.log.WarnContext(ctx, "a server was removed: the others do not ask it any more what it has seen", "server", req.GetName(), "life", life, "by", caller(ctx).String())
	return &nsallocv1.ServersRemoveResponse{}, nil
}
