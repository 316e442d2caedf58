package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/internal/testhost"
)

// demo is `nsalloc demo` as a process, with a cache of its own, so that what it leaves can be seen.
type demo struct {
	t         *testing.T
	cmd       *exec.Cmd
	cache     string
	out, errs bytes.Buffer
}

// machineFiles are what a demo must not touch.
var machineFiles = []string{"/etc/criu", "/etc/criu/default.conf", "/etc/nsalloc", "/run/nsalloc", "/var/lib/nsalloc"}

func newDemo(t *testing.T, bin string, args ...string) *demo {
	t.Helper()
	needHosts(t)
	rootfs, err := testhost.RootFS(t.Context(), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	d := &demo{t: t}
	if d.cache, err = os.MkdirTemp(filepath.Dir(rootfs), "demo-test-"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(d.cache) })
	if err := os.Symlink(rootfs, filepath.Join(d.cache, filepath.Base(rootfs))); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	d.cmd = exec.CommandContext(ctx, filepath.Join(bin, "nsalloc"), append([]string{"demo"}, args...)...)
	d.cmd.Env = append(os.Environ(), "NSALLOC_CACHE="+d.cache)
	d.cmd.Stdout, d.cmd.Stderr = &d.out, &d.errs
	before := fingerprint()
	t.Cleanup(func() {
		d.checkClean()
		if after := fingerprint(); after != before {
			t.Errorf("the machine's own files changed:\n%s\nbecame\n%s", before, after)
		}
		if t.Failed() {
			t.Logf("--- out\n%s\n--- err\n%s", d.out.Bytes(), d.errs.Bytes())
		}
	})
	return d
}

func fingerprint() string {
	var b strings.Builder
	for _, path := range machineFiles {
		if st, err := os.Lstat(path); err == nil {
			fmt.Fprintln(&b, path, st.ModTime().UnixNano(), st.Size())
		}
	}
	return b.String()
}

