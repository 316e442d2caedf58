//go:build linux

// Command tree makes the images and the process lists that the tests of package images read. It plays
// three parts:
//
//	tree host ROOT OUT   build a host of its own on the root file system ROOT, which has CRIU in it;
//	                     dump and restore two trees there; write everything to OUT
//	tree nested|shared   be the root of such a tree
//	(no argument)        CRIU's action script: at post-dump and post-restore, while CRIU waits, write
//	                     down which process is in which namespaces
package main

import (
	"encoding/json"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

func main() {
	log.SetFlags(0)
	var err error
	switch {
	case os.Getenv("CRTOOLS_SCRIPT_ACTION") != "":
		err = record(os.Getenv("CRTOOLS_SCRIPT_ACTION"))
	case len(os.Args) == 4 && os.Args[1] == "host":
		err = host(os.Args[2], os.Args[3])
	case len(os.Args) == 2:
		err = tree(os.Args[1])
	default:
		err = fmt.Errorf("usage: tree host ROOT OUT")
	}
	if err != nil {
		log.Fatalf("tree %v: %v", os.Args[1:], err)
	}
}

// host runs in fresh mnt, pid, uts, ipc and net namespaces, as their first process.
func host(root, out string) error {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	// What this process inherited open, CRIU must not meet in a tree.
	for fd := 3; fd < 1024; fd++ {
		syscall.CloseOnExec(fd)
	}
	work := filepath.Join(out, "root")
	if err := os.MkdirAll(work, 0o755); err != nil {
		return err
	}
	steps := []func() error{
		func() error { return syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, "") },
		func() error { return syscall.Mount("work", work, "tmpfs", 0, "") },
		func() error { return mkdirs(work, "u", "w", "r") },
		func() error {
			return syscall.Mount("overlay", work+"/r", "overlay", 0, "lowerdir="+root+",upperdir="+work+"/u,workdir="+work+"/w")
		},
		func() error { return mkdirs(work+"/r", "out", "old") },
		func() error { return syscall.Mount(out, work+"/r/out", "", syscall.MS_BIND, "") },
		func() error { return syscall.Mount("/dev", work+"/r/dev", "", syscall.MS_BIND, "") },
		func() error { return os.WriteFile(work+"/r/tree", self, 0o755) },
		func() error { return syscall.PivotRoot(work+"/r", work+"/r/old") },
		func() error { return os.Chdir("/") },
		func() error { return syscall.Mount("proc", "/proc", "proc", 0, "") },
		func() error { return syscall.Mount("sys", "/sys", "sysfs", 0, "") },
		func() error { return syscall.Unmount("/old", syscall.MNT_DETACH) },
		func() error { return os.Setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin") },
		func() error { return run("ip", "link", "set", "lo", "up") },
		// CRIU 4.1 builds a mount namespace below a directory that is a mount point; on the root itself it
		// stops at a BUG.
		func() error { return os.Mkdir("/again", 0o755) },
		func() error { return syscall.Mount("/", "/again", "", syscall.MS_BIND, "") },
		nested,
		shared,
	}
	for i, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
	}
	return nil
}

func mkdirs(dir string, names ...string) error {
	for _, n := range names {
		if err := os.MkdirAll(filepath.Join(dir, n), 0o755); err != nil {
			return err
		}
	}
	return nil
}

func run(name string, arg ...string) error {
	c := exec.Command(name, arg...)
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	if err := c.Run(); err != nil {
		return fmt.Errorf("%s %s: %w", name, strings.Join(arg, " "), err)
	}
	return nil
}

// nested dumps a tree with a namespace of each type of its own but user and time, in which one process
// has a mount namespace of its own, one a network namespace, and one is a zombie.
func nested() error {
	const all = syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWNET | syscall.CLONE_NEWCGROUP
	pid, err := start("nested", all)
	if err != nil {
		return err
	}
	if err := criu("nested", "dump", "-t", strconv.Itoa(pid)); err != nil {
		return err
	}
	if err := reap(pid); err != nil {
		return err
	}
	return criu("nested", "restore", "-d", "--root", "/again")
}

// shared dumps one process in the host's namespaces but for uts, and for a network namespace that CRIU
// is told to treat as external.
func shared() error {
	if err := run("ip", "netns", "add", "outside"); err != nil {
		return err
	}
	ns, err := os.Open("/run/netns/outside")
	if err != nil {
		return err
	}
	defer ns.Close()
	st, err := ns.Stat()
	if err != nil {
		return err
	}
	ino := st.Sys().(*syscall.Stat_t).Ino
	pid, err := start("shared", syscall.CLONE_NEWUTS)
	if err != nil {
		return err
	}
	if err := criu("shared", "dump", "-t", strconv.Itoa(pid), "--external", fmt.Sprintf("net[%d]:outside", ino)); err != nil {
		return err
	}
	if err := reap(pid); err != nil {
		return err
	}
	return criu("shared", "restore", "-d", "--inherit-fd", "fd[3]:outside")
}

