package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/rogpeppe/go-internal/diff"
	"github.com/spf13/cobra"

	"github.com/nsalloc/nsalloc/internal/hookconf"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

func (c *cli) hookCommand() *cobra.Command {
	return group("hook", "The hook: what makes CRIU tell the agent", c.hookInstallCommand(), c.hookUninstallCommand(), c.hookStatusCommand())
}

type hookFlags struct {
	hook        string
	root        string
	dryRun, yes bool
}

func (c *cli) hookInstallCommand() *cobra.Command {
	var f hookFlags
	cmd := &cobra.Command{
		Use:   "install [--hook PATH] [--root DIR] [--dry-run] [--yes]",
		Short: "Make every CRIU of this host run nsalloc-hook",
		Long: `Add nsalloc-hook to ` + hookconf.ConfPath + `, which every CRIU reads, whoever starts it.

The other lines stay as they are. The change is shown before it is written, and "nsalloc hook uninstall"
takes it back. Nothing is started: the hook lets everything pass until ` + criuhook.ConfigPath + `
exists, and from then on it needs the agent.`,
		Example: `  nsalloc hook install --dry-run
  nsalloc hook install --yes --hook /usr/libexec/nsalloc-hook`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return c.hookInstall(cmd.Context(), f) },
	}
	cmd.Flags().StringVar(&f.hook, "hook", "", "the hook's `PATH` (default: the nsalloc-hook beside this command)")
	f.register(cmd)
	return cmd
}

func (c *cli) hookUninstallCommand() *cobra.Command {
	var f hookFlags
	cmd := &cobra.Command{
		Use:   "uninstall [--root DIR] [--dry-run] [--yes]",
		Short: "Take nsalloc-hook out of CRIU's configuration",
		Long: `Take nsalloc-hook out of ` + hookconf.ConfPath + `. The other lines stay as they are.

From then on dumps and restores on this host go unseen: the agent ends the sandboxes that are dumped here,
and what is restored here gets fresh serials.`,
		Example: "  nsalloc hook uninstall --dry-run",
		Args:    usageArgs(cobra.NoArgs),
		RunE:    func(cmd *cobra.Command, _ []string) error { return c.hookUninstall(cmd.Context(), f) },
	}
	f.register(cmd)
	return cmd
}

func (f *hookFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.root, "root", "/", "work on the host whose root is this `DIR`")
	cmd.Flags().BoolVar(&f.dryRun, "dry-run", false, "show the change and do not write it")
	cmd.Flags().BoolVar(&f.yes, "yes", false, "write without asking")
}

func (c *cli) hookInstall(ctx context.Context, f hookFlags) error {
	root := hostRoot(f.root)
	if f.hook == "" {
		var err error
		if f.hook, err = c.beside(hookconf.HookName); err != nil {
			return fail(exitError, "%w; name it with --hook PATH", err)
		}
	}
	hook, err := root.findHook(f.hook)
	if err != nil {
		return err
	}
	conf, err := root.readConf(hookconf.ConfPath)
	if err != nil {
		return err
	}
	text, err := hookconf.Install(conf.text, hook)
	if err != nil {
		return fail(exitError, "%s: %w", conf.path, err)
	}
	if bytes.Equal(text, conf.text) {
		fmt.Fprintf(c.out, "%s runs %s already: nothing to do\n", conf.path, hook)
	} else if written, err := c.change(ctx, conf, text, false, f); err != nil || !written {
		return err
	}
	for _, s := range root.shadows() {
		c.warn("%s; %s", s.seen, s.fix)
	}
	if !root.exists(criuhook.ConfigPath) {
		c.warn("%s is missing: the hook lets everything pass unseen until the agent is configured", root.path(criuhook.ConfigPath))
	}
	fmt.Fprintln(c.out, "Not done here: the agent. Start nsalloc-agent (as root), then look at `nsalloc doctor`.")
	return nil
}

func (c *cli) hookUninstall(ctx context.Context, f hookFlags) error {
	root := hostRoot(f.root)
	conf, err := root.readConf(hookconf.ConfPath)
	if err != nil {
		return err
	}
	text, remove := hookconf.Uninstall(conf.text)
	if bytes.Equal(text, conf.text) && !remove {
		fmt.Fprintf(c.out, "%s does not run nsalloc-hook: nothing to do\n", conf.path)
		return nil
	}
	written, err := c.change(ctx, conf, text, remove, f)
	if err != nil || !written {
		return err
	}
	fmt.Fprintln(c.out, "Not done here: the agent. Stop nsalloc-agent where nothing else needs it.")
	return nil
}

