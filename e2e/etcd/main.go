// Command etcd is a member of an etcd cluster, for tests: the release that go.mod has, nothing added.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
