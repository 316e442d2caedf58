package alloctest

import (
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// useCase is one by its name, with the error of a fresh request.
type useCase struct {
	name string
	try  func() error
}

// without makes the record under key unreadable in every way, and asks for each use case. All of them
// refuse with that error and leave the value alone; then the record is put back, byte by byte.
func (p *Pool) without(t *testing.T, key alloc.Key, refusing ...useCase) {
	t.Helper()
	before := get(t, p.Store, key)[0]
	for want, value := range spoiled(p.Store, before.Record) {
		plant(t, p.Store, key, value)
		for _, c := range refusing {
			if err := c.try(); alloc.ReasonOf(err) != want.Reason {
				t.Errorf("%s with %s: %v, want %s", c.name, key, err, want.Reason)
			}
		}
		entries, _, err := p.Store.Get(t.Context(), key)
		if err != nil || entries[0].Token != alloc.Token(value) {
			t.Errorf("%s, which nobody could read, was written over: %+v, %v", key, entries, err)
		}
	}
	plant(t, p.Store, key, []byte(before.Token))
}

func (p *Pool) allocate(t *testing.T) useCase {
	return useCase{"Allocate", func() error {
		_, err := p.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 1})
		return err
	}}
}

func (a *Agent) hello(t *testing.T) useCase {
	return useCase{"Hello", func() error { _, _, err := a.Pool.Hello(t.Context(), a.Hello()); return err }}
}

func (a *Agent) grant(t *testing.T) useCase {
	return useCase{"Grant", func() error {
		_, err := a.Pool.Grant(t.Context(), alloc.GrantCommand{Mutation: a.Mutation(), Count: 1})
		return err
	}}
}

func (a *Agent) register(t *testing.T) useCase {
	cmd := a.New()
	return useCase{"Register", func() error {
		cmd.Mutation = a.Mutation()
		_, _, err := a.Pool.Register(t.Context(), cmd)
		return err
	}}
}

func (a *Agent) change(t *testing.T, sb *alloc.Sandbox) useCase {
	return useCase{"Register of a change", func() error {
		_, _, err := a.Pool.Register(t.Context(), alloc.RegisterCommand{Mutation: a.Mutation(), Items: []alloc.RegisterItem{{
			Sandbox: sb.Serial, Epoch: sb.Epoch, Labels: map[string]string{"k": "v"}}}})
		return err
	}}
}

// clone registers what a restore of h's images made.
func (a *Agent) clone(t *testing.T, h alloc.Handoff) useCase {
	cmd := a.New()
	cmd.Items[0].ParentCheckpoint = h.Checkpoint.Serial
	return useCase{"Register of a clone", func() error {
		cmd.Mutation = a.Mutation()
		_, _, err := a.Pool.Register(t.Context(), cmd)
		return err
	}}
}

func (a *Agent) open(t *testing.T, sb *alloc.Sandbox) useCase {
	cmd := a.Open(sb)
	return useCase{"Open", func() error {
		cmd.Mutation = a.Mutation()
		_, err := a.Pool.Open(t.Context(), cmd)
		return err
	}}
}

func (a *Agent) end(t *testing.T, sb *alloc.Sandbox) useCase {
	return useCase{"End", func() error { _, err := a.Pool.End(t.Context(), a.End(sb)); return err }}
}

func (a *Agent) confirm(t *testing.T, h alloc.Handoff) useCase {
	return useCase{"Confirm", func() error {
		_, err := a.Pool.Confirm(t.Context(), a.Confirm(h, alloc.SeenStopped))
		return err
	}}
}

func (a *Agent) abort(t *testing.T, h alloc.Handoff) useCase {
	return useCase{"Abort", func() error { _, err := a.Pool.Abort(t.Context(), a.Abort(h, false)); return err }}
}

func (a *Agent) claims(t *testing.T, h alloc.Handoff) useCase {
	return useCase{"Claim", func() error { _, err := a.Pool.Claim(t.Context(), a.Claim(h, "r")); return err }}
}

func (a *Agent) binds(t *testing.T, h alloc.Handoff) useCase {
	return useCase{"Bind", func() error { _, _, err := a.Pool.Bind(t.Context(), a.Bind(h, "r")); return err }}
}

func (a *Agent) releases(t *testing.T, h alloc.Handoff) useCase {
	return useCase{"Release", func() error { _, err := a.Pool.Release(t.Context(), a.Release(h, "r")); return err }}
}

