package testhost

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// Check reports all that this machine lacks for hosts, each with a way to get
// it; nil means that NewPool and RootFS can work.
func Check() error {
	err := checkMachine()
	dir, e := rootFSDir()
	if e != nil {
		return errors.Join(err, e)
	}
	if _, e := os.Stat(dir); e == nil {
		return err
	}
	_, noDebootstrap := exec.LookPath("debootstrap")
	_, noApt := exec.LookPath("apt-get")
	if noDebootstrap != nil && noApt != nil {
		err = errors.Join(err, errors.New("debootstrap is missing, and so is apt-get to install it: install debootstrap with this system's package manager"))
	}
	return err
}

// checkMachine is the part of Check that does not concern the making of a root
// file system.
func checkMachine() error {
	var errs []error
	if os.Geteuid() != 0 {
		errs = append(errs, errors.New("not root: hosts are made of namespaces, mounts and cgroups; run as root (sudo)"))
	} else {
		errs = append(errs, checkCapabilities())
		if _, err := runDir(); err != nil {
			errs = append(errs, err)
		}
	}
	if !mainCalled.Load() {
		errs = append(errs, errors.New("this program does not call testhost.Main: make that the first statement of main or TestMain"))
	}
	if !hasFilesystem("overlay") {
		if _ = exec.Command("modprobe", "overlay").Run(); !hasFilesystem("overlay") {
			errs = append(errs, errors.New("the kernel has no overlayfs: load the module overlay (modprobe overlay)"))
		}
	}
	if _, err := cgroupMounts(); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func checkCapabilities() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("cannot read this process's capabilities: %w", err)
	}
	var missing []string
	for _, c := range []struct {
		bit  uint
		name string
	}{{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"}, {unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"}, {unix.CAP_MKNOD, "CAP_MKNOD"}, {unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE"}} {
		if data[c.bit/32].Effective&(1<<(c.bit%32)) == 0 {
			missing = append(missing, c.name)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("root without %s: run outside a container, or in a privileged one", strings.Join(missing, ", "))
	}
	return nil
}

func hasFilesystem(name string) bool {
	b, _ := os.ReadFile("/proc/filesystems")
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 0 && f[len(f)-1] == name {
			return true
		}
	}
	return false
}
