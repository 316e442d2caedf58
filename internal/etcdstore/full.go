package etcdstore

import (
	"bytes"
	"context"
	"errors"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// retryFull is the pause that a caller is asked to make whom a full store refused: space takes an operator.
const retryFull = time.Second

// full finds out what became of a transaction that etcd answered with ErrNoSpace. It gives the refusal when
// that was not applied, and nil when it was, or may have been, or when the error is another one.
//
// Such an answer is final, unlike a lost one: a member gives it before it proposes the transaction (quotaKVServer in
// v3rpc/quota.go), or after it was applied or passed over (quotaApplierV3 and applierV3Capped in etcdserver/apply).
// So if what the transaction compares is as it was, and it would have changed some of that, nothing was written and
// nothing will be. Who only learned that the outcome is unknown would try until the deadline.
func (s *Store) full(ctx context.Context, req *pb.TxnRequest, err error) error {
	if !errors.Is(rpctypes.Error(err), rpctypes.ErrNoSpace) || !changesGuarded(req) {
		return nil
	}
	asked, readErr := read(ctx, s.client, func(ctx context.Context) (*pb.TxnResponse, error) {
		return s.kv.Txn(ctx, &pb.TxnRequest{Compare: req.Compare}, callOptions...) // changes nothing: a full etcd takes it
	})
	if readErr != nil || !asked.Succeeded {
		return nil
	}
	return &alloc.Error{Reason: alloc.ReasonUnavailable, Subject: "store transaction", Msg: "etcd's database is full (its NOSPACE alarm): it is read, and takes no writes; nothing was written",
		Err: err, Fix: fix(err), RetryAfter: retryFull}
}

// changesGuarded reports whether a transaction compares something that it changes.
func changesGuarded(req *pb.TxnRequest) bool {
	guards := make(map[string]*pb.Compare, len(req.Compare))
	for _, c := range req.Compare {
		guards[string(c.Key)] = c
	}
	for _, op := range req.Success {
		put := op.GetRequestPut()
		if put == nil {
			continue
		}
		if c := guards[string(put.Key)]; c != nil && (c.Target == pb.Compare_CREATE || !bytes.Equal(c.GetValue(), put.Value)) {
			return true
		}
	}
	return false
}
