package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// otherFiles are what can stand in the place of a file.
func otherFiles(t *testing.T, genuine string) map[string]func(path string) error {
	t.Helper()
	outside := filepath.Join(t.TempDir(), "genuine")
	b, err := os.ReadFile(genuine)
	if err == nil {
		err = os.WriteFile(outside, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return map[string]func(path string) error{
		"symbolic link":   func(p string) error { return os.Symlink(outside, p) },
		"dangling link":   func(p string) error { return os.Symlink(outside+"~", p) },
		"link to a fifo":  func(p string) error { return errors.Join(syscall.Mkfifo(p+"-fifo", 0o600), os.Symlink(p+"-fifo", p)) },
		"fifo":            func(p string) error { return syscall.Mkfifo(p, 0o600) },
		"directory":       func(p string) error { return os.Mkdir(p, 0o700) },
		"endless device":  func(p string) error { return syscall.Mknod(p, syscall.S_IFCHR|0o600, int(unix.Mkdev(1, 5))) },
		"socket":          func(p string) error { return syscall.Mknod(p, syscall.S_IFSOCK|0o600, 0) },
		"file of 100 MiB": func(p string) error { return os.WriteFile(p, make([]byte, 100<<20), 0o600) },
		"sparse file":     func(p string) error { return errors.Join(os.WriteFile(p, b, 0o600), os.Truncate(p, 1<<40)) },
		"empty file":      func(p string) error { return os.WriteFile(p, nil, 0o600) },
		"other hard link": func(p string) error {
			return errors.Join(os.WriteFile(outside+"2", []byte("root:x:0:0:root:/root:/bin/sh\n"), 0o600), os.Link(outside+"2", p))
		},
	}
}

// TestOtherFiles: in the place of the manifest and of each image stands something else, at pre-restore and at
// post-restore. Nothing is followed, waited for, or read beyond its limit.
func TestOtherFiles(t *testing.T) {
	h := newHost(t)
	k := h.ticket()
	const link, kind = "symbolic link", "regular file"
	manifest := map[string]string{
		"symbolic link": "is a " + link, "dangling link": "is a " + link, "link to a fifo": "is a " + link,
		"fifo": "is not a " + kind, "directory": "is not a " + kind, "endless device": "is not a " + kind, "socket": "is not a " + kind,
		"file of 100 MiB": fmt.Sprintf("has %d bytes", 100<<20), "sparse file": fmt.Sprintf("has %d bytes", 1<<40),
		"empty file": "not the JSON of a manifest", "other hard link": "not the JSON of a manifest",
	}
	image := map[string]string{
		"symbolic link": link, "dangling link": link, "link to a fifo": link,
		"fifo": kind, "directory": kind, "endless device": kind, "socket": "no such device or address",
		"file of 100 MiB": "larger than", "sparse file": "larger than", "empty file": "cut short", "other hard link": "magic number",
	}
	often := []string{"symbolic link", "fifo", "file of 100 MiB"}
	for _, name := range []string{criuhook.ManifestName, "inventory.img", "pstree.img", "ids-1.img"} {
		reasons := image
		if name == criuhook.ManifestName {
			reasons = manifest
		}
		for what, put := range otherFiles(t, filepath.Join(k.d.images, name)) {
			if (name == "pstree.img" || name == "ids-1.img") && !slices.Contains(often, what) {
				continue // read as the inventory is
			}
			reason, ok := reasons[what]
			if !ok {
				t.Fatalf("what is said of a %s?", what)
			}
			images := k.copied()
			replace := func() {
				p := filepath.Join(images, name)
				if err := errors.Join(os.Remove(p), put(p)); err != nil {
					t.Fatal(err)
				}
			}
			if slices.Contains(often, what) && (name == criuhook.ManifestName || name == "pstree.img") {
				late := k.copied()
				images, late = late, images
				k.refusedLate(name+": "+what, images, reason, replace)
				k.sandbox, k.checkpoint = h.reaches(k.d.sandbox, alloc.StateInTransit) // the epoch is raised
				images = late
			}
			replace()
			k.refused(name+": "+what, images, reason)
		}
	}
	k.restores()
}

// TestLargeManifest: what is too large costs no reading.
func TestLargeManifest(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, criuhook.ManifestName)
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := os.WriteFile(path, make([]byte, 100<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	before := bytesRead(t)
	if _, _, err := readManifest(d); err == nil {
		t.Error("100 MiB were a manifest")
	}
	if n := bytesRead(t) - before; n > criuhook.MaxManifest {
		t.Errorf("%d bytes were read of a file that is no manifest", n)
	}
}

// bytesRead counts what this process has read, from files and else.
func bytesRead(t *testing.T) (n int) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/io")
	if err == nil {
		_, err = fmt.Sscanf(string(b), "rchar: %d", &n)
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}
