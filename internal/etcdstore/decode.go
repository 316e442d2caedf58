package etcdstore

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/nsalloc/nsalloc/internal/storepb"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// decode reads the value that stands under a key. What it cannot read it refuses, ErrMalformed when
// no version can have written it and ErrFormat when a newer one may have; nobody repairs it by
// writing over it.
func decode(key alloc.Key, value []byte) (alloc.Record, error) {
	m := newMessage(key.Kind)
	if m == nil {
		return nil, malformed(key, fmt.Errorf("there is no kind %q", key.Kind))
	}
	if len(value) == 0 {
		err := malformed(key, fmt.Errorf("the value is empty"))
		err.Fix = "delete this key with etcdctl, and find out who else writes to the store"
		return nil, err
	}
	if err := proto.Unmarshal(value, m); err != nil {
		return nil, malformed(key, err)
	}
	if zero(m.ProtoReflect()) { // zeros that are written out: encode writes no such record
		return nil, malformed(key, fmt.Errorf("every field is zero"))
	}
	if err := newerThanThis(m); err != nil {
		return nil, &alloc.Error{Reason: alloc.ReasonFormat, Subject: "record " + key.String(),
			Msg: "a newer version wrote it", Fix: "run servers of that version, or a newer one", Err: err}
	}
	var d decoder
	rec := d.record(m)
	if d.err != nil {
		return nil, malformed(key, d.err)
	}
	if rec.Key() != key {
		return nil, malformed(key, fmt.Errorf("the value is of %s", rec.Key()))
	}
	return rec, nil
}

func malformed(key alloc.Key, err error) *alloc.Error {
	return &alloc.Error{Reason: alloc.ReasonMalformed, Subject: "record " + key.String(),
		Msg: "it cannot be read", Err: err,
		Fix: "restore this key from a backup, or find out who else writes to the store"}
}

// ownerIn is the owner in a sandbox's value that decode refuses, if the value is of that sandbox. It may be
// believed of a newer version's: the field's meaning changes only with alloc.FormatVersion.
func ownerIn(key alloc.Key, value []byte) string {
	var m storepb.Sandbox
	if key.Kind != alloc.KindSandbox || proto.Unmarshal(value, &m) != nil ||
		alloc.SandboxKey(alloc.Serial(m.Serial)) != key || alloc.ValidateName("host name", m.Owner) != nil {
		return ""
	}
	return m.Owner
}

func newMessage(kind alloc.Kind) proto.Message {
	switch kind {
	case alloc.KindPool:
		return new(storepb.Pool)
	case alloc.KindCounter:
		return new(storepb.Counter)
	case alloc.KindServer:
		return new(storepb.Server)
	case alloc.KindSlot:
		return new(storepb.Slot)
	case alloc.KindLane:
		return new(storepb.Lane)
	case alloc.KindHost:
		return new(storepb.Host)
	case alloc.KindSandbox:
		return new(storepb.Sandbox)
	case alloc.KindStint:
		return new(storepb.OldStint)
	case alloc.KindCheckpoint:
		return new(storepb.Checkpoint)
	case alloc.KindRequest:
		return new(storepb.Request)
	case alloc.KindAside:
		return new(storepb.Aside)
	}
	return nil
}

// zero reports whether m would be stored as no bytes at all.
func zero(m protoreflect.Message) bool {
	found := len(m.GetUnknown()) > 0
	m.Range(func(protoreflect.FieldDescriptor, protoreflect.Value) bool {
		found = true
		return false
	})
	return !found
}

// newerThanThis is newer, but for nearly all sandboxes without its walk by reflection, which takes as long as
// all the rest of reading one.
func newerThanThis(m proto.Message) error {
	if sb, ok := m.(*storepb.Sandbox); ok && plain(sb) {
		return nil
	}
	return newer(m.ProtoReflect(), true)
}

// plain reports whether newer finds nothing in m. Where it is not sure it says no, and newer decides.
func plain(m *storepb.Sandbox) bool {
	if !in(sandboxStates, m.State) || m.Claim != nil || !known(m.Created) || !known(m.Parent) {
		return false
	}
	for _, b := range m.Bindings {
		if !in(namespaceTypes, b.Type) || !known(b.Kernel) || !known(b.Bound) || !known(b.Gone) {
			return false
		}
	}
	for _, s := range m.Stints {
		if !in(stintBegans, s.Began) || !in(stintOvers, s.Over) || !known(s.From) || !known(s.To) {
			return false
		}
	}
	return !slices.ContainsFunc(m.Requests, func(r *storepb.RequestMark) bool { return !known(r) })
}

func in[D ~string, P ~int32](of enum[D, P], p P) bool {
	_, ok := of.domain[p]
	return ok
}

// known reports that a closed message has no fields that this version does not know; nil has none.
func known(m proto.Message) bool { return len(m.ProtoReflect().GetUnknown()) == 0 }

