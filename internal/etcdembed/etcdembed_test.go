package etcdembed_test

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/nsalloc/nsalloc/internal/etcdembed"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// shortDir is t.TempDir with a path that a socket's fits in.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "etcd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func start(t *testing.T, cfg etcdembed.Config) *etcdembed.Server {
	t.Helper()
	s, err := etcdembed.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func client(t *testing.T, endpoint string) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func put(t *testing.T, endpoint, key, value string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := client(t, endpoint).Put(ctx, key, value); err != nil {
		t.Fatal(err)
	}
}

func get(t *testing.T, endpoint, key string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	resp, err := client(t, endpoint).Get(ctx, key)
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.Kvs) == 0 {
		return ""
	}
	return string(resp.Kvs[0].Value)
}

func TestDataSurvivesARestart(t *testing.T) {
	cfg := etcdembed.Config{Dir: filepath.Join(shortDir(t), "new")}
	s := start(t, cfg)
	put(t, s.Endpoint(), "k", "v")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.Done():
	default:
		t.Error("closed, and Done is not")
	}
	if got := get(t, start(t, cfg).Endpoint(), "k"); got != "v" {
		t.Errorf("after a restart the value is %q", got)
	}
}

func TestOnlyTheOwnerGetsIn(t *testing.T) {
	dir := shortDir(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s := start(t, etcdembed.Config{Dir: dir})
	for path, want := range map[string]os.FileMode{
		dir:                        0o700,
		filepath.Join(dir, "etcd"): 0o700,
		strings.TrimPrefix(s.Endpoint(), "unix://"): 0o600,
	} {
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if fi.Mode().Perm() != want {
			t.Errorf("%s has mode %v, want %v", path, fi.Mode().Perm(), want)
		}
	}
}

func TestADirectoryHasOneServer(t *testing.T) {
	cfg := etcdembed.Config{Dir: shortDir(t)}
	s := start(t, cfg)
	if _, err := etcdembed.Start(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), cfg.Dir+" is served already") {
		t.Errorf("the second start: %v", err)
	}
	// The first one still serves.
	put(t, s.Endpoint(), "k", "v")
}

func TestServersDoNotMeet(t *testing.T) {
	a := start(t, etcdembed.Config{Dir: shortDir(t)})
	b := start(t, etcdembed.Config{Dir: shortDir(t), Listen: "http://127.0.0.1:0"})
	c := start(t, etcdembed.Config{Dir: shortDir(t), Listen: "http://127.0.0.1:0"})
	put(t, a.Endpoint(), "k", "a")
	put(t, b.Endpoint(), "k", "b")
	put(t, c.Endpoint(), "k", "c")
	if got := get(t, a.Endpoint(), "k") + get(t, b.Endpoint(), "k") + get(t, c.Endpoint(), "k"); got != "abc" {
		t.Errorf("the servers hold %q", got)
	}
}

func TestListensOnThisMachineOnly(t *testing.T) {
	for _, listen := range []string{
		"http://0.0.0.0:2379", "http://[::]:2379", "http://192.0.2.1:2379", "http://localhost:2379", "http://example.com:1",
		"https://127.0.0.1:2379", "http://127.0.0.1", "127.0.0.1:2379", "relative.sock", "unix://relative.sock", "/" + strings.Repeat("x", 107),
	} {
		if s, err := etcdembed.Start(t.Context(), etcdembed.Config{Dir: shortDir(t), Listen: listen}); err == nil {
			t.Errorf("%s was taken", listen)
			_ = s.Close()
		}
	}
}

func TestCloseDoesNotWaitForWatches(t *testing.T) {
	s := start(t, etcdembed.Config{Dir: shortDir(t)})
	watch := client(t, s.Endpoint()).Watch(t.Context(), "k", clientv3.WithCreatedNotify())
	<-watch
	begin := time.Now()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took > 4*time.Second {
		t.Errorf("Close took %v", took)
	}
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func TestIsQuiet(t *testing.T) {
	var log syncBuffer
	cfg := etcdembed.Config{Dir: shortDir(t), Logger: slog.New(slog.NewTextHandler(&log, nil))}
	for range 2 {
		s := start(t, cfg)
		put(t, s.Endpoint(), "k", "v")
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	log.mu.Lock()
	defer log.mu.Unlock()
	if log.b.Len() > 0 {
		t.Errorf("a life without incident was logged:\n%s", &log.b)
	}
}