func testUnreadablePool(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	sb := a.Sandbox()
	h := transit(t, b, b.Sandbox())
	everything := []useCase{p.allocate(t), a.hello(t), a.grant(t), a.register(t), a.change(t, sb), a.clone(t, h), a.open(t, sb), a.end(t, sb), a.claims(t, h),
		{"InitPool", func() error { _, err := p.InitPool(t.Context(), alloc.DefaultPolicy()); return err }}}
	p.without(t, alloc.Key{Kind: alloc.KindPool}, everything...)
	p.without(t, alloc.Key{Kind: alloc.KindCounter}, p.allocate(t), a.grant(t))

	// Without its pool, a record that cannot be read is a leftover like any other.
	pool := get(t, p.Store, alloc.Key{Kind: alloc.KindPool})[0]
	counter := get(t, p.Store, alloc.Key{Kind: alloc.KindCounter})[0]
	commit(t, p.Store, alloc.Tx{Delete: []alloc.Key{pool.Key}})
	plant(t, p.Store, counter.Key, Malformed)
	_, err := p.InitPool(t.Context(), alloc.DefaultPolicy())
	refused(t, err, alloc.ErrMalformed)
	plant(t, p.Store, pool.Key, []byte(pool.Token))
	plant(t, p.Store, counter.Key, []byte(counter.Token))
}

func testUnreadableHost(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	sb := a.Sandbox()
	h := transit(t, b, b.Sandbox())
	dumped := must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(a.Sandbox())))
	grant := a.grant(t)
	beside := useCase{"Grant, after another host registered", func() error {
		b.Sandbox() // it is not disturbed
		return grant.try()
	}}
	p.without(t, alloc.HostKey("a"), a.hello(t), grant, a.register(t), a.change(t, sb), a.open(t, sb), a.end(t, sb),
		a.confirm(t, dumped), a.abort(t, dumped), a.claims(t, h), beside)
}

func testUnreadableSandbox(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	sb := a.Sandbox()
	p.without(t, sb.Key(), a.change(t, sb), a.open(t, sb), a.end(t, sb))
	h := must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(sb)))
	p.without(t, sb.Key(), a.confirm(t, h), a.abort(t, h), b.claims(t, h), b.clone(t, h))
	h = must[alloc.Handoff](t)(p.Confirm(t.Context(), a.Confirm(h, alloc.SeenStopped)))
	p.without(t, sb.Key(), b.claims(t, h))
	h = claim(t, b, h, "r")
	p.without(t, sb.Key(), b.binds(t, h), b.releases(t, h), b.claims(t, h))
	bind(t, b, h, "r")

	// A serial whose record cannot be read is not free, also when a host holds it.
	register := a.New()
	key := alloc.SandboxKey(register.Items[0].Sandbox)
	plant(t, p.Store, key, Malformed)
	_, _, err := p.Register(t.Context(), register)
	refused(t, err, alloc.ErrMalformed)
	commit(t, p.Store, alloc.Tx{Delete: []alloc.Key{key}})
}

func testUnreadableCheckpoint(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	h := must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(a.Sandbox())))
	key := h.Checkpoint.Key()
	p.without(t, key, a.confirm(t, h), a.abort(t, h), b.claims(t, h), b.clone(t, h))
	h = must[alloc.Handoff](t)(p.Confirm(t.Context(), a.Confirm(h, alloc.SeenStopped)))
	p.without(t, key, b.claims(t, h))
	h = claim(t, b, h, "r")
	p.without(t, key, b.claims(t, h), b.binds(t, h), b.releases(t, h))
	h = bind(t, b, h, "r")
	p.without(t, key, b.open(t, &h.Sandbox), a.clone(t, h))
	transit(t, b, &h.Sandbox)
}

func testUnreadableRequest(t *testing.T, p *Pool) {
	done := alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 3}
	ranges := must[alloc.Ranges](t)(p.Allocate(t.Context(), done))
	again := useCase{"Allocate again", func() error { _, err := p.Allocate(t.Context(), done); return err }}
	others := func() error { // a caller with another id is not disturbed
		err := p.allocate(t).try()
		if err != nil {
			t.Errorf("beside a request that cannot be read: %v", err)
		}
		return again.try()
	}
	p.without(t, (&alloc.Request{ID: done.RequestID}).Key(), again, useCase{"Allocate beside", others})
	if got := must[alloc.Ranges](t)(p.Allocate(t.Context(), done)); got.Count() != 3 || got[0] != ranges[0] {
		t.Errorf("the retry got %v, the first answer was %v", got, ranges)
	}

	// The mark of the sweep: without it nobody knows which requests were forgotten.
	p.Clock.Move(3 * alloc.RequestLife)
	if n, err := p.SweepRequests(t.Context(), 100); n == 0 || err != nil {
		t.Fatal(n, err)
	}
	old := p.Clock.Now()
	if err := p.allocate(t).try(); err != nil {
		t.Fatal(err)
	}
	p.Clock.Move(3 * alloc.RequestLife)
	entries, _, err := p.Store.List(t.Context(), alloc.KindRequest, "", 1, 0)
	if err != nil || len(entries) != 1 {
		t.Fatal(entries, err)
	}
	mark := entries[0].Key
	p.without(t, mark, p.allocate(t), useCase{"SweepRequests", func() error { _, err := p.SweepRequests(t.Context(), 100); return err }})
	// What nobody can ask for any more goes in its time, readable or not.
	plant(t, p.Store, (&alloc.Request{ID: RequestID(old, 1)}).Key(), Malformed)
	if n, err := p.SweepRequests(t.Context(), 100); n < 2 || err != nil {
		t.Errorf("swept %d, %v", n, err)
	}
}
