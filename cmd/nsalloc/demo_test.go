package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// sightOf is a namespace as a host would show it; parent 0 is none.
func sightOf(t alloc.NamespaceType, inode, id uint64, serial, parent alloc.Serial, ofHost bool) sight {
	return sight{t, alloc.KernelID{BootID: bootA, ID: id, Inode: inode, Weak: id == 0}, serial, parent, ofHost}
}

// demoLooks are a container before and after a move, and a clone of it. With lies some inode numbers are
// the same before and after; without kernel ids it is an older kernel.
func demoLooks(lies, ids bool) (before, after, clone look) {
	before, after, clone = look{host: "a", sandbox: 1<<48 | 10}, look{host: "b", sandbox: 1<<48 | 10}, look{host: "b", sandbox: 1<<48 | 0x100a}
	for i, t := range alloc.NamespaceTypes() {
		n, serial := uint64(i), alloc.Serial(1<<48|uint64(0x0b+i))
		ofHost := t == alloc.User || t == alloc.Time
		moved := 4026532600 + n
		if lies && (t == alloc.UTS || t == alloc.Net) {
			moved = 4026532400 + n
		}
		id := func(id uint64) uint64 {
			if !ids {
				return 0
			}
			return id
		}
		host := alloc.Serial(0)
		if ofHost {
			serial, host = alloc.Serial(1<<48|n), 0x1000
			moved = 4026532400 + n
		}
		before.seen = append(before.seen, sightOf(t, 4026532400+n, id(16100+n), serial, 0, ofHost))
		y := sightOf(t, moved, id(18400+n), serial+host, 0, ofHost)
		y.kernel.BootID = bootB
		if t == alloc.Time {
			y.ofHost = false
		}
		after.seen = append(after.seen, y)
		z := sightOf(t, 4026532700+n, id(18500+n), serial+0x2000, serial, t == alloc.User)
		if z.kernel.BootID = bootB; ofHost {
			z.parent = 0
		}
		clone.seen = append(clone.seen, z)
	}
	return before, after, clone
}

func TestDemoTables(t *testing.T) {
	for name, o := range map[string]struct {
		lies, ids, colours bool
		width              int
	}{
		"demo-tables":          {false, true, false, 80},
		"demo-tables-inodes":   {true, true, false, 80},
		"demo-tables-narrow":   {true, true, false, 67},
		"demo-tables-weak":     {true, false, false, 80},
		"demo-tables-coloured": {true, true, true, 80},
	} {
		t.Run(name, func(t *testing.T) {
			before, after, clone := demoLooks(o.lies, o.ids)
			p := palette{on: o.colours}
			text := tableText(tableOf(before), p, o.width) + "\n" + besides(before, after, p, o.width) + "\n" +
				strings.Join(hostsOwn(before, after, o.width), "\n") + "\n\n" + tableText(cloneTable(clone), p, o.width)
			golden(t, name, text)
			if most := longest(text, p); most > o.width {
				t.Errorf("a line has %d columns, %d are there", most, o.width)
			}
		})
	}
}

// TestDemoClaims: the demo finds out when what it says is not so, and shows it.
func TestDemoClaims(t *testing.T) {
	before, after, clone := demoLooks(true, true)
	if err := errors.Join(checkMoved(before, after), checkClone(before, clone)); err != nil {
		t.Fatal(err)
	}
	after.seen[0].serial++
	if err := checkMoved(before, after); err == nil || !strings.Contains(err.Error(), "must keep it") {
		t.Errorf("a lost serial: %v", err)
	}
	if text := besides(before, after, palette{}, 80); !strings.Contains(text, "000100000000000b ✗ 000100000000000c") {
		t.Errorf("a lost serial does not show:\n%s", text)
	}
	after.seen[0] = before.seen[0]
	if err := checkMoved(before, after); err == nil || !strings.Contains(err.Error(), "nothing has moved") {
		t.Errorf("the same namespace: %v", err)
	}
	clone.seen[2].serial = before.seen[2].serial
	if err := checkClone(before, clone); err == nil || !strings.Contains(err.Error(), "original's serial") {
		t.Errorf("a clone with the original's serial: %v", err)
	}
	_, _, clone = demoLooks(true, true)
	clone.seen[2].parent++
	if err := checkClone(before, clone); err == nil || !strings.Contains(err.Error(), "cloned from") {
		t.Errorf("a clone with a wrong parent: %v", err)
	}
}

// scripted is a stage on which everything has happened already, but for the step that fails.
type scripted struct {
	fails string
	hosts
}

