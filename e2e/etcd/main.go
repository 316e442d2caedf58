// Command etcd is a member of an etcd cluster, for tests: the release that go.mod has, nothing added. What its
// tools do with snapshots is here too, as in their release:
//
//	etcd snapshot save URL FILE
//	etcd snapshot restore FILE --data-dir DIR ...
//	etcd snapshot status FILE
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/snapshot"
	"go.etcd.io/etcd/etcdutl/v3/etcdutl"
	"go.etcd.io/etcd/server/v3/etcdmain"
	"go.uber.org/zap"
)

func main() {
	if len(os.Args) < 2 || os.Args[1] != "snapshot" {
		etcdmain.Main(os.Args)
		return
	}
	cmd := etcdutl.NewSnapshotCommand()
	cmd.SetArgs(os.Args[2:])
	cmd.AddCommand(&cobra.Command{
		Use:  "save URL FILE",
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, err := snapshot.SaveWithVersion(cmd.Context(), zap.NewNop(), clientv3.Config{Endpoints: args[:1], DialTimeout: 5 * time.Second}, args[1])
			return err
		},
	})
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := cmd.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
