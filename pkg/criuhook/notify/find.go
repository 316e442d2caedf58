//go:build linux

package notify

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// find pins the CRIU process. go-criu keeps the one that it started to itself, so it is recognized: a
// child of this process that has the image directory open, which it has from before the first
// notification until all tasks are restored. Its name would prove less: a program may run several, and
// none has to be called criu.
func (n *Notify) find() (process, error) {
	if n.config.CRIU != 0 {
		p, err := pin(n.config.CRIU)
		if err != nil {
			return process{}, fmt.Errorf("the CRIU process that Config.CRIU names: %w", err)
		}
		return p, nil
	}
	images, err := n.config.Images.Stat()
	if err != nil {
		return process{}, err
	}
	// The kernel may leave some out of the quick list while others end.
	for _, list := range []func() ([]int, error){children, childrenOfAll} {
		pids, err := list()
		if err != nil {
			return process{}, err
		}
		found := withOpen(pids, images)
		if len(found) == 1 {
			return found[0], nil
		}
		for _, p := range found {
			unix.Close(p.fd)
		}
		if len(found) > 1 {
			return process{}, fmt.Errorf("%d children of this process have %s open, where CRIU alone should: give notify.Config.CRIU its pid", len(found), n.config.Images.Name())
		}
	}
	return process{}, fmt.Errorf("no child of this process has %s open, as CRIU should: set notify.Config.Images to the directory of CriuOpts.ImagesDirFd, or notify.Config.CRIU to CRIU's pid", n.config.Images.Name())
}

// withOpen pins those children of this process that have dir open.
func withOpen(pids []int, dir os.FileInfo) (found []process) {
	for _, pid := range pids {
		p, err := pin(pid)
		if err != nil {
			continue // ended meanwhile
		}
		// Asked after it was pinned: before, the number may have become another's.
		if parent(pid) != os.Getpid() || !hasOpen(pid, dir) {
			unix.Close(p.fd)
			continue
		}
		found = append(found, p)
	}
	return found
}

// pin opens a pidfd.
func pin(pid int) (process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	switch {
	case errors.Is(err, unix.ESRCH):
		return process{}, fmt.Errorf("there is no process %d", pid)
	case err != nil:
		return process{}, fmt.Errorf("pidfd_open of %d: %w", pid, err)
	}
	return process{pid, fd}, nil
}

// children lists the children of all threads of this process, none where the kernel was built without
// CONFIG_PROC_CHILDREN.
func children() ([]int, error) {
	files, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // a thread that ended; its children are another thread's now
		}
		for _, f := range strings.Fields(string(b)) {
			if pid, err := strconv.Atoi(f); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids, nil
}

func childrenOfAll() ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("look for CRIU: %w", err)
	}
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && parent(pid) == os.Getpid() {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// parent is a process's parent, field 4 of proc_pid_stat(5); 0 if it is gone. The name before it may
// hold spaces and brackets.
func parent(pid int) int {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(f) < 2 {
		return 0
	}
	ppid, err := strconv.Atoi(f[1])
	if err != nil {
		return 0
	}
	return ppid
}

// hasOpen reports whether a process has a directory open.
func hasOpen(pid int, dir os.FileInfo) bool {
	fds := "/proc/" + strconv.Itoa(pid) + "/fd"
	entries, err := os.ReadDir(fds)
	if err != nil {
		return false
	}
	for _, e := range entries {
		if st, err := os.Stat(filepath.Join(fds, e.Name())); err == nil && os.SameFile(st, dir) {
			return true
		}
	}
	return false
}
