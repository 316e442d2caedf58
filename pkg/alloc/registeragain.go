package alloc

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// AgainCommand says what lives on a host, in a pool whose store has forgotten history.
type AgainCommand struct {
	Mutation
	Items []AgainItem `json:"items"`
	// Last says that with these, and with what was said in earlier requests, the host has said everything.
	Last bool `json:"last"`
}

// AgainItem is one sandbox that lives on the caller, as the host has it; or did last, as far as the host knows.
type AgainItem struct {
	Sandbox Serial `json:"sandbox"`
	// Epoch is the one in which the host became its owner.
	Epoch Epoch `json:"epoch"`
	// Bindings are those that live; Kernel is of the caller's boot. Bound is when the pool bound it first, as far
	// as the host knows.
	Bindings []Binding         `json:"bindings"`
	Labels   map[string]string `json:"labels,omitempty"`
	OfHost   bool              `json:"of_host,omitempty"`
	// Checkpoint is its current one, Parent what it was cloned from, and Created when it was registered first, as
	// far as the host knows.
	Checkpoint Serial    `json:"checkpoint,omitempty"`
	Parent     *Parent   `json:"parent,omitempty"`
	Created    time.Time `json:"created,omitzero"`
	// From are other sandboxes in whose records serials of Bindings stand: the namespaces have parted from them.
	From []Serial `json:"from,omitempty"`
	// Dump is the dump that the host recorded in this epoch and answered 0 to; nil for none. The tree may be dead, and
	// Bindings are then as they were, of an earlier boot perhaps.
	Dump *AgainDump `json:"dump,omitempty"`
	// Over says that the sandbox was bound on the host in this epoch, from Checkpoint, and that nothing of it lives. It
	// has no bindings.
	Over bool `json:"over,omitempty"`
}

// AgainDump is a dump that a host has recorded.
type AgainDump struct {
	Checkpoint Serial `json:"checkpoint"`
	RunID      string `json:"run_id,omitempty"`
	Digest     Digest `json:"digest"`
}

// AgainAnswer is what became of one item.
type AgainAnswer struct {
	// Sandbox is the record as committed; where the item was refused, as it is, nil for none.
	Sandbox *Sandbox
	// Err says why the item was refused; nil when it is done. A tree that was refused has lost: its sandbox went on
	// elsewhere, or is over, and what lives on the caller is a clone.
	Err *Error
}

// Limits of one RegisterAgain, so that it fits etcd's 128 operations: what is read, and what is written.
const (
	maxAgainRecords = 120
	maxAgainFrom    = 16
)

// RegisterAgain records what lives on a host, under the serials and epochs that it has, in a generation that the
// host has not been in before. Again says what becomes of each. Who is refused is refused alone: all others are
// committed, in one transaction. A host that has said everything is settled, and is not asked again before the next
// generation.
//
// Committed when it returns: every item whose answer has no error, and with Last that the host is settled. Errors:
// ErrInvalid, ErrBound (a serial or a live namespace stands twice in the request), ErrWrongState (the host has said
// everything), ErrTooLarge (send fewer items: with their checkpoints they are more than one transaction takes),
// ErrStaleIncarnation, ErrHostUnknown, ErrRequestReused, ErrRequestExpired, ErrConflict, ErrUnknownOutcome.
func (s *Service) RegisterAgain(ctx context.Context, cmd AgainCommand) ([]AgainAnswer, error) {
	if err := cmd.validate(); err != nil {
		return nil, err
	}
	if err := s.checkRequest(cmd.RequestID); err != nil {
		return nil, err
	}
	digest, err := digestOf(cmd)
	if err != nil {
		return nil, err
	}
	var answers []AgainAnswer
	var current map[Serial]Serial
	keys := func() (keys []Key, err error) {
		// Which checkpoints are current is known only after a read; decide's guarded read proves it.
		keys, current, err = s.againKeys(ctx, cmd)
		return keys, err
	}
	err = s.change(ctx, cmd.Mutation, keys, func(w *world) error {
		answers = nil
		done, err := w.host.Requests.find(cmd.RequestID, digest)
		if err != nil {
			return err
		}
		for serial, c := range current {
			if sb, err := w.sandbox(serial); err == nil && sb.Checkpoint != c || err != nil && c != 0 {
				return errMoved
			}
		}
		if !done && w.host.Settled >= w.pool.Generation {
			return refuse(ReasonWrongState, "host "+cmd.Host, "it has said what lives on it in generation %d already; nothing was changed", w.pool.Generation)
		}
		if answers, err = w.registerAgain(cmd); err != nil {
			return err
		}
		if done {
			w.tx.Put = nil // it was committed before; the answers are of what is there
			return nil
		}
		if cmd.Last {
			w.host.Settled = w.pool.Generation
		}
		w.host.Requests = w.host.Requests.with(cmd.RequestID, digest, w.moment.Now)
		w.put(w.host)
		return tooMany(len(w.tx.Put))
	})
	if err != nil {
		return nil, err
	}
	if cmd.Last {
		_, _ = s.Settle(ctx) // else the next sweep of a server does it
	}
	return answers, nil
}

