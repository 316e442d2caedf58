package testhost

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// state is what outlives the creator's death: a directory and, below the
// creator's own cgroups, one cgroup in each hierarchy. Its lock file is locked
// for as long as the creator lives, which no reuse of process numbers can
// feign.
type state struct {
	id      string
	dir     string
	lock    *os.File
	cgroups []string // one in each hierarchy, recorded in dir before they are made
}

const (
	lockName    = "lock"
	cgroupsName = "cgroups"
	cgroupStem  = "nsalloc-testhost-"
)

// cleanupTimeout bounds the waits for the kernel in a removal.
const cleanupTimeout = 20 * time.Second

func newState(hierarchies []cgroupMount) (_ *state, err error) {
	run, err := runDir()
	if err != nil {
		return nil, err
	}
	// Reap takes this too, so it never sees a directory that is not locked yet.
	all, err := lockFile(run+".lock", unix.LOCK_EX)
	if err != nil {
		return nil, err
	}
	defer all.Close()

	b := make([]byte, 4)
	_, _ = rand.Read(b) // never fails
	s := &state{id: hex.EncodeToString(b)}
	s.dir = filepath.Join(run, s.id)
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make a directory for the pool: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.remove())
		}
	}()
	if s.lock, err = lockFile(filepath.Join(s.dir, lockName), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, err
	}
	for _, h := range hierarchies {
		s.cgroups = append(s.cgroups, filepath.Join(h.Own, cgroupStem+s.id))
	}
	if err := os.WriteFile(filepath.Join(s.dir, cgroupsName), []byte(strings.Join(s.cgroups, "\n")), 0o600); err != nil {
		return nil, fmt.Errorf("cannot record the pool's cgroups: %w", err)
	}
	for _, dir := range s.cgroups {
		if err := makeCgroup(dir); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// remove takes away everything that is left; it may be called again.
func (s *state) remove() error {
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
	defer cancel()
	var errs []error
	for _, dir := range s.cgroups {
		errs = append(errs, removeCgroup(ctx, dir))
	}
	if err := errors.Join(errs...); err != nil {
		return err // keep the record, for Reap
	}
	if err := os.RemoveAll(s.dir); err != nil {
		return fmt.Errorf("cannot remove the pool's directory: %w: look for mounts below it", err)
	}
	if s.lock != nil {
		_ = s.lock.Close()
		s.lock = nil
	}
	return nil
}

// Reap removes what creators that died left behind: processes that were
// frozen, cgroups, directories. NewPool calls it.
func Reap() error {
	run, err := runDir()
	if err != nil {
		return err
	}
	all, err := lockFile(run+".lock", unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer all.Close()
	entries, err := os.ReadDir(run)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		s := &state{id: e.Name(), dir: filepath.Join(run, e.Name())}
		s.lock, err = lockFile(filepath.Join(s.dir, lockName), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			continue // its creator lives
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		record, _ := os.ReadFile(filepath.Join(s.dir, cgroupsName))
		for line := range bytes.Lines(record) {
			dir := string(bytes.TrimSpace(line))
			// A record cut short by a crash must not name somebody else's.
			if filepath.Base(dir) == cgroupStem+s.id {
				s.cgroups = append(s.cgroups, dir)
			}
		}
		errs = append(errs, s.remove())
	}
	return errors.Join(errs...)
}

// runDir is where the directories of all pools are; it can carry overlayfs's
// upper directories.
func runDir() (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	run := filepath.Join(cache, "run")
	if err := os.MkdirAll(run, 0o755); err != nil {
		return "", fmt.Errorf("cannot make %s: %w: run as root, or set NSALLOC_CACHE to a directory you can write", run, err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(run, &st); err != nil {
		return "", fmt.Errorf("cannot tell the file system of %s: %w", run, err)
	}
	switch st.Type {
	case unix.OVERLAYFS_SUPER_MAGIC, unix.NFS_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC, unix.V9FS_MAGIC:
		return "", fmt.Errorf("%s is on a file system (type %#x) that cannot hold overlayfs's upper directories: set NSALLOC_CACHE to a directory on ext4, xfs, btrfs or tmpfs", run, st.Type)
	}
	return run, nil
}

// lockFile opens and locks a file, which stays locked until it is closed or
// the process is gone.
func lockFile(name string, how int) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot open lock file: %w", err)
	}
	for {
		err = unix.Flock(int(f.Fd()), how)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("cannot lock %s: %w", name, err)
	}
	return f, nil
}
