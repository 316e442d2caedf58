package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// fakeDaemon is what stands for nsalloc-server and nsalloc-agent here: it listens where it is told and
// ends as they do. FAKE_DIES makes the named one end by itself.
func fakeDaemon(flag string) {
	name := filepath.Base(os.Args[0])
	var address string
	for i, a := range os.Args[:len(os.Args)-1] {
		if a == flag {
			address = os.Args[i+1]
			break
		}
	}
	if flag == "--config" {
		b, err := os.ReadFile(address)
		if err != nil {
			panic(err)
		}
		for line := range strings.Lines(string(b)) {
			if path, ok := strings.CutPrefix(line, "agent_socket: "); ok {
				address = strings.TrimSpace(path)
			}
		}
	}
	l, err := net.Listen("unix", strings.TrimPrefix(address, "unix://"))
	if err != nil {
		panic(err)
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	(&fake{records: recorded()}).on(l)
	fmt.Println(name, "listens")
	if os.Getenv("FAKE_DIES") == name {
		fmt.Fprint(os.Stderr, "the disk is full") // without a line end
		os.Exit(3)
	}
	<-stop
	fmt.Println(name, "stops")
}

// sharedBuffer is a terminal that two goroutines look at.
type sharedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *sharedBuffer) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *sharedBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// devCLI runs `nsalloc dev` with fakes beside it.
func devCLI(t *testing.T, out io.Writer, errs io.Writer) *cli {
	t.Helper()
	bin := t.TempDir()
	for _, name := range []string{"nsalloc-server", "nsalloc-agent"} {
		if err := os.Symlink(testBinary(t), filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	return &cli{in: strings.NewReader(""), out: out, err: errs, now: time.Now, getenv: func(string) string { return "" },
		beside: func(name string) (string, error) { return filepath.Join(bin, name), nil }}
}

func testBinary(t *testing.T) string {
	t.Helper()
	bin, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ns") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func devArgs(dir string) []string {
	args := []string{"dev", "--dir", dir, "--host", "laptop"}
	if os.Geteuid() != 0 {
		args = append(args, "--server-only")
	}
	return args
}

func TestDevRunsUntilItIsInterrupted(t *testing.T) {
	var out, errs sharedBuffer
	c := devCLI(t, &out, &errs)
	dir := shortDir(t)
	ctx, cancel := context.WithCancel(t.Context())
	code := make(chan int)
	go func() { code <- c.run(ctx, devArgs(dir)) }()
	for deadline := time.Now().Add(30 * time.Second); !strings.Contains(out.String(), "^C stops it"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not ready:\n%s%s", out.String(), errs.String())
		}
	}
	t.Run("a second one in the same directory", func(t *testing.T) {
		var out, errs sharedBuffer
		if code := devCLI(t, &out, &errs).run(t.Context(), devArgs(dir)); code != exitConflict || !strings.Contains(errs.String(), "another nsalloc dev uses "+dir+"; ") {
			t.Errorf("exit code %d: %s", code, errs.String())
		}
		if out.String() != "" {
			t.Errorf("it says %s", out.String())
		}
	})
	cancel()
	if got := <-code; got != exitOK {
		t.Errorf("exit code %d: %s", got, errs.String())
	}
	self := shellWord(testBinary(t))
	want := []string{"server | nsalloc-server listens", "  " + self + " sandbox list --server unix://" + dir + "/server.sock\n", "server | nsalloc-server stops"}
	if os.Geteuid() == 0 {
		want = []string{"server | nsalloc-server listens", "agent  | nsalloc-agent listens",
			"  " + self + " ps --agent unix://" + dir + "/agent.sock\n", " sandbox list --server unix://" + dir + "/server.sock\n",
			"agent  | nsalloc-agent stops", "server | nsalloc-server stops"}
	}
	rest := out.String()
	for _, w := range want {
		_, after, ok := strings.Cut(rest, w)
		if !ok {
			t.Fatalf("%q is missing, or comes too early:\n%s", w, out.String())
		}
		rest = after
	}
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("--dir was removed: %v", err)
	}
}

func TestDevSaysWhoDied(t *testing.T) {
	t.Setenv("FAKE_DIES", "nsalloc-server")
	var out, errs sharedBuffer
	c := devCLI(t, &out, &errs)
	code := c.run(t.Context(), devArgs(shortDir(t)))
	if code != exitError || !strings.Contains(errs.String(), "nsalloc-server ended by itself (exit status 3): the disk is full") {
		t.Errorf("exit code %d: %s", code, errs.String())
	}
	if !strings.Contains(out.String(), "server | the disk is full\n") {
		t.Errorf("the last words are missing:\n%s", out.String())
	}
}

func TestDevRefuses(t *testing.T) {
	for name, args := range map[string][]string{
		"a bad name":    {"dev", "--server-only", "--host", "No Such"},
		"a long path":   {"dev", "--server-only", "--dir", "/tmp/" + strings.Repeat("x", 120)},
		"no port":       {"dev", "--server-only", "--listen", "70700"},
		"positional":    {"dev", "now"},
		"unknown flags": {"dev", "--speed", "9"},
	} {
		var out, errs sharedBuffer
		if code := devCLI(t, &out, &errs).run(t.Context(), args); code != exitUsage || !strings.Contains(errs.String(), "; ") {
			t.Errorf("%s: exit code %d: %s", name, code, errs.String())
		}
	}
	os.RemoveAll("/tmp/" + strings.Repeat("x", 120))
}

func TestListenAddress(t *testing.T) {
	for text, want := range map[string]string{"": "", "7070": "127.0.0.1:7070", "127.0.0.1:1": "127.0.0.1:1", "unix:///s": "unix:///s"} {
		if got, err := listenAddress(text); err != nil || got != want {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
}

func TestPastedWordsStayWhole(t *testing.T) {
	for text, want := range map[string]string{"/usr/bin/nsalloc": "/usr/bin/nsalloc", "/a b/c": "'/a b/c'", "it's": `'it'\''s'`, "": "''"} {
		if got := shellWord(text); got != want {
			t.Errorf("%q: %s", text, got)
		}
	}
}

func TestASocketOfRoot(t *testing.T) {
	to := peer{"agent", "unix:///run/nsalloc/agent.sock"}
	err := to.explain(t.Context(), "", nil, nil, nil, func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
		return status.Error(codes.Unavailable, `connection error: desc = "transport: Error while dialing: dial unix /run/nsalloc/agent.sock: connect: permission denied"`)
	})
	if err == nil || err.Error() != "the agent at unix:///run/nsalloc/agent.sock answers root only; run it as root (sudo)" {
		t.Error(err)
	}
}

func TestLogLinesStayWhole(t *testing.T) {
	var out bytes.Buffer
	log := &devLog{out: &out}
	a, b := log.prefixed("a", stylePlain), log.prefixed("b", stylePlain)
	fmt.Fprint(a, "one\ntw")
	fmt.Fprint(b, "other\r\n\n")
	fmt.Fprint(a, "o\nrest")
	a.flush()
	fmt.Fprint(b, strings.Repeat("x", maxPart+1))
	got := out.String()
	if want := "a      | one\nb      | other\nb      | \na      | two\na      | rest\nb      | xxx"; !strings.HasPrefix(got, want) {
		t.Errorf("%.200q", got)
	}
	if a.lastLine() != "rest" || !strings.HasSuffix(got, "x\n") {
		t.Errorf("last line %q", a.lastLine())
	}
}
