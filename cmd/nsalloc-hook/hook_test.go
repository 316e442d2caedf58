//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

func TestWhoAsks(t *testing.T) {
	a := listen(t, pass(t, ""))
	images, init := imageDir(t), os.Getppid()
	code, out := hook(t, env(criuhook.PostDump, images, init))
	if code != 0 || out != "" {
		t.Errorf("exit code %d, %q", code, out)
	}
	s := a.get(t)
	if s.Action != criuhook.PostDump || s.Caller != criuhook.Script || s.CRIUPID != os.Getpid() || s.InitPID != init || s.ParentUnseen {
		t.Errorf("request %+v", s.Request)
	}
	if pid := pidOf(t, s.file(criuhook.FDCRIU)); pid != os.Getpid() {
		t.Errorf("pidfd of %d, CRIU is %d", pid, os.Getpid())
	}
	if pid := pidOf(t, s.file(criuhook.FDInit)); pid != init {
		t.Errorf("pidfd of %d, init is %d", pid, init)
	}
	// What the agent does with the directory: a file beside, synced, renamed; the directory synced.
	f := s.file(criuhook.FDImages)
	if f == nil {
		t.Fatalf("no image directory in %v", s.FDs)
	}
	fd, err := unix.Openat(int(f.Fd()), "new", unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if err == nil {
		err = errors.Join(unix.Close(fd), unix.Renameat(int(f.Fd()), "new", int(f.Fd()), criuhook.ManifestName), f.Sync())
	}
	if err == nil {
		_, err = os.Stat(filepath.Join(images.Name(), criuhook.ManifestName))
	}
	if err != nil {
		t.Error(err)
	}
}

func TestVerdicts(t *testing.T) {
	veto := response(t, criuhook.Response{Verdict: criuhook.Veto, Message: "no: \x1b[31mdisk full\nso there"})
	for _, stage := range criuhook.Stages() {
		t.Run(string(stage.Action), func(t *testing.T) {
			for name, c := range map[string]struct {
				answer []byte
				veto   bool
				prints string
			}{
				"pass":    {pass(t, ""), false, ""},
				"warning": {pass(t, "careful"), false, "nsalloc: " + string(stage.Action) + ": careful\n"},
				"veto":    {veto, true, "nsalloc: " + string(stage.Action) + ": no: ?[31mdisk full so there\n"},
				"garbage": {[]byte("{}"), true, "*"},
				"nothing": {[]byte{}, true, "*"},
			} {
				t.Run(name, func(t *testing.T) {
					listen(t, c.answer)
					code, out := hook(t, env(stage.Action, imageDir(t), 0))
					want := 0
					if c.veto && stage.CanVeto {
						want = 1
					}
					if code != want {
						t.Errorf("exit code %d, want %d; %q", code, want, out)
					}
					if c.prints != "*" && out != c.prints || c.prints == "*" && (!strings.HasPrefix(out, "nsalloc: ") || strings.Count(out, "\n") != 1) {
						t.Errorf("printed %q, want %q", out, c.prints)
					}
				})
			}
		})
	}
}

func TestNobodyAnswers(t *testing.T) {
	bypass := filepath.Join(dir, "bypass")
	for _, stage := range criuhook.Stages() {
		code, out := hook(t, env(stage.Action, nil, 0))
		if (code != 0) != stage.CanVeto || !strings.Contains(out, "start nsalloc-agent") {
			t.Errorf("%s without an agent: exit code %d, %q", stage.Action, code, out)
		}
		if err := os.WriteFile(bypass, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		code, out = hook(t, env(stage.Action, nil, 0))
		if code != 0 || out == "" {
			t.Errorf("%s without an agent, with a bypass: exit code %d, %q", stage.Action, code, out)
		}
		if err := os.Remove(bypass); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("silence", func(t *testing.T) {
		if testing.Short() {
			t.Skip("takes the hook's whole deadline")
		}
		listen(t, nil)
		start := time.Now()
		code, out := hook(t, env(criuhook.PostRestore, imageDir(t), 0))
		if took := time.Since(start); code != 1 || took < criuhook.Deadline || took > criuhook.Deadline+3*time.Second {
			t.Errorf("exit code %d after %v, %q", code, took, out)
		}
	})
}

func TestNotOurs(t *testing.T) {
	a := listen(t, response(t, criuhook.Response{Verdict: criuhook.Veto}))
	t.Run("unknown action", func(t *testing.T) {
		for _, action := range []string{"orphan-pts-master", "status-ready", strings.Repeat("x", 100_000), "pre-dump\n"} {
			if code, out := hook(t, []string{"CRTOOLS_SCRIPT_ACTION=" + action}); code != 0 || out != "" {
				t.Errorf("%.40q: exit code %d, %q", action, code, out)
			}
		}
	})
	t.Run("started by a person", func(t *testing.T) {
		for _, e := range [][]string{nil, {"CRTOOLS_SCRIPT_ACTION="}} {
			if code, out := hook(t, e); code != 1 || strings.Count(out, "\n") != 1 {
				t.Errorf("exit code %d, %q", code, out)
			}
		}
		if code, out := hook(t, nil, "--version"); code != 0 || out != "nsalloc-hook v1\n" {
			t.Errorf("exit code %d, %q", code, out)
		}
	})
	t.Run("not set up", func(t *testing.T) {
		hide(t)
		for _, e := range [][]string{nil, env(criuhook.PreDump, nil, 0)} {
			if code, out := hook(t, e); code != 0 || out != "" {
				t.Errorf("exit code %d, %q", code, out)
			}
		}
	})
	if len(a.seen) != 0 {
		t.Errorf("the agent was asked %d times", len(a.seen))
	}
}

func TestHostileEnvironment(t *testing.T) {
	images := imageDir(t)
	me := fmt.Sprintf("/proc/%d/fd/", os.Getpid())
	gone := images.Fd() + 5000
	for name, c := range map[string]struct {
		dir, init string
		fds       []string
		initPID   int
	}{
		"nothing set":        {"", "", []string{"criu"}, 0},
		"dangling directory": {me + strconv.Itoa(int(gone)), "", []string{"criu"}, 0},
		"no directory":       {me + "0", "", []string{"criu"}, 0},
		"some path":          {"/etc", "", []string{"criu"}, 0},
		"path tricks":        {me + "../../../etc", "", []string{"criu"}, 0},
		"leading zero":       {strings.Replace(me, "/proc/", "/proc/0", 1) + "0", "", []string{"criu"}, 0},
		"huge directory":     {strings.Repeat("/x", 60_000), "", []string{"criu"}, 0},
		"control characters": {"/proc/\x1b\n\xff/fd/1", "", []string{"criu"}, 0},
		"pid not a number":   {me + strconv.Itoa(int(images.Fd())), "1x", []string{"criu", "images"}, 0},
		"pid negative":       {me + strconv.Itoa(int(images.Fd())), "-1", []string{"criu", "images"}, 0},
		"pid 0":              {me + strconv.Itoa(int(images.Fd())), "0", []string{"criu", "images"}, 0},
		"pid overflows":      {me + strconv.Itoa(int(images.Fd())), "4294967297", []string{"criu", "images"}, 0},
		"pid huge":           {me + strconv.Itoa(int(images.Fd())), strings.Repeat("1", 100_000), []string{"criu", "images"}, 0},
		"pid of nobody":      {me + strconv.Itoa(int(images.Fd())), "4194303", []string{"criu", "images"}, 4194303},
		"another CRIU's":     {"/proc/1/fd/3", "", nil, 0},
		"as it should be":    {me + strconv.Itoa(int(images.Fd())), "1", []string{"criu", "init", "images"}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			a := listen(t, pass(t, ""))
			code, out := hook(t, []string{"CRTOOLS_SCRIPT_ACTION=pre-dump", "CRTOOLS_IMAGE_DIR=" + c.dir, "CRTOOLS_INIT_PID=" + c.init,
				"GOGC=off", "GODEBUG=gctrace=1", "GOTRACEBACK=crash", "NSALLOC_SOCKET=/tmp/x", "LD_PRELOAD=/tmp/x.so"})
			if code != 0 || out != "" {
				t.Errorf("exit code %d, %q", code, out)
			}
			s := a.get(t)
			if !slices.Equal(s.FDs, c.fds) && len(s.FDs)+len(c.fds) > 0 || s.InitPID != c.initPID {
				t.Errorf("descriptors %v and init %d, want %v and %d", s.FDs, s.InitPID, c.fds, c.initPID)
			}
		})
	}
}

// TestLate: between CRIU and the hook stands another process, as after CRIU's death.
func TestLate(t *testing.T) {
	a := listen(t, pass(t, ""))
	code, out := start(t, exec.Command("/bin/sh", "-c", bin+"; exit $?"), env(criuhook.PostDump, imageDir(t), os.Getpid()))
	if code != 0 || out != "" {
		t.Errorf("exit code %d, %q", code, out)
	}
	if s := a.get(t); s.CRIUPID != os.Getpid() || len(s.FDs) != 0 {
		t.Errorf("request %+v: it must name CRIU and watch nobody", s.Request)
	}
}

// TestOtherPIDNamespace is as in a restore into an external PID namespace.
func TestOtherPIDNamespace(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("makes a PID namespace, for which it must be root; in CI this must work")
		}
		t.Skip("makes a PID namespace, for which it must be root")
	}
	a := listen(t, pass(t, ""))
	c := exec.Command(bin)
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	code, out := start(t, c, env(criuhook.PostRestore, imageDir(t), 1))
	if code != 0 || out != "" {
		t.Errorf("exit code %d, %q", code, out)
	}
	s := a.get(t)
	if !s.ParentUnseen || s.CRIUPID != os.Getpid() || s.InitPID != 1 || !slices.Equal(s.FDs, []string{criuhook.FDImages}) {
		t.Errorf("request %+v", s.Request)
	}
}

