package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"

	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// settings is the configuration file.
type settings struct {
	// Host is the host's name in the pool; the machine's host name where it is empty.
	Host string `yaml:"host"`
	// Server is unix:///PATH or HOST:PORT.
	Server string `yaml:"server"`
	// Insecure allows plain text to a server that is neither on loopback nor on a unix socket.
	Insecure bool `yaml:"insecure"`
	// StateDir is the agent's disk.
	StateDir string `yaml:"state_dir"`
	// HookSocket and AgentSocket are paths. The installed hook looks at its built-in path only.
	HookSocket  string `yaml:"hook_socket"`
	AgentSocket string `yaml:"agent_socket"`
	// SweepInterval is the pause between two sweeps of /proc.
	SweepInterval time.Duration `yaml:"sweep_interval"`
}

func defaults() settings {
	return settings{
		Server: "unix:///run/nsalloc/server.sock", StateDir: "/var/lib/nsalloc/agent",
		HookSocket: criuhook.SocketPath, AgentSocket: "/run/nsalloc/agent.sock", SweepInterval: time.Second,
	}
}

// load reads the file over the defaults. A key that is not known is an error; a file that is missing is
// one only where it was asked for.
func load(path string, asked bool) (settings, error) {
	s := defaults()
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !asked:
		return s, nil
	case err != nil:
		return s, fmt.Errorf("configuration: %w", err)
	}
	d := yaml.NewDecoder(bytes.NewReader(b))
	d.KnownFields(true)
	if err := d.Decode(&s); err != nil && !errors.Is(err, io.EOF) {
		return s, fmt.Errorf("configuration %s: %w", path, err)
	}
	return s, nil
}

func (s *settings) flags(f *pflag.FlagSet) {
	d := defaults()
	f.StringVar(&s.Host, "host", "", "the host's name in the pool (default: the machine's host name)")
	f.StringVar(&s.Server, "server", d.Server, "the pool's server: unix:///PATH or HOST:PORT")
	f.BoolVar(&s.Insecure, "insecure", false, "allow plain text beyond loopback and unix sockets")
	f.StringVar(&s.StateDir, "state-dir", d.StateDir, "where the agent keeps its state")
	f.StringVar(&s.HookSocket, "hook-socket", d.HookSocket, "the socket that nsalloc-hook talks to")
	f.StringVar(&s.AgentSocket, "agent-socket", d.AgentSocket, "the socket of the local service")
	f.DurationVar(&s.SweepInterval, "sweep-interval", d.SweepInterval, "pause between two sweeps of /proc")
}

// override lets the flags that were given win.
func (s *settings) override(f *pflag.FlagSet, over settings) error {
	for name, set := range map[string]func(){
		"host":           func() { s.Host = over.Host },
		"server":         func() { s.Server = over.Server },
		"insecure":       func() { s.Insecure = over.Insecure },
		"state-dir":      func() { s.StateDir = over.StateDir },
		"hook-socket":    func() { s.HookSocket = over.HookSocket },
		"agent-socket":   func() { s.AgentSocket = over.AgentSocket },
		"sweep-interval": func() { s.SweepInterval = over.SweepInterval },
	} {
		if f.Changed(name) {
			set()
		}
	}
	if s.Host == "" {
		name, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("the machine's host name: %w; set host in the configuration", err)
		}
		s.Host = name
	}
	return nil
}
