package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

func (c *cli) sandboxCommand() *cobra.Command {
	return group("sandbox", "Sandboxes: the namespaces that move together", c.sandboxListCommand(), c.sandboxGetCommand())
}

type sandboxFilter struct {
	owner  string
	states []string
}

func (c *cli) sandboxListCommand() *cobra.Command {
	var f sandboxFilter
	cmd := &cobra.Command{
		Use:   "list [--owner HOST] [--state STATE]...",
		Short: "List the pool's sandboxes",
		Example: `  nsalloc sandbox list --owner a --state running
  nsalloc sandbox list -o name | xargs -n1 nsalloc sandbox get`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withPool(cmd.Context(), func(ctx context.Context, p *client.Client) error { return c.sandboxList(ctx, p, f) })
		},
	}
	cmd.Flags().StringVar(&f.owner, "owner", "", "only those of this `HOST`")
	cmd.Flags().StringSliceVar(&f.states, "state", nil, "only those in this `STATE`: "+strings.Join(stateNames(), ", "))
	must(cmd.RegisterFlagCompletionFunc("state", cobra.FixedCompletions(stateNames(), cobra.ShellCompDirectiveNoFileComp)))
	return cmd
}

var sandboxStates = []alloc.SandboxState{alloc.StateRunning, alloc.StateDumped, alloc.StateInTransit, alloc.StateClaimed, alloc.StateEnded}

func stateNames() []string {
	var names []string
	for _, s := range sandboxStates {
		names = append(names, string(s))
	}
	return names
}

func (c *cli) sandboxList(ctx context.Context, p *client.Client, f sandboxFilter) error {
	filter := client.Filter{Owner: f.owner, Linearizable: true}
	for _, name := range f.states {
		s := alloc.SandboxState(strings.ReplaceAll(name, "-", "_"))
		if !slices.Contains(sandboxStates, s) {
			return usage("sandbox state %q is unknown; there are: %s", name, strings.Join(stateNames(), ", "))
		}
		filter.States = append(filter.States, s)
	}
	found, err := legible(c, p.Sandboxes(ctx, filter))
	if err != nil {
		return err
	}
	doc := struct {
		Sandboxes []sandboxDoc `json:"sandboxes"`
	}{[]sandboxDoc{}}
	a := answer{empty: "no sandboxes"}
	for _, s := range found {
		doc.Sandboxes = append(doc.Sandboxes, sandboxView(s))
		a.names = append(a.names, s.Serial.String())
	}
	a.doc = doc
	a.table = func() *table { return c.sandboxTable(found) }
	return c.print(a)
}

func (c *cli) sandboxTable(sandboxes []*alloc.Sandbox) *table {
	titles := []string{"SERIAL", "STATE", "OWNER", "EPOCH#", "NS#", "AGE#", "COMMAND"}
	if c.wide() {
		titles = []string{"SERIAL", "STATE", "OWNER", "EPOCH#", "NS#", "AGE#", "CHECKPOINT", "PARENT", "COMMAND"}
	}
	t := newTable(titles...)
	for _, s := range sandboxes {
		live := 0
		for _, b := range s.Bindings {
			if b.Live() {
				live++
			}
		}
		row := []any{in(styleKey, s.Serial.String()), stateCell(s.State), s.Owner, s.Epoch, live, c.age(s.Created)}
		if c.wide() {
			parent := ""
			if s.Parent != nil {
				parent = serialText(s.Parent.Sandbox)
			}
			row = append(row, serialText(s.Checkpoint), parent)
		}
		t.row(append(row, sandboxName(s))...)
	}
	return t
}

// sandboxName is what people know a sandbox by: the host says that in its labels.
func sandboxName(s *alloc.Sandbox) string {
	if s.OfHost {
		return "(the host's own)"
	}
	return s.Labels["command"]
}

