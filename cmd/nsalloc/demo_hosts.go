package main

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/internal/testhost"
	"github.com/nsalloc/nsalloc/internal/testpool"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

// hosts is the real stage: test hosts with runc, CRIU, the agent and the hook, and a server beside them.
type hosts struct {
	*testpool.Pool
	rootfs  string
	sandbox alloc.Serial // of the container, once it runs
}

const (
	demoBundle     = "/var/lib/demo/bundle"
	demoImages     = "/var/lib/demo/images"
	demoDumpLog    = demoImages + "-dump/dump.log"
	demoRestoreLog = demoImages + "-restore/restore.log"
)

func (h *hosts) words() wording {
	return wording{
		run:     "run a counter in a container on a, with runc",
		dump:    "checkpoint it on a, with CRIU, which ends it there",
		move:    "copy the images to b",
		restore: "restore it on b",
		again:   "restore the same images once more on b, as " + demoClone,
	}
}

// works proves that CRIU runs on this kernel, and says which one.
func (h *hosts) works(ctx context.Context) (detail string, err error) {
	var version, verdict bytes.Buffer
	if err := testpool.Output(h.Host("a").Command(ctx, "criu", "--version"), &version); err != nil {
		return "", err
	}
	if err := testpool.Output(h.Host("a").Command(ctx, "criu", "check"), &verdict); err != nil {
		return "", err
	}
	return fmt.Sprintf("version %s, %s", strings.TrimPrefix(firstLine(version.String()), "Version: "), lastLine(verdict.String())), nil
}

func (h *hosts) run(ctx context.Context) (string, error) {
	for _, host := range h.Hosts() {
		if err := host.WriteBundle(demoBundle, testhost.BundleOptions{}); err != nil {
			return "", err
		}
	}
	return "", h.Host("a").Runc(ctx, "run", "-d", "--bundle", demoBundle, demoContainer)
}

func (h *hosts) dump(ctx context.Context) (string, error) {
	a := h.Host("a")
	if err := a.MkdirAll(demoImages, 0o755); err != nil {
		return "", err
	}
	err := a.Runc(ctx, "checkpoint", "--image-path", demoImages, "--work-path", filepath.Dir(demoDumpLog), demoContainer)
	if err != nil {
		return "", err
	}
	return "", h.reaches(ctx, alloc.StateInTransit, "a")
}

func (h *hosts) move(context.Context) (string, error) {
	if err := h.Host("b").CopyDir(h.Host("a"), demoImages, demoImages); err != nil {
		return "", err
	}
	files, size := 0, int64(0)
	err := filepath.WalkDir(h.Host("b").Path(demoImages), func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			files, size = files+1, size+info.Size()
		}
		return err
	})
	return fmt.Sprintf("%s, %d KB", count(files, "file", "files"), (size+1023)/1024), err
}

func (h *hosts) restore(ctx context.Context, id string) (string, error) {
	err := h.Host("b").Runc(ctx, "restore", "-d", "--bundle", demoBundle, "--image-path", demoImages, "--work-path", filepath.Dir(demoRestoreLog), id)
	if err != nil {
		return "", err
	}
	return "", h.reaches(ctx, alloc.StateRunning, "b")
}

// reaches waits until the pool says of the container what was done with it.
func (h *hosts) reaches(ctx context.Context, state alloc.SandboxState, host string) error {
	return settled(ctx, func(ctx context.Context) error {
		f, err := h.Client().Sandbox(ctx, h.sandbox, true)
		if err != nil {
			return err
		}
		if s := f.Sandbox; s.State != state || s.Owner != host {
			return fmt.Errorf("sandbox %s is %s on host %s, not %s on host %s", s.Serial, s.State, s.Owner, state, host)
		}
		return nil
	})
}

// look asks the host's agent. It numbers what it has not seen yet, and a serial that is not committed
// may still change: that one is not shown.
func (h *hosts) look(ctx context.Context, host, id string) (look, error) {
	pid, err := h.Host(host).ContainerPID(ctx, id)
	if err != nil {
		return look{}, err
	}
	agent, err := h.Agent(host)
	if err != nil {
		return look{}, err
	}
	l := look{host: host}
	err = settled(ctx, func(ctx context.Context) error {
		resp, err := agent.Identify(ctx, &nsallocv1.IdentifyRequest{Pid: int32(pid)})
		if err != nil {
			return err
		}
		l.seen = nil
		for _, n := range resp.GetNamespaces() {
			b := wire.BindingFromWire(n.GetBinding())
			if n.GetProvisional() {
				return fmt.Errorf("serial %s of the %s namespace is not committed", b.Serial, b.Type)
			}
			l.seen = append(l.seen, sight{b.Type, b.Kernel, b.Serial, b.Parent, n.GetOfHost()})
		}
		if l.sandbox = homeOf(resp.GetNamespaces()); l.sandbox == 0 {
			return fmt.Errorf("process %d of host %s is in no sandbox", pid, host)
		}
		return nil
	})
	if h.sandbox == 0 {
		h.sandbox = l.sandbox
	}
	return l, err
}

func (h *hosts) count(ctx context.Context, host, id string, least int) (n int, err error) {
	err = settled(ctx, func(ctx context.Context) error {
		if n, err = h.Host(host).Counter(ctx, id); err == nil && n <= least {
			err = fmt.Errorf("container %s on host %s has counted to %d only", id, host, n)
		}
		return err
	})
	return n, err
}

func (h *hosts) history(ctx context.Context, c *cli, serial alloc.Serial) error {
	return c.serialHistory(ctx, h.Client(), serial, time.Time{})
}

func (h *hosts) check(ctx context.Context, c *cli) error { return c.check(ctx, h.Client()) }

// enter says how to look around in the hosts.
func (h *hosts) enter(s *screen) {
	for _, host := range h.Hosts() {
		s.line(stylePlain, fmt.Sprintf("  nsenter -a -t %-8d bash    # a shell on host %s", host.InitPID(), host.Name()))
	}
	s.say(stylePlain, "", "There:", "")
	s.line(stylePlain, "  runc list")
	s.line(stylePlain, "  nsalloc ps")
	s.line(stylePlain, "  nsalloc sandbox list --insecure --server "+h.ServerAddr())
}

// logs are the ends of what the daemons and CRIU wrote, for a failure.
func (h *hosts) logs() (all []demoLog) {
	for _, at := range []struct{ host, file string }{{"a", demoDumpLog}, {"b", demoRestoreLog}} {
		if text, err := h.Host(at.host).ReadFile(at.file); err == nil {
			all = append(all, demoLog{"CRIU on host " + at.host + ", " + filepath.Base(at.file), string(text)})
		}
	}
	return append(all, daemonLogs(h.Logs())...)
}

// demoLog is what one program wrote.
type demoLog struct{ name, text string }

// daemonLogs takes apart what testpool puts together.
func daemonLogs(text string) (all []demoLog) {
	for line := range strings.Lines(text) {
		if name, ok := strings.CutPrefix(line, "--- "); ok {
			all = append(all, demoLog{name: strings.TrimSpace(name)})
		} else if len(all) > 0 {
			all[len(all)-1].text += line
		}
	}
	return all
}

// tail is the last lines of a log.
func (l demoLog) tail(n int) []string {
	lines := strings.Split(strings.TrimSpace(l.text), "\n")
	return lines[max(0, len(lines)-n):]
}