func tooMany(records int) error {
	if records > maxAgainRecords {
		return refuse(ReasonTooLarge, "items", "with their checkpoints they are %d records, and one transaction takes %d; send fewer", records, maxAgainRecords)
	}
	return nil
}

func (cmd AgainCommand) validate() error {
	if len(cmd.Items) > MaxRegister || len(cmd.Items) == 0 && !cmd.Last {
		return invalid("items", fmt.Sprintf("%d, 1 to %d are allowed, and none with last", len(cmd.Items), MaxRegister))
	}
	used, live := map[Serial]bool{}, map[kernelKey]bool{}
	take := func(about string, s Serial) error {
		if used[s] {
			return refuse(ReasonBound, about, "serial %s stands twice in the request", s)
		}
		used[s] = true
		return nil
	}
	for _, it := range cmd.Items {
		about := "sandbox " + it.Sandbox.String()
		switch {
		case len(it.Bindings) > MaxBindings:
			return refuse(ReasonTooLarge, about, "%d namespaces, %d are allowed", len(it.Bindings), MaxBindings)
		case len(it.From) > maxAgainFrom || slices.Contains(it.From, it.Sandbox):
			return invalid(about, fmt.Sprintf("its namespaces parted from %d sandboxes, %d are allowed, and not from itself", len(it.From), maxAgainFrom))
		}
		if err := take(about, it.Sandbox); err != nil {
			return err
		}
		for _, b := range it.Bindings {
			if err := take(about, b.Serial); err != nil {
				return err
			}
			key := b.Kernel.key(b.Type)
			if live[key] {
				return refuse(ReasonBound, about, "%s namespace %s stands twice in the request", b.Type, b.Kernel.Key(b.Type))
			}
			live[key] = it.Dump == nil // the kernel may have given it to another one since
		}
		if it.Dump != nil {
			if err := take(about, it.Dump.Checkpoint); err != nil {
				return err
			}
		}
	}
	return nil
}

// againKeys are the records that cmd is about, with the current checkpoint of each sandbox.
func (s *Service) againKeys(ctx context.Context, cmd AgainCommand) (keys []Key, current map[Serial]Serial, err error) {
	current = map[Serial]Serial{}
	for _, it := range cmd.Items {
		for _, serial := range append([]Serial{it.Sandbox}, it.From...) {
			if _, there := current[serial]; !there {
				current[serial] = 0
				keys = append(keys, SandboxKey(serial))
			}
		}
	}
	if err := tooMany(len(keys)); err != nil || len(keys) == 0 {
		return nil, current, err
	}
	entries, _, err := s.get(ctx, keys...)
	if err != nil {
		return nil, nil, err
	}
	for _, e := range entries {
		if sb, ok := e.Record.(*Sandbox); ok && sb.Checkpoint != 0 {
			current[sb.Serial] = sb.Checkpoint
			keys = append(keys, CheckpointKey(sb.Checkpoint))
		}
	}
	for _, it := range cmd.Items {
		if it.Dump != nil && !slices.Contains(keys, CheckpointKey(it.Dump.Checkpoint)) {
			keys = append(keys, CheckpointKey(it.Dump.Checkpoint))
		}
	}
	return keys, current, tooMany(len(keys))
}

