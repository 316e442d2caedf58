package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/internal/killpoint"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
	"github.com/nsalloc/nsalloc/pkg/criuhook/images"
)

// preDump numbers the tree while it still runs, so that little is left to do while it is frozen.
func (a *Agent) preDump(ctx context.Context, n *run, req *hookRequest) (string, error) {
	if err := a.refuseLazy(n.rec.CRIUPID); err != nil {
		return "", err
	}
	root, procs, err := a.treeOf(ctx, n, req)
	if err != nil {
		return "", err
	}
	if !a.treeOwns(procs) {
		n.rec.Mode = modeNone
		return "", nil
	}
	n.rec.Mode = modeOwn
	if err := a.askPool(ctx); err != nil {
		return "", err
	}
	return "", a.numberRunning(ctx, n, root, procs)
}

// unsettledFor is how long a dump waits, before anything is frozen, for an earlier one of the same
// sandbox to be settled.
const unsettledFor = 3 * time.Second

// errUnsettled says that the sandbox is in the middle of an earlier hand-off.
var errUnsettled = errors.New("an earlier dump or restore of it is not settled yet")

// numberRunning is numberDump for a tree that runs: it can wait.
func (a *Agent) numberRunning(ctx context.Context, n *run, root kernelns.Process, procs []kernelns.Process) error {
	until := time.Now().Add(unsettledFor)
	t := time.NewTicker(minClaimPause)
	defer t.Stop()
	for {
		_, err := a.numberDump(ctx, n, root, procs)
		if !errors.Is(err, errUnsettled) || time.Now().After(until) {
			return err
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return err
		}
	}
}

// askPool makes sure that the pool answers before anything is frozen: the veto at post-dump would come
// after a deadline with the container frozen all the while.
func (a *Agent) askPool(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, poolAnswers)
	defer cancel()
	if _, err := a.pool.GetPool(ctx); err != nil {
		return err
	}
	return a.askStore(ctx)
}

// poolAnswers is how long the pool may take to show that it is there.
const poolAnswers = 3 * time.Second

// refuseLazy refuses a dump whose pages are sent after post-dump: a broken transfer resumes the source,
// perhaps while the target runs. Only CRIU's command line tells; under RPC nothing does.
func (a *Agent) refuseLazy(criu int) error {
	line, err := os.ReadFile("/proc/" + strconv.Itoa(criu) + "/cmdline")
	if err != nil {
		return fmt.Errorf("read CRIU's command line: %w", err)
	}
	for arg := range bytes.SplitSeq(line, []byte{0}) {
		if string(arg) == "--lazy-pages" {
			return errors.New("lazy pages: a transfer that breaks resumes the source while the target may run; dump without --lazy-pages")
		}
	}
	return nil
}

func (a *Agent) treeOwns(procs []kernelns.Process) bool {
	for _, p := range procs {
		if a.ownsNamespace(p) {
			return true
		}
	}
	return false
}

