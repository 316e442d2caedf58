package testhost

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cgroupMount is one hierarchy as a host mounts it.
type cgroupMount struct {
	Type    string `json:"type"` // cgroup or cgroup2
	Base    string `json:"base"` // name below /sys/fs/cgroup
	Options string `json:"options,omitempty"`
	// Own is this process's cgroup in the machine's mount. Hosts go below it,
	// so that limits set on the creator hold for them too.
	Own string `json:"-"`
}

// cgroupMounts reads the machine's hierarchies, of either version or mixed.
func cgroupMounts() ([]cgroupMount, error) {
	own, err := ownCgroups()
	if err != nil {
		return nil, err
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var mounts []cgroupMount
	seen := map[string]bool{}
	for sc := bufio.NewScanner(f); sc.Scan(); {
		left, right, ok := strings.Cut(sc.Text(), " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 5 || len(r) < 3 || (r[0] != "cgroup" && r[0] != "cgroup2") {
			continue
		}
		m := cgroupMount{Type: r[0], Base: filepath.Base(l[4])}
		key := ""
		if m.Type == "cgroup" {
			m.Options, key = v1Options(r[2])
		}
		path, ok := own[key]
		if !ok || seen[key] {
			continue
		}
		seen[key] = true
		// The mount may show a part of the hierarchy only.
		if root := l[3]; root != "/" {
			path = "/" + strings.TrimPrefix(strings.TrimPrefix(path, root), "/")
		}
		m.Own = filepath.Join(l[4], path)
		mounts = append(mounts, m)
	}
	if len(mounts) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted: mount cgroup2 on /sys/fs/cgroup")
	}
	return mounts, nil
}

// v1Options keeps what selects a hierarchy; the rest of a mount's options must
// not be given again from inside a cgroup namespace.
func v1Options(super string) (options, key string) {
	var keep, controllers []string
	for o := range strings.SplitSeq(super, ",") {
		switch {
		case strings.HasPrefix(o, "name="):
			return "none," + o, o
		case o == "rw" || o == "ro" || o == "xattr" || o == "clone_children" || strings.HasPrefix(o, "release_agent="):
		case o == "noprefix" || o == "cpuset_v2_mode" || o == "favordynmods":
			keep = append(keep, o)
		default:
			keep = append(keep, o)
			controllers = append(controllers, o)
		}
	}
	slices.Sort(controllers)
	return strings.Join(keep, ","), strings.Join(controllers, ",")
}

func ownCgroups() (map[string]string, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("cannot read this process's cgroups: %w: the kernel needs CONFIG_CGROUPS", err)
	}
	own := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if f := strings.SplitN(strings.TrimSpace(line), ":", 3); len(f) == 3 {
			names := strings.Split(f[1], ",")
			slices.Sort(names)
			own[strings.Join(names, ",")] = f[2]
		}
	}
	return own, nil
}

// onlyVersion2 tells whether the machine has no hierarchy of version 1.
func onlyVersion2(mounts []cgroupMount) bool {
	return !slices.ContainsFunc(mounts, func(m cgroupMount) bool { return m.Type == "cgroup" })
}

// makeCgroup makes a cgroup that can take processes.
func makeCgroup(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("cannot make cgroup: %w: /sys/fs/cgroup must be writable (in a container: --privileged)", err)
	}
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		// A new cpuset of version 1 is empty and takes no process.
		file := filepath.Join(dir, name)
		now, err := os.ReadFile(file)
		if err != nil || strings.TrimSpace(string(now)) != "" {
			continue
		}
		if _, err := os.Stat(filepath.Join(dir, "cgroup.clone_children")); err != nil {
			continue // version 2, where empty means inherited
		}
		parent, err := os.ReadFile(filepath.Join(filepath.Dir(dir), name))
		if err == nil {
			err = os.WriteFile(file, parent, 0)
		}
		if err != nil {
			return fmt.Errorf("cannot give cgroup %s its %s: %w", dir, name, err)
		}
	}
	return nil
}

func joinCgroup(dir string, pid int) error {
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		return fmt.Errorf("cannot move process %d into cgroup %s: %w", pid, dir, err)
	}
	return nil
}

// removeCgroup kills what lives in a cgroup and below, and removes it all. The
// kernel lets go of a dead process's cgroup a moment after its parent has
// waited for it, so this tries until the context is over.
func removeCgroup(ctx context.Context, dir string) error {
	return until(ctx, func() error {
		emptyCgroup(dir)
		var dirs []string
		err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			return nil
		})
		slices.Reverse(dirs) // children first
		for _, d := range dirs {
			if e := unix.Rmdir(d); e != nil && e != unix.ENOENT {
				err = errors.Join(err, fmt.Errorf("cannot remove cgroup %s: %w: look for its processes in cgroup.procs", d, e))
			}
		}
		return err
	})
}

// emptyCgroup sends SIGKILL to the processes, then thaws them: a frozen
// process of version 1 does not take even that.
func emptyCgroup(dir string) {
	_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if d.Name() == "cgroup.procs" {
			b, _ := os.ReadFile(p)
			for f := range strings.FieldsSeq(string(b)) {
				if pid, err := strconv.Atoi(f); err == nil && pid > 1 {
					_ = unix.Kill(pid, unix.SIGKILL)
				}
			}
		}
		return nil
	})
	_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == "freezer.state" {
			_ = os.WriteFile(p, []byte("THAWED"), 0)
		}
		return nil
	})
}

// until calls f until it succeeds or the context is over, and returns f's last
// error then. It is for conditions of the kernel that nothing announces.
func until(ctx context.Context, f func() error) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}
