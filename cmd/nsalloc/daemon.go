package main

import (
	"bytes"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// daemon is a child process of `nsalloc dev`.
type daemon struct {
	name string
	cmd  *exec.Cmd
	done chan struct{} // closed when it is gone, and its last output written
	err  error         // valid after done
	log  *prefixed
}

// startDaemon starts a program in a process group of its own, so that ^C on the terminal reaches this
// process alone, which stops its children in their order. The kernel terminates them when the calling
// thread dies first, which covers every death of this process.
func startDaemon(log *prefixed, name, program string, args ...string) (*daemon, error) {
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	cmd.WaitDelay = time.Second // a grandchild may hold the pipe open
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &daemon{name: name, cmd: cmd, done: make(chan struct{}), log: log}
	go func() {
		p.err = cmd.Wait()
		log.flush()
		close(p.done)
	}()
	return p, nil
}

// stop asks it to end, and makes it end when it does not.
func (p *daemon) stop(within time.Duration) {
	select {
	case <-p.done:
		return
	default:
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended this moment: done says so
	limit := time.NewTimer(within)
	defer limit.Stop()
	select {
	case <-p.done:
	case <-limit.C:
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// died says how it ended without being asked to.
func (p *daemon) died() error {
	how := "exit status 0"
	if p.err != nil {
		how = p.err.Error()
	}
	if last := p.log.lastLine(); last != "" {
		return fail(exitError, "nsalloc-%s ended by itself (%s): %s; its log is above", p.name, how, last)
	}
	return fail(exitError, "nsalloc-%s ended by itself (%s) and said nothing", p.name, how)
}

// devLog is one terminal for several processes: whole lines, each with the name of who wrote it.
type devLog struct {
	mu    sync.Mutex
	out   io.Writer // guarded by mu
	paint palette
}

func (l *devLog) say(text string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	fmt.Fprint(l.out, text)
}

func (l *devLog) prefixed(name string, s style) *prefixed {
	return &prefixed{log: l, prefix: l.paint.do(s, fmt.Sprintf("%-6s", name)) + l.paint.do(styleDim, " | ")}
}

// prefixed is one process's part of it.
type prefixed struct {
	log    *devLog
	prefix string

	mu   sync.Mutex
	part []byte // guarded by mu: a line that has not ended
	last string // guarded by mu
}

// maxPart bounds a line that does not end.
const maxPart = 64 << 10

func (p *prefixed) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.part = append(p.part, b...)
	for {
		end := bytes.IndexByte(p.part, '\n')
		switch {
		case end >= 0:
			p.line(p.part[:end])
			p.part = p.part[end+1:]
		case len(p.part) > maxPart:
			p.line(p.part)
			p.part = nil
		default:
			return len(b), nil
		}
	}
}

func (p *prefixed) flush() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.part) > 0 {
		p.line(p.part)
		p.part = nil
	}
}

// line needs mu.
func (p *prefixed) line(b []byte) {
	text := printable(string(bytes.TrimRight(b, "\r")))
	if text != "" {
		p.last = text
	}
	s := stylePlain
	switch {
	case strings.Contains(text, "level=ERROR"):
		s = styleBad
	case strings.Contains(text, "level=WARN"):
		s = styleWarn
	}
	p.log.say(p.prefix + p.log.paint.do(s, text) + "\n")
}

func (p *prefixed) lastLine() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.last
}
