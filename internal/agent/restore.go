package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/internal/killpoint"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
	"github.com/nsalloc/nsalloc/pkg/criuhook/images"
)

// preRestore decides what a restore may be, before anything was forked.
func (a *Agent) preRestore(ctx context.Context, n *run, req *hookRequest) (string, error) {
	dir := req.files[criuhook.FDImages]
	if dir == nil {
		return "", errors.New("the image directory did not come along")
	}
	set, err := images.ReadContext(ctx, dir)
	if err != nil {
		return "", err
	}
	m, digest, err := readManifest(dir)
	switch {
	case errors.Is(err, os.ErrNotExist) && !set.Own():
		n.rec.Mode = modeNone
		return "", nil
	case errors.Is(err, os.ErrNotExist):
		return a.unknownImages(ctx, n, set)
	case err != nil:
		return "", err
	}
	if err := a.waitJoined(ctx); err != nil {
		return "", err
	}
	if pool := a.poolUUID(); m.Pool != pool {
		return "", fmt.Errorf("the images are of pool %s, this host is in pool %s; restore them there, or remove %s to restore them as unknown ones", m.Pool, pool, criuhook.ManifestName)
	}
	if m.Images != set.Digest {
		return "", fmt.Errorf("%s is of other images than those that it stands in; copy the whole image directory again", criuhook.ManifestName)
	}
	return a.claim(ctx, n, m, digest)
}

// claim asks the pool, and waits, bounded, where another host has not finished its part.
func (a *Agent) claim(ctx context.Context, n *run, m *criuhook.Manifest, digest alloc.Digest) (string, error) {
	// On disk before the claim: a claim that is committed is never one that nobody remembers.
	n.rec.Mode, n.rec.Sandbox, n.rec.Checkpoint, n.rec.Manifest = modeOwn, m.Sandbox, m.Checkpoint, digest
	killpoint.At(killpoint.AgentClaimRecording)
	if err := a.runs.save(n); err != nil {
		return "", err
	}
	killpoint.At(killpoint.AgentClaimRecorded)
	deadline, _ := ctx.Deadline()
	ctx, cancel := context.WithDeadline(ctx, deadline.Add(-claimMargin))
	defer cancel()
	for {
		answer, err := a.claimOnce(ctx, n, m, digest)
		if err == nil {
			return a.claimed(n, m, answer), nil
		}
		e, ok := errors.AsType[*alloc.Error](err)
		if !ok || e.Reason != alloc.ReasonNotConfirmed && e.Reason != alloc.ReasonClaimed && e.Reason != alloc.ReasonSettling {
			return "", err
		}
		t := time.NewTimer(max(e.RetryAfter, minClaimPause))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return "", err
		}
	}
}

const (
	// claimMargin is what is left of the agent's deadline to answer in when a claim was waited for.
	claimMargin = time.Second
	// minClaimPause keeps a waiting claim from asking all the time.
	minClaimPause = 50 * time.Millisecond
)

func (a *Agent) claimOnce(ctx context.Context, n *run, m *criuhook.Manifest, digest alloc.Digest) (alloc.ClaimAnswer, error) {
	done, err := a.registrar.hold(ctx)
	if err != nil {
		return alloc.ClaimAnswer{}, err
	}
	defer done()
	answer, err := a.pool.Claim(ctx, alloc.ClaimCommand{
		Mutation: a.registrar.mutation(), Checkpoint: m.Checkpoint, Digest: digest, BootID: a.bootID(), Run: n.key, Exe: n.rec.CRIUExe,
	})
	if err = a.registrar.failed(err); errors.Is(err, alloc.ErrManifest) {
		err = a.altered(ctx, m, err)
	}
	if err != nil {
		return answer, err
	}
	if answer.Outcome == alloc.MayClaim {
		_ = a.registrar.moved(answer.Handoff, nil)
	}
	return answer, nil
}

func (a *Agent) claimed(n *run, m *criuhook.Manifest, answer alloc.ClaimAnswer) string {
	if answer.Outcome == alloc.MayClaim {
		n.rec.Epoch = answer.Sandbox.Epoch
		return ""
	}
	n.rec.Mode, n.rec.Sandbox, n.rec.Epoch = modeClone, 0, 0
	return "restored as a clone with fresh serials: " + answer.Why
}

