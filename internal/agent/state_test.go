package agent

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// TestStateFiles: what is not as the agent left it is refused with a cause and a way out, and stays as
// it is.
func TestStateFiles(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	s, err := openState(state, "a")
	if err != nil {
		t.Fatal(err)
	}
	id, err := s.identity()
	if err != nil || id.Host != "a" || len(id.Nonce) != 32 {
		t.Fatalf("%+v, %v", id, err)
	}
	if _, err := openState(state, "a"); err == nil || !strings.Contains(err.Error(), "another agent has it locked") {
		t.Errorf("a second agent: %v", err)
	}
	s.Close()
	path := filepath.Join(state, "identity")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	flipped := []byte(string(good))
	flipped[len(flipped)-10] ^= 1
	for name, c := range map[string]struct {
		body   []byte
		reason string
	}{
		"empty":            {nil, "first line is not ours"},
		"cut in its head":  {good[:10], "first line is not ours"},
		"cut":              {good[:len(good)-20], "checksum"},
		"flipped":          {flipped, "checksum"},
		"another's file":   {[]byte("hello\nworld\n"), "first line is not ours"},
		"newer":            {[]byte(strings.Replace(string(good), "nsalloc-agent 1 ", "nsalloc-agent 2 ", 1)), "run the agent that wrote it, or a newer one"},
		"no format":        {[]byte(strings.Replace(string(good), "nsalloc-agent 1 ", "nsalloc-agent 0 ", 1)), "no format 0"},
		"larger than ours": {make([]byte, maxStateFile+1), "bytes"},
	} {
		if err := os.WriteFile(path, c.body, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := openState(state, "a")
		if err == nil || !strings.Contains(err.Error(), c.reason) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", name, err)
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != string(c.body) {
			t.Errorf("%s: the file was changed", name)
		}
	}
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openState(state, "b"); err == nil || !strings.Contains(err.Error(), `is of host "a", this agent is configured as "b"`) {
		t.Errorf("another host's: %v", err)
	}
	// What a crash leaves behind is cleaned up; what people put there is not.
	for _, name := range []string{".identity123", "runs/.x.run456", "notes"} {
		if err := os.WriteFile(filepath.Join(state, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s, err = openState(state, "a")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if again, err := s.identity(); err != nil || again != id {
		t.Errorf("%+v became %+v (%v)", id, again, err)
	}
	for name, there := range map[string]bool{".identity123": false, "runs/.x.run456": false, "notes": true} {
		if _, err := os.Stat(filepath.Join(state, name)); (err == nil) != there {
			t.Errorf("%s: there %v", name, err == nil)
		}
	}
}

// TestBrokenRun: an agent does not start on a run that it cannot read, and does without it.
func TestBrokenRun(t *testing.T) {
	h := newHost(t)
	d := h.dump()
	if err := h.stop(); err != nil {
		t.Fatal(err)
	}
	runs, err := filepath.Glob(filepath.Join(h.dir, "state", "runs", "*.run"))
	if err != nil || len(runs) != 1 {
		t.Fatalf("%v, %v", runs, err)
	}
	if err := os.Truncate(runs[0], 30); err != nil {
		t.Fatal(err)
	}
	a, err := New(h.config(), h.pool)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "move that file away") {
		t.Errorf("%v", err)
	}
	if err := os.Remove(runs[0]); err != nil {
		t.Fatal(err)
	}
	h.start()
	d.end()
	h.reaches(d.sandbox, "running")
	h.consistent()
}

// TestDiskFull: what cannot be written is not promised, and everything goes on when it can be.
func TestDiskFull(t *testing.T) {
	h := newHost(t)
	tree := container(t, containerFlags)
	sandbox := h.sandbox(tree.pid)
	images := writeImages(t, "run", containerTypes...)
	// A file system of its own, full: root writes through every permission.
	state := filepath.Join(h.dir, "state", "runs")
	if err := unix.Mount("tmpfs", state, "tmpfs", 0, "size=4k"); err != nil {
		t.Fatal(err)
	}
	full := true
	unmount := func() {
		if full {
			full = false
			if err := unix.Unmount(state, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		}
	}
	defer unmount()
	if err := os.WriteFile(filepath.Join(state, "ballast"), make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	c := h.criu()
	c.passes(criuhook.PreDump, tree.pid, images)
	c.vetoed(criuhook.PostDump, tree.pid, images, "free or repair the disk")
	c.end()
	h.eventually("the run waits for the disk", func() error {
		if n := h.runs.open(); len(n) != 1 {
			return errors.New("it is over")
		}
		return nil
	})
	unmount()
	h.settled()
	h.reaches(sandbox, "running")
	again := h.criu()
	again.passes(criuhook.PreDump, tree.pid, images)
	again.passes(criuhook.PostDump, tree.pid, images)
	tree.end()
	again.end()
	h.reaches(sandbox, "in_transit")
	h.settled()
	h.consistent()
}
