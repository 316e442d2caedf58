package hookconf

import (
	"bytes"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

const hook = "/usr/libexec/nsalloc/nsalloc-hook"

// confText draws configuration texts: real lines, odd ones, other people's scripts, and any line end.
func confText(foreign bool) *rapid.Generator[[]byte] {
	pieces := []string{
		"tcp-established\n", "log-file /tmp/criu.log\n", "# a comment\n", "\n", "   \t\n", "verbosity 4 # loud\n",
		"action-script /opt/backup.sh\n", "action-script=/opt/other.sh\n", "lsm-profile \"selinux:a b\"\n",
		"ghost-limit 1M\r\n", "\tmanage-cgroups\n", "external mnt[/dev]:dev\n", "#action-script " + hook + "\n",
	}
	if !foreign {
		pieces = append(pieces, "action-script "+hook+"\n", "action-script /old/nsalloc-hook # by hand\n",
			marker+"\n", marker+noLineEnd+"\n", "action-script \""+hook+"\"\n", "  act  "+hook+"\n")
	}
	return rapid.Custom(func(t *rapid.T) []byte {
		text := strings.Join(rapid.SliceOf(rapid.SampledFrom(pieces)).Draw(t, "lines"), "")
		if rapid.Bool().Draw(t, "cut") {
			text = strings.TrimRight(text, "\r\n")
		}
		if rapid.Bool().Draw(t, "junk") {
			text += rapid.StringOfN(rapid.RuneFrom([]rune("x#\" \t=\\é\x00")), 0, 12, -1).Draw(t, "tail")
		}
		return []byte(text)
	})
}

func TestInstallThenUninstallGivesBackTheBytes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := confText(true).Draw(t, "text")
		with, err := Install(text, hook)
		if err != nil {
			t.Skip("CRIU refuses this text anyway")
		}
		rest, remove := Uninstall(with)
		if !bytes.Equal(rest, text) || remove {
			t.Fatalf("remove=%v\nhad  %q\nwith %q\nback %q", remove, text, with, rest)
		}
		if !bytes.HasPrefix(with, text) {
			t.Fatalf("Install changed what was there:\n%q\n%q", text, with)
		}
	})
}

func TestInstallLeavesExactlyOne(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := confText(false).Draw(t, "text")
		with, err := Install(text, hook)
		if err != nil {
			t.Skip("CRIU refuses this text anyway")
		}
		n := 0
		for _, s := range Scripts(with) {
			if s.Ours {
				n++
				if s.Path != hook {
					t.Fatalf("line %d runs %q", s.Line, s.Path)
				}
			}
		}
		if n != 1 {
			t.Fatalf("%d lines run the hook in %q", n, with)
		}
		again, err := Install(with, hook)
		if err != nil || !bytes.Equal(again, with) {
			t.Fatalf("not idempotent: %v\n%q\n%q", err, with, again)
		}
		rest, _ := Uninstall(with)
		if s := Scripts(rest); countOurs(s) != 0 {
			t.Fatalf("left after Uninstall: %+v in %q", s, rest)
		}
		if twice, _ := Uninstall(rest); !bytes.Equal(twice, rest) {
			t.Fatalf("Uninstall is not idempotent:\n%q\n%q", rest, twice)
		}
	})
}

func TestLinesAddedInBetweenStay(t *testing.T) {
	with, err := Install([]byte("tcp-established"), hook)
	if err != nil {
		t.Fatal(err)
	}
	rest, _ := Uninstall(append(with, "shell-job\n"...))
	if string(rest) != "tcp-established\nshell-job\n" {
		t.Fatalf("%q", rest)
	}
}

func TestFileThatWasNotThere(t *testing.T) {
	with, err := Install(nil, hook)
	if err != nil {
		t.Fatal(err)
	}
	if rest, remove := Uninstall(with); len(rest) != 0 || !remove {
		t.Fatalf("remove=%v %q", remove, rest)
	}
	moved, err := Install(with, "/opt/nsalloc-hook") // an upgrade in between must not forget it
	if err != nil {
		t.Fatal(err)
	}
	if rest, remove := Uninstall(moved); len(rest) != 0 || !remove {
		t.Fatalf("after a move: remove=%v %q", remove, rest)
	}
	with, err = Install([]byte{}, hook)
	if err != nil {
		t.Fatal(err)
	}
	if rest, remove := Uninstall(with); len(rest) != 0 || remove {
		t.Fatalf("an empty file is a file: remove=%v %q", remove, rest)
	}
}

