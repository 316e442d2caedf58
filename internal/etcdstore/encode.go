package etcdstore

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/nsalloc/nsalloc/internal/storepb"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// encode is the stored value of a record. A record that could not be read back is refused here,
// before anything is sent.
func encode(rec alloc.Record) ([]byte, error) {
	var e encoder
	m := e.record(rec)
	if e.err != nil {
		return nil, notStorable(rec, e.err)
	}
	// Deterministic for people who compare dumps; tokens do not need it, they are bytes as read.
	value, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, notStorable(rec, err)
	}
	if len(value) == 0 {
		// It would be a present record with the token of an absent one.
		return nil, notStorable(rec, fmt.Errorf("every field is zero"))
	}
	return value, nil
}

func notStorable(rec alloc.Record, err error) *alloc.Error {
	return &alloc.Error{Reason: alloc.ReasonInvalid, Subject: "record " + rec.Key().String(),
		Msg: "it cannot be stored, nothing was sent", Err: err}
}

// encoder turns domain values into messages; err is the first thing that has no stored form. Where times are the
// same, which is so for most of one record, its messages share one.
type encoder struct {
	err   error
	last  time.Time
	stamp *timestamppb.Timestamp // of last
}

func (e *encoder) fail(format string, args ...any) {
	if e.err == nil {
		e.err = fmt.Errorf(format, args...)
	}
}

func stored[D ~string, P ~int32](e *encoder, of enum[D, P], d D) P {
	p, ok := of.stored[d]
	if !ok {
		e.fail("%q is not a %s", d, of.what)
	}
	return p
}

func (e *encoder) time(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	if e.stamp != nil && e.last.Equal(t) {
		return e.stamp
	}
	e.last, e.stamp = t, timestamppb.New(t)
	if err := e.stamp.CheckValid(); err != nil {
		e.fail("time %v: %w", t, err)
	}
	return e.stamp
}

// extra puts back what decode found and did not know.
func extra[M proto.Message](m M, unknown []byte) M {
	if len(unknown) > 0 {
		m.ProtoReflect().SetUnknown(unknown)
	}
	return m
}

func (e *encoder) record(rec alloc.Record) proto.Message {
	switch r := rec.(type) {
	case *alloc.Pool:
		return e.pool(r)
	case *alloc.Counter:
		return extra(&storepb.Counter{Generation: uint32(r.Generation), Next: r.Next, Nonce: r.Nonce}, r.Extra)
	case *alloc.Server:
		return extra(&storepb.Server{Name: r.Name, Incarnation: r.Incarnation, Nonce: r.Nonce, Started: e.time(r.Started),
			Address: r.Address, Asked: r.Asked, Removed: r.Removed}, r.Extra)
	case *alloc.Slot:
		if r.N < 0 || int64(r.N) > int64(^uint32(0)) {
			e.fail("slot %d is out of range", r.N)
		}
		return extra(&storepb.Slot{Server: r.Server, Life: r.Life, N: uint32(r.N), Writes: r.Writes, Nonce: r.Nonce}, r.Extra)
	case *alloc.Lane:
		return extra(&storepb.Lane{Id: r.ID, Left: ranges(r.Left), Nonce: r.Nonce, At: e.time(r.At)}, r.Extra)
	case *alloc.Host:
		return extra(&storepb.Host{
			Name: r.Name, Incarnation: uint64(r.Incarnation), Nonce: r.Nonce, BootId: r.BootID,
			Granted: ranges(r.Granted), Labels: r.Labels, Hello: e.time(r.Hello), Requests: marks(r.Requests.Marks), Forgotten: r.Requests.Forgotten,
			QuotaSince: e.time(r.Quota.Since), QuotaUsed: r.Quota.Used,
			Settled: uint32(r.Settled), Waived: uint32(r.Waived),
		}, r.Extra)
	case *alloc.Sandbox:
		return e.sandbox(r)
	case *alloc.OldStint:
		return extra(&storepb.OldStint{Sandbox: uint64(r.Sandbox), Stint: e.stint(r.Stint)}, r.Extra)
	case *alloc.Checkpoint:
		return extra(&storepb.Checkpoint{
			Serial: uint64(r.Serial), State: stored(e, checkpointStates, r.State), Sandbox: uint64(r.Sandbox),
			Epoch: uint64(r.Epoch), Source: r.Source, RunId: r.RunID, Digest: r.Digest[:],
			Claimant: claimant(r.Claimant), Created: e.time(r.Created), Consumed: e.time(r.Consumed),
		}, r.Extra)
	case *alloc.Request:
		return extra(&storepb.Request{
			Id: r.ID, Digest: r.Digest[:], Ranges: ranges(r.Ranges), At: e.time(r.At),
		}, r.Extra)
	case *alloc.Aside:
		return extra(&storepb.Aside{
			Request: r.Request, Kind: string(r.Of.Kind), Id: r.Of.ID, Value: r.Value, At: e.time(r.At), Actor: r.Actor, Digest: r.Digest[:],
		}, r.Extra)
	default:
		e.fail("there is no stored form of a %T", rec)
		return nil
	}
}

