// Command nsalloc is what people use: it shows who lives where under which serial, checks a host and a
// pool, and installs the hook.
//
// It holds no rules. What it shows comes from a server (the pool) or from the host's agent (the
// processes here); what it checks is pkg/alloc's Check. So its files are verbs: how an answer is asked
// for and how it is written.
//
// Everything that a verb touches outside of itself hangs on one value, cli: tests run the whole command
// in process, with writers of their own.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/nsalloc/nsalloc/internal/testhost"
)

// version is set by the build.
var version = "dev"

func main() {
	testhost.Main() // the demo's hosts are this binary, executed again
	ends := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // nohup is to keep its meaning
		ends = append(ends, syscall.SIGHUP) // a terminal that is closed leaves no daemons and hosts behind
	}
	ctx, stop := signal.NotifyContext(context.Background(), ends...)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
