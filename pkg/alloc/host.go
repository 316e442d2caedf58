package alloc

import (
	"fmt"
	"regexp"
	"time"
)

// Host is a machine of the pool. Its name comes from its certificate, or on a plain-text listener
// from the request's metadata.
type Host struct {
	Name string `json:"name"`
	// Incarnation is the current life of the host's agent state; every mutation by the host names it.
	Incarnation Incarnation `json:"incarnation"`
	// Nonce is the random number that the agent's state holds; a state with another one is another
	// life, however equal the rest.
	Nonce string `json:"-"`
	// BootID is the boot that the agent last said Hello from.
	BootID string `json:"boot_id"`
	// Granted is what is left of the host's ranges; it is spent from the front, and that front is
	// the cursor.
	Granted Ranges            `json:"granted"`
	Labels  map[string]string `json:"labels,omitempty"`
	// Hello is when the agent last started a life or a boot, by the server's clock.
	Hello time.Time `json:"hello"`
	// Settled is the generation in which the host has last said what lives on it (RegisterAgain), or that it was
	// new in; 0 when it was never asked.
	Settled Generation `json:"settled,omitempty"`
	// Waived is the generation in which an operator has last said that nobody waits for this host.
	Waived Generation `json:"waived,omitempty"`
	// Quota is what the host was granted lately; a new life of its agent goes on with it.
	Quota Quota `json:"quota"`
	// Requests are the last ones that changed this record.
	Requests RequestLog `json:"-"`
	// Extra holds what a newer version stored in this record; see Pool.Extra.
	Extra []byte `json:"-"`
}

// in is a copy of h for a change in generation g: ranges die with their generation, so that older ones
// are burned by the next write.
func (h *Host) in(g Generation) *Host {
	c := *h
	c.Granted = h.Granted.in(g)
	return &c
}

// MaxGrantedRanges bounds the host record: a host with so many unfinished ranges is refused more.
const MaxGrantedRanges = 16

var (
	nameForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)
	uuidForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)
)

// ValidateName checks the name of a host, server or pool: 1 to 63 of a-z, 0-9, dot and hyphen, with
// a letter or digit at both ends.
func ValidateName(what, name string) error {
	if !nameForm.MatchString(name) {
		return invalid(what, fmt.Sprintf("%.80q is not a name: 1 to 63 of a-z, 0-9, '.' and '-', letter or digit first and last", name))
	}
	return nil
}

// ValidateBootID checks the form of a boot id: a UUID in lower case.
func ValidateBootID(id string) error {
	if !uuidForm.MatchString(id) {
		return invalid("boot id", fmt.Sprintf("%.80q is not a UUID as /proc/sys/kernel/random/boot_id prints it", id))
	}
	return nil
}
