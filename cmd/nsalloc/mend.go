package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

type mendFlags struct{ yes, force bool }

// mendKinds is what can be mended, as help and completion list it.
var mendKinds = []alloc.Kind{alloc.KindSandbox, alloc.KindCheckpoint, alloc.KindStint, alloc.KindHost, alloc.KindLane, alloc.KindRequest, alloc.KindCounter}

func (c *cli) mendCommand() *cobra.Command {
	var f mendFlags
	var kinds strings.Builder
	names := make([]string, 0, len(mendKinds))
	for _, k := range mendKinds {
		names = append(names, string(k))
		fmt.Fprintf(&kinds, "  %-10s  %s\n", k, wrap(alloc.MendCost(k), 80, 14))
	}
	cmd := &cobra.Command{
		Use:   "mend KIND [ID] [--yes] [--force]",
		Short: "Take one object out of a contradiction that check has found",
		Long: `Take one object out of a contradiction that nsalloc check has found; check says which. No serial that
the records name is issued again for it. By kind:

` + kinds.String() + `
Put aside means: kept in the store, byte by byte, where nothing reads it. Whatever is changed is kept there
as it was.

What check finds nothing about is refused without --force. Exit code 4 when something else has to be
mended before; the message says what.`,
		Example: `  nsalloc mend sandbox 0001000000000013
  nsalloc mend counter --yes`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 && args[0] != string(alloc.KindCounter) {
				return usage("nsalloc mend %s needs the %s's ID; nsalloc check shows it", args[0], args[0])
			}
			return usageArgs(cobra.RangeArgs(1, 2))(cmd, args)
		},
		ValidArgs: names,
		RunE: func(cmd *cobra.Command, args []string) error {
			c.takesLong(cmd)
			return c.mend(cmd.Context(), args, f)
		},
	}
	cmd.Flags().BoolVar(&f.yes, "yes", false, "mend without asking")
	cmd.Flags().BoolVar(&f.force, "force", false, "also what check finds nothing about, what a newer version wrote, or what cannot be read while the counter is wrong")
	return cmd
}

func (c *cli) mend(ctx context.Context, args []string, f mendFlags) error {
	cmd := alloc.MendCommand{Kind: alloc.Kind(args[0]), Force: f.force}
	cost := alloc.MendCost(cmd.Kind)
	if cost == "" {
		return usage("%q cannot be mended; there are: sandbox, checkpoint, stint, host, lane, request, counter", args[0])
	}
	if len(args) > 1 {
		cmd.ID = args[1]
	}
	if cmd.Kind == alloc.KindSandbox && (f.yes || isTerminal(c.in)) {
		state := c.stateOf(ctx, cmd.ID)
		cost = alloc.MendCostOf(state)
		if f.yes && (state == alloc.StateDumped || state == alloc.StateInTransit || state == alloc.StateClaimed) {
			// Who does not want to be asked is told what no agent brings back.
			fmt.Fprintf(c.err, "nsalloc: %s is %s: %s.\n", strings.Join(args, " "), state, cost)
		}
	}
	if !f.yes {
		if !isTerminal(c.in) {
			return usage("nobody can be asked, because standard input is no terminal; say --yes to mend. What it costs: %s", cost)
		}
		fmt.Fprintln(c.out, c.wrapped(fmt.Sprintf("To mend %s: %s.", strings.Join(args, " "), cost)))
		if yes, err := c.ask(ctx, "Mend it?"); err != nil {
			return err
		} else if !yes {
			fmt.Fprintln(c.out, "Nothing was changed.")
			return nil
		}
	}
	return c.withPool(ctx, func(ctx context.Context, p *client.Client) error {
		if isSerial := cmd.Kind == alloc.KindSandbox || cmd.Kind == alloc.KindCheckpoint; isSerial && len(cmd.ID) != 16 {
			serial, err := parseSerial(ctx, p, cmd.ID)
			if err != nil {
				return err
			}
			cmd.ID = serial.String()
		}
		var done alloc.Mended
		err := client.Retry(ctx, func(id string) (err error) {
			cmd.RequestID = id
			done, err = p.Mend(ctx, cmd)
			return err
		})
		if err != nil {
			return err
		}
		return c.printMended(done)
	})
}

// stateOf is a sandbox's state; "" when it cannot be told. Whatever fails here fails again in the mend, or
// the sandbox's record is what is broken.
func (c *cli) stateOf(ctx context.Context, id string) (state alloc.SandboxState) {
	_ = c.withPool(ctx, func(ctx context.Context, p *client.Client) error {
		serial, err := parseSerial(ctx, p, id)
		if err != nil {
			return err
		}
		found, err := p.Sandbox(ctx, serial, true)
		if err == nil && found.Sandbox != nil && found.Sandbox.Serial == serial {
			state = found.Sandbox.State
		}
		return err
	})
	return state
}

func (c *cli) printMended(done alloc.Mended) error {
	doc := struct {
		Revision int64    `json:"revision"`
		At       *string  `json:"at"`
		Changed  []string `json:"changed"`
	}{int64(done.Revision), rfc3339(done.At), []string{}}
	a := answer{}
	for _, k := range done.Changed {
		doc.Changed = append(doc.Changed, k.String())
	}
	a.doc, a.names = doc, doc.Changed
	paint := c.paint(c.out)
	a.lines = paint.do(styleGood, "Mended.") + " Put aside, or changed and put aside as it was:\n"
	for _, name := range doc.Changed {
		a.lines += "  " + printable(name) + "\n"
	}
	return c.print(a)
}
