package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

func (c *cli) poolPolicyCommand() *cobra.Command {
	return group("policy", "The pool's policy: what unusual restores get, and how much a host gets", c.policyListCommand(), c.policySetCommand())
}

func (c *cli) policyListCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List the policy's fields with their values",
		Example: "  nsalloc pool policy list",
		Args:    usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withPool(cmd.Context(), func(ctx context.Context, p *client.Client) error {
				pool, _, err := p.Pool(ctx)
				if err != nil {
					return err
				}
				return c.printPolicy(pool)
			})
		},
	}
}

func (c *cli) policySetCommand() *cobra.Command {
	var fields strings.Builder
	for _, f := range alloc.PolicyFields() {
		fmt.Fprintf(&fields, "  %-15s  %s\n", f.Name, wrap(f.What, 80, 19))
	}
	return &cobra.Command{
		Use:   "set NAME=VALUE...",
		Short: "Set fields of the policy",
		Long: `Set fields of the pool's policy, all in one step; those that are not named stay:

` + fields.String() + `
It holds for what is asked for from then on, at all servers. What was decided before stays as it is.`,
		Example: `  nsalloc pool policy set host-quota=33554432
  nsalloc pool policy set live=refuse over=clone`,
		Args: usageArgs(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			set := map[string]string{}
			for _, arg := range args {
				name, value, ok := strings.Cut(arg, "=")
				if _, twice := set[name]; !ok || twice {
					return usage("%q is not NAME=VALUE, each NAME once; nsalloc pool policy list shows them", arg)
				}
				set[name] = value
			}
			return c.withPool(cmd.Context(), func(ctx context.Context, p *client.Client) error {
				var pool *alloc.Pool
				err := client.Retry(ctx, func(id string) (err error) {
					pool, err = p.SetPolicy(ctx, alloc.SetPolicyCommand{RequestID: id, Fields: set})
					return err
				})
				if err != nil {
					return err
				}
				return c.printPolicy(pool)
			})
		},
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			var names []string
			for _, f := range alloc.PolicyFields() {
				names = append(names, f.Name+"=")
			}
			return names, cobra.ShellCompDirectiveNoSpace | cobra.ShellCompDirectiveNoFileComp
		},
	}
}

func (c *cli) printPolicy(pool *alloc.Pool) error {
	if pool == nil {
		return errMissing("pool")
	}
	a := answer{doc: policyView(pool.Policy)}
	for _, f := range alloc.PolicyFields() {
		a.names = append(a.names, f.Name+"="+f.Of(pool.Policy))
	}
	a.table = func() *table {
		t := newTable("FIELD", "VALUE", "MEANING")
		for _, f := range alloc.PolicyFields() {
			t.row(in(styleKey, f.Name), f.Of(pool.Policy), f.What)
		}
		return t
	}
	return c.print(a)
}
