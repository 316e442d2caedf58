// Package etcdstore keeps a pool's records in etcd: it is the alloc.Store of real pools.
//
// A record is one etcd key, /nsalloc/1/POOL/KIND/ID, and a protobuf message in it (package storepb).
// A Token is the value's exact bytes, compared by etcd inside of the transaction, so that a store
// that was put back to an old snapshot cannot pass for the one that was read: its versions repeat,
// its values do not.
//
// What the store promises rests on three things that are easy to break, each with its reason beside
// it: no write is ever sent twice (Client), a write is called not applied only where etcd's source
// says so (unapplied), and a watch never resumes by itself (Watch).
//
// What a newer version added to a record survives being read and written here; what cannot be carried
// is refused as ErrFormat (store.proto says what is which).
package etcdstore

import (
	"context"
	"fmt"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Limits of one transaction; etcd's defaults. A larger one is refused before it is sent.
const (
	// MaxTxnOps is how many guards, and how many writes, one transaction can have.
	MaxTxnOps = 128
	// MaxTxnBytes is how large it can be, with its guards, which carry whole values.
	MaxTxnBytes = 1536*1024 - 1024 // etcd counts a header of its own too
)

// maxPage is the most records that one List reads.
const maxPage = 1000

// readAgain is the pause before a read is repeated that met an election or a broken connection.
const readAgain = 50 * time.Millisecond

// Store is an alloc.Store over one pool's keys.
type Store struct {
	client *Client
	kv     pb.KVClient
	keys   keys

	mu      sync.Mutex
	watches map[*watch]struct{} // guarded by mu: those that Sync must move on

	own own
}

var _ alloc.Store = (*Store)(nil)

// New is the store of a pool; pool is its name in the keyspace, so that pools can share an etcd.
func New(client *Client, pool string) (*Store, error) {
	if err := alloc.ValidateName("pool name", pool); err != nil {
		return nil, err
	}
	return &Store{
		client:  client,
		kv:      pb.NewKVClient(client.etcd.ActiveConnection()),
		keys:    keys{prefix: root + pool + "/"},
		watches: make(map[*watch]struct{}),
	}, nil
}

// read makes a read, again while etcd has no leader or the connection breaks and the deadline
// allows it. Reads change nothing, so that repeating them is safe.
func read[T any](ctx context.Context, c *Client, call func(context.Context) (T, error)) (T, error) {
	ctx, cancel := c.bound(ctx)
	defer cancel()
	for {
		answer, err := call(ctx)
		if err == nil {
			return answer, nil
		}
		if !isTransient(err) {
			return answer, readError(err)
		}
		select {
		case <-ctx.Done():
			return answer, readError(err)
		case <-time.After(readAgain):
		}
	}
}

// Get implements alloc.Store. Up to MaxTxnOps keys are one transaction of reads; the rest is read at
// its revision.
func (s *Store) Get(ctx context.Context, want ...alloc.Key) ([]alloc.Entry, alloc.Revision, error) {
	ops := make([]*pb.RequestOp, 0, len(want))
	for _, k := range want {
		key, err := s.keys.etcd(k)
		if err != nil {
			return nil, 0, err
		}
		ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: key}}})
	}
	entries := make([]alloc.Entry, 0, len(want))
	var rev int64
	for first := true; first || len(ops) > 0; first = false {
		n := min(len(ops), MaxTxnOps)
		for _, op := range ops[:n] {
			op.GetRequestRange().Revision = rev
		}
		resp, err := read(ctx, s.client, func(ctx context.Context) (*pb.TxnResponse, error) {
			return s.kv.Txn(ctx, &pb.TxnRequest{Success: ops[:n]}, callOptions...)
		})
		if err != nil {
			return nil, 0, err
		}
		if rev == 0 {
			rev = resp.Header.Revision
		}
		for _, r := range resp.Responses {
			e := alloc.Entry{Key: want[len(entries)]}
			if kvs := r.GetResponseRange().GetKvs(); len(kvs) > 0 {
				e = entry(e.Key, kvs[0])
			}
			entries = append(entries, e)
		}
		ops = ops[n:]
	}
	return entries, alloc.Revision(rev), nil
}

func entry(key alloc.Key, kv *mvccpb.KeyValue) alloc.Entry {
	e := alloc.Entry{Key: key, Token: alloc.Token(kv.Value), Revision: alloc.Revision(kv.ModRevision)}
	if e.Record, e.Err = decode(key, kv.Value); e.Err != nil {
		e.Owner = ownerIn(key, kv.Value)
	}
	return e
}

// List implements alloc.Store. etcd keeps keys in the order of their bytes, which is that of the ids.
func (s *Store) List(ctx context.Context, kind alloc.Kind, after string, limit int, at alloc.Revision) ([]alloc.Entry, alloc.Revision, error) {
	if limit < 1 || limit > maxPage {
		return nil, 0, invalid("limit", fmt.Sprintf("%d is not in 1..%d", limit, maxPage))
	}
	first, end, err := s.keys.after(kind, after)
	if err != nil {
		return nil, 0, err
	}
	resp, err := read(ctx, s.client, func(ctx context.Context) (*pb.RangeResponse, error) {
		return s.kv.Range(ctx, &pb.RangeRequest{Key: first, RangeEnd: end, Limit: int64(limit), Revision: int64(at)}, callOptions...)
	})
	if err != nil {
		return nil, 0, err
	}
	entries := make([]alloc.Entry, 0, len(resp.Kvs))
	for _, kv := range resp.Kvs {
		key, ok := s.keys.parse(kv.Key)
		if !ok {
			panic(fmt.Sprintf("etcd answered %q to a range of records of kind %s", kv.Key, kind))
		}
		entries = append(entries, entry(key, kv))
	}
	if at == 0 {
		at = alloc.Revision(resp.Header.Revision)
	}
	return entries, at, nil
}

