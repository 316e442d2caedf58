//go:build linux

// Package images reads who is who in CRIU's images: which tasks a dump holds, and which namespace ids
// CRIU gave them. Joined with the live processes of the tree, which still run (frozen) at post-dump and
// exist (asleep) at post-restore, it says which kernel namespace an id stands for.
//
// CRIU stores no inode and no other trace of a namespace's identity: an id is a counter of that dump,
// over all types, and means something only together with the process that had it. Only at post-dump and
// post-restore are both sides complete: earlier the images are not written, or the mount namespace is a
// temporary one and the cgroup namespace still the host's.
//
// The images are input that somebody may have made up. Read takes regular files of bounded size, and no
// more than 32 MiB of them, through one directory descriptor, follows no link, and either understands them or returns an error. CRIU
// itself trusts its images with root's power; see the documentation on trust.
package images

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// ErrIncomplete matches the error of a directory in which an image that every dump has is missing: not
// an image directory, or a dump that did not get as far.
var ErrIncomplete = errors.New("incomplete images")

// Set is what the images of one dump say of tasks and namespaces.
type Set struct {
	// RunID is CRIU's dump_criu_run_id, a UUID for each dump; empty from CRIU before 4.1.
	RunID string
	// Host has the ids of the namespaces that the dumping CRIU itself was in. A task with the same id
	// shares that namespace: it is the host's and does not move.
	Host map[alloc.NamespaceType]uint32
	// Tasks are the processes of the tree, the root first, each after its parent.
	Tasks []Task
	// External has the key of each namespace that CRIU was told to treat as external
	// (--external net[INODE]:KEY): it is not restored but joined, and outlives the tree on the source.
	External map[ID]string
	// Digest is a SHA-256 over the exact content of the inventory, pstree and ids images.
	Digest alloc.Digest
}

// ID names a namespace within one dump.
type ID struct {
	Type alloc.NamespaceType
	// CRIU is CRIU's number for it.
	CRIU uint32
}

func (i ID) String() string { return fmt.Sprintf("%s %d", i.Type, i.CRIU) }

// Task is one process of a dump.
type Task struct {
	// VPID is the task's pid as it sees itself.
	VPID int
	// PPID is its parent's; 0 for the root.
	PPID int
	// IDs has the id of each namespace that the task is in. It is nil for a task that CRIU dumped dead
	// (a zombie has no ids image), and lacks the types that the source's kernel did not have.
	IDs map[alloc.NamespaceType]uint32
}

// Dead reports whether CRIU dumped the task as a zombie.
func (t Task) Dead() bool { return t.IDs == nil }

// Root is the task at the top of the tree.
func (s *Set) Root() Task { return s.Tasks[0] }

// Own reports whether the tree has a namespace that is not the host's. One without is no business of
// an allocator of namespace serials.
func (s *Set) Own() bool {
	return slices.ContainsFunc(s.Tasks, func(t Task) bool {
		for typ, id := range t.IDs {
			if s.Host[typ] != id {
				return true
			}
		}
		return false
	})
}

// Read is ReadContext without an end.
func Read(dir *os.File) (*Set, error) { return ReadContext(context.Background(), dir) }

// ReadContext reads the images in a directory. The descriptor may be O_PATH; its offset is neither used
// nor changed, and it stays the caller's. When ctx ends it stops before the next file, with ctx's cause in
// the error's chain.
func ReadContext(ctx context.Context, dir *os.File) (*Set, error) {
	s, err := read(ctx, directory{dir})
	if err != nil {
		return nil, fmt.Errorf("images in %s: %w", dir.Name(), err)
	}
	return s, nil
}
