package agent

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// TestHookRefusals: nothing is done for who is not CRIU's hook, and the answer says why.
func TestHookRefusals(t *testing.T) {
	h := newHost(t)
	tree := container(t, containerFlags)
	h.serials(tree.pid)
	images := writeImages(t, "run", containerTypes...)
	c, other := h.criu(), h.criu()
	for name, o := range map[string]order{
		"let CRIU execute nsalloc-hook": {Action: criuhook.PreDump, Init: tree.pid, Images: images, Without: []string{criuhook.FDCRIU}},
		"CRIU named no root task":       {Action: criuhook.PreDump, Images: images},
		"its parent is":                 {Action: criuhook.PostDump, Init: tree.pid, Images: images, Claims: other.pid},
	} {
		if s := c.order(o); s.Verdict != criuhook.Veto || !strings.Contains(s.Message, name) {
			t.Errorf("%s: %+v", name, s)
		}
		c.end()
		c = h.criu()
	}
	// A stage that cannot veto passes, and says why it did nothing.
	if s := c.order(order{Action: criuhook.PostResume, Without: []string{criuhook.FDCRIU}}); s.Verdict != criuhook.Pass || s.Message == "" {
		t.Errorf("%+v", s)
	}
	c.passes("some-later-action", 0, "")
	d := h.criu()
	d.passes(criuhook.PreDump, tree.pid, images)
	if s := d.order(order{Action: criuhook.PostDump, Init: tree.pid}); s.Verdict != criuhook.Veto || !strings.Contains(s.Message, "image directory") {
		t.Errorf("no image directory: %+v", s)
	}
	e := h.criu()
	e.passes(criuhook.PreDump, tree.pid, images)
	e.vetoed(criuhook.PreRestore, 0, images, "began a dump")
	f := h.criu()
	f.vetoed(criuhook.PostRestore, tree.pid, images, "never came to pre-restore")
	for _, c := range []*criu{d, e, f} {
		c.end()
	}
	h.settled()
	h.consistent()
}

// TestTampered: images that are not what the pool knows.
func TestTampered(t *testing.T) {
	h := newHost(t)
	d := h.moved()
	path := filepath.Join(d.images, criuhook.ManifestName)
	manifest, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	edit := func(change func(*criuhook.Manifest)) []byte {
		m, _, err := criuhook.DecodeManifest(bytes.NewReader(manifest))
		if err != nil {
			t.Fatal(err)
		}
		change(m)
		b, _, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for reason, body := range map[string][]byte{
		"manifest":           manifest[:len(manifest)/2],
		"of pool":            edit(func(m *criuhook.Manifest) { m.Pool = "00000000-0000-4000-8000-000000000000" }),
		"of other images":    edit(func(m *criuhook.Manifest) { m.Images[0]++ }),
		"not the one that":   edit(func(m *criuhook.Manifest) { m.Source = "b" }),
		"no such checkpoint": edit(func(m *criuhook.Manifest) { m.Checkpoint += 1000 }),
	} {
		if err := os.WriteFile(path, body, 0o600); err != nil {
			t.Fatal(err)
		}
		c := h.criu()
		c.vetoed(criuhook.PreRestore, 0, d.images, reason)
		c.end()
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	c := h.criu()
	c.vetoed(criuhook.PreRestore, 0, d.images, "without the "+criuhook.ManifestName)
	c.end()
	if err := os.Symlink("/etc/passwd", path); err != nil {
		t.Fatal(err)
	}
	c = h.criu()
	c.vetoed(criuhook.PreRestore, 0, d.images, criuhook.ManifestName)
	c.end()
	h.settled()
	if s, _ := h.reaches(d.sandbox, alloc.StateInTransit); s.Claim != nil || len(s.Stints) != 1 {
		t.Errorf("%+v", s)
	}
	h.consistent()
}

// TestRunsNeverStayOpen: a run that names a sandbox which the pool does not know is over all the same.
func TestRunsNeverStayOpen(t *testing.T) {
	h := newHost(t)
	d := h.moved()
	path := filepath.Join(d.images, criuhook.ManifestName)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b = []byte(strings.ReplaceAll(string(b), d.sandbox.String(), "00010000000ffffe"))
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	c := h.criu()
	c.vetoed(criuhook.PreRestore, 0, d.images, "")
	c.end()
	h.settled()
}

// dialHook connects as anybody may who is root.
func (h *host) dialHook() *net.UnixConn {
	h.t.Helper()
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: h.cfg.HookSocket, Net: "unixpacket"})
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { c.Close() })
	return c
}

