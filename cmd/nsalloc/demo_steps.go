package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// screen is where the demo writes: text, tables, and one line for each step with its duration.
type screen struct {
	out   io.Writer
	paint palette
	width int // of a line, at most

	// live: out is a terminal, on which the line of a step is there while it runs and is then replaced.
	live    bool
	columns int // of the terminal

	mu    sync.Mutex
	shown string // guarded by mu: what the step that runs is doing, when live
}

// demoWidth is what fits everywhere. A wider terminal shows no wider lines: nothing would be gained.
const demoWidth = 80

func (c *cli) screen() *screen {
	s := &screen{out: c.out, paint: c.paint(c.out), width: demoWidth}
	columns, tty := terminalWidth(c.out)
	if tty {
		s.live = c.getenv("TERM") != "dumb"
		s.width, s.columns = min(s.width, columns), columns
	}
	return s
}

// simulated is the screen of a simulation: every line says so, and none is ever replaced.
func (s *screen) simulated() *screen {
	return &screen{out: &linePrefix{w: s.out, prefix: simulationMark}, paint: s.paint, width: s.width - len(simulationMark)}
}

const simulationMark = "[simulation] "

// linePrefix writes a prefix before every line.
type linePrefix struct {
	w      io.Writer
	prefix string
	within bool // the last line has not ended
}

func (l *linePrefix) Write(b []byte) (int, error) {
	var out []byte
	for line := range bytes.Lines(b) {
		if !l.within {
			out = append(out, l.prefix...)
		}
		out = append(out, line...)
		l.within = line[len(line)-1] != '\n'
	}
	if _, err := l.w.Write(out); err != nil {
		return 0, err
	}
	return len(b), nil
}

// say writes paragraphs, wrapped and without indents; an empty one is an empty line.
func (s *screen) say(look style, paragraphs ...string) {
	for _, p := range paragraphs {
		for line := range strings.SplitSeq(wrap(p, s.width, 0), "\n") {
			fmt.Fprintln(s.out, s.paint.do(look, line))
		}
	}
}

// line writes one line as it is.
func (s *screen) line(look style, text string) { fmt.Fprintln(s.out, s.paint.do(look, text)) }

// stepError is a step that failed.
type stepError struct {
	what string
	err  error
}

func (e *stepError) Error() string { return e.what + ": " + e.err.Error() }
func (e *stepError) Unwrap() error { return e.err }

// step does one thing and writes a line about it: what it was, a detail that do found out, and how long
// it took.
func (s *screen) step(ctx context.Context, what string, do func(context.Context) (detail string, err error)) error {
	began := time.Now()
	s.doing(what)
	detail, err := do(ctx)
	return s.done(what, detail, began, err)
}

// done writes the line of a step that is over.
func (s *screen) done(what, detail string, began time.Time, err error) error {
	mark, text := s.paint.do(styleGood, "✓"), what
	switch {
	case err != nil:
		mark = s.paint.do(styleBad, "✗")
	case detail != "":
		text += ": " + detail
	}
	took := fmt.Sprintf("%5.1fs", time.Since(began).Seconds())
	s.clear()
	room := s.width - columns("  ✓ ") - len(took)
	text = cut(text, room-2)
	fmt.Fprintf(s.out, "  %s %s%s%s\n", mark, text, strings.Repeat(" ", max(0, room-columns(text))), s.paint.do(styleDim, took))
	if err != nil {
		return &stepError{what, err}
	}
	return nil
}

// doing shows what a step is at, until the next call. Only a terminal has such a line.
func (s *screen) doing(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.live {
		return
	}
	s.shown = what
	fmt.Fprintf(s.out, "\r\x1b[K  %s %s", s.paint.do(styleWarn, "…"), cut(what, s.columns-5))
}

func (s *screen) clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.shown != "" {
		fmt.Fprint(s.out, "\r\x1b[K")
		s.shown = ""
	}
}

// progress shows another program's lines as they come: on a terminal the newest, elsewhere one now and
// then, so that a log does not drown in them.
type progress struct {
	s    *screen
	what string

	mu    sync.Mutex
	lines int       // guarded by mu: how many came
	part  []byte    // guarded by mu: a line that has not ended
	wrote time.Time // guarded by mu
}

const progressEvery = 5 * time.Second

func (p *progress) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.part = append(p.part, b...)
	for {
		line, rest, ended := bytes.Cut(p.part, []byte("\n"))
		if !ended && len(p.part) < maxPart {
			return len(b), nil
		}
		p.part = rest
		if text := strings.TrimSpace(printable(string(line))); text != "" {
			p.line(text)
		}
	}
}

// line needs mu.
func (p *progress) line(text string) {
	p.lines++
	switch {
	case p.s.live:
		p.s.doing(p.what + ": " + text)
	case p.lines == 1 || time.Since(p.wrote) >= progressEvery:
		p.wrote = time.Now()
		fmt.Fprintln(p.s.out, "    "+text)
	}
}

// said reports whether anything was written: whether there was anything to do.
func (p *progress) said() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lines > 0
}

// settled waits until try succeeds; hosts and pool agree within moments, or never.
func settled(ctx context.Context, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, settledWithin, errNotSettled)
	defer cancel()
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			if errors.Is(context.Cause(ctx), errNotSettled) {
				return fmt.Errorf("not within %s: %w", settledWithin, err)
			}
			return context.Cause(ctx)
		}
	}
}

const settledWithin = 15 * time.Second

var errNotSettled = errors.New("it has not settled")
