package client

import (
	"context"
	"errors"
	"fmt"
	"iter"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

// pageSize is what a listing asks for at once.
const pageSize = 500

// Found is a sandbox as of a revision.
type Found struct {
	Sandbox *alloc.Sandbox
	// Checkpoint is the sandbox's current one; nil when it has none.
	Checkpoint *alloc.Checkpoint
	Revision   alloc.Revision
}

// PoolStatus is a pool with what it has left.
type PoolStatus struct {
	Pool *alloc.Pool
	// Level is nil while the server cannot read the counter, and from servers before it.
	Level *alloc.Level
	// Unreadable is how many records the server cannot read.
	Unreadable uint64
	// Standing is whether the server that answered trusts its store; nil from servers without a witness.
	Standing *alloc.Standing
	Revision alloc.Revision
}

// PoolStatus reads the pool's record and what the pool has left.
func (c *Client) PoolStatus(ctx context.Context) (PoolStatus, error) {
	resp, err := c.allocator.GetPool(ctx, &nsallocv1.GetPoolRequest{})
	if err != nil {
		return PoolStatus{}, err
	}
	s := PoolStatus{Pool: wire.PoolFromWire(resp.GetPool()), Unreadable: resp.GetUnreadable(), Revision: alloc.Revision(resp.GetRevision()),
		Standing: wire.StandingFromWire(resp.GetStanding())}
	if resp.GetLevel() != nil {
		l := wire.LevelFromWire(resp.GetLevel())
		s.Level = &l
	}
	return s, nil
}

// Pool reads the pool's record.
func (c *Client) Pool(ctx context.Context) (*alloc.Pool, alloc.Revision, error) {
	resp, err := c.allocator.GetPool(ctx, &nsallocv1.GetPoolRequest{})
	return wire.PoolFromWire(resp.GetPool()), alloc.Revision(resp.GetRevision()), err
}

// Sandbox finds a sandbox by its own serial, a namespace's, or a checkpoint's. A linearizable read
// reflects everything that was committed before it; any other one may be moments behind.
func (c *Client) Sandbox(ctx context.Context, serial alloc.Serial, linearizable bool) (Found, error) {
	return c.find(ctx, &nsallocv1.SandboxesGetRequest{
		By: &nsallocv1.SandboxesGetRequest_Serial{Serial: uint64(serial)}, Linearizable: linearizable})
}

// SandboxOf finds the sandbox of a live namespace of a host.
func (c *Client) SandboxOf(ctx context.Context, host string, t alloc.NamespaceType, k alloc.KernelID, linearizable bool) (Found, error) {
	return c.find(ctx, &nsallocv1.SandboxesGetRequest{
		By: &nsallocv1.SandboxesGetRequest_Namespace{Namespace: &nsallocv1.HostNamespace{
			Host: host, Type: wire.NamespaceTypeToWire(t), Kernel: wire.KernelIDToWire(k)}},
		Linearizable: linearizable})
}

func (c *Client) find(ctx context.Context, req *nsallocv1.SandboxesGetRequest) (Found, error) {
	resp, err := c.sandboxes.Get(ctx, req)
	if err != nil {
		return Found{}, err
	}
	return Found{wire.SandboxFromWire(resp.GetSandbox()), wire.CheckpointFromWire(resp.GetCheckpoint()), alloc.Revision(resp.GetRevision())}, nil
}

// Filter narrows a listing of sandboxes. The zero value is all.
type Filter struct {
	Owner        string
	States       []alloc.SandboxState
	Linearizable bool
}

// ErrIncomplete is at the bottom of the error that ends a listing when the server left out records that it
// cannot read. All others were yielded before. Who acts on what is absent must not; who only shows may go
// on and say so.
var ErrIncomplete = errors.New("the listing is incomplete")

// Sandboxes lists sandboxes in the order of their serials. An error is the last thing that it yields;
// see ErrIncomplete.
func (c *Client) Sandboxes(ctx context.Context, f Filter) iter.Seq2[*alloc.Sandbox, error] {
	req := &nsallocv1.SandboxesListRequest{Owner: f.Owner, PageSize: pageSize, Linearizable: f.Linearizable}
	for _, s := range f.States {
		req.States = append(req.States, wire.SandboxStateToWire(s))
	}
	return pages("sandboxes", func(token string) ([]*nsallocv1.Sandbox, string, uint64, error) {
		req.PageToken = token
		resp, err := c.sandboxes.List(ctx, req)
		return resp.GetSandboxes(), resp.GetNextPageToken(), resp.GetUnreadable(), err
	}, wire.SandboxFromWire)
}

// History lists all stints of a sandbox from the first on, also those that its record keeps no more. An
// error is the last thing that it yields; UNIMPLEMENTED from a server that is older than the call.
func (c *Client) History(ctx context.Context, sandbox alloc.Serial) iter.Seq2[alloc.Stint, error] {
	return func(yield func(alloc.Stint, error) bool) {
		req := &nsallocv1.SandboxesHistoryRequest{Serial: uint64(sandbox), Limit: alloc.MaxHistory}
		for {
			resp, err := c.sandboxes.History(ctx, req)
			if err != nil {
				yield(alloc.Stint{}, err)
				return
			}
			page := resp.GetStints()
			full := len(page) == int(req.Limit)
			if full && page[len(page)-1].GetTo() == nil {
				page = page[:len(page)-1] // it may be over by the time of the next page, which begins with it
			}
			for _, st := range page {
				req.After = st.GetEpoch()
				if !yield(wire.StintFromWire(st), nil) {
					return
				}
			}
			if !full {
				return
			}
		}
	}
}

// Checkpoint finds a checkpoint by its serial.
func (c *Client) Checkpoint(ctx context.Context, serial alloc.Serial) (*alloc.Checkpoint, error) {
	resp, err := c.handoff.Find(ctx, &nsallocv1.FindRequest{By: &nsallocv1.FindRequest_Serial{Serial: uint64(serial)}})
	return wire.CheckpointFromWire(resp.GetCheckpoint()), err
}

// CheckpointByRun finds a checkpoint by CRIU's dump_criu_run_id.
func (c *Client) CheckpointByRun(ctx context.Context, runID string) (*alloc.Checkpoint, error) {
	resp, err := c.handoff.Find(ctx, &nsallocv1.FindRequest{By: &nsallocv1.FindRequest_RunId{RunId: runID}})
	return wire.CheckpointFromWire(resp.GetCheckpoint()), err
}

// Checkpoints lists checkpoints in the order of their serials; of one sandbox, or of all for 0.
func (c *Client) Checkpoints(ctx context.Context, sandbox alloc.Serial) iter.Seq2[*alloc.Checkpoint, error] {
	return pages("checkpoints", func(token string) ([]*nsallocv1.Checkpoint, string, uint64, error) {
		resp, err := c.handoff.ListCheckpoints(ctx, &nsallocv1.ListCheckpointsRequest{Sandbox: uint64(sandbox), PageSize: pageSize, PageToken: token})
		return resp.GetCheckpoints(), resp.GetNextPageToken(), resp.GetUnreadable(), err
	}, wire.CheckpointFromWire)
}

// Host reads one host.
func (c *Client) Host(ctx context.Context, name string) (*alloc.Host, error) {
	resp, err := c.hosts.Get(ctx, &nsallocv1.HostsGetRequest{Name: name})
	return wire.HostFromWire(resp.GetHost()), err
}

// Hosts lists hosts in the order of their names.
func (c *Client) Hosts(ctx context.Context) iter.Seq2[*alloc.Host, error] {
	return pages("hosts", func(token string) ([]*nsallocv1.Host, string, uint64, error) {
		resp, err := c.hosts.List(ctx, &nsallocv1.HostsListRequest{PageSize: pageSize, PageToken: token})
		return resp.GetHosts(), resp.GetNextPageToken(), resp.GetUnreadable(), err
	}, wire.HostFromWire)
}

// Check reads every record of the pool at one revision and verifies the promises. It is for operators.
func (c *Client) Check(ctx context.Context) (alloc.Report, error) {
	resp, err := c.records.Check(ctx, &nsallocv1.CheckRequest{})
	return wire.ReportFromWire(resp), err
}

// pages yields page after page. Each is of a revision of its own and counts what could not be read there: the
// most of them holds, or a record that became readable behind the page that it belongs on would be missed.
func pages[P, D any](what string, page func(token string) ([]*P, string, uint64, error), convert func(*P) *D) iter.Seq2[*D, error] {
	return func(yield func(*D, error) bool) {
		var unreadable uint64
		for token := ""; ; {
			items, next, leftOut, err := page(token)
			if err != nil {
				yield(nil, err)
				return
			}
			unreadable = max(unreadable, leftOut)
			for _, it := range items {
				if !yield(convert(it), nil) {
					return
				}
			}
			if next == "" || next == token {
				if unreadable > 0 {
					yield(nil, &alloc.Error{Reason: alloc.ReasonMalformed, Subject: what, Err: ErrIncomplete,
						Msg: fmt.Sprintf("%d of the pool cannot be read by this server and are left out", unreadable),
						Fix: "nsalloc check names them and what to do"})
				}
				return
			}
			token = next
		}
	}
}
