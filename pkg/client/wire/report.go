package wire

import (
	"strings"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// What operators ask for and are told, in both directions.

// ReportToWire is r on the wire.
func ReportToWire(r alloc.Report) *nsallocv1.CheckResponse {
	resp := &nsallocv1.CheckResponse{
		Revision: int64(r.Revision), Sandboxes: uint64(r.Sandboxes), Namespaces: uint64(r.Namespaces), Checkpoints: uint64(r.Checkpoints),
		Hosts: uint64(r.Hosts), Aside: uint64(r.Aside), Total: uint64(r.Total),
	}
	for _, f := range r.Findings {
		resp.Findings = append(resp.Findings, &nsallocv1.Finding{
			// They name keys of the store, which may hold anything.
			Promise: valid(f.Promise), Subject: valid(f.Subject), Evidence: valid(f.Evidence), Fix: valid(f.Fix), Mend: f.Mend,
		})
	}
	return resp
}

// ReportFromWire is what a server found.
func ReportFromWire(resp *nsallocv1.CheckResponse) alloc.Report {
	r := alloc.Report{
		Revision: alloc.Revision(resp.GetRevision()), Sandboxes: int(resp.GetSandboxes()), Namespaces: int(resp.GetNamespaces()),
		Checkpoints: int(resp.GetCheckpoints()), Hosts: int(resp.GetHosts()), Aside: int(resp.GetAside()), Total: int(resp.GetTotal()),
	}
	for _, f := range resp.GetFindings() {
		r.Findings = append(r.Findings, alloc.Finding{Promise: f.GetPromise(), Subject: f.GetSubject(), Evidence: f.GetEvidence(), Fix: f.GetFix(), Mend: f.GetMend()})
	}
	return r
}

// MendRequest is cmd on the wire.
func MendRequest(cmd alloc.MendCommand) *nsallocv1.MendRequest {
	return &nsallocv1.MendRequest{RequestId: cmd.RequestID, Kind: string(cmd.Kind), Id: cmd.ID, Force: cmd.Force}
}

// MendCommand is what a caller asked for.
func MendCommand(req *nsallocv1.MendRequest, actor string) alloc.MendCommand {
	return alloc.MendCommand{RequestID: req.GetRequestId(), Actor: actor, Kind: alloc.Kind(req.GetKind()), ID: req.GetId(), Force: req.GetForce()}
}

// MendedToWire is m on the wire.
func MendedToWire(m alloc.Mended) *nsallocv1.MendResponse {
	resp := &nsallocv1.MendResponse{Revision: int64(m.Revision), At: timeToWire(m.At)}
	for _, k := range m.Changed {
		resp.Changed = append(resp.Changed, valid(k.String()))
	}
	return resp
}

// MendedFromWire is what a server has done.
func MendedFromWire(resp *nsallocv1.MendResponse) alloc.Mended {
	m := alloc.Mended{Revision: alloc.Revision(resp.GetRevision()), At: timeFromWire(resp.GetAt())}
	for _, text := range resp.GetChanged() {
		kind, id, _ := strings.Cut(text, "/")
		m.Changed = append(m.Changed, alloc.Key{Kind: alloc.Kind(kind), ID: id})
	}
	return m
}

// SetPolicyRequest is cmd on the wire.
func SetPolicyRequest(cmd alloc.SetPolicyCommand) *nsallocv1.SetPolicyRequest {
	return &nsallocv1.SetPolicyRequest{RequestId: cmd.RequestID, Fields: cmd.Fields}
}

// SetPolicyCommand is what a caller asked for.
func SetPolicyCommand(req *nsallocv1.SetPolicyRequest) alloc.SetPolicyCommand {
	return alloc.SetPolicyCommand{RequestID: req.GetRequestId(), Fields: req.GetFields()}
}
