// Command nsalloc-server is the pool's service: it hands out serials and keeps the records of who has
// them, in an etcd.
//
//	nsalloc-server                          an etcd of its own, in --data-dir; for one server
//	nsalloc-server --etcd URL,...           a cluster of yours; as many servers as you like
//	nsalloc-server init-pool --etcd URL,... create the pool there, once
//
// It ties packages together and holds no rules: the service is internal/server, the store
// internal/etcdstore. What it can be told stands in config.go, how it starts and ends in serve.go.
//
// It exits with 0 when it was told to end, 1 on an error, 2 on wrong usage, 4 when there is a pool
// already, 5 when the store is not reached.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// version is set by the build.
var version = "dev"

func main() {
	tuneHeap()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends it at once
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "nsalloc-server:", err)
	}
	os.Exit(exitCode(err))
}

// run is the whole command; it returns when ctx has ended and everything is closed.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	root := command(stdout, stderr)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	return root.ExecuteContext(ctx)
}

// usageError is a command line that cannot be meant.
type usageError struct{ error }

func (u usageError) Unwrap() error { return u.error }

func usage(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

func exitCode(err error) int {
	if err == nil {
		return 0
	}
	if _, ok := errors.AsType[usageError](err); ok {
		return 2
	}
	switch alloc.ReasonOf(err) {
	case alloc.ReasonInvalid:
		return 2
	case alloc.ReasonPoolExists, alloc.ReasonConflict:
		return 4
	case alloc.ReasonUnavailable, alloc.ReasonUnknownOutcome, alloc.ReasonRecovering:
		return 5
	}
	return 1
}
