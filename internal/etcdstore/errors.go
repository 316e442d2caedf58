package etcdstore

import (
	"errors"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

const retrySoon = 200 * time.Millisecond

func invalid(subject, msg string) *alloc.Error {
	return &alloc.Error{Reason: alloc.ReasonInvalid, Subject: subject, Msg: msg}
}

func unavailable(subject, msg string, err error) *alloc.Error {
	return &alloc.Error{Reason: alloc.ReasonUnavailable, Subject: subject, Msg: msg, Err: err, RetryAfter: retrySoon,
		Fix: orElse(fix(err), "check that etcd runs, is reached, and has room on its disk (its log says why it ended); try again")}
}

// fix is what an operator can do about an error of etcd.
func fix(err error) string {
	switch err := rpctypes.Error(err); {
	case errors.Is(err, rpctypes.ErrNoSpace):
		return "compact and defragment etcd or raise its quota, then disarm its NOSPACE alarm: docs/install.md, \"When a disk is full\""
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		return "grant this etcd user read and write on the prefix " + root
	case errors.Is(err, rpctypes.ErrInvalidAuthToken), errors.Is(err, rpctypes.ErrUserEmpty), errors.Is(err, rpctypes.ErrAuthFailed):
		return "check the user, or the client certificate, for etcd"
	case errors.Is(err, rpctypes.ErrNoLeader):
		return "wait for an election, or bring etcd's majority back"
	case errors.Is(err, rpctypes.ErrCorrupt):
		return "find the corrupt member of etcd with its hashkv and replace it"
	}
	return ""
}

// unapplied are the answers that etcd gives to a transaction that it has not applied and never will.
// Each was looked up in etcd 3.7's server; whatever is not here is an unknown outcome.
//
// Not here, though it looks so: ErrNoSpace. quotaApplierV3.Txn (etcdserver/apply/quota.go) applies
// the transaction and then answers ErrNoSpace; Store.full asks which it was. Neither are ErrStopped, ErrLeaderChanged and the
// ErrTimeouts: they end the wait for a proposal that was made (processInternalRaftRequestOnce in
// etcdserver/v3_server.go). Nor ErrCorrupt: one member refuses, others may apply.
var unapplied = []error{
	// interceptor.go in etcdserver/api/v3rpc, before the handler is called.
	rpctypes.ErrNoLeader,
	rpctypes.ErrNotCapable,
	rpctypes.Error(rpctypes.ErrGRPCNotSupportedForLearner),
	// processInternalRaftRequestOnce, before the proposal is made.
	rpctypes.ErrTooManyRequests,
	rpctypes.ErrInvalidAuthToken,
	// The checks that authApplierV3 (etcdserver/apply/auth.go) makes before it applies; users and
	// roles are replicated state, so every member refuses alike.
	rpctypes.ErrUserEmpty,
	rpctypes.ErrPermissionDenied,
	rpctypes.ErrAuthOldRevision,
}

// commitError classifies the error of a transaction.
func commitError(err error, onWire bool) *alloc.Error {
	const subject = "store transaction"
	known := rpctypes.Error(err)
	switch {
	case !onWire:
		// No connection took the request before the deadline, or its context had ended already.
		return unavailable(subject, "the store was not reached, nothing was written", err)
	case errors.Is(known, rpctypes.ErrTooManyOps), errors.Is(known, rpctypes.ErrRequestTooLarge):
		// checkTxnRequest in v3rpc/key.go and processInternalRaftRequestOnce, both before proposing.
		return &alloc.Error{Reason: alloc.ReasonTooLarge, Subject: subject, Msg: "etcd is configured to take less, nothing was written", Err: err,
			Fix: "set etcd's --max-txn-ops and --max-request-bytes to their defaults at least"}
	}
	for _, definite := range unapplied {
		if errors.Is(known, definite) {
			return unavailable(subject, "etcd refused it, nothing was written", err)
		}
	}
	return &alloc.Error{Reason: alloc.ReasonUnknownOutcome, Subject: subject, Msg: "the answer was lost: it was committed, or not, or will be", Err: err,
		Fix: orElse(fix(err), "read back what it wrote"), RetryAfter: retrySoon}
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

// readError classifies the error of a read.
func readError(err error) *alloc.Error {
	known := rpctypes.Error(err)
	if errors.Is(known, rpctypes.ErrCompacted) || errors.Is(known, rpctypes.ErrFutureRev) {
		// A revision of the future is one that a store had before it was put back.
		return gone(err)
	}
	return unavailable("store read", "the store did not answer", err)
}

// gone is the answer to who reads, or watches, from a revision that the store does not have any more.
func gone(err error) *alloc.Error {
	return &alloc.Error{Reason: alloc.ReasonConflict, Subject: "store revision", Msg: "the store has it no more", Err: err,
		Fix: "list again from the newest", RetryAfter: retrySoon}
}

// isTransient reports whether a read may find the store in order a moment later: elections, lost
// connections, members that stop.
func isTransient(err error) bool { return status.Code(err) == codes.Unavailable }
