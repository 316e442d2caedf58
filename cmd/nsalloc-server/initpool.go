package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// initTimeout bounds init-pool.
const initTimeout = 15 * time.Second

func initPoolCommand(stdout io.Writer) *cobra.Command {
	var etcd etcdFlags
	policy := policyFlags{}
	cmd := &cobra.Command{
		Use:   "init-pool --etcd URL,...",
		Short: "Create the pool in an etcd of yours",
		Long: `init-pool creates the pool in an etcd, once. Servers that run there already begin to serve by themselves.

It refuses where the pool exists, and where there are records but no pool: that is a store which has lost
something, and a new pool over it could issue serials again.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(etcd.urls) == 0 {
				return usage("--etcd is missing: which etcd?")
			}
			p, err := policy.policy()
			if err != nil {
				return err
			}
			st, err := etcd.open()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), initTimeout)
			defer cancel()
			pool, err := alloc.NewService(st, nil).InitPool(ctx, p)
			if err := errors.Join(err, st.Close()); err != nil {
				return err
			}
			_, err = fmt.Fprintf(stdout, "pool %s created: %s, generation %d\n", etcd.pool, pool.UUID, pool.Generation)
			return err
		},
	}
	etcd.add(cmd.Flags())
	policy.add(cmd.Flags())
	return cmd
}

// initEmpty creates the pool in an embedded store that holds nothing at all.
func initEmpty(ctx context.Context, st alloc.Store, log *slog.Logger) error {
	pool, err := alloc.NewService(st, nil).InitPool(ctx, alloc.DefaultPolicy())
	switch {
	case errors.Is(err, alloc.ErrPoolExists):
		return nil
	case err != nil:
		return err
	}
	log.InfoContext(ctx, "a pool was created", "uuid", pool.UUID)
	return nil
}
