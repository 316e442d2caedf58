package alloc

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// NamespaceType is one of the kernel's eight namespace types, by the name of its link in /proc/PID/ns.
type NamespaceType string

// The kernel's namespace types (namespaces(7)).
const (
	Mnt    NamespaceType = "mnt"
	UTS    NamespaceType = "uts"
	IPC    NamespaceType = "ipc"
	PID    NamespaceType = "pid"
	Net    NamespaceType = "net"
	Cgroup NamespaceType = "cgroup"
	User   NamespaceType = "user"
	Time   NamespaceType = "time"
)

var namespaceTypes = []NamespaceType{Mnt, UTS, IPC, PID, Net, Cgroup, User, Time}

// NamespaceTypes lists all eight types in the order in which tables show them.
func NamespaceTypes() []NamespaceType { return slices.Clone(namespaceTypes) }

// Valid reports whether t is one of the eight types.
func (t NamespaceType) Valid() bool { return slices.Contains(namespaceTypes, t) }

// KernelID identifies one live namespace on one boot of one kernel.
//
// An inode number alone identifies nothing: nsfs hands the number of a freed namespace to the next
// one at once. Two KernelIDs name the same namespace exactly if their Keys are equal.
type KernelID struct {
	// BootID is the boot's UUID as /proc/sys/kernel/random/boot_id prints it.
	BootID string `json:"boot_id"`
	// ID is what the ioctl NS_GET_ID answers (Linux 6.18 and later), unique for one boot; 0 when
	// the kernel has none for this type.
	ID uint64 `json:"id,omitempty"`
	// Inode is the nsfs inode number, for people to see.
	Inode uint64 `json:"inode"`
	// Weak marks an identity that rests on the inode number because the kernel offers no better.
	Weak bool `json:"weak,omitempty"`
}

// IsZero reports whether k identifies nothing.
func (k KernelID) IsZero() bool { return k == KernelID{} }

// Key is a text that is equal for two identities exactly if they name the same namespace.
func (k KernelID) Key(t NamespaceType) string {
	var b strings.Builder
	b.WriteString(k.BootID)
	b.WriteByte('/')
	b.WriteString(string(t))
	if k.ID != 0 {
		b.WriteString("/id:")
		b.WriteString(strconv.FormatUint(k.ID, 10))
	} else {
		b.WriteString("/inode:")
		b.WriteString(strconv.FormatUint(k.Inode, 10))
	}
	return b.String()
}

// kernelKey is equal for two identities exactly if Key is, and costs less.
type kernelKey struct {
	bootID string
	of     NamespaceType
	number uint64
	id     bool // number is the kernel's id, else the inode
}

func (k KernelID) key(t NamespaceType) kernelKey {
	if k.ID != 0 {
		return kernelKey{k.BootID, t, k.ID, true}
	}
	return kernelKey{k.BootID, t, k.Inode, false}
}

// Binding ties a serial to a namespace. A binding outlives its namespace: a namespace that is gone
// keeps its serial for ever.
type Binding struct {
	Serial Serial        `json:"serial"`
	Type   NamespaceType `json:"type"`
	// Kernel is the namespace's identity on the owner host; on the last one while the sandbox is in
	// transit or over.
	Kernel KernelID `json:"kernel,omitzero"`
	// Parent is the serial of the namespace that this one was cloned from; 0 when it was not.
	Parent Serial `json:"parent,omitempty"`
	// Bound is when the serial was bound first.
	Bound time.Time `json:"bound,omitzero"`
	// Gone is when the namespace was seen gone while its sandbox lived on; zero while it lives.
	Gone time.Time `json:"gone,omitzero"`
	// Extra holds what a newer version stored in this binding; see Pool.Extra.
	Extra []byte `json:"-"`
}

// Live reports whether the namespace is not known to be gone.
func (b Binding) Live() bool { return b.Gone.IsZero() }

// validate checks a binding that a host wants to record for the boot that it is on.
func (b Binding) validate(bootID string) error {
	switch {
	case !b.Serial.Valid():
		return invalid("binding", fmt.Sprintf("serial %d is out of range", uint64(b.Serial)))
	case !b.Type.Valid():
		return invalid("binding "+b.Serial.String(), fmt.Sprintf("namespace type %.40q is not one of %v", b.Type, namespaceTypes))
	case b.Kernel.BootID != bootID:
		return invalid("binding "+b.Serial.String(), fmt.Sprintf("its namespace is of boot %.80q, the host said Hello for boot %q", b.Kernel.BootID, bootID))
	case b.Kernel.ID == 0 && b.Kernel.Inode == 0:
		return invalid("binding "+b.Serial.String(), "it names no namespace: both kernel id and inode are 0")
	case b.Kernel.ID == 0 && !b.Kernel.Weak:
		return invalid("binding "+b.Serial.String(), "an identity without a kernel id must be marked weak")
	}
	return nil
}
