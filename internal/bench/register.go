package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/nsalloc/nsalloc/internal/etcdstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// spent is how many serials one request of alloc.MaxRegister sandboxes with one namespace of each type takes.
var spent = uint64(alloc.MaxRegister * (1 + len(alloc.NamespaceTypes())))

// registrations are a host that registers sandboxes, as its agent does.
type registrations struct {
	mutation alloc.Mutation
	bootID   string
	left     alloc.Ranges
	kernel   uint64 // id of the last namespace
}

// hellos of a client, or of the service itself.
type registrar interface {
	Hello(context.Context, alloc.HelloCommand) (*alloc.Host, *alloc.Pool, error)
	Grant(context.Context, alloc.GrantCommand) (alloc.Ranges, error)
	Register(context.Context, alloc.RegisterCommand) ([]*alloc.Sandbox, alloc.Ranges, error)
}

func hello(ctx context.Context, pool registrar, host string) (*registrations, error) {
	r := &registrations{bootID: client.NewRequestID()}
	h, _, err := pool.Hello(ctx, alloc.HelloCommand{RequestID: client.NewRequestID(), Host: host, BootID: r.bootID, Nonce: client.NewRequestID()})
	if err != nil {
		return nil, err
	}
	r.mutation = alloc.Mutation{Host: host, Incarnation: h.Incarnation}
	return r, nil
}

// register is one request.
func (r *registrations) register(ctx context.Context, pool registrar) (uint64, error) {
	spend, _, ok := r.left.Take(spent)
	if !ok {
		grant := alloc.GrantCommand{Mutation: r.mutation, Count: alloc.MaxAllocate}
		grant.RequestID = client.NewRequestID()
		left, err := pool.Grant(ctx, grant)
		if err != nil {
			return 0, err
		}
		r.left = left
		if spend, _, ok = r.left.Take(spent); !ok {
			return 0, fmt.Errorf("a grant of %d left %v", grant.Count, left)
		}
	}
	cmd := alloc.RegisterCommand{Mutation: r.mutation, Spend: spend}
	cmd.RequestID = client.NewRequestID()
	serials := slices.Collect(spend.All())
	for len(serials) > 0 {
		item := alloc.RegisterItem{Sandbox: serials[0]}
		for i, t := range alloc.NamespaceTypes() {
			r.kernel++
			item.Add = append(item.Add, alloc.Binding{Serial: serials[1+i], Type: t,
				Kernel: alloc.KernelID{BootID: r.bootID, ID: r.kernel, Inode: 4_026_531_840 + r.kernel%100_000}})
		}
		cmd.Items, serials = append(cmd.Items, item), serials[1+len(item.Add):]
	}
	made, left, err := pool.Register(ctx, cmd)
	if err != nil {
		return 0, err
	}
	r.left = left
	return uint64(len(made)), nil
}

func openRegister(ctx context.Context, j job) ([]asker, error) {
	return each(j, func(i int) (asker, error) {
		host := fmt.Sprintf("%s-%d", j.Name, i)
		c, err := client.Dial(j.Address, client.WithHost(host))
		if err != nil {
			return nil, err
		}
		r, err := hello(ctx, c, host)
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context) (uint64, error) { return r.register(ctx, c) }, nil
	})
}

// transaction is the shape of one that registered sandboxes: how large the values are that it compares and
// writes. Nothing else of them matters to etcd.
type transaction struct {
	Constant []int `json:"constant"` // compared, and not written
	Own      []int `json:"own"`      // compared and written, by the same caller each time
	Fresh    []int `json:"fresh"`    // written where nothing was
	Blind    []int `json:"blind"`    // written without a comparison
}

// recorder is a store that keeps the last transaction.
type recorder struct {
	alloc.Store
	last alloc.Tx
}

func (r *recorder) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	r.last = tx
	return r.Store.Commit(ctx, tx)
}

// warmHost is how many requests a host has made before its record is as large as it stays.
const warmHost = alloc.KeptRequests + 1

