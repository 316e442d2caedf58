// Package testhost makes "hosts" out of namespaces on one machine, so that the
// demo and the end-to-end tests can move real containers with real CRIU
// between hosts without a second machine.
//
// A [Pool] is a network namespace with a bridge in it; the nsalloc server runs
// there, on the machine's own file system. A [Host] hangs off that bridge. It
// has namespaces of its own (mount, PID, network, UTS, IPC, cgroup), an
// overlay on a Debian root file system ([RootFS]), a boot id of its own, and a
// PID 1 that reaps orphans. What the hosts still share is the kernel: inode
// numbers and kernel ids of namespaces come from one counter, which two real
// machines would not do. No test may rely on that.
//
// # What a caller must do
//
// PID 1 of a host, and the relay behind every [Host.Command], are this very
// binary, executed again. So the first statement of main, or of TestMain, is
//
//	testhost.Main()
//
// which returns at once in a process that is not such a copy. [NewPool]
// refuses to run in a program that has not called it.
//
//	rootfs, err := testhost.RootFS(ctx, os.Stderr)
//	pool, err := testhost.NewPool(ctx, testhost.Options{RootFS: rootfs, Hosts: []string{"a", "b"}})
//	defer pool.Close()
//	out, err := pool.Host("a").Command(ctx, "hostname").Output()
//
// # What happens when the creator dies
//
// Every PID 1 holds one end of a socket to its creator and leaves when the
// other end is gone, however the creator died; the kernel then kills
// everything in its PID namespace, and mounts and links go with the
// namespaces. Directories and cgroups stay behind; [Reap], which NewPool calls
// first, removes those of creators that are no more.
package testhost

import (
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
)

// The roles of a re-executed copy, told by its argv[0]: unlike an environment
// variable that is never inherited by what the copy itself executes.
const (
	roleEnter = "nsalloc-testhost-enter" // PID 1, before it is in its cgroups
	roleInit  = "nsalloc-testhost-init"  // PID 1
	roleRelay = "nsalloc-testhost-relay" // stands for a command that runs inside
)

// self is how a copy is executed. The link works from any directory, and when
// the binary was replaced or deleted since (go run and go test do that).
const self = "/proc/self/exe"

var mainCalled atomic.Bool

// Main turns this process into what a re-executed copy has to be, and never
// returns in one. In any other process it returns at once.
func Main() {
	mainCalled.Store(true)
	if len(os.Args) == 0 {
		return
	}
	switch os.Args[0] {
	case roleEnter:
		enterMain()
	case roleInit:
		initMain()
	case roleRelay:
		relayMain()
	}
}

// cacheDir is where root file systems and the state of pools live.
func cacheDir() (string, error) {
	dir := os.Getenv("NSALLOC_CACHE")
	if dir == "" {
		dir = "/var/cache/nsalloc"
	}
	if !filepath.IsAbs(dir) {
		return "", fmt.Errorf("NSALLOC_CACHE=%q is not an absolute path: set it to one", dir)
	}
	for _, r := range dir {
		// Both separate overlayfs's mount options.
		if r == ':' || r == ',' || r == '\\' {
			return "", fmt.Errorf("cache directory %q contains %q, which overlayfs's options cannot carry: set NSALLOC_CACHE to another directory", dir, r)
		}
	}
	return filepath.Clean(dir), nil
}