func TestStdio(t *testing.T) {
	images := imageDir(t)
	for _, redirect := range []string{"<&-", "<&- >&-", "<&- >&- 2>&-", "2>&-", "2>/dev/full"} {
		t.Run(redirect, func(t *testing.T) {
			a := listen(t, pass(t, "warning"))
			code, _ := start(t, exec.Command("/bin/sh", "-c", "exec "+bin+" "+redirect), env(criuhook.PostDump, images, 1))
			if s := a.get(t); code != 0 || len(s.FDs) != 3 || pidOf(t, s.file(criuhook.FDCRIU)) != os.Getpid() {
				t.Errorf("exit code %d, request %+v", code, s.Request)
			}
		})
	}
	t.Run("broken pipe", func(t *testing.T) {
		listen(t, pass(t, "warning"))
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		defer w.Close()
		c := exec.Command(bin)
		c.Env, c.Stderr = env(criuhook.PostDump, images, 1), w
		if err := c.Run(); err != nil {
			t.Error(err)
		}
	})
}

func TestSize(t *testing.T) {
	st, err := os.Stat(bin)
	if err != nil {
		t.Fatal(err)
	}
	if st.Size() > 4<<20 {
		t.Errorf("%d bytes, at most 4 MiB: look for a new import", st.Size())
	}
	t.Logf("%d bytes", st.Size())
}

// BenchmarkHook is what CRIU waits for at each action: fork, exec, a question and its answer.
func BenchmarkHook(b *testing.B) {
	listen(b, pass(b, ""))
	images := imageDir(b)
	var took []time.Duration
	for b.Loop() {
		start := time.Now()
		c := exec.Command(bin)
		c.Env = env(criuhook.PostDump, images, os.Getpid())
		if err := c.Run(); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "median-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
}

// BenchmarkNotSetUp is what an installed hook costs on a host without an agent.
func BenchmarkNotSetUp(b *testing.B) {
	hide(b)
	for b.Loop() {
		c := exec.Command(bin)
		c.Env = env(criuhook.PostDump, nil, 0)
		if err := c.Run(); err != nil {
			b.Fatal(err)
		}
	}
}
