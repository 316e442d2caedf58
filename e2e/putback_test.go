package e2e

import (
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// TestStorePutBack: etcd is put back to a copy of its data, under running servers and with new ones. Nothing is
// issued from it, by servers that have seen more nor by one that has not: they ask each other, and one of them takes a
// new generation.
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

			// Server 0 has seen more. Whoever connects first asks it, and the pool opens in a generation of which
			// nothing was issued. Until then what is asked for is refused, or an unknown outcome.
			run := func(args ...string) (string, error) {
				out, err := exec.CommandContext(t.Context(), filepath.Join(binaries, "nsalloc"), append([]string{"--server", c.address(1)}, args...)...).CombinedOutput()
				return string(out), err
			}
			began := time.Now()
			opens, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			for i, door := range doors {
				err := until(opens, func(ctx context.Context) error {
					rs, err := door.Allocate(ctx, alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 1})
					for s := range rs.All() {
						if got[s] {
							t.Errorf("%s was acknowledged twice", s)
						}
						got[s] = true
						if s.Generation() != 2 {
							t.Errorf("server %d issued %s after its store was put back", i, s)
						}
					}
					if err != nil && !errors.Is(err, alloc.ErrRecovering) && !errors.Is(err, alloc.ErrUnavailable) && !errors.Is(err, alloc.ErrUnknownOutcome) {
						t.Errorf("from a store that was put back: %v", err)
					}
					return err
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			t.Logf("both servers issue %v after etcd was back", time.Since(began).Round(time.Millisecond))
			if log := c.servers[0].log.String() + c.servers[1].log.String(); !strings.Contains(log, "the store has lost history") || strings.Count(log, "a new generation was taken") != 1 {
				t.Errorf("the servers say\n%s", log)
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
