package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nsalloc/nsalloc/internal/testhost"
	"github.com/nsalloc/nsalloc/internal/testpool"
)

type demoFlags struct {
	keep, simulate bool
}

func (c *cli) demoCommand() *cobra.Command {
	var f demoFlags
	cmd := &cobra.Command{
		Use:   "demo [--keep | --simulate]",
		Short: "Move a container between two hosts made here, and watch its serials",
		Long: `Move a container between two hosts and show what it keeps and what not. Needs root.

Both hosts are made of namespaces on this machine, with a Debian of their own; runc, CRIU, the agents and
the hook run in there, and this machine's own are left alone. All of it goes away at the end but that Debian,
in $NSALLOC_CACHE or /var/cache/nsalloc. The first time debootstrap makes it, in a minute or so, and is
installed where it is missing.

Where that cannot run, it says why. --simulate then shows the rules at work on a pool in memory, with plain
namespaces and without runc and CRIU; every line of it says so.`,
		Example: "  nsalloc demo\n  nsalloc demo --keep",
		Args:    usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if c.output != "table" {
				return usage("demo tells a story and has no -o %s; `nsalloc sandbox list -o %s` has", c.output, c.output)
			}
			return c.demo(cmd.Context(), f, testhost.Check)
		},
	}
	cmd.Flags().BoolVar(&f.keep, "keep", false, "leave the hosts running at the end, to look around in, until ^C")
	cmd.Flags().BoolVar(&f.simulate, "simulate", false, "show a simulation: no hosts, no runc, no CRIU, no root")
	cmd.MarkFlagsMutuallyExclusive("keep", "simulate")
	return cmd
}

// demo shows the real thing, or says why it cannot and offers the simulation: that one is never shown
// unasked.
func (c *cli) demo(ctx context.Context, f demoFlags, check func() error) error {
	s := c.screen()
	if f.simulate {
		return c.simulate(ctx, s)
	}
	if err := check(); err != nil {
		return c.offer(ctx, s, err)
	}
	bin, err := demoBinaries()
	if err != nil {
		return err
	}
	err = c.demoOnHosts(ctx, s, bin, f.keep)
	if cannot, ok := errors.AsType[*cannotError](err); ok {
		return c.offer(ctx, s, cannot)
	}
	return err
}

// demoBinaries is the directory of what the hosts are given: this very build.
func demoBinaries() (dir string, err error) {
	for _, name := range []string{"nsalloc-server", "nsalloc-agent", "nsalloc-hook"} {
		path, err := besideThis(name)
		if err != nil {
			return "", fail(exitError, "%w; `make build` puts all of them into bin/, `make demo` does that too", err)
		}
		dir = filepath.Dir(path)
	}
	return dir, nil
}

// cannotError: hosts, or CRIU on them, do not work on this machine.
type cannotError struct{ err error }

func (e *cannotError) Error() string { return e.err.Error() }
func (e *cannotError) Unwrap() error { return e.err }

// demoOnHosts is the real demo. Whatever happens, the hosts are gone when it returns.
func (c *cli) demoOnHosts(ctx context.Context, s *screen, bin string, keep bool) error {
	s.say(styleHead, "Moving a running container from host a to host b, to see which numbers it keeps.")
	s.say(styleDim, "", "Both hosts are made of namespaces here and share this machine's kernel, so inode numbers and "+
		"kernel ids come from one kernel; each host has a boot id made up for it. This machine's own /etc, runc and CRIU are left alone.", "")

	h, err := c.startHosts(ctx, s, bin)
	if err != nil {
		if ctx.Err() != nil {
			return c.interrupted(s)
		}
		return &cannotError{err}
	}
	var shown told
	cannot := false
	if err = s.step(ctx, "try CRIU there", h.works); err != nil {
		cannot = true
	} else {
		shown, err = c.tell(ctx, s, h)
	}
	switch {
	case ctx.Err() != nil:
		err = c.interrupted(s)
	case cannot:
		err = &cannotError{err}
	case err != nil:
		err = c.demoFailed(err, h.logs())
	case keep:
		s.say(stylePlain, shown.sum(), "", "The hosts are kept until ^C. In another terminal, as root:", "")
		h.enter(s)
		s.say(stylePlain, "")
		<-ctx.Done()
		if s.live {
			fmt.Fprintln(s.out) // the terminal wrote ^C
		}
	}
	// Also after ^C, and for as long as it takes.
	closed := s.step(context.WithoutCancel(ctx), "remove the hosts", func(context.Context) (string, error) { return "", h.Close() })
	if closed != nil {
		fmt.Fprintf(c.err, "%s %v; the next demo tries again\n", c.paint(c.err).do(styleBad, "nsalloc:"), closed)
		return silent(exitError)
	}
	if err == nil && !keep {
		s.say(stylePlain, "", shown.sum())
		s.next(os.Args[0], h.rootfs)
	}
	return err
}

