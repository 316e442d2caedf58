package agent

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// TestLocalStatus: a refusal stays one; a failure of the agent's own is logged and says its cause.
func TestLocalStatus(t *testing.T) {
	logs := &lockedBuffer{}
	a := &Agent{log: slog.New(slog.NewTextHandler(logs, nil))}
	for err, want := range map[error]codes.Code{
		&alloc.Error{Reason: alloc.ReasonProcessNotFound}: codes.NotFound,
		context.DeadlineExceeded:                          codes.DeadlineExceeded,
	} {
		if got := a.localStatus("m", err); status.Code(got) != want {
			t.Errorf("%v is answered %v", err, got)
		}
	}
	if a.localStatus("m", nil) != nil || logs.String() != "" {
		t.Errorf("logged %q", logs)
	}
	err := a.localStatus("/m", errors.New("read process 7: permission denied"))
	if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "the agent failed: read process 7: permission denied; see its log") {
		t.Error(err)
	}
	if !strings.Contains(logs.String(), "permission denied") || !strings.Contains(logs.String(), "method=/m") {
		t.Errorf("logged %q", logs)
	}
}

// TestIdentifyOnce: who asks while the pool is away and no serials are left is told why, and gRPC does not ask
// again by itself until there is no time left to be told.
func TestIdentifyOnce(t *testing.T) {
	h := newHost(t)
	h.spare()
	h.pool.setAway(true)
	h.useUp(4)
	fresh := container(t, containerFlags)
	conn, err := client.DialConn("unix://" + h.config().AgentSocket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var trailer metadata.MD
	_, err = nsallocv1.NewAgentClient(conn).Identify(t.Context(), &nsallocv1.IdentifyRequest{Pid: int32(fresh.pid)}, grpc.Trailer(&trailer))
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "5 are needed and 4 are left") && !strings.Contains(err.Error(), "6 are needed and 4 are left") {
		t.Error(err)
	}
	if got := trailer.Get("grpc-retry-pushback-ms"); !slices.Equal(got, []string{"-1"}) {
		t.Errorf("pushback %q", got)
	}
	h.pool.setAway(false)
}

// TestNotInitial: the machine's own namespaces have fixed numbers; a container's do not.
func TestNotInitial(t *testing.T) {
	dir := t.TempDir()
	for name, link := range map[string]string{"pid": "pid:[4026531836]", "user": "user:[4026532000]"} {
		if err := os.Symlink(link, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if got := notInitial(dir); !slices.Equal(got, []string{"user:[4026532000]"}) {
		t.Errorf("%q", got)
	}
	if got := notInitial(filepath.Join(dir, "none")); got != nil {
		t.Errorf("unreadable: %q", got)
	}
	if os.Getpid() == 1 && len(notInitial("/proc/self/ns")) == 0 {
		t.Error("the test's own pid namespace passes for the machine's")
	}
}

// TestLogsOfAHost: containers are counted at level info, not listed, and the end is said.
func TestLogsOfAHost(t *testing.T) {
	h := newHost(t)
	c := container(t, containerFlags)
	h.serials(c.pid)
	if err := h.stop(); err != nil {
		t.Fatal(err)
	}
	logs := h.logs.String()
	for _, want := range []string{"msg=numbered sandboxes=", "msg=stopped", "the agent is in a container"} {
		if !strings.Contains(logs, want) {
			t.Errorf("the log lacks %q", want)
		}
	}
	if strings.Contains(logs, "msg=registered") {
		t.Error("a single sandbox is in the log")
	}
}