// newer finds what only a newer version can have written and what the domain cannot carry: unknown
// enum values, and unknown fields where no Extra keeps them.
func newer(m protoreflect.Message, open bool) (err error) {
	if n := len(m.GetUnknown()); n > 0 && !open {
		return fmt.Errorf("%d bytes of unknown fields in a %s", n, m.Descriptor().Name())
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.Enum() != nil:
			if f.Enum().Values().ByNumber(v.Enum()) == nil {
				err = fmt.Errorf("%s has the unknown value %d", f.Name(), v.Enum())
			}
		case f.IsMap() || f.Message() == nil:
		case f.IsList():
			for i := 0; i < v.List().Len() && err == nil; i++ {
				err = newer(v.List().Get(i).Message(), growing(f.Message()))
			}
		default:
			err = newer(v.Message(), growing(f.Message()))
		}
		return err == nil
	})
	return err
}

// growing tells the messages inside of records that have an Extra in the domain.
func growing(d protoreflect.MessageDescriptor) bool {
	switch d.Name() {
	case "Policy", "Claim", "Binding", "Stint":
		return true
	}
	return false
}

// decoder turns messages into domain values; err is the first thing that has no domain form.
type decoder struct{ err error }

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf(format, args...)
	}
}

func domain[D ~string, P ~int32](d *decoder, of enum[D, P], p P) D {
	v, ok := of.domain[p]
	if !ok {
		d.fail("the %s is missing", of.what)
	}
	return v
}

func (d *decoder) time(ts *timestamppb.Timestamp) time.Time {
	if ts == nil {
		return time.Time{}
	}
	if err := ts.CheckValid(); err != nil {
		d.fail("%w", err)
		return time.Time{}
	}
	return ts.AsTime()
}

func (d *decoder) digest(b []byte) (digest alloc.Digest) {
	if copy(digest[:], b) != len(digest) || len(b) != len(digest) {
		d.fail("a digest has %d bytes instead of %d", len(b), len(digest))
	}
	return digest
}

func (d *decoder) generation(g uint32) alloc.Generation {
	if g > math.MaxUint16 {
		d.fail("generation %d is out of range", g)
	}
	return alloc.Generation(g)
}

// unknown copies the fields that this version does not know; the buffer belongs to the client.
func unknown(m proto.Message) []byte {
	return bytes.Clone(m.ProtoReflect().GetUnknown())
}

func (d *decoder) record(m proto.Message) alloc.Record {
	switch m := m.(type) {
	case *storepb.Pool:
		return d.pool(m)
	case *storepb.Counter:
		return &alloc.Counter{Generation: d.generation(m.Generation), Next: m.Next, Nonce: m.Nonce, Extra: unknown(m)}
	case *storepb.Server:
		return &alloc.Server{Name: m.Name, Incarnation: m.Incarnation, Nonce: m.Nonce, Started: d.time(m.Started),
			Address: m.Address, Asked: m.Asked, Removed: m.Removed, Extra: unknown(m)}
	case *storepb.Slot:
		return &alloc.Slot{Server: m.Server, Life: m.Life, N: int(m.N), Writes: m.Writes, Nonce: m.Nonce, Extra: unknown(m)}
	case *storepb.Lane:
		return &alloc.Lane{ID: m.Id, Left: d.ranges(m.Left), Nonce: m.Nonce, At: d.time(m.At), Extra: unknown(m)}
	case *storepb.Host:
		return &alloc.Host{
			Name: m.Name, Incarnation: alloc.Incarnation(m.Incarnation), Nonce: m.Nonce, BootID: m.BootId,
			Granted: d.ranges(m.Granted), Labels: m.Labels, Hello: d.time(m.Hello),
			Requests: alloc.RequestLog{Marks: d.marks(m.Requests), Forgotten: m.Forgotten}, Settled: d.generation(m.Settled), Waived: d.generation(m.Waived),
			Quota: alloc.Quota{Since: d.time(m.QuotaSince), Used: m.QuotaUsed}, Extra: unknown(m),
		}
	case *storepb.Sandbox:
		return d.sandbox(m)
	case *storepb.OldStint:
		if m.Stint == nil {
			d.fail("the stint is missing")
		}
		return &alloc.OldStint{Sandbox: alloc.Serial(m.Sandbox), Stint: d.stint(m.Stint), Extra: unknown(m)}
	case *storepb.Checkpoint:
		return &alloc.Checkpoint{
			Serial: alloc.Serial(m.Serial), State: domain(d, checkpointStates, m.State), Sandbox: alloc.Serial(m.Sandbox),
			Epoch: alloc.Epoch(m.Epoch), Source: m.Source, RunID: m.RunId, Digest: d.digest(m.Digest),
			Claimant: d.claimant(m.Claimant), Created: d.time(m.Created), Consumed: d.time(m.Consumed), Extra: unknown(m),
		}
	case *storepb.Request:
		return &alloc.Request{ID: m.Id, Digest: d.digest(m.Digest), Ranges: d.ranges(m.Ranges), At: d.time(m.At), Extra: unknown(m)}
	case *storepb.Aside:
		return &alloc.Aside{
			Request: m.Request, Of: alloc.Key{Kind: alloc.Kind(m.Kind), ID: m.Id}, Value: m.Value, At: d.time(m.At), Actor: m.Actor, Digest: d.digest(m.Digest), Extra: unknown(m),
		}
	}
	panic(fmt.Sprintf("newMessage makes a %T and record does not know it", m))
}

