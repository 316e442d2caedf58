package agent

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"testing"

	"google.golang.org/grpc"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// hiding is a server that cannot read some of its sandboxes, by the owner that is asked for.
type hiding struct {
	nsallocv1.UnimplementedSandboxesServer
	unreadable map[string]uint64
}

func (h *hiding) List(_ context.Context, req *nsallocv1.SandboxesListRequest) (*nsallocv1.SandboxesListResponse, error) {
	return &nsallocv1.SandboxesListResponse{Sandboxes: []*nsallocv1.Sandbox{{Serial: 1<<48 | 7}}, Unreadable: h.unreadable[req.GetOwner()]}, nil
}

// TestOwnedIsWhole: what the server leaves out may be this host's. An agent that took the rest for all
// would give what lives there a second serial, so that it does not join. What is left out of other hosts' lists
// only, or of the pool's, keeps it from nothing.
func TestOwnedIsWhole(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	h := &hiding{}
	s := grpc.NewServer()
	nsallocv1.RegisterSandboxesServer(s, h)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	c, err := client.Dial("unix://"+l.Addr().String(), client.WithHost("a"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if owned, err := NewRemote(c).Owned(t.Context(), "a"); err != nil || len(owned) != 1 {
		t.Errorf("%v, %v", owned, err)
	}
	h.unreadable = map[string]uint64{"": 1, "b": 1}
	if owned, err := NewRemote(c).Owned(t.Context(), "a"); err != nil || len(owned) != 1 {
		t.Errorf("with one left out that is b's: %v, %v", owned, err)
	}
	h.unreadable = map[string]uint64{"": 1, "a": 1}
	if owned, err := NewRemote(c).Owned(t.Context(), "a"); !errors.Is(err, client.ErrIncomplete) || owned != nil {
		t.Errorf("with one left out: %v, %v", owned, err)
	}
}
