package alloctest

import (
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// testForgotten: a request of a host whose answer was lost is answered as before until so many others
// came that its record forgot it, and is then never applied again.
func testForgotten(t *testing.T, p *Pool) {
	for name, prepare := range map[string]func(a *Agent) func() error{
		"hello": func(a *Agent) func() error {
			cmd := a.Hello()
			cmd.Labels = map[string]string{"rack": "old"}
			return func() error { _, _, err := p.Hello(t.Context(), cmd); return err }
		},
		"hello-of-another-life": func(a *Agent) func() error {
			cmd := a.Hello()
			cmd.Nonce = "an-older-life-0123456"
			return func() error {
				h, _, err := p.Hello(t.Context(), cmd)
				if err == nil {
					a.Incarnation, a.Nonce = h.Incarnation, h.Nonce
				}
				return err
			}
		},
		"grant": func(a *Agent) func() error {
			cmd := alloc.GrantCommand{Mutation: a.Mutation(), Count: 7}
			return func() error { _, err := p.Grant(t.Context(), cmd); return err }
		},
		"register": func(a *Agent) func() error {
			cmd := a.New()
			return func() error { _, _, err := p.Register(t.Context(), cmd); return err }
		},
		"register-labels": func(a *Agent) func() error {
			sb := a.Sandbox()
			cmd := alloc.RegisterCommand{Mutation: a.Mutation(), Items: []alloc.RegisterItem{
				{Sandbox: sb.Serial, Epoch: sb.Epoch, Labels: map[string]string{"k": "old"}}}}
			return func() error { _, _, err := p.Register(t.Context(), cmd); return err }
		},
	} {
		a := p.Agent(name)
		again := prepare(a)
		if err := again(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if len(a.Record().Granted) == 0 { // a new life
			must[alloc.Ranges](t)(p.Grant(t.Context(), alloc.GrantCommand{Mutation: a.Mutation(), Count: 1000}))
		}
		for len(a.Record().Requests.Marks) < alloc.KeptRequests {
			a.Sandbox()
		}
		if err := again(); err != nil {
			t.Errorf("%s: asked again while its record knows it: %v", name, err)
		}
		for range alloc.KeptRequests {
			a.Sandbox()
		}
		before := get(t, p.Store, alloc.HostKey(name))[0].Token
		refused(t, again(), alloc.ErrRequestExpired)
		if after := get(t, p.Store, alloc.HostKey(name))[0].Token; after != before {
			t.Errorf("%s: it was applied again", name)
		}
		a.Sandbox() // fresh requests go on
	}
}

// testForgottenMoves: so it is with the moves of a sandbox. A Claim is the one that nothing else refuses:
// after its release it would claim again.
func testForgottenMoves(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	sb := a.Sandbox()
	open := a.Open(sb)
	h := must[alloc.Handoff](t)(p.Open(t.Context(), open))
	h = must[alloc.Handoff](t)(p.Confirm(t.Context(), a.Confirm(h, alloc.SeenStopped)))
	first := b.Claim(h, "r")
	again := func() error { _, err := p.Claim(t.Context(), first); return err }
	cmd := first
	for range alloc.KeptRequests {
		c := must[alloc.ClaimAnswer](t)(p.Claim(t.Context(), cmd))
		if err := again(); err != nil && alloc.ReasonOf(err) != alloc.ReasonRequestExpired {
			t.Fatal(err)
		}
		must[alloc.Handoff](t)(p.Release(t.Context(), b.Release(c.Handoff, "r")))
		cmd = b.Claim(h, "r")
	}
	before := get(t, p.Store, sb.Key())[0].Token
	refused(t, again(), alloc.ErrRequestExpired)
	_, err := p.Open(t.Context(), open)
	refused(t, err, alloc.ErrRequestExpired)
	if get(t, p.Store, sb.Key())[0].Token != before {
		t.Error("it was applied again")
	}
	must[alloc.ClaimAnswer](t)(p.Claim(t.Context(), cmd))
}

// testOldMarksLeave: marks that no server answers any more leave the record, and stay forgotten also for a
// server whose clock is wrong. A caller whose clock is behind is not refused for it.
func testOldMarksLeave(t *testing.T, p *Pool) {
	a, b := p.Agent("a"), p.Agent("b")
	cmd := alloc.GrantCommand{Mutation: a.Mutation(), Count: 7}
	must[alloc.Ranges](t)(p.Grant(t.Context(), cmd))
	behind := alloc.NewService(p.Store, func() time.Time { return p.Clock.Now().Add(-3 * alloc.RequestLife) })
	p.Clock.Move(3 * alloc.RequestLife)
	sb := a.Sandbox()
	if log := a.Record().Requests; len(log.Marks) != 1 || log.Forgotten != cmd.RequestID {
		t.Errorf("the record keeps %+v", log)
	}
	_, err := behind.Grant(t.Context(), cmd)
	refused(t, err, alloc.ErrRequestExpired)

	h := must[alloc.Handoff](t)(p.Open(t.Context(), a.Open(sb)))
	h = must[alloc.Handoff](t)(p.Confirm(t.Context(), a.Confirm(h, alloc.SeenStopped)))
	claim := b.Claim(h, "r")
	claim.RequestID = RequestID(p.Clock.Now().Add(1e6-alloc.RequestLife), 1)
	must[alloc.ClaimAnswer](t)(p.Claim(t.Context(), claim))
}