// registerAgain is what becomes of the items, one after the other. Of a sandbox that several of them are about
// one record is written.
func (w *world) registerAgain(cmd AgainCommand) ([]AgainAnswer, error) {
	changed := map[Serial]Handoff{}
	var order []Serial
	find := func(serial Serial) (h Handoff, ok bool) {
		if h, ok = changed[serial]; ok {
			return h, true
		}
		sb, err := w.sandbox(serial)
		if err != nil {
			return h, false
		}
		h.Sandbox = sb.clone()
		if c, err := w.checkpoint(sb.Checkpoint); sb.Checkpoint != 0 && err == nil {
			h.Checkpoint = c
		}
		return h, true
	}
	change := func(h Handoff) {
		if _, ok := changed[h.Sandbox.Serial]; !ok {
			order = append(order, h.Sandbox.Serial)
		}
		changed[h.Sandbox.Serial] = h
	}
	answers := make([]AgainAnswer, len(cmd.Items))
	for i, it := range cmd.Items {
		if err := it.validate(w.pool.Generation, w.host.BootID); err != nil {
			return nil, err
		}
		known, there := find(it.Sandbox)
		next, err := Handoff{Sandbox: known.Sandbox, Checkpoint: known.Checkpoint}, error(nil)
		if there {
			next, err = known.Next(Again{Host: cmd.Host, Epoch: it.Epoch, Bindings: it.Bindings, Labels: it.Labels, Checkpoint: it.Checkpoint, Over: it.Over}, w.moment)
		} else {
			next.Sandbox = *it.sandbox(cmd.Host, w.moment)
		}
		var left *Checkpoint
		if err == nil && it.Dump != nil {
			next, left, err = w.dumpedAgain(cmd.Host, it, next)
		}
		var from []Handoff
		for _, serial := range it.From {
			other, ok := find(serial)
			if !ok || err != nil {
				continue
			}
			other.Sandbox = other.Sandbox.clone()
			known := !w.pool.Missing(&other.Sandbox)
			if err = other.Sandbox.takeFrom(it.Bindings, known); err == nil {
				from = append(from, other)
			}
		}
		if err != nil {
			refusal, ok := err.(*Error)
			if !ok {
				return nil, err
			}
			answers[i].Err = refusal
			continue
		}
		if left != nil {
			w.put(left)
		}
		change(next)
		for _, other := range from {
			change(other)
		}
	}
	for _, serial := range order {
		changed[serial] = w.putMoved(changed[serial])
	}
	for i, it := range cmd.Items {
		if h, ok := find(it.Sandbox); ok {
			answers[i].Sandbox = &h.Sandbox
		}
	}
	return answers, nil
}

// dumpedAgain records the dump of an item, where the store has forgotten it, and gives the checkpoint that is the
// sandbox's current one no more. What the store knows of the checkpoint stays so.
func (w *world) dumpedAgain(host string, it AgainItem, h Handoff) (next Handoff, left *Checkpoint, err error) {
	if w.get[CheckpointKey(it.Dump.Checkpoint)].Token != "" {
		if h.Sandbox.State == StateRunning {
			return h, nil, h.Sandbox.wrongState("dump it as "+it.Dump.Checkpoint.String()+", which the store has", StateDumped)
		}
		return h, nil, nil
	}
	if h.Checkpoint != nil {
		left = h.Checkpoint
	}
	if h.Sandbox.Checkpoint == 0 {
		h.Checkpoint = nil
	}
	next, err = h.Next(Dumped{Host: host, Epoch: it.Epoch, Checkpoint: Checkpoint{Serial: it.Dump.Checkpoint, RunID: it.Dump.RunID, Digest: it.Dump.Digest}}, w.moment)
	return next, left, err
}