// Commit implements alloc.Store with one etcd transaction, sent once. A process that dies here leaves
// an unknown outcome to whoever asks next: they find it by reading.
func (s *Store) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	req, err := s.request(tx)
	if err != nil {
		return 0, err
	}
	ctx, cancel := s.client.bound(ctx)
	defer cancel()
	ctx, sent := withSent(ctx)
	resp, err := s.kv.Txn(ctx, req, callOptions...)
	if err != nil {
		if full := s.full(ctx, req, err); full != nil {
			return 0, full
		}
		return 0, commitError(err, sent.Load())
	}
	if !resp.Succeeded {
		return 0, &alloc.Error{Reason: alloc.ReasonConflict, Subject: "store transaction",
			Msg: "a record changed since it was read, nothing was written", RetryAfter: retrySoon}
	}
	return alloc.Revision(resp.Header.Revision), nil
}

// request is the etcd transaction of tx. It refuses here what etcd would refuse, where nothing was
// sent yet and the answer cannot be lost.
func (s *Store) request(tx alloc.Tx) (*pb.TxnRequest, error) {
	if n := max(len(tx.Guards), len(tx.Put)+len(tx.Delete)+len(tx.DeleteSpans)); n > MaxTxnOps {
		return nil, tooLarge(fmt.Sprintf("%d operations, etcd takes %d", n, MaxTxnOps))
	}
	req := new(pb.TxnRequest)
	for _, g := range tx.Guards {
		key, err := s.keys.etcd(g.Key)
		if err != nil {
			return nil, err
		}
		req.Compare = append(req.Compare, compare(key, g.Token))
	}
	seen := make(map[alloc.Key]bool)
	write := func(k alloc.Key) ([]byte, error) {
		if seen[k] {
			return nil, invalid("key "+k.String(), "it stands twice in one transaction")
		}
		seen[k] = true
		return s.keys.etcd(k)
	}
	s.mu.Lock()
	watched := len(s.watches) > 0
	s.mu.Unlock()
	for _, rec := range tx.Put {
		key, err := write(rec.Key())
		if err != nil {
			return nil, err
		}
		value, err := encode(rec)
		if err != nil {
			return nil, err
		}
		if sb, ok := rec.(*alloc.Sandbox); ok && watched {
			s.own.remember(value, sb)
		}
		req.Success = append(req.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{
			RequestPut: &pb.PutRequest{Key: key, Value: value}}})
	}
	for _, k := range tx.Delete {
		key, err := write(k)
		if err != nil {
			return nil, err
		}
		req.Success = append(req.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{
			RequestDeleteRange: &pb.DeleteRangeRequest{Key: key}}})
	}
	for _, span := range tx.DeleteSpans {
		for k := range seen {
			if k.Kind == span.Kind && k.ID > span.After && k.ID <= span.Through {
				return nil, invalid("key "+k.String(), "it stands twice in one transaction")
			}
		}
		if span.Through <= span.After {
			continue // etcd calls an empty range an error
		}
		first, _, err := s.keys.after(span.Kind, span.After)
		if err != nil {
			return nil, err
		}
		through, _, _ := s.keys.after(span.Kind, span.Through) // the first key that is not in the span
		req.Success = append(req.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{
			RequestDeleteRange: &pb.DeleteRangeRequest{Key: first, RangeEnd: through}}})
	}
	if n := proto.Size(req); n > MaxTxnBytes {
		return nil, tooLarge(fmt.Sprintf("%d bytes, etcd takes %d", n, MaxTxnBytes))
	}
	return req, nil
}

// Token implements alloc.Store.
func (s *Store) Token(rec alloc.Record) (alloc.Token, error) {
	value, err := encode(rec)
	return alloc.Token(value), err
}

func tooLarge(msg string) *alloc.Error {
	return &alloc.Error{Reason: alloc.ReasonTooLarge, Subject: "store transaction", Msg: msg + ", nothing was written", Fix: "split it"}
}

// compare is the condition that a key has a token's value. No value is "" (encode sees to it), so
// that "" can stand for absence, and absence is asked for by creation: comparing the value of an
// absent key is false in etcd, whatever the value.
func compare(key []byte, t alloc.Token) *pb.Compare {
	if t == "" {
		return &pb.Compare{Key: key, Result: pb.Compare_EQUAL, Target: pb.Compare_CREATE,
			TargetUnion: &pb.Compare_CreateRevision{CreateRevision: 0}}
	}
	return &pb.Compare{Key: key, Result: pb.Compare_EQUAL, Target: pb.Compare_VALUE,
		TargetUnion: &pb.Compare_Value{Value: []byte(t)}}
}

// revision is the store's newest revision, by a linearizable read.
func (s *Store) revision(ctx context.Context) (int64, error) {
	key, err := s.keys.etcd(alloc.Key{Kind: alloc.KindPool})
	if err != nil {
		return 0, err
	}
	resp, err := read(ctx, s.client, func(ctx context.Context) (*pb.RangeResponse, error) {
		return s.kv.Range(ctx, &pb.RangeRequest{Key: key, CountOnly: true}, callOptions...)
	})
	if err != nil {
		return 0, err
	}
	return resp.Header.Revision, nil
}
