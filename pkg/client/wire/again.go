package wire

import (
	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// What hosts and operators say after the store has forgotten history.

// AgainRequest is cmd on the wire.
func AgainRequest(cmd alloc.AgainCommand) *nsallocv1.RegisterAgainRequest {
	req := &nsallocv1.RegisterAgainRequest{RequestId: cmd.RequestID, Incarnation: uint64(cmd.Incarnation), Last: cmd.Last}
	for _, it := range cmd.Items {
		item := &nsallocv1.AgainItem{
			Sandbox: uint64(it.Sandbox), Epoch: uint64(it.Epoch), Bindings: bindingsToWire(it.Bindings, new(stamps)), Labels: it.Labels, OfHost: it.OfHost,
			Checkpoint: uint64(it.Checkpoint), Created: timeToWire(it.Created), From: serialsToWire(it.From),
		}
		item.Over = it.Over
		if d := it.Dump; d != nil {
			item.Dump = &nsallocv1.AgainDump{Checkpoint: uint64(d.Checkpoint), RunId: d.RunID, Digest: d.Digest[:]}
		}
		if it.Parent != nil {
			item.Parent, item.ParentCheckpoint = uint64(it.Parent.Sandbox), uint64(it.Parent.Checkpoint)
		}
		req.Items = append(req.Items, item)
	}
	return req
}

// AgainCommand is what a host asked for.
func AgainCommand(req *nsallocv1.RegisterAgainRequest, host string) (alloc.AgainCommand, error) {
	cmd := alloc.AgainCommand{Mutation: mutation(req, host), Last: req.GetLast()}
	for _, it := range req.GetItems() {
		item := alloc.AgainItem{
			Sandbox: alloc.Serial(it.GetSandbox()), Epoch: alloc.Epoch(it.GetEpoch()), Bindings: bindingsFromWire(it.GetBindings()),
			Labels: labels(it.GetLabels()), OfHost: it.GetOfHost(), Checkpoint: alloc.Serial(it.GetCheckpoint()),
			Created: timeFromWire(it.GetCreated()), From: serialsFromWire(it.GetFrom()),
		}
		for i := range item.Bindings {
			item.Bindings[i].Gone = timeFromWire(nil)
		}
		item.Over = it.GetOver()
		if d := it.GetDump(); d != nil {
			digest, err := digestFromWire(d.GetDigest())
			if err != nil {
				return cmd, err
			}
			item.Dump = &alloc.AgainDump{Checkpoint: alloc.Serial(d.GetCheckpoint()), RunID: d.GetRunId(), Digest: digest}
		}
		if it.GetParent() != 0 || it.GetParentCheckpoint() != 0 {
			item.Parent = &alloc.Parent{Sandbox: alloc.Serial(it.GetParent()), Checkpoint: alloc.Serial(it.GetParentCheckpoint())}
		}
		cmd.Items = append(cmd.Items, item)
	}
	return cmd, nil
}

// AgainResponse is the answers on the wire.
func AgainResponse(answers []alloc.AgainAnswer) *nsallocv1.RegisterAgainResponse {
	resp := &nsallocv1.RegisterAgainResponse{}
	for _, a := range answers {
		out := &nsallocv1.AgainAnswer{Sandbox: SandboxToWire(a.Sandbox)}
		if a.Err != nil {
			out.Reason, out.Message = string(a.Err.Reason), valid(a.Err.Msg)
		}
		resp.Answers = append(resp.Answers, out)
	}
	return resp
}

// AgainAnswers reads the answers.
func AgainAnswers(resp *nsallocv1.RegisterAgainResponse) []alloc.AgainAnswer {
	var answers []alloc.AgainAnswer
	for _, a := range resp.GetAnswers() {
		out := alloc.AgainAnswer{Sandbox: SandboxFromWire(a.GetSandbox())}
		if a.GetReason() != "" {
			out.Err = &alloc.Error{Reason: alloc.Reason(a.GetReason()), Msg: a.GetMessage()}
			if out.Sandbox != nil {
				out.Err.Subject = "sandbox " + out.Sandbox.Serial.String()
			}
		}
		answers = append(answers, out)
	}
	return answers
}

// WaiveRequest is cmd on the wire.
func WaiveRequest(cmd alloc.WaiveCommand) *nsallocv1.WaiveRequest {
	return &nsallocv1.WaiveRequest{RequestId: cmd.RequestID, Name: cmd.Host}
}

// WaiveCommand is what an operator asked for.
func WaiveCommand(req *nsallocv1.WaiveRequest, actor string) alloc.WaiveCommand {
	return alloc.WaiveCommand{RequestID: req.GetRequestId(), Actor: actor, Host: req.GetName()}
}
