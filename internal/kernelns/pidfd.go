//go:build linux

package kernelns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// OpenPID opens a pidfd on the process that has the pid and was started at startTime, and proves that
// it is that one. It returns ErrGone when that process is not there any more; a zombie still is.
//
// The proof: a pidfd is opened, then the start time is read, then the pidfd is asked for its pid, which
// it answers only while the process has not been reaped. So the process of the pidfd held the pid while
// the start time was read. What remains is the clock tick of StartTime: a process that took over the pid
// within 10 ms of its predecessor's start passes.
func (k *Kernel) OpenPID(pid int, startTime uint64) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	switch {
	case errors.Is(err, unix.ESRCH):
		return nil, fmt.Errorf("pid %d: %w", pid, ErrGone)
	case err != nil:
		return nil, fmt.Errorf("pidfd_open of pid %d: %w (it takes Linux >= 5.3 and a pid of at least 1 that is no thread's)", pid, err)
	}
	f := os.NewFile(uintptr(fd), "pidfd of "+strconv.Itoa(pid))
	if err := k.prove(fd, pid, startTime); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (k *Kernel) prove(fd, pid int, startTime uint64) error {
	dir, err := k.openDir(pid)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	st, err := readStat(dir, nil)
	if err != nil {
		return processError(pid, err)
	}
	if st.start != startTime {
		return fmt.Errorf("pid %d was given to another process, started at tick %d, not %d: %w", pid, st.start, startTime, ErrGone)
	}
	now, err := k.PIDOf(fd)
	if err != nil {
		return err
	}
	if now != pid {
		return fmt.Errorf("pid %d is %d to the proc file system at %s: it is another pid namespace's; give the one mounted for ours", pid, now, k.proc)
	}
	return nil
}

// PIDOf gives the pid behind a pidfd, as this proc file system numbers it. It returns ErrGone once the
// process was reaped. The number can be another process's as soon as it is returned; pidfd stays valid.
func (k *Kernel) PIDOf(pidfd int) (int, error) {
	b, err := os.ReadFile(filepath.Join(k.proc, "self/fdinfo", strconv.Itoa(pidfd)))
	if err != nil {
		return 0, fmt.Errorf("ask a pidfd for its pid: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		v, ok := strings.CutPrefix(line, "Pid:")
		if !ok {
			continue
		}
		pid, err := strconv.Atoi(strings.TrimSpace(v))
		switch {
		case err != nil:
			return 0, fmt.Errorf("ask a pidfd for its pid: fdinfo says %q", line)
		case pid == -1: // pidfd_show_fdinfo: reaped
			return 0, fmt.Errorf("the process of a pidfd was reaped: %w", ErrGone)
		case pid == 0:
			return 0, fmt.Errorf("the process of a pidfd has no pid in the pid namespace of %s: it lives outside of it", k.proc)
		}
		return pid, nil
	}
	return 0, fmt.Errorf("descriptor %d is not a pidfd: its fdinfo has no line Pid", pidfd)
}

// Exited reports whether the process of a pidfd is over: all its threads ended, reaped or not.
func Exited(pidfd int) (bool, error) {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return false, fmt.Errorf("poll a pidfd: %w", err)
		case fds[0].Revents&unix.POLLNVAL != 0:
			return false, fmt.Errorf("poll a pidfd: descriptor %d is not open", pidfd)
		default:
			return n > 0, nil
		}
	}
}
