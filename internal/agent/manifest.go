package agent

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// readManifest reads the manifest through the image directory's descriptor: a regular file of bounded
// size, never a link. os.ErrNotExist when there is none. Its bytes are read once, and
// the digest is of them: what somebody writes to the file meanwhile is in both, or in neither.
func readManifest(dir *os.File) (*criuhook.Manifest, alloc.Digest, error) {
	refuse := func(format string, args ...any) (*criuhook.Manifest, alloc.Digest, error) {
		return nil, alloc.Digest{}, fmt.Errorf(criuhook.ManifestName+" in the image directory "+format+"; copy the images again from where they were dumped", args...)
	}
	// Without O_NONBLOCK a fifo of that name would block the agent.
	fd, err := unix.Openat(int(dir.Fd()), criuhook.ManifestName, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ELOOP):
		return refuse("is a symbolic link")
	case errors.Is(err, unix.ENXIO):
		return refuse("is not a regular file")
	case err != nil:
		return nil, alloc.Digest{}, &os.PathError{Op: "open", Path: criuhook.ManifestName, Err: err}
	}
	f := os.NewFile(uintptr(fd), criuhook.ManifestName)
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, alloc.Digest{}, err
	case !info.Mode().IsRegular():
		return refuse("is not a regular file")
	case info.Size() > criuhook.MaxManifest: // it may grow: DecodeManifest reads no more either
		return refuse("has %d bytes, a manifest has up to %d", info.Size(), criuhook.MaxManifest)
	}
	return criuhook.DecodeManifest(f)
}

// altered says what of a manifest is not as the pool recorded it, where the pool knows. The pool has the
// digest of the whole and a few of its fields; what else differs is found by exclusion. err is the pool's
// refusal.
func (a *Agent) altered(ctx context.Context, m *criuhook.Manifest, err error) error {
	c, lookErr := a.pool.Checkpoint(ctx, m.Checkpoint)
	if lookErr != nil {
		return err
	}
	for _, f := range []struct{ what, says, recorded string }{
		{"sandbox", m.Sandbox.String(), c.Sandbox.String()},
		{"epoch", m.Epoch.String(), c.Epoch.String()},
		{"source host", m.Source, c.Source},
		{"run id", m.RunID, c.RunID},
	} {
		if f.says != f.recorded {
			return fmt.Errorf("%w (it says %s %s, the pool recorded %s)", err, f.what, f.says, f.recorded)
		}
	}
	return fmt.Errorf("%w (its list of namespaces was changed, or the images were replaced together with their digest)", err)
}
