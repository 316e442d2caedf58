package testhost

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// What a root file system is made of. The hash of all this is in its name, so
// that a change here makes a new one and never alters one in use.
const (
	suite        = "trixie"
	variant      = "minbase"
	packages     = "busybox-static,criu,crun,iproute2,iptables,libcriu2,nftables,procps,runc,tar"
	recipe       = "1" // raise when the steps in buildRootFS change
	rootFSPrefix = "rootfs-"
	tempPrefix   = ".building-"
)

func rootFSDir() (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256([]byte(strings.Join([]string{suite, variant, packages, recipe}, "\n")))
	return filepath.Join(cache, fmt.Sprintf("%s%s-%x", rootFSPrefix, suite, sum[:6])), nil
}

// RootFS returns the root file system for hosts, a Debian with runc and CRIU.
// The first call on a machine makes it with debootstrap, in about a minute;
// debootstrap is installed if need be. It is kept in $NSALLOC_CACHE, or
// /var/cache/nsalloc. NSALLOC_MIRROR is the Debian mirror to use instead of
// debootstrap's default. Any number of processes may call this at once; nobody
// ever gets half of one.
func RootFS(ctx context.Context, log io.Writer) (string, error) {
	if log == nil {
		log = io.Discard
	}
	dir, err := rootFSDir()
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := Check(); err != nil {
		return "", fmt.Errorf("cannot make a root file system: %w", err)
	}
	fmt.Fprintf(log, "making a root file system in %s (once; about a minute)\n", dir)
	lock, err := lockFileContext(ctx, filepath.Join(filepath.Dir(dir), "rootfs.lock"))
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if _, err := os.Stat(dir); err == nil {
		return dir, nil // somebody else was faster
	}
	removeOutdated(filepath.Dir(dir), log)
	if err := installDebootstrap(ctx, log); err != nil {
		return "", err
	}
	if err := buildRootFS(ctx, dir, log); err != nil {
		return "", fmt.Errorf("cannot make a root file system: %w", err)
	}
	return dir, nil
}

// removeOutdated removes what builders that died left, and the root file
// systems of other versions that no pool uses. The caller has the lock.
func removeOutdated(cache string, log io.Writer) {
	old, _ := filepath.Glob(filepath.Join(cache, rootFSPrefix+suite+"-*"))
	for _, dir := range old {
		f, err := lockRootFS(dir, unix.LOCK_EX|unix.LOCK_NB)
		if err != nil {
			continue // in use
		}
		fmt.Fprintf(log, "removing the outdated %s\n", dir)
		// Renamed first: half of one must not be there under a good name.
		_ = os.Rename(dir, filepath.Join(cache, tempPrefix+filepath.Base(dir)))
		_ = f.Close()
	}
	left, _ := filepath.Glob(filepath.Join(cache, tempPrefix+"*"))
	for _, dir := range left {
		if err := os.RemoveAll(dir); err != nil {
			fmt.Fprintf(log, "cannot remove %s: %v\n", dir, err)
		}
	}
}

// lockRootFS locks a root file system: shared to use it, exclusive to remove
// it.
func lockRootFS(dir string, how int) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot use root file system: %w: RootFS makes one", err)
	}
	if err := unix.Flock(int(f.Fd()), how); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("cannot lock %s: %w", dir, err)
	}
	return f, nil
}

// lockFileContext waits for another process's build for as long as the context
// allows.
func lockFileContext(ctx context.Context, name string) (f *os.File, err error) {
	err = until(ctx, func() error {
		f, err = lockFile(name, unix.LOCK_EX|unix.LOCK_NB)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("another process is making the root file system: %w", err)
	}
	return f, nil
}

func installDebootstrap(ctx context.Context, log io.Writer) error {
	if _, err := exec.LookPath("debootstrap"); err == nil {
		return nil
	}
	apt := func(args ...string) error {
		cmd := exec.CommandContext(ctx, "apt-get", args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		cmd.Stdout, cmd.Stderr = log, log
		return cmd.Run()
	}
	fmt.Fprintln(log, "installing debootstrap")
	install := []string{"install", "-y", "--no-install-recommends", "debootstrap", "debian-archive-keyring"}
	if apt(install...) == nil {
		return nil
	}
	// The usual cause is package lists that are old or were never fetched.
	err := apt("update")
	if e := apt(install...); e != nil {
		return fmt.Errorf("cannot install debootstrap: %w: install it by hand (apt-get install debootstrap)", errors.Join(e, err))
	}
	return nil
}

// buildRootFS runs debootstrap in a PID and a mount namespace that end with
// this process, so that a crash leaves neither processes nor mounts, only a
// directory that removeOutdated knows.
func buildRootFS(ctx context.Context, dir string, log io.Writer) (err error) {
	temp, err := os.MkdirTemp(filepath.Dir(dir), tempPrefix)
	if err != nil {
		return fmt.Errorf("%w: set NSALLOC_CACHE to a directory you can write", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()
	b, err := startBox(ctx, boxSpec{dir: temp})
	if err != nil {
		return err
	}
	defer func() {
		// Not ctx: this must happen when that is over.
		ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
		defer cancel()
		err = errors.Join(err, b.stop(ctx))
	}()
	root := filepath.Join(temp, "root")
	args := []string{"--variant=" + variant, "--include=" + packages, suite, root}
	if mirror := os.Getenv("NSALLOC_MIRROR"); mirror != "" {
		args = append(args, mirror)
	}
	var said bytes.Buffer
	cmd := relayCommand(ctx, temp, append(os.Environ(), "LC_ALL=C"), "debootstrap", args)
	// All that it started goes too, whatever sessions that made.
	cmd.Cancel = b.cmd.Process.Kill
	cmd.Stdout = io.MultiWriter(log, &said)
	cmd.Stderr = cmd.Stdout
	if err := cmd.Run(); err != nil {
		text, _ := os.ReadFile(filepath.Join(root, "debootstrap", "debootstrap.log"))
		return fmt.Errorf("debootstrap: %w: check the network and the disk (another mirror: NSALLOC_MIRROR)\n%s\n%s",
			errors.Join(err, ctx.Err()), lastLines(said.Bytes(), 5), lastLines(text, 10))
	}
	for _, waste := range []string{"var/cache/apt/archives", "var/lib/apt/lists"} {
		if err := os.RemoveAll(filepath.Join(root, waste)); err != nil {
			return err
		}
	}
	return publish(root, dir)
}

// publish gives a complete directory its name once all of it is on disk: the
// name alone says that it is good, after a power failure too.
func publish(temp, dir string) error {
	f, err := os.Open(temp)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("cannot write %s to disk: %w", temp, err)
	}
	if err := os.Rename(temp, dir); err != nil {
		return err
	}
	parent, err := os.Open(filepath.Dir(dir))
	if err != nil {
		return err
	}
	defer parent.Close()
	return parent.Sync()
}
