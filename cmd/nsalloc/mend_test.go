package main

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/internal/etcdembed"
	"github.com/nsalloc/nsalloc/internal/etcdstore"
	"github.com/nsalloc/nsalloc/internal/server"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// realServer is a server over an etcd of its own, the pool in it, and that etcd behind the server's back.
func realServer(t *testing.T) (address string, pool *alloctest.Lively) {
	t.Helper()
	etcd, err := etcdembed.Start(t.Context(), etcdembed.Config{Dir: shortDir(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = etcd.Close() })
	c, err := etcdstore.Dial(etcdstore.Config{Endpoints: []string{etcd.Endpoint()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	store, err := etcdstore.New(c, "default")
	if err != nil {
		t.Fatal(err)
	}
	pool = alloctest.NewLively(t, store)
	path := filepath.Join(shortDir(t), "s.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.New(server.Config{Store: store}).Run(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "unix://" + path, pool
}

// shell runs a line as somebody types it.
func shell(t *testing.T, address, line string) (code int, out string) {
	t.Helper()
	c := exec.CommandContext(t.Context(), "sh", "-c", line)
	c.Env = append(os.Environ(), "NSALLOC_SERVER="+address)
	var b bytes.Buffer
	c.Stdout, c.Stderr = &b, &b
	if err := c.Run(); err != nil && c.ProcessState == nil {
		t.Fatal(err)
	}
	return c.ProcessState.ExitCode(), b.String()
}

// TestMendAsPrinted: records in etcd are changed behind the server's back. The command finds it, and the
// commands that it prints mend it.
func TestMendAsPrinted(t *testing.T) {
	address, pool := realServer(t)
	if code, out := shell(t, address, "nsalloc check"); code != exitOK || !strings.Contains(out, "no findings") {
		t.Fatalf("before: exit code %d: %s", code, out)
	}
	r, err := alloctest.Everything(t.Context(), pool.Store)
	if err != nil {
		t.Fatal(err)
	}
	r.Counter.Next = 20
	r.Sandboxes[0].Bindings[0].Serial = r.Sandboxes[1].Bindings[0].Serial
	r.OldStints[0].Stint.Over = ""
	if _, err := pool.Store.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{r.Counter, r.Sandboxes[0], r.OldStints[0]}}); err != nil {
		t.Fatal(err)
	}
	printed := regexp.MustCompile(`(?m)^     Mend: (nsalloc mend .*)$`)
	for step := range 5 {
		code, out := shell(t, address, "nsalloc check")
		t.Log(out)
		if code == exitOK && strings.Contains(out, "put aside): no findings\n") {
			if step != 3 {
				t.Errorf("it took %d commands for three mistakes", step)
			}
			break
		}
		line := printed.FindStringSubmatch(out)
		if code != exitError || line == nil || step == 4 {
			t.Fatalf("exit code %d: %s", code, out)
		}
		if code, out := shell(t, address, line[1]+" </dev/null"); code != exitUsage || !strings.Contains(out, "say --yes") {
			t.Errorf("with nobody to ask: exit code %d: %s", code, out)
		}
		if code, out := shell(t, address, line[1]+" --yes"); code != exitOK || !strings.Contains("\n"+out, "\nMended.") {
			t.Fatalf("%s: exit code %d: %s", line[1], code, out)
		}
		if code, out := shell(t, address, line[1]+" --yes"); code != exitConflict && code != exitNotFound {
			t.Errorf("%s again: exit code %d: %s", line[1], code, out)
		}
	}
	for line, want := range map[string]int{
		"nsalloc mend":                          exitUsage,
		"nsalloc mend sandbox":                  exitUsage,
		"nsalloc mend nothing x --yes":          exitUsage,
		"nsalloc mend counter 1 --yes":          exitUsage,
		"nsalloc mend sandbox xyz --yes":        exitUsage,
		"nsalloc mend host nobody --yes":        exitNotFound,
		"nsalloc mend sandbox 9999 --yes":       exitNotFound,
		"nsalloc mend host a --yes":             exitConflict,
		"nsalloc mend host a --yes --force":     exitOK,
		"nsalloc mend counter --yes -o json":    exitConflict,
		"nsalloc mend counter --yes --force":    exitOK,
		"nsalloc check -o name | grep -c .":     1,
		"nsalloc check -o yaml | grep total":    exitOK,
		"nsalloc mend sandbox '$(false)' --yes": exitUsage,
	} {
		if code, out := shell(t, address, line); code != want {
			t.Errorf("%s: exit code %d, want %d: %s", line, code, want, out)
		}
	}
	// Of what is handed off nothing is left but images: that is said also to who does not want to be asked.
	if r, err = alloctest.Everything(t.Context(), pool.Store); err != nil {
		t.Fatal(err)
	}
	tried := map[alloc.SandboxState]bool{}
	for _, s := range r.Sandboxes {
		if tried[s.State] {
			continue
		}
		tried[s.State] = true
		handedOff := s.State == alloc.StateDumped || s.State == alloc.StateInTransit || s.State == alloc.StateClaimed
		code, out := shell(t, address, "nsalloc mend sandbox --yes --force "+s.Serial.String()+" 2>&1 >/dev/null")
		if want := alloc.MendCostOf(s.State); code != exitOK || handedOff != strings.Contains(out, want) || handedOff == (out == "") {
			t.Errorf("of one that is %s: exit code %d: %s", s.State, code, out)
		}
	}
	if len(tried) < 4 {
		t.Errorf("tried %v", tried)
	}
}

// TestPatience: what reads all records of a pool is waited for longer than an answer, unless somebody says
// how long.
func TestPatience(t *testing.T) {
	for line, want := range map[string][2]time.Duration{
		"check":                               {5 * time.Minute, patient},
		"check --timeout 9s":                  {time.Second, 9 * time.Second},
		"mend sandbox 0001000000000070 --yes": {5 * time.Minute, patient},
		"mend sandbox 0001000000000070 --yes --timeout 9s": {time.Second, 9 * time.Second},
	} {
		var got time.Duration
		f := &fake{patience: func(d time.Duration) { got = d }}
		if code, _, errs := invoke(t, f, strings.Fields(line)...); code != exitOK || got < want[0] || got > want[1] {
			t.Errorf("%s: it waits %s, want %s to %s; exit code %d: %s", line, got, want[0], want[1], code, errs)
		}
	}
}