// recordRegistration has the service itself register in an etcd, and is the shape of its transaction.
func recordRegistration(ctx context.Context, address string) (tx *transaction, err error) {
	c, err := etcdstore.Dial(etcdstore.Config{Endpoints: []string{address}})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	st, err := etcdstore.New(c, "recorded")
	if err != nil {
		return nil, err
	}
	rec := &recorder{Store: st}
	pool := alloc.NewService(rec, nil)
	if _, err := pool.InitPool(ctx, alloc.DefaultPolicy()); err != nil {
		return nil, err
	}
	host, err := hello(ctx, pool, "host-0")
	if err != nil {
		return nil, err
	}
	for range warmHost {
		if _, err := host.register(ctx, pool); err != nil {
			return nil, err
		}
	}
	puts := map[alloc.Key]int{}
	for _, r := range rec.last.Put {
		value, err := st.Token(r)
		if err != nil {
			return nil, err
		}
		puts[r.Key()] = len(value)
	}
	tx = new(transaction)
	for _, g := range rec.last.Guards {
		size, written := puts[g.Key]
		delete(puts, g.Key)
		switch {
		case !written:
			tx.Constant = append(tx.Constant, len(g.Token))
		case g.Token == "":
			tx.Fresh = append(tx.Fresh, size)
		default:
			tx.Own = append(tx.Own, size)
		}
	}
	for _, size := range puts {
		tx.Blind = append(tx.Blind, size)
	}
	if len(tx.Fresh) != alloc.MaxRegister {
		return nil, fmt.Errorf("a registration of %d sandboxes wrote %d new records", alloc.MaxRegister, len(tx.Fresh))
	}
	return tx, nil
}

// openEtcdRegister makes transactions like the recorded one, without asking anybody.
func openEtcdRegister(ctx context.Context, j job) ([]asker, error) {
	return each(j, func(i int) (asker, error) {
		c, err := dialEtcd(ctx, j.Address)
		if err != nil {
			return nil, err
		}
		mine := client.NewRequestID()[:18] // as long as ours are: a pool, a kind and a serial
		key := func(kind string, n uint64) string { return fmt.Sprintf("/%s/%s/%016x", mine, kind, n) }
		value := func(n uint64, size int) string { return fmt.Sprintf("%016x", n) + strings.Repeat("v", max(size-16, 0)) }
		for k, size := range j.Like.Constant {
			if _, err := c.Put(ctx, key("const", uint64(k)), value(0, size)); err != nil {
				return nil, err
			}
		}
		for k, size := range j.Like.Own {
			if _, err := c.Put(ctx, key("own", uint64(k)), value(0, size)); err != nil {
				return nil, err
			}
		}
		var turn, made uint64
		return func(ctx context.Context) (uint64, error) {
			var cmps []clientv3.Cmp
			var puts []clientv3.Op
			for k, size := range j.Like.Constant {
				cmps = append(cmps, clientv3.Compare(clientv3.Value(key("const", uint64(k))), "=", value(0, size)))
			}
			for k, size := range j.Like.Own {
				cmps = append(cmps, clientv3.Compare(clientv3.Value(key("own", uint64(k))), "=", value(turn, size)))
				puts = append(puts, clientv3.OpPut(key("own", uint64(k)), value(turn+1, size)))
			}
			for _, size := range j.Like.Fresh {
				made++
				cmps = append(cmps, clientv3.Compare(clientv3.CreateRevision(key("new", made)), "=", 0))
				puts = append(puts, clientv3.OpPut(key("new", made), value(made, size)))
			}
			for _, size := range j.Like.Blind {
				made++
				puts = append(puts, clientv3.OpPut(key("new", made), value(made, size)))
			}
			turn++
			resp, err := c.Txn(ctx).If(cmps...).Then(puts...).Commit()
			if err == nil && !resp.Succeeded {
				err = errors.New("a comparison failed that nobody else can have changed")
			}
			return uint64(len(j.Like.Fresh)), err
		}, nil
	})
}
