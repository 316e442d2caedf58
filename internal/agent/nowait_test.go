package agent

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// TestNoWait: who does not wait gets a provisional serial while the pool is there, and the same one is committed.
func TestNoWait(t *testing.T) {
	h := idleHost(t)
	h.quiet = true
	h.start()
	answer := make(chan struct{})
	goOn := sync.OnceFunc(func() { close(answer) })
	t.Cleanup(goOn)
	h.pool.before("Register", func() { <-answer })
	c := container(t, containerFlags)
	l := &local{a: h.Agent}
	resp, err := l.Identify(t.Context(), &nsallocv1.IdentifyRequest{Pid: int32(c.pid), NoWait: true})
	goOn()
	if err != nil {
		t.Fatal(err)
	}
	given := map[uint64]bool{}
	for _, n := range resp.GetNamespaces() {
		if n.GetProvisional() == n.GetOfHost() {
			t.Errorf("%v", n)
		}
		given[n.GetBinding().GetSerial()] = true
	}
	if resp, err = l.Identify(t.Context(), &nsallocv1.IdentifyRequest{Pid: int32(c.pid)}); err != nil {
		t.Fatal(err)
	}
	for _, n := range resp.GetNamespaces() {
		if n.GetProvisional() || !given[n.GetBinding().GetSerial()] {
			t.Errorf("%v", n)
		}
	}
	h.consistent()
}

// noWait is what a process has for one who does not wait; all of it must be provisional.
func (h *host) noWait(pid int) map[alloc.NamespaceType]alloc.Serial {
	h.t.Helper()
	resp, err := (&local{a: h.Agent}).Identify(h.t.Context(), &nsallocv1.IdentifyRequest{Pid: int32(pid), NoWait: true})
	if err != nil {
		h.t.Fatal(err)
	}
	given := map[alloc.NamespaceType]alloc.Serial{}
	for i, typ := range alloc.NamespaceTypes() {
		switch n := resp.GetNamespaces()[i]; { // one a type, in their order
		case n.GetOfHost():
		case !n.GetProvisional():
			h.t.Errorf("%s is called committed: %v", typ, n)
		default:
			given[typ] = alloc.Serial(n.GetBinding().GetSerial())
		}
	}
	if len(given) != len(containerTypes) {
		h.t.Fatalf("given %v", given)
	}
	return given
}

// asked has the method's next call wait, and returns when the agent has made it. What it returns lets the call go on.
func (h *host) asked(method string, begin func()) (goOn func()) {
	h.t.Helper()
	made, answer := make(chan struct{}), make(chan struct{})
	goOn = sync.OnceFunc(func() { close(answer) })
	h.t.Cleanup(goOn)
	h.pool.before(method, func() { close(made); <-answer })
	begin()
	h.eventually(method+" is asked for", func() error {
		select {
		case <-made:
			return nil
		default:
			return errors.New("it is not")
		}
	})
	return goOn
}

// TestNoWaitBeside: who does not wait gets serials also while somebody else waits for the pool, for what is being
// registered and for anything else. They stay, whatever the pool answers.
func TestNoWaitBeside(t *testing.T) {
	for name, f := range map[string]memstore.Fault{
		"answered": {}, "stored": {Outcome: memstore.Stored}, "lost": {Outcome: memstore.Lost}, "delayed": {Outcome: memstore.Delayed, After: 1}, "unavailable": {Outcome: memstore.Unavailable},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			if name != "answered" {
				h.pool.hitBy("Register", 1, f)
			}
			var first *proc
			goOn := h.asked("Register", func() { first = container(t, containerFlags) })
			another := container(t, containerFlags)
			later := h.noWait(another.pid)
			given := h.noWait(first.pid)
			same(t, later, h.noWait(another.pid))
			disjoint(t, given, later)
			goOn()
			h.comeBack()
			same(t, given, h.provisional(first.pid, false))
			same(t, later, h.provisional(another.pid, false))
			h.consistent()
		})
	}
}

// TestNoWaitRefused: the pool refuses a registration of which somebody has the serials. Where it refuses the batch they
// stay; what it refuses by itself gets others, and nothing else does.
func TestNoWaitRefused(t *testing.T) {
	refusal := &alloc.Error{Reason: alloc.ReasonInvalid, Msg: "not this one"}
	for _, forGood := range []bool{false, true} {
		name := map[bool]string{false: "once", true: "for good"}[forGood]
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			var bad atomic.Uint64
			var refused atomic.Int32
			h.pool.mu.Lock()
			h.pool.refuse = func(cmd alloc.RegisterCommand) error {
				is := slices.ContainsFunc(cmd.Items, func(it alloc.RegisterItem) bool {
					return slices.ContainsFunc(it.Add, func(b alloc.Binding) bool { return uint64(b.Serial) == bad.Load() })
				})
				if !is || !forGood && refused.Load() > 0 {
					return nil
				}
				refused.Add(1)
				return refusal
			}
			h.pool.mu.Unlock()
			var first *proc
			goOn := h.asked("Register", func() { first = container(t, containerFlags) })
			given := h.noWait(first.pid)
			bad.Store(uint64(given[alloc.UTS]))
			another := container(t, containerFlags)
			later := h.noWait(another.pid)
			goOn()
			h.comeBack()
			now := serialsOf(h.serials(first.pid))
			h.eventually("it is committed", func() error {
				now = serialsOf(h.serials(first.pid))
				if h.registrar.uncommitted.Load() > 0 || forGood && now[alloc.UTS] == given[alloc.UTS] {
					return errors.New("it is not")
				}
				return nil
			})
			if refused.Load() == 0 {
				t.Error("nothing was refused")
			}
			if forGood {
				disjoint(t, given, now)
				h.logged("a serial was replaced")
			} else {
				same(t, given, now)
			}
			same(t, later, h.provisional(another.pid, false))
			h.consistent()
		})
	}
}

// TestNoWaitJoins: nor does it wait while the pool's records are read anew.
func TestNoWaitJoins(t *testing.T) {
	h := newHost(t)
	h.spare()
	goOn := h.asked("Hello", func() { h.registrar.stale.Store(true) })
	c := container(t, containerFlags)
	given := h.noWait(c.pid)
	goOn()
	h.comeBack()
	same(t, given, h.provisional(c.pid, false))
	h.consistent()
}

// TestNoWaitAgentDies: the agent is gone in the middle. What was told is kept by the next one.
func TestNoWaitAgentDies(t *testing.T) {
	h := newHost(t)
	h.pool.hitBy("Register", 1, memstore.Fault{Outcome: memstore.Lost})
	var first *proc
	goOn := h.asked("Register", func() { first = container(t, containerFlags) })
	given := h.noWait(first.pid)
	another := container(t, containerFlags)
	later := h.noWait(another.pid)
	h.pool.setAway(true)
	goOn()
	h.mustStop()
	h.startAway()
	same(t, given, h.provisional(first.pid, true))
	same(t, later, h.provisional(another.pid, true))
	h.comeBack()
	same(t, given, h.provisional(first.pid, false))
	same(t, later, h.provisional(another.pid, false))
	h.consistent()
}
