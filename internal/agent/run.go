package agent

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// mode is what a run is to us.
type mode string

const (
	// modeNone: the tree has no namespaces of its own; none of our business.
	modeNone mode = "none"
	// modeOwn: a dump of a sandbox of ours, or a restore that claimed.
	modeOwn mode = "own"
	// modeClone: a restore with fresh serials of images whose sandbox we know.
	modeClone mode = "clone"
	// modeAdopt: a restore of images that the pool never heard of.
	modeAdopt mode = "adopt"
)

// runRecord is what the agent must remember of one CRIU process; it is on disk before anything that
// rests on it is answered.
type runRecord struct {
	BootID    string         `json:"boot_id"`
	CRIUPID   int            `json:"criu_pid"`
	CRIUStart uint64         `json:"criu_start"`
	Phase     criuhook.Phase `json:"phase"`
	Mode      mode           `json:"mode,omitempty"`
	Began     time.Time      `json:"began"`
	// Answers are the verdicts given, by action: an action that comes again gets the same.
	Answers map[criuhook.Action]criuhook.Response `json:"answers,omitempty"`
	// Last is the last action that came.
	Last criuhook.Action `json:"last,omitempty"`

	Sandbox    alloc.Serial `json:"sandbox,omitempty"`
	Epoch      alloc.Epoch  `json:"epoch,omitempty"`
	Checkpoint alloc.Serial `json:"checkpoint,omitempty"`
	// ZeroGiven: 0 was, or is about to be, answered at the last stage that can veto. Written before the
	// answer leaves, so a crash in between counts as given.
	ZeroGiven bool `json:"zero_given,omitempty"`
	// Closed: that stage was answered with a veto; nothing of this run is committed any more.
	Closed bool `json:"closed,omitempty"`
	// Resumed: an action came that only comes when the tree goes on: network-unlock of a dump, pre-resume
	// of a restore.
	Resumed bool `json:"resumed,omitempty"`
	// Tasks is the tree at that stage.
	Tasks []task `json:"tasks,omitempty"`
	// Init is the tree's root, as far as it is known.
	Init task `json:"init,omitzero"`

	// Over and Outcome are set when nothing is left to settle.
	Over    time.Time `json:"over,omitzero"`
	Outcome string    `json:"outcome,omitempty"`
}

// task names a process for ever on one boot.
type task struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"`
}

// run is one CRIU process that called the hook.
type run struct {
	key string
	// turn serializes the actions of the run and its settling; it can be waited for with a deadline.
	turn chan struct{}
	rec  runRecord // by whoever holds turn; a copy for readers is in runs.seen
	// ranSince is when the tree was first seen running on after its CRIU had gone; by whoever holds turn.
	ranSince time.Time
	deaths   deaths
}

// deaths is the order in which a run's processes ended, as the kernel told it.
type deaths struct {
	mu        sync.Mutex
	watched   bool // every task and CRIU are watched
	left      int  // tasks that have not ended
	criuGone  bool
	leftThen  int  // left when CRIU ended
	orderLost bool // somebody was over before we watched
}

// note adds one end. It reports whether there is something to settle now.
func (d *deaths) note(criu, atAdd bool) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.orderLost = d.orderLost || atAdd
	if criu {
		d.criuGone, d.leftThen = true, d.left
	} else {
		d.left--
	}
	return d.criuGone || d.left == 0
}

// look gives what is known: whether the run is watched at all, CRIU gone, tasks left, and whether every
// task was seen to end while CRIU lived.
func (d *deaths) look() (watched, criuGone bool, left int, stoppedLive bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	stoppedLive = d.watched && !d.orderLost && d.left == 0 && (!d.criuGone || d.leftThen == 0)
	return d.watched, d.criuGone, d.left, stoppedLive
}

