package wire

import (
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// RangesToWire converts ranges.
func RangesToWire(rs alloc.Ranges) []*nsallocv1.Range {
	out := make([]*nsallocv1.Range, 0, len(rs))
	for _, r := range rs {
		out = append(out, &nsallocv1.Range{First: uint64(r.First), Count: r.Count})
	}
	return out
}

// RangesFromWire converts ranges as they are; who spends them validates them.
func RangesFromWire(rs []*nsallocv1.Range) alloc.Ranges {
	var out alloc.Ranges
	for _, r := range rs {
		out = append(out, alloc.Range{First: alloc.Serial(r.GetFirst()), Count: r.GetCount()})
	}
	return out
}

// KernelIDToWire converts a kernel identity; one that identifies nothing is absent.
func KernelIDToWire(k alloc.KernelID) *nsallocv1.KernelId {
	if k.IsZero() {
		return nil
	}
	return &nsallocv1.KernelId{BootId: k.BootID, Id: k.ID, Inode: k.Inode, Weak: k.Weak}
}

// KernelIDFromWire converts a kernel identity.
func KernelIDFromWire(k *nsallocv1.KernelId) alloc.KernelID {
	return alloc.KernelID{BootID: k.GetBootId(), ID: k.GetId(), Inode: k.GetInode(), Weak: k.GetWeak()}
}

// BindingToWire converts a binding.
func BindingToWire(b alloc.Binding) *nsallocv1.Binding {
	return bindingsToWire([]alloc.Binding{b}, new(stamps))[0]
}

// BindingFromWire converts a binding.
func BindingFromWire(b *nsallocv1.Binding) alloc.Binding {
	return alloc.Binding{
		Serial: alloc.Serial(b.GetSerial()),
		Type:   namespaceTypes.word(b.GetType()),
		Kernel: KernelIDFromWire(b.GetKernel()),
		Parent: alloc.Serial(b.GetParent()),
		Bound:  timeFromWire(b.GetBound()),
		Gone:   timeFromWire(b.GetGone()),
	}
}

// bindingsToWire makes all messages at once: one registration's answer has thousands.
func bindingsToWire(bs []alloc.Binding, times *stamps) []*nsallocv1.Binding {
	out := make([]*nsallocv1.Binding, len(bs))
	made := make([]struct {
		binding nsallocv1.Binding
		kernel  nsallocv1.KernelId
	}, len(bs))
	for i := range bs {
		b, m := &bs[i], &made[i]
		m.binding.Serial, m.binding.Type, m.binding.Parent = uint64(b.Serial), namespaceTypes.value(b.Type), uint64(b.Parent)
		m.binding.Bound, m.binding.Gone = times.wire(b.Bound), times.wire(b.Gone)
		if k := &b.Kernel; !k.IsZero() {
			m.kernel.BootId, m.kernel.Id, m.kernel.Inode, m.kernel.Weak = k.BootID, k.ID, k.Inode, k.Weak
			m.binding.Kernel = &m.kernel
		}
		out[i] = &m.binding
	}
	return out
}

func bindingsFromWire(bs []*nsallocv1.Binding) []alloc.Binding {
	var out []alloc.Binding // nil where there are none
	if len(bs) > 0 {
		out = make([]alloc.Binding, 0, len(bs))
	}
	for _, b := range bs {
		out = append(out, BindingFromWire(b))
	}
	return out
}

// requestBindings leaves out what the wire says is ignored in requests, so that it does not make two
// requests differ that mean the same.
func requestBindings(bs []*nsallocv1.Binding) []alloc.Binding {
	out := bindingsFromWire(bs)
	for i := range out {
		out[i].Bound, out[i].Gone = timeFromWire(nil), timeFromWire(nil)
	}
	return out
}

// ClaimantToWire converts a claimant.
func ClaimantToWire(c alloc.Claimant) *nsallocv1.Claimant {
	return &nsallocv1.Claimant{Host: c.Host, BootId: c.BootID, Run: c.Run}
}

// ClaimantFromWire converts a claimant.
func ClaimantFromWire(c *nsallocv1.Claimant) alloc.Claimant {
	return alloc.Claimant{Host: c.GetHost(), BootID: c.GetBootId(), Run: c.GetRun()}
}

// SandboxToWire converts a sandbox. Where times are the same the messages share one.
func SandboxToWire(s *alloc.Sandbox) *nsallocv1.Sandbox {
	if s == nil {
		return nil
	}
	var times stamps
	out := &nsallocv1.Sandbox{
		Serial:     uint64(s.Serial),
		State:      sandboxStates.value(s.State),
		Owner:      s.Owner,
		Epoch:      uint64(s.Epoch),
		OfHost:     s.OfHost,
		Bindings:   bindingsToWire(s.Bindings, &times),
		Labels:     s.Labels,
		Checkpoint: uint64(s.Checkpoint),
		Created:    times.wire(s.Created),
		Again:      uint32(s.Again),
	}
	for _, st := range s.Stints {
		out.Stints = append(out.Stints, stintToWire(st, &times))
	}
	if s.Claim != nil {
		out.Claimant, out.ClaimExe = ClaimantToWire(s.Claim.Claimant), s.Claim.Exe
	}
	if s.Parent != nil {
		out.Parent, out.ParentCheckpoint = uint64(s.Parent.Sandbox), uint64(s.Parent.Checkpoint)
	}
	return out
}

// SandboxFromWire converts a sandbox. Where a claim goes back to (Claim.From) does not cross the wire.
func SandboxFromWire(s *nsallocv1.Sandbox) *alloc.Sandbox {
	if s == nil {
		return nil
	}
	out := &alloc.Sandbox{
		Serial:     alloc.Serial(s.GetSerial()),
		State:      sandboxStates.word(s.GetState()),
		Owner:      s.GetOwner(),
		Epoch:      alloc.Epoch(s.GetEpoch()),
		OfHost:     s.GetOfHost(),
		Bindings:   bindingsFromWire(s.GetBindings()),
		Labels:     labels(s.GetLabels()),
		Checkpoint: alloc.Serial(s.GetCheckpoint()),
		Created:    timeFromWire(s.GetCreated()),
		Again:      alloc.Generation(s.GetAgain()),
	}
	for _, st := range s.GetStints() {
		out.Stints = append(out.Stints, StintFromWire(st))
	}
	if c := s.GetClaimant(); c != nil {
		out.Claim = &alloc.Claim{Claimant: ClaimantFromWire(c), Exe: s.GetClaimExe()}
	}
	if s.GetParent() != 0 || s.GetParentCheckpoint() != 0 {
		out.Parent = &alloc.Parent{Sandbox: alloc.Serial(s.GetParent()), Checkpoint: alloc.Serial(s.GetParentCheckpoint())}
	}
	return out
}

// StintToWire converts a stint.
func StintToWire(st alloc.Stint) *nsallocv1.Stint { return stintToWire(st, new(stamps)) }

func stintToWire(st alloc.Stint, times *stamps) *nsallocv1.Stint {
	return &nsallocv1.Stint{
		Host:       st.Host,
		Epoch:      uint64(st.Epoch),
		From:       times.wire(st.From),
		To:         times.wire(st.To),
		Began:      stintBegans.value(st.Began),
		Over:       stintOvers.value(st.Over),
		Checkpoint: uint64(st.Checkpoint),
		Actor:      st.Actor,
	}
}

// StintFromWire converts a stint.
func StintFromWire(st *nsallocv1.Stint) alloc.Stint {
	return alloc.Stint{
		Host:       st.GetHost(),
		Epoch:      alloc.Epoch(st.GetEpoch()),
		From:       timeFromWire(st.GetFrom()),
		To:         timeFromWire(st.GetTo()),
		Began:      stintBegans.word(st.GetBegan()),
		Over:       stintOvers.word(st.GetOver()),
		Checkpoint: alloc.Serial(st.GetCheckpoint()),
		Actor:      st.GetActor(),
	}
}

// CheckpointToWire converts a checkpoint.
func CheckpointToWire(c *alloc.Checkpoint) *nsallocv1.Checkpoint {
	if c == nil {
		return nil
	}
	out := &nsallocv1.Checkpoint{
		Serial:   uint64(c.Serial),
		State:    checkpointStates.value(c.State),
		Sandbox:  uint64(c.Sandbox),
		Epoch:    uint64(c.Epoch),
		Source:   c.Source,
		RunId:    c.RunID,
		Digest:   c.Digest[:],
		Created:  timeToWire(c.Created),
		Consumed: timeToWire(c.Consumed),
	}
	if c.Claimant != nil {
		out.Claimant = ClaimantToWire(*c.Claimant)
	}
	return out
}

// CheckpointFromWire converts a checkpoint.
func CheckpointFromWire(c *nsallocv1.Checkpoint) *alloc.Checkpoint {
	if c == nil {
		return nil
	}
	out := &alloc.Checkpoint{
		Serial:   alloc.Serial(c.GetSerial()),
		State:    checkpointStates.word(c.GetState()),
		Sandbox:  alloc.Serial(c.GetSandbox()),
		Epoch:    alloc.Epoch(c.GetEpoch()),
		Source:   c.GetSource(),
		RunID:    c.GetRunId(),
		Created:  timeFromWire(c.GetCreated()),
		Consumed: timeFromWire(c.GetConsumed()),
	}
	copy(out.Digest[:], c.GetDigest())
	if c.GetClaimant() != nil {
		claimant := ClaimantFromWire(c.GetClaimant())
		out.Claimant = &claimant
	}
	return out
}

// HandoffFromWire puts the two records of a hand-off's answer together.
func HandoffFromWire(s *nsallocv1.Sandbox, c *nsallocv1.Checkpoint) alloc.Handoff {
	h := alloc.Handoff{Checkpoint: CheckpointFromWire(c)}
	if s != nil {
		h.Sandbox = *SandboxFromWire(s)
	}
	return h
}

// HostToWire converts a host. Its nonce stays with the store and its agent.
func HostToWire(h *alloc.Host) *nsallocv1.Host {
	if h == nil {
		return nil
	}
	return &nsallocv1.Host{
		Name:        h.Name,
		Incarnation: uint64(h.Incarnation),
		BootId:      h.BootID,
		Granted:     RangesToWire(h.Granted),
		Labels:      h.Labels,
		Hello:       timeToWire(h.Hello),
		QuotaSince:  timeToWire(h.Quota.Since),
		QuotaUsed:   h.Quota.Used,
		Settled:     uint32(h.Settled),
		Waived:      uint32(h.Waived),
	}
}

// HostFromWire converts a host.
func HostFromWire(h *nsallocv1.Host) *alloc.Host {
	if h == nil {
		return nil
	}
	return &alloc.Host{
		Name:        h.GetName(),
		Incarnation: alloc.Incarnation(h.GetIncarnation()),
		BootID:      h.GetBootId(),
		Granted:     RangesFromWire(h.GetGranted()),
		Labels:      labels(h.GetLabels()),
		Hello:       timeFromWire(h.GetHello()),
		Quota:       alloc.Quota{Since: timeFromWire(h.GetQuotaSince()), Used: h.GetQuotaUsed()},
		Settled:     alloc.Generation(h.GetSettled()),
		Waived:      alloc.Generation(h.GetWaived()),
	}
}

// PoolToWire converts the pool's record.
func PoolToWire(p *alloc.Pool) *nsallocv1.Pool {
	if p == nil {
		return nil
	}
	quota, _ := p.Policy.Quota()
	return &nsallocv1.Pool{
		Uuid:       p.UUID,
		Generation: uint32(p.Generation),
		State:      poolStates.value(p.State),
		Format:     uint32(max(p.Format, 0)),
		Settled:    uint32(p.Settled),
		Policy: &nsallocv1.Policy{
			Live:    policyActions.value(p.Policy.Live),
			Over:    policyActions.value(p.Policy.Over),
			Unknown: policyActions.value(p.Policy.Unknown),

			HostQuota:      quota,
			UnheardWitness: unheards.value(p.Policy.UnheardWitness),
		},
	}
}

// LevelToWire converts what a pool has left.
func LevelToWire(l alloc.Level) *nsallocv1.PoolLevel {
	m := &nsallocv1.PoolLevel{Next: l.Next, Left: l.Left, Generations: uint32(max(l.Generations, 0)), Burn: l.Burn}
	if l.Over > 0 {
		m.Over = durationpb.New(l.Over)
	}
	if !l.RunsOut.IsZero() {
		m.RunsOut = timestamppb.New(l.RunsOut)
	}
	return m
}

// LevelFromWire converts what a pool has left; the zero Level for nil.
func LevelFromWire(m *nsallocv1.PoolLevel) alloc.Level {
	l := alloc.Level{Next: m.GetNext(), Left: m.GetLeft(), Generations: int(m.GetGenerations()), Burn: m.GetBurn(), Over: m.GetOver().AsDuration()}
	if m.GetRunsOut() != nil {
		l.RunsOut = m.GetRunsOut().AsTime()
	}
	return l
}

// PoolFromWire converts the pool's record.
func PoolFromWire(p *nsallocv1.Pool) *alloc.Pool {
	if p == nil {
		return nil
	}
	quota := p.GetPolicy().GetHostQuota()
	if quota == 0 {
		quota = alloc.NoHostQuota // a server of before there were quotas keeps none either
	}
	return &alloc.Pool{
		UUID:       p.GetUuid(),
		Generation: alloc.Generation(p.GetGeneration()),
		State:      poolStates.word(p.GetState()),
		Format:     int(p.GetFormat()),
		Settled:    alloc.Generation(p.GetSettled()),
		Policy: alloc.Policy{
			Live:    policyActions.word(p.GetPolicy().GetLive()),
			Over:    policyActions.word(p.GetPolicy().GetOver()),
			Unknown: policyActions.word(p.GetPolicy().GetUnknown()),

			HostQuota:      quota,
			UnheardWitness: unheards.word(p.GetPolicy().GetUnheardWitness()),
		},
	}
}
