package agent

import (
	"context"
	"slices"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// testPool is the service itself over a store in memory, as a Pool. It does what Remote does: it fills in
// the request id and repeats a request, under its id, until the outcome is known.
type testPool struct {
	svc   *alloc.Service
	store *memstore.Store

	mu        sync.Mutex
	away      bool                // guarded by mu: no server answers
	fault     map[string]*fault   // guarded by mu: by method
	calls     map[string]int      // guarded by mu
	ids       map[string][]string // guarded by mu: request ids by method
	first     map[string]func()   // guarded by mu: done once, before the method's next call
	storeAway bool                // guarded by mu: servers answer from their view, and nothing else
	noAgain   bool                // guarded by mu: the server does not know RegisterAgain
	older     bool                // guarded by mu: the server does not know what a claim's CRIU executes
	// refuse decides against a registration; guarded by mu.
	refuse func(alloc.RegisterCommand) error
}

// fault hits the transaction of a method's nth call. The call is not repeated: its caller never learns.
type fault struct {
	nth     int
	outcome memstore.Fault
	hit     bool
}

func newTestPool(t *testing.T) *testPool {
	t.Helper()
	store := memstore.New()
	p := &testPool{svc: alloc.NewService(store, nil), store: store, fault: map[string]*fault{}, calls: map[string]int{}, ids: map[string][]string{}, first: map[string]func(){}}
	if _, err := p.svc.InitPool(t.Context(), alloc.DefaultPolicy()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		store.Settle()
		alloctest.Check(t, store)
	})
	return p
}

func (p *testPool) setAway(away bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.away = away
}

// before does something once, when the agent is about to call the method next.
func (p *testPool) before(method string, do func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.first[method] = do
}

// hitBy has the method's nth call from now on meet a fault.
func (p *testPool) hitBy(method string, nth int, f memstore.Fault) *fault {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault[method] = &fault{nth: p.calls[method] + nth, outcome: f}
	return p.fault[method]
}

func (p *testPool) wasHit(f *fault) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return f.hit
}

// call does one command.
func (p *testPool) call(ctx context.Context, method string, do func(id string) error) error {
	p.mu.Lock()
	p.calls[method]++
	f := p.fault[method]
	if f != nil && f.nth != p.calls[method] {
		f = nil
	}
	away, storeAway, first := p.away, p.storeAway, p.first[method]
	delete(p.first, method)
	p.mu.Unlock()
	if first != nil {
		first()
	}
	if away {
		return &alloc.Error{Reason: alloc.ReasonUnavailable, Msg: "the server is away"}
	}
	if storeAway {
		return client.Retry(ctx, func(string) error { return errStoreAway })
	}
	once := func(id string) error {
		p.mu.Lock()
		p.ids[method] = append(p.ids[method], id)
		p.mu.Unlock()
		return do(id)
	}
	if f == nil {
		return client.Retry(ctx, once)
	}
	p.mu.Lock()
	f.hit = true
	p.mu.Unlock()
	// The service itself asks again: so this call's transactions all meet the fault.
	p.store.SetFaults(func(op memstore.Op) memstore.Fault {
		if op.Commit {
			return f.outcome
		}
		return memstore.Fault{}
	})
	err := once(client.NewRequestID())
	p.store.SetFaults(nil)
	return err
}

func (p *testPool) Hello(ctx context.Context, cmd alloc.HelloCommand) (h *alloc.Host, pool *alloc.Pool, err error) {
	err = p.call(ctx, "Hello", func(id string) error {
		cmd.RequestID = id
		h, pool, err = p.svc.Hello(ctx, cmd)
		return err
	})
	return h, pool, err
}

func (p *testPool) Grant(ctx context.Context, cmd alloc.GrantCommand) (r alloc.Ranges, err error) {
	err = p.call(ctx, "Grant", func(id string) error {
		cmd.RequestID = id
		r, err = p.svc.Grant(ctx, cmd)
		return err
	})
	return r, err
}

