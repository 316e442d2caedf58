//go:build linux

package kernelns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func find(procs []Process, pid int) (Process, bool) {
	for _, p := range procs {
		if p.PID == pid {
			return p, true
		}
	}
	return Process{}, false
}

func TestSweep(t *testing.T) {
	needRoot(t)
	k := openKernel(t)
	host, err := k.Host()
	if err != nil {
		t.Fatal(err)
	}
	c := spawnCat(t, allNamespaces)
	pid := c.Process.Pid
	for _, round := range []string{"new", "known"} {
		procs, err := k.Sweep(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		p, ok := find(procs, pid)
		if !ok {
			t.Fatalf("%s: the child was not seen", round)
		}
		for _, ns := range k.types {
			id := p.Namespaces[ns]
			if id.IsZero() || id.BootID != k.BootID() {
				t.Errorf("%s: %s of the child is %+v", round, ns, id)
			}
			if id == host[ns] {
				t.Errorf("%s: the child is in the host's %s namespace %+v", round, ns, id)
			}
		}
		if p.PPID != os.Getpid() || p.Comm != "cat" || p.Ended || p.KernelThread || p.Err != nil {
			t.Errorf("%s: %+v", round, p)
		}
		if len(p.VPIDs) != 2 || p.VPIDs[0] != pid || p.VPIDs[1] != 1 {
			t.Errorf("%s: VPIDs = %v, want [%d 1]", round, p.VPIDs, pid)
		}
		one, err := k.Process(pid)
		if one.State = p.State; err != nil || !reflect.DeepEqual(one, p) {
			t.Errorf("%s: Process = %+v, %v; Sweep = %+v", round, one, err, p)
		}
		tree := Descendants(procs, os.Getpid())
		if _, ok := find(tree, pid); !ok || tree[0].PID != os.Getpid() {
			t.Errorf("%s: the child is not in our tree %+v", round, tree)
		}
		if _, ok := find(tree, 1); ok {
			t.Errorf("%s: pid 1 is in our tree", round)
		}
	}
	end(c)
	procs, err := k.Sweep(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := find(procs, pid); ok {
		t.Error("a reaped child was seen")
	}
	if _, ok := k.seen[pid]; ok || len(k.seen) != len(procs) {
		t.Errorf("%d processes are remembered, %d live", len(k.seen), len(procs))
	}
	if _, err := k.Process(pid); !errors.Is(err, ErrGone) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Process of a reaped child: %v, want ErrGone", err)
	}
}

// TestSweepChurn sweeps, from two goroutines, while processes come and go and change namespaces.
func TestSweepChurn(t *testing.T) {
	needRoot(t)
	k := openKernel(t)
	done := make(chan struct{})
	var sweepers sync.WaitGroup
	for range 2 {
		sweepers.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if _, err := k.Sweep(context.Background()); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 200 {
		c := exec.Command("true")
		c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUTS | unix.CLONE_NEWIPC}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := k.Process(c.Process.Pid); err != nil && !errors.Is(err, ErrGone) {
			t.Error(err)
		}
		if err := c.Wait(); err != nil {
			t.Error(err)
		}
	}
	close(done)
	sweepers.Wait()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := k.Sweep(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Sweep with a cancelled context: %v", err)
	}
}

func TestZombie(t *testing.T) {
	needRoot(t)
	k := openKernel(t)
	c := spawnCat(t, unix.CLONE_NEWUTS)
	kill(t, c)
	p, err := k.Process(c.Process.Pid)
	if err != nil || !p.Ended || p.State != 'Z' || p.Namespaces != nil {
		t.Errorf("a zombie reads %+v, %v", p, err)
	}
	procs, err := k.Sweep(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if p, ok := find(procs, c.Process.Pid); !ok || !p.Ended {
		t.Errorf("a zombie was swept as %+v, %v", p, ok)
	}
	f, err := k.OpenPID(p.PID, p.StartTime)
	if err != nil {
		t.Fatalf("OpenPID of a zombie: %v", err)
	}
	f.Close()
}

// TestLeaderless: the leader shows Z, but the process and its namespaces live.
func TestLeaderless(t *testing.T) {
	needRoot(t)
	k := openKernel(t)
	c := leaderless(t, k)
	p, err := k.Process(c.Process.Pid)
	if err != nil || p.Ended || len(p.Namespaces) != len(k.types) {
		t.Errorf("a process without its leader reads %+v, %v", p, err)
	}
	if over, err := Exited(int(pidfd(t, p.PID).Fd())); err != nil || over {
		t.Errorf("Exited = %v, %v", over, err)
	}
}

func TestStrangeName(t *testing.T) {
	needRoot(t)
	k := openKernel(t)
	cat, err := exec.LookPath("cat")
	if err != nil {
		t.Fatal(err)
	}
	name := ") (Z 1) S 2 3"
	path := filepath.Join(t.TempDir(), name)
	if err := os.Symlink(cat, path); err != nil {
		t.Fatal(err)
	}
	c := spawn(t, command(t, path, 0))
	p, err := k.Process(c.Process.Pid)
	if err != nil || p.Comm != name || p.PPID != os.Getpid() || p.Ended {
		t.Errorf("read %+v, %v", p, err)
	}
}

func TestOpenPID(t *testing.T) {
	needRoot(t)
	k := openKernel(t)
	c := spawnCat(t, 0)
	p, err := k.Process(c.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.OpenPID(p.PID, p.StartTime+1); !errors.Is(err, ErrGone) {
		t.Errorf("with another start time: %v, want ErrGone", err)
	}
	f, err := k.OpenPID(p.PID, p.StartTime)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if pid, err := k.PIDOf(int(f.Fd())); err != nil || pid != p.PID {
		t.Errorf("PIDOf = %d, %v, want %d", pid, err, p.PID)
	}
	if over, err := Exited(int(f.Fd())); err != nil || over {
		t.Errorf("alive: Exited = %v, %v", over, err)
	}
	kill(t, c)
	if over, err := Exited(int(f.Fd())); err != nil || !over {
		t.Errorf("a zombie: Exited = %v, %v", over, err)
	}
	end(c)
	if over, err := Exited(int(f.Fd())); err != nil || !over {
		t.Errorf("reaped: Exited = %v, %v", over, err)
	}
	if _, err := k.PIDOf(int(f.Fd())); !errors.Is(err, ErrGone) {
		t.Errorf("reaped: PIDOf: %v, want ErrGone", err)
	}
	if _, err := k.OpenPID(p.PID, p.StartTime); !errors.Is(err, ErrGone) {
		t.Errorf("reaped: OpenPID: %v, want ErrGone", err)
	}
	if _, err := k.PIDOf(0); err == nil {
		t.Error("standard input was taken for a pidfd")
	}
}

// TestPIDReuse runs reusePID in a pid namespace of its own, where it may choose pids.
func TestPIDReuse(t *testing.T) {
	needRoot(t)
	c := exec.CommandContext(t.Context(), "/proc/self/exe")
	c.Env = append(os.Environ(), roleVar+"=pidreuse", "KERNELNS_TEST_DIR="+t.TempDir())
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

func reusePID() error {
	dir := os.Getenv("KERNELNS_TEST_DIR")
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	outer, err := Open("/proc") // still the outer pid namespace's
	if err != nil {
		return err
	}
	if err := unix.Mount("proc", dir, "proc", 0, ""); err != nil {
		return err
	}
	k, err := Open(dir)
	if err != nil {
		return err
	}
	start := func() (*exec.Cmd, Process, error) {
		c := exec.Command("cat")
		if _, err := c.StdinPipe(); err != nil {
			return nil, Process{}, err
		}
		if err := c.Start(); err != nil {
			return nil, Process{}, err
		}
		p, err := k.Process(c.Process.Pid)
		return c, p, err
	}
	c, old, err := start()
	if err != nil {
		return err
	}
	if f, err := outer.OpenPID(old.PID, old.StartTime); err == nil {
		f.Close()
		return errors.New("a pid was looked up in another pid namespace's proc and accepted")
	}
	bound, err := k.openDir(old.PID)
	if err != nil {
		return err
	}
	end(c)
	var heir Process
	for deadline := time.Now().Add(20 * time.Second); ; end(c) {
		if time.Now().After(deadline) {
			return fmt.Errorf("pid %d did not come back with another start time", old.PID)
		}
		if err := os.WriteFile(filepath.Join(dir, "sys/kernel/ns_last_pid"), []byte(strconv.Itoa(old.PID-1)), 0); err != nil {
			return err
		}
		if c, heir, err = start(); err != nil {
			return err
		}
		if heir.PID == old.PID && heir.StartTime != old.StartTime {
			break
		}
		if heir.PID != old.PID { // a thread of this program has the number, and keeps it: on with this one's
			if err := unix.Close(bound); err != nil {
				return err
			}
			if bound, err = k.openDir(heir.PID); err != nil {
				return err
			}
			old = heir
		}
	}
	defer end(c)
	if _, err := readStat(bound, nil); !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("the old process's directory reads the new one's stat: %v, want ESRCH", err)
	}
	if _, err := k.namespaces(bound, "ns/"); err == nil {
		return errors.New("the old process's directory reads the new one's namespaces")
	}
	if _, err := k.OpenPID(old.PID, old.StartTime); !errors.Is(err, ErrGone) {
		return fmt.Errorf("OpenPID of the old process: %v, want ErrGone", err)
	}
	f, err := k.OpenPID(heir.PID, heir.StartTime)
	if err != nil {
		return err
	}
	return f.Close()
}

func TestParse(t *testing.T) {
	rest := " S 7 8 9 0 -1 %s 0 0 0 0 0 0 0 0 20 0 3 0 12345 1 2 3\n"
	s, err := parseStat([]byte("42 (a) (b) Z 1 )" + fmt.Sprintf(rest, "2097216")))
	if want := (stat{comm: "a) (b) Z 1 ", state: 'S', ppid: 7, threads: 3, start: 12345, kernelThread: true}); err != nil || s != want {
		t.Errorf("parseStat = %+v, %v, want %+v", s, err, want)
	}
	for _, bad := range []string{"", "42", "42 )x(", "42 (x)", "42 (x) S 1", "42 (x)" + fmt.Sprintf(rest, "y")} {
		if _, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("parseStat(%q) succeeded", bad)
		}
	}
	if v, err := parseVPIDs([]byte("Name:\tNSpid:\nNSpid:\t42\t7\t1\nx: y\n")); err != nil || !reflect.DeepEqual(v, []int{42, 7, 1}) {
		t.Errorf("parseVPIDs = %v, %v", v, err)
	}
	for _, bad := range []string{"", "Name: x\n", "Name: x\nNSpid:\tx\n"} {
		if _, err := parseVPIDs([]byte(bad)); err == nil {
			t.Errorf("parseVPIDs(%q) succeeded", bad)
		}
	}
	for in, want := range map[string]string{
		"":                   "",
		"garbage\n":          "",
		"0::/\n":             "/",
		"0::/a:b c\n":        "/a:b c",
		"8:pids:/p\n0::/u\n": "/u",
		"8:pids:/p\n0::/\n":  "/p",
		"9:cpu,cpuacct:/c\n5:devices:/d\n1:name=systemd:/s\n0::/\n": "/d",
		"9:cpu,cpuacct:/c\n8:pids:/\n1:name=systemd:/s\n":           "/s",
	} {
		if got := parseCgroup([]byte(in)); got != want {
			t.Errorf("parseCgroup(%q) = %q, want %q", in, got, want)
		}
	}
}

// FuzzParse: a process names itself as it likes and moves into a cgroup of any name, and neither makes /proc
// say anything else of it.
func FuzzParse(f *testing.F) {
	f.Add([]byte("42 (x) S 7 8 9 0 -1 0 0 0 0 0 0 0 0 0 20 0 3 0 12345 1 2 3\n"), "x", 7, uint64(12345))
	f.Add([]byte("\nNSpid:\t1\t2\n"), ") R 1 (", 1, uint64(0))
	f.Add([]byte("8:pids:/p\n0::/\n"), "a\nNSpid:\t1", 1, uint64(1))
	for _, file := range []string{"stat", "status", "cgroup"} {
		b, err := os.ReadFile("/proc/self/" + file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, "kernelns.test", os.Getppid(), uint64(1))
	}
	f.Fuzz(func(t *testing.T, b []byte, comm string, ppid int, start uint64) {
		if s, err := parseStat(b); err == nil && (!bytes.Contains(b, []byte("("+s.comm+")")) || s.state == 0) {
			t.Errorf("%q is %+v", b, s)
		}
		if pids, err := parseVPIDs(b); err == nil && len(pids) > len(b) {
			t.Errorf("%q has %d pids", b, len(pids))
		}
		if path := parseCgroup(b); !bytes.Contains(b, []byte(":"+path)) && path != "" || strings.Contains(path, "\n") {
			t.Errorf("%q is in %q", b, path)
		}
		line := fmt.Appendf(nil, "42 (%s) S %d 8 9 0 -1 4194304 0 0 0 0 0 0 0 0 20 0 3 0 %d 1 2 3\n", comm, ppid, start)
		want := stat{comm: comm, state: 'S', ppid: ppid, threads: 3, start: start}
		if s, err := parseStat(line); err != nil || s != want {
			t.Errorf("%q is %+v, %v", line, s, err)
		}
		// The kernel writes a name's line feeds as \\n in status, and in cgroup paths (seq_escape).
		name := strings.ReplaceAll(comm, "\n", "\\n")
		status := fmt.Appendf(nil, "Name:\t%s\nPid:\t42\nNSpid:\t42\t7\nNSpgid:\t1\n", name)
		if pids, err := parseVPIDs(status); err != nil || !slices.Equal(pids, []int{42, 7}) {
			t.Errorf("%q has pids %v, %v", status, pids, err)
		}
		if path := parseCgroup(fmt.Appendf(nil, "4:devices:/d\n0::/%s/x\n", name)); path != "/"+name+"/x" {
			t.Errorf("a cgroup %q is read as %q", name, path)
		}
	})
}

func TestDescendants(t *testing.T) {
	procs := []Process{{PID: 1, PPID: 0}, {PID: 2, PPID: 5}, {PID: 5, PPID: 1}, {PID: 6, PPID: 2}, {PID: 7, PPID: 1}, {PID: 9, PPID: 9}}
	for root, want := range map[int][]int{5: {5, 2, 6}, 7: {7}, 9: {9}, 3: nil, 1: {1, 5, 7, 2, 6}} {
		var got []int
		for _, p := range Descendants(procs, root) {
			got = append(got, p.PID)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("Descendants of %d = %v, want %v", root, got, want)
		}
	}
	if got := Descendants([]Process{{PID: 1, PPID: 2}, {PID: 2, PPID: 1}}, 1); len(got) != 2 {
		t.Errorf("a circle gave %v", got)
	}
}

// BenchmarkSweep reports the processor time that one namespace of a container costs, system and user.
func BenchmarkSweep(b *testing.B) {
	needRoot(b)
	k := openKernel(b)
	for range 200 {
		spawnCat(b, allNamespaces)
	}
	run := func(name string, known bool) {
		b.Run(name, func(b *testing.B) {
			var links int
			before := processorTime(b)
			for b.Loop() {
				if !known {
					k.seen = nil
				}
				procs, err := k.Sweep(b.Context())
				if err != nil {
					b.Fatal(err)
				}
				for _, p := range procs {
					links += len(p.Namespaces)
				}
			}
			b.ReportMetric(float64(processorTime(b)-before)/float64(links), "cpu-ns/namespace")
			b.ReportMetric(float64(links)/float64(b.N), "namespaces/op")
		})
	}
	run("known", true)
	run("new", false)
	k.features.Handles = false
	run("known-by-ioctl", true)
}

func processorTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
