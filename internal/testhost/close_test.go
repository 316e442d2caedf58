package testhost

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestClose(t *testing.T) {
	need(t)
	if err := Reap(); err != nil {
		t.Fatal(err)
	}
	before := traces(t)
	p := newPool(t, "a", "b")
	ctx := testContext(t, time.Minute)
	a := p.Host("a")
	if err := a.WriteBundle("/bundle", BundleOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := a.Runc(ctx, "run", "-d", "--bundle", "/bundle", "ctr"); err != nil {
		t.Fatal(err)
	}
	// A frozen container must not hold Close up.
	if err := a.Runc(ctx, "pause", "ctr"); err != nil {
		t.Fatal(err)
	}
	pids := []int{a.InitPID(), p.Host("b").InitPID(), p.box.pid()}
	start := time.Now()
	for range 2 {
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("closed in %v", time.Since(start).Round(time.Millisecond))
	compareTraces(t, before, traces(t))
	for _, pid := range pids {
		if err := unix.Kill(pid, 0); err != unix.ESRCH {
			t.Errorf("process %d is left: %v", pid, err)
		}
	}
	if err := a.Boot(ctx); err == nil {
		t.Error("a host of a closed pool boots")
	}
	if _, err := p.AddHost(ctx, "c"); err == nil {
		t.Error("a closed pool takes a host")
	}
}

// TestFailure makes creation fail half way.
func TestFailure(t *testing.T) {
	need(t)
	if err := Reap(); err != nil {
		t.Fatal(err)
	}
	before := traces(t)
	for name, o := range map[string]Options{
		"bad root":  {RootFS: t.TempDir(), Hosts: []string{"a", "b"}},
		"no root":   {RootFS: "/nonexistent", Hosts: []string{"a"}},
		"same name": {RootFS: t.TempDir(), Hosts: []string{"a", "a"}},
		"bad name":  {RootFS: t.TempDir(), Hosts: []string{"a", "../b"}},
	} {
		p, err := NewPool(testContext(t, time.Minute), o)
		if err == nil {
			_ = p.Close()
			t.Errorf("%s: NewPool succeeded", name)
		} else {
			t.Logf("%s: %v", name, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if p, err := NewPool(ctx, Options{RootFS: t.TempDir(), Hosts: []string{"a"}}); err == nil {
		_ = p.Close()
		t.Error("NewPool succeeded with a context that is over")
	}
	compareTraces(t, before, traces(t))
}

// creatorMain is the program that TestCreatorKilled kills.
func creatorMain() {
	p, err := NewPool(context.Background(), Options{Hosts: []string{"a"}})
	if err != nil {
		die(err)
	}
	a := p.Host("a")
	ctx := context.Background()
	if err := a.WriteBundle("/bundle", BundleOptions{}); err != nil {
		die(err)
	}
	for _, id := range []string{"frozen", "running"} {
		if err := a.Runc(ctx, "run", "-d", "--bundle", "/bundle", id); err != nil {
			die(err)
		}
	}
	if err := a.Runc(ctx, "pause", "frozen"); err != nil {
		die(err)
	}
	cmd := a.Command(ctx, "sleep", "1000")
	if err := cmd.Start(); err != nil {
		die(err)
	}
	fmt.Println(p.state.dir, a.InitPID(), p.box.pid(), cmd.Process.Pid)
	_ = cmd.Wait()
}

// TestCreatorKilled is what happens to a pool whose creator gets SIGKILL.
func TestCreatorKilled(t *testing.T) {
	need(t)
	if _, err := RootFS(testContext(t, 10*time.Minute), os.Stderr); err != nil {
		t.Fatal(err)
	}
	if err := Reap(); err != nil {
		t.Fatal(err)
	}
	before := traces(t)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), creatorRole+"=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() }) // also when what follows fails
	var dir string
	var pids [3]int
	if _, err := fmt.Fscan(bufio.NewReader(out), &dir, &pids[0], &pids[1], &pids[2]); err != nil {
		t.Fatal(err)
	}
	if err := Reap(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("Reap took the directory of a creator that lives: %v", err)
	}
	// Every process below the host's PID 1 is in its PID namespace.
	// What starts the command runs on this machine: the command's own process is there a moment later.
	var procs []int
	eventually(t, "PID 1, a command and two containers", func() error {
		if procs = hostProcesses(t, pids[0]); len(procs) < 4 {
			return fmt.Errorf("the host has processes %v", procs)
		}
		return nil
	})
	procs = append(procs, pids[1:]...)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	eventually(t, "processes end with their creator", func() error {
		for _, pid := range procs {
			if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && !strings.Contains(string(stat), ") Z ") {
				return fmt.Errorf("left over: %s", stat)
			}
		}
		return nil
	})
	if err := Reap(); err != nil {
		t.Fatal(err)
	}
	compareTraces(t, before, traces(t))
}

// hostProcesses lists PID 1 and its descendants.
func hostProcesses(t *testing.T, initPID int) []int {
	t.Helper()
	children := map[int][]int{}
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range stats {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // gone meanwhile
		}
		var pid, ppid int
		var state string
		_, rest, _ := strings.Cut(string(b), ") ")
		if _, err := fmt.Sscan(string(b), &pid); err != nil {
			continue
		}
		if _, err := fmt.Sscan(rest, &state, &ppid); err != nil {
			continue
		}
		children[ppid] = append(children[ppid], pid)
	}
	all := []int{initPID}
	for i := 0; i < len(all); i++ {
		all = append(all, children[all[i]]...)
	}
	return all
}
