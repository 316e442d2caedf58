package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nsalloc/nsalloc/internal/killpoint"
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
	BootID    string `json:"boot_id"`
	CRIUPID   int    `json:"criu_pid"`
	CRIUStart uint64 `json:"criu_start"`
	// CRIUExe is the file that CRIU executes: a task that executes it too is not restored yet.
	CRIUExe string         `json:"criu_exe,omitempty"`
	Phase   criuhook.Phase `json:"phase"`
	Mode    mode           `json:"mode,omitempty"`
	Began   time.Time      `json:"began"`
	// Answers are the verdicts given, by action: an action that comes again gets the same.
	Answers map[criuhook.Action]criuhook.Response `json:"answers,omitempty"`
	// Last is the last action that came.
	Last criuhook.Action `json:"last,omitempty"`

	Sandbox    alloc.Serial `json:"sandbox,omitempty"`
	Epoch      alloc.Epoch  `json:"epoch,omitempty"`
	Checkpoint alloc.Serial `json:"checkpoint,omitempty"`
	// Manifest is the digest of the manifest that a restore was decided on, or that a dump has written.
	Manifest alloc.Digest `json:"manifest,omitzero"`
	// RunID and Dumped are what a dump recorded: CRIU's run id, and the sandbox as it was. Evidence is what was seen of
	// its tree, once the pool was told. A pool whose store forgets that is told again (again.go).
	RunID    string          `json:"run_id,omitempty"`
	Dumped   json.RawMessage `json:"dumped,omitempty"`
	Evidence alloc.Evidence  `json:"evidence,omitempty"`
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

	// kept is what a newer agent wrote and this one has no name for.
	kept unknown
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
	// seen is what the tree was seen to be after its CRIU had gone, and since when; by whoever holds turn.
	seen      fate
	seenSince time.Time
	deaths    deaths
	again     atomic.Bool // it is going to be looked at again
	trouble   string      // why it was not settled the last time; by the one worker that settles it
	// lost, where it is set, says that its record is, and refuses whatever it brings; never changed.
	lost error
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

// runName is what a run's file is called by: it names the CRIU process for ever.
type runName struct {
	boot  string
	pid   int
	start uint64
}

func (n runName) file() string {
	return fmt.Sprintf("%s/%s-%s%s", runsDir, n.boot, runKey(n.pid, n.start), runSuffix)
}

func fileOf(rec runRecord) string {
	return runName{rec.BootID, rec.CRIUPID, rec.CRIUStart}.file()
}

// parseRunFile is the inverse of runName.file, of a name in the directory.
func parseRunFile(base string) (n runName, ok bool) {
	stem, ok := strings.CutSuffix(base, runSuffix)
	const bootLen = len("00000000-0000-0000-0000-000000000000")
	if !ok || len(stem) <= bootLen || stem[bootLen] != '-' {
		return n, false
	}
	n.boot = stem[:bootLen]
	if n.pid, n.start, ok = parseRunKey(stem[bootLen+1:]); !ok {
		return n, false
	}
	return n, n.file() == runsDir+"/"+base
}

