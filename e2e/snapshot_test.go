package e2e

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// bumped is how far --bump-revision raises a restored etcd's revision: etcd's own advice for one that serves
// Kubernetes.
const bumped = 1_000_000_000

// snapshot saves what etcd has, as an operator's backup does, and returns the file.
func (c *cluster) snapshot() string {
	c.t.Helper()
	file := filepath.Join(c.dir, "snapshot-"+strconv.Itoa(int(time.Now().UnixNano())))
	c.etcdTool("snapshot", "save", c.endpoints[0], file)
	return file
}

func (c *cluster) etcdTool(args ...string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	if out, err := c.o.command(ctx, c.etcd, args...).CombinedOutput(); err != nil {
		c.t.Fatalf("etcd %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// putBack kills etcd, restores every member from a snapshot, with a raised revision or not, and starts it again.
// between is called while etcd is away. It returns when etcd answers, with that moment.
func (c *cluster) putBack(file string, bump bool, between func()) time.Time {
	c.t.Helper()
	for _, m := range c.members {
		m.kill()
	}
	for _, m := range c.members {
		arg := func(name string) string {
			for i, a := range m.args {
				if a == name {
					return m.args[i+1]
				}
			}
			c.t.Fatalf("member %s has no %s", m.name, name)
			return ""
		}
		if err := os.RemoveAll(arg("--data-dir")); err != nil {
			c.t.Fatal(err)
		}
		args := []string{"snapshot", "restore", file}
		for _, same := range []string{"--name", "--data-dir", "--initial-advertise-peer-urls", "--initial-cluster", "--initial-cluster-token"} {
			args = append(args, same, arg(same))
		}
		if bump {
			args = append(args, "--bump-revision", strconv.Itoa(bumped), "--mark-compacted")
		}
		c.etcdTool(args...)
	}
	if between != nil {
		between()
	}
	c.begin(c.members...)
	return time.Now()
}

// TestSnapshot: a restored etcd has what the snapshot has, with the revision that it had, or the raised one.
// What the other tests rest on is so.
func TestSnapshot(t *testing.T) {
	if testing.Short() {
		t.Skip("stops and starts an etcd")
	}
	t.Parallel()
	c := (&clusterOptions{members: 3}).start(t)
	etcd, err := c.client(c.endpoints...)
	if err != nil {
		t.Fatal(err)
	}
	defer etcd.Close()
	put := func(value string) int64 {
		t.Helper()
		r, err := etcd.Put(t.Context(), "x", value)
		if err != nil {
			t.Fatal(err)
		}
		return r.Header.Revision
	}
	was := put("old")
	file := c.snapshot()
	put("new")
	for _, bump := range []bool{false, true} {
		c.putBack(file, bump, nil)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		err := until(ctx, func(ctx context.Context) error {
			r, err := etcd.Get(ctx, "x")
			if err != nil {
				return err
			}
			if got := string(r.Kvs[0].Value); got != "old" {
				t.Errorf("bumped %v: x is %q", bump, got)
			}
			switch rev := r.Header.Revision; {
			case bump && rev < bumped, !bump && rev > was+100:
				t.Errorf("bumped %v: the revision is %d, and was %d", bump, rev, was)
			}
			return nil
		})
		cancel()
		if err != nil {
			t.Fatal(err)
		}
	}
}
