package agent

import (
	"context"

	"github.com/nsalloc/nsalloc/internal/killpoint"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// Remote is the Pool behind a client. Every mutation is repeated under one request id until its outcome
// is known or its context ends.
type Remote struct{ c *client.Client }

// NewRemote makes a Pool of a client, which must say the host's name.
func NewRemote(c *client.Client) *Remote { return &Remote{c: c} }

// sent runs one mutation, an RPC of that name, under one request id. An outcome that is unknown once stays
// so until a try is decided (client.Retry).
func sent[T any](ctx context.Context, rpc string, do func(id string) (T, error)) (T, error) {
	var out T
	killpoint.At(killpoint.AgentSending.Of(rpc))
	err := client.Retry(ctx, func(id string) (err error) {
		out, err = do(id)
		return err
	})
	killpoint.At(killpoint.AgentReceived.Of(rpc))
	return out, err
}

type pair[A, B any] struct {
	a A
	b B
}

func sent2[A, B any](ctx context.Context, rpc string, do func(id string) (A, B, error)) (A, B, error) {
	p, err := sent(ctx, rpc, func(id string) (pair[A, B], error) {
		a, b, err := do(id)
		return pair[A, B]{a, b}, err
	})
	return p.a, p.b, err
}

// Hello is alloc.Service.Hello.
func (r *Remote) Hello(ctx context.Context, cmd alloc.HelloCommand) (*alloc.Host, *alloc.Pool, error) {
	return sent2(ctx, "Hello", func(id string) (*alloc.Host, *alloc.Pool, error) {
		cmd.RequestID = id
		return r.c.Hello(ctx, cmd)
	})
}

// Grant is alloc.Service.Grant.
func (r *Remote) Grant(ctx context.Context, cmd alloc.GrantCommand) (alloc.Ranges, error) {
	return sent(ctx, "Grant", func(id string) (alloc.Ranges, error) {
		cmd.RequestID = id
		return r.c.Grant(ctx, cmd)
	})
}

// Register is alloc.Service.Register.
func (r *Remote) Register(ctx context.Context, cmd alloc.RegisterCommand) ([]*alloc.Sandbox, alloc.Ranges, error) {
	return sent2(ctx, "Register", func(id string) ([]*alloc.Sandbox, alloc.Ranges, error) {
		cmd.RequestID = id
		return r.c.Register(ctx, cmd)
	})
}

// RegisterAgain is alloc.Service.RegisterAgain.
func (r *Remote) RegisterAgain(ctx context.Context, cmd alloc.AgainCommand) ([]alloc.AgainAnswer, error) {
	return sent(ctx, "RegisterAgain", func(id string) ([]alloc.AgainAnswer, error) {
		cmd.RequestID = id
		return r.c.RegisterAgain(ctx, cmd)
	})
}

// End is alloc.Service.End.
func (r *Remote) End(ctx context.Context, cmd alloc.EndCommand) (*alloc.Sandbox, error) {
	return sent(ctx, "End", func(id string) (*alloc.Sandbox, error) {
		cmd.RequestID = id
		return r.c.End(ctx, cmd)
	})
}

// Open is alloc.Service.Open.
func (r *Remote) Open(ctx context.Context, cmd alloc.OpenCommand) (alloc.Handoff, error) {
	return sent(ctx, "Open", func(id string) (alloc.Handoff, error) {
		cmd.RequestID = id
		return r.c.Open(ctx, cmd)
	})
}

// Confirm is alloc.Service.Confirm.
func (r *Remote) Confirm(ctx context.Context, cmd alloc.ConfirmCommand) (alloc.Handoff, error) {
	return sent(ctx, "Confirm", func(id string) (alloc.Handoff, error) {
		cmd.RequestID = id
		return r.c.Confirm(ctx, cmd)
	})
}

// Abort is alloc.Service.Abort.
func (r *Remote) Abort(ctx context.Context, cmd alloc.AbortCommand) (alloc.Handoff, error) {
	return sent(ctx, "Abort", func(id string) (alloc.Handoff, error) {
		cmd.RequestID = id
		return r.c.Abort(ctx, cmd)
	})
}

// Claim is alloc.Service.Claim. A claim that has to wait is the caller's to repeat: each look is an
// intent of its own.
func (r *Remote) Claim(ctx context.Context, cmd alloc.ClaimCommand) (alloc.ClaimAnswer, error) {
	return sent(ctx, "Claim", func(id string) (alloc.ClaimAnswer, error) {
		cmd.RequestID = id
		return r.c.Claim(ctx, cmd)
	})
}

// Bind is alloc.Service.Bind.
func (r *Remote) Bind(ctx context.Context, cmd alloc.BindCommand) (alloc.Handoff, alloc.Ranges, error) {
	return sent2(ctx, "Bind", func(id string) (alloc.Handoff, alloc.Ranges, error) {
		cmd.RequestID = id
		return r.c.Bind(ctx, cmd)
	})
}

// Release is alloc.Service.Release.
func (r *Remote) Release(ctx context.Context, cmd alloc.ReleaseCommand) (alloc.Handoff, error) {
	return sent(ctx, "Release", func(id string) (alloc.Handoff, error) {
		cmd.RequestID = id
		return r.c.Release(ctx, cmd)
	})
}

// Host reads a host's record.
func (r *Remote) Host(ctx context.Context, name string) (*alloc.Host, error) {
	return r.c.Host(ctx, name)
}

// GetPool reads the pool's record.
func (r *Remote) GetPool(ctx context.Context) (*alloc.Pool, error) {
	p, _, err := r.c.Pool(ctx)
	return p, err
}

// Owned reads what host owns and what can change on it.
func (r *Remote) Owned(ctx context.Context, host string) ([]*alloc.Sandbox, error) {
	var list []*alloc.Sandbox
	for s, err := range r.c.Sandboxes(ctx, client.Filter{
		Owner: host, States: []alloc.SandboxState{alloc.StateRunning, alloc.StateDumped, alloc.StateClaimed}, Linearizable: true,
	}) {
		if err != nil {
			return nil, err
		}
		list = append(list, s)
	}
	return list, nil
}

// Sandbox reads one sandbox with its current checkpoint.
func (r *Remote) Sandbox(ctx context.Context, serial alloc.Serial) (*alloc.Sandbox, *alloc.Checkpoint, error) {
	f, err := r.c.Sandbox(ctx, serial, true)
	if err != nil {
		return nil, nil, err
	}
	return f.Sandbox, f.Checkpoint, nil
}

// FindRun finds a checkpoint by CRIU's run id.
func (r *Remote) FindRun(ctx context.Context, runID string) (*alloc.Checkpoint, error) {
	return r.c.CheckpointByRun(ctx, runID)
}

// Checkpoint reads one checkpoint.
func (r *Remote) Checkpoint(ctx context.Context, serial alloc.Serial) (*alloc.Checkpoint, error) {
	return r.c.Checkpoint(ctx, serial)
}