// TestGarbage: whatever comes in a packet is answered with a veto and its reason.
func TestGarbage(t *testing.T) {
	h := newHost(t)
	valid, err := criuhook.EncodeRequest(criuhook.Request{Action: criuhook.PreDump, Caller: criuhook.Script, CRIUPID: 1})
	if err != nil {
		t.Fatal(err)
	}
	big := append(valid, make([]byte, criuhook.MaxMessage)...)
	for reason, packet := range map[string][]byte{
		"not the JSON":     []byte("hello"),
		"version 99":       []byte(`{"version":99}`),
		"larger than":      big,
		"descriptors came": []byte(strings.Replace(string(valid), `"fds":[]`, `"fds":["criu"]`, 1)),
		"twice":            []byte(strings.Replace(string(valid), `"fds":[]`, `"fds":["criu","criu"]`, 1)),
		"let CRIU execute": valid,
	} {
		c := h.dialHook()
		if _, err := c.Write(packet); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, criuhook.MaxMessage)
		n, err := c.Read(buf)
		if err != nil {
			t.Errorf("%s: %v", reason, err)
			continue
		}
		r, err := criuhook.DecodeResponse(buf[:n])
		if err != nil || r.Verdict != criuhook.Veto || !strings.Contains(r.Message, reason) {
			t.Errorf("%s: %+v, %v", reason, r, err)
		}
	}
}

