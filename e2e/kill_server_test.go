package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// What a server writes of its own, where no RPC asks for it.

// beginServer starts the server again, which begins a life, and runs the container meanwhile.
func (c *cellRun) beginServer() error {
	return errors.Join(c.p.KillServer(), c.p.StartServer(c.p.ctx()), c.start())
}

// serverEtcd is where the server has its own etcd.
func (c *cellRun) serverEtcd() string { return filepath.Join(c.p.Dir(), "server", "etcd") }

// preparePutBack copies the server's etcd, and runs the container after that: the copy does not know of it, and the
// server's witness has seen more.
func (c *cellRun) preparePutBack() {
	c.p.t.Helper()
	older := c.serverEtcd() + ".older"
	c.must(os.RemoveAll(older), c.p.KillServer(), exec.Command("cp", "-a", c.serverEtcd(), older).Run(), c.p.StartServer(c.p.ctx()), c.start())
	c.before = c.oneMore()
}

// putBack puts the copy in etcd's place.
func (c *cellRun) putBack() error {
	etcd := c.serverEtcd()
	return errors.Join(c.p.KillServer(), os.RemoveAll(etcd), os.Rename(etcd+".older", etcd), c.p.StartServer(c.p.ctx()))
}

// cameBack: the pool is open in its next generation and in no later one, and issues what it has not issued.
func (c *cellRun) cameBack() error {
	pool, _, err := c.p.Client().Pool(c.p.ctx())
	if err != nil {
		return err
	}
	if more := c.oneMore(); pool.Generation != c.before.First.Generation()+1 || more.First.Generation() != pool.Generation {
		return fmt.Errorf("it issued %s, was put back, issues %s, and is in generation %d", c.before, more, pool.Generation)
	}
	return nil
}
