package testhost

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fakeDebootstrap puts a shell script in debootstrap's place, and the cache
// into a directory of the test. The script's last argument is the root.
func fakeDebootstrap(t *testing.T, script string) (cache string) {
	t.Helper()
	need(t)
	cache = t.TempDir()
	bin := t.TempDir()
	t.Setenv("NSALLOC_CACHE", cache)
	t.Setenv("NSALLOC_MIRROR", "")
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	text := "#!/bin/sh\nset -e\nfor root; do :; done\ncache=" + cache + "\n" + script
	if err := os.WriteFile(filepath.Join(bin, "debootstrap"), []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return cache
}

func roots(t *testing.T, cache string) []string {
	t.Helper()
	entries, err := os.ReadDir(cache)
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, e := range entries {
		if e.IsDir() && e.Name() != "run" {
			found = append(found, e.Name())
		}
	}
	return found
}

func TestRootFSOnce(t *testing.T) {
	cache := fakeDebootstrap(t, "echo x >>$cache/runs\nmkdir -p $root/etc $root/var/lib/apt/lists\necho $root >$root/etc/made")
	// Outdated ones: one that nobody uses, one that a pool has locked, and what
	// a builder that died left.
	for _, name := range []string{"rootfs-trixie-old", "rootfs-trixie-used", ".building-dead"} {
		if err := os.MkdirAll(filepath.Join(cache, name, "etc"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	used, err := lockRootFS(filepath.Join(cache, "rootfs-trixie-used"), unix.LOCK_SH)
	if err != nil {
		t.Fatal(err)
	}
	defer used.Close()
	var g sync.WaitGroup
	for range 4 {
		g.Go(func() {
			dir, err := RootFS(testContext(t, time.Minute), nil)
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := os.Stat(filepath.Join(dir, "etc/made")); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(filepath.Join(dir, "var/lib/apt/lists")); err == nil {
				t.Error("package lists are left")
			}
		})
	}
	g.Wait()
	if b, err := os.ReadFile(filepath.Join(cache, "runs")); err != nil || string(b) != "x\n" {
		t.Errorf("debootstrap ran %q times, %v; want once", b, err)
	}
	dir, err := rootFSDir()
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(roots(t, cache), " "); got != filepath.Base(dir)+" rootfs-trixie-used" {
		t.Errorf("the cache has %s", got)
	}
}

func TestRootFSFails(t *testing.T) {
	cache := fakeDebootstrap(t, "mkdir -p $root/etc\necho E: no such suite\nexit 3")
	_, err := RootFS(testContext(t, time.Minute), nil)
	if err == nil || !strings.Contains(err.Error(), "no such suite") || !strings.Contains(err.Error(), "NSALLOC_MIRROR") {
		t.Errorf("error lacks cause or fix: %v", err)
	}
	if got := roots(t, cache); len(got) > 0 {
		t.Errorf("a failed build left %v", got)
	}
}

func TestRootFSCancelled(t *testing.T) {
	cache := fakeDebootstrap(t, "mkdir -p $root/etc\nsetsid sleep 1000 &\necho $! >$cache/started\nwait")
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error, 1)
	go func() {
		_, err := RootFS(ctx, nil)
		failed <- err
	}()
	eventually(t, "debootstrap starts", func() error {
		_, err := os.Stat(filepath.Join(cache, "started"))
		return err
	})
	cancel()
	if err := <-failed; err == nil {
		t.Error("a cancelled build succeeded")
	}
	if got := roots(t, cache); len(got) > 0 {
		t.Errorf("a cancelled build left %v", got)
	}
}

func TestCacheDir(t *testing.T) {
	for dir, ok := range map[string]bool{"": true, "/x/y": true, "x": false, "/x:y": false, "/x,y": false} {
		t.Setenv("NSALLOC_CACHE", dir)
		if _, err := cacheDir(); (err == nil) != ok {
			t.Errorf("NSALLOC_CACHE=%q: %v", dir, err)
		}
	}
}