func (d *decoder) pool(m *storepb.Pool) *alloc.Pool {
	if m.Policy == nil {
		d.fail("the policy is missing")
	}
	return &alloc.Pool{
		UUID: m.Uuid, Generation: d.generation(m.Generation), State: domain(d, poolStates, m.State),
		Policy: alloc.Policy{
			Live:    domain(d, actions, m.Policy.GetLive()),
			Over:    domain(d, actions, m.Policy.GetOver()),
			Unknown: domain(d, actions, m.Policy.GetUnknown()),

			HostQuota:      m.Policy.GetHostQuota(),
			UnheardWitness: domain(d, unheards, m.Policy.GetUnheardWitness()),
		},
		Format: int(m.Format), Nonce: m.Nonce, Target: d.generation(m.Target), Settled: d.generation(m.Settled), Raised: d.time(m.Raised), Created: d.time(m.Created), PolicyExtra: unknown(m.Policy), Extra: unknown(m),
	}
}

func (d *decoder) sandbox(m *storepb.Sandbox) *alloc.Sandbox {
	s := &alloc.Sandbox{
		Serial: alloc.Serial(m.Serial), State: domain(d, sandboxStates, m.State), Owner: m.Owner, Epoch: alloc.Epoch(m.Epoch),
		OfHost: m.OfHost, Labels: m.Labels, Checkpoint: alloc.Serial(m.Checkpoint), Created: d.time(m.Created),
		Requests: alloc.RequestLog{Marks: d.marks(m.Requests), Forgotten: m.Forgotten}, Again: d.generation(m.Again), Extra: unknown(m),
	}
	s.Bindings = slices.Grow(s.Bindings, len(m.Bindings))
	for _, b := range m.Bindings {
		s.Bindings = append(s.Bindings, d.binding(b))
	}
	for _, st := range m.Stints {
		s.Stints = append(s.Stints, d.stint(st))
	}
	if c := m.Claim; c != nil {
		s.Claim = &alloc.Claim{From: domain(d, sandboxStates, c.From), Exe: c.Exe, Extra: unknown(c)}
		if who := d.claimant(c.Claimant); who != nil {
			s.Claim.Claimant = *who
		} else {
			d.fail("the claim has no claimant")
		}
	}
	if p := m.Parent; p != nil {
		s.Parent = &alloc.Parent{Sandbox: alloc.Serial(p.Sandbox), Checkpoint: alloc.Serial(p.Checkpoint)}
	}
	return s
}

func (d *decoder) binding(m *storepb.Binding) alloc.Binding {
	b := alloc.Binding{
		Serial: alloc.Serial(m.Serial), Type: domain(d, namespaceTypes, m.Type), Parent: alloc.Serial(m.Parent),
		Bound: d.time(m.Bound), Gone: d.time(m.Gone), Extra: unknown(m),
	}
	if k := m.Kernel; k != nil {
		b.Kernel = alloc.KernelID{BootID: k.BootId, ID: k.Id, Inode: k.Inode, Weak: k.Weak}
	}
	return b
}

func (d *decoder) stint(m *storepb.Stint) alloc.Stint {
	return alloc.Stint{
		Host: m.GetHost(), Epoch: alloc.Epoch(m.GetEpoch()), From: d.time(m.GetFrom()), To: d.time(m.GetTo()),
		Began: domain(d, stintBegans, m.GetBegan()), Over: domain(d, stintOvers, m.GetOver()), Checkpoint: alloc.Serial(m.GetCheckpoint()), Actor: m.GetActor(),
		Extra: unknown(m),
	}
}

func (d *decoder) claimant(m *storepb.Claimant) *alloc.Claimant {
	if m == nil {
		return nil
	}
	return &alloc.Claimant{Host: m.Host, BootID: m.BootId, Run: m.Run}
}

func (d *decoder) ranges(ms []*storepb.Range) (rs alloc.Ranges) {
	for _, m := range ms {
		rs = append(rs, alloc.Range{First: alloc.Serial(m.First), Count: m.Count})
	}
	return rs
}

func (d *decoder) marks(ms []*storepb.RequestMark) (rs []alloc.RequestMark) {
	for _, m := range ms {
		rs = append(rs, alloc.RequestMark{ID: m.Id, Digest: d.digest(m.Digest)})
	}
	return rs
}