// TestParse has CRIU's rules by example, as read from criu/config.c.
func TestParse(t *testing.T) {
	for _, c := range []struct {
		in       string
		option   string
		value    string
		hasValue bool
		fails    bool
	}{
		{in: "\n"},
		{in: "  # action-script /a\n"},
		{in: "tcp-close\n", option: "tcp-close"},
		{in: "action-script /a\n", option: "action-script", value: "/a", hasValue: true},
		{in: "  action-script\t/a", option: "action-script", value: "/a", hasValue: true},
		{in: "action-script=/a\n", option: "action-script", value: "/a", hasValue: true},
		{in: "action-script /a # why\n", option: "action-script", value: "/a", hasValue: true},
		{in: "action-script /a#b\n", option: "action-script", value: "/a", hasValue: true},
		{in: "action-script # nothing\n", option: "action-script"},
		{in: "action-script\n", option: "action-script"},
		{in: "action-script /a /b\n", option: "action-script", hasValue: true, fails: true},
		{in: `action-script "/a b"`, option: "action-script", value: "/a b", hasValue: true},
		{in: `action-script "/a" # why`, option: "action-script", value: "/a", hasValue: true},
		{in: `action-script "/a`, option: "action-script", hasValue: true, fails: true},
		{in: `action-script "/a" "/b"`, option: "action-script", hasValue: true, fails: true},
		{in: `x "a\"b"`, option: "x", value: `a"b`, hasValue: true},
		{in: `x ""`, option: "x", hasValue: true},
		{in: "x \"\n", option: "x", hasValue: true, fails: true},
		{in: "action-script /a\r\n", option: "action-script", value: "/a\r", hasValue: true},
		{in: "x y\x00z\n", option: "x", value: "y", hasValue: true},
	} {
		l := parseLine([]byte(c.in))
		if l.option != c.option || l.value != c.value || l.hasValue != c.hasValue || (l.err != "") != c.fails {
			t.Errorf("%q: %q %q %v %q", c.in, l.option, l.value, l.hasValue, l.err)
		}
	}
}

func TestRefusals(t *testing.T) {
	for _, c := range []struct{ text, hook, want string }{
		{"action-script\ntcp-close\n", hook, "line 1: action-script names no script"},
		{"# x\naction-script \"/a\n", hook, "line 2: it has more"},
		{"", "nsalloc-hook", "absolute"},
		{"", "/opt/my hooks/nsalloc-hook", "plainer name"},
		{"", "/opt/a#b/nsalloc-hook", "plainer name"},
		{"", "/opt/a\nb", "plainer name"},
	} {
		if _, err := Install([]byte(c.text), c.hook); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q %q: %v, want %q", c.text, c.hook, err, c.want)
		}
	}
}

// FuzzRoundTrip: whatever the file holds, what Install adds Uninstall takes away, nothing else changes, and
// CRIU runs the hook once.
func FuzzRoundTrip(f *testing.F) {
	f.Add([]byte("tcp-close\naction-script /x"))
	f.Add([]byte(marker + noFile + "\naction-script " + hook))
	f.Add([]byte("act \"/a b\" # why\r\n" + marker + noLineEnd + "\nverbosity 4"))
	f.Fuzz(func(t *testing.T, text []byte) {
		given := bytes.Clone(text)
		rest, _ := Uninstall(text)
		if n := countOurs(Scripts(rest)); n != 0 || len(rest) > len(text) {
			t.Fatalf("%d of our lines are left of %q: %q", n, text, rest)
		}
		with, err := Install(text, hook)
		if !bytes.Equal(text, given) {
			t.Fatal("Install or Uninstall changed its input")
		}
		if err != nil {
			return
		}
		ours := 0
		for _, s := range Scripts(with) {
			if s.Ours {
				ours++
				if s.Path != hook {
					t.Errorf("line %d of %q runs %q", s.Line, with, s.Path)
				}
			}
		}
		if again, err := Install(with, hook); ours != 1 || err != nil || !bytes.Equal(again, with) {
			t.Errorf("%d lines of %q run the hook; installed again %q, %v", ours, with, again, err)
		}
		if back, _ := Uninstall(with); !bytes.Equal(back, rest) {
			t.Errorf("%q became %q", rest, back)
		}
		if clean, err := Install(rest, hook); err == nil && !bytes.HasPrefix(clean, rest) {
			t.Errorf("Install changed what was there:\n%q\n%q", rest, clean)
		}
	})
}
