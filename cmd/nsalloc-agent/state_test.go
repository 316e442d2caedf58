package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestMain is the agent itself where a test starts it as a process.
func TestMain(m *testing.M) {
	if os.Getenv("NSALLOC_AGENT_MAIN") == "1" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// TestDamagedState: the agent as a process on a state directory that it cannot use: exit code 1, one line
// that says why, and a command that brings it back.
func TestDamagedState(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("the agent runs as root; in CI this must work")
		}
		t.Skip("the agent runs as root")
	}
	dir := t.TempDir()
	state := filepath.Join(dir, "state")
	agent := func(host string) *exec.Cmd {
		c := exec.CommandContext(t.Context(), "/proc/self/exe", "--host", host, "--server", "unix://"+dir+"/nobody", "--state-dir", state,
			"--hook-socket", filepath.Join(dir, "hook"), "--agent-socket", filepath.Join(dir, "agent"))
		c.Env = append(os.Environ(), "NSALLOC_AGENT_MAIN=1", "NOTIFY_SOCKET=")
		return c
	}
	// starts runs an agent until it listens.
	starts := func() {
		t.Helper()
		c := agent("a")
		logs, err := c.StderrPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		var seen bytes.Buffer
		for b := make([]byte, 512); !strings.Contains(seen.String(), "agent started"); {
			n, err := logs.Read(b)
			if seen.Write(b[:n]); err != nil {
				t.Fatalf("%v: %s", err, &seen)
			}
		}
		if err := c.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		if _, err := seen.ReadFrom(logs); err != nil {
			t.Fatal(err)
		}
		if err := c.Wait(); err != nil {
			t.Errorf("it ended with %v: %s", err, &seen)
		}
	}
	refused := func(host, want string) string {
		t.Helper()
		out, err := agent(host).CombinedOutput()
		exit, ok := errors.AsType[*exec.ExitError](err)
		if !ok || exit.ExitCode() != 1 || !strings.HasPrefix(string(out), "nsalloc-agent: state ") || strings.Count(string(out), "\n") != 1 || !strings.Contains(string(out), want) {
			t.Fatalf("%v: %s, want %q", err, out, want)
		}
		return string(out)
	}
	starts()
	refused("b", `is of host "a", this agent is configured as "b"; correct `+"`host`")
	identity := filepath.Join(state, "identity")
	if err := os.Truncate(identity, 40); err != nil {
		t.Fatal(err)
	}
	message := refused("a", identity+": its first line is not ours; no crash of the agent leaves it so")
	run := regexp.MustCompile("run `(mv [^`]+)`").FindStringSubmatch(message)
	if run == nil {
		t.Fatal(message)
	}
	if out, err := exec.CommandContext(t.Context(), "sh", "-ec", run[1]).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	starts()
}
