package wire

import (
	"fmt"
	"slices"
	"time"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Each mutation in both directions. The caller's name never crosses in a body: the server knows it.

// AllocateRequest is cmd on the wire.
func AllocateRequest(cmd alloc.AllocateCommand) *nsallocv1.AllocateRequest {
	return &nsallocv1.AllocateRequest{RequestId: cmd.RequestID, Count: cmd.Count}
}

// AllocateCommand is what a caller asked for.
func AllocateCommand(req *nsallocv1.AllocateRequest, caller string) alloc.AllocateCommand {
	return alloc.AllocateCommand{RequestID: req.GetRequestId(), Caller: caller, Count: req.GetCount()}
}

// HelloRequest is cmd on the wire.
func HelloRequest(cmd alloc.HelloCommand) *nsallocv1.HelloRequest {
	return &nsallocv1.HelloRequest{
		RequestId: cmd.RequestID, BootId: cmd.BootID, Incarnation: uint64(cmd.Incarnation),
		Nonce: cmd.Nonce, PoolUuid: cmd.PoolUUID, Labels: cmd.Labels,
		SeenGeneration: uint32(cmd.Seen.Generation), SeenHighest: uint64(cmd.Seen.Highest), SeenSpent: uint64(cmd.Seen.Spent),
		SeenSandbox: uint64(cmd.Seen.Sandbox), SeenEpoch: uint64(cmd.Seen.Epoch),
	}
}

// HelloCommand is what a host asked for.
func HelloCommand(req *nsallocv1.HelloRequest, host string) alloc.HelloCommand {
	return alloc.HelloCommand{
		Seen: alloc.Seen{Generation: generation(req.GetSeenGeneration()), Highest: alloc.Serial(req.GetSeenHighest()), Spent: alloc.Serial(req.GetSeenSpent()),
			Sandbox: alloc.Serial(req.GetSeenSandbox()), Epoch: alloc.Epoch(req.GetSeenEpoch())},
		RequestID: req.GetRequestId(), Host: host, BootID: req.GetBootId(), Incarnation: alloc.Incarnation(req.GetIncarnation()),
		Nonce: req.GetNonce(), PoolUUID: req.GetPoolUuid(), Labels: labels(req.GetLabels()),
	}
}

// GrantRequest is cmd on the wire.
func GrantRequest(cmd alloc.GrantCommand) *nsallocv1.GrantRequest {
	return &nsallocv1.GrantRequest{RequestId: cmd.RequestID, Incarnation: uint64(cmd.Incarnation), Count: cmd.Count}
}

// GrantCommand is what a host asked for.
func GrantCommand(req *nsallocv1.GrantRequest, host string) alloc.GrantCommand {
	return alloc.GrantCommand{Mutation: mutation(req, host), Count: req.GetCount()}
}

// RegisterRequest is cmd on the wire.
func RegisterRequest(cmd alloc.RegisterCommand) *nsallocv1.RegisterRequest {
	req := &nsallocv1.RegisterRequest{RequestId: cmd.RequestID, Incarnation: uint64(cmd.Incarnation), Spend: RangesToWire(cmd.Spend), Brief: true}
	var times stamps
	for _, it := range cmd.Items {
		req.Items = append(req.Items, &nsallocv1.RegisterItem{
			Sandbox: uint64(it.Sandbox), Epoch: uint64(it.Epoch), Add: bindingsToWire(it.Add, &times), Gone: serialsToWire(it.Gone),
			Labels: it.Labels, OfHost: it.OfHost, ParentCheckpoint: uint64(it.ParentCheckpoint), Part: serialsToWire(it.Part),
		})
	}
	return req
}

// RegisterCommand is what a host asked for.
func RegisterCommand(req *nsallocv1.RegisterRequest, host string) alloc.RegisterCommand {
	cmd := alloc.RegisterCommand{Mutation: mutation(req, host), Spend: RangesFromWire(req.GetSpend())}
	for _, it := range req.GetItems() {
		cmd.Items = append(cmd.Items, alloc.RegisterItem{
			Sandbox: alloc.Serial(it.GetSandbox()), Epoch: alloc.Epoch(it.GetEpoch()), Add: requestBindings(it.GetAdd()), Gone: serialsFromWire(it.GetGone()),
			Labels: labels(it.GetLabels()), OfHost: it.GetOfHost(), ParentCheckpoint: alloc.Serial(it.GetParentCheckpoint()), Part: serialsFromWire(it.GetPart()),
		})
	}
	return cmd
}

// RegisterResponse is what cmd committed. A brief one leaves out the bindings that RegisterAnswer knows from cmd.
func RegisterResponse(cmd alloc.RegisterCommand, committed []*alloc.Sandbox, granted alloc.Ranges, brief bool) *nsallocv1.RegisterResponse {
	resp := &nsallocv1.RegisterResponse{Granted: RangesToWire(granted), Sandboxes: make([]*nsallocv1.Sandbox, 0, len(committed))}
	for i, sb := range committed {
		if brief && asAdded(sb, cmd.Items[i].Add) {
			without := *sb
			without.Bindings = nil
			sb, resp.AsAdded = &without, append(resp.AsAdded, uint64(sb.Serial))
		}
		resp.Sandboxes = append(resp.Sandboxes, SandboxToWire(sb))
	}
	return resp
}

// asAdded reports whether a sandbox has what an item adds, in that order, and nothing else. A retry finds what
// became of it since.
func asAdded(sb *alloc.Sandbox, add []alloc.Binding) bool {
	return slices.EqualFunc(sb.Bindings, add, func(b, a alloc.Binding) bool {
		return b.Serial == a.Serial && b.Type == a.Type && b.Kernel == a.Kernel && b.Parent == a.Parent && b.Bound.Equal(sb.Created) && b.Gone.IsZero()
	})
}

// RegisterAnswer is what the server answers to cmd.
func RegisterAnswer(cmd alloc.RegisterCommand, resp *nsallocv1.RegisterResponse) ([]*alloc.Sandbox, alloc.Ranges) {
	out, left := make([]*alloc.Sandbox, 0, len(resp.GetSandboxes())), resp.GetAsAdded()
	for i, s := range resp.GetSandboxes() {
		sb := SandboxFromWire(s)
		if i < len(cmd.Items) && len(left) > 0 && left[0] == s.GetSerial() { // in the same order
			left = left[1:]
			sb.Bindings = slices.Clone(cmd.Items[i].Add)
			for k := range sb.Bindings {
				sb.Bindings[k].Bound, sb.Bindings[k].Gone = sb.Created, time.Time{}
			}
		}
		out = append(out, sb)
	}
	return out, RangesFromWire(resp.GetGranted())
}

// EndRequest is cmd on the wire.
func EndRequest(cmd alloc.EndCommand) *nsallocv1.EndRequest {
	return &nsallocv1.EndRequest{RequestId: cmd.RequestID, Incarnation: uint64(cmd.Incarnation), Sandbox: uint64(cmd.Sandbox), Epoch: uint64(cmd.Epoch)}
}

// EndCommand is what a host asked for.
func EndCommand(req *nsallocv1.EndRequest, host string) alloc.EndCommand {
	return alloc.EndCommand{Mutation: mutation(req, host), Sandbox: alloc.Serial(req.GetSandbox()), Epoch: alloc.Epoch(req.GetEpoch())}
}

// OpenRequest is cmd on the wire.
func OpenRequest(cmd alloc.OpenCommand) *nsallocv1.OpenRequest {
	return &nsallocv1.OpenRequest{
		RequestId: cmd.RequestID, Incarnation: uint64(cmd.Incarnation), Spend: RangesToWire(cmd.Spend), Sandbox: uint64(cmd.Sandbox), Epoch: uint64(cmd.Epoch),
		Checkpoint: uint64(cmd.Checkpoint), RunId: cmd.RunID, Digest: cmd.Digest[:],
	}
}

// OpenCommand is what a host asked for.
func OpenCommand(req *nsallocv1.OpenRequest, host string) (alloc.OpenCommand, error) {
	digest, err := digestFromWire(req.GetDigest())
	return alloc.OpenCommand{
		Mutation: mutation(req, host), Spend: RangesFromWire(req.GetSpend()), Sandbox: alloc.Serial(req.GetSandbox()), Epoch: alloc.Epoch(req.GetEpoch()),
		Checkpoint: alloc.Serial(req.GetCheckpoint()), RunID: req.GetRunId(), Digest: digest,
	}, err
}

// ConfirmRequest is cmd on the wire.
func ConfirmRequest(cmd alloc.ConfirmCommand) *nsallocv1.ConfirmRequest {
	return &nsallocv1.ConfirmRequest{
		RequestId: cmd.RequestID, Incarnation: uint64(cmd.Incarnation), Sandbox: uint64(cmd.Sandbox), Epoch: uint64(cmd.Epoch),
		Checkpoint: uint64(cmd.Checkpoint), Evidence: evidences.value(cmd.Evidence),
	}
}

// ConfirmCommand is what a host asked for.
func ConfirmCommand(req *nsallocv1.ConfirmRequest, host string) alloc.ConfirmCommand {
	return alloc.ConfirmCommand{
		Mutation: mutation(req, host), Sandbox: alloc.Serial(req.GetSandbox()), Epoch: alloc.Epoch(req.GetEpoch()),
		Checkpoint: alloc.Serial(req.GetCheckpoint()), Evidence: evidences.word(req.GetEvidence()),
	}
}

// AbortRequest is cmd on the wire.
func AbortRequest(cmd alloc.AbortCommand) *nsallocv1.AbortRequest {
	return &nsallocv1.AbortRequest{
		RequestId: cmd.RequestID, Incarnation: uint64(cmd.Incarnation), Sandbox: uint64(cmd.Sandbox), Epoch: uint64(cmd.Epoch),
		Checkpoint: uint64(cmd.Checkpoint), ZeroGiven: cmd.ZeroGiven,
	}
}

// AbortCommand is what a host asked for.
func AbortCommand(req *nsallocv1.AbortRequest, host string) alloc.AbortCommand {
	return alloc.AbortCommand{
		Mutation: mutation(req, host), Sandbox: alloc.Serial(req.GetSandbox()), Epoch: alloc.Epoch(req.GetEpoch()),
		Checkpoint: alloc.Serial(req.GetCheckpoint()), ZeroGiven: req.GetZeroGiven(),
	}
}

// ClaimRequest is cmd on the wire.
func ClaimRequest(cmd alloc.ClaimCommand) *nsallocv1.ClaimRequest {
	return &nsallocv1.ClaimRequest{
		RequestId: cmd.RequestID, Incarnation: uint64(cmd.Incarnation), Checkpoint: uint64(cmd.Checkpoint), Digest: cmd.Digest[:],
		Claimant: &nsallocv1.Claimant{BootId: cmd.BootID, Run: cmd.Run}, Exe: cmd.Exe,
	}
}

// ClaimCommand is what a host asked for.
func ClaimCommand(req *nsallocv1.ClaimRequest, host string) (alloc.ClaimCommand, error) {
	digest, err := digestFromWire(req.GetDigest())
	return alloc.ClaimCommand{
		Mutation: mutation(req, host), Checkpoint: alloc.Serial(req.GetCheckpoint()), Digest: digest,
		BootID: req.GetClaimant().GetBootId(), Run: req.GetClaimant().GetRun(), Exe: req.GetExe(),
	}, err
}

// ClaimResponse is the answer on the wire.
func ClaimResponse(a alloc.ClaimAnswer) *nsallocv1.ClaimResponse {
	return &nsallocv1.ClaimResponse{
		Outcome: outcomes.value(a.Outcome), Sandbox: SandboxToWire(&a.Sandbox), Checkpoint: CheckpointToWire(a.Images), Why: a.Why,
	}
}

// ClaimAnswer reads the answer. The sandbox's current checkpoint, where it is another one, does not
// cross the wire.
func ClaimAnswer(resp *nsallocv1.ClaimResponse) alloc.ClaimAnswer {
	a := alloc.ClaimAnswer{
		Handoff: HandoffFromWire(resp.GetSandbox(), nil), Outcome: outcomes.word(resp.GetOutcome()),
		Images: CheckpointFromWire(resp.GetCheckpoint()), Why: resp.GetWhy(),
	}
	if a.Images != nil && a.Images.Serial == a.Sandbox.Checkpoint {
		a.Checkpoint = a.Images
	}
	return a
}

// BindRequest is cmd on the wire.
func BindRequest(cmd alloc.BindCommand) *nsallocv1.BindRequest {
	return &nsallocv1.BindRequest{
		RequestId: cmd.RequestID, Incarnation: uint64(cmd.Incarnation), Spend: RangesToWire(cmd.Spend), Sandbox: uint64(cmd.Sandbox), Epoch: uint64(cmd.Epoch),
		Claimant: &nsallocv1.Claimant{BootId: cmd.BootID, Run: cmd.Run},
		Bindings: bindingsToWire(cmd.Bindings, new(stamps)), Fresh: bindingsToWire(cmd.Fresh, new(stamps)), Labels: cmd.Labels,
	}
}

// BindCommand is what a host asked for.
func BindCommand(req *nsallocv1.BindRequest, host string) alloc.BindCommand {
	return alloc.BindCommand{
		Mutation: mutation(req, host), Spend: RangesFromWire(req.GetSpend()), Sandbox: alloc.Serial(req.GetSandbox()), Epoch: alloc.Epoch(req.GetEpoch()),
		BootID: req.GetClaimant().GetBootId(), Run: req.GetClaimant().GetRun(),
		Bindings: requestBindings(req.GetBindings()), Fresh: requestBindings(req.GetFresh()), Labels: labels(req.GetLabels()),
	}
}

// ReleaseRequest is cmd on the wire.
func ReleaseRequest(cmd alloc.ReleaseCommand) *nsallocv1.ReleaseRequest {
	return &nsallocv1.ReleaseRequest{
		RequestId: cmd.RequestID, Incarnation: uint64(cmd.Incarnation), Sandbox: uint64(cmd.Sandbox), Epoch: uint64(cmd.Epoch),
		Claimant: &nsallocv1.Claimant{BootId: cmd.BootID, Run: cmd.Run},
	}
}

// ReleaseCommand is what a host asked for.
func ReleaseCommand(req *nsallocv1.ReleaseRequest, host string) alloc.ReleaseCommand {
	return alloc.ReleaseCommand{
		Mutation: mutation(req, host), Sandbox: alloc.Serial(req.GetSandbox()), Epoch: alloc.Epoch(req.GetEpoch()),
		BootID: req.GetClaimant().GetBootId(), Run: req.GetClaimant().GetRun(),
	}
}

func mutation(req interface {
	GetRequestId() string
	GetIncarnation() uint64
}, host string) alloc.Mutation {
	return alloc.Mutation{RequestID: req.GetRequestId(), Host: host, Incarnation: alloc.Incarnation(req.GetIncarnation())}
}

func digestFromWire(b []byte) (d alloc.Digest, err error) {
	if len(b) != len(d) {
		return d, invalid("digest", fmt.Sprintf("it has %d bytes, SHA-256 has %d", len(b), len(d)))
	}
	copy(d[:], b)
	return d, nil
}

// generation is a generation in a request; what cannot be one becomes the last one, which every check refuses.
func generation(g uint32) alloc.Generation {
	return alloc.Generation(min(g, uint32(alloc.MaxGeneration)))
}

// labels makes no labels and an empty set of them the same, as they are on the wire.
func labels(m map[string]string) map[string]string {
	if len(m) == 0 {
		return nil
	}
	return m
}

func serialsToWire(s []alloc.Serial) []uint64 {
	out := make([]uint64, 0, len(s))
	for _, v := range s {
		out = append(out, uint64(v))
	}
	return out
}

func serialsFromWire(s []uint64) []alloc.Serial {
	var out []alloc.Serial
	for _, v := range s {
		out = append(out, alloc.Serial(v))
	}
	return out
}
