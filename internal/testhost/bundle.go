package testhost

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
)

// BundleOptions describe a container.
type BundleOptions struct {
	// UserNS gives it a user namespace, in which its root is user UserNSBase
	// of the host.
	UserNS bool
	// NetNS is the path of one of the host's network namespaces, made beforehand,
	// as CNI hands one in; "" for a network namespace of its own.
	NetNS string
	// HostPID leaves it in the host's PID namespace.
	HostPID bool
	// Admin lets its processes make namespaces and mounts: CAP_SYS_ADMIN and
	// CAP_NET_ADMIN.
	Admin bool
	// Before are shell commands that the first process runs before it counts.
	Before string
	// Args replace the counter as the workload; a busybox is all there is.
	Args []string
	// Annotations of the bundle, such as org.criu.config.
	Annotations map[string]string
}

// UserNSBase is the first of the 65536 users and groups of a host that make up
// the user namespace of a container.
const UserNSBase = 100000

// counter counts, ten times a second, in a file on a tmpfs of the container's:
// CRIU carries that along in its images, so the count goes on where it stopped
// although the hosts share no storage. Counter reads it.
const counter = `n=0
while :; do
	n=$((n+1))
	echo $n > /count/.n && mv /count/.n /count/n
	sleep 0.1
done`

// WriteBundle writes an OCI bundle into a directory of the host: busybox in a
// container with mount, UTS, IPC, PID, network and cgroup namespaces of its
// own as far as o does not say otherwise. The same call on another host makes
// what a container dumped here needs there.
func (h *Host) WriteBundle(dir string, o BundleOptions) error {
	r, err := h.root()
	if err != nil {
		return err
	}
	defer r.Close()
	owner := 0
	if o.UserNS {
		owner = UserNSBase
	}
	if err := writeRootFS(r, path.Join(inside(dir), "rootfs"), owner); err != nil {
		return fmt.Errorf("host %s: cannot write the bundle's root file system: %w", h.name, err)
	}
	config, err := json.MarshalIndent(ociConfig(h.name, o), "", "\t")
	if err != nil {
		return err
	}
	return h.WriteFile(path.Join(dir, "config.json"), config, 0o644)
}

// writeRootFS makes a root file system that belongs to a user, as an engine
// does for a container with a user namespace.
func writeRootFS(r *os.Root, dir string, owner int) error {
	own := []string{dir}
	for _, d := range []string{"bin", "etc", "dev", "proc", "sys", "tmp", "count"} {
		p := path.Join(dir, d)
		if err := r.MkdirAll(p, 0o755); err != nil {
			return err
		}
		own = append(own, p)
	}
	busybox, err := r.Open("usr/bin/busybox")
	if err != nil {
		return fmt.Errorf("%w: the host's root file system needs the package busybox-static", err)
	}
	defer busybox.Close()
	p := path.Join(dir, "bin/busybox")
	if err := putFile(r, p, busybox, 0o755); err != nil {
		return err
	}
	own = append(own, p)
	for _, applet := range []string{"sh", "sleep", "mv", "cat", "echo", "ls", "ps", "hostname", "id", "kill", "ip", "true", "readlink", "setsid", "unshare", "mount"} {
		p := path.Join(dir, "bin", applet)
		if err := r.Symlink("busybox", p); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		own = append(own, p)
	}
	for _, p := range own {
		if err := r.Lchown(p, owner, owner); err != nil {
			return err
		}
	}
	return nil
}

type object = map[string]any

