package server

import (
	"context"
	"path"

	"google.golang.org/grpc"

	"github.com/nsalloc/nsalloc/internal/killpoint"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// mortal is the store of a server that tests can end around each commit of an RPC, and whose answers they
// can lose: the outcome is unknown then, although it was committed. It stands in binaries with kill points
// only.
type mortal struct{ alloc.Store }

func (m mortal) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	method, ok := grpc.Method(ctx)
	if !ok {
		// The server's own: the pool's first records, and housekeeping (package killpoint).
		return m.Store.Commit(ctx, tx)
	}
	rpc := path.Base(method)
	killpoint.At(killpoint.ServerCommitting.Of(rpc))
	rev, err := m.Store.Commit(ctx, tx)
	if err != nil {
		return rev, err
	}
	killpoint.At(killpoint.ServerCommitted.Of(rpc))
	if killpoint.Lose(rpc) {
		return 0, &alloc.Error{Reason: alloc.ReasonUnknownOutcome, Subject: "store transaction", Msg: "a test lost the answer"}
	}
	return rev, nil
}
