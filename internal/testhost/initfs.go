package testhost

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// bootUp builds the file systems of a PID 1 that is alone in its new
// namespaces. Nothing here is undone on failure: all of it goes with the
// mount namespace.
func bootUp(cfg bootConfig) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("cannot make the mounts private: %w: root is needed", err)
	}
	if cfg.Dir == "" {
		return mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	}
	if err := unix.Sethostname([]byte(cfg.Name)); err != nil {
		return fmt.Errorf("cannot set the host name to %q: %w: give a shorter name", cfg.Name, err)
	}
	if err := enterRoot(cfg); err != nil {
		return err
	}
	for _, step := range []func(bootConfig) error{mountBasics, makeDevices, mountCgroups, setBootID, writeEtc} {
		if err := step(cfg); err != nil {
			return err
		}
	}
	return nil
}

// mount is mount(2) with an error that says what was mounted where.
func mount(source, target, fstype string, flags uintptr, data string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return fmt.Errorf("cannot make mount point %s: %w", target, err)
	}
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return fmt.Errorf("cannot mount %s (%s, options %q) on %s: %w: see dmesg for the kernel's reason", source, fstype, data, target, err)
	}
	return nil
}

func enterRoot(cfg bootConfig) error {
	merged := filepath.Join(cfg.Dir, "merged")
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s",
		cfg.RootFS, filepath.Join(cfg.Dir, "upper"), filepath.Join(cfg.Dir, "work"))
	if err := mount("overlay", merged, "overlay", 0, options); err != nil {
		return fmt.Errorf("%w: the upper directory must be on ext4, xfs, btrfs or tmpfs (set NSALLOC_CACHE), and the kernel needs overlayfs", err)
	}
	if err := unix.Chdir(merged); err != nil {
		return err
	}
	// The old root ends up under the new one and is detached: nothing of the
	// machine can be reached by path from in here.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("cannot pivot into %s: %w", merged, err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("cannot detach the machine's root: %w", err)
	}
	return unix.Chdir("/")
}

func mountBasics(bootConfig) error {
	const safe = unix.MS_NOSUID | unix.MS_NODEV
	return errors.Join(
		mount("proc", "/proc", "proc", safe|unix.MS_NOEXEC, ""),
		mount("sysfs", "/sys", "sysfs", safe|unix.MS_NOEXEC, ""),
		mount("tmpfs", "/run", "tmpfs", safe, "mode=755"),
		mount("tmpfs", "/tmp", "tmpfs", safe, "mode=1777"),
		// A process of a user namespace may mount proc only where a whole proc
		// is visible already, and the boot id below covers a part of /proc:
		// without this second one no container with a user namespace starts.
		mount("proc", "/run/testhost/proc", "proc", safe|unix.MS_NOEXEC, ""),
	)
}

func makeDevices(bootConfig) error {
	err := errors.Join(
		mount("tmpfs", "/dev", "tmpfs", unix.MS_NOSUID, "mode=755"),
		mount("devpts", "/dev/pts", "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620,gid=5"),
		mount("tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"),
		mount("mqueue", "/dev/mqueue", "mqueue", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""),
	)
	if err != nil {
		return err
	}
	for _, d := range []struct {
		name         string
		major, minor uint32
	}{{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}} {
		p := "/dev/" + d.name
		if err := unix.Mknod(p, unix.S_IFCHR|0o666, int(unix.Mkdev(d.major, d.minor))); err != nil {
			return fmt.Errorf("cannot make device %s: %w: CAP_MKNOD and the machine's devices cgroup must allow it", p, err)
		}
		if err := os.Chmod(p, 0o666); err != nil { // umask
			return err
		}
	}
	for name, target := range map[string]string{
		"ptmx": "pts/ptmx", "fd": "/proc/self/fd",
		"stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, "/dev/"+name); err != nil {
			return err
		}
	}
	return nil
}

// mountCgroups mounts the machine's hierarchies; the cgroup namespace makes
// this host's own cgroup the root of each, so that runc and CRIU see the same
// paths on every host.
func mountCgroups(cfg bootConfig) error {
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	const top = "/sys/fs/cgroup"
	if cfg.LeafInit {
		if err := mount("cgroup2", top, "cgroup2", flags, ""); err != nil {
			return err
		}
		// Version 2 hands controllers only to children of a cgroup without
		// processes: PID 1 and what it starts live in a leaf.
		leaf := filepath.Join(top, "init")
		if err := os.Mkdir(leaf, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		return os.WriteFile(filepath.Join(leaf, "cgroup.procs"), []byte("0"), 0)
	}
	if err := mount("tmpfs", top, "tmpfs", flags, "mode=755"); err != nil {
		return err
	}
	for _, c := range cfg.Cgroups {
		if c.Type != "cgroup" {
			// Next to version 1, version 2 only gets in the way: crun refuses
			// such a mix, runc does not need it.
			continue
		}
		if err := mount("cgroup", filepath.Join(top, c.Base), "cgroup", flags, c.Options); err != nil {
			return err
		}
		if names := strings.Split(c.Base, ","); len(names) > 1 {
			for _, n := range names { // cpu,cpuacct is also known by either name
				if err := os.Symlink(c.Base, filepath.Join(top, n)); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func setBootID(cfg bootConfig) error {
	const file, target = "/run/testhost/boot_id", "/proc/sys/kernel/random/boot_id"
	if err := os.WriteFile(file, []byte(cfg.BootID+"\n"), 0o444); err != nil {
		return err
	}
	if err := unix.Mount(file, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("cannot cover %s: %w", target, err)
	}
	return nil
}

func writeEtc(cfg bootConfig) error {
	err := errors.Join(
		os.WriteFile("/etc/hostname", []byte(cfg.Name+"\n"), 0o644),
		os.WriteFile("/etc/hosts", []byte(cfg.Hosts), 0o644),
		os.WriteFile("/etc/machine-id", []byte(strings.ReplaceAll(cfg.BootID, "-", "")+"\n"), 0o444),
		os.MkdirAll("/run/lock", 0o755),
	)
	if err != nil {
		return fmt.Errorf("%s is not a whole root file system: %w: RootFS makes one", cfg.RootFS, err)
	}
	return nil
}
