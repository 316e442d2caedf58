package agent

import (
	"context"
	"fmt"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// ranUnasked deals with a tree that runs although it was never answered 0: an operator's bypass let
// CRIU go on. The claim stays with what runs, so it is committed late. The images need not be there any
// more, so namespaces are paired by type; where a type has several, which is which cannot be told, and
// they get fresh serials.
func (a *Agent) ranUnasked(ctx context.Context, n *run) (string, error) {
	s, _, err := a.pool.Sandbox(ctx, n.rec.Sandbox)
	if err != nil {
		return "", err
	}
	me := alloc.Claimant{Host: a.cfg.Host, BootID: n.rec.BootID, Run: runKey(n.rec.CRIUPID, n.rec.CRIUStart)}
	switch {
	case s.Claim == nil || s.Claim.Claimant != me:
		a.registrar.stale.Store(true)
		return "it runs without a claim, under fresh serials", nil
	case s.State == alloc.StateClaimed:
		if err := a.bindLate(ctx, n, s); err != nil {
			return "", err
		}
	}
	n.rec.ZeroGiven, n.rec.Closed = true, false // it runs: its death is an end
	a.log.Error("a restore runs that was never answered; its sandbox follows it", "run", n.key, "sandbox", s.Serial)
	return "restored, committed late", nil
}

func (a *Agent) bindLate(ctx context.Context, n *run, s *alloc.Sandbox) error {
	done, err := a.registrar.hold(ctx)
	if err != nil {
		return err
	}
	defer done()
	procs, err := a.kernel.Sweep(ctx)
	if err != nil {
		return err
	}
	procs = kernelns.Descendants(procs, n.rec.Init.PID)
	if len(procs) == 0 || procs[0].StartTime != n.rec.Init.Start {
		return fmt.Errorf("the root task %d is gone and others of its tree run on", n.rec.Init.PID)
	}
	own := map[alloc.NamespaceType][]unnumbered{}
	for _, u := range a.missing(procs) {
		own[u.t] = append(own[u.t], u)
	}
	had := map[alloc.NamespaceType][]alloc.Binding{}
	for _, b := range s.Bindings {
		if b.Live() {
			had[b.Type] = append(had[b.Type], b)
		}
	}
	cmd := alloc.BindCommand{
		Mutation: a.registrar.mutation(), Sandbox: s.Serial, Epoch: s.Epoch, BootID: n.rec.BootID, Run: s.Claim.Run, Labels: labelsOf(procs[0]),
	}
	var fresh []unnumbered
	for _, t := range alloc.NamespaceTypes() {
		if len(own[t]) == 1 && len(had[t]) == 1 {
			cmd.Bindings = append(cmd.Bindings, alloc.Binding{Serial: had[t][0].Serial, Type: t, Kernel: own[t][0].k})
		} else {
			fresh = append(fresh, own[t]...)
		}
	}
	return a.commitBind(ctx, cmd, fresh)
}

// commitBind spends serials on what is fresh and commits a binding; by the registrar's holder.
func (a *Agent) commitBind(ctx context.Context, cmd alloc.BindCommand, fresh []unnumbered) error {
	if len(fresh) > 0 {
		spend, serials, err := a.registrar.take(ctx, len(fresh))
		if err != nil {
			return err
		}
		cmd.Spend = spend
		for i, u := range fresh {
			cmd.Fresh = append(cmd.Fresh, alloc.Binding{Serial: serials[i], Type: u.t, Kernel: u.k})
		}
	}
	h, left, err := a.pool.Bind(ctx, cmd)
	if err := a.registrar.moved(h, err); err != nil {
		return err
	}
	a.registrar.spent(left)
	return nil
}
