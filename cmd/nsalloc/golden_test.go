package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// invoke runs the command in process at noon, against the recorded pool.
func invoke(t testing.TB, f *fake, args ...string) (code int, out, errs string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "ns") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	address := f.serve(t, dir, "s")
	var o, e bytes.Buffer
	c := &cli{in: strings.NewReader(""), out: &o, err: &e, now: func() time.Time { return noon }, getenv: func(string) string { return "" }}
	code = c.run(t.Context(), append([]string{"--server", address, "--agent", address}, args...))
	return code, o.String(), strings.ReplaceAll(e.String(), address, "unix:///S")
}

func TestGolden(t *testing.T) {
	for name, args := range map[string]string{
		"sandbox-list":        "sandbox list",
		"sandbox-list-wide":   "sandbox list -o wide",
		"sandbox-list-json":   "sandbox list --owner b -o json",
		"sandbox-list-yaml":   "sandbox list --owner b -o yaml",
		"sandbox-list-name":   "sandbox list --state running -o name",
		"sandbox-get":         "sandbox get 13",
		"sandbox-get-clone":   "sandbox get 0001000000000030",
		"sandbox-get-json":    "sandbox get 1:10 -o json",
		"history":             "serial history 10",
		"history-wide":        "serial history 10 -o wide",
		"history-namespace":   "serial history 0001000000000012",
		"history-clone":       "serial history 31",
		"history-checkpoint":  "serial history 20",
		"history-json":        "serial history 31 -o json",
		"history-at":          "serial history 10 --at 2026-07-01T10:42:00Z",
		"history-between":     "serial history 10 --at 2026-07-01T10:42:30Z",
		"checkpoint-list":     "checkpoint list",
		"checkpoint-get":      "checkpoint get " + runID,
		"checkpoint-get-json": "checkpoint get 50 -o json",
		"host-list":           "host list",
		"host-list-json":      "host list -o json",
		"host-get":            "host get a",
		"pool-status":         "pool status",
		"pool-status-json":    "pool status -o json",
		"pool-policy":         "pool policy list",
		"pool-policy-json":    "pool policy list -o json",
		"pool-policy-set":     "pool policy set live=refuse host-quota=0 -o name",
		"pool-policy-help":    "pool policy set --help",
		"server-list":         "server list",
		"server-list-json":    "server list -o json",
		"server-remove":       "server remove etcd-2-1f4c9a03",
		"ps":                  "ps",
		"ps-wide":             "ps -o wide",
		"ps-json":             "ps --sandbox 4 -o json",
		"who":                 "who 4711",
		"who-host":            "who 1",
		"who-json":            "who 1 -o json",
		"check":               "check",
		"check-json":          "check -o json",
		"mend":                "mend sandbox 70 --yes",
		"mend-json":           "mend sandbox 0001000000000070 --yes -o json",
		"mend-help":           "mend --help",
	} {
		t.Run(name, func(t *testing.T) {
			code, out, errs := invoke(t, &fake{records: recorded()}, strings.Fields(args)...)
			golden(t, name, out+errs)
			if code != 0 {
				t.Errorf("exit code %d: %s", code, errs)
			}
		})
	}
}

// TestUnsettled: who looks at a pool that waits for hosts is told which, and what to do.
func TestUnsettled(t *testing.T) {
	for name, args := range map[string]string{
		"pool-status-unsettled":      "pool status",
		"pool-status-unsettled-json": "pool status -o json",
		"host-get-unsettled":         "host get b",
		"host-waive":                 "host waive b",
		"host-waive-json":            "host waive b -o json",
		"host-waive-name":            "host waive b -o name",
	} {
		t.Run(name, func(t *testing.T) {
			f := &fake{records: recorded()}
			f.pool.Generation, f.pool.Settled = 2, 1
			f.hosts[0].Settled = 2
			code, out, errs := invoke(t, f, strings.Fields(args)...)
			golden(t, name, out+errs)
			if code != 0 {
				t.Errorf("exit code %d: %s", code, errs)
			}
		})
	}
	if code, _, errs := invoke(t, &fake{records: recorded()}, "host", "waive", "b"); code == 0 || !strings.Contains(errs, "nobody waits for it") {
		t.Errorf("of a pool that waits for nobody: exit code %d: %s", code, errs)
	}
}

// TestFewGenerations: whoever looks at a pool that has few left is told.
func TestFewGenerations(t *testing.T) {
	for n, want := range map[int]bool{alloc.FewGenerations: false, alloc.FewGenerations - 1: true, 0: true} {
		f := &fake{records: recorded()}
		f.level.Generations = uint32(n)
		_, out, _ := invoke(t, f, "pool", "status")
		if got := strings.Contains(out, "fewer than 1,024 generations are left"); got != want {
			t.Errorf("%d left:\n%s", n, out)
		}
	}
}