// start starts a tree and waits until it stands: each of its processes inherits the end of a pipe and
// closes it then.
func start(role string, flags uintptr) (int, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer r.Close()
	in, err := os.Open("/etc/hostname") // something that CRIU finds again
	if err != nil {
		return 0, err
	}
	defer in.Close()
	argv := []string{"/tree", role}
	if role == "shared" {
		argv = []string{"/usr/bin/nsenter", "--net=/run/netns/outside", "/tree", role}
	}
	pid, err := syscall.ForkExec(argv[0], argv, &syscall.ProcAttr{
		Dir: "/", Env: os.Environ(), Files: []uintptr{in.Fd(), in.Fd(), 2, w.Fd()},
		Sys: &syscall.SysProcAttr{Cloneflags: flags, Setsid: true},
	})
	w.Close()
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", role, err)
	}
	_, err = r.Read(make([]byte, 1)) // EOF
	if err == nil || err.Error() != "EOF" {
		return 0, fmt.Errorf("%s did not get ready: %v", role, err)
	}
	return pid, nil
}

func reap(pid int) error {
	_, err := syscall.Wait4(pid, nil, 0, nil)
	return err
}

// criu runs CRIU with this program as its action script; its images and logs go to /out/DIR.
func criu(dir, verb string, arg ...string) error {
	dir = filepath.Join("/out", dir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	c := exec.Command("criu", append([]string{verb, "-D", dir, "-o", verb + ".log", "-v4", "--action-script", "/tree",
		"--network-lock", "skip", "--manage-cgroups=ignore"}, arg...)...)
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	if ns, err := os.Open("/run/netns/outside"); err == nil {
		defer ns.Close()
		c.ExtraFiles = []*os.File{ns}
	}
	if err := c.Run(); err != nil {
		text, _ := os.ReadFile(filepath.Join(dir, verb+".log"))
		return fmt.Errorf("criu %s: %w\n%s", verb, err, text)
	}
	return nil
}

// tree is the root of a tree, and, with other roles, each process in it.
func tree(role string) error {
	fork := func(role string, flags uintptr) error {
		_, err := syscall.ForkExec("/proc/self/exe", []string{"/tree", role}, &syscall.ProcAttr{
			Dir: "/", Files: []uintptr{0, 0, 0}, Sys: &syscall.SysProcAttr{Cloneflags: flags},
		})
		return err
	}
	var errs []error
	switch role {
	case "nested":
		errs = append(errs,
			syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""),
			syscall.Mount("proc", "/proc", "proc", 0, ""),
			fork("leaf", 0),
			fork("branch", syscall.CLONE_NEWNS),
			fork("leaf", syscall.CLONE_NEWNET),
			fork("dead", 0),
			detach("/again", "/out", "/sys", "/dev"),
		)
	case "branch":
		errs = append(errs,
			detach("/again", "/out", "/sys", "/dev"),
			fork("leaf", 0))
	case "dead":
		os.Exit(3)
	}
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	if err := syscall.Dup3(0, 2, 0); err != nil {
		return err
	}
	syscall.Close(3) // ready
	for {
		syscall.Pause()
	}
}

func detach(mounts ...string) error {
	for _, m := range mounts {
		if err := syscall.Unmount(m, syscall.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", m, err)
		}
	}
	return nil
}

// process is what /proc says of one.
type process struct {
	PID, PPID int
	State     string
	VPIDs     []int
	// Namespaces has the inode of each.
	Namespaces map[string]uint64 `json:",omitempty"`
}

// record writes every process that is CRIU's init process or below it. The images are then complete
// (post-dump) or the final namespaces there (post-restore).
func record(action string) error {
	if action != "post-dump" && action != "post-restore" {
		return nil
	}
	root, err := strconv.Atoi(os.Getenv("CRTOOLS_INIT_PID"))
	if err != nil {
		return err
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	all := map[int]process{}
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			if p, err := readProcess(pid); err == nil {
				all[pid] = p
			}
		}
	}
	var list []process
	for _, p := range all {
		for q := p; q.PID != 0; q = all[q.PPID] {
			if q.PID == root {
				list = append(list, p)
			}
		}
	}
	b, err := json.MarshalIndent(map[string]any{"Tree": list, "CRIU": all[os.Getppid()]}, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(os.Getenv("CRTOOLS_IMAGE_DIR"), action+".json"), append(b, '\n'), 0o644)
}

func readProcess(pid int) (process, error) {
	p := process{PID: pid}
	dir := "/proc/" + strconv.Itoa(pid)
	b, err := os.ReadFile(dir + "/status")
	if err != nil {
		return p, err
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		switch f[0] {
		case "PPid:":
			p.PPID, _ = strconv.Atoi(f[1])
		case "State:":
			p.State = f[1]
		case "NSpid:":
			for _, v := range f[1:] {
				n, _ := strconv.Atoi(v)
				p.VPIDs = append(p.VPIDs, n)
			}
		}
	}
	for _, t := range []string{"mnt", "uts", "ipc", "pid", "net", "cgroup", "user", "time"} {
		link, err := os.Readlink(dir + "/ns/" + t)
		if err != nil {
			continue // a zombie's
		}
		_, num, _ := strings.Cut(strings.TrimSuffix(link, "]"), "[")
		ino, err := strconv.ParseUint(num, 10, 64)
		if err != nil {
			return p, err
		}
		if p.Namespaces == nil {
			p.Namespaces = map[string]uint64{}
		}
		p.Namespaces[t] = ino
	}
	return p, nil
}
