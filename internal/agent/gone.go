package agent

import (
	"context"
	"errors"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// noteGone ends the sandboxes whose namespaces are all gone, and marks single ones that are; one by one,
// so that hooks get their turn in between. It returns how often what cannot be told was not seen.
func (a *Agent) noteGone(ctx context.Context, procs []kernelns.Process, unseen map[alloc.Serial]int) (map[alloc.Serial]int, error) {
	live := make(map[string]bool, len(procs))
	for _, p := range procs {
		for t, k := range p.Namespaces {
			live[k.Key(t)] = true
		}
	}
	still := map[alloc.Serial]int{}
	var errs []error
	for _, s := range a.book.all() {
		if s.State != alloc.StateRunning || s.OfHost && bootOf(s) == a.bootID() || a.runs.holds(s.Serial) {
			continue
		}
		var gone []alloc.Serial
		alive := 0
		bindings := s.Bindings
		if a.book.isAbsent(s) {
			bindings = nil // what has their identities now is others'
		}
		for _, b := range bindings {
			switch {
			case !b.Live():
			case live[b.Kernel.Key(b.Type)]:
				alive++
			case a.provenGone(b, unseen, still):
				gone = append(gone, b.Serial)
			default:
				alive++
			}
		}
		if len(gone) == 0 && alive > 0 {
			continue
		}
		if err := a.reportGone(ctx, s, gone, alive); err != nil {
			errs = append(errs, err)
			if !refused(err) {
				break // the pool is away; the others would wait for it one after the other
			}
		}
	}
	return still, errors.Join(errs...)
}

// missedSweeps is after how many sweeps without a task a namespace counts as gone where the kernel
// cannot tell.
const missedSweeps = 3

// provenGone reports whether a namespace that no task was seen in is gone. A name that still opens (a
// bind mount, a descriptor) proves the contrary.
func (a *Agent) provenGone(b alloc.Binding, unseen, still map[alloc.Serial]int) bool {
	if b.Kernel.BootID != a.bootID() {
		return true
	}
	alive, err := a.kernel.Alive(b.Type, b.Kernel)
	if err == nil {
		return !alive
	}
	still[b.Serial] = unseen[b.Serial] + 1
	return still[b.Serial] >= missedSweeps
}

func (a *Agent) reportGone(ctx context.Context, s *alloc.Sandbox, gone []alloc.Serial, alive int) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	done, err := a.registrar.hold(ctx)
	if err != nil {
		return err
	}
	defer done()
	if a.book.sandbox(s.Serial) != s || a.runs.holds(s.Serial) {
		return nil // it changed since it was looked at: the next sweep looks again
	}
	if alive > 0 {
		_, err := a.registrar.register(ctx, nil, nil, alloc.RegisterItem{Sandbox: s.Serial, Epoch: s.Epoch, Gone: gone})
		return err
	}
	cmd := alloc.EndCommand{Mutation: a.registrar.mutation(), Sandbox: s.Serial, Epoch: s.Epoch}
	var ended *alloc.Sandbox
	a.registrar.lend(func() { ended, err = a.pool.End(ctx, cmd) })
	if alloc.ReasonOf(err) == alloc.ReasonSettling {
		return nil // another host may have it; the next sweep asks again
	}
	if err != nil {
		return a.registrar.failed(err)
	}
	a.book.put(a.cfg.Host, ended)
	a.tally.ended.Add(1)
	a.log.Debug("ended", "sandbox", s.Serial, "command", s.Labels["command"])
	return nil
}
