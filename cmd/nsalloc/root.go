package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nsalloc/nsalloc/internal/agentconf"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// cli is one run of the command: its global flags and what it touches outside.
type cli struct {
	in       io.Reader
	out, err io.Writer
	now      func() time.Time
	getenv   func(string) string
	beside   func(program string) (path string, err error) // the other programs of this release

	server, agent string // empty until settle, unless somebody names them
	output        string
	timeout       time.Duration
	noColor       bool
	insecure      bool
	insecureSaid  bool // by a flag or the environment, either way
}

// run is the whole command; it returns the exit code.
func run(ctx context.Context, args []string, in io.Reader, out, errw io.Writer) int {
	c := &cli{in: in, out: out, err: errw, now: time.Now, getenv: os.Getenv, beside: besideThis}
	return c.run(ctx, args)
}

func (c *cli) run(ctx context.Context, args []string) int {
	root := c.command()
	root.SetArgs(args)
	root.SetIn(c.in)
	root.SetOut(c.out)
	root.SetErr(c.err)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	f := explain(err)
	if f.message != "" {
		p := c.paint(c.err)
		most, _ := terminalWidth(c.err)
		fmt.Fprintln(c.err, p.do(styleBad, "nsalloc:"), wrap(printable(f.message), most, len("nsalloc: ")))
	}
	return f.code
}

func (c *cli) command() *cobra.Command {
	root := &cobra.Command{
		Use:   "nsalloc",
		Short: "Namespace serials that are never reused, and move with their container",
		Long: `nsalloc shows and checks the serials of a pool's namespaces.

A serial is 16 hex digits and names one namespace, sandbox or checkpoint for ever, on whichever host it
is. Write it in full, as GENERATION:COUNTER, or as a bare counter of the current generation.

Exit codes: 0 ok, 1 error, 2 usage, 3 not found, 4 conflict, 5 unavailable.`,
		Example: `  nsalloc ps                         the namespaces of this host
  nsalloc who 4711                   which serials a process has
  nsalloc serial history 1a2b        where a namespace has been
  nsalloc doctor                     what is wrong with this host`,
		SilenceErrors: true, // run prints them, with the exit code that goes with them
		SilenceUsage:  true, // a screen of flags hides the sentence that says what is wrong
		Args:          usageArgs(cobra.NoArgs),
		Version:       version,
		// cobra's own default is set where it prints suggestions, which is not here.
		SuggestionsMinimumDistance: 2,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			return c.checkFlags(cmd.Flags().Changed("insecure"))
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetVersionTemplate("nsalloc {{.Version}}\n")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage("%v; `%s --help` lists the flags", err, cmd.CommandPath())
	})
	d := agentconf.Defaults()
	f := root.PersistentFlags()
	f.StringVar(&c.server, "server", c.getenv("NSALLOC_SERVER"), "`ADDRESS` of a server: unix:///PATH or HOST:PORT (env NSALLOC_SERVER; default: the agent's in "+criuhook.ConfigPath+", else "+d.Server+")")
	f.StringVar(&c.agent, "agent", c.getenv("NSALLOC_AGENT"), "`ADDRESS` of this host's agent: unix:///PATH (env NSALLOC_AGENT; default: from "+criuhook.ConfigPath+", else unix://"+d.AgentSocket+")")
	f.StringVarP(&c.output, "output", "o", "table", "`FORMAT` of the answer: "+strings.Join(formats, ", "))
	f.DurationVar(&c.timeout, "timeout", 10*time.Second, "give up after this `TIME`, check and mend after "+patient.String()+"; 0 waits for ever")
	f.BoolVar(&c.noColor, "no-color", false, "no colours (env NO_COLOR); there are none unless on a terminal")
	f.BoolVar(&c.insecure, "insecure", false, "allow plain text to a server on another machine (env NSALLOC_INSECURE; "+criuhook.ConfigPath+" can allow it for its own server)")
	must(root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp)))

	root.SetUsageTemplate(strings.ReplaceAll(root.UsageTemplate(), ".FlagUsages", ".FlagUsagesWrapped 80"))

	root.AddGroup(
		&cobra.Group{ID: "daily", Title: "Daily:"},
		&cobra.Group{ID: "pool", Title: "The pool's records:"},
		&cobra.Group{ID: "setup", Title: "Set up:"},
	)
	add := func(group string, cmds ...*cobra.Command) {
		for _, cmd := range cmds {
			cmd.GroupID = group
			root.AddCommand(cmd)
		}
	}
	add("daily", c.psCommand(), c.whoCommand(), c.checkCommand(), c.doctorCommand())
	add("pool", c.sandboxCommand(), c.serialCommand(), c.checkpointCommand(), c.hostCommand(), c.serverCommand(), c.poolCommand(), c.mendCommand())
	add("setup", c.demoCommand(), c.devCommand(), c.hookCommand())
	root.AddCommand(c.versionCommand())

	root.InitDefaultCompletionCmd("completion") // now, and not when it runs: its words are to be ours
	if cmd, _, err := root.Find([]string{"completion"}); err == nil {
		cmd.Args, cmd.RunE = nil, needsVerb
		for _, shell := range cmd.Commands() {
			shell.Args = usageArgs(cobra.NoArgs)
			shell.Example = "  source <(" + shell.CommandPath() + ")"
		}
	}
	return root
}