func (st *scripted) words() wording { return st.hosts.words() }
func (st *scripted) do(step, detail string) (string, error) {
	if st.fails == step {
		return "", errors.New("host b: runc restore: exit status 1\ncriu failed: type NOTIFY\nlog file: /restore.log")
	}
	return detail, nil
}
func (st *scripted) run(context.Context) (string, error)  { return st.do("run", "") }
func (st *scripted) dump(context.Context) (string, error) { return st.do("dump", "") }
func (st *scripted) move(context.Context) (string, error) { return st.do("move", "28 files, 142 KB") }
func (st *scripted) restore(_ context.Context, id string) (string, error) {
	return st.do("restore "+id, "")
}
func (st *scripted) look(_ context.Context, host, id string) (look, error) {
	before, after, clone := demoLooks(true, true)
	return map[string]look{"a" + demoContainer: before, "b" + demoContainer: after, "b" + demoClone: clone}[host+id], nil
}
func (st *scripted) count(_ context.Context, _, _ string, least int) (int, error) {
	return least + 4, nil
}
func (st *scripted) history(_ context.Context, c *cli, serial alloc.Serial) error {
	fmt.Fprintf(c.out, "%s is the net namespace of sandbox 000100000000000a, which is running (sh)\n", serial)
	return nil
}
func (st *scripted) check(_ context.Context, c *cli) error {
	fmt.Fprintln(c.out, "4 sandboxes, 30 namespaces, 1 checkpoint: no findings")
	return nil
}

func testCLI(in io.Reader) (c *cli, out, errs *bytes.Buffer) {
	out, errs = &bytes.Buffer{}, &bytes.Buffer{}
	return &cli{in: in, out: out, err: errs, now: time.Now, getenv: func(string) string { return "" }}, out, errs
}

func TestDemoStory(t *testing.T) {
	c, out, _ := testCLI(nil)
	shown, err := c.tell(t.Context(), c.screen(), &scripted{})
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "demo-story", timeless(out.String())+shown.sum()+"\n")

	c, out, errs := testCLI(nil)
	_, err = c.tell(t.Context(), c.screen(), &scripted{fails: "restore " + demoContainer})
	if err == nil {
		t.Fatal("a failed restore went by")
	}
	logs := []demoLog{{"CRIU on host b, restore.log", "one\ntwo\nlog file: /restore.log\n"}}
	logs = append(logs, daemonLogs("--- agent-a\n--- agent-b\n1\n2\n3\n4\n5\n6\n7\n8\n9\x1b[2J\n--- server\n")...)
	err = c.demoFailed(err, logs)
	if code := explain(err).code; code != exitError {
		t.Errorf("exit code %d", code)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	golden(t, "demo-failed", timeless(lines[len(lines)-1])+"\n"+errs.String())
}

// timeless is a text without how long its steps took.
func timeless(text string) string {
	return regexp.MustCompile(`\d\.\ds`).ReplaceAllString(text, "0.0s")
}

// TestDemoSimulation: every line of a simulation says what it is, whichever kernel it stands on.
func TestDemoSimulation(t *testing.T) {
	kernels := map[string]func() (simKernel, error){
		"invented": func() (simKernel, error) { return &invented{next: inventedFirst}, nil },
		"children": func() (simKernel, error) { return newChildren() },
	}
	for name, make := range kernels {
		t.Run(name, func(t *testing.T) {
			k, err := make()
			if err != nil {
				skip(t, "no namespaces to be had: ", err)
			}
			c, out, errs := testCLI(nil)
			if err := c.simulateOn(t.Context(), c.screen(), k); err != nil {
				t.Fatalf("%v\n%s%s", err, out, errs)
			}
			allSimulated(t, out.String())
			for _, want := range []string{"no findings", "✓", "CLONED FROM", "nsalloc serial history 000100000000000f", "handed off"} {
				if !strings.Contains(out.String(), want) {
					t.Errorf("%q is missing in\n%s", want, out)
				}
			}
			if strings.Contains(out.String(), "✗") || errs.Len() > 0 {
				t.Errorf("something went wrong:\n%s%s", out, errs)
			}
			if most := longest(out.String(), palette{}); most > demoWidth {
				t.Errorf("a line has %d columns:\n%s", most, out)
			}
		})
	}
}

func allSimulated(t *testing.T, text string) {
	t.Helper()
	if strings.Count(text, "\n") < 20 {
		t.Errorf("hardly anything is said:\n%s", text)
	}
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "[simulation] ") {
			t.Errorf("a line does not say that it is of a simulation: %q", line)
		}
	}
}

// TestDemoInventedInodes: as the kernel does, freed inode numbers are given again, kernel ids are not.
func TestDemoInventedInodes(t *testing.T) {
	k := &invented{next: inventedFirst}
	first, end, _ := k.start()
	end()
	second, _, _ := k.start()
	third, _, _ := k.start()
	for typ, id := range first {
		if second[typ].Inode != id.Inode || second[typ].ID == id.ID || third[typ].Inode == id.Inode {
			t.Errorf("%s: %+v, then %+v, then %+v", typ, id, second[typ], third[typ])
		}
	}
}

