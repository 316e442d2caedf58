package hookconf

import (
	"bytes"
	"path"
	"strings"
)

// line is one line of a configuration text with what CRIU makes of it. The rules are those of
// parse_statement in CRIU's criu/config.c, which differ here and there from its manual.
type line struct {
	raw      []byte // with its line end, if it has one
	option   string // without dashes; empty for blank lines and comments
	value    string
	hasValue bool
	marker   bool
	ours     bool
	err      string // why CRIU refuses the line, and with it the whole file
}

// isScript: getopt_long takes every unambiguous beginning of a long option for the option.
// "ac" is the shortest one: "address", "all" and "auto-dedup" begin with an a, too.
func (l line) isScript() bool {
	return len(l.option) >= 2 && strings.HasPrefix(Option, l.option)
}

func parse(text []byte) []line {
	var lines []line
	for len(text) > 0 {
		end := bytes.IndexByte(text, '\n') + 1
		if end == 0 {
			end = len(text)
		}
		l := parseLine(text[:end])
		text = text[end:]
		l.marker = strings.HasPrefix(string(l.raw), marker)
		below := len(lines) > 0 && lines[len(lines)-1].marker
		l.ours = l.isScript() && (path.Base(l.value) == HookName || below)
		lines = append(lines, l)
	}
	return lines
}

func parseLine(raw []byte) line {
	l := line{raw: raw}
	s, _, _ := strings.Cut(string(raw), "\x00") // a C string
	s = strings.TrimLeft(strings.TrimSuffix(s, "\n"), " \t\v\f\r")
	if s == "" || s[0] == '#' {
		return l
	}
	// The first blank ends the option; a tab counts only when there is none in the whole line.
	option, rest, split := strings.Cut(s, " ")
	if !split {
		option, rest, split = strings.Cut(s, "\t")
	}
	// It all goes to getopt_long, which also takes option=value.
	l.option, l.value, l.hasValue = strings.Cut(option, "=")
	if !split || l.hasValue {
		return l
	}
	rest = strings.TrimLeft(rest, " \t\v\f\r")
	switch {
	case rest == "" && strings.TrimSpace(s) == option, strings.HasPrefix(rest, "#"):
		// An empty value would be one for CRIU; nobody means that.
	case strings.HasPrefix(rest, `"`):
		l.value, l.err = quoted(rest[1:])
		l.hasValue = true
	default:
		l.value, l.err = unquoted(rest)
		l.hasValue = true
	}
	return l
}

const refused = "it has more than an option and one value, or a quote that does not end"

// quoted reads a value from behind its first quote.
func quoted(s string) (value, err string) {
	for i := 0; i < len(s); i++ {
		if s[i] != '"' || i > 0 && s[i-1] == '\\' {
			continue
		}
		if i > 0 && strings.Contains(s[i+1:], " ") && crowded(s[i+1:]) {
			return "", refused
		}
		return plain(s[:i]), ""
	}
	return "", refused
}

// unquoted reads a value that ends at a blank.
func unquoted(s string) (value, err string) {
	first := strings.IndexByte(s, ' ')
	before, _, comment := strings.Cut(s, "#")
	if first >= 0 && first < len(before) && crowded(before[first:]) {
		return "", refused
	}
	value, _, _ = strings.Cut(plain(s), " ")
	if comment {
		value = strings.TrimRight(value, " ")
	}
	return value, ""
}

// crowded reports whether anything but blanks stands before a comment. CRIU does not look at the last
// character.
func crowded(s string) bool {
	for i := 0; i < len(s)-1 && s[i] != '#'; i++ {
		if !strings.ContainsRune(" \t\v\f\r\n", rune(s[i])) {
			return true
		}
	}
	return false
}

// plain unescapes quotes and cuts a comment, which CRIU does inside of quotes, too.
func plain(s string) string {
	s, _, _ = strings.Cut(strings.ReplaceAll(s, `\"`, `"`), "#")
	return s
}
