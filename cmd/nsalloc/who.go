package main

import (
	"context"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

func (c *cli) whoCommand() *cobra.Command {
	noWait := false
	cmd := &cobra.Command{
		Use:   "who PID [--no-wait]",
		Short: "Say which namespaces a process of this host is in, by serial",
		Long: `Say which namespaces a process of this host is in, by serial.

Namespaces that have no serial yet get one, and it is committed before the answer: a number shown here does not
change any more. While the pool is away they get provisional ones from what the host was granted, which are marked
with * and, in JSON, "provisional": the pool commits them as they are when it is back. Only where the host's state
was copied or lost, or the pool had to be recovered, do they get others instead; the agent's log says so.`,
		Example: `  nsalloc who 4711
  nsalloc who $$ -o json`,
		Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			pid, err := strconv.ParseInt(args[0], 10, 32)
			if err != nil || pid <= 0 {
				return usage("pid %q is none; write a positive number", args[0])
			}
			return c.withAgent(cmd.Context(), func(ctx context.Context, h *host) error { return c.who(ctx, h, int32(pid), noWait) })
		},
	}
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "do not wait for the pool: what has no number yet gets a provisional one")
	return cmd
}

func (c *cli) who(ctx context.Context, h *host, pid int32, noWait bool) error {
	identified, err := h.Identify(ctx, &nsallocv1.IdentifyRequest{Pid: pid, NoWait: noWait})
	if err != nil {
		return err
	}
	found := identified.GetNamespaces()
	doc := struct {
		PID        int32     `json:"pid"`
		Sandbox    string    `json:"sandbox,omitempty"`
		Namespaces []liveDoc `json:"namespaces"`
	}{PID: pid, Sandbox: serialText(homeOf(found)), Namespaces: []liveDoc{}}
	var a answer
	for _, n := range found {
		a.names = append(a.names, alloc.Serial(n.GetBinding().GetSerial()).String())
		doc.Namespaces = append(doc.Namespaces, liveView(n))
	}
	a.doc = doc
	a.before = fmt.Sprintf("Process %d is in no container: all its namespaces are the host's own.\n", pid)
	if home := homeOf(found); home != 0 {
		a.before = fmt.Sprintf("Process %d is in sandbox %s.\n", pid, c.paint(c.out).do(styleKey, home.String()+provisionalMark(sandboxIsProvisional(found, home))))
	}
	a.after = provisionalNote(found)
	a.table = func() *table {
		t := newTable("TYPE", "SERIAL", "INODE#", "KERNEL#", "OF")
		for _, n := range found {
			b := wire.BindingFromWire(n.GetBinding())
			serial := in(styleKey, b.Serial.String()+provisionalMark(n.GetProvisional()))
			of := in(stylePlain, "sandbox "+serialText(alloc.Serial(n.GetSandbox()))+provisionalMark(n.GetSandboxProvisional()))
			if n.GetOfHost() {
				serial.style = styleDim
				of = in(styleDim, "the host")
			}
			if n.GetProvisional() {
				serial.style = styleWarn
			}
			t.row(string(b.Type), serial, number(b.Kernel.Inode), kernelID(b.Kernel), of)
		}
		return t
	}
	return c.print(a)
}

// homeOf is the sandbox that a process is at home in: that of the first namespace that is not the host's.
// A process can be in those of several, when somebody joined it to one.
func homeOf(namespaces []*nsallocv1.LiveNamespace) alloc.Serial {
	for _, n := range namespaces {
		if !n.GetOfHost() {
			return alloc.Serial(n.GetSandbox())
		}
	}
	return 0
}

// provisionalMark stands behind a number that the pool has not committed.
func provisionalMark(provisional bool) string {
	if provisional {
		return "*"
	}
	return ""
}

// provisionalNote says what the mark means, where it stands.
func provisionalNote(found []*nsallocv1.LiveNamespace) string {
	for _, n := range found {
		if n.GetProvisional() || n.GetSandboxProvisional() {
			return "\n* provisional: not committed by the pool yet, the number may still change"
		}
	}
	return ""
}

func sandboxIsProvisional(found []*nsallocv1.LiveNamespace, sandbox alloc.Serial) bool {
	for _, n := range found {
		if alloc.Serial(n.GetSandbox()) == sandbox {
			return n.GetSandboxProvisional()
		}
	}
	return false
}
