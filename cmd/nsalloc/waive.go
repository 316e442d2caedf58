package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

func (c *cli) hostWaiveCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "waive NAME",
		Short: "Say that a host is gone for good, so that nobody waits for it",
		Long: `Say that a host is gone for good, so that nobody waits for it after the pool's store has lost history.

Each host then says what lives on it. Until all have, images of before are not restored: a host that is away may have
restored them after the snapshot was taken. nsalloc pool status names the hosts that are waited for.

It holds for the pool's generation. If the host comes back after all, it says what lives on it as any other one, and
what has gone on elsewhere meanwhile becomes a clone there, under fresh serials.`,
		Example: "  nsalloc host waive c",
		Args:    usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.withPool(cmd.Context(), func(ctx context.Context, p *client.Client) error {
				return c.hostWaive(ctx, p, args[0])
			})
		},
	}
}

func (c *cli) hostWaive(ctx context.Context, p *client.Client, name string) error {
	var host *alloc.Host
	var waitsFor []string
	err := client.Retry(ctx, func(id string) (err error) {
		host, waitsFor, err = p.Waive(ctx, alloc.WaiveCommand{RequestID: id, Host: name})
		return err
	})
	if err != nil {
		return err
	}
	if host == nil {
		return errMissing("host")
	}
	lines := c.paint(c.out).do(styleGood, "Waived.") + " Nobody waits for " + printable(host.Name) + " any more"
	if len(waitsFor) > 0 {
		lines += "; the pool still waits for " + printable(namesOf(waitsFor))
	}
	return c.print(answer{
		doc: struct {
			Waived   string   `json:"waived"`
			WaitsFor []string `json:"waits_for"`
		}{host.Name, append([]string{}, waitsFor...)},
		names: []string{host.Name},
		lines: lines + ".\n",
	})
}

// unsettled are the hosts that have not said in the pool's generation what lives on them; none where nobody asks them.
func unsettled(ctx context.Context, p *client.Client, pool *alloc.Pool) (names []string, err error) {
	if pool.IsSettled() {
		return nil, nil
	}
	for h, err := range p.Hosts(ctx) {
		switch {
		case errors.Is(err, client.ErrIncomplete): // what cannot be read has not said anything either, and check names it
		case err != nil:
			return nil, err
		case max(h.Settled, h.Waived) < pool.Generation:
			names = append(names, h.Name)
		}
	}
	return names, nil
}

// namesOf is a list of names for a sentence.
func namesOf(names []string) string {
	const most = 5
	switch n := len(names); {
	case n == 0:
		return "its servers, which are about to note that every host has come"
	case n > most:
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), n-most)
	}
	return strings.Join(names, ", ")
}
