package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// tick is what /proc counts processor time in, on every machine that Linux knows.
const tick = 10 * time.Millisecond

// ownCPU is the processor time that this process has taken.
func ownCPU() time.Duration {
	var r unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &r) // cannot fail
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// busy is how much processor time a system's process took a second while during ran; 0 where there is none, or
// one for each connection, as PostgreSQL has.
func (s *system) busy(took *time.Duration, during func() error) error {
	if s == nil || s.pid == 0 {
		return during()
	}
	before, err := cpuOf(s.pid)
	if err != nil {
		return err
	}
	began := time.Now()
	if err := during(); err != nil {
		return err
	}
	after, err := cpuOf(s.pid)
	*took = time.Duration(float64(after-before) / time.Since(began).Seconds())
	return err
}

// cpuOf is the processor time that a process has taken.
func cpuOf(pid int) (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// After the name, which may have spaces, from the 12th on: ticks in user and in kernel mode.
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	user, err := strconv.Atoi(fields[11])
	kernel, err2 := strconv.Atoi(fields[12])
	return time.Duration(user+kernel) * tick, errors.Join(err, err2)
}