// unknownImages decides about images without a manifest.
func (a *Agent) unknownImages(ctx context.Context, n *run, set *images.Set) (string, error) {
	if err := a.waitJoined(ctx); err != nil {
		return "", err
	}
	if set.RunID != "" {
		c, err := a.pool.FindRun(ctx, set.RunID)
		switch {
		case err == nil:
			return "", fmt.Errorf("the images are checkpoint %s of sandbox %s, without the %s that host %s wrote into them; copy it along", c.Serial, c.Sandbox, criuhook.ManifestName, c.Source)
		case !errors.Is(err, alloc.ErrCheckpointNotFound):
			return "", err
		}
	}
	if pool := a.poolRec.Load(); pool != nil && pool.Policy.Unknown == alloc.PolicyRefuse {
		return "", fmt.Errorf("the images have no %s, the pool never heard of them, and its policy refuses such images", criuhook.ManifestName)
	}
	n.rec.Mode = modeAdopt
	return "the images have no " + criuhook.ManifestName + " and the pool never heard of them: adopted with fresh serials", nil
}

// postRestore is the last veto of a restore: every task stands in its final namespaces and none ran.
func (a *Agent) postRestore(ctx context.Context, n *run, req *hookRequest) (string, error) {
	switch {
	case n.rec.Mode == modeNone:
		return "", nil
	case n.rec.Closed:
		return "", errors.New("this restore was refused before")
	}
	dir := req.files[criuhook.FDImages]
	if dir == nil {
		return "", errors.New("the image directory did not come along")
	}
	set, err := images.ReadContext(ctx, dir)
	if err != nil {
		return "", err
	}
	if n.rec.Mode == "" {
		// Either pre-restore never came here, or it did and nothing had to be remembered.
		if _, _, err := readManifest(dir); errors.Is(err, os.ErrNotExist) && !set.Own() {
			n.rec.Mode = modeNone
			return "", nil
		}
		return "", errors.New("this restore never came to pre-restore; install the hook for all of CRIU's actions")
	}
	root, procs, err := a.treeOf(ctx, n, req)
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
	manifest := map[images.ID]criuhook.ManifestNamespace{}
	var dumped alloc.Serial // the sandbox that the images are of; 0 when nobody knows
	if n.rec.Mode != modeAdopt {
		m, digest, err := readManifest(dir)
		if err != nil {
			return "", err
		}
		// Byte for byte the manifest that the pool compared: what is in it decides which serial is whose.
		if digest != n.rec.Manifest || m.Images != set.Digest {
			return "", fmt.Errorf("%s or the images were changed between pre-restore and post-restore; copy the image directory again", criuhook.ManifestName)
		}
		dumped = m.Sandbox
		for _, ns := range m.Namespaces {
			manifest[images.ID{Type: ns.Type, CRIU: ns.CRIUID}] = ns
		}
	}
	// On disk before anything is committed: a binding is never one whose tree nobody remembers.
	n.rec.Tasks = tasksIn(procs)
	killpoint.At(killpoint.AgentTreeRecording)
	if err := a.runs.save(n); err != nil {
		return "", err
	}
	killpoint.At(killpoint.AgentTreeRecorded)
	if n.rec.Mode == modeOwn {
		return "", a.bind(ctx, n, root, list, manifest)
	}
	return "", a.registerRestored(ctx, n, root, list, manifest, dumped)
}

