package agent

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// runFile is the one open run's file as it is now, and puts it back later: what an agent leaves that
// dies after the pool has committed and before it has written so.
func (h *host) runFile() (putBack func()) {
	h.t.Helper()
	runs := h.runs.open()
	if len(runs) != 1 {
		h.t.Fatalf("%d open runs", len(runs))
	}
	path := filepath.Join(h.dir, "state", fileOf(runs[0].rec))
	body, err := os.ReadFile(path)
	if err != nil {
		h.t.Fatal(err)
	}
	return func() {
		h.t.Helper()
		if err := os.WriteFile(path, body, 0o600); err != nil {
			h.t.Fatal(err)
		}
	}
}

// TestDiesAfterAbort: the pool has it that the tree runs on; the agent dies before it wrote so, and the
// tree ends meanwhile. That is an end, and no evidence of the dump.
func TestDiesAfterAbort(t *testing.T) {
	h := newHost(t)
	d := h.dump()
	putBack := h.runFile()
	d.end()
	h.reaches(d.sandbox, alloc.StateRunning)
	h.settled()
	if err := h.stop(); err != nil {
		t.Fatal(err)
	}
	putBack()
	d.tree.end()
	h.start()
	h.reaches(d.sandbox, alloc.StateEnded)
	h.settled()
}

// TestDiesAfterConfirm: the pool has it that the tree was seen stopped; the next life of the agent knows
// no order of deaths, and changes nothing.
func TestDiesAfterConfirm(t *testing.T) {
	h := newHost(t)
	d := h.dump()
	putBack := h.runFile()
	d.tree.end()
	h.reaches(d.sandbox, alloc.StateInTransit)
	d.end()
	h.settled()
	if err := h.stop(); err != nil {
		t.Fatal(err)
	}
	putBack()
	h.start()
	h.settled()
	h.reaches(d.sandbox, alloc.StateInTransit)
}

// TestManifestChangedAfterClaim: a genuine manifest at pre-restore, another one at post-restore.
func TestManifestChangedAfterClaim(t *testing.T) {
	h := newHost(t)
	d := h.moved()
	path := filepath.Join(d.images, criuhook.ManifestName)
	body, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	m, _, err := criuhook.DecodeManifest(bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := range m.Namespaces {
		if m.Namespaces[i].Type == alloc.UTS {
			m.Namespaces[i].Owner = criuhook.OwnerExternal
		}
	}
	forged, _, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	c := h.criu()
	c.passes(criuhook.PreRestore, 0, d.images)
	if err := os.WriteFile(path, forged, 0o600); err != nil {
		t.Fatal(err)
	}
	pid := c.tree(containerFlags, false)
	c.passes(criuhook.SetupNamespaces, pid, d.images)
	if answer := c.bring(criuhook.PostRestore, pid, d.images); answer.Verdict != criuhook.Veto {
		t.Errorf("a manifest that was changed after the claim: %+v", answer)
	}
	h.reaches(d.sandbox, alloc.StateClaimed)
}