func (p *testPool) Register(ctx context.Context, cmd alloc.RegisterCommand) (list []*alloc.Sandbox, left alloc.Ranges, err error) {
	p.mu.Lock()
	refuse := p.refuse
	p.mu.Unlock()
	err = p.call(ctx, "Register", func(id string) error {
		cmd.RequestID = id
		if refuse != nil {
			if err := refuse(cmd); err != nil {
				return err
			}
		}
		list, left, err = p.svc.Register(ctx, cmd)
		return err
	})
	return list, left, err
}

// withoutAgain makes its server one of before there was RegisterAgain, or not.
func (p *testPool) withoutAgain(yes bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.noAgain = yes
}

func (p *testPool) RegisterAgain(ctx context.Context, cmd alloc.AgainCommand) (answers []alloc.AgainAnswer, err error) {
	p.mu.Lock()
	no := p.noAgain
	p.mu.Unlock()
	if no {
		return nil, status.Error(codes.Unimplemented, "unknown method RegisterAgain")
	}
	err = p.call(ctx, "RegisterAgain", func(id string) error {
		cmd.RequestID = id
		answers, err = p.svc.RegisterAgain(ctx, cmd)
		return err
	})
	return answers, err
}

func (p *testPool) End(ctx context.Context, cmd alloc.EndCommand) (s *alloc.Sandbox, err error) {
	err = p.call(ctx, "End", func(id string) error {
		cmd.RequestID = id
		s, err = p.svc.End(ctx, cmd)
		return err
	})
	return s, err
}

func (p *testPool) move(ctx context.Context, method string, do func(id string) (alloc.Handoff, error)) (h alloc.Handoff, err error) {
	err = p.call(ctx, method, func(id string) error {
		h, err = do(id)
		return err
	})
	return h, err
}

func (p *testPool) Open(ctx context.Context, cmd alloc.OpenCommand) (alloc.Handoff, error) {
	return p.move(ctx, "Open", func(id string) (alloc.Handoff, error) { cmd.RequestID = id; return p.svc.Open(ctx, cmd) })
}

func (p *testPool) Confirm(ctx context.Context, cmd alloc.ConfirmCommand) (alloc.Handoff, error) {
	return p.move(ctx, "Confirm", func(id string) (alloc.Handoff, error) { cmd.RequestID = id; return p.svc.Confirm(ctx, cmd) })
}

func (p *testPool) Abort(ctx context.Context, cmd alloc.AbortCommand) (alloc.Handoff, error) {
	return p.move(ctx, "Abort", func(id string) (alloc.Handoff, error) { cmd.RequestID = id; return p.svc.Abort(ctx, cmd) })
}

func (p *testPool) Release(ctx context.Context, cmd alloc.ReleaseCommand) (alloc.Handoff, error) {
	return p.move(ctx, "Release", func(id string) (alloc.Handoff, error) { cmd.RequestID = id; return p.svc.Release(ctx, cmd) })
}

func (p *testPool) Claim(ctx context.Context, cmd alloc.ClaimCommand) (a alloc.ClaimAnswer, err error) {
	err = p.call(ctx, "Claim", func(id string) error {
		cmd.RequestID = id
		p.mu.Lock()
		if p.older {
			cmd.Exe = ""
		}
		p.mu.Unlock()
		a, err = p.svc.Claim(ctx, cmd)
		return err
	})
	return a, err
}

func (p *testPool) Bind(ctx context.Context, cmd alloc.BindCommand) (h alloc.Handoff, left alloc.Ranges, err error) {
	err = p.call(ctx, "Bind", func(id string) error {
		cmd.RequestID = id
		h, left, err = p.svc.Bind(ctx, cmd)
		return err
	})
	return h, left, err
}

var errStoreAway = &alloc.Error{Reason: alloc.ReasonUnavailable, Msg: "the store is away"}

// read does what changes nothing.
func (p *testPool) read() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.away {
		return &alloc.Error{Reason: alloc.ReasonUnavailable, Msg: "the server is away"}
	}
	return nil
}

// readStore is read of what a server asks the store for.
func (p *testPool) readStore() error {
	p.mu.Lock()
	away := p.storeAway
	p.mu.Unlock()
	if away {
		return errStoreAway
	}
	return p.read()
}

