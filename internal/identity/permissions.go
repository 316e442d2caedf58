package identity

import (
	"fmt"
	"slices"
)

var (
	hosts    = []Kind{Host}
	everyone = []Kind{Host, Client, Operator}
	operator = []Kind{Operator}
	servers  = []Kind{Server}
)

// permissions is the whole table of who may call what.
var permissions = map[string][]Kind{
	"/nsalloc.v1.Allocator/Allocate": everyone,
	"/nsalloc.v1.Allocator/GetPool":  everyone,

	"/nsalloc.v1.Sandboxes/Register":      hosts,
	"/nsalloc.v1.Sandboxes/RegisterAgain": hosts,
	"/nsalloc.v1.Sandboxes/End":           hosts,
	"/nsalloc.v1.Sandboxes/Get":           everyone,
	"/nsalloc.v1.Sandboxes/List":          everyone,
	"/nsalloc.v1.Sandboxes/History":       everyone,

	"/nsalloc.v1.Handoff/Open":            hosts,
	"/nsalloc.v1.Handoff/Confirm":         hosts,
	"/nsalloc.v1.Handoff/Abort":           hosts,
	"/nsalloc.v1.Handoff/Claim":           hosts,
	"/nsalloc.v1.Handoff/Bind":            hosts,
	"/nsalloc.v1.Handoff/Release":         hosts,
	"/nsalloc.v1.Handoff/Find":            everyone,
	"/nsalloc.v1.Handoff/ListCheckpoints": everyone,

	"/nsalloc.v1.Hosts/Hello": hosts,
	"/nsalloc.v1.Hosts/Grant": hosts,
	"/nsalloc.v1.Hosts/Waive": operator,
	"/nsalloc.v1.Hosts/Get":   everyone,
	"/nsalloc.v1.Hosts/List":  everyone,

	"/nsalloc.v1.Records/Check":     operator,
	"/nsalloc.v1.Records/Mend":      operator,
	"/nsalloc.v1.Records/SetPolicy": operator,

	"/nsalloc.v1.Servers/Witness": servers,
	"/nsalloc.v1.Servers/List":    everyone,
	"/nsalloc.v1.Servers/Remove":  operator,

	"/grpc.health.v1.Health/Check": everyone,
	"/grpc.health.v1.Health/List":  everyone,
	"/grpc.health.v1.Health/Watch": everyone,

	"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo":      everyone,
	"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": everyone,
}

// Check refuses a call that the table does not allow; method is gRPC's full name.
func Check(method string, c Caller) error {
	allowed, ok := permissions[method]
	switch {
	case !ok:
		return refuse("method "+method, "nobody may call it: it has no row in the table of permissions", "")
	case !slices.Contains(allowed, c.Kind):
		return refuse("caller "+c.String(), fmt.Sprintf("%s is for %v", method, allowed), "a host says its name in the metadata "+hostMetadata)
	}
	return nil
}

// Listed reports whether the table has a row for the method. A test asks it for all that a server offers.
func Listed(method string) bool {
	_, ok := permissions[method]
	return ok
}
