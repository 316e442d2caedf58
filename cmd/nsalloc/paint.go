package main

import (
	"io"
	"os"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"
	"golang.org/x/text/width"
)

// style is what a text means; the palette decides how that looks.
type style int

const (
	stylePlain style = iota
	styleHead        // column titles, headlines
	styleGood
	styleWarn
	styleBad
	styleDim // what one may skip
	styleKey // the serial that it is about
)

var sgr = map[style]string{
	styleHead: "1",
	styleGood: "32",
	styleWarn: "33",
	styleBad:  "31",
	styleDim:  "2",
	styleKey:  "36",
}

// palette colours text for one writer; the zero palette leaves it as it is.
type palette struct{ on bool }

func (p palette) do(s style, text string) string {
	code := sgr[s]
	if !p.on || code == "" || text == "" {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// paint is the palette for w: colours on a terminal only, and only for those who want them.
func (c *cli) paint(w io.Writer) palette {
	if c.noColor || c.getenv("NO_COLOR") != "" || c.getenv("TERM") == "dumb" {
		return palette{}
	}
	_, tty := terminalWidth(w)
	return palette{on: tty}
}

// terminalWidth is the number of columns of the terminal behind w; false when w is none.
func terminalWidth(w io.Writer) (int, bool) {
	f, ok := w.(*os.File)
	if !ok {
		return 0, false
	}
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0, false
	}
	if size.Col == 0 { // a terminal that does not know
		return 80, true
	}
	return int(size.Col), true
}

// isTerminal reports whether a person may type into r.
func isTerminal(r io.Reader) bool {
	f, ok := r.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// printable replaces what would steer a terminal: commands and labels are whatever a process on some host
// calls itself.
func printable(s string) string {
	bad := func(r rune) bool { return unicode.IsControl(r) || r == unicode.ReplacementChar || isFormat(r) }
	if strings.IndexFunc(s, bad) < 0 {
		return s
	}
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t' || r == '\r':
			return ' '
		case bad(r):
			return '?'
		}
		return r
	}, s)
}

// isFormat: characters that turn the direction of text around them, and so what a line seems to say.
func isFormat(r rune) bool {
	return r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069
}

// columns is how many columns of a terminal a text takes.
func columns(s string) int {
	n := 0
	for _, r := range s {
		n += runeColumns(r)
	}
	return n
}

func runeColumns(r rune) int {
	switch {
	case r < 0x7f:
		return 1
	case unicode.In(r, unicode.Mn, unicode.Me, unicode.Cf):
		return 0
	}
	switch width.LookupRune(r).Kind() {
	case width.EastAsianWide, width.EastAsianFullwidth:
		return 2
	}
	return 1
}

// cut shortens a text to n columns, with an ellipsis where something is missing.
func cut(s string, n int) string {
	if columns(s) <= n {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if n -= runeColumns(r); n < 1 {
			break
		}
		b.WriteRune(r)
	}
	return b.String() + "…"
}
