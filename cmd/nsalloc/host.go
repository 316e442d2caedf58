package main

import (
	"context"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/spf13/cobra"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

func (c *cli) hostCommand() *cobra.Command {
	return group("host", "Hosts: the machines of the pool", c.hostListCommand(), c.hostGetCommand(), c.hostWaiveCommand())
}

func (c *cli) hostListCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the pool's hosts",
		Long: `List the pool's hosts.

JOINED is when the agent's life or the host's boot began, and not when the host was last seen: a host that
has been up for a year has joined a year ago.

QUOTA is there when a host has used more than half of what the pool's policy grants a host in 24 hours.`,
		Example: "  nsalloc host list -o wide",
		Args:    usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withPool(cmd.Context(), c.hostList)
		},
	}
}

func (c *cli) hostList(ctx context.Context, p *client.Client) error {
	found, err := legible(c, p.Hosts(ctx))
	if err != nil {
		return err
	}
	pool, _, err := p.Pool(ctx)
	if err != nil {
		return err
	}
	doc := struct {
		Hosts []hostDoc `json:"hosts"`
	}{[]hostDoc{}}
	a := answer{empty: "no hosts: none has said Hello; start nsalloc-agent on one"}
	for _, h := range found {
		doc.Hosts = append(doc.Hosts, hostView(h))
		a.names = append(a.names, h.Name)
	}
	a.doc = doc
	a.table = func() *table { return c.hostTable(found, pool) }
	return c.print(a)
}

func (c *cli) hostTable(hosts []*alloc.Host, pool *alloc.Pool) *table {
	titles := []string{"NAME", "INCARNATION#", "GRANTED#", "JOINED#", "KERNEL", "CRIU"}
	quota := slices.ContainsFunc(hosts, func(h *alloc.Host) bool { return c.quotaUse(h, pool) != "" })
	if quota {
		titles = append(titles, "QUOTA#")
	}
	if c.wide() {
		titles = append(titles, "BOOT-ID")
	}
	t := newTable(titles...)
	for _, h := range hosts {
		row := []any{in(styleKey, h.Name), h.Incarnation, h.Granted.Count(), c.age(h.Hello), h.Labels["kernel"], h.Labels["criu"]}
		if quota {
			row = append(row, c.quotaUse(h, pool))
		}
		if c.wide() {
			row = append(row, h.BootID)
		}
		t.row(row...)
	}
	return t
}

// quotaUse is how much of its quota a host has used, "" up to half of it.
func (c *cli) quotaUse(h *alloc.Host, pool *alloc.Pool) string {
	share, ok := h.Quota.Share(pool, c.now())
	if !ok || share <= 0.5 {
		return ""
	}
	return fmt.Sprintf("%.0f%%", math.Floor(share*100))
}

func (c *cli) hostGetCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "get NAME",
		Short:   "Show one host",
		Example: "  nsalloc host get a",
		Args:    usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.withPool(cmd.Context(), func(ctx context.Context, p *client.Client) error {
				h, err := p.Host(ctx, args[0])
				if err != nil {
					return err
				}
				if h == nil {
					return errMissing("host")
				}
				return c.printHost(h)
			})
		},
	}
}

func (c *cli) printHost(h *alloc.Host) error {
	f := fields{}
	f.add("Host", in(styleKey, h.Name))
	f.add("Incarnation", h.Incarnation)
	f.add("Boot", h.BootID)
	f.add("Joined", c.clock(h.Hello))
	f.add("To spend", h.Granted.Count())
	for _, r := range h.Granted {
		f.add("", r.First.String()+" to "+r.Last().String())
	}
	if q := h.Quota.At(c.now()); q.Used > 0 {
		f.add("Quota", fmt.Sprintf("%s serials granted since %s", thousands(q.Used), c.clock(q.Since)))
	}
	if h.Settled > 1 {
		f.add("Settled", fmt.Sprintf("in generation %d it has said what lives on it", h.Settled))
	}
	if h.Waived > 0 {
		f.add("Waived", fmt.Sprintf("in generation %d nobody waited for it", h.Waived))
	}
	for _, k := range slices.Sorted(maps.Keys(h.Labels)) {
		f.add("Label", k+"="+h.Labels[k])
	}
	return c.print(answer{doc: hostView(h), names: []string{h.Name}, lines: c.fieldText(f)})
}
