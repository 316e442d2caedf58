package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// openUnary is gRPC and nothing of ours, with messages as large as ours.
func openUnary(_ context.Context, j job) ([]asker, error) {
	return each(j, func(int) (asker, error) {
		conn, err := grpc.NewClient("dns:///"+j.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return nil, err
		}
		stub, req := nsallocv1.NewAllocatorClient(conn), &nsallocv1.AllocateRequest{RequestId: client.NewRequestID(), Count: 1}
		return func(ctx context.Context) (uint64, error) {
			resp, err := stub.Allocate(ctx, req)
			if err != nil {
				return 0, err
			}
			_, err = firstOf(resp, req)
			return 1, err
		}, nil
	})
}

// openGathered is one client of ours for all callers, whose requests do not go where they would, but to
// answer: so that the gathering is the same wherever callers are gathered, and one request is on its way at
// a time. answer takes count ids and returns the first.
func openGathered(j job, answer func(ctx context.Context, req *nsallocv1.AllocateRequest) (first uint64, err error)) ([]asker, error) {
	instead := func(ctx context.Context, _ string, req, reply any, _ *grpc.ClientConn, _ grpc.UnaryInvoker, _ ...grpc.CallOption) error {
		r := req.(*nsallocv1.AllocateRequest)
		id, err := answer(ctx, r)
		if err != nil {
			return err
		}
		reply.(*nsallocv1.AllocateResponse).Ranges = []*nsallocv1.Range{{First: id, Count: r.GetCount()}}
		return nil
	}
	c, err := client.Dial("localhost:1", client.WithDialOptions(grpc.WithChainUnaryInterceptor(instead))) // nobody connects
	return all(j, serials(c)), err
}

// echoOver asks the stream echo, a message at a time.
func echoOver(ctx context.Context, address string) (func(*nsallocv1.AllocateRequest) (first uint64, err error), error) {
	conn, err := grpc.NewClient("dns:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	stream, err := conn.NewStream(ctx, &streamDesc, streamMethod)
	if err != nil {
		return nil, err
	}
	return func(req *nsallocv1.AllocateRequest) (uint64, error) {
		if err := stream.SendMsg(req); err != nil {
			return 0, err
		}
		resp := new(nsallocv1.AllocateResponse)
		if err := stream.RecvMsg(resp); err != nil {
			return 0, err
		}
		return firstOf(resp, req)
	}, nil
}

// openStream gathers into the messages of one stream.
func openStream(ctx context.Context, j job) ([]asker, error) {
	echo, err := echoOver(ctx, j.Address)
	if err != nil {
		return nil, err
	}
	return openGathered(j, func(_ context.Context, req *nsallocv1.AllocateRequest) (uint64, error) { return echo(req) })
}

// plainBatch is how many a message of a plain stream asks for at most.
const plainBatch = 1000

// openPlainStream gathers with channels and without our client: what a program writes that has a stream.
func openPlainStream(ctx context.Context, j job) ([]asker, error) {
	echo, err := echoOver(ctx, j.Address)
	if err != nil {
		return nil, err
	}
	waiting := make(chan chan uint64, j.Callers)
	failed := make(chan error, 1)
	go func() {
		var batch []chan uint64
		for {
			batch = append(batch[:0], <-waiting)
		more:
			for len(batch) < plainBatch {
				select {
				case answer := <-waiting:
					batch = append(batch, answer)
				default:
					break more
				}
			}
			first, err := echo(&nsallocv1.AllocateRequest{RequestId: client.NewRequestID(), Count: uint64(len(batch))})
			if err != nil {
				failed <- err
				return
			}
			for i, answer := range batch {
				answer <- first + uint64(i)
			}
		}
	}()
	return each(j, func(int) (asker, error) {
		answer := make(chan uint64, 1)
		return func(ctx context.Context) (uint64, error) {
			waiting <- answer
			select {
			case <-answer:
				return 1, nil
			case err := <-failed:
				failed <- err
				return 0, err
			case <-ctx.Done():
				return 0, context.Cause(ctx)
			}
		}, nil
	})
}

// openStreamBatches asks for many in each message, and nobody waits for one of them.
func openStreamBatches(ctx context.Context, j job) ([]asker, error) {
	return each(j, func(int) (asker, error) {
		echo, err := echoOver(ctx, j.Address)
		return func(context.Context) (uint64, error) {
			_, err := echo(&nsallocv1.AllocateRequest{RequestId: client.NewRequestID(), Count: plainBatch})
			return plainBatch, err
		}, err
	})
}

const (
	syncedBytes = 2 << 10  // about what a small transaction of etcd's log is
	syncedFile  = 64 << 20 // as long as a file of that log, and there from the beginning like it
)

// openFsync writes one block after the other to a file, each synced, as a log does.
func openFsync(_ context.Context, j job) ([]asker, error) {
	return each(j, func(i int) (asker, error) {
		f, err := os.Create(filepath.Join(j.Dir, fmt.Sprintf("%s-%d", j.Name, i)))
		if err != nil {
			return nil, err
		}
		if err := os.Remove(f.Name()); err != nil { // it ends with this process
			return nil, err
		}
		if err := unix.Fallocate(int(f.Fd()), 0, 0, syncedFile); err != nil {
			return nil, err
		}
		block, at := make([]byte, syncedBytes), int64(0)
		return func(context.Context) (uint64, error) {
			if _, err := f.WriteAt(block, at); err != nil {
				return 0, err
			}
			at = (at + syncedBytes) % syncedFile
			return 1, unix.Fdatasync(int(f.Fd()))
		}, nil
	})
}

// firstOf is the first id of an echo's answer.
func firstOf(resp *nsallocv1.AllocateResponse, req *nsallocv1.AllocateRequest) (uint64, error) {
	r := resp.GetRanges()
	if len(r) != 1 || r[0].GetCount() != req.GetCount() {
		return 0, fmt.Errorf("%d were asked for, the answer is %v", req.GetCount(), r)
	}
	return r[0].GetFirst(), nil
}