// change shows what would be different, asks, and writes. It reports whether it wrote.
func (c *cli) change(ctx context.Context, conf confFile, text []byte, remove bool, f hookFlags) (bool, error) {
	before, after := conf.path, conf.path
	if conf.text == nil {
		before = "/dev/null"
	}
	if remove {
		after = "/dev/null"
	}
	c.printDiff(diff.Diff(before, conf.text, after, text))
	if f.dryRun {
		fmt.Fprintln(c.out, "Nothing was written (--dry-run).")
		return false, nil
	}
	if !f.yes {
		if !isTerminal(c.in) {
			return false, usage("nobody can be asked, because standard input is no terminal; say --yes to write, --dry-run to look only")
		}
		if yes, err := c.ask(ctx, "Write "+conf.path+"?"); err != nil {
			return false, err
		} else if !yes {
			fmt.Fprintln(c.out, "Nothing was written.")
			return false, nil
		}
	}
	if err := conf.write(text, remove); err != nil {
		return false, err
	}
	if remove {
		fmt.Fprintf(c.out, "%s is gone: there was none before the hook was installed.\n", conf.path)
	} else {
		fmt.Fprintf(c.out, "%s is written.\n", conf.path)
	}
	return true, nil
}

// ask waits for a line, or for ctx: a read of a terminal knows no context, so it is left behind, and ends
// with this process.
func (c *cli) ask(ctx context.Context, question string) (bool, error) {
	fmt.Fprint(c.out, question, " [y/N] ")
	type reply struct {
		line string
		err  error
	}
	replies := make(chan reply, 1)
	go func() {
		line, err := bufio.NewReader(c.in).ReadString('\n')
		replies <- reply{line, err}
	}()
	var r reply
	select {
	case <-ctx.Done():
	case r = <-replies:
	}
	switch {
	case ctx.Err() != nil: // also where both came at once
		fmt.Fprintln(c.out)
		return false, fail(exitError, "interrupted; nothing was written")
	case r.err != nil && !errors.Is(r.err, io.EOF):
		return false, r.err
	}
	a := strings.ToLower(strings.TrimSpace(r.line))
	return a == "y" || a == "yes", nil
}

func (c *cli) printDiff(d []byte) {
	p := c.paint(c.out)
	for i, line := range strings.Split(strings.TrimSuffix(string(d), "\n"), "\n") {
		s := stylePlain
		switch {
		case i == 0: // "diff a b" is for programs
			continue
		case strings.HasPrefix(line, "---"), strings.HasPrefix(line, "+++"):
			s = styleHead
		case strings.HasPrefix(line, "+"):
			s = styleGood
		case strings.HasPrefix(line, "-"):
			s = styleBad
		case strings.HasPrefix(line, "@@"):
			s = styleDim
		}
		fmt.Fprintln(c.out, p.do(s, printable(line)))
	}
}

func (c *cli) warn(format string, args ...any) {
	p := c.paint(c.err)
	most, _ := terminalWidth(c.err)
	fmt.Fprintln(c.err, p.do(styleWarn, "warning:"), wrap(printable(fmt.Sprintf(format, args...)), most, len("warning: ")))
}

func (c *cli) hookStatusCommand() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:     "status [--root DIR]",
		Short:   "Say which scripts CRIU's configuration files run",
		Long:    "Say which scripts CRIU's configuration files run. Exit code 1 when nsalloc-hook is not installed.",
		Example: "  nsalloc hook status -o json",
		Args:    usageArgs(cobra.NoArgs),
		RunE:    func(*cobra.Command, []string) error { return c.hookStatus(hostRoot(dir)) },
	}
	cmd.Flags().StringVar(&dir, "root", "/", "look at the host whose root is this `DIR`")
	return cmd
}

func (c *cli) hookStatus(root hostRoot) error {
	type scriptDoc struct {
		File   string `json:"file"`
		Line   int    `json:"line"`
		Script string `json:"script"`
		Ours   bool   `json:"ours"`
	}
	doc := struct {
		Installed bool        `json:"installed"`
		Scripts   []scriptDoc `json:"scripts"`
	}{Scripts: []scriptDoc{}}
	a := answer{}
	for _, name := range confFiles {
		conf, err := root.readConf(name)
		if err != nil {
			return err
		}
		for _, s := range hookconf.Scripts(conf.text) {
			doc.Scripts = append(doc.Scripts, scriptDoc{conf.path, s.Line, s.Path, s.Ours})
			doc.Installed = doc.Installed || s.Ours && name == hookconf.ConfPath
			if s.Ours {
				a.names = append(a.names, s.Path)
			}
		}
	}
	a.doc = doc
	a.empty = "CRIU runs no scripts on this host; nsalloc hook install adds nsalloc-hook"
	a.table = func() *table {
		t := newTable("FILE", "LINE#", "SCRIPT", "WHOSE")
		for _, s := range doc.Scripts {
			whose := in(styleDim, "another's")
			if s.Ours {
				whose = in(styleGood, "nsalloc's")
			}
			t.row(s.File, s.Line, s.Script, whose)
		}
		return t
	}
	if err := c.print(a); err != nil {
		return err
	}
	if !doc.Installed {
		return silent(exitError)
	}
	return nil
}

// besideThis is a program in the directory of this one, symbolic links followed: /usr/bin/nsalloc may be
// a link into a versioned directory.
func besideThis(name string) (string, error) {
	self, err := os.Executable()
	if err == nil {
		self, err = filepath.EvalSymlinks(self)
	}
	if err != nil {
		return "", fmt.Errorf("cannot find out where this command is: %w", err)
	}
	path := filepath.Join(filepath.Dir(self), name)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%s is not beside this command in %s", name, filepath.Dir(self))
	} else if err != nil {
		return "", err
	}
	return path, nil
}