// startHosts makes hosts and daemons; after an error nothing of them is left.
func (c *cli) startHosts(ctx context.Context, s *screen, bin string) (*hosts, error) {
	const debian = "make a Debian with runc and CRIU for the hosts"
	began, making := time.Now(), &progress{s: s, what: debian}
	rootfs, err := testhost.RootFS(ctx, making)
	if making.said() || err != nil {
		err = s.done(debian, "", began, err)
	}
	if err != nil {
		return nil, err
	}
	h := &hosts{rootfs: rootfs}
	err = s.step(ctx, "make hosts a and b, an agent on each, and a server", func(ctx context.Context) (_ string, err error) {
		h.Pool, err = testpool.Start(ctx, testpool.Options{Bin: bin, Hosts: []string{"a", "b"}, RootFS: rootfs})
		return "", err
	})
	return h, err
}

func (c *cli) interrupted(s *screen) error {
	s.clear()
	s.line(styleWarn, "Interrupted.")
	return silent(exitError)
}

// demoFailed says what was being done, the cause, and what the programs last said of it.
func (c *cli) demoFailed(err error, logs []demoLog) error {
	p := c.paint(c.err)
	cause := err.Error()
	if step, ok := errors.AsType[*stepError](err); ok {
		cause = step.err.Error()
		fmt.Fprintf(c.err, "\n%s at this step: %s\n", p.do(styleBad, "The demo failed"), step.what)
	} else {
		fmt.Fprintf(c.err, "\n%s\n", p.do(styleBad, "The demo failed"))
	}
	if f, ok := errors.AsType[*failure](err); !ok || f.message != "" {
		for line := range strings.Lines(strings.TrimSpace(cause)) {
			fmt.Fprintln(c.err, "  "+printable(strings.TrimRight(line, "\n")))
		}
	}
	for _, log := range logs {
		tail := log.tail(8)
		if last := tail[len(tail)-1]; last == "" || strings.Contains(cause, last) {
			continue // it said nothing, or it was quoted above
		}
		fmt.Fprintf(c.err, "\n%s\n", p.do(styleHead, "The log of "+log.name+" ends:"))
		for _, line := range tail {
			fmt.Fprintln(c.err, "  "+printable(line))
		}
	}
	fmt.Fprintln(c.err)
	return silent(exitError)
}

// offer says why the demo cannot run here, and shows the simulation to somebody at a terminal who wants it.
func (c *cli) offer(ctx context.Context, s *screen, why error) error {
	p := c.paint(c.err)
	fmt.Fprintf(c.err, "%s The real demo cannot run here:\n", p.do(styleBad, "nsalloc:"))
	for line := range strings.Lines(strings.TrimSpace(why.Error())) {
		fmt.Fprintln(c.err, "  "+wrap(printable(strings.TrimSpace(line)), s.width, 2))
	}
	const what = "a simulation: the pool's rules at work in memory, on plain namespaces, without runc and CRIU"
	if _, tty := terminalWidth(c.out); !tty || !isTerminal(c.in) {
		fmt.Fprintln(c.err, wrap("`"+os.Args[0]+" demo --simulate` shows "+what+".", s.width, 0))
		return silent(exitError)
	}
	fmt.Fprint(c.out, wrap("Show "+what+"? [y/N]", s.width, 0)+" ")
	answer := make(chan string, 1)
	go func() { // a read from a terminal cannot be cancelled; at worst this process ends with it
		line, _ := bufio.NewReader(c.in).ReadString('\n')
		answer <- strings.ToLower(strings.TrimSpace(line))
	}()
	select {
	case a := <-answer:
		if a == "y" || a == "yes" {
			return c.simulate(ctx, s)
		}
	case <-ctx.Done():
		fmt.Fprintln(c.out)
	}
	return silent(exitError)
}

// next says where to go from here; self is this command's path.
func (s *screen) next(self, rootfs string) {
	s.say(stylePlain, "", "Next:")
	hints := []struct{ what, why string }{
		{self + " demo --keep", "once more, and keep the hosts"},
		{self + " dev", "a pool on this machine, to try commands"},
		{"make test", "all that is promised, tested, as root"},
		{"README.md", "how to install it on hosts of your own"},
	}
	const margin, gap = 2, 2
	left, right := 0, 0
	for _, h := range hints {
		left, right = max(left, columns(h.what)), max(right, columns(h.why))
	}
	// Beside each other where there is room; a command's path may be long.
	beside := margin+left+gap+right <= s.width
	for _, h := range hints {
		between := "\n" + strings.Repeat(" ", 3*margin)
		if beside {
			between = strings.Repeat(" ", left-columns(h.what)+gap)
		}
		s.line(stylePlain, strings.Repeat(" ", margin)+h.what+between+s.paint.do(styleDim, h.why))
	}
	s.say(styleDim, "", "The hosts' Debian stays for the next time: "+rootfs)
}
