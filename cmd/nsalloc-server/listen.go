package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const maxSocketPath = 107 // what sockaddr_un holds, without the final zero

// listener is one address that is served, by the name under which clients reach it.
type listener struct {
	net.Listener
	name string
	lock io.Closer // of a unix socket; nil otherwise
}

// Close closes the socket first and gives its path free after.
func (l listener) Close() error {
	err := l.Listener.Close()
	if l.lock != nil {
		err = errors.Join(err, l.lock.Close())
	}
	return err
}

// address is where to listen: a path of a unix socket, or host and port.
type address struct{ path, host, port string }

// parseAddress understands unix:///PATH or HOST:PORT. Plain text stays on this machine unless insecure.
func parseAddress(text string, insecure bool) (address, error) {
	if path, ok := strings.CutPrefix(text, "unix://"); ok {
		switch {
		case !filepath.IsAbs(path):
			return address{}, usage("address unix://%s: the path is not absolute; write unix:///PATH", path)
		case len(path) > maxSocketPath:
			return address{}, usage("address unix://%s: the path has %d bytes, the kernel takes %d", path, len(path), maxSocketPath)
		}
		return address{path: path}, nil
	}
	host, port, err := net.SplitHostPort(text)
	if err != nil || strings.Contains(text, "/") {
		return address{}, usage("address %q is not unix:///PATH or HOST:PORT", text)
	}
	if host == "" && !insecure {
		host = "127.0.0.1"
	}
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) && !insecure {
		return address{}, usage("address %q is reached by other machines, in plain text, and whoever connects would be believed; listen on 127.0.0.1 or a unix socket, or say --insecure", text)
	}
	return address{host: host, port: port}, nil
}

// listen opens an address.
func listen(ctx context.Context, text string, insecure bool) (listener, error) {
	a, err := parseAddress(text, insecure)
	switch {
	case err != nil:
		return listener{}, err
	case a.path != "":
		return listenUnix(ctx, a.path)
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", net.JoinHostPort(a.host, a.port))
	if err != nil {
		return listener{}, fmt.Errorf("listen on %s: %w", text, err)
	}
	if tcp, ok := l.Addr().(*net.TCPAddr); ok && !insecure && !tcp.IP.IsLoopback() { // what localhost resolved to
		return listener{}, errors.Join(fmt.Errorf("listen on %s: it resolves to %s, which other machines reach", text, tcp), l.Close())
	}
	return listener{Listener: l, name: l.Addr().String()}, nil
}

// listenUnix makes a socket that root alone can use. A socket that a dead server left behind is
// replaced; the lock beside it keeps two servers that start at once from replacing each other's.
func listenUnix(ctx context.Context, path string) (listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return listener{}, fmt.Errorf("listen on %s: %w", path, err)
	}
	lock, err := lockFile(path + ".lock")
	if err != nil {
		return listener{}, fmt.Errorf("listen on %s: %w", path, err)
	}
	l, err := bindUnix(ctx, path)
	if err != nil {
		return listener{}, errors.Join(fmt.Errorf("listen on %s: %w", path, err), lock.Close())
	}
	return listener{Listener: l, name: "unix://" + path, lock: lock}, nil
}

func bindUnix(ctx context.Context, path string) (net.Listener, error) {
	switch fi, err := os.Lstat(path); {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, err
	case fi.Mode().Type() != os.ModeSocket:
		return nil, errors.New("it exists and is not a socket; remove it, or listen elsewhere")
	default:
		var d net.Dialer
		if c, err := d.DialContext(ctx, "unix", path); err == nil {
			return nil, errors.Join(errors.New("somebody serves on it already; stop that one, or listen elsewhere"), c.Close())
		} else if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, err
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	// The socket gets its mode before its name, so that there is no moment at which others can connect.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }), err)
	}}
	return lc.Listen(ctx, "unix", path)
}

// lockFile takes a lock that ends with the process. The file stays: removing it would let two
// processes hold locks on two files of one name.
func lockFile(path string) (io.Closer, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("another server holds %s; stop that one, or listen elsewhere", path)
		}
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
