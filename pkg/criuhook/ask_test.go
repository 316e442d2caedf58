//go:build linux

package criuhook

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// agent listens and has each connection served by serve.
func agent(t *testing.T, serve func(c *net.UnixConn)) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			serve(c)
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return path
}

// reply sends whatever b is; the client may be gone.
func reply(c *net.UnixConn, b []byte, fds ...int) {
	_, _, _ = c.WriteMsgUnix(b, syscall.UnixRights(fds...), nil)
}

// linger waits until the client hangs up.
func linger(c *net.UnixConn) { _, _ = c.Read(make([]byte, 1)) }

// receive reads a request and closes its descriptors.
func receive(t *testing.T, c *net.UnixConn) Request {
	b, oob := make([]byte, MaxMessage), make([]byte, 1024)
	n, oobn, _, _, err := c.ReadMsgUnix(b, oob)
	if err != nil {
		t.Error(err)
		return Request{}
	}
	r, err := DecodeRequest(b[:n])
	if err != nil {
		t.Error(err)
	}
	if oobn > 0 {
		m, err := syscall.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			t.Error(err)
			return r
		}
		fds, err := syscall.ParseUnixRights(&m[0])
		if err != nil || len(fds) != len(r.FDs) {
			t.Errorf("%d descriptors for %v, %v", len(fds), r.FDs, err)
		}
		for _, fd := range fds {
			syscall.Close(fd)
		}
	}
	return r
}

func TestAsk(t *testing.T) {
	got := make(chan Request, 2)
	path := agent(t, func(c *net.UnixConn) {
		got <- receive(t, c)
		b, err := EncodeResponse(Response{Verdict: Veto, Message: "no"})
		if err != nil {
			t.Error(err)
		}
		reply(c, b)
	})
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	r := request()
	answer, err := Ask(t.Context(), path, r, Descriptor{FDImages, int(dir.Fd())}, Descriptor{FDCRIU, 0})
	if err != nil || answer.Verdict != Veto || answer.Message != "no" {
		t.Errorf("%+v, %v", answer, err)
	}
	if r := <-got; strings.Join(r.FDs, " ") != "images criu" {
		t.Errorf("descriptors %v", r.FDs)
	}
	if _, err := dir.Stat(); err != nil {
		t.Errorf("the caller's descriptor was taken: %v", err)
	}
	if answer, err := Ask(t.Context(), path, r); err != nil || answer.Verdict != Veto {
		t.Errorf("without descriptors: %+v, %v", answer, err)
	}
}

func TestAskFails(t *testing.T) {
	answer := func(b []byte) string {
		return agent(t, func(c *net.UnixConn) { receive(t, c); reply(c, b) })
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	left := filepath.Join(t.TempDir(), "left") // by an agent that was killed
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: left, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	for name, c := range map[string]struct {
		path string
		want error
	}{
		"no socket":          {file + "~", ErrNoAgent},
		"no directory":       {file + "/s", ErrNoAgent},
		"nobody listens":     {left, ErrNoAgent},
		"a file":             {file, ErrNoAgent},
		"path too long":      {"/" + strings.Repeat("x", 200), ErrNoAnswer},
		"hangs up":           {agent(t, func(c *net.UnixConn) {}), ErrNoAnswer},
		"reads, hangs up":    {agent(t, func(c *net.UnixConn) { receive(t, c) }), ErrNoAnswer},
		"garbage":            {answer([]byte("garbage")), ErrNoAnswer},
		"unknown verdict":    {answer([]byte(`{"version":1,"verdict":"maybe"}`)), ErrNoAnswer},
		"another version":    {answer([]byte(`{"version":2,"verdict":"pass"}`)), ErrNoAnswer},
		"too long":           {answer(append([]byte(`{"version":1,"verdict":"pass"}`), bytes.Repeat([]byte(" "), MaxMessage)...)), ErrNoAnswer},
		"silent":             {agent(t, func(c *net.UnixConn) { receive(t, c); linger(c) }), context.DeadlineExceeded},
		"never accepts":      {backlogFull(t), context.DeadlineExceeded},
		"stream, no packets": {streamSocket(t), ErrNoAnswer},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			start := time.Now()
			r, err := Ask(ctx, c.path, request())
			if !errors.Is(err, c.want) || !errors.Is(err, ErrNoAgent) && !errors.Is(err, ErrNoAnswer) {
				t.Errorf("%+v, %v; want %v", r, err, c.want)
			}
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("took %v", took)
			}
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		path := agent(t, func(c *net.UnixConn) { receive(t, c); cancel(); <-ctx.Done(); linger(c) })
		if r, err := Ask(ctx, path, request()); !errors.Is(err, context.Canceled) || !errors.Is(err, ErrNoAnswer) {
			t.Errorf("%+v, %v", r, err)
		}
	})
	t.Run("bad request", func(t *testing.T) {
		if r, err := Ask(t.Context(), file, Request{}); err == nil {
			t.Errorf("%+v", r)
		}
	})
}

func backlogFull(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	open := func() int {
		fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { syscall.Close(fd) })
		return fd
	}
	server, addr := open(), &syscall.SockaddrUnix{Name: path}
	if err := errors.Join(syscall.Bind(server, addr), syscall.Listen(server, 0)); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Connect(open(), addr); err != nil {
		t.Fatal(err)
	}
	return path
}

func streamSocket(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return path
}

// TestNoLeak: what comes along with an answer, and what a failed call opened, is closed.
func TestNoLeak(t *testing.T) {
	path := agent(t, func(c *net.UnixConn) {
		receive(t, c)
		b, err := EncodeResponse(Response{Verdict: Pass})
		if err != nil {
			t.Error(err)
		}
		reply(c, b, 0, 1, 2)
	})
	count := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	var before int
	for i := range 50 {
		if r, err := Ask(t.Context(), path, request(), Descriptor{FDCRIU, 0}); err != nil || r.Verdict != Pass {
			t.Fatal(r, err)
		}
		if _, err := Ask(t.Context(), path+"~", request()); err == nil {
			t.Fatal("an answer from nowhere")
		}
		if i == 0 {
			before = count()
		}
	}
	if after := count(); after > before+2 {
		t.Errorf("%d descriptors, then %d", before, after)
	}
}

func TestDecide(t *testing.T) {
	down := errors.Join(ErrNoAgent)
	for _, s := range append(Stages(), Stage{Action: "later"}) {
		for _, c := range []struct {
			answer   Response
			err      error
			bypassed bool
			veto     bool
			silent   bool
		}{
			{answer: Response{Verdict: Pass}, silent: true},
			{answer: Response{Verdict: Pass, Message: "m"}},
			{answer: Response{Verdict: Veto, Message: "m"}, veto: s.CanVeto},
			{answer: Response{Verdict: Veto, Message: "m"}, bypassed: true, veto: s.CanVeto},
			{err: down, veto: s.CanVeto},
			{err: ErrNoAnswer, veto: s.CanVeto},
			{err: down, bypassed: true},
			{err: errors.New("two\nlines"), veto: s.CanVeto},
		} {
			d := Decide(s.Action, c.answer, c.err, c.bypassed)
			if d.Veto != c.veto || (d.Message == "") != c.silent || strings.Contains(d.Message, "\n") {
				t.Errorf("%s, %+v: %+v", s.Action, c, d)
			}
		}
	}
}
