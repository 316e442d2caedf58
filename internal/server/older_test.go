package server

import (
	"errors"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// TestNewerAgent: what a newer agent says more than this server knows is not heeded, at any depth; a word
// that it does not know is refused, and nothing is recorded.
func TestNewerAgent(t *testing.T) {
	r, _ := serving(t)
	a := join(t, r.dial("a"), "a")
	raw := nsallocv1.NewSandboxesClient(a.Conn())
	more := func(m proto.Message) {
		m.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 1000, protowire.VarintType), 1))
	}
	register := func(change func(*nsallocv1.RegisterRequest)) (*nsallocv1.RegisterResponse, error) {
		cmd := a.newSandbox(nil)
		it := cmd.Items[0]
		req := &nsallocv1.RegisterRequest{RequestId: client.NewRequestID(), Incarnation: uint64(a.life), Spend: []*nsallocv1.Range{{First: uint64(cmd.Spend[0].First), Count: 3}},
			Items: []*nsallocv1.RegisterItem{{Sandbox: uint64(it.Sandbox), Add: []*nsallocv1.Binding{{Serial: uint64(it.Add[0].Serial), Type: nsallocv1.NamespaceType_NAMESPACE_TYPE_NET,
				Kernel: &nsallocv1.KernelId{BootId: a.boot, Id: it.Add[0].Kernel.ID, Inode: it.Add[0].Kernel.Inode}}}}}}
		change(req)
		return raw.Register(t.Context(), req)
	}
	resp, err := register(func(req *nsallocv1.RegisterRequest) {
		more(req)
		more(req.Items[0])
		more(req.Items[0].Add[0])
		more(req.Items[0].Add[0].Kernel)
	})
	if err != nil || len(resp.GetSandboxes()) != 1 {
		t.Errorf("fields of a newer agent: %v, %v", resp, err)
	}
	if _, err := register(func(req *nsallocv1.RegisterRequest) { req.Items[0].Add[0].Type = 99 }); !errors.Is(err, alloc.ErrInvalid) {
		t.Errorf("a namespace type of a newer agent: %v", err)
	}
	n := 0
	for _, err := range a.Sandboxes(t.Context(), client.Filter{Linearizable: true}) {
		if n++; err != nil {
			t.Fatal(err)
		}
	}
	if n != 1 {
		t.Errorf("%d sandboxes were recorded", n)
	}
}