func (p *testPool) GetPool(ctx context.Context) (*alloc.Pool, error) {
	if err := p.read(); err != nil {
		return nil, err
	}
	pool, _, err := p.svc.Pool(ctx)
	return pool, err
}

func (p *testPool) Host(ctx context.Context, name string) (*alloc.Host, error) {
	if err := p.readStore(); err != nil {
		return nil, err
	}
	entries, _, err := p.store.Get(ctx, alloc.HostKey(name))
	if err != nil {
		return nil, err
	}
	h, ok := entries[0].Record.(*alloc.Host)
	if !ok {
		return nil, alloc.ErrHostUnknown
	}
	return h, nil
}

func (p *testPool) Owned(ctx context.Context, host string) ([]*alloc.Sandbox, error) {
	if err := p.readStore(); err != nil {
		return nil, err
	}
	all, err := p.sandboxes(ctx)
	if err != nil {
		return nil, err
	}
	var list []*alloc.Sandbox
	for _, s := range all {
		if s.Owner == host && s.State != alloc.StateEnded && s.State != alloc.StateInTransit {
			list = append(list, s)
		}
	}
	return list, nil
}

func (p *testPool) sandboxes(ctx context.Context) ([]*alloc.Sandbox, error) {
	var list []*alloc.Sandbox
	after := ""
	for {
		entries, _, err := p.store.List(ctx, alloc.KindSandbox, after, 500, 0)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			list = append(list, e.Record.(*alloc.Sandbox))
			after = e.Key.ID
		}
		if len(entries) < 500 {
			return list, nil
		}
	}
}

func (p *testPool) Sandbox(ctx context.Context, serial alloc.Serial) (*alloc.Sandbox, *alloc.Checkpoint, error) {
	if err := p.readStore(); err != nil {
		return nil, nil, err
	}
	entries, _, err := p.store.Get(ctx, alloc.SandboxKey(serial))
	if err != nil {
		return nil, nil, err
	}
	s, ok := entries[0].Record.(*alloc.Sandbox)
	if all, err := p.sandboxes(ctx); !ok && err == nil { // a namespace's, or a parted one's
		i := slices.IndexFunc(all, func(s *alloc.Sandbox) bool { _, ok = s.Binding(serial); return ok })
		if ok {
			s = all[i]
		}
	}
	if !ok {
		return nil, nil, alloc.ErrSandboxNotFound
	}
	if s.Checkpoint == 0 {
		return s, nil, nil
	}
	entries, _, err = p.store.Get(ctx, alloc.CheckpointKey(s.Checkpoint))
	if err != nil {
		return nil, nil, err
	}
	c, _ := entries[0].Record.(*alloc.Checkpoint)
	return s, c, nil
}

func (p *testPool) FindRun(ctx context.Context, runID string) (*alloc.Checkpoint, error) {
	if err := p.read(); err != nil {
		return nil, err
	}
	entries, _, err := p.store.List(ctx, alloc.KindCheckpoint, "", 500, 0)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if c := e.Record.(*alloc.Checkpoint); c.RunID == runID {
			return c, nil
		}
	}
	return nil, alloc.ErrCheckpointNotFound
}

func (p *testPool) Checkpoint(ctx context.Context, serial alloc.Serial) (*alloc.Checkpoint, error) {
	if err := p.read(); err != nil {
		return nil, err
	}
	entries, _, err := p.store.Get(ctx, alloc.CheckpointKey(serial))
	if err != nil {
		return nil, err
	}
	if c, ok := entries[0].Record.(*alloc.Checkpoint); ok {
		return c, nil
	}
	return nil, alloc.ErrCheckpointNotFound
}

// everBound is the serial that a namespace has or had; 0 when it never got one.
func (p *testPool) everBound(u unnumbered) alloc.Serial {
	all, _ := p.sandboxes(context.Background()) // a store in memory
	for _, s := range all {
		for _, b := range s.Bindings {
			if b.Type == u.t && b.Kernel.Key(b.Type) == u.k.Key(u.t) {
				return b.Serial
			}
		}
	}
	return 0
}