func ociConfig(hostname string, o BundleOptions) object {
	args := o.Args
	if len(args) == 0 {
		args = []string{"sh", "-c", o.Before + "\n" + counter}
	}
	caps := []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SETGID", "CAP_SETUID", "CAP_SYS_CHROOT"}
	var namespaces []object
	if o.Admin {
		caps = append(caps, "CAP_SYS_ADMIN", "CAP_NET_ADMIN")
	}
	for _, t := range []string{"mount", "uts", "ipc", "pid", "network", "cgroup"} {
		ns := object{"type": t}
		switch {
		case t == "pid" && o.HostPID:
			continue
		case t == "network" && o.NetNS != "":
			ns["path"] = o.NetNS
		}
		namespaces = append(namespaces, ns)
	}
	linux := object{}
	if o.UserNS {
		namespaces = append(namespaces, object{"type": "user"})
		ids := []object{{"containerID": 0, "hostID": UserNSBase, "size": 65536}}
		linux["uidMappings"], linux["gidMappings"] = ids, ids
	}
	linux["namespaces"] = namespaces
	return object{
		"ociVersion": "1.0.2",
		"process": object{
			"terminal":     false, // CRIU cannot take along a terminal of another host
			"user":         object{"uid": 0, "gid": 0},
			"args":         args,
			"env":          []string{"PATH=/bin"},
			"cwd":          "/",
			"capabilities": object{"bounding": caps, "effective": caps, "permitted": caps},
		},
		"root":     object{"path": "rootfs", "readonly": false},
		"hostname": hostname + "-container",
		"mounts": []object{
			{"destination": "/proc", "type": "proc", "source": "proc"},
			{"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": []string{"nosuid", "mode=755", "size=65536k"}},
			{"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
			{"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": []string{"nosuid", "noexec", "nodev"}},
			{"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": []string{"nosuid", "noexec", "nodev", "ro"}},
			{"destination": "/count", "type": "tmpfs", "source": "tmpfs", "options": []string{"nosuid", "nodev", "mode=755", "size=1m"}},
		},
		"annotations": o.Annotations,
		"linux":       linux,
	}
}

// Runc runs runc in the host with no standard streams: a container started
// with -d inherits them, and CRIU can dump one only if they are its own. What
// runc, or CRIU under it, had to say is in the error.
func (h *Host) Runc(ctx context.Context, args ...string) error {
	const logs = "/run/testhost/runc"
	r, err := h.root()
	if err != nil {
		return err
	}
	defer r.Close()
	log := path.Join(logs, strconv.FormatInt(runs.Add(1), 10)+".log")
	if err := r.MkdirAll(inside(logs), 0o755); err != nil {
		return err
	}
	err = h.Command(ctx, "runc", append([]string{"--log", log}, args...)...).Run()
	if err == nil {
		return nil
	}
	text, _ := h.ReadFile(log)
	said := lastLines(text, 5)
	if m := criuLog.FindSubmatch(text); m != nil {
		if text, err := h.ReadFile(string(m[1])); err == nil {
			said += "\n" + lastLines(text, 15)
		}
	}
	return fmt.Errorf("host %s: runc %s: %w\n%s", h.name, strings.Join(args, " "), err, said)
}

// runs numbers runc's log files.
var runs atomic.Int64

var criuLog = regexp.MustCompile(`log file: (/[^\s"\\]+)`)

func lastLines(text []byte, n int) string {
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// ContainerPID is the process number, in the host, of a container's init.
func (h *Host) ContainerPID(ctx context.Context, id string) (int, error) {
	out, err := h.Command(ctx, "runc", "state", id).Output()
	if err != nil {
		return 0, fmt.Errorf("host %s: runc state %s: %w: there is no such container", h.name, id, err)
	}
	var state struct {
		Status string
		PID    int `json:"pid"`
	}
	if err := json.Unmarshal(out, &state); err != nil {
		return 0, fmt.Errorf("host %s: runc state %s: %w", h.name, id, err)
	}
	if state.PID == 0 {
		return 0, fmt.Errorf("host %s: container %s is %s: it has no process", h.name, id, state.Status)
	}
	return state.PID, nil
}

// Counter reads how far the counter of a running container has come.
func (h *Host) Counter(ctx context.Context, id string) (int, error) {
	pid, err := h.ContainerPID(ctx, id)
	if err != nil {
		return 0, err
	}
	outer, err := h.OuterPID(pid)
	if err != nil {
		return 0, err
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/count/n", outer))
	if err != nil {
		return 0, fmt.Errorf("host %s: container %s has no count yet: %w", h.name, id, err)
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}
