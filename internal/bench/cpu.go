package main

import (
	"fmt"
	"os"
	"path/filepath"
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

// busy is how much processor time a system took a second while during ran; that of none is 0.
func (s *system) busy(took *time.Duration, during func() error) error {
	if s == nil {
		return during()
	}
	before, err := treeCPU(s.pid)
	if err != nil {
		return err
	}
	began := time.Now()
	if err := during(); err != nil {
		return err
	}
	after, err := treeCPU(s.pid)
	*took = time.Duration(float64(after-before) / time.Since(began).Seconds())
	return err
}

// treeCPU is the processor time of a process and of its children, which PostgreSQL has one a connection of, also of
// those that have ended.
func treeCPU(pid int) (time.Duration, error) {
	all, _, err := statOf(pid)
	if err != nil {
		return 0, err
	}
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0, err
	}
	for _, path := range stats {
		child, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			continue
		}
		if cpu, parent, err := statOf(child); err == nil && parent == pid { // else it has ended
			all += cpu
		}
	}
	return all, nil
}

func statOf(pid int) (cpu time.Duration, parent int, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	// After the name, which may have spaces: state, parent, ..., then from the 12th on the ticks in user and in kernel
	// mode, and those of children that were waited for.
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 15 {
		return 0, 0, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	parent, err = strconv.Atoi(fields[1])
	for _, f := range fields[11:15] {
		ticks, _ := strconv.Atoi(f)
		cpu += time.Duration(ticks) * tick
	}
	return cpu, parent, err
}