// runs is every run that is not forgotten.
type runs struct {
	a  *Agent
	mu sync.Mutex
	// by key; entries are added by whoever brings the first action.
	byKey map[string]*run
	// seen is what others may read of each run: the record as it last was on disk.
	seen map[string]runRecord
}

func newRuns(a *Agent) *runs {
	return &runs{a: a, byKey: map[string]*run{}, seen: map[string]runRecord{}}
}

// runKey names a CRIU process in the pool's records: with the boot id it is unique for ever.
func runKey(pid int, start uint64) string { return fmt.Sprintf("%d-%d", pid, start) }

func parseRunKey(key string) (pid int, start uint64, ok bool) {
	before, after, found := strings.Cut(key, "-")
	pid, err1 := strconv.Atoi(before)
	start, err2 := strconv.ParseUint(after, 10, 64)
	return pid, start, found && err1 == nil && err2 == nil
}

func fileOf(rec runRecord) string {
	return fmt.Sprintf("runs/%s-%s.run", rec.BootID, runKey(rec.CRIUPID, rec.CRIUStart))
}

// get finds the run of a live CRIU, or begins one.
func (r *runs) get(pid int, start uint64, phase criuhook.Phase) *run {
	r.mu.Lock()
	defer r.mu.Unlock()
	key := runKey(pid, start)
	if known := r.byKey[key]; known != nil {
		return known
	}
	n := newRun(runRecord{BootID: r.a.bootID(), CRIUPID: pid, CRIUStart: start, Phase: phase, Began: time.Now().UTC()})
	r.byKey[key] = n
	r.seen[key] = n.rec
	return n
}

func newRun(rec runRecord) *run {
	n := &run{key: runKey(rec.CRIUPID, rec.CRIUStart), turn: make(chan struct{}, 1), rec: rec}
	n.turn <- struct{}{}
	return n
}

// hold takes the run's turn.
func (n *run) hold(ctx context.Context) (func(), error) {
	select {
	case <-n.turn:
		return func() { n.turn <- struct{}{} }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("an earlier action of this run is still under way: %w", context.Cause(ctx))
	}
}

// save makes the record durable; by the holder of the turn.
func (r *runs) save(n *run) error {
	if err := r.a.state.write(fileOf(n.rec), n.rec); err != nil {
		return err
	}
	r.publish(n)
	return nil
}

// publish lets readers see the record.
func (r *runs) publish(n *run) {
	rec := n.rec
	rec.Answers = nil // the holder goes on writing that map
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen[n.key] = rec
}

// load opens the runs on disk. Those of another boot, or whose CRIU is gone, are settled like any other.
func (r *runs) load() error {
	names, err := r.a.state.runFiles()
	if err != nil {
		return err
	}
	for _, name := range names {
		var rec runRecord
		if err := r.a.state.read(name, &rec); err != nil {
			return err
		}
		n := newRun(rec)
		if rec.Phase == criuhook.Dump && rec.Checkpoint != 0 {
			r.a.registrar.burn(rec.Checkpoint) // nobody else is there yet
		}
		if rec.BootID != r.a.bootID() {
			n.key = rec.BootID + "-" + n.key
		}
		r.mu.Lock()
		r.byKey[n.key] = n
		r.mu.Unlock()
		r.publish(n)
	}
	return nil
}

// list is the records, newest first.
func (r *runs) list() []runRecord {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := make([]runRecord, 0, len(r.seen))
	for _, rec := range r.seen {
		list = append(list, rec)
	}
	slices.SortFunc(list, func(x, y runRecord) int { return y.Began.Compare(x.Began) })
	return list
}

// open lists the runs that are not over.
func (r *runs) open() []*run {
	r.mu.Lock()
	defer r.mu.Unlock()
	var list []*run
	for key, n := range r.byKey {
		if r.seen[key].Over.IsZero() {
			list = append(list, n)
		}
	}
	slices.SortFunc(list, func(x, y *run) int { return cmp.Compare(x.key, y.key) })
	return list
}