func TestDemoCannot(t *testing.T) {
	cannot := func() error { return errors.New("not root: run as root\nthe kernel has no overlayfs") }
	c, out, errs := testCLI(strings.NewReader("y\n"))
	if code := explain(c.demo(t.Context(), demoFlags{}, cannot)).code; code != exitError {
		t.Errorf("exit code %d", code)
	}
	for _, want := range []string{"not root: run as root", "no overlayfs", "--simulate"} {
		if !strings.Contains(errs.String(), want) {
			t.Errorf("%q is missing in %s", want, errs)
		}
	}
	if out.Len() > 0 {
		t.Errorf("a simulation that nobody asked for:\n%s", out)
	}
}

// TestDemoAsks: somebody at a terminal is asked, and only a yes shows the simulation.
func TestDemoAsks(t *testing.T) {
	cannot := func() error { return errors.New("not root") }
	for answer, want := range map[string]bool{"y\n": true, "Yes\n": true, "\n": false, "n\n": false} {
		terminal, screen := openTerminal(t)
		c, _, errs := testCLI(terminal)
		c.out = terminal
		if _, err := io.WriteString(screen, answer); err != nil {
			t.Fatal(err)
		}
		shown := make(chan string)
		go func() {
			text, _ := io.ReadAll(screen) // ends with an error when the terminal is closed
			shown <- string(text)
		}()
		err := c.demo(t.Context(), demoFlags{}, cannot)
		if _, err := io.WriteString(terminal, "\n"); err != nil {
			t.Fatal(err)
		}
		terminal.Close()
		text := strings.ReplaceAll(<-shown, "\r", "")
		_, after, asked := strings.Cut(text, "[y/N] ")
		if !asked || !strings.Contains(errs.String(), "not root") {
			t.Fatalf("%q: nobody was asked: %s%s", answer, text, errs)
		}
		if got := err == nil; got != want {
			t.Errorf("answer %q: %v", answer, err)
		}
		if want {
			_, after, _ = strings.Cut(after, "[simulation]")
			allSimulated(t, regexp.MustCompile("\x1b\\[[0-9;]*m").ReplaceAllString("[simulation]"+strings.TrimSuffix(after, "\n"), ""))
		} else if strings.Contains(text, "[simulation]") {
			t.Errorf("answer %q shows a simulation", answer)
		}
	}
}

// skip leaves a test out, by name; in CI what is missing is a failure.
func skip(t *testing.T, why ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(append(why, "; in CI this must work")...)
	}
	t.Skip(why...)
}

// openTerminal is a terminal, and the screen and keyboard behind it.
func openTerminal(t *testing.T) (terminal, screen *os.File) {
	t.Helper()
	screen, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		skip(t, "no terminals here: ", err)
	}
	t.Cleanup(func() { screen.Close() })
	n, err := unix.IoctlGetInt(int(screen.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(screen.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		skip(t, "no terminals here: ", err)
	}
	return terminal, screen
}

func TestLinePrefix(t *testing.T) {
	var out bytes.Buffer
	l := &linePrefix{w: &out, prefix: "> "}
	for _, part := range []string{"a", "b\n\nc", "", "\n", "d\ne\n"} {
		if n, err := io.WriteString(l, part); n != len(part) || err != nil {
			t.Fatal(n, err)
		}
	}
	if want := "> ab\n> \n> c\n> d\n> e\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}

// TestProgress: a log that is piped shows its first line at once, and not each of the rest.
func TestProgress(t *testing.T) {
	c, out, _ := testCLI(nil)
	p := &progress{s: c.screen(), what: "make"}
	if p.said() {
		t.Error("it says that something was written")
	}
	for i := range 100 {
		fmt.Fprintf(p, "line %d\x1b[2J\nand ", i)
	}
	if !p.said() || out.String() != "    line 0?[2J\n" {
		t.Errorf("shown: %q", out)
	}
}

func TestDemoFlags(t *testing.T) {
	for _, args := range []string{"demo -o json", "demo --keep --simulate", "demo now"} {
		c, _, errs := testCLI(nil)
		if code := c.run(t.Context(), strings.Fields(args)); code == exitOK || errs.Len() == 0 {
			t.Errorf("%s: exit code %d, %q", args, code, errs)
		}
	}
}

// TestDemoNext: hints stand beside their commands where there is room, and below them where a path is long.
func TestDemoNext(t *testing.T) {
	for self, below := range map[string]bool{
		"nsalloc":                false,
		"/usr/local/bin/nsalloc": false,
		"/srv/builds/checkouts/nsalloc/bin/nsalloc":   true,
		"/" + strings.Repeat("deep/", 20) + "nsalloc": true,
	} {
		var out bytes.Buffer
		s := &screen{out: &out, width: demoWidth}
		s.next(self, "/var/cache/nsalloc/rootfs")
		if got := strings.Contains(out.String(), "make test\n"); got != below {
			t.Errorf("%s: below is %v:\n%s", self, got, &out)
		}
		for line := range strings.Lines(out.String()) {
			if line = strings.TrimRight(line, "\n"); columns(line) > demoWidth && !strings.Contains(line, self) {
				t.Errorf("%s: a line has %d columns: %s", self, columns(line), line)
			}
		}
	}
}
