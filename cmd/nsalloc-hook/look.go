//go:build linux

package main

import (
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// look finds out who is asking: CRIU, the root task of its tree and the image directory, as descriptors
// that cannot come to mean another process or directory. What cannot be had is left out; the agent knows
// what it needs at which stage.
//
// A pid alone would not do: by the time the agent looks, CRIU may be dead and its number another's. Nor
// would the agent know which PID namespace it is of.
func look(a criuhook.Action, imageDir, initPID string) (criuhook.Request, []criuhook.Descriptor) {
	parent := os.Getppid()
	r := criuhook.Request{Action: a, Caller: criuhook.Script, ImageDir: imageDir, CRIUPID: parent}
	named, ok := imagesOf(imageDir)
	if ok {
		r.CRIUPID = named
	}
	r.InitPID, _ = pid(initPID)
	// A parent without a pid here is CRIU: when it dies, a reaper in our own PID namespace takes us.
	r.ParentUnseen = parent == 0
	if r.CRIUPID != parent && !r.ParentUnseen {
		return r, nil // we come late and were given to a reaper; or something stands between CRIU and us
	}
	var fds []criuhook.Descriptor
	add := func(name string, fd int) {
		if fd >= 0 {
			fds = append(fds, criuhook.Descriptor{Name: name, FD: fd})
		}
	}
	if !r.ParentUnseen {
		add(criuhook.FDCRIU, pidfdOpen(parent))
		if r.InitPID != 0 {
			add(criuhook.FDInit, pidfdOpen(r.InitPID))
		}
	}
	if ok {
		add(criuhook.FDImages, openDir(imageDir))
	}
	// As long as CRIU is our parent its pid is nobody else's, so all that was opened is the right one.
	if os.Getppid() != parent {
		r.ParentUnseen = false
		return r, nil // this process ends soon, and its descriptors with it
	}
	return r, fds
}

// openDir opens for reading, not with O_PATH: the agent syncs the directory after it put the manifest
// there.
func openDir(path string) int {
	for {
		fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
		switch err {
		case nil:
			return fd
		case syscall.EINTR:
		default:
			return -1
		}
	}
}

// imagesOf takes CRTOOLS_IMAGE_DIR apart, which CRIU always writes as /proc/PID/fd/N, with its own pid.
// Anything else did not come from CRIU and is not opened.
func imagesOf(dir string) (int, bool) {
	rest, ok := strings.CutPrefix(dir, "/proc/")
	if !ok {
		return 0, false
	}
	criu, fd, ok := strings.Cut(rest, "/fd/")
	if n, err := strconv.ParseUint(fd, 10, 31); !ok || err != nil || strconv.FormatUint(n, 10) != fd {
		return 0, false
	}
	return pid(criu)
}

// pid reads a decimal pid as CRIU prints it.
func pid(s string) (int, bool) {
	n, err := strconv.ParseUint(s, 10, 22)
	if err != nil || n == 0 || strconv.FormatUint(n, 10) != s {
		return 0, false
	}
	return int(n), true
}

// pidfdOpen is pidfd_open(2), which package syscall does not have; -1 if that process is gone, or the
// kernel older than 5.3. The number is the same on every architecture that Go has.
func pidfdOpen(pid int) int {
	const sysPidfdOpen = 434
	fd, _, errno := syscall.Syscall(sysPidfdOpen, uintptr(pid), 0, 0) // close-on-exec by itself
	if errno != 0 {
		return -1
	}
	return int(fd)
}