// TestFlood: connections that say nothing, and descriptors by the hundred, hold nobody up for long and
// leave nothing behind.
func TestFlood(t *testing.T) {
	h := newHost(t)
	tree := container(t, containerFlags)
	h.serials(tree.pid)
	images := writeImages(t, "run", containerTypes...)
	before := descriptors(t)
	var conns []*net.UnixConn
	for range maxHooks {
		conns = append(conns, h.dialHook())
	}
	rights := unix.UnixRights(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	for range 100 {
		c := h.dialHook()
		if _, _, err := c.WriteMsgUnix([]byte("{}"), rights, nil); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	c := h.criu()
	c.passes(criuhook.PreDump, tree.pid, images)
	c.end()
	for _, c := range conns {
		c.Close()
	}
	h.settled()
	h.eventually("all descriptors are closed", func() error {
		if n := descriptors(t); n > before+4 { // the tree's and CRIU's pipes are the test's
			return fmt.Errorf("%d, before %d", n, before)
		}
		return nil
	})
}

func descriptors(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// TestNoDescriptorsKept: what was watched for a run that is over is closed.
func TestNoDescriptorsKept(t *testing.T) {
	h := newHost(t)
	d := h.moved()
	h.settled()
	before := descriptors(t)
	c, _ := h.restored(d.images)
	c.end()
	h.settled()
	h.eventually("the descriptors are closed", func() error {
		if n := descriptors(t); n > before+4 { // CRIU's pipes are the test's
			return fmt.Errorf("%d, before %d", n, before)
		}
		return nil
	})
}

// TestNotRoot: only root is heard, whatever became of the socket's mode.
func TestNotRoot(t *testing.T) {
	h := newHost(t)
	if err := os.Chmod(h.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	ask := func() (string, error) {
		// The credentials of a socket are those of the thread that connects.
		type result struct {
			message string
			err     error
		}
		done := make(chan result)
		go func() {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				done <- result{err: err}
				return
			}
			defer unix.Close(fd)
			if err := asNobody(func() error { return unix.Connect(fd, &unix.SockaddrUnix{Name: h.cfg.HookSocket}) }); err != nil {
				done <- result{err: err}
				return
			}
			_, err = unix.Write(fd, []byte(`{"version":1,"action":"pre-dump","caller":"script","criu_pid":1,"fds":[]}`))
			buf := make([]byte, 4096)
			n := 0
			if err == nil {
				n, err = unix.Read(fd, buf)
			}
			done <- result{string(buf[:max(n, 0)]), err}
		}()
		r := <-done
		return r.message, r.err
	}
	if _, err := ask(); err != unix.EACCES {
		t.Errorf("connecting to the socket: %v", err)
	}
	if err := os.Chmod(h.cfg.HookSocket, 0o666); err != nil {
		t.Fatal(err)
	}
	if message, err := ask(); err != nil || !strings.Contains(message, "user 65534") {
		t.Errorf("%s, %v", message, err)
	}
}

// TestLateHook: the hook has gone when its answer comes; CRIU took that for a veto, and so does the agent.
func TestLateHook(t *testing.T) {
	h := newHost(t)
	d := h.moved()
	c := h.criu()
	c.passes(criuhook.PreRestore, 0, d.images)
	pid := c.tree(containerFlags, true)
	c.passes(criuhook.SetupNamespaces, pid, d.images)
	n := h.runs.open()[0]
	// The request is decided by hand, because no hook of ours ends at the right moment.
	req := &hookRequest{Request: criuhook.Request{Action: criuhook.PostRestore, Caller: criuhook.NotifyRPC, CRIUPID: c.pid}, files: map[string]*os.File{}, peer: os.Getpid()}
	for name, open := range map[string]func() (int, error){
		criuhook.FDCRIU:   func() (int, error) { return unix.PidfdOpen(c.pid, 0) },
		criuhook.FDInit:   func() (int, error) { return unix.PidfdOpen(pid, 0) },
		criuhook.FDImages: func() (int, error) { return unix.Open(d.images, unix.O_DIRECTORY|unix.O_CLOEXEC, 0) },
	} {
		fd, err := open()
		if err != nil {
			t.Fatal(err)
		}
		req.files[name] = os.NewFile(uintptr(fd), name)
	}
	defer req.close()
	ctx, cancel := context.WithTimeout(t.Context(), criuhook.AgentDeadline)
	defer cancel()
	var answer criuhook.Response
	err := h.decide(ctx, req, func(r criuhook.Response) error { answer = r; return syscall.EPIPE })
	if err == nil || answer.Verdict != criuhook.Pass {
		t.Fatalf("%+v, %v", answer, err)
	}
	done, err := n.hold(ctx)
	if err != nil {
		t.Fatal(err)
	}
	zero, closed := n.rec.ZeroGiven, n.rec.Closed
	done()
	if zero || !closed {
		t.Errorf("0 counts as given: %v, closed %v", zero, closed)
	}
	kill(pid) // as CRIU does
	c.end()
	h.reaches(d.sandbox, alloc.StateInTransit)
	h.settled()
	h.consistent()
}

// TestRequestIDs: what is asked again is asked under the same id, and nothing else is.
func TestRequestIDs(t *testing.T) {
	h := newHost(t)
	h.spare() // nothing else is asked meanwhile
	h.pool.store.SetFaults(func(op memstore.Op) memstore.Fault {
		if op.Commit && op.N%2 == 0 {
			return memstore.Fault{Outcome: memstore.Unavailable}
		}
		return memstore.Fault{}
	})
	for range 3 {
		h.serials(container(t, containerFlags).pid)
	}
	h.pool.store.SetFaults(nil)
	h.pool.mu.Lock()
	defer h.pool.mu.Unlock()
	asked, ids := len(h.pool.ids["Register"]), slices.Compact(h.pool.ids["Register"])
	if len(ids) != h.pool.calls["Register"] || asked <= len(ids) {
		t.Errorf("%d intents were asked %d times under %d ids", h.pool.calls["Register"], asked, len(ids))
	}
	slices.Sort(ids)
	if n := len(slices.Compact(ids)); n != h.pool.calls["Register"] {
		t.Errorf("%d intents have %d ids", h.pool.calls["Register"], n)
	}
}