// checkClean proves that nothing of the demo is left: no process, and no directory; that is removed last,
// after the cgroups.
func (d *demo) checkClean() {
	d.t.Helper()
	left, err := os.ReadDir(filepath.Join(d.cache, "run"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		d.t.Error(err)
	}
	for _, e := range left {
		d.t.Errorf("%s is left in the cache", e.Name())
	}
	// Every relay has the directory of its pool on its command line, every PID 1 has it as a mount.
	for _, pattern := range []string{"/proc/[0-9]*/cmdline", "/proc/[0-9]*/mountinfo"} {
		files, _ := filepath.Glob(pattern)
		for _, f := range files {
			if text, err := os.ReadFile(f); err == nil && bytes.Contains(text, []byte(d.cache)) {
				d.t.Errorf("process %s is left (%s)", filepath.Base(filepath.Dir(f)), f)
			}
		}
	}
}

// serials are the last columns of the table rows under a title that matches, by type. A row is a type, an
// inode, and so on.
func (d *demo) serials(title string, row string) map[string][]string {
	d.t.Helper()
	_, after, found := strings.Cut(d.out.String(), title)
	if !found {
		d.t.Fatalf("there is no %q", title)
	}
	all := map[string][]string{}
	for _, m := range regexp.MustCompile(row).FindAllStringSubmatch(after, -1) {
		if _, ok := all[m[1]]; !ok {
			all[m[1]] = m[2:]
		}
	}
	return all
}

// TestDemo runs what a newcomer runs first.
func TestDemo(t *testing.T) {
	d := newDemo(t, binaries)
	began := time.Now()
	if err := d.cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > time.Minute {
		t.Errorf("it took %v", took)
	}
	out := d.out.String()
	for _, want := range []string{"share this machine's kernel", "handed off", "no findings", "Next:"} {
		if !strings.Contains(strings.Join(strings.Fields(out), " "), want) {
			t.Errorf("%q is missing", want)
		}
	}
	if strings.Contains(out, "\x1b") || strings.Contains(out, "[simulation]") || d.errs.Len() > 0 {
		t.Error("colours in a pipe, a simulation, or errors")
	}
	for line := range strings.Lines(out) {
		// Only paths may be longer: those of this test are.
		if n := len([]rune(strings.TrimRight(line, "\n"))); n > 80 && !strings.Contains(line, "/") {
			t.Errorf("a line has %d columns: %s", n, line)
		}
	}

	first := d.serials("TYPE         INODE", `(?m)^(\w+) +\d+ +(?:\d+|weak)  ([0-9a-f]{16})  its own$`)
	both := d.serials("INODE a → b", `(?m)^(\w+) +(\d+) [→=] (\d+) +(\w+) → (\w+) +([0-9a-f]{16}) ✓$`)
	clone := d.serials("CLONED FROM", `(?m)^(\w+) +\d+ +(?:\d+|weak)  ([0-9a-f]{16})  ([0-9a-f]{16})$`)
	used := map[string]bool{}
	for _, typ := range runtimeTypes(false) {
		x, y, z := first[string(typ)], both[string(typ)], clone[string(typ)]
		if x == nil || y == nil || z == nil {
			t.Errorf("%s is missing in a table: %v, %v, %v", typ, x, y, z)
			continue
		}
		if x[0] != y[4] || z[1] != x[0] || z[0] == x[0] {
			t.Errorf("%s: serial %s, then %s; the clone has %s, of %s", typ, x[0], y[4], z[0], z[1])
		}
		if y[2] == y[3] && y[2] != "weak" {
			t.Errorf("%s: kernel id %s on both hosts", typ, y[2])
		}
		if used[x[0]] || used[z[0]] {
			t.Errorf("%s: a serial is there twice", typ)
		}
		used[x[0]], used[z[0]] = true, true
	}
	m := regexp.MustCompile(`counted to (\d+) on a, and is at (\d+) on b`).FindStringSubmatch(out)
	if m == nil || len(m[1]) > len(m[2]) || len(m[1]) == len(m[2]) && m[1] >= m[2] {
		t.Errorf("the counter: %v", m)
	}
}

// TestDemoFails: what went wrong, at which step, and whose logs say so.
func TestDemoFails(t *testing.T) {
	bin := t.TempDir()
	for _, name := range []string{"nsalloc", "nsalloc-agent", "nsalloc-server"} {
		if err := os.Symlink(filepath.Join(binaries, name), filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	copyFile(t, filepath.Join(binaries, "nsalloc"), filepath.Join(bin, "nsalloc")) // it looks beside itself
	hook := "#!/bin/sh\necho nothing passes here\nexit 1\n"
	if err := os.WriteFile(filepath.Join(bin, "nsalloc-hook"), []byte(hook), 0o755); err != nil {
		t.Fatal(err)
	}
	d := newDemo(t, bin)
	exit(t, d.cmd.Run(), 1)
	for _, want := range []string{"failed at this step: checkpoint", "runc checkpoint", "nothing passes here", "The log of agent-a ends:"} {
		if !strings.Contains(d.errs.String(), want) {
			t.Errorf("%q is missing", want)
		}
	}
	if !strings.Contains(d.out.String(), "remove the hosts") || strings.Contains(d.out.String(), "Next:") {
		t.Error("it does not clean up, or goes on")
	}
}

// TestDemoInterrupted: ^C in the middle leaves nothing behind; with --keep it is how one leaves.
func TestDemoInterrupted(t *testing.T) {
	for what, c := range map[string]struct {
		args []string
		at   string
		code int
	}{
		"early": {nil, "Both hosts", 1},
		"late":  {nil, "restore it on b", 1},
		"kept":  {[]string{"--keep"}, "sandbox list --insecure", 0},
	} {
		t.Run(what, func(t *testing.T) {
			d := newDemo(t, binaries, c.args...)
			d.cmd.Stdout = nil
			out, err := d.cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			// As a terminal does it: the signal goes to everything that the demo has started.
			d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			if err := d.cmd.Start(); err != nil {
				t.Fatal(err)
			}
			for lines := bufio.NewScanner(out); lines.Scan(); {
				fmt.Fprintln(&d.out, lines.Text())
				if strings.Contains(lines.Text(), c.at) {
					if c.code == 0 {
						d.enter()
					}
					if err := syscall.Kill(-d.cmd.Process.Pid, syscall.SIGINT); err != nil {
						t.Error(err)
					}
				}
			}
			exit(t, d.cmd.Wait(), c.code)
		})
	}
}

// enter does what --keep says: a shell in a host, and a command there.
func (d *demo) enter() {
	d.t.Helper()
	m := regexp.MustCompile(`nsenter -a -t (\d+) +bash +# a shell on host b`).FindStringSubmatch(d.out.String())
	list := regexp.MustCompile(`nsalloc sandbox list .*`).FindString(d.out.String())
	if m == nil {
		d.t.Error("it does not say how to enter")
		return
	}
	shell := exec.Command("nsenter", "-a", "-t", m[1], "bash")
	shell.Stdin = strings.NewReader("hostname; runc list; nsalloc ps;" + list + "\n")
	out, err := shell.CombinedOutput()
	d.out.Write(out)
	if err != nil || !strings.HasPrefix(string(out), "b\n") || !strings.Contains(string(out), "counter-2") || strings.Count(string(out), "running") < 4 {
		d.t.Errorf("a shell on host b: %v", err)
	}
}

// TestDemoWithoutRoot: it says why it cannot run, and shows a simulation when asked to, and not before.
func TestDemoWithoutRoot(t *testing.T) {
	dir, err := os.MkdirTemp("", "nsalloc-demo-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	copyFile(t, filepath.Join(binaries, "nsalloc"), filepath.Join(dir, "nsalloc"))
	run := func(args ...string) (string, string, error) {
		cmd := exec.Command(filepath.Join(dir, "nsalloc"), args...)
		if os.Geteuid() == 0 {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		}
		var out, errs bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errs
		err := cmd.Run()
		return out.String(), errs.String(), err
	}
	out, errs, err := run("demo")
	exit(t, err, 1)
	if out != "" || !strings.Contains(errs, "not root") || !strings.Contains(errs, "demo --simulate") {
		t.Errorf("out %q, err %q", out, errs)
	}
	out, errs, err = run("demo", "--simulate")
	exit(t, err, 0)
	for line := range strings.Lines(out) {
		if !strings.HasPrefix(line, "[simulation] ") {
			t.Errorf("line %q", line)
		}
	}
	if !strings.Contains(out, "no findings") || errs != "" {
		t.Errorf("out %q, err %q", out, errs)
	}
}

func exit(t *testing.T, err error, code int) {
	t.Helper()
	got := 0
	if e, ok := errors.AsType[*exec.ExitError](err); ok {
		got = e.ExitCode()
	} else if err != nil {
		t.Error(err)
	}
	if got != code {
		t.Errorf("exit code %d, want %d", got, code)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	_ = os.Remove(to)
	if err := os.WriteFile(to, data, 0o755); err != nil {
		t.Fatal(err)
	}
}