// group is a noun: it does nothing without a verb.
func group(name, short string, verbs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use:   name + " VERB",
		Short: short,
		RunE:  needsVerb,
	}
	cmd.AddCommand(verbs...)
	return cmd
}

func needsVerb(cmd *cobra.Command, args []string) error {
	var names []string
	for _, v := range cmd.Commands() {
		names = append(names, v.Name())
	}
	if len(args) > 0 {
		return usage("%q is no verb of %s; there are: %s", args[0], cmd.CommandPath(), strings.Join(names, ", "))
	}
	return usage("%s needs a verb: %s", cmd.CommandPath(), strings.Join(names, ", "))
}

func (c *cli) checkFlags(insecureSaid bool) error {
	c.insecureSaid = insecureSaid
	if v := c.getenv("NSALLOC_INSECURE"); v != "" && !insecureSaid {
		var err error
		if c.insecure, err = strconv.ParseBool(v); err != nil {
			return usage("NSALLOC_INSECURE is %q; write true or false", v)
		}
		c.insecureSaid = true
	}
	for _, f := range formats {
		if c.output == f {
			return nil
		}
	}
	return usage("output format %q is unknown; there are: %s", c.output, strings.Join(formats, ", "))
}

// settle fills in whom to ask where neither a flag nor the environment says: as the agent of this host is
// configured. The error is the file's; the built-in defaults hold then.
func (c *cli) settle(root hostRoot) error {
	s, err := agentconf.Load(root.path(criuhook.ConfigPath))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if c.server == "" {
		c.server = s.Server
		if !c.insecureSaid { // the file allows it for its own server, not for one that is named here
			c.insecure = s.Insecure
		}
	}
	if c.agent == "" {
		c.agent = "unix://" + s.AgentSocket
	}
	return err
}

// settleHere is settle for all but the doctor, which has a line for the file.
func (c *cli) settleHere() {
	if err := c.settle("/"); err != nil {
		c.warn("the agent's configuration is not heeded; mend it, or say --server and --agent: %v", err)
	}
}

// patient is what commands are given that read all records of a pool.
const patient = 10 * time.Minute

// takesLong has a command wait longer than others, unless the caller has said how long.
func (c *cli) takesLong(cmd *cobra.Command) {
	if !cmd.Flags().Changed("timeout") {
		c.timeout = patient
	}
}

// deadline is the context of one command's calls.
func (c *cli) deadline(ctx context.Context) (context.Context, context.CancelFunc) {
	if c.timeout <= 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeoutCause(ctx, c.timeout, errTimeout)
}

// must is for what only a mistake in this program can make fail.
func must(err error) {
	if err != nil {
		panic(err)
	}
}
