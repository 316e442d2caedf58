package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/nsalloc/nsalloc/internal/etcdembed"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// process is the command under test.
type process struct {
	lines  []string // of the ready text
	stop   func() error
	stderr *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ns")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// launch runs the command until it is ready.
func launch(t *testing.T, args ...string) *process {
	t.Helper()
	p := &process{stderr: new(lockedBuffer)}
	ctx, cancel := context.WithCancel(context.Background())
	out, in := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := run(ctx, args, in, p.stderr)
		_ = in.Close()
		done <- err
	}()
	var once sync.Once
	var result error
	p.stop = func() error {
		once.Do(func() { cancel(); result = <-done })
		return result
	}
	t.Cleanup(func() {
		_ = p.stop()
		if t.Failed() {
			t.Log(p.stderr.String())
		}
	})
	ready := make(chan string, 1)
	go func() {
		var text strings.Builder
		b := make([]byte, 4096)
		for {
			n, err := out.Read(b)
			text.Write(b[:n])
			if strings.HasSuffix(text.String(), "ready\n") || err != nil {
				ready <- text.String()
				break
			}
		}
		_, _ = io.Copy(io.Discard, out)
	}()
	select {
	case text := <-ready:
		p.lines = strings.Split(strings.TrimSpace(text), "\n")
		if p.lines[len(p.lines)-1] != "ready" {
			t.Fatalf("it ended before it was ready: %v\n%s", p.stop(), p.stderr)
		}
	case <-time.After(30 * time.Second):
		t.Fatalf("it was not ready in 30 s\n%s", p.stderr)
	}
	return p
}

func dial(t *testing.T, line string) *client.Client {
	t.Helper()
	c, err := client.Dial(strings.TrimPrefix(line, "listen "))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func allocate(t *testing.T, c *client.Client) alloc.Ranges {
	t.Helper()
	got, err := c.Allocate(t.Context(), alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 3})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// TestOneServer: an etcd of its own, a pool by itself, and the same pool after a restart.
func TestOneServer(t *testing.T) {
	dir := tempDir(t)
	socket, readyFile := filepath.Join(dir, "run", "deep", "s.sock"), filepath.Join(dir, "ready")
	args := []string{"--data-dir", filepath.Join(dir, "data"), "--listen", "unix://" + socket, "--listen", ":0", "--metrics", "127.0.0.1:0", "--ready-file", readyFile, "--log-format", "json"}
	p := launch(t, args...)
	if len(p.lines) != 4 || p.lines[0] != "listen unix://"+socket || !strings.HasPrefix(p.lines[1], "listen 127.0.0.1:") || !strings.HasPrefix(p.lines[2], "metrics 127.0.0.1:") {
		t.Errorf("it said %q", p.lines)
	}
	if text, err := os.ReadFile(readyFile); err != nil || string(text) != strings.Join(p.lines, "\n")+"\n" {
		t.Errorf("the ready file has %q, %v", text, err)
	}
	for path, want := range map[string]os.FileMode{socket: 0o600, filepath.Dir(socket): 0o755, filepath.Join(dir, "data"): 0o700} {
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != want {
			t.Errorf("%s has %v, %v; want %v", path, fi.Mode().Perm(), err, want)
		}
	}
	first := allocate(t, dial(t, p.lines[0]))
	pool, _, err := dial(t, p.lines[1]).Pool(t.Context())
	if err != nil {
		t.Fatal(err)
	}

	// A second server finds the socket, or the data, taken.
	for _, more := range [][]string{
		{"--data-dir", filepath.Join(dir, "other"), "--listen", "unix://" + socket},
		{"--data-dir", filepath.Join(dir, "data"), "--listen", ":0"},
	} {
		if err := run(t.Context(), more, io.Discard, io.Discard); err == nil || exitCode(err) != 1 || !strings.Contains(err.Error(), "stop that one") {
			t.Errorf("a second server with %v: %v", more, err)
		}
	}
	allocate(t, dial(t, p.lines[0]))
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}

	p = launch(t, args...)
	c := dial(t, p.lines[0])
	again, _, err := c.Pool(t.Context())
	if err != nil || again.UUID != pool.UUID {
		t.Errorf("after a restart the pool is %v, was %v: %v", again, pool, err)
	}
	if next := allocate(t, c); next[0].First <= first[0].Last() {
		t.Errorf("after a restart it issued %v, after %v", next, first)
	}
}