// holds reports whether a run that is not over works on a sandbox.
func (r *runs) holds(s alloc.Serial) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, rec := range r.seen {
		if rec.Over.IsZero() && rec.Sandbox == s && s != 0 {
			return true
		}
	}
	return false
}

// building lists the trees that restores are making: they have no serials yet and must not get any
// from the sweep. CRIU's root task is its child, or, under a runtime that wants the tree for itself,
// its sibling.
func (r *runs) building() []tree {
	r.mu.Lock()
	defer r.mu.Unlock()
	var trees []tree
	for _, rec := range r.seen {
		if rec.Phase != criuhook.Restore || !rec.Over.IsZero() || rec.ZeroGiven && rec.Mode != modeNone || rec.BootID != r.a.bootID() {
			continue
		}
		trees = append(trees, tree{pid: rec.CRIUPID, since: rec.CRIUStart})
		if rec.Init.PID != 0 {
			trees = append(trees, tree{pid: rec.Init.PID, since: rec.Init.Start})
		}
		if p, err := r.a.kernel.Process(rec.CRIUPID); err == nil && p.StartTime == rec.CRIUStart && p.PPID > 1 {
			trees = append(trees, tree{pid: p.PPID, since: rec.CRIUStart})
		}
	}
	return trees
}

// keepRuns is how many runs that are over stay on disk, for people to look at.
const keepRuns = 100

// forget drops the oldest runs that are over.
func (r *runs) forget() {
	list := r.list()
	over := 0
	for _, rec := range list {
		if rec.Over.IsZero() {
			continue
		}
		if over++; over <= keepRuns {
			continue
		}
		if err := r.a.state.remove(fileOf(rec)); err != nil {
			r.a.log.Warn("an old run stays on disk", "cause", err)
			return
		}
		key := runKey(rec.CRIUPID, rec.CRIUStart)
		if rec.BootID != r.a.bootID() {
			key = rec.BootID + "-" + key
		}
		r.mu.Lock()
		delete(r.byKey, key)
		delete(r.seen, key)
		r.mu.Unlock()
	}
}

// watched is the label of a watched process.
type watched struct {
	run  *run
	criu bool
}

// watch follows CRIU and, at the stage where the tree is complete, every task of it; by the holder of
// the turn. From here on the kernel tells in which order they end.
func (a *Agent) watch(n *run, tasks []kernelns.Process) error {
	d := &n.deaths
	d.mu.Lock()
	defer d.mu.Unlock() // ends are noted after the last task was added
	if d.watched {
		return nil
	}
	add := func(pid int, start uint64, criu bool) error {
		fd, err := a.kernel.OpenPID(pid, start)
		if err != nil {
			return err
		}
		defer fd.Close()
		_, err = a.exits.Add(watched{run: n, criu: criu}, int(fd.Fd()))
		return err
	}
	n.rec.Tasks = nil
	for _, p := range tasks {
		if p.Ended {
			continue
		}
		if err := add(p.PID, p.StartTime, false); err != nil {
			return fmt.Errorf("watch task %d (%s): %w", p.PID, p.Comm, err)
		}
		n.rec.Tasks = append(n.rec.Tasks, task{p.PID, p.StartTime})
		d.left++
	}
	if err := add(n.rec.CRIUPID, n.rec.CRIUStart, true); err != nil {
		return fmt.Errorf("watch CRIU %d: %w", n.rec.CRIUPID, err)
	}
	d.watched = true
	return nil
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
				go a.settleSoon(ctx, n)
			}
		}
	}
}

// gone reports whether a process has ended; an error other than that it cannot be found counts as alive.
func (a *Agent) gone(t task) bool {
	fd, err := a.kernel.OpenPID(t.PID, t.Start)
	if err != nil {
		return os.IsNotExist(err) || isGone(err)
	}
	defer fd.Close()
	over, err := kernelns.Exited(int(fd.Fd()))
	return err == nil && over
}
