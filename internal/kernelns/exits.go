//go:build linux

package kernelns

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Exits reports the ends of processes in the order in which they happened, also of those that happened
// while nobody looked. It answers "did every task die while its CRIU still lived?" for an agent that was
// scheduled only after all of them were gone.
//
// # Why the order is the kernel's
//
// An exiting process wakes its pidfd's waiters under tasklist_lock (kernel/exit.c, exit_notify), and an
// epoll instance appends what woke it to its ready list (fs/eventpoll.c, ep_poll_callback), to which
// epoll_wait keeps: a queue. A process that was seen dead before another one was killed therefore stands
// before it. Two that die at once on two processors may come in either order: there is none.
// TestExitsOrder holds this against the running kernel.
//
// Two things bend it:
//
//   - A process that was over when it was added queues where Add put it, behind what died before the
//     Add. Exit.AtAdd marks it: nothing is known of its place.
//   - From Linux 6.9 until it was corrected in 6.15, the end of a leader whose other threads run on woke
//     the waiters too. If nobody looks before the threads end as well, the process stands where its
//     leader ended. Where the order decides, look soon, or run a corrected kernel.
//
// Exits is safe for concurrent use.
type Exits[L any] struct {
	epoll *os.File      // non-blocking, so that Go's own poller waits for it and deadlines work
	next  chan struct{} // holds one token; whoever has it is in Next

	mu      sync.Mutex
	last    WatchID               // owned by mu
	watches map[WatchID]*watch[L] // owned by mu; nil once closed
}

// WatchID names one Add.
type WatchID uint64

type watch[L any] struct {
	label L
	fd    int  // our own duplicate
	atAdd bool // owned by Exits.mu
}

// Exit is the end of one watched process.
type Exit[L any] struct {
	ID    WatchID
	Label L
	// AtAdd says that the process may have been over before it was added: its place among the others
	// tells nothing about when.
	AtAdd bool
}

// NewExits makes an empty set. Close it.
func NewExits[L any]() (*Exits[L], error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make an epoll instance: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("make an epoll instance non-blocking: %w", err)
	}
	x := &Exits[L]{
		epoll:   os.NewFile(uintptr(fd), "epoll of pidfds"),
		next:    make(chan struct{}, 1),
		watches: make(map[WatchID]*watch[L]),
	}
	x.next <- struct{}{}
	// Proves that Go's poller took the descriptor, without which Next could not be cancelled.
	if err := x.epoll.SetReadDeadline(time.Time{}); err != nil {
		x.epoll.Close()
		return nil, fmt.Errorf("wait for an epoll instance: %w", err)
	}
	return x, nil
}

// Add watches the process of a pidfd. The descriptor is duplicated; the caller keeps its own and may
// close it. A process may be watched more than once, and is then reported more than once.
func (x *Exits[L]) Add(label L, pidfd int) (WatchID, error) {
	fd, err := unix.FcntlInt(uintptr(pidfd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("watch a pidfd: duplicate descriptor %d: %w", pidfd, err)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.watches == nil {
		unix.Close(fd)
		return 0, fmt.Errorf("watch a pidfd: %w", os.ErrClosed)
	}
	x.last++
	id := x.last
	// Once is enough, and what was reported must not be queued again when the process is reaped.
	ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT, Fd: int32(uint32(id)), Pad: int32(uint32(id >> 32))}
	if err := x.control(unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		unix.Close(fd)
		return 0, fmt.Errorf("watch a pidfd: %w (is descriptor %d a pidfd?)", err, pidfd)
	}
	// Asked after the adding: an end between the two is marked for nothing, and none is missed.
	over, err := Exited(fd)
	x.watches[id] = &watch[L]{label: label, fd: fd, atAdd: over || err != nil}
	return id, nil
}

// Remove ends a watch. It reports whether the watch was still there: if not, its exit was or will be
// returned by Next.
func (x *Exits[L]) Remove(id WatchID) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.drop(id) != nil
}

// drop must be called with mu held.
func (x *Exits[L]) drop(id WatchID) *watch[L] {
	w := x.watches[id]
	if w == nil {
		return nil
	}
	delete(x.watches, id)
	// Explicitly, because a close removes a descriptor only with its last duplicate, and a child that is
	// being forked may have one.
	_ = x.control(unix.EPOLL_CTL_DEL, w.fd, nil)
	unix.Close(w.fd)
	return w
}

// Next waits until at least one watched process is over and returns all that are, first dead first, each
// exactly once. Calls take turns. It fails when ctx ends, with its cause, or with os.ErrClosed; nothing
// is lost then.
func (x *Exits[L]) Next(ctx context.Context) ([]Exit[L], error) {
	select {
	case <-x.next:
		defer func() { x.next <- struct{}{} }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = x.epoll.SetReadDeadline(time.Unix(1, 0))
		close(interrupted)
	})
	defer func() {
		if !stop() {
			<-interrupted
			_ = x.epoll.SetReadDeadline(time.Time{})
		}
	}()
	conn, err := x.epoll.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("wait for exits: %w", err)
	}
	var exits []Exit[L]
	var failed error
	err = conn.Read(func(fd uintptr) bool { // returns when this does, or with an error
		exits, failed = x.collect(int(fd))
		return len(exits) > 0 || failed != nil
	})
	switch {
	case len(exits) > 0:
		return exits, nil
	case failed != nil:
		return nil, fmt.Errorf("wait for exits: %w", failed)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, context.Cause(ctx)
	case x.closed():
		return nil, fmt.Errorf("wait for exits: %w", os.ErrClosed)
	}
	return nil, fmt.Errorf("wait for exits: %w", err)
}

func (x *Exits[L]) closed() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.watches == nil
}

// collect takes what is ready. The kernel keeps what does not fit in front of what comes later.
func (x *Exits[L]) collect(epfd int) ([]Exit[L], error) {
	var exits []Exit[L]
	var buf [128]unix.EpollEvent
	for {
		n, err := unix.EpollWait(epfd, buf[:], 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return exits, err
		}
		x.mu.Lock()
		for _, ev := range buf[:n] {
			id := WatchID(uint32(ev.Fd)) | WatchID(uint32(ev.Pad))<<32
			if w := x.drop(id); w != nil { // else removed since
				exits = append(exits, Exit[L]{ID: id, Label: w.label, AtAdd: w.atAdd})
			}
		}
		x.mu.Unlock()
		if n < len(buf) {
			return exits, nil
		}
	}
}

// Close ends all watches and any Next.
func (x *Exits[L]) Close() error {
	x.mu.Lock()
	for id := range x.watches {
		x.drop(id)
	}
	x.watches = nil
	x.mu.Unlock()
	return x.epoll.Close()
}

func (x *Exits[L]) control(op, fd int, ev *unix.EpollEvent) error {
	conn, err := x.epoll.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := conn.Control(func(epfd uintptr) { failed = unix.EpollCtl(int(epfd), op, fd, ev) }); err != nil {
		return err
	}
	return failed
}