// TestFindings: what Check finds is its own business, how it is shown and that it fails is ours.
func TestFindings(t *testing.T) {
	code, out, _ := invoke(t, &fake{records: broken()}, "check")
	if code != exitError || !strings.Contains(out, "findings\n") || !strings.Contains(out, "P3 ") {
		t.Errorf("exit code %d:\n%s", code, out)
	}
	if n := strings.Count(out, "\n     Mend: nsalloc mend "); n == 0 || n != strings.Count(out, "Mending: ") {
		t.Errorf("%d commands in:\n%s", n, out)
	}
	for _, format := range []string{"table", "json", "name"} {
		var o bytes.Buffer
		c := &cli{out: &o, getenv: func(string) string { return "" }, output: format}
		err := c.printReport(alloc.Report{Revision: 42, Sandboxes: 1, Checkpoints: 2, Namespaces: 5, Aside: 1, Total: 1001, Findings: []alloc.Finding{
			{Promise: "P1", Subject: "serial 0001000000000031", Evidence: "it is of a and of b", Fix: "it was changed", Mend: []string{"mend", "sandbox", "0001000000000030"}},
			{Promise: "P16", Subject: "serial 0001000000000032", Evidence: "its \x1b[2Jnamespace has two", Fix: "it was changed too", Mend: []string{"mend", "sandbox", "0001000000000030"}},
			{Promise: "RECORD", Subject: "stint $(reboot)", Evidence: "it cannot be read", Fix: "its disk is bad", Mend: []string{"mend", "stint", "$(reboot)'"}},
			{Promise: "RECORD", Subject: "pool", Evidence: "it cannot be read", Fix: "restore it"},
		}})
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "check-broken-"+format, o.String())
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", "golden", name+".txt")
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(want) != got {
		t.Errorf("%s differs; go test ./cmd/nsalloc -update rewrites it\n--- want\n%s--- got\n%s", path, want, got)
	}
}

// TestYAMLIsTheSameAsJSON: a reader of either gets the same strings, numbers and order.
func TestYAMLIsTheSameAsJSON(t *testing.T) {
	f := &fake{records: recorded()}
	for _, args := range []string{"sandbox list", "checkpoint list", "host list", "ps", "check", "pool status", "serial history 31"} {
		_, j, _ := invoke(t, f, append(strings.Fields(args), "-o", "json")...)
		_, y, _ := invoke(t, f, append(strings.Fields(args), "-o", "yaml")...)
		var fromJSON, fromYAML any
		if err := json.Unmarshal([]byte(j), &fromJSON); err != nil {
			t.Fatal(err)
		}
		if err := yaml.Unmarshal([]byte(y), &fromYAML); err != nil {
			t.Fatal(err)
		}
		again, err := json.Marshal(fromYAML)
		if err != nil {
			t.Fatal(err)
		}
		var back any
		if err := json.Unmarshal(again, &back); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(fromJSON, back) {
			t.Errorf("%s: yaml reads as\n%s\nwant\n%s", args, again, j)
		}
	}
}

func TestEveryOutputIsWithoutControlCharacters(t *testing.T) {
	f := &fake{records: recorded()}
	for _, args := range []string{"sandbox list", "sandbox get 40", "serial history 40", "sandbox get 40 -o json", "sandbox list -o yaml", "host get malicious"} {
		_, out, errs := invoke(t, f, strings.Fields(args)...)
		if i := strings.IndexFunc(out+errs, func(r rune) bool { return r < ' ' && r != '\n' || r == 0x202e }); i >= 0 && !strings.Contains(args, "-o") {
			t.Errorf("%s: %q", args, (out + errs)[i:])
		}
		if strings.Contains(out+errs, "\x1b") {
			t.Errorf("%s: an escape sequence comes through", args)
		}
	}
}

// TestSentencesWrap: a sentence ends where the terminal does, and nowhere else.
func TestSentencesWrap(t *testing.T) {
	terminal, screen := openTerminal(t)
	defer terminal.Close()
	if err := unix.IoctlSetWinsize(int(screen.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 50}); err != nil {
		t.Fatal(err)
	}
	text := "0001000000000031 is the mnt namespace of sandbox 0001000000000030, which is running (x)\nTimes are of 2026-07-01."
	got := (&cli{out: terminal}).wrapped(text)
	if longest(got, palette{}) > 50 || strings.Count(got, "\n") != 2 || strings.ReplaceAll(got, "\n", " ") != strings.ReplaceAll(text, "\n", " ") {
		t.Errorf("%q", got)
	}
	if got := (&cli{out: &bytes.Buffer{}}).wrapped(text); got != text {
		t.Errorf("no terminal: %q", got)
	}
}
