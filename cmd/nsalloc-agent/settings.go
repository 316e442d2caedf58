package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/pflag"

	"github.com/nsalloc/nsalloc/internal/agentconf"
)

// load reads the file. One that is missing is an error only where it was asked for.
func load(path string, asked bool) (agentconf.Settings, error) {
	s, err := agentconf.Load(path)
	if errors.Is(err, fs.ErrNotExist) && !asked {
		return s, nil
	}
	if err != nil {
		return s, usageError{err}
	}
	return s, nil
}

func registerFlags(s *agentconf.Settings, f *pflag.FlagSet) {
	d := agentconf.Defaults()
	f.StringVar(&s.Host, "host", "", "the host's name in the pool (default: the machine's host name)")
	f.StringVar(&s.Server, "server", d.Server, "the pool's server: unix:///PATH or HOST:PORT")
	f.BoolVar(&s.Insecure, "insecure", false, "allow plain text beyond loopback and unix sockets")
	f.StringVar(&s.StateDir, "state-dir", d.StateDir, "where the agent keeps its state")
	f.StringVar(&s.HookSocket, "hook-socket", d.HookSocket, "the socket that nsalloc-hook talks to")
	f.StringVar(&s.AgentSocket, "agent-socket", d.AgentSocket, "the socket of the local service")
	f.DurationVar(&s.SweepInterval, "sweep-interval", d.SweepInterval, "pause between two sweeps of /proc")
}

// override lets the flags that were given win.
func override(s *agentconf.Settings, f *pflag.FlagSet, over agentconf.Settings) error {
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
	if s.SweepInterval <= 0 {
		return usage("sweep_interval or --sweep-interval %s: it must be more than nothing, such as 1s", s.SweepInterval)
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
