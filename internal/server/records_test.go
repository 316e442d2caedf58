package server

import (
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// TestMendOverTheWire: two sandboxes have one serial. What Check says mends it, for operators only, and the
// one that keeps the serial is found by it.
func TestMendOverTheWire(t *testing.T) {
	r, st := serving(t)
	ctx := t.Context()
	a, op := join(t, r.dial("a"), "a"), r.dial("")
	first, second := a.register(), a.register()
	clash := *second
	clash.Bindings = append([]alloc.Binding(nil), second.Bindings...)
	clash.Bindings[0].Serial = first.Bindings[0].Serial
	if _, err := st.Commit(ctx, alloc.Tx{Put: []alloc.Record{&clash}}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Client.Check(ctx); alloc.ReasonOf(err) != alloc.ReasonCaller {
		t.Errorf("a host checks: %v", err)
	}
	report, err := op.Check(ctx)
	if err != nil || report.Total != 1 || len(report.Findings) != 1 {
		t.Fatalf("%+v, %v", report, err)
	}
	cmd := alloc.MendCommand{RequestID: client.NewRequestID(), Kind: alloc.Kind(report.Findings[0].Mend[1]), ID: report.Findings[0].Mend[2]}
	if cmd.ID != second.Serial.String() {
		t.Errorf("the younger one is %s: %+v", second.Serial, report.Findings[0])
	}
	if _, err := a.Client.Mend(ctx, cmd); alloc.ReasonOf(err) != alloc.ReasonCaller {
		t.Errorf("a host mends: %v", err)
	}
	done, err := op.Mend(ctx, cmd)
	if err != nil || len(done.Changed) != 1 || done.Changed[0] != second.Key() || done.At.IsZero() {
		t.Fatalf("%+v, %v", done, err)
	}
	if report, err = op.Check(ctx); err != nil || report.Total != 0 || report.Aside != 1 {
		t.Errorf("afterwards: %+v, %v", report, err)
	}
	all := seen{}
	cmd.RequestID = client.NewRequestID()
	_, err = op.Mend(ctx, cmd)
	all.refused(t, err, alloc.ReasonRecordNotFound, codes.NotFound, false)
	cmd.RequestID, cmd.ID = client.NewRequestID(), first.Serial.String()
	_, err = op.Mend(ctx, cmd)
	all.refused(t, err, alloc.ReasonNothingToMend, codes.FailedPrecondition, false)
	for deadline := time.Now().Add(10 * time.Second); ; {
		found, err := op.Sandbox(ctx, first.Bindings[0].Serial, true)
		if err == nil && found.Sandbox.Serial != first.Serial {
			err = fmt.Errorf("it is of sandbox %s", found.Sandbox.Serial)
		}
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("serial %s: %v", first.Bindings[0].Serial, err)
		}
	}
}

// TestPartedIsNoClash: a namespace that went from one sandbox to another is found there, and nothing is
// read anew for it when a third sandbox is put aside.
func TestPartedIsNoClash(t *testing.T) {
	r, _ := serving(t)
	ctx := t.Context()
	a, op := join(t, r.dial("a"), "a"), r.dial("")
	from, other := a.register(), a.register()
	granted, err := a.Grant(ctx, alloc.GrantCommand{Mutation: a.mutation(), Count: 10})
	if err != nil {
		t.Fatal(err)
	}
	spend, _, _ := granted.Take(1)
	b := from.Bindings[0]
	out, _, err := a.Register(ctx, alloc.RegisterCommand{Mutation: a.mutation(), Spend: spend, Items: []alloc.RegisterItem{
		{Sandbox: from.Serial, Epoch: from.Epoch, Part: []alloc.Serial{b.Serial}},
		{Sandbox: spend[0].First, Add: []alloc.Binding{{Serial: b.Serial, Type: b.Type, Kernel: b.Kernel}}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := op.Mend(ctx, alloc.MendCommand{RequestID: client.NewRequestID(), Kind: alloc.KindSandbox, ID: other.Serial.String(), Force: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := op.Sandbox(ctx, other.Serial, true); alloc.ReasonOf(err) != alloc.ReasonSerialNotFound {
		t.Errorf("what was put aside: %v", err)
	}
	for what, find := range map[string]func() (client.Found, error){
		"serial":    func() (client.Found, error) { return op.Sandbox(ctx, b.Serial, true) },
		"namespace": func() (client.Found, error) { return op.SandboxOf(ctx, "a", b.Type, b.Kernel, true) },
	} {
		if f, err := find(); err != nil || f.Sandbox.Serial != out[1].Serial {
			t.Errorf("by its %s it is found in %+v, %v; want %s", what, f.Sandbox, err, out[1].Serial)
		}
	}
	r.view.mu.RLock()
	defer r.view.mu.RUnlock()
	if r.view.loads != 1 {
		t.Errorf("the view was loaded %d times", r.view.loads)
	}
}

// TestSetPolicyOverTheWire: for operators only, a field that this server does not know is refused and none is set, and what is
// set is shown to everybody.
func TestSetPolicyOverTheWire(t *testing.T) {
	r, _ := serving(t)
	ctx, all := t.Context(), seen{}
	a, op := join(t, r.dial("a"), "a"), r.dial("")
	cmd := alloc.SetPolicyCommand{RequestID: client.NewRequestID(), Fields: map[string]string{"host-quota": "0", "over": "clone"}}
	if _, err := a.Client.SetPolicy(ctx, cmd); alloc.ReasonOf(err) != alloc.ReasonCaller {
		t.Errorf("a host sets the policy: %v", err)
	}
	later := cmd
	later.Fields = map[string]string{"host-quota": "0", "field-to-come": "1"}
	_, err := op.SetPolicy(ctx, later)
	all.refused(t, err, alloc.ReasonInvalid, codes.InvalidArgument, false)
	want := alloc.DefaultPolicy()
	for range 2 {
		if pool, _, err := a.Client.Pool(ctx); err != nil || pool.Policy != want {
			t.Errorf("%+v, %v", pool, err)
		}
		want.Over, want.HostQuota = alloc.PolicyClone, alloc.NoHostQuota
		if pool, err := op.SetPolicy(ctx, cmd); err != nil || pool.Policy != want {
			t.Fatalf("%+v, %v", pool, err)
		}
		for deadline := time.Now().Add(10 * time.Second); ; { // the view may be moments behind
			pool, _, err := a.Client.Pool(ctx)
			if err == nil && pool.Policy == want {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%+v, %v", pool, err)
			}
		}
	}
}
