package agent

import (
	"context"
	"fmt"
	"os"
	"sync"

	"github.com/nsalloc/nsalloc/internal/kernelns"
)

// deaths is the order in which a run's processes ended, as the kernel told it. CRIU is watched from the
// run's first action on, so before any task: a task that is over by the time it is watched died before
// a CRIU that is told gone later.
type deaths struct {
	mu       sync.Mutex
	ids      []kernelns.WatchID
	criu     bool // CRIU is watched
	tasks    bool // every task is, of a dump
	left     int  // tasks that have not ended
	criuGone bool
	leftThen int  // left when CRIU ended
	noOrder  bool // CRIU may have been over before it was watched
}

// note adds one end. It reports whether there is something to settle now.
func (d *deaths) note(criu, atAdd bool) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if criu {
		d.criuGone, d.leftThen, d.noOrder = true, d.left, atAdd
	} else {
		d.left--
	}
	return d.criuGone || d.left == 0
}

// told gives what the kernel has told: whether CRIU is gone, how many tasks are left, and whether it
// will tell at all.
func (d *deaths) told() (criuGone bool, left int, watched bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.criuGone, d.left, d.criu
}

// stoppedLive reports whether every task was seen to end while CRIU lived.
func (d *deaths) stoppedLive() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.criu && d.tasks && !d.noOrder && d.left == 0 && (!d.criuGone || d.leftThen == 0)
}

// watched is the label of a watched process.
type watched struct {
	run  *run
	criu bool
}

// watchCRIU follows a run's CRIU, once; by the holder of the turn.
func (a *Agent) watchCRIU(n *run, pidfd *os.File) error {
	d := &n.deaths
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.criu {
		return nil
	}
	id, err := a.exits.Add(watched{run: n, criu: true}, int(pidfd.Fd()))
	if err != nil {
		return fmt.Errorf("watch CRIU %d: %w", n.rec.CRIUPID, err)
	}
	d.ids, d.criu = append(d.ids, id), true
	return nil
}

// watchTasks follows every task of a tree that is being dumped, once. From here on the kernel tells in
// which order they and CRIU end.
func (a *Agent) watchTasks(n *run, tasks []kernelns.Process) error {
	d := &n.deaths
	d.mu.Lock()
	defer d.mu.Unlock() // ends are noted after the last task was added
	switch {
	case d.tasks:
		return nil
	case d.criuGone:
		return fmt.Errorf("the CRIU process %d is gone", n.rec.CRIUPID)
	}
	var ids []kernelns.WatchID
	n.rec.Tasks = nil
	for _, p := range tasks {
		if p.Ended {
			continue // a zombie, which CRIU dumps as one
		}
		id, err := a.watchTask(n, p)
		switch {
		case isGone(err):
			continue // over since, while CRIU lives
		case err != nil:
			for _, id := range ids {
				a.exits.Remove(id)
			}
			return fmt.Errorf("watch task %d (%s): %w", p.PID, p.Comm, err)
		}
		ids = append(ids, id)
		n.rec.Tasks = append(n.rec.Tasks, task{p.PID, p.StartTime})
	}
	d.ids, d.left, d.tasks = append(d.ids, ids...), len(ids), true
	return nil
}

func (a *Agent) watchTask(n *run, p kernelns.Process) (kernelns.WatchID, error) {
	fd, err := a.kernel.OpenPID(p.PID, p.StartTime)
	if err != nil {
		return 0, err
	}
	defer fd.Close()
	return a.exits.Add(watched{run: n}, int(fd.Fd()))
}

// unwatch gives the descriptors of a run back that is over.
func (a *Agent) unwatch(n *run) {
	n.deaths.mu.Lock()
	defer n.deaths.mu.Unlock()
	for _, id := range n.deaths.ids {
		a.exits.Remove(id)
	}
	n.deaths.ids = nil
}

// watchExits notes who ended, in the kernel's order, and has the run settled when its CRIU is gone.
func (a *Agent) watchExits(ctx context.Context) error {
	for {
		exits, err := a.exits.Next(ctx)
		if err != nil {
			return err
		}
		for _, e := range exits {
			if n := e.Label.run; n.deaths.note(e.Label.criu, e.AtAdd) {
				a.settleAsk(n)
			}
		}
	}
}