func (e *encoder) pool(p *alloc.Pool) proto.Message {
	if p.Format < 0 || int64(p.Format) > int64(^uint32(0)) {
		e.fail("format %d is out of range", p.Format)
	}
	return extra(&storepb.Pool{
		Uuid: p.UUID, Generation: uint32(p.Generation), State: stored(e, poolStates, p.State),
		Policy: extra(&storepb.Policy{
			Live:    stored(e, actions, p.Policy.Live),
			Over:    stored(e, actions, p.Policy.Over),
			Unknown: stored(e, actions, p.Policy.Unknown),

			HostQuota:      p.Policy.HostQuota,
			UnheardWitness: stored(e, unheards, p.Policy.UnheardWitness),
		}, p.PolicyExtra),
		Format: uint32(p.Format), Nonce: p.Nonce, Target: uint32(p.Target), Settled: uint32(p.Settled), Raised: e.time(p.Raised), Created: e.time(p.Created),
	}, p.Extra)
}

func (e *encoder) sandbox(s *alloc.Sandbox) proto.Message {
	m := &storepb.Sandbox{
		Serial: uint64(s.Serial), State: stored(e, sandboxStates, s.State), Owner: s.Owner, Epoch: uint64(s.Epoch),
		OfHost: s.OfHost, Labels: s.Labels, Checkpoint: uint64(s.Checkpoint), Created: e.time(s.Created),
		Requests: marks(s.Requests.Marks), Forgotten: s.Requests.Forgotten, Again: uint32(s.Again),
	}
	m.Bindings = make([]*storepb.Binding, len(s.Bindings))
	made := make([]storedBinding, len(s.Bindings)) // at once: a registration has hundreds
	for i := range s.Bindings {
		m.Bindings[i] = e.binding(&made[i], &s.Bindings[i])
	}
	for _, st := range s.Stints {
		m.Stints = append(m.Stints, e.stint(st))
	}
	if c := s.Claim; c != nil {
		m.Claim = extra(&storepb.Claim{Claimant: claimant(&c.Claimant), From: stored(e, sandboxStates, c.From), Exe: c.Exe}, c.Extra)
	}
	if p := s.Parent; p != nil {
		m.Parent = &storepb.Parent{Sandbox: uint64(p.Sandbox), Checkpoint: uint64(p.Checkpoint)}
	}
	return extra(m, s.Extra)
}

// storedBinding is a binding's messages.
type storedBinding struct {
	binding storepb.Binding
	kernel  storepb.KernelID
}

func (e *encoder) binding(m *storedBinding, b *alloc.Binding) *storepb.Binding {
	m.binding.Serial, m.binding.Type, m.binding.Parent = uint64(b.Serial), stored(e, namespaceTypes, b.Type), uint64(b.Parent)
	m.binding.Bound, m.binding.Gone = e.time(b.Bound), e.time(b.Gone)
	if k := &b.Kernel; !k.IsZero() {
		m.kernel.BootId, m.kernel.Id, m.kernel.Inode, m.kernel.Weak = k.BootID, k.ID, k.Inode, k.Weak
		m.binding.Kernel = &m.kernel
	}
	return extra(&m.binding, b.Extra)
}

func (e *encoder) stint(s alloc.Stint) *storepb.Stint {
	return extra(&storepb.Stint{
		Host: s.Host, Epoch: uint64(s.Epoch), From: e.time(s.From), To: e.time(s.To),
		Began: stored(e, stintBegans, s.Began), Over: stored(e, stintOvers, s.Over), Checkpoint: uint64(s.Checkpoint), Actor: s.Actor,
	}, s.Extra)
}

func claimant(c *alloc.Claimant) *storepb.Claimant {
	if c == nil {
		return nil
	}
	return &storepb.Claimant{Host: c.Host, BootId: c.BootID, Run: c.Run}
}

func ranges(rs alloc.Ranges) (ms []*storepb.Range) {
	for _, r := range rs {
		ms = append(ms, &storepb.Range{First: uint64(r.First), Count: r.Count})
	}
	return ms
}

func marks(rs []alloc.RequestMark) (ms []*storepb.RequestMark) {
	for i := range rs {
		ms = append(ms, &storepb.RequestMark{Id: rs[i].ID, Digest: rs[i].Digest[:]})
	}
	return ms
}
