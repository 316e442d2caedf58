//go:build linux

// Package notify is for programs that drive CRIU through go-criu: it brings each notification of CRIU to
// this host's nsalloc-agent, as nsalloc-hook does for CRIU's scripts, so that a container that such a
// program dumps or restores keeps its serials.
//
//	images, err := os.Open(dir)
//	n, err := notify.New(notify.Config{Images: images, PID: pid, Notify: mine})
//	defer n.Close()
//	err = criu.MakeCriu().Dump(opts, n)
//
// On a host without /etc/nsalloc/agent.yaml it does nothing but call the program's own Notify.
//
// # Vetoes
//
// An error from any side is a veto: go-criu hangs up, and CRIU takes that as one (7.2.0; it never answers
// success=false). The program's own Notify is called first, and the agent is not asked once that has
// failed: the agent commits a hand-off when it lets post-dump and post-restore pass, so nothing may object
// after it.
//
// NetworkUnlock and PostResume cannot stop CRIU. There the agent is told whatever the program's own Notify
// returned, and what the agent says is only logged: an error would make go-criu's Restore fail although
// the tree runs. An error of the program's own is passed on all the same.
//
// # What go-criu leaves out
//
// go-criu has no pre-resume, and after a veto CRIU sends nothing more, network-unlock included. The agent
// watches CRIU and the tree and needs neither. Where nsalloc-hook is in CRIU's configuration too, every
// action comes twice; the agent gives both the same answer.
package notify

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	criu "github.com/checkpoint-restore/go-criu/v7"
	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// Config says what a Notify is of.
type Config struct {
	// Images is the image directory, open for reading: that of CriuOpts.ImagesDirFd. It stays the
	// caller's, and open until Close.
	Images *os.File
	// PID is the root of the tree to be dumped: CriuOpts.Pid. 0 for a restore, where CRIU tells.
	PID int
	// CRIU is the pid of the CRIU process. 0 finds it: the child of this process that has Images open.
	CRIU int
	// Notify is the program's own; may be nil.
	Notify criu.Notify
	// Log is called with what the agent has to say though it lets an action pass, one line at a time;
	// may be nil.
	Log func(message string)
}

// Notify implements go-criu's Notify for one call of Dump or of Restore.
type Notify struct {
	config Config
	own    criu.Notify
	paths  paths

	mu    sync.Mutex
	criu  process // as of the first notification
	init  process
	ended bool
}

// paths are fixed but for tests.
type paths struct{ config, socket, bypass string }

// process is a pid and a descriptor that keeps it from coming to mean another; pid 0 is none.
type process struct{ pid, fd int }

var _ criu.Notify = (*Notify)(nil)

// New makes a Notify. Close it after the call that it was made for.
func New(c Config) (*Notify, error) {
	if c.Images == nil {
		return nil, errors.New("notify: Config.Images is nil: open the image directory that CRIU is given")
	}
	st, err := c.Images.Stat()
	if err != nil {
		return nil, fmt.Errorf("notify: image directory: %w", err)
	}
	if !st.IsDir() {
		return nil, fmt.Errorf("notify: %s is no directory", c.Images.Name())
	}
	n := &Notify{config: c, own: c.Notify, paths: paths{criuhook.ConfigPath, criuhook.SocketPath, criuhook.BypassPath}}
	if n.own == nil {
		n.own = criu.NoNotify{}
	}
	if c.PID != 0 {
		// Now, while the caller knows whose pid it is.
		if n.init, err = pin(c.PID); err != nil {
			return nil, fmt.Errorf("notify: the process to dump: %w", err)
		}
	}
	return n, nil
}

// Close lets go of the processes. A notification that comes later is a veto where it can be one.
func (n *Notify) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ended = true
	for _, p := range []*process{&n.criu, &n.init} {
		if p.pid != 0 {
			unix.Close(p.fd)
			*p = process{}
		}
	}
	return nil
}

// PreDump implements criu.Notify.
func (n *Notify) PreDump() error { return n.both(criuhook.PreDump, 0, n.own.PreDump()) }

// PostDump implements criu.Notify.
func (n *Notify) PostDump() error { return n.both(criuhook.PostDump, 0, n.own.PostDump()) }

