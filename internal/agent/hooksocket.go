package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

const (
	// maxHooks bounds the hook connections that are served at a time; more wait in the socket's backlog.
	maxHooks = 64
	// saidWithin is how long a caller may take to say what it wants: a hook says it at once. Who connects
	// and says nothing holds one of maxHooks places no longer.
	saidWithin = 2 * time.Second
	// acceptPause is the pause after an accept that failed for want of descriptors or memory.
	acceptPause = 100 * time.Millisecond
)

func isGone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) }

// listenHook opens the hook socket, for root only.
func listenHook(path string) (*net.UnixListener, error) {
	return listenUnix("unixpacket", path)
}

// listenUnix makes a socket at path that only root can use. A socket that nobody listens on any more
// is replaced; one that answers, or whose backlog is full, is another agent's.
func listenUnix(network, path string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("socket directory: %w", err)
	}
	c, err := net.Dial(network, path)
	switch {
	case err == nil:
		c.Close()
		return nil, fmt.Errorf("socket %s: another agent answers on it; stop that one first", path)
	case errors.Is(err, unix.ECONNREFUSED):
		if err := removeSocket(path); err != nil {
			return nil, err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("socket %s: somebody may listen on it: %w; stop that agent, or remove what is there", path, err)
	}
	// The mode is set before anybody can connect: between bind and listen there is nobody to talk to.
	old := unix.Umask(0o177)
	l, err := net.ListenUnix(network, &net.UnixAddr{Name: path, Net: network})
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	return l, nil
}

// removeSocket removes a dead socket, and nothing else that a configuration may name by mistake.
func removeSocket(path string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("socket %s: it is not a socket; name another path, or remove it", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("socket: %w", err)
	}
	return nil
}

// serveHook serves until ctx ends, and returns when the last request is answered.
func (a *Agent) serveHook(ctx context.Context, l *net.UnixListener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var serving sync.WaitGroup
	defer serving.Wait()
	slots := make(chan struct{}, maxHooks)
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		c, err := l.AcceptUnix()
		switch {
		case err == nil:
			serving.Go(func() {
				defer func() { <-slots }()
				defer c.Close()
				a.serveOne(ctx, c)
			})
			continue
		case ctx.Err() != nil:
			return nil
		case !passes(err):
			return err
		}
		<-slots
		a.log.Warn("hook: no connection could be taken", "cause", err)
		t := time.NewTimer(acceptPause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil
		}
	}
}

// passes reports whether an accept failed for a reason that goes away: the agent must outlive a flood.
func passes(err error) bool {
	for _, e := range []error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.ECONNABORTED, unix.EINTR} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// serveOne reads one request, decides, and answers.
func (a *Agent) serveOne(ctx context.Context, c *net.UnixConn) {
	ctx, cancel := context.WithTimeout(ctx, criuhook.AgentDeadline)
	defer cancel()
	_ = c.SetReadDeadline(time.Now().Add(saidWithin))
	_ = c.SetWriteDeadline(time.Now().Add(criuhook.Deadline))
	send := func(answer criuhook.Response) error {
		packet, err := criuhook.EncodeResponse(answer)
		if err == nil {
			_, err = c.Write(packet)
		}
		return err
	}
	req, err := receive(c)
	if err != nil {
		a.log.Warn("hook: a request was refused", "cause", err)
		_ = send(criuhook.Response{Verdict: criuhook.Veto, Message: err.Error()})
		return
	}
	defer req.close()
	if err := a.decide(ctx, req, send); err != nil {
		a.log.Warn("hook: nobody took the answer", "action", req.Action, "criu", req.CRIUPID, "cause", err)
	}
}

// hookRequest is a request with what came along.
type hookRequest struct {
	criuhook.Request
	files map[string]*os.File
	peer  int // pid of who sent it, in the agent's PID namespace
}

func (r *hookRequest) close() {
	for _, f := range r.files {
		f.Close()
	}
}

func receive(c *net.UnixConn) (*hookRequest, error) {
	buf := make([]byte, criuhook.MaxMessage+1)
	oob := make([]byte, unix.CmsgSpace(criuhook.MaxFDs*4))
	n, oobn, flags, _, err := c.ReadMsgUnix(buf, oob)
	files, filesErr := filesOf(oob[:oobn])
	r := &hookRequest{files: map[string]*os.File{}}
	fail := func(err error) (*hookRequest, error) {
		for _, f := range files {
			f.Close()
		}
		return r, err
	}
	switch {
	case err != nil:
		return fail(fmt.Errorf("hook request: %w", err))
	case filesErr != nil:
		return fail(fmt.Errorf("hook request: descriptors: %w", filesErr))
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		return fail(errors.New("hook request: it is larger than a message may be"))
	}
	if r.Request, err = criuhook.DecodeRequest(buf[:n]); err != nil {
		return fail(err)
	}
	if len(files) != len(r.FDs) {
		return fail(fmt.Errorf("hook request: %d descriptors came along, %d are named", len(files), len(r.FDs)))
	}
	for i, name := range r.FDs {
		r.files[name] = files[i]
	}
	files = nil
	if r.peer, err = peerOf(c); err != nil {
		r.close()
		return r, err
	}
	return r, nil
}

func filesOf(oob []byte) ([]*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var files []*os.File
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return files, err
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "hook"))
		}
	}
	return files, nil
}

// peerOf is the pid of the process that connected, and proves that it is root.
func peerOf(c *net.UnixConn) (int, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, fmt.Errorf("hook request: who sent it: %w", credErr)
	}
	if cred.Uid != 0 {
		return 0, fmt.Errorf("hook request: it comes from user %d; CRIU runs as root", cred.Uid)
	}
	return int(cred.Pid), nil
}
