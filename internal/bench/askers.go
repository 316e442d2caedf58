package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// openers connect the callers of a process, in the ways in which one can ask. Connections end with the
// process.
var openers = map[string]func(context.Context, job) ([]asker, error){
	"nsalloc":        openNsalloc,
	"unary":          openUnary,
	"stream":         openStream,
	"stream-plain":   openPlainStream,
	"stream-batch":   openStreamBatches,
	"fsync":          openFsync,
	"atomic":         openAtomic,
	"counter":        openCounter,
	"put":            openPut,
	"owner":          openOwner,
	"redis":          openRedis,
	"redis-gathered": openRedisGathered,
	"postgres":       openPostgres,
	"register":       openRegister,
	"etcd-register":  openEtcdRegister,
}

// each opens one asker a caller.
func each(j job, open func(i int) (asker, error)) ([]asker, error) {
	askers := make([]asker, j.Callers)
	for i := range askers {
		ask, err := open(i)
		if err != nil {
			return nil, err
		}
		askers[i] = ask
	}
	return askers, nil
}

// all gives one asker to all callers.
func all(j job, ask asker) []asker {
	askers := make([]asker, j.Callers)
	for i := range askers {
		askers[i] = ask
	}
	return askers
}

// openNsalloc is what programs of our users do.
func openNsalloc(_ context.Context, j job) ([]asker, error) {
	open := func(int) (asker, error) {
		c, err := client.Dial(j.Address)
		if err != nil {
			return nil, err
		}
		return serials(c), nil
	}
	if !j.Shared {
		return each(j, open)
	}
	ask, err := open(0)
	return all(j, ask), err
}

func serials(c *client.Client) asker {
	return func(ctx context.Context) (uint64, error) {
		got, err := c.Serials(ctx, 1)
		if err == nil && got.Count() != 1 {
			err = fmt.Errorf("the answer is %v", got)
		}
		return 1, err
	}
}

// adds is how many atomic adds are one call: a clock read for each would be what is measured.
const adds = 10_000

func openAtomic(_ context.Context, j job) ([]asker, error) {
	var next atomic.Uint64
	return all(j, func(context.Context) (uint64, error) {
		for range adds {
			next.Add(1)
		}
		return adds, nil
	}), nil
}

func dialEtcd(ctx context.Context, address string) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{Context: ctx, Endpoints: []string{address}, Logger: zap.NewNop()})
}

func number(n uint64) string { return string(binary.BigEndian.AppendUint64(nil, n)) }

const counterKey = "counter"

// openCounter is what everybody writes first: write the next number if the counter is still the one before.
// A write that failed brings the value that is there, so that nothing is read besides.
func openCounter(ctx context.Context, j job) ([]asker, error) {
	return each(j, func(int) (asker, error) {
		c, err := dialEtcd(ctx, j.Address)
		if err != nil {
			return nil, err
		}
		known := number(0)
		if _, err := c.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(counterKey), "=", 0)).
			Then(clientv3.OpPut(counterKey, known)).Commit(); err != nil {
			return nil, err
		}
		return func(ctx context.Context) (uint64, error) {
			for {
				next := number(binary.BigEndian.Uint64([]byte(known)) + 1)
				resp, err := c.Txn(ctx).If(clientv3.Compare(clientv3.Value(counterKey), "=", known)).
					Then(clientv3.OpPut(counterKey, next)).Else(clientv3.OpGet(counterKey)).Commit()
				if err != nil {
					return 0, err
				}
				if resp.Succeeded {
					known = next
					return 1, nil
				}
				known = string(resp.Responses[0].GetResponseRange().Kvs[0].Value)
			}
		}, nil
	})
}

// openPut has etcd number its revisions, and takes those.
func openPut(ctx context.Context, j job) ([]asker, error) {
	return each(j, func(int) (asker, error) {
		c, err := dialEtcd(ctx, j.Address)
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context) (uint64, error) {
			resp, err := c.Put(ctx, "put", "")
			if err == nil && resp.Header.Revision == 0 {
				err = errors.New("no revision")
			}
			return 1, err
		}, nil
	})
}

// openOwner has one owner of a counter take as many as wait in one transaction. It owns its counter alone,
// so that it need not read it.
func openOwner(ctx context.Context, j job) ([]asker, error) {
	c, err := dialEtcd(ctx, j.Address)
	if err != nil {
		return nil, err
	}
	key := "owner/" + client.NewRequestID()
	next := uint64(1 << 48)
	if _, err := c.Put(ctx, key, number(next)); err != nil {
		return nil, err
	}
	return openGathered(j, func(ctx context.Context, req *nsallocv1.AllocateRequest) (uint64, error) {
		first := next
		resp, err := c.Txn(ctx).If(clientv3.Compare(clientv3.Value(key), "=", number(first))).
			Then(clientv3.OpPut(key, number(first+req.GetCount()))).Commit()
		if err != nil {
			return 0, err
		}
		if !resp.Succeeded {
			return 0, errors.New("somebody else wrote this owner's counter")
		}
		next += req.GetCount()
		return first, nil
	})
}