// TestYourEtcd: a server over an etcd without a pool waits; init-pool creates it, once, and the server
// begins to serve.
func TestYourEtcd(t *testing.T) {
	etcd, err := etcdembed.Start(t.Context(), etcdembed.Config{Dir: tempDir(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer etcd.Close()
	p := launch(t, "--etcd", etcd.Endpoint(), "--pool", "mine", "--listen", "127.0.0.1:0", "--data-dir", tempDir(t))
	c := dial(t, p.lines[0])
	if _, _, err := c.Pool(t.Context()); !errors.Is(err, alloc.ErrPoolMissing) {
		t.Errorf("without a pool: %v", err)
	}
	want := "nsalloc pool init --etcd " + etcd.Endpoint() + " --pool mine"
	for began := time.Now(); !strings.Contains(p.stderr.String(), want); time.Sleep(5 * time.Millisecond) {
		if time.Since(began) > 10*time.Second {
			t.Fatalf("the log does not say %q", want)
		}
	}
	initPool := func(more ...string) (string, error) {
		var out bytes.Buffer
		err := run(t.Context(), append([]string{"init-pool", "--etcd", etcd.Endpoint(), "--pool", "mine"}, more...), &out, io.Discard)
		return out.String(), err
	}
	if _, err := initPool("--policy-live", "adopt"); exitCode(err) != 2 || !strings.Contains(err.Error(), "--policy-live") {
		t.Errorf("a policy that there is not: %v", err)
	}
	out, err := initPool("--policy-live", "refuse")
	if err != nil || !strings.HasPrefix(out, "pool mine created: ") {
		t.Fatalf("%q, %v", out, err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		pool, _, err := c.Pool(t.Context())
		if err == nil {
			if pool.Policy.Live != alloc.PolicyRefuse || !strings.Contains(out, pool.UUID) {
				t.Errorf("the pool is %+v, init-pool said %q", pool, out)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
	allocate(t, c)
	if _, err := initPool(); !errors.Is(err, alloc.ErrPoolExists) || exitCode(err) != 4 {
		t.Errorf("a second init-pool: %v", err)
	}
}

// TestAwayEtcd: init-pool says that etcd is not there.
func TestAwayEtcd(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if err := run(ctx, []string{"init-pool", "--etcd", "http://127.0.0.1:1"}, io.Discard, io.Discard); exitCode(err) != 5 {
		t.Errorf("exit code %d: %v", exitCode(err), err)
	}
}

func TestUsage(t *testing.T) {
	dir := tempDir(t)
	plain, data := filepath.Join(dir, "file"), filepath.Join(dir, "data")
	if err := os.WriteFile(plain, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"--nonsense"}, 2, "--help"},
		{[]string{"nonsense"}, 2, "not understood"},
		{[]string{"--log-level", "loud"}, 2, "--log-level"},
		{[]string{"--log-format", "xml"}, 2, "--log-format"},
		{[]string{"--pool", "../x"}, 2, "--pool"},
		{[]string{"--data-dir", data, "--listen", "0.0.0.0:0"}, 2, "--insecure"},
		{[]string{"--data-dir", data, "--listen", "[::]:0"}, 2, "--insecure"},
		{[]string{"--data-dir", data, "--listen", "192.0.2.1:1"}, 2, "--insecure"},
		{[]string{"--data-dir", data, "--listen", "nonsense"}, 2, "unix:///PATH"},
		{[]string{"--data-dir", data, "--listen", "unix://relative"}, 2, "absolute"},
		{[]string{"--data-dir", data, "--listen", "unix:///" + strings.Repeat("x", 200)}, 2, "the kernel takes"},
		{[]string{"--data-dir", data, "--listen", "unix://" + plain}, 1, "not a socket"},
		{[]string{"--data-dir", plain, "--listen", ":0"}, 1, plain},
		{[]string{"--data-dir", "", "--listen", ":0"}, 2, "--data-dir"},
		{[]string{"--data-dir", data, "--listen", ":0", "--listen", ":none"}, 1, "none"},
		{[]string{"--data-dir", data, "--listen", ":0", "--metrics", "nonsense"}, 2, "--metrics"},
		{[]string{"--data-dir", data, "--etcd-cacert", plain}, 2, "--etcd"},
		{[]string{"--etcd", "etcd-1:2379"}, 2, "https://"},
		{[]string{"--etcd", "https://a:1,http://b:1"}, 2, "mixes"},
		{[]string{"--etcd", "http://a:1", "--etcd-cacert", plain}, 2, "https"},
		{[]string{"--etcd", "https://a:1", "--etcd-cert", plain}, 2, "together"},
		{[]string{"--etcd", "https://a:1", "--etcd-cacert", plain}, 2, "no certificate"},
		{[]string{"--etcd", "https://a:1", "--etcd-cacert", filepath.Join(dir, "none")}, 1, "no such file"},
		{[]string{"init-pool"}, 2, "--etcd"},
	} {
		err := run(t.Context(), c.args, io.Discard, io.Discard)
		if exitCode(err) != c.code || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: exit code %d, %v; want %d and %q", c.args, exitCode(err), err, c.code, c.want)
		}
	}
	if _, err := os.Stat(data); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what was refused has left a data directory: %v", err)
	}
	var out bytes.Buffer
	if err := run(t.Context(), []string{"--version"}, &out, io.Discard); err != nil || out.String() != "nsalloc-server "+version+"\n" {
		t.Errorf("--version: %q, %v", &out, err)
	}
}

// TestStaleSocket: what a killed server left is replaced; what is served is not, whoever serves it.
func TestStaleSocket(t *testing.T) {
	path := filepath.Join(tempDir(t), "s.sock")
	stale, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listen(t.Context(), "unix://"+path, false); err == nil || !strings.Contains(err.Error(), "somebody serves") {
		t.Fatalf("a socket that is served: %v", err)
	}
	stale.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := stale.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := listen(t.Context(), "unix://"+path, false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listen(t.Context(), "unix://"+path, false); err == nil || !strings.Contains(err.Error(), "another server holds") {
		t.Fatalf("a second one at once: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if l, err = listen(t.Context(), "unix://"+path, false); err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
}

// TestSystemd: READY and STOPPING reach the notify socket.
func TestSystemd(t *testing.T) {
	dir := tempDir(t)
	addr := &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"}
	l, err := net.ListenUnixgram("unixgram", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", addr.Name)
	p := launch(t, "--data-dir", filepath.Join(dir, "data"), "--listen", ":0")
	expect := func(want string) {
		t.Helper()
		b := make([]byte, 256)
		_ = l.SetReadDeadline(time.Now().Add(10 * time.Second))
		n, err := l.Read(b)
		if err != nil || string(b[:n]) != want {
			t.Errorf("systemd got %q, %v; want %q", b[:n], err, want)
		}
	}
	expect("READY=1")
	if err := p.stop(); err != nil {
		t.Error(err)
	}
	expect("STOPPING=1")
}
