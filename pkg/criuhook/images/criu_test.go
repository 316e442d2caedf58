//go:build linux

package images

import (
	"context"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/internal/testhost"
)

var update = flag.Bool("update", false, "write what CRIU does now to testdata")

func TestMain(m *testing.M) {
	testhost.Main()
	os.Exit(m.Run())
}

// rootFS is a root file system that has CRIU, iproute2 and util-linux in it. A machine that cannot have
// one leaves the test out; in CI that is a failure, or nobody would notice that nothing is tested.
func rootFS(t *testing.T) string {
	t.Helper()
	if testing.Short() {
		t.Skip("dumps and restores with CRIU")
	}
	if err := testhost.Check(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	root, err := testhost.RootFS(ctx, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// TestCRIU dumps and restores real trees and reads their images. With -update, testdata becomes what it
// saw.
func TestCRIU(t *testing.T) {
	root := rootFS(t)
	tree := filepath.Join(t.TempDir(), "tree")
	build := exec.Command("go", "build", "-o", tree, "./testdata/tree")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // it runs in there, with no say in which libc
	if b, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, b)
	}
	out := t.TempDir()
	host := exec.CommandContext(t.Context(), tree, "host", root, out)
	host.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWNET,
		Pdeathsig:  syscall.SIGKILL,
	}
	if b, err := host.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, b)
	}
	checkNested(t, filepath.Join(out, "nested"))
	checkShared(t, filepath.Join(out, "shared"))
	if !*update {
		return
	}
	for _, dir := range []string{"nested", "shared"} {
		if err := os.RemoveAll(filepath.Join("testdata", dir)); err != nil {
			t.Fatal(err)
		}
		for _, pattern := range []string{"inventory.img", "pstree.img", "ids-*.img", "netns-*.img", "*.json"} {
			names, err := filepath.Glob(filepath.Join(out, dir, pattern))
			if err != nil || len(names) == 0 {
				t.Fatal(pattern, err)
			}
			for _, name := range names {
				b, err := os.ReadFile(name)
				if err != nil {
					t.Fatal(err)
				}
				to := filepath.Join("testdata", strings.TrimPrefix(name, out))
				if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(to, b, 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
}