// PreRestore implements criu.Notify.
func (n *Notify) PreRestore() error { return n.both(criuhook.PreRestore, 0, n.own.PreRestore()) }

// PostRestore implements criu.Notify.
func (n *Notify) PostRestore(pid int32) error {
	return n.both(criuhook.PostRestore, int(pid), n.own.PostRestore(pid))
}

// NetworkLock implements criu.Notify.
func (n *Notify) NetworkLock() error { return n.both(criuhook.NetworkLock, 0, n.own.NetworkLock()) }

// NetworkUnlock implements criu.Notify.
func (n *Notify) NetworkUnlock() error {
	return n.both(criuhook.NetworkUnlock, 0, n.own.NetworkUnlock())
}

// SetupNamespaces implements criu.Notify.
func (n *Notify) SetupNamespaces(pid int32) error {
	return n.both(criuhook.SetupNamespaces, int(pid), n.own.SetupNamespaces(pid))
}

// PostSetupNamespaces implements criu.Notify.
func (n *Notify) PostSetupNamespaces() error {
	return n.both(criuhook.PostSetupNamespaces, 0, n.own.PostSetupNamespaces())
}

// PostResume implements criu.Notify.
func (n *Notify) PostResume() error { return n.both(criuhook.PostResume, 0, n.own.PostResume()) }

// both asks the agent after the program's own Notify returned err. pid is the tree's root where CRIU
// tells it, else 0.
func (n *Notify) both(a criuhook.Action, pid int, err error) error {
	stage, _ := criuhook.StageOf(a)
	if err != nil && stage.CanVeto {
		return err
	}
	if _, absent := os.Stat(n.paths.config); errors.Is(absent, fs.ErrNotExist) {
		return err
	}
	answer, failed := n.ask(a, pid)
	bypassed := false
	if failed != nil {
		_, absent := os.Stat(n.paths.bypass)
		bypassed = absent == nil
	}
	d := criuhook.Decide(a, answer, failed, bypassed)
	switch {
	case d.Veto && d.Message == "":
		return fmt.Errorf("nsalloc: %s: vetoed without a reason; see the log of nsalloc-agent", a)
	case d.Veto:
		return fmt.Errorf("nsalloc: %s: %s", a, d.Message)
	case d.Message != "" && n.config.Log != nil:
		n.config.Log(fmt.Sprintf("nsalloc: %s: %s", a, d.Message))
	}
	return err
}

func (n *Notify) ask(a criuhook.Action, pid int) (criuhook.Response, error) {
	n.mu.Lock()
	defer n.mu.Unlock() // also keeps the descriptors open until they are sent
	if n.ended {
		return criuhook.Response{}, errors.New("this Notify was closed; make one for each dump and restore")
	}
	// Once: later a restored tree may be a child of this process too (CriuOpts.RstSibling), and
	// CRIU closes the directory before post-resume.
	if n.criu.pid == 0 {
		found, err := n.find()
		if err != nil {
			return criuhook.Response{}, err
		}
		n.criu = found
	}
	if pid > 0 && n.init.pid != pid {
		if n.init.pid != 0 {
			unix.Close(n.init.fd)
		}
		var err error
		if n.init, err = pin(pid); err != nil {
			return criuhook.Response{}, fmt.Errorf("the root of the restored tree: %w", err)
		}
	}
	fds := []criuhook.Descriptor{{Name: criuhook.FDCRIU, FD: n.criu.fd}}
	if n.init.pid != 0 {
		fds = append(fds, criuhook.Descriptor{Name: criuhook.FDInit, FD: n.init.fd})
	}
	raw, err := n.config.Images.SyscallConn()
	if err != nil {
		return criuhook.Response{}, err
	}
	var answer criuhook.Response
	var failed error
	err = raw.Control(func(dir uintptr) {
		answer, failed = criuhook.Ask(context.Background(), n.paths.socket, criuhook.Request{
			Action: a, Caller: criuhook.NotifyRPC, ImageDir: n.config.Images.Name(), InitPID: n.init.pid, CRIUPID: n.criu.pid,
		}, append(fds, criuhook.Descriptor{Name: criuhook.FDImages, FD: int(dir)})...)
	})
	return answer, errors.Join(err, failed)
}
