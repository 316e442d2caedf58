package server

import (
	"slices"
	"strings"
	"testing"

	"github.com/nsalloc/nsalloc/internal/killpoint"
	"github.com/nsalloc/nsalloc/internal/memstore"
)

// readOnly are the methods of our services that commit nothing. A new one that is not listed has points.
var readOnly = []string{
	"Allocator/GetPool",
	"Handoff/Find", "Handoff/ListCheckpoints",
	"Hosts/Get", "Hosts/List",
	"Records/Check",
	"Sandboxes/Get", "Sandboxes/History", "Sandboxes/List",
	"Servers/List", "Servers/Witness",
}

// ownWrites are what a server writes without being asked to by a method (internal/witness).
var ownWrites = []string{"close", "generation", "life", "witness"}

// TestEveryWriteHasPoints: every method that a server offers, read from the server itself, reads or can be
// ended before and after its commit; and no two that write share a name, by which their points are told apart.
func TestEveryWriteHasPoints(t *testing.T) {
	const ours = "nsalloc.v1."
	points := killpoint.All()
	var reads []string
	writes := map[string]string{}
	s := New(Config{Store: memstore.New()})
	defer s.grpc.Stop() // it does not run
	for service, info := range s.grpc.GetServiceInfo() {
		name, ok := strings.CutPrefix(service, ours)
		if !ok {
			continue // health and reflection
		}
		for _, m := range info.Methods {
			method := name + "/" + m.Name
			if slices.Contains(readOnly, method) {
				reads = append(reads, method)
				continue
			}
			if other := writes[m.Name]; other != "" {
				t.Errorf("%s and %s have the same points", method, other)
			}
			writes[m.Name] = method
			for _, family := range []killpoint.Point{killpoint.ServerCommitting, killpoint.ServerCommitted} {
				if p := killpoint.Point(strings.Replace(string(family), "*", m.Name, 1)); !slices.Contains(points, p) {
					t.Errorf("%s writes, and there is no point %s; if it only reads, list it here", method, p)
				}
			}
		}
	}
	slices.Sort(reads)
	if !slices.Equal(reads, readOnly) {
		t.Errorf("of the methods that read %v are offered, %v are listed", reads, readOnly)
	}
	for _, p := range points {
		if rpc, ok := strings.CutPrefix(string(p), "server/"); ok {
			if rpc, _, _ := strings.Cut(rpc, "/"); writes[rpc] == "" && !slices.Contains(ownWrites, rpc) {
				t.Errorf("%s is of no method that writes", p)
			}
		}
	}
}
