package e2e

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// TestStorePutBack: etcd is put back to a copy of its data, under running servers and with new ones. Nothing is
// issued from it, by servers that have seen more nor by one that has not; and what is issued after an operator
// has said that this is the store to go on with, nobody has.
func TestStorePutBack(t *testing.T) {
	if testing.Short() {
		t.Skip("stops and starts an etcd")
	}
	for _, restarted := range []bool{false, true} {
		name := "running servers"
		if restarted {
			name = "new servers"
		}
		t.Run(name, func(t *testing.T) {
			c := newCluster(t, 1)
			doors := [2]*client.Client{c.dial(0, ""), c.dial(1, "")}
			got := map[alloc.Serial]bool{}
			issue := func(i int, n uint64) {
				t.Helper()
				rs, err := doors[i].Serials(t.Context(), n)
				if err != nil {
					t.Fatal(err)
				}
				for s := range rs.All() {
					if got[s] {
						t.Fatalf("%s was acknowledged twice", s)
					}
					got[s] = true
				}
			}
			issue(0, 100)
			issue(1, 100)
			etcd, data := c.members[0], filepath.Join(c.dir, "m0")
			cp := func(from, to string) {
				t.Helper()
				if out, err := exec.Command("cp", "-a", from, to).CombinedOutput(); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
			}
			etcd.kill()
			cp(data, data+".old")
			c.begin(etcd)
			for range 20 {
				issue(0, 5000)
			}
			etcd.kill()
			if restarted {
				c.servers[0].kill()
				c.servers[1].kill()
			}
			cp(data, data+".new")
			if out, err := exec.Command("rm", "-rf", data).CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			cp(data+".old", data)
			c.begin(etcd)
			if restarted {
				c.begin(c.servers...)
			}

			// Server 0 has seen more. Server 1 issues from its own range until 0 has closed the pool, and that
			// range is in the snapshot.
			for range 2 {
				_, err := doors[0].Allocate(t.Context(), alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 1})
				if !errors.Is(err, alloc.ErrRecovering) && !errors.Is(err, alloc.ErrUnavailable) && !errors.Is(err, alloc.ErrUnknownOutcome) {
					t.Errorf("from a store that was put back: %v", err)
				}
			}
			run := func(args ...string) (string, error) {
				out, err := exec.CommandContext(t.Context(), filepath.Join(binaries, "nsalloc"), append([]string{"--server", c.address(1)}, args...)...).CombinedOutput()
				return string(out), err
			}
			closed, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			err := until(closed, func(ctx context.Context) error {
				rs, err := doors[1].Allocate(ctx, alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 1})
				for s := range rs.All() { // until the pool is closed
					if got[s] {
						t.Errorf("%s was acknowledged twice", s)
					}
					got[s] = true
				}
				if errors.Is(err, alloc.ErrRecovering) && strings.Contains(err.Error(), "nsalloc pool recover") {
					return nil
				}
				return fmt.Errorf("the pool is not closed: %w", err)
			})
			cancel()
			if err != nil {
				t.Fatal(err)
			}
			seen, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			err = until(seen, func(context.Context) error { // the view of a server is moments behind
				out, err := run("pool", "status")
				if err == nil && !strings.Contains(out, "recovering") {
					err = errors.New(out)
				}
				return err
			})
			cancel()
			if err != nil {
				t.Error(err)
			}
			if log := c.servers[0].log.String(); !strings.Contains(log, "the store has lost history") {
				t.Errorf("server 0 says\n%s", log)
			}
			if out, err := run("pool", "recover", "--yes"); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			for range 20 {
				issue(0, 5000)
				issue(1, 5000)
			}
			if out, err := run("check"); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
			if out, err := run("pool", "status", "-o", "json"); err != nil || !strings.Contains(out, `"generation": 2`) || !strings.Contains(out, `"open"`) {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}
