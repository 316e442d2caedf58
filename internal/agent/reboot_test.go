package agent

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// reboot gives the host another boot id; processes of the boot before are then somebody else's.
func (h *host) reboot(id string) {
	h.t.Helper()
	file := filepath.Join(h.t.TempDir(), "boot_id")
	if err := os.WriteFile(file, []byte(id+"\n"), 0o600); err != nil {
		h.t.Fatal(err)
	}
	const path = "/proc/sys/kernel/random/boot_id"
	if err := unix.Mount(file, path, "", unix.MS_BIND, ""); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			h.t.Error(err)
		}
	})
}

// TestReboot: what the boot before left is settled by what was committed before it.
func TestReboot(t *testing.T) {
	for name, c := range map[string]struct {
		leave  func(*host) alloc.Serial
		state  alloc.SandboxState
		images alloc.CheckpointState
	}{
		"running": {func(h *host) alloc.Serial {
			c := container(h.t, containerFlags)
			return h.sandbox(c.pid)
		}, alloc.StateEnded, ""},
		"dumped": {func(h *host) alloc.Serial { return h.dump().sandbox }, alloc.StateEnded, alloc.CheckpointCopy},
		"dumped and vetoed": {func(h *host) alloc.Serial {
			c := container(h.t, containerFlags)
			sandbox := h.sandbox(c.pid)
			images := writeImages(h.t, "run", containerTypes...)
			r := h.criu()
			r.passes(criuhook.PreDump, c.pid, images)
			r.vetoed(criuhook.PostDump, c.pid, h.t.TempDir(), "images in")
			return sandbox
		}, alloc.StateEnded, ""},
		"claimed": {func(h *host) alloc.Serial {
			d := h.moved()
			h.parked(d, false)
			return d.sandbox
		}, alloc.StateInTransit, alloc.CheckpointOpen},
		"restored": {func(h *host) alloc.Serial {
			d := h.moved()
			h.restored(d.images)
			return d.sandbox
		}, alloc.StateEnded, alloc.CheckpointConsumed},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			sandbox := c.leave(h)
			if err := h.stop(); err != nil {
				t.Fatal(err)
			}
			h.reboot("11111111-2222-4333-8444-555555555555")
			h.start()
			if _, cp := h.reaches(sandbox, c.state); c.images != "" && cp.State != c.images {
				t.Errorf("the images are %s", cp.State)
			}
			h.settled()
			h.consistent()
		})
	}
}