// numberDump makes sure that the tree has serials and that its sandbox can be dumped here and now.
func (a *Agent) numberDump(ctx context.Context, n *run, root kernelns.Process, procs []kernelns.Process) (*alloc.Sandbox, error) {
	done, err := a.registrar.hold(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	if err := a.numberHost(ctx); err != nil {
		return nil, err
	}
	s, err := a.numberTree(ctx, root, procs, true)
	switch {
	case err != nil:
		return nil, err
	case s == nil || s.OfHost:
		return nil, fmt.Errorf("the root task %d lives in another sandbox's namespaces only; dump that sandbox's root task", root.PID)
	case s.State != alloc.StateRunning:
		return nil, fmt.Errorf("sandbox %s is %s: %w; try again in a moment, see: nsalloc sandbox get %s", s.Serial, s.State, errUnsettled, s.Serial)
	}
	if err := a.refuseStrays(ctx, n, s, root); err != nil {
		return nil, err
	}
	n.rec.Sandbox, n.rec.Epoch = s.Serial, s.Epoch
	return s, nil
}

// postDump is the last veto of a dump: the tree is frozen and its images are complete. The manifest is
// durable before the checkpoint is committed, the checkpoint is committed before 0 is on disk, and 0 is
// on disk before it is answered. Dying on any line of this is a veto to CRIU or counts as a 0: the
// settling finds which by the record.
func (a *Agent) postDump(ctx context.Context, n *run, req *hookRequest) (string, error) {
	switch {
	case n.rec.Mode == modeNone:
		return "", nil
	case n.rec.Closed:
		return "", errors.New("this dump was refused before")
	}
	dir := req.files[criuhook.FDImages]
	if dir == nil {
		return "", errors.New("the image directory did not come along")
	}
	set, err := images.ReadContext(ctx, dir)
	if err != nil {
		return "", err
	}
	root, procs, err := a.treeOf(ctx, n, req)
	if err != nil {
		return "", err
	}
	if n.rec.Mode == "" && !a.treeOwns(procs) {
		n.rec.Mode = modeNone // as at pre-dump, which nobody had to remember
		return "", nil
	}
	n.rec.Mode = modeOwn
	// Once more: the tree may have made namespaces between pre-dump and the freeze.
	s, err := a.numberDump(ctx, n, root, procs)
	if err != nil {
		return "", err
	}
	joined, err := images.Join(set, imageProcs(procs))
	if err != nil {
		return "", err
	}
	list, err := images.Namespaces(set, joined)
	if err != nil {
		return "", err
	}
	if moves, err := a.partExternal(ctx, s, list); err != nil {
		return "", err
	} else if !moves {
		n.rec.Mode = modeNone
		return "", nil
	}
	m := &criuhook.Manifest{
		Format: criuhook.ManifestFormat, Pool: a.poolUUID(), Sandbox: s.Serial, Epoch: s.Epoch,
		RunID: set.RunID, Source: a.cfg.Host, Images: set.Digest,
	}
	for _, ns := range list {
		entry, err := a.manifestEntry(s, ns)
		if err != nil {
			return "", err
		}
		m.Namespaces = append(m.Namespaces, entry)
	}
	if err := a.watchTasks(n, procs); err != nil {
		return "", err
	}
	return "", a.openCheckpoint(ctx, n, dir, m)
}

func imageProcs(procs []kernelns.Process) []images.Process {
	list := make([]images.Process, len(procs))
	for i, p := range procs {
		list[i] = images.Process{PID: p.PID, VPIDs: p.VPIDs, Namespaces: p.Namespaces}
	}
	return list
}

// manifestEntry says whose a namespace of the dump is.
func (a *Agent) manifestEntry(s *alloc.Sandbox, ns images.Namespace) (criuhook.ManifestNamespace, error) {
	p, ok := a.book.find(ns.ID.Type, ns.Kernel)
	if !ok {
		return criuhook.ManifestNamespace{}, fmt.Errorf("the %s namespace (%s) of the tree has no serial", ns.ID.Type, ns.ID)
	}
	owner := criuhook.OwnerExternal
	switch {
	case a.isHosts(ns.ID.Type, ns.Kernel):
		owner = criuhook.OwnerHost
	case p.sandbox == s.Serial && !ns.External:
		owner = criuhook.OwnerSandbox
	}
	return criuhook.ManifestNamespace{Type: ns.ID.Type, Serial: p.binding.Serial, CRIUID: ns.ID.CRIU, Kernel: ns.Kernel, Owner: owner}, nil
}

// openCheckpoint writes the manifest and commits the checkpoint that it names.
func (a *Agent) openCheckpoint(ctx context.Context, n *run, dir *os.File, m *criuhook.Manifest) error {
	done, err := a.registrar.hold(ctx)
	if err != nil {
		return err
	}
	defer done()
	spend, serials, err := a.registrar.take(ctx, 1)
	if err != nil {
		return err
	}
	m.Checkpoint = serials[0]
	// Burned from here on, whatever comes of it: a later dump must not get this serial, or the settling
	// would take one for the other.
	a.registrar.burn(m.Checkpoint)
	body, digest, err := m.Encode()
	if err != nil {
		return err
	}
	if err := writeManifest(dir, body); err != nil {
		return err
	}
	// On disk before it can be in the store: whatever happens next, the settling knows which dump it was.
	n.rec.Checkpoint, n.rec.Manifest, n.rec.RunID = m.Checkpoint, digest, m.RunID
	if s := a.book.sandbox(m.Sandbox); s != nil {
		if n.rec.Dumped, err = noted(s, a.book.isProvisional); err != nil {
			return err
		}
	}
	killpoint.At(killpoint.AgentCheckpointRecording)
	if err := a.runs.save(n); err != nil {
		return err
	}
	killpoint.At(killpoint.AgentCheckpointRecorded)
	h, err := a.pool.Open(ctx, alloc.OpenCommand{
		Mutation: a.registrar.mutation(), Spend: spend, Sandbox: m.Sandbox, Epoch: m.Epoch,
		Checkpoint: m.Checkpoint, RunID: m.RunID, Digest: digest,
	})
	if err := a.registrar.moved(h, err); err != nil {
		return err
	}
	_, left, _ := a.registrar.ranges.Take(spend.Count())
	a.registrar.spent(left)
	return nil
}

// writeManifest puts the manifest into the image directory, whole and durable or not at all.
func writeManifest(dir *os.File, body []byte) error {
	const temp = criuhook.ManifestName + ".tmp"
	at := int(dir.Fd())
	fail := func(err error) error {
		_ = unix.Unlinkat(at, temp, 0)
		return fmt.Errorf("write %s into the image directory: %w; it must be writable and have space", criuhook.ManifestName, err)
	}
	if err := unix.Unlinkat(at, temp, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return fail(err)
	}
	fd, err := unix.Openat(at, temp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fail(err)
	}
	f := os.NewFile(uintptr(fd), temp)
	defer f.Close()
	if _, err := f.Write(body); err != nil {
		return fail(err)
	}
	if err := f.Sync(); err != nil {
		return fail(err)
	}
	killpoint.At(killpoint.AgentManifestRenaming)
	if err := unix.Renameat(at, temp, at, criuhook.ManifestName); err != nil {
		return fail(err)
	}
	killpoint.At(killpoint.AgentManifestRenamed)
	// The descriptor that came along may be O_PATH, which cannot be synced.
	synced, err := unix.Openat(at, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fail(err)
	}
	defer unix.Close(synced)
	if err := unix.Fsync(synced); err != nil {
		return fail(err)
	}
	return nil
}
