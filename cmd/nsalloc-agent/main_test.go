package main

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestUsage: what cannot be meant exits with 2 and names what is wrong, before anything is done.
func TestUsage(t *testing.T) {
	file := filepath.Join(t.TempDir(), "agent.yaml")
	for _, c := range []struct {
		conf string
		args []string
		want string
	}{
		{"", []string{"--nonsense"}, "--help"},
		{"", []string{"nonsense"}, "not understood"},
		{"", []string{"--sweep-interval", "soon"}, "invalid duration"},
		{"", []string{"--sweep-interval", "0s"}, "such as 1s"},
		{"", []string{"--log-level", "loud"}, "--log-level"},
		{"", []string{"--log-format", "xml"}, "--log-format"},
		{"", []string{"--config", "/nowhere/agent.yaml"}, "/nowhere/agent.yaml"},
		{"host: a\nsever: x\n", nil, file + ": line 2: there is no key sever; the keys are host, server,"},
		{"sweep_interval: 5\n", nil, "such as 1s"},
		{"host: a\n---\nhost: b\n", nil, "a second document"},
	} {
		if err := os.WriteFile(file, []byte(c.conf), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := command(io.Discard)
		cmd.SetArgs(append([]string{"--config", file}, c.args...))
		err := cmd.ExecuteContext(t.Context())
		if err == nil || exitCode(err) != 2 || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q with %q: exit code %d, %v; want %q", c.args, c.conf, exitCode(err), err, c.want)
		}
	}
}
