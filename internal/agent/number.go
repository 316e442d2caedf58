package agent

import (
	"context"
	"errors"
	"maps"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// wish is what one sandbox wants registered: serials for the namespaces of add, and what item says. An
// item without a sandbox makes a new one. parents names what a clone's namespaces were cloned from.
type wish struct {
	item    alloc.RegisterItem
	add     []unnumbered
	parents map[string]alloc.Serial
	// keeps says that the serials may be provisional: nothing but the numbering waits for the commit.
	keeps bool
}

// serials is how many it takes.
func (w wish) serials() int {
	n := len(w.add)
	if w.item.Sandbox == 0 {
		n++
	}
	return n
}

// registerAll commits the wishes in one transaction; by the registrar's holder.
func (a *Agent) registerAll(ctx context.Context, wishes []wish) ([]*alloc.Sandbox, error) {
	n := 0
	for _, w := range wishes {
		n += w.serials()
	}
	var spend alloc.Ranges
	var serials []alloc.Serial
	if n > 0 {
		var err error
		if spend, serials, err = a.registrar.take(ctx, n); err != nil {
			return nil, err
		}
	}
	entries := itemsOf(wishes, serials)
	items := make([]alloc.RegisterItem, len(entries))
	for i, e := range entries {
		items[i] = e.RegisterItem
	}
	var flying []entry
	if canWait(wishes) {
		flying = entries
	}
	out, err := a.registrar.register(ctx, spend, flying, items...)
	if err != nil {
		a.registrar.keepAssigned(err, wishes, entries)
		return nil, err
	}
	for i, s := range out {
		if len(wishes[i].add) > 0 {
			a.registrar.sayReplaced(items[i].Add)
			a.tally.numbered(wishes[i].item.Sandbox == 0, len(wishes[i].add))
			a.log.Debug("registered", "sandbox", s.Serial, "namespaces", len(wishes[i].add), "command", s.Labels["command"])
		}
	}
	return out, nil
}

// itemsOf is what the wishes register under serials, which are as many as they take.
func itemsOf(wishes []wish, serials []alloc.Serial) []entry {
	next := func() alloc.Serial {
		s := serials[0]
		serials = serials[1:]
		return s
	}
	entries := make([]entry, 0, len(wishes))
	for _, w := range wishes {
		e := entry{RegisterItem: w.item, New: w.item.Sandbox == 0}
		if e.New {
			e.Sandbox = next()
		}
		for _, u := range w.add {
			e.Add = append(e.Add, alloc.Binding{Serial: next(), Type: u.t, Kernel: u.k, Parent: w.parents[u.k.Key(u.t)]})
		}
		entries = append(entries, e)
	}
	return entries
}

func (a *Agent) registerOne(ctx context.Context, w wish) (*alloc.Sandbox, error) {
	out, err := a.registerAll(ctx, []wish{w})
	if err != nil {
		return nil, err
	}
	return out[0], nil
}

// numberGroups numbers trees, at most most in one commit; by the registrar's holder. A tree that shares a
// namespace or a sandbox with one that waits for the same commit waits for the next: it has to see what that
// one got.
func (a *Agent) numberGroups(ctx context.Context, groups []group, most int, commit func(context.Context, []wish) error) error {
	var batch []wish
	taken := map[string]bool{} // namespaces and sandboxes of the batch
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		err := commit(ctx, batch)
		batch = nil
		clear(taken)
		return err
	}
	var errs []error
	for _, g := range groups {
		full := len(batch) == most || sharesAny(g, taken)
		if !full {
			known, w := a.wishOf(g.root, g.procs, false)
			full = w != nil && known != nil && taken[known.Serial.String()]
		}
		if full {
			if err := flush(); err != nil && !refused(err) {
				return errors.Join(append(errs, err)...)
			} else if err != nil {
				errs = append(errs, err)
			}
		}
		known, w := a.wishOf(g.root, g.procs, false)
		if w == nil {
			continue
		}
		if known != nil {
			taken[known.Serial.String()] = true
		}
		for _, u := range w.add {
			taken[u.k.Key(u.t)] = true
		}
		batch = append(batch, *w)
	}
	return errors.Join(append(errs, flush())...)
}

// registerEach commits the wishes, in order. What the pool refuses is halved, so that one that is at fault
// holds up nobody else. Its error is of all that were refused alone, or why it did not go on.
func (a *Agent) registerEach(ctx context.Context, wishes []wish) error {
	_, err := a.registerAll(ctx, wishes)
	if err == nil || !refused(err) || len(wishes) == 1 {
		return err
	}
	half := len(wishes) / 2
	first := a.registerEach(ctx, wishes[:half])
	if first != nil && !refused(first) {
		return first
	}
	return errors.Join(first, a.registerEach(ctx, wishes[half:]))
}

func sharesAny(g group, taken map[string]bool) bool {
	if len(taken) == 0 {
		return false
	}
	for _, p := range g.procs {
		for t, k := range p.Namespaces {
			if taken[k.Key(t)] {
				return true
			}
		}
	}
	return false
}

// refused reports whether the pool decided against a command: others may fare better.
func refused(err error) bool {
	switch alloc.ReasonOf(err) {
	case "", alloc.ReasonUnknownOutcome, alloc.ReasonUnavailable, alloc.ReasonRecovering, alloc.ReasonConflict,
		alloc.ReasonExhausted, alloc.ReasonStaleIncarnation, alloc.ReasonHostUnknown, alloc.ReasonPoolMissing, alloc.ReasonRange:
		return false
	}
	return true
}

// numberTree makes sure that every own namespace of a tree has a serial, and returns the tree's
// sandbox; by the registrar's holder. relabel also renews the labels of a sandbox that was registered
// before its tree had its final name.
func (a *Agent) numberTree(ctx context.Context, root kernelns.Process, procs []kernelns.Process, relabel bool) (*alloc.Sandbox, error) {
	known, w := a.wishOf(root, procs, relabel)
	if w == nil {
		return known, nil
	}
	return a.registerOne(ctx, *w)
}

// wishOf says which sandbox a tree is, and what it needs; nil for nothing. What another sandbox holds
// stays there.
func (a *Agent) wishOf(root kernelns.Process, procs []kernelns.Process, relabel bool) (*alloc.Sandbox, *wish) {
	add := a.missing(procs)
	known := a.sandboxOf(root)
	labels := labelsOf(root)
	if known != nil && (known.State != alloc.StateRunning || known.OfHost) {
		if len(add) > 0 && known.OfHost {
			known = nil
		} else {
			return known, nil // in a hand-off: whoever leads that decides
		}
	}
	if known == nil {
		if len(add) == 0 {
			return nil, nil // everything belongs to others: a process that entered their namespaces
		}
		return nil, &wish{item: alloc.RegisterItem{Labels: labels}, add: add, keeps: true}
	}
	stale := relabel && !containsLabels(known.Labels, labels)
	if len(add) == 0 && !stale {
		return known, nil
	}
	w := &wish{item: alloc.RegisterItem{Sandbox: known.Serial, Epoch: known.Epoch}, add: add, keeps: true}
	if stale {
		w.item.Labels = labels
	}
	return known, w
}

func containsLabels(have, want map[string]string) bool {
	merged := maps.Clone(have)
	if merged == nil {
		merged = map[string]string{}
	}
	maps.Copy(merged, want)
	return maps.Equal(have, merged)
}
