package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestSettle: a flag or the environment wins over the agent's file, and that over what is built in.
func TestSettle(t *testing.T) {
	const file = "server: pool:7070\ninsecure: true\nagent_socket: /x/agent.sock\n"
	for name, test := range map[string]struct {
		file, env     string
		args          []string
		server, agent string
		insecure, bad bool
	}{
		"no file":             {"", "", nil, "unix:///run/nsalloc/server.sock", "unix:///run/nsalloc/agent.sock", false, false},
		"a file":              {file, "", nil, "pool:7070", "unix:///x/agent.sock", true, false},
		"a server by flag":    {file, "", []string{"--server", "other:1"}, "other:1", "unix:///x/agent.sock", false, false},
		"an agent by flag":    {file, "", []string{"--agent", "unix:///y"}, "pool:7070", "unix:///y", true, false},
		"not insecure":        {file, "", []string{"--insecure=false"}, "pool:7070", "unix:///x/agent.sock", false, false},
		"not insecure by env": {file, "NSALLOC_INSECURE=0", nil, "pool:7070", "unix:///x/agent.sock", false, false},
		"insecure by env":     {"", "NSALLOC_INSECURE=1", nil, "unix:///run/nsalloc/server.sock", "unix:///run/nsalloc/agent.sock", true, false},
		"a flag over env":     {"", "NSALLOC_INSECURE=1", []string{"--insecure=false"}, "unix:///run/nsalloc/server.sock", "unix:///run/nsalloc/agent.sock", false, false},
		"a server by env":     {file, "NSALLOC_SERVER=env:1", nil, "env:1", "unix:///x/agent.sock", false, false},
		"a broken file":       {"sever: x\n", "", nil, "unix:///run/nsalloc/server.sock", "unix:///run/nsalloc/agent.sock", false, true},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			if test.file != "" {
				if err := os.MkdirAll(filepath.Join(root, "etc/nsalloc"), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(root, "etc/nsalloc/agent.yaml"), []byte(test.file), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			var out bytes.Buffer
			c := &cli{out: &out, err: &out, getenv: func(name string) string {
				value, _ := strings.CutPrefix(test.env, name+"=")
				if value == test.env {
					return ""
				}
				return value
			}}
			if code := c.run(t.Context(), append([]string{"version"}, test.args...)); code != exitOK {
				t.Fatal(out.String())
			}
			err := c.settle(hostRoot(root))
			if (err != nil) != test.bad || c.server != test.server || c.agent != test.agent || c.insecure != test.insecure {
				t.Errorf("server %s, agent %s, insecure %t, error %v", c.server, c.agent, c.insecure, err)
			}
		})
	}
}