// get finds the run of a live CRIU, or begins one.
func (r *runs) get(pid int, start uint64, phase criuhook.Phase) *run {
	r.mu.Lock()
	defer r.mu.Unlock()
	key := runKey(pid, start)
	if known := r.byKey[key]; known != nil {
		return known
	}
	n := newRun(runRecord{
		BootID: r.a.bootID(), CRIUPID: pid, CRIUStart: start, CRIUExe: fileID(fmt.Sprintf("/proc/%d/exe", pid)), Phase: phase, Began: time.Now().UTC(),
	})
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
	if err := r.a.state.write(fileOf(n.rec), n.rec, n.rec.kept); err != nil {
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
// One whose record is damaged does not keep the others waiting: see lose.
func (r *runs) load() error {
	names, aside, err := runFiles(r.a.state.path)
	if err != nil {
		return err
	}
	var lost []runName
	for _, name := range names {
		rec, err := readRun(r.a.state.path, name)
		if _, damaged := errors.AsType[*damage](err); damaged {
			r.a.log.Error("the record of a run is damaged and counts as lost; look at the disk", "cause", err, "kept_as", name.file()+damagedSuffix)
			lost = append(lost, name)
			continue
		}
		if err != nil {
			return err
		}
		n := newRun(rec)
		if rec.Phase == criuhook.Dump && rec.Checkpoint != 0 {
			r.a.registrar.burn(rec.Checkpoint) // nobody else is there yet
		}
		r.add(n)
	}
	if err := r.lose(lost); err != nil {
		return err
	}
	for _, name := range append(aside, lost...) {
		r.refuse(name)
	}
	return nil
}

// add makes a run of an earlier life known.
func (r *runs) add(n *run) {
	if n.rec.BootID != r.a.bootID() {
		n.key = n.rec.BootID + "-" + n.key
	}
	r.mu.Lock()
	r.byKey[n.key] = n
	r.mu.Unlock()
	r.publish(n)
}

// lose goes on without the records of some runs, as if the disk were lost. Their sandboxes are settled as
// orphans: what is not known counts as given (orphans.go). A serial that only such a record named must not
// be given to anything else: the host begins a new life, with ranges of its own. Dying before the records
// are put aside begins one more, and does no harm.
func (r *runs) lose(lost []runName) error {
	if len(lost) == 0 {
		return nil
	}
	if err := r.a.state.newLife(); err != nil {
		return err
	}
	for _, name := range lost {
		if err := r.a.state.putAside(name.file()); err != nil {
			return err
		}
	}
	return nil
}

// refuse has everything refused that the CRIU of a lost record still brings: the record may have held a
// veto, after which nothing of that run is committed. Its file, put aside, has the next agent do the same.
func (r *runs) refuse(name runName) {
	if name.boot != r.a.bootID() {
		return
	}
	n := newRun(runRecord{
		BootID: name.boot, CRIUPID: name.pid, CRIUStart: name.start, Phase: criuhook.Either, Began: time.Now().UTC(), Closed: true,
	})
	n.lost = fmt.Errorf("what the agent had noted of CRIU %d (%s) was damaged and counts as lost; begin this dump or restore anew", name.pid, name.file()+damagedSuffix)
	r.add(n)
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

// gaveZero reports whether 0 may have been answered to the dump that made a checkpoint: what no record
// knows counts as given.
func (r *runs) gaveZero(checkpoint alloc.Serial) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, rec := range r.seen {
		if rec.Phase == criuhook.Dump && rec.Checkpoint == checkpoint {
			return rec.ZeroGiven
		}
	}
	return true
}

// seenOf is what the pool was told that was seen of the tree of the dump that made a checkpoint; "" for nothing.
func (r *runs) seenOf(checkpoint alloc.Serial) alloc.Evidence {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, rec := range r.seen {
		if rec.Phase == criuhook.Dump && rec.Checkpoint == checkpoint {
			return rec.Evidence
		}
	}
	return ""
}

// building lists the trees that restores are making: they are not complete and must not get serials from
// the sweep. CRIU's root task is its child, or, under a runtime that wants the tree for itself, its
// sibling; once its number is known what else CRIU's parent starts is its own affair.
func (r *runs) building() []tree {
	return r.trees(func(rec runRecord) bool { return !rec.ZeroGiven })
}

// restoring lists the trees of building, and those that were answered 0 and whose CRIU may not have let
// them go yet.
func (r *runs) restoring() []tree { return r.trees(func(runRecord) bool { return true }) }

func (r *runs) trees(of func(runRecord) bool) []tree {
	r.mu.Lock()
	defer r.mu.Unlock()
	var trees []tree
	for _, rec := range r.seen {
		if rec.Phase != criuhook.Restore || !rec.Over.IsZero() || rec.BootID != r.a.bootID() || !of(rec) {
			continue
		}
		criu := task{rec.CRIUPID, rec.CRIUStart}
		trees = append(trees, below(criu))
		if rec.Init.PID != 0 {
			trees = append(trees, below(rec.Init))
		} else {
			trees = append(trees, beside(criu))
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
		killpoint.At(killpoint.AgentForgetting)
		if err := r.a.state.remove(fileOf(rec)); err != nil {
			r.a.log.Warn("an old run stays on disk", "cause", err)
			return
		}
		killpoint.At(killpoint.AgentForgotten)
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
