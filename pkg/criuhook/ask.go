//go:build linux

package criuhook

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/nsalloc/nsalloc/internal/killpoint"
)

var (
	// ErrNoAgent matches the error of Ask when nobody listens.
	ErrNoAgent = errors.New("nsalloc-agent does not run")
	// ErrNoAnswer matches the error of Ask when somebody listens who does not answer, or with nonsense.
	// What became of the request is not known then; that is why the agent counts a deadline of its own
	// and gives no verdict after it.
	ErrNoAnswer = errors.New("nsalloc-agent did not answer")
)

// Descriptor goes along with a request.
type Descriptor struct {
	Name string // one of FDCRIU, FDInit, FDImages
	FD   int    // stays the caller's
}

// Ask brings one action to the agent and returns its answer. It takes until ctx ends and no longer, but
// for Deadline at most; r.Version and r.FDs are set here.
//
// It is written on system calls because package net would double the hook's size and start-up time.
func Ask(ctx context.Context, socketPath string, r Request, fds ...Descriptor) (Response, error) {
	ctx, cancel := context.WithTimeout(ctx, Deadline)
	defer cancel()
	r.FDs = make([]string, 0, len(fds))
	var rights []int
	for _, d := range fds {
		r.FDs = append(r.FDs, d.Name)
		rights = append(rights, d.FD)
	}
	packet, err := EncodeRequest(r)
	if err != nil {
		return Response{}, err
	}
	sock, err := dial(ctx, socketPath)
	if err != nil {
		return Response{}, err
	}
	defer sock.Close()
	// Moving the deadline into the past wakes up whoever waits below. It fails only on a closed socket,
	// where nobody does.
	stop := context.AfterFunc(ctx, func() { _ = sock.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	b, err := exchange(sock, packet, rights, r.Action)
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return Response{}, fmt.Errorf("%w on %s: %w", ErrNoAnswer, socketPath, err)
	}
	answer, err := DecodeResponse(b)
	if err != nil {
		return Response{}, fmt.Errorf("%w on %s as it should: %w", ErrNoAnswer, socketPath, err)
	}
	return answer, nil
}

// dial returns a connected socket that the runtime polls, so that deadlines work on it.
func dial(ctx context.Context, path string) (*os.File, error) {
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a socket: %w", err)
	}
	if err = connect(ctx, fd, path); err == nil {
		err = trusted(fd)
	}
	if err == nil {
		err = syscall.SetNonblock(fd, true)
	}
	switch {
	case err == nil:
		return os.NewFile(uintptr(fd), path), nil // polled, because it does not block
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENOTDIR):
		err = fmt.Errorf("%w: connect to %s: %w", ErrNoAgent, path, err)
	default:
		err = fmt.Errorf("%w: connect to %s: %w", ErrNoAnswer, path, err)
	}
	syscall.Close(fd)
	return nil, err
}

// connect waits while the agent's backlog is full, as long as ctx has a deadline for: a unix socket
// waits in a blocking connect only, and heeds the send timeout there (unix_stream_connect in the
// kernel's net/unix/af_unix.c).
func connect(ctx context.Context, fd int, path string) error {
	for {
		deadline, _ := ctx.Deadline()
		wait := time.Until(deadline)
		if ctx.Err() != nil || wait <= 0 {
			return context.DeadlineExceeded
		}
		// A timeout of 0 would mean none.
		tv := syscall.NsecToTimeval(max(wait, time.Millisecond).Nanoseconds())
		if err := syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_SNDTIMEO, &tv); err != nil {
			return err
		}
		err := syscall.Connect(fd, &syscall.SockaddrUnix{Name: path})
		switch err {
		case syscall.EINTR: // signals of the Go runtime too; with a timeout it is never restarted
			continue
		case syscall.EAGAIN:
			return fmt.Errorf("its backlog stayed full: %w", context.DeadlineExceeded)
		}
		return err
	}
}

// trusted refuses an answer from anybody but root or ourselves. The socket's directory is root's, so
// this is a second fence only.
func trusted(fd int) error {
	peer, err := syscall.GetsockoptUcred(fd, syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	if err != nil {
		return err
	}
	if peer.Uid != 0 && int(peer.Uid) != os.Geteuid() {
		return fmt.Errorf("uid %d listens there, not root: stop it, then start nsalloc-agent", peer.Uid)
	}
	return nil
}

// exchange sends one packet and waits for one; of is the action that they are of.
func exchange(sock *os.File, packet []byte, rights []int, of Action) ([]byte, error) {
	raw, err := sock.SyscallConn()
	if err != nil {
		return nil, err
	}
	var oob []byte
	if len(rights) > 0 {
		oob = syscall.UnixRights(rights...)
	}
	var failed error
	if err := raw.Write(func(fd uintptr) bool {
		failed = restart(func() error {
			_, err := syscall.SendmsgN(int(fd), packet, oob, nil, syscall.MSG_NOSIGNAL)
			return err
		})
		return failed != syscall.EAGAIN
	}); err != nil {
		return nil, err
	}
	if failed != nil {
		return nil, failed
	}
	killpoint.At(killpoint.HookAsked.Of(string(of)))
	b := make([]byte, MaxMessage+1) // one more, so that a longer packet shows
	n := 0
	if err := raw.Read(func(fd uintptr) bool {
		// No room for control messages: descriptors that came along would be closed by the kernel.
		failed = restart(func() (err error) {
			n, _, _, _, err = syscall.Recvmsg(int(fd), b, nil, 0)
			return err
		})
		return failed != syscall.EAGAIN
	}); err != nil {
		return nil, err
	}
	switch {
	case failed != nil:
		return nil, failed
	case n == 0:
		return nil, errors.New("it closed the connection")
	}
	return b[:n], nil
}

// restart repeats a call that a signal interrupted.
func restart(call func() error) error {
	for {
		if err := call(); err != syscall.EINTR {
			return err
		}
	}
}
