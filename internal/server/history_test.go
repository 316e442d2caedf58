package server

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/internal/lossy"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// doorOf is a server as a client sees it.
func doorOf(c *client.Client) alloctest.Door {
	return alloctest.Door{Calls: c, Look: func(ctx context.Context, s alloc.Serial) (*alloc.Sandbox, *alloc.Checkpoint, error) {
		found, err := c.Sandbox(ctx, s, true)
		return found.Sandbox, found.Checkpoint, err
	}}
}

// TestHistories: hosts move sandboxes about through two servers over one etcd, as their clients see it,
// also when connections break on both sides of the servers, and requests and answers are lost or late;
// and some order of single steps of the model explains what they were answered.
func TestHistories(t *testing.T) {
	lost := 0
	for seed := range uint64(2) {
		for _, faults := range []bool{false, true} {
			t.Run(fmt.Sprintf("faults=%v", faults), func(t *testing.T) {
				name := newPool()
				truth := openPool(t, shared.Endpoint(), name)
				initPool(t, truth)
				trouble, calm := context.WithCancel(t.Context())
				defer calm()
				var wg sync.WaitGroup
				var proxies uint64
				through := func(endpoint string) string {
					if !faults {
						return endpoint
					}
					proxies++
					p, seed := lossy.New(t, endpoint, ""), seed*10+proxies
					wg.Go(func() { p.Trouble(trouble, seed, time.Second) })
					return p.Endpoint
				}
				var endpoints [2]string
				for i := range endpoints {
					r := start(t, Config{Store: openPool(t, through(shared.Endpoint()), name)})
					r.waitLoaded()
					endpoints[i] = through(r.unix)
				}
				h := alloctest.Crowd{
					Doors: func(host string) (doors [2]alloctest.Door) {
						for i := range doors {
							doors[i] = doorOf(dialTo(t, endpoints[i], host))
						}
						return doors
					},
					Policy: alloc.DefaultPolicy(), Now: time.Now, Faults: faults, Moves: 40, Seed: seed,
				}.Record(t)
				calm()
				wg.Wait()
				h.Check(t)
				lost += h.Lost()
				alloctest.Check(t, truth)
			})
		}
	}
	if lost == 0 {
		t.Error("no answer was ever lost")
	}
}
