package client

import (
	"context"
	"fmt"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

// The mutations are alloc.Service's, with the same promises and the same errors. Who calls is not
// taken from a command: it is what Dial was told.

// Allocate issues serials that belong to nothing yet.
func (c *Client) Allocate(ctx context.Context, cmd alloc.AllocateCommand) (alloc.Ranges, error) {
	resp, err := c.allocator.Allocate(ctx, wire.AllocateRequest(cmd))
	return wire.RangesFromWire(resp.GetRanges()), err
}

// Hello begins, or goes on with, a life of this host's agent state.
func (c *Client) Hello(ctx context.Context, cmd alloc.HelloCommand) (*alloc.Host, *alloc.Pool, error) {
	resp, err := c.hosts.Hello(ctx, wire.HelloRequest(cmd))
	return wire.HostFromWire(resp.GetHost()), wire.PoolFromWire(resp.GetPool()), err
}

// Grant issues a range to this host and returns all that it holds.
func (c *Client) Grant(ctx context.Context, cmd alloc.GrantCommand) (alloc.Ranges, error) {
	resp, err := c.hosts.Grant(ctx, wire.GrantRequest(cmd))
	return wire.RangesFromWire(resp.GetGranted()), err
}

// Register records new sandboxes and what changed in known ones, all or none. It also returns what the
// host has left to spend.
func (c *Client) Register(ctx context.Context, cmd alloc.RegisterCommand) ([]*alloc.Sandbox, alloc.Ranges, error) {
	resp, err := c.sandboxes.Register(ctx, wire.RegisterRequest(cmd))
	if err != nil {
		return nil, nil, err
	}
	out, left := wire.RegisterAnswer(cmd, resp)
	return out, left, nil
}

// RegisterAgain records what lives on this host after the pool's store has forgotten history.
func (c *Client) RegisterAgain(ctx context.Context, cmd alloc.AgainCommand) ([]alloc.AgainAnswer, error) {
	resp, err := c.sandboxes.RegisterAgain(ctx, wire.AgainRequest(cmd))
	if err == nil && len(resp.GetAnswers()) != len(cmd.Items) {
		return nil, &alloc.Error{Reason: alloc.ReasonUnknownOutcome, Msg: fmt.Sprintf("the server answered %d of %d items", len(resp.GetAnswers()), len(cmd.Items))}
	}
	return wire.AgainAnswers(resp), err
}

// Waive says that the pool need not wait for a host. It is for operators; see alloc.Service.Waive.
func (c *Client) Waive(ctx context.Context, cmd alloc.WaiveCommand) (*alloc.Host, []string, error) {
	resp, err := c.hosts.Waive(ctx, wire.WaiveRequest(cmd))
	return wire.HostFromWire(resp.GetHost()), resp.GetWaitsFor(), err
}

// End records that a sandbox's processes were seen gone.
func (c *Client) End(ctx context.Context, cmd alloc.EndCommand) (*alloc.Sandbox, error) {
	resp, err := c.sandboxes.End(ctx, wire.EndRequest(cmd))
	return wire.SandboxFromWire(resp.GetSandbox()), err
}

// Open records a dump.
func (c *Client) Open(ctx context.Context, cmd alloc.OpenCommand) (alloc.Handoff, error) {
	resp, err := c.handoff.Open(ctx, wire.OpenRequest(cmd))
	return wire.HandoffFromWire(resp.GetSandbox(), resp.GetCheckpoint()), err
}

// Confirm says that a dumped tree was seen dead.
func (c *Client) Confirm(ctx context.Context, cmd alloc.ConfirmCommand) (alloc.Handoff, error) {
	resp, err := c.handoff.Confirm(ctx, wire.ConfirmRequest(cmd))
	return wire.HandoffFromWire(resp.GetSandbox(), resp.GetCheckpoint()), err
}

// Abort says that a dumped tree was seen running on.
func (c *Client) Abort(ctx context.Context, cmd alloc.AbortCommand) (alloc.Handoff, error) {
	resp, err := c.handoff.Abort(ctx, wire.AbortRequest(cmd))
	return wire.HandoffFromWire(resp.GetSandbox(), resp.GetCheckpoint()), err
}

// Claim asks to restore the images of a checkpoint on this host.
func (c *Client) Claim(ctx context.Context, cmd alloc.ClaimCommand) (alloc.ClaimAnswer, error) {
	resp, err := c.handoff.Claim(ctx, wire.ClaimRequest(cmd))
	if err != nil {
		return alloc.ClaimAnswer{}, err
	}
	return wire.ClaimAnswer(resp), nil
}

// Bind makes a claimed sandbox run on this host. It also returns what the host has left to spend.
func (c *Client) Bind(ctx context.Context, cmd alloc.BindCommand) (alloc.Handoff, alloc.Ranges, error) {
	resp, err := c.handoff.Bind(ctx, wire.BindRequest(cmd))
	return wire.HandoffFromWire(resp.GetSandbox(), resp.GetCheckpoint()), wire.RangesFromWire(resp.GetGranted()), err
}

// Release gives a claim back.
func (c *Client) Release(ctx context.Context, cmd alloc.ReleaseCommand) (alloc.Handoff, error) {
	resp, err := c.handoff.Release(ctx, wire.ReleaseRequest(cmd))
	return wire.HandoffFromWire(resp.GetSandbox(), resp.GetCheckpoint()), err
}

// Mend takes one object out of contradiction. It is for operators; see alloc.Service.Mend.
func (c *Client) Mend(ctx context.Context, cmd alloc.MendCommand) (alloc.Mended, error) {
	resp, err := c.records.Mend(ctx, wire.MendRequest(cmd))
	return wire.MendedFromWire(resp), err
}

// SetPolicy sets fields of the pool's policy and returns the pool. It is for operators; see alloc.Service.SetPolicy.
func (c *Client) SetPolicy(ctx context.Context, cmd alloc.SetPolicyCommand) (*alloc.Pool, error) {
	resp, err := c.records.SetPolicy(ctx, wire.SetPolicyRequest(cmd))
	return wire.PoolFromWire(resp.GetPool()), err
}
