package client

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// gatherer has the calls of Serials that wait share requests.
type gatherer struct {
	mu      sync.Mutex
	batches []*batch // guarded by mu: calls join the last one, unless it is on its way
	working bool     // guarded by mu: a goroutine sends them
	sending bool     // guarded by mu: the first one is on its way
	closed  bool     // guarded by mu
}

// batch is one request for all who joined it. After done was closed ranges and err are there to read.
type batch struct {
	count  uint64 // of serials
	live   int    // guarded by gatherer.mu: callers who still wait
	joined int    // guarded by gatherer.mu until it is sent: callers
	cancel context.CancelFunc
	ctx    context.Context
	done   chan struct{}
	ranges alloc.Ranges
	err    error
}

// Serials issues n serials (1 to alloc.MaxAllocate), as ranges: range over Ranges.All for one after the
// other. Calls that wait at the same time share one request, and one is on its way at a time: what is asked
// for meanwhile makes the next one, so that requests grow with the load. No serial is handed to two calls.
//
// It asks again, under the request's own id, until the answer is there or ctx ends: then whatever may have
// been issued for this call is burned, which costs numbers and nothing else.
//
// Committed when it returns, as with Allocate. Errors: alloc.ErrInvalid for n; alloc.ErrUnavailable when
// ctx ended first, with its cause; ErrClosed; else what the pool answered, such as alloc.ErrExhausted.
func (c *Client) Serials(ctx context.Context, n uint64) (alloc.Ranges, error) {
	if n == 0 || n > alloc.MaxAllocate {
		return nil, &alloc.Error{Reason: alloc.ReasonInvalid, Subject: "count", Msg: fmt.Sprintf("%d is not in 1..%d", n, alloc.MaxAllocate)}
	}
	if ctx.Err() != nil {
		return nil, gaveUp(ctx)
	}
	b, first, alone, err := c.gather.join(n)
	if err != nil {
		return nil, err
	}
	if alone {
		go c.send()
	}
	select {
	case <-b.done:
	case <-ctx.Done():
		c.gather.leave(b)
		return nil, gaveUp(ctx)
	}
	if errors.Is(b.err, alloc.ErrExhausted) && b.joined > 1 {
		return c.single(ctx, n) // what all ask for together may be too much, and this not
	}
	if b.err != nil {
		return nil, b.err
	}
	return cut(b.ranges, first, n), nil
}

// single asks for one caller.
func (c *Client) single(ctx context.Context, n uint64) (got alloc.Ranges, err error) {
	err = Retry(ctx, func(id string) (err error) {
		got, err = c.Allocate(ctx, alloc.AllocateCommand{RequestID: id, Count: n})
		return err
	})
	return got, err
}

// ErrClosed is the error of calls of Serials on a client that was closed.
var ErrClosed = errors.New("the client is closed")

// close ends all that waits.
func (g *gatherer) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	for _, b := range g.batches {
		b.cancel()
	}
}

func gaveUp(ctx context.Context) error {
	return &alloc.Error{Reason: alloc.ReasonUnavailable, Msg: "the caller's deadline passed before serials came; any that come for it now are burned", Fix: "ask again", Err: context.Cause(ctx)}
}

// cut is n serials of ranges after the first skip of them.
func cut(ranges alloc.Ranges, skip, n uint64) alloc.Ranges {
	for i, r := range ranges {
		if skip >= r.Count {
			skip -= r.Count
			continue
		}
		if r.Count-skip >= n {
			return alloc.Ranges{{First: r.First + alloc.Serial(skip), Count: n}}
		}
		_, rest, _ := ranges[i:].Take(skip)
		got, _, _ := rest.Take(n)
		return got
	}
	return nil
}

// join adds n serials to the last batch, and tells at which of its serials they begin, and whether nobody
// sends it yet.
func (g *gatherer) join(n uint64) (b *batch, first uint64, alone bool, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, 0, false, ErrClosed
	}
	if k := len(g.batches); k > 0 && (k > 1 || !g.sending) {
		b = g.batches[k-1]
	}
	if b == nil || b.count+n > alloc.MaxAllocate || b.ctx.Err() != nil {
		b = &batch{done: make(chan struct{})}
		b.ctx, b.cancel = context.WithCancel(context.Background())
		g.batches = append(g.batches, b)
	}
	first = b.count
	b.count += n
	b.live++
	b.joined++
	alone, g.working = !g.working, true
	return b, first, alone, nil
}

// send sends one batch after the other until there is none.
func (c *Client) send() {
	g := &c.gather
	for {
		// Those who just got their serials, and ask for more, come first: their calls make one batch with the
		// others, and not a small one before it.
		runtime.Gosched()
		g.mu.Lock()
		g.sending = len(g.batches) > 0
		g.working = g.sending
		if !g.working {
			g.mu.Unlock()
			return
		}
		b := g.batches[0]
		count := b.count // nobody joins it any more
		g.mu.Unlock()
		for range 3 { // a request that was unknown for too long is given up, with what it may have got
			b.err = Retry(b.ctx, func(id string) (err error) {
				b.ranges, err = c.Allocate(b.ctx, alloc.AllocateCommand{RequestID: id, Count: count})
				return err
			})
			if !errors.Is(b.err, alloc.ErrRequestExpired) {
				break
			}
		}
		if got := b.ranges.Count(); b.err == nil && got != count {
			b.err = &alloc.Error{Reason: alloc.ReasonMalformed, Subject: "answer of the server", Msg: fmt.Sprintf("it has %d serials, %d were asked for", got, count),
				Fix: "look at the server's version and at what is between it and this client"}
		}
		b.cancel()
		g.mu.Lock()
		if g.closed && b.err != nil {
			b.err = ErrClosed
		}
		g.batches, g.sending = g.batches[1:], false
		g.mu.Unlock()
		close(b.done)
	}
}

// leave gives a batch up when nobody waits for it any more.
func (g *gatherer) leave(b *batch) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if b.live--; b.live == 0 {
		b.cancel()
	}
}