func stateCell(s alloc.SandboxState) cell {
	switch s {
	case alloc.StateRunning:
		return in(styleGood, string(s))
	case alloc.StateEnded:
		return in(styleDim, string(s))
	}
	return in(styleWarn, string(s)) // between two hosts
}

func (c *cli) sandboxGetCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "get SERIAL",
		Short: "Show one sandbox, by its serial or one of a namespace or checkpoint of it",
		Example: `  nsalloc sandbox get 0001000000000007
  nsalloc sandbox get 7 -o json`,
		Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.withPool(cmd.Context(), func(ctx context.Context, p *client.Client) error {
				serial, err := parseSerial(ctx, p, args[0])
				if err != nil {
					return err
				}
				found, err := p.Sandbox(ctx, serial, true)
				if err != nil {
					return err
				}
				if found.Sandbox == nil {
					return errMissing("sandbox")
				}
				if _, err := wholeHistory(ctx, p, found.Sandbox); err != nil {
					return err
				}
				return c.printSandbox(found.Sandbox, found.Checkpoint, serial)
			})
		},
	}
}

func (c *cli) printSandbox(s *alloc.Sandbox, cp *alloc.Checkpoint, asked alloc.Serial) error {
	doc := struct {
		sandboxDoc
		CurrentCheckpoint *checkpointDoc `json:"current_checkpoint,omitempty"`
	}{sandboxDoc: sandboxView(s)}
	f := fields{}
	f.add("Sandbox", in(styleKey, s.Serial.String()))
	f.add("State", stateCell(s.State))
	f.add("Owner", s.Owner+", epoch "+s.Epoch.String())
	if name := sandboxName(s); name != "" {
		f.add("Command", name)
	}
	if s.Parent != nil {
		f.add("Clone of", fmt.Sprintf("sandbox %s, from checkpoint %s", s.Parent.Sandbox, s.Parent.Checkpoint))
	}
	if cp != nil {
		view := checkpointView(cp)
		doc.CurrentCheckpoint = &view
		f.add("Checkpoint", fmt.Sprintf("%s, %s, dumped on host %s %s ago", cp.Serial, cp.State, cp.Source, c.age(cp.Created)))
	}
	if s.Claim != nil {
		f.add("Restored by", fmt.Sprintf("CRIU run %s on host %s", s.Claim.Run, s.Claim.Host))
	}
	f.add("Registered", c.clock(s.Created))
	for _, k := range slices.Sorted(maps.Keys(s.Labels)) {
		if k != "command" {
			f.add("Label", k+"="+s.Labels[k])
		}
	}
	return c.print(answer{
		doc:    doc,
		names:  []string{s.Serial.String()},
		before: c.fieldText(f),
		table:  func() *table { return c.bindingTable(s, asked) },
	})
}

// bindingTable marks the namespace that was asked for.
func (c *cli) bindingTable(s *alloc.Sandbox, asked alloc.Serial) *table {
	titles := []string{"TYPE", "SERIAL", "INODE#", "KERNEL#", "BOUND#", "GONE#"}
	if c.wide() {
		titles = append(titles, "PARENT", "BOOT-ID")
	}
	t := newTable(titles...)
	for _, b := range s.Bindings {
		serial := in(stylePlain, b.Serial.String())
		switch {
		case b.Serial == asked:
			serial.style = styleKey
		case !b.Live():
			serial.style = styleDim
		}
		row := []any{string(b.Type), serial, number(b.Kernel.Inode), kernelID(b.Kernel), c.age(b.Bound), c.age(b.Gone)}
		if c.wide() {
			row = append(row, serialText(b.Parent), b.Kernel.BootID)
		}
		t.row(row...)
	}
	return t
}

// number is a number, or nothing for "none".
func number(n uint64) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprint(n)
}

// kernelID is the kernel's own number of a namespace; a host without NS_GET_ID has none to show.
func kernelID(k alloc.KernelID) cell {
	if k.Weak || k.ID == 0 && !k.IsZero() {
		return in(styleWarn, "weak")
	}
	return in(stylePlain, number(k.ID))
}
