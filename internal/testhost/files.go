package testhost

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
)

// Path is the path of a host's file as this process sees it, while the host
// runs; "" while it is halted. Absolute symbolic links on the way are resolved
// on the machine, not in the host: for /var/run/x ask for /run/x. The methods
// below refuse such links instead.
func (h *Host) Path(p string) string {
	b, err := h.running()
	if err != nil {
		return ""
	}
	return filepath.Join(fmt.Sprintf("/proc/%d/root", b.pid()), path.Clean("/"+p))
}

// root opens the host's root directory; nothing reached through it is outside.
func (h *Host) root() (*os.Root, error) {
	b, err := h.running()
	if err != nil {
		return nil, err
	}
	r, err := os.OpenRoot(fmt.Sprintf("/proc/%d/root", b.pid()))
	if err != nil {
		return nil, fmt.Errorf("host %s: PID 1 is gone: %w", h.name, err)
	}
	return r, nil
}

// inside makes a host's path relative to its root.
func inside(p string) string {
	if p = strings.TrimPrefix(path.Clean("/"+p), "/"); p == "" {
		return "."
	}
	return p
}

// ReadFile reads a file of the host.
func (h *Host) ReadFile(name string) ([]byte, error) {
	r, err := h.root()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b, err := r.ReadFile(inside(name))
	if err != nil {
		return nil, fmt.Errorf("host %s: %w", h.name, err)
	}
	return b, nil
}

// WriteFile replaces a file of the host at once, and makes the directories
// above it.
func (h *Host) WriteFile(name string, data []byte, mode fs.FileMode) error {
	return h.put(name, strings.NewReader(string(data)), mode)
}

// MkdirAll makes a directory of the host, and those above it. A directory for
// images must exist before runc checkpoint makes it, with 0o755: runc's own has
// 0o600, which the root of a user namespace cannot enter, and CRIU opens some
// of the images as that user when it restores.
func (h *Host) MkdirAll(dir string, mode fs.FileMode) error {
	r, err := h.root()
	if err != nil {
		return err
	}
	defer r.Close()
	if err := r.MkdirAll(inside(dir), mode); err != nil {
		return fmt.Errorf("host %s: %w", h.name, err)
	}
	return nil
}

// CopyIn copies a file of the machine into the host, as WriteFile does. A
// program that runs from the old file goes on with it.
func (h *Host) CopyIn(src, dst string, mode fs.FileMode) error {
	f, err := os.Open(src)
	if err != nil {
		return fmt.Errorf("cannot copy into host %s: %w", h.name, err)
	}
	defer f.Close()
	return h.put(dst, f, mode)
}

func (h *Host) put(name string, src io.Reader, mode fs.FileMode) error {
	r, err := h.root()
	if err != nil {
		return err
	}
	defer r.Close()
	name = inside(name)
	if err := r.MkdirAll(path.Dir(name), 0o755); err != nil {
		return fmt.Errorf("host %s: %w", h.name, err)
	}
	if err := putFile(r, name, src, mode); err != nil {
		return fmt.Errorf("host %s: cannot write /%s: %w", h.name, name, err)
	}
	return nil
}

// putFile writes beside the name and renames, so that nobody sees a half.
func putFile(r *os.Root, name string, src io.Reader, mode fs.FileMode) error {
	tmp := name + ".testhost-new"
	f, err := r.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, src)
	err = errors.Join(err, f.Chmod(mode), f.Close())
	if err == nil {
		err = r.Rename(tmp, name)
	}
	if err != nil {
		_ = r.Remove(tmp)
	}
	return err
}

// CopyDir copies a directory of another host into this one, with modes and
// owners, which stands for the shared storage or the network through which
// images reach their target. Files that are in the target only are left.
func (h *Host) CopyDir(from *Host, src, dst string) error {
	in, err := from.root()
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := h.root()
	if err != nil {
		return err
	}
	defer out.Close()
	src, dst = inside(src), inside(dst)
	if err := out.MkdirAll(dst, 0o755); err != nil {
		return fmt.Errorf("host %s: %w", h.name, err)
	}
	err = fs.WalkDir(in.FS(), src, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		return copyEntry(in, out, p, path.Join(dst, strings.TrimPrefix(strings.TrimPrefix(p, src), "/")), info)
	})
	if err != nil {
		return fmt.Errorf("cannot copy %s:/%s to %s:/%s: %w", from.name, src, h.name, dst, err)
	}
	return nil
}

func copyEntry(in, out *os.Root, src, dst string, info fs.FileInfo) error {
	switch {
	case info.IsDir():
		if err := out.MkdirAll(dst, 0o700); err != nil {
			return err
		}
		if err := out.Chmod(dst, info.Mode()); err != nil {
			return err
		}
	case info.Mode().IsRegular():
		f, err := in.Open(src)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := putFile(out, dst, f, info.Mode()); err != nil {
			return err
		}
	case info.Mode().Type() == fs.ModeSymlink:
		target, err := in.Readlink(src)
		if err != nil {
			return err
		}
		if err := out.Remove(dst); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := out.Symlink(target, dst); err != nil {
			return err
		}
	default:
		return fmt.Errorf("/%s is a %s: only files, directories and links are copied", src, info.Mode().Type())
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("/%s has no owner: %T", src, info.Sys())
	}
	return out.Lchown(dst, int(st.Uid), int(st.Gid))
}
