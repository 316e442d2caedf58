// Command nsalloc-agent is the daemon of a host: it numbers the host's kernel namespaces, answers
// CRIU's hook, and tells the pool what becomes of containers that move.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/nsalloc/nsalloc/internal/agent"
	"github.com/nsalloc/nsalloc/internal/agentconf"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// version is set by the linker.
var version = "dev"

// The first thread's namespaces are what /proc shows of the whole process. What tries the kernel out
// gives namespaces of its own to a thread that ends with it; it must not be this one.
func init() { runtime.LockOSThread() }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := command(os.Stderr).ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "nsalloc-agent:", err)
		stop()
		os.Exit(exitCode(err))
	}
}

// usageError is a command line, or a configuration, that cannot be meant.
type usageError struct{ error }

func (u usageError) Unwrap() error { return u.error }

func usage(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// exitCode is 2 for wrong usage, 1 for everything else: a service manager need not try the former again.
func exitCode(err error) int {
	if _, ok := errors.AsType[usageError](err); ok || alloc.ReasonOf(err) == alloc.ReasonInvalid {
		return 2
	}
	return 1
}

func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage("%q is not understood; `%s --help` shows what is", args[0], cmd.CommandPath())
	}
	return nil
}

func command(logs io.Writer) *cobra.Command {
	var path, level, format string
	var over agentconf.Settings
	cmd := &cobra.Command{
		Use:   "nsalloc-agent",
		Short: "The daemon of a host: numbers namespaces and answers CRIU's hook",
		Long: "nsalloc-agent numbers the kernel namespaces of this host, answers CRIU's hook, and tells the pool what\n" +
			"becomes of containers that move. It runs as root in the host's PID and mount namespaces.\n\n" +
			"Settings come from " + criuhook.ConfigPath + ", and from the flags, which win.",
		Example:       "  nsalloc-agent --host a --server unix:///run/nsalloc/server.sock",
		Version:       version,
		Args:          noArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logger(logs, level, format)
			if err != nil {
				return err
			}
			s, err := load(path, cmd.Flags().Changed("config"))
			if err != nil {
				return err
			}
			if err := override(&s, cmd.Flags(), over); err != nil {
				return err
			}
			return run(cmd.Context(), s, log)
		},
	}
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage("%w; `%s --help` lists the flags", err, cmd.CommandPath())
	})
	f := cmd.Flags()
	f.StringVar(&path, "config", criuhook.ConfigPath, "configuration file")
	f.StringVar(&level, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&format, "log-format", "text", "text or json")
	registerFlags(&over, f)
	return cmd
}

func logger(w io.Writer, level, format string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, usage("--log-level %q: write debug, info, warn or error", level)
	}
	o := &slog.HandlerOptions{Level: l}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(w, o)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, o)), nil
	}
	return nil, usage("--log-format %q: write text or json", format)
}

func run(ctx context.Context, s agentconf.Settings, log *slog.Logger) error {
	if os.Geteuid() != 0 {
		return errors.New("the agent reads other users' namespaces and must run as root")
	}
	opts := []client.Option{client.WithHost(s.Host)}
	if s.Insecure {
		opts = append(opts, client.WithInsecure())
	}
	c, err := client.Dial(s.Server, opts...)
	if err != nil {
		return err
	}
	defer c.Close()
	a, err := agent.New(agent.Config{
		Host: s.Host, StateDir: s.StateDir, HookSocket: s.HookSocket, AgentSocket: s.AgentSocket, SweepInterval: s.SweepInterval,
		Labels: agent.DefaultLabels(), Version: version, Log: log, Ready: ready,
	}, agent.NewRemote(c))
	if err != nil {
		return err
	}
	return a.Run(ctx)
}

// ready tells systemd, where it started us, that both sockets listen (sd_notify(3)).
func ready() {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	if strings.HasPrefix(path, "@") {
		path = "\x00" + path[1:]
	}
	c, err := net.Dial("unixgram", path)
	if err != nil {
		return // whoever set it does not listen: nobody waits
	}
	defer c.Close()
	_, _ = c.Write([]byte("READY=1"))
}
