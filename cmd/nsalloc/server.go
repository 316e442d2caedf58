package main

import (
	"context"
	"slices"

	"github.com/spf13/cobra"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

func (c *cli) serverCommand() *cobra.Command {
	return group("server", "Servers: what serves the pool", c.serverListCommand(), c.serverRemoveCommand())
}

func (c *cli) serverListCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the pool's servers, and which of them answer",
		Long: `List the pool's servers, and which of them answer the one that is asked.

Each server asks all others what they have seen of the store, when it starts and when it has connected to the
store anew. One that does not answer makes it take a new generation, or wait (nsalloc pool policy). Remove one that
is gone for good.`,
		Example: "  nsalloc server list",
		Args:    usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withPool(cmd.Context(), c.serverList)
		},
	}
}

type serverDoc struct {
	Name    string  `json:"name"`
	Address string  `json:"address"`
	Life    uint64  `json:"life"`
	Started *string `json:"started"`
	Answers bool    `json:"answers"`
	Trouble string  `json:"trouble"`
}

func (c *cli) serverList(ctx context.Context, p *client.Client) error {
	found, err := p.Servers(ctx)
	if err != nil {
		return err
	}
	doc := struct {
		Servers []serverDoc `json:"servers"`
	}{[]serverDoc{}}
	a := answer{empty: "no servers are listed"}
	for _, s := range found {
		doc.Servers = append(doc.Servers, serverDoc{s.Name, s.Address, s.Life, rfc3339(s.Started), s.Answers, s.Trouble})
		a.names = append(a.names, s.Name)
	}
	a.doc = doc
	a.table = func() *table {
		t := newTable("NAME", "ADDRESS", "LIFE#", "STARTED#", "ANSWERS")
		for _, s := range found {
			answers := in(styleGood, "yes")
			if !s.Answers {
				answers = in(styleBad, "no: "+s.Trouble)
			}
			t.row(in(styleKey, s.Name), s.Address, s.Life, c.age(s.Started), answers)
		}
		return t
	}
	return c.print(a)
}

func (c *cli) serverRemoveCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "remove NAME [--force]",
		Short: "Unlist a server that is gone for good",
		Long: `Unlist a server that is gone for good: the others do not ask it any more what it has seen of the store.

What it alone had seen is lost with it: if the store was put back to an older snapshot at the same time, nobody
can know. So one that will come back is better waited for. If it comes back all the same, it is listed again.

It works at a server that waits for that one: nothing is issued by it before it was sure.`,
		Example: "  nsalloc server remove etcd-2-1f4c9a03",
		Args:    usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.withPool(cmd.Context(), func(ctx context.Context, p *client.Client) error {
				return c.serverRemove(ctx, p, args[0], force)
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "also one that answers, and one that the server asked does not know")
	return cmd
}

func (c *cli) serverRemove(ctx context.Context, p *client.Client, name string, force bool) error {
	if err := alloc.ValidateName("server name", name); err != nil {
		return err
	}
	found, err := p.Servers(ctx)
	if err != nil {
		return err
	}
	var life uint64 // the one that is there now, and no later one
	if i := slices.IndexFunc(found, func(s client.ServerStatus) bool { return s.Name == name }); i >= 0 {
		life = found[i].Life
	}
	if err := client.Retry(ctx, func(string) error { return p.RemoveServer(ctx, name, life, force) }); err != nil {
		return err
	}
	return c.print(answer{
		doc: struct {
			Removed string `json:"removed"`
		}{name},
		names: []string{name},
		lines: c.paint(c.out).do(styleGood, "Removed.") + " The other servers do not ask " + printable(name) + " any more.\n",
	})
}
