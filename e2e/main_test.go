// Package e2e runs the released binaries on test hosts with real runc, real CRIU and real kernel
// namespaces, and looks at three places after each step: the processes, the agents, and the store.
package e2e

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/internal/testhost"
	"github.com/nsalloc/nsalloc/internal/testpool"
)

// binaries is where the built binaries are: NSALLOC_BIN, or built here. scratch is a directory of all tests.
var binaries, scratch string

func TestMain(m *testing.M) {
	testhost.Main()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	var err error
	if scratch, err = os.MkdirTemp("", "nsalloc-e2e-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(scratch)
	if binaries = os.Getenv("NSALLOC_BIN"); binaries != "" {
		if binaries, err = filepath.Abs(binaries); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}
	for _, name := range []string{"nsalloc", "nsalloc-agent", "nsalloc-hook", "nsalloc-server"} {
		cmd := exec.Command("go", "build", "-o", filepath.Join(scratch, name), "../cmd/"+name)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build %s: %v\n%s", name, err, out)
			return 1
		}
	}
	binaries = scratch
	return m.Run()
}

// needHosts leaves a test out where hosts cannot be made; in CI that is a failure.
func needHosts(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("makes hosts")
	}
	if err := testhost.Check(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

// newPool starts a pool; see needHosts.
func newPool(t *testing.T, hosts ...string) *pool {
	t.Helper()
	return startPool(t, testpool.Options{Hosts: hosts})
}

// startPool is newPool of more than hosts.
func startPool(t *testing.T, o testpool.Options) *pool {
	t.Helper()
	needHosts(t)
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute) // a cold cache builds the root file system
	defer cancel()
	o.Bin, o.Log = binaries, io.Discard
	p, err := testpool.Start(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() || os.Getenv("NSALLOC_E2E_LOGS") != "" {
			t.Log(p.Logs())
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return &pool{Pool: p, t: t}
}
