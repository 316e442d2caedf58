package agent

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// TestStray: without a PID namespace a dump leaves behind what is not below the root; it is refused while
// there is such a process. With one nothing can stay behind.
func TestStray(t *testing.T) {
	h := newHost(t)
	enter := []string{"--mount", "--uts", "--ipc", "--net"}
	for _, tc := range []struct {
		name  string
		flags uintptr
		left  bool
	}{{"the host's PID namespace", containerFlags &^ unix.CLONE_NEWPID, true}, {"its own", containerFlags, false}} {
		t.Run(tc.name, func(t *testing.T) {
			tree := container(t, tc.flags)
			h.serials(tree.pid)
			stray := inside(t, tree.pid, enter, 0)
			h.named(stray.pid, "cat")
			images := writeImages(t, "")
			c := h.criu()
			if tc.left {
				c.vetoed(criuhook.PreDump, tree.pid, images, "would leave it behind")
				c.end()
				c = h.criu()
				stray.end()
			}
			c.passes(criuhook.PreDump, tree.pid, images)
			c.end()
			h.settled()
		})
	}
	h.consistent()
}
