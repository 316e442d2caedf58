package etcdstore

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/internal/lossy"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// TestLinearizable: hosts move sandboxes about through two services, each with a connection of its own to
// a real etcd, also when connections break, and requests and answers are lost or late; and some order of
// single steps of the model explains what they were answered.
func TestLinearizable(t *testing.T) {
	lost := 0
	for seed := range uint64(3) {
		for _, faults := range []bool{false, true} {
			t.Run(fmt.Sprintf("faults=%v", faults), func(t *testing.T) {
				truth := newStore(t, shared.Endpoint())
				if _, err := alloc.NewService(truth, nil).InitPool(t.Context(), alloc.DefaultPolicy()); err != nil {
					t.Fatal(err)
				}
				var doors [2]alloctest.Door
				trouble, calm := context.WithCancel(t.Context())
				defer calm()
				var wg sync.WaitGroup
				for i := range doors {
					endpoint := shared.Endpoint()
					if faults {
						p := lossy.New(t, endpoint, "")
						wg.Go(func() { p.Trouble(trouble, seed*10+uint64(i), 60*time.Millisecond) })
						endpoint = p.Endpoint
					}
					s := newStore(t, endpoint)
					s.keys = truth.keys
					doors[i] = alloctest.ServiceDoor(s, nil)
				}
				h := alloctest.Crowd{
					Doors:  func(string) [2]alloctest.Door { return doors },
					Policy: alloc.DefaultPolicy(), Now: time.Now, Faults: faults, Moves: 60, Seed: seed,
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
