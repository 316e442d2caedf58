package wire

import (
	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// WitnessRequest converts a question; who asks is said by the call.
func WitnessRequest(q alloc.Question) *nsallocv1.WitnessRequest {
	return &nsallocv1.WitnessRequest{PoolUuid: q.Pool, Nonce: q.Nonce}
}

// QuestionFromWire converts a question of a server.
func QuestionFromWire(r *nsallocv1.WitnessRequest, from string) alloc.Question {
	return alloc.Question{From: from, Pool: r.GetPoolUuid(), Nonce: r.GetNonce()}
}

// TestimonyToWire converts an answer.
func TestimonyToWire(t alloc.Testimony) *nsallocv1.WitnessResponse {
	return &nsallocv1.WitnessResponse{Server: t.Server, Says: sayings.value(t.Says), Why: t.Why, Generation: uint32(t.Generation)}
}

// TestimonyFromWire converts an answer. What it says in a word that this version does not have was not heard.
func TestimonyFromWire(r *nsallocv1.WitnessResponse) alloc.Testimony {
	return alloc.Testimony{Server: r.GetServer(), Says: saying(r.GetSays()), Why: r.GetWhy(), Generation: alloc.Generation(min(r.GetGeneration(), uint32(alloc.MaxGeneration)))}
}

func saying(s nsallocv1.Saying) alloc.Saying {
	if _, ok := sayings.words[s]; !ok {
		return alloc.SaysNothing
	}
	return sayings.word(s)
}

// StandingToWire converts what a server says of itself. How many generations it has taken does not cross the wire.
func StandingToWire(s alloc.Standing) *nsallocv1.Standing {
	m := &nsallocv1.Standing{Server: s.Server, Trusts: s.Trusts, Why: s.Why, NotBefore: timeToWire(s.NotBefore)}
	for _, o := range s.Others {
		m.Others = append(m.Others, &nsallocv1.OtherServer{Name: o.Server, Address: o.Address, Says: sayings.value(o.Says), Why: o.Why, Asked: timeToWire(o.Asked)})
	}
	return m
}

// StandingFromWire converts what a server says of itself; nil for nil.
func StandingFromWire(m *nsallocv1.Standing) *alloc.Standing {
	if m == nil {
		return nil
	}
	s := &alloc.Standing{Server: m.GetServer(), Trusts: m.GetTrusts(), Why: m.GetWhy(), NotBefore: timeFromWire(m.GetNotBefore())}
	for _, o := range m.GetOthers() {
		s.Others = append(s.Others, alloc.Other{Testimony: alloc.Testimony{Server: o.GetName(), Says: saying(o.GetSays()), Why: o.GetWhy()},
			Address: o.GetAddress(), Asked: timeFromWire(o.GetAsked())})
	}
	return s
}