// bind pairs the sandbox's serials with the namespaces that the restore made, and commits.
func (a *Agent) bind(ctx context.Context, n *run, root kernelns.Process, list []images.Namespace, manifest map[images.ID]criuhook.ManifestNamespace) error {
	done, err := a.registrar.hold(ctx)
	if err != nil {
		return err
	}
	defer done()
	var moved []alloc.Binding
	var fresh []unnumbered
	for _, ns := range list {
		known, ok := manifest[ns.ID]
		hosts := a.isHosts(ns.ID.Type, ns.Kernel)
		switch {
		case !ok:
			return fmt.Errorf("namespace %s of the images is not in their manifest", ns.ID)
		case known.Owner == criuhook.OwnerSandbox && hosts:
			return fmt.Errorf("namespace %s was the tree's own on host %s and would be this host's here; restore with the options of the dump", ns.ID, n.rec.source(manifest))
		case known.Owner == criuhook.OwnerSandbox && a.boundElsewhere(ns, n.rec.Sandbox):
			return fmt.Errorf("namespace %s was the tree's own and is another sandbox's here; restore it into one of its own", ns.ID)
		case known.Owner == criuhook.OwnerSandbox:
			moved = append(moved, alloc.Binding{Serial: known.Serial, Type: ns.ID.Type, Kernel: ns.Kernel})
		case hosts || a.isBound(ns):
		case ns.External:
			if err := a.numberExternal(ctx, ns, n.rec.Sandbox, labelsOf(root)); err != nil {
				return err
			}
		default:
			// It was the host's there and is a new one here: CRIU restores time namespaces so.
			fresh = append(fresh, unnumbered{ns.ID.Type, ns.Kernel})
		}
	}
	cmd := alloc.BindCommand{
		Mutation: a.registrar.mutation(), Sandbox: n.rec.Sandbox, Epoch: n.rec.Epoch, BootID: a.bootID(), Run: n.key,
		Bindings: moved, Labels: labelsOf(root),
	}
	return a.commitBind(ctx, cmd, fresh)
}

func (a *Agent) isBound(ns images.Namespace) bool {
	_, ok := a.book.find(ns.ID.Type, ns.Kernel)
	return ok
}

func (a *Agent) boundElsewhere(ns images.Namespace, sandbox alloc.Serial) bool {
	p, ok := a.book.find(ns.ID.Type, ns.Kernel)
	return ok && p.sandbox != sandbox
}

func tasksIn(procs []kernelns.Process) []task {
	var list []task
	for _, p := range procs {
		if !p.Ended {
			list = append(list, task{p.PID, p.StartTime})
		}
	}
	return list
}

// source names the host that the images are from, for messages.
func (runRecord) source(manifest map[images.ID]criuhook.ManifestNamespace) string {
	for _, ns := range manifest {
		return "of boot " + ns.Kernel.BootID
	}
	return "unknown"
}

// registerRestored gives a tree without a claim fresh serials. dumped is the sandbox whose images it is of.
func (a *Agent) registerRestored(ctx context.Context, n *run, root kernelns.Process, list []images.Namespace, manifest map[images.ID]criuhook.ManifestNamespace, dumped alloc.Serial) error {
	done, err := a.registrar.hold(ctx)
	if err != nil {
		return err
	}
	defer done()
	item := alloc.RegisterItem{Labels: labelsOf(root)}
	item.Labels[labelRestoredBy] = restoredBy(n.rec)
	parents := map[string]alloc.Serial{}
	var add []unnumbered
	var external []images.Namespace
	for _, ns := range list {
		if a.isHosts(ns.ID.Type, ns.Kernel) || a.isBound(ns) {
			continue
		}
		if ns.External {
			external = append(external, ns)
			continue
		}
		add = append(add, unnumbered{ns.ID.Type, ns.Kernel})
		if known, ok := manifest[ns.ID]; ok && known.Owner == criuhook.OwnerSandbox {
			parents[ns.Kernel.Key(ns.ID.Type)] = known.Serial
		}
	}
	if n.rec.Mode == modeClone {
		item.ParentCheckpoint = n.rec.Checkpoint
	} else {
		item.Labels["adopted"] = "true"
	}
	switch {
	case n.rec.Sandbox != 0: // done before, in an action that is begun again
	case len(add) == 0:
		n.rec.Mode = modeNone
		return nil
	default:
		if err := a.dropParted(ctx, dumped, parents); err != nil {
			return err
		}
		s, err := a.registerOne(ctx, wish{item: item, add: add, parents: parents})
		if err != nil {
			return err
		}
		n.rec.Sandbox, n.rec.Epoch = s.Serial, s.Epoch
	}
	for _, ns := range external {
		if err := a.numberExternal(ctx, ns, n.rec.Sandbox, item.Labels); err != nil {
			return err
		}
	}
	return nil
}
