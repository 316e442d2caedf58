package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

func (c *cli) psCommand() *cobra.Command {
	var sandbox string
	cmd := &cobra.Command{
		Use:   "ps [--sandbox SERIAL]",
		Short: "List this host's live namespaces with their serials",
		Example: `  nsalloc ps
  nsalloc ps --sandbox 0001000000000007 -o wide`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withAgent(cmd.Context(), func(ctx context.Context, h *host) error { return c.ps(ctx, h, sandbox) })
		},
	}
	cmd.Flags().StringVar(&sandbox, "sandbox", "", "only those of this sandbox `SERIAL`")
	return cmd
}

func (c *cli) ps(ctx context.Context, h *host, sandbox string) error {
	req := &nsallocv1.ListNamespacesRequest{}
	if sandbox != "" {
		// The generation comes from the agent: ps works while the pool is away.
		var current alloc.Generation = 1
		if isBare(sandbox) {
			st, err := h.Status(ctx, &nsallocv1.StatusRequest{})
			if err != nil {
				return err
			}
			current = alloc.Generation(st.GetPool().GetGeneration())
		}
		s, err := alloc.ParseSerial(sandbox, current)
		if err != nil {
			return err
		}
		req.Sandbox = uint64(s)
	}
	listed, err := h.ListNamespaces(ctx, req)
	if err != nil {
		return err
	}
	return c.printLive(listed.GetNamespaces())
}

func (c *cli) printLive(found []*nsallocv1.LiveNamespace) error {
	doc := struct {
		Namespaces []liveDoc `json:"namespaces"`
	}{[]liveDoc{}}
	a := answer{empty: "no namespaces are numbered here; the agent's first sweep numbers those of this host"}
	for _, n := range found {
		doc.Namespaces = append(doc.Namespaces, liveView(n))
		a.names = append(a.names, alloc.Serial(n.GetBinding().GetSerial()).String())
	}
	a.doc = doc
	a.table = func() *table { return c.liveTable(found) }
	a.after = provisionalNote(found)
	return c.print(a)
}

func (c *cli) liveTable(found []*nsallocv1.LiveNamespace) *table {
	titles := []string{"TYPE", "INODE#", "KERNEL#", "SERIAL", "SANDBOX", "PIDS", "COMMAND"}
	if c.wide() {
		titles = []string{"TYPE", "INODE#", "KERNEL#", "SERIAL", "SANDBOX", "BOUND#", "PARENT", "PIDS", "COMMAND"}
	}
	t := newTable(titles...)
	before := alloc.Serial(0)
	for _, n := range found {
		b := wire.BindingFromWire(n.GetBinding())
		serial := in(styleKey, b.Serial.String()+provisionalMark(n.GetProvisional()))
		if n.GetProvisional() {
			serial.style = styleWarn
		}
		sandbox := alloc.Serial(n.GetSandbox())
		of := in(stylePlain, serialText(sandbox)+provisionalMark(n.GetSandboxProvisional()))
		if n.GetOfHost() || sandbox == before {
			of.style = styleDim // the first line of each container stands out
		}
		before = sandbox
		row := []any{string(b.Type), number(b.Kernel.Inode), kernelID(b.Kernel), serial, of}
		if c.wide() {
			row = append(row, c.age(b.Bound), serialText(b.Parent), pidList(n.GetPids(), 16), n.GetCommand())
		} else {
			row = append(row, pidList(n.GetPids(), 1), n.GetCommand())
		}
		t.row(row...)
	}
	return t
}

// pidList shows up to most pids and how many more are known.
func pidList(pids []int32, most int) string {
	var s []string
	for i, pid := range pids {
		if i == most {
			s = append(s, fmt.Sprintf("+%d", len(pids)-most))
			break
		}
		s = append(s, fmt.Sprint(pid))
	}
	return strings.Join(s, " ")
}
