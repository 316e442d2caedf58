// Package hookconf edits the text of CRIU's configuration file so that CRIU runs nsalloc-hook: once,
// and nothing else in the file changes.
//
// It is pure: text in, text out. Reading, showing and writing the file is the caller's, who can so show
// a diff of exactly what would be written.
//
// # Where our line stands
//
// Install appends two lines, a comment and the option:
//
//	# Added by nsalloc hook install, with the next line
//	action-script /usr/libexec/nsalloc-hook
//
// At the end, because CRIU runs scripts last-added first: the manifest has to be in the image directory
// before another script of this file copies that directory away. The comment also remembers what was
// there before (a last line without its line end, no file at all), so that Uninstall gives back the
// bytes that Install found, also when other lines were changed in between.
//
// A line is ours when its script's file is called nsalloc-hook, or when our comment stands above it. So
// a line that a person wrote by hand, or one that names an older place, is replaced and not doubled:
// CRIU runs a script as often as it is named, and the second answer of a pair would be a guess.
package hookconf

import (
	"bytes"
	"fmt"
	"path"
	"strings"
)

const (
	// ConfPath is the file that CRIU reads on every path, RPC included. runc.conf and crun.conf are
	// not: containers can turn them off by an annotation, and old runc reads its own twice.
	ConfPath = "/etc/criu/default.conf"
	// HookName is the file name of our hook.
	HookName = "nsalloc-hook"
	// Option is CRIU's option that adds a script.
	Option = "action-script"

	marker = "# Added by nsalloc hook install, with the next line"
	// What Install found, remembered at the marker's end.
	noLineEnd = " (no line end above)"
	noFile    = " (new file)"
)

// Script is one action-script option of a configuration text.
type Script struct {
	// Line counts from 1.
	Line int
	// Path is the script as CRIU would run it.
	Path string
	// Ours: Install and Uninstall treat the line as theirs.
	Ours bool
}

// Scripts lists the action-script options of a text in their order. CRIU runs them in the reverse order.
func Scripts(text []byte) []Script {
	var found []Script
	for i, l := range parse(text) {
		if l.isScript() {
			found = append(found, Script{Line: i + 1, Path: l.value, Ours: l.ours})
		}
	}
	return found
}

// Install returns text with exactly one line that makes CRIU run hook. Nil stands for a file that does
// not exist; an empty file is not nil. Installing what is installed returns the text as it is.
//
// The error says why CRIU could not understand the result: a path that its format cannot carry, or a line
// of the text that it refuses already.
func Install(text []byte, hook string) ([]byte, error) {
	if err := CheckPath(hook); err != nil {
		return nil, err
	}
	lines := parse(text)
	for i, l := range lines {
		switch {
		case l.err != "":
			return nil, fmt.Errorf("line %d: %s, so that CRIU does not start at all; mend that line first", i+1, l.err)
		case l.isScript() && !l.hasValue:
			return nil, fmt.Errorf("line %d: %s names no script, so that CRIU takes the next line for its name; mend that line first", i+1, Option)
		}
	}
	if s := Scripts(text); countOurs(s) == 1 {
		for _, s := range s {
			if s.Ours && s.Path == hook {
				return text, nil
			}
		}
	}
	rest, wasMade := Uninstall(text)
	mark := marker
	var out bytes.Buffer
	out.Write(rest)
	switch {
	case text == nil || wasMade:
		mark += noFile
	case len(rest) > 0 && rest[len(rest)-1] != '\n':
		mark += noLineEnd
		out.WriteByte('\n')
	}
	fmt.Fprintf(&out, "%s\n%s %s\n", mark, Option, hook)
	return out.Bytes(), nil
}

// Uninstall returns text without our lines. remove says that nothing is left of a file that was not
// there before Install, so that the file can go as well.
func Uninstall(text []byte) (rest []byte, remove bool) {
	rest = []byte{}
	var note string
	last := false // our lines are the last ones so far
	for _, l := range parse(text) {
		switch {
		case l.marker:
			note, last = strings.TrimPrefix(strings.TrimRight(string(l.raw), "\r\n"), marker), true
		case l.ours:
			last = true
		default:
			rest, last = append(rest, l.raw...), false
		}
	}
	if last && note == noLineEnd {
		rest = bytes.TrimSuffix(rest, []byte("\n"))
	}
	return rest, note == noFile && len(rest) == 0
}

// CheckPath refuses a hook that CRIU's configuration cannot carry: it is not absolute, or it contains
// what the format takes for a comment, a quote or the end of the value.
func CheckPath(hook string) error {
	if !path.IsAbs(hook) {
		return fmt.Errorf("hook %q: CRIU runs scripts in its own working directory; give an absolute path", hook)
	}
	bad := strings.IndexFunc(hook, func(r rune) bool {
		return r <= ' ' || r == 0x7f || strings.ContainsRune("#\"\\'\u0085\u00a0", r)
	})
	if bad >= 0 {
		return fmt.Errorf("hook %q: CRIU's configuration cannot carry %q in a path; install the hook in a directory with a plainer name", hook, []rune(hook[bad:])[0])
	}
	return nil
}

func countOurs(scripts []Script) int {
	n := 0
	for _, s := range scripts {
		if s.Ours {
			n++
		}
	}
	return n
}
