package alloc

import (
	"context"
	"fmt"
	"slices"
)

// RegisterCommand records new sandboxes of a host and changes of those that it has, all or none.
type RegisterCommand struct {
	Mutation
	// Spend is exactly the front of the host's ranges; every fresh serial of the items is in it.
	Spend Ranges         `json:"spend"`
	Items []RegisterItem `json:"items"`
}

// RegisterItem is one sandbox.
type RegisterItem struct {
	// Sandbox is spent here: a new one; else one that runs on the caller under Epoch.
	Sandbox Serial    `json:"sandbox"`
	Epoch   Epoch     `json:"epoch,omitempty"`
	Add     []Binding `json:"add,omitempty"`
	Gone    []Serial  `json:"gone,omitempty"`
	// Part are live namespaces of an existing sandbox that turned out not to move with it. They leave it
	// with their serials: each stands in Add of a new sandbox in a later item of the same request. Images that
	// were made before are no longer this sandbox's: they restore as clones.
	Part   []Serial          `json:"part,omitempty"`
	Labels map[string]string `json:"labels,omitempty"`
	OfHost bool              `json:"of_host,omitempty"`
	// ParentCheckpoint makes a new sandbox a clone of that checkpoint's sandbox. The parent of a binding is
	// a serial of that sandbox, or 0.
	ParentCheckpoint Serial `json:"parent_checkpoint,omitempty"`
}

// Register commits the items in one transaction.
//
// A serial that is parted from one sandbox and added to another stays the same namespace's: at every
// revision it is in one record. It refuses a live namespace that would stand under two serials in one request or in one sandbox. Between
// a host's sandboxes nothing is compared: that there a live namespace has one serial too (P16) rests on
// the host's agent, the only one who sees its namespaces, and Check verifies it.
//
// Committed when it returns: every item; what was spent and not used is burned. Errors: ErrInvalid,
// ErrStaleIncarnation, ErrHostUnknown, ErrRange, ErrNotOwner, ErrStaleEpoch, ErrWrongState, ErrBound,
// ErrSandboxNotFound, ErrCheckpointNotFound, ErrTooLarge, ErrRequestReused, ErrRequestExpired,
// ErrConflict, ErrUnknownOutcome.
func (s *Service) Register(ctx context.Context, cmd RegisterCommand) ([]*Sandbox, Ranges, error) {
	if err := cmd.validate(); err != nil {
		return nil, nil, err
	}
	if err := s.checkRequest(cmd.RequestID); err != nil {
		return nil, nil, err
	}
	digest, err := digestOf(cmd)
	if err != nil {
		return nil, nil, err
	}
	var keys, fresh []Key
	for _, it := range cmd.Items {
		if cmd.Spend.Contains(it.Sandbox) {
			fresh = append(fresh, SandboxKey(it.Sandbox))
		} else {
			keys = append(keys, SandboxKey(it.Sandbox))
		}
		if k := CheckpointKey(it.ParentCheckpoint); it.ParentCheckpoint != 0 && !slices.Contains(keys, k) {
			keys = append(keys, k)
		}
	}
	parents, err := s.parents(ctx, cmd)
	if err != nil {
		return nil, nil, err
	}
	var out []*Sandbox
	var granted Ranges
	// Under serials that were never spent stands nothing: the first try does not read that, it only demands it.
	// When it fails, or this request was committed before, the next try reads them too.
	first := true
	which := func() ([]Key, error) {
		if first {
			return keys, nil
		}
		return append(keys[:len(keys):len(keys)], fresh...), nil
	}
	err = s.change(ctx, cmd.Mutation, which, func(w *world) error {
		assumed := first
		first = false
		w.parents, w.parted = parents, map[Serial]Binding{}
		out, granted = nil, w.host.Granted
		done, err := w.host.Requests.find(cmd.RequestID, digest)
		if err != nil {
			return err
		}
		if assumed && done {
			return errMoved
		}
		if assumed {
			for _, k := range fresh {
				w.tx.Guards = append(w.tx.Guards, Guard{Key: k})
			}
		}
		if !done {
			if err := w.spend(cmd.Spend); err != nil {
				return err
			}
			w.host.Requests = w.host.Requests.with(cmd.RequestID, digest, w.moment.Now)
			if len(cmd.Spend) == 0 {
				w.put(w.host)
			}
			granted = w.host.Granted
		}
		for _, it := range cmd.Items {
			if done {
				sb, err := w.sandbox(it.Sandbox)
				if err != nil {
					return err
				}
				out = append(out, sb)
				continue
			}
			sb, err := w.register(cmd, it)
			if err != nil {
				return err
			}
			w.put(sb)
			out = append(out, sb)
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	return out, granted, nil
}

// parents reads the sandboxes that cmd makes clones of. What is missing is missed later, where the
// caller and the request id are known.
func (s *Service) parents(ctx context.Context, cmd RegisterCommand) (map[Serial]*Sandbox, error) {
	var checkpoints, sandboxes []Key
	for _, it := range cmd.Items {
		if k := CheckpointKey(it.ParentCheckpoint); it.ParentCheckpoint != 0 && !slices.Contains(checkpoints, k) {
			checkpoints = append(checkpoints, k)
		}
	}
	if len(checkpoints) == 0 {
		return nil, nil
	}
	entries, _, err := s.get(ctx, checkpoints...)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if c, ok := e.Record.(*Checkpoint); ok && !slices.Contains(sandboxes, SandboxKey(c.Sandbox)) {
			sandboxes = append(sandboxes, SandboxKey(c.Sandbox))
		}
	}
	found := map[Serial]*Sandbox{}
	if len(sandboxes) == 0 {
		return found, nil
	}
	if entries, _, err = s.get(ctx, sandboxes...); err != nil {
		return nil, err
	}
	for _, e := range entries {
		if sb, ok := e.Record.(*Sandbox); ok {
			found[sb.Serial] = sb
		}
	}
	return found, nil
}

// validate checks what needs no store: the shape, and that fresh serials are spent here, once each.
func (cmd RegisterCommand) validate() error {
	if len(cmd.Items) == 0 || len(cmd.Items) > MaxRegister {
		return invalid("items", fmt.Sprintf("%d, 1 to %d are allowed", len(cmd.Items), MaxRegister))
	}
	if err := validateSpend(cmd.Spend); err != nil {
		return err
	}
	all := len(cmd.Items)
	for _, it := range cmd.Items {
		all += len(it.Add)
	}
	used := make(map[Serial]bool, all)
	live := make(map[kernelKey]Serial, all)
	parted := map[Serial]bool{}
	for _, it := range cmd.Items {
		about := "sandbox " + it.Sandbox.String()
		fresh := cmd.Spend.Contains(it.Sandbox)
		switch {
		case !it.Sandbox.Valid():
			return invalid(about, "the serial is out of range")
		case used[it.Sandbox]:
			return refuse(ReasonBound, about, "its serial stands twice in the request")
		case fresh && it.Epoch != 0:
			return invalid(about, "a new sandbox has no epoch yet")
		case !fresh && (it.OfHost || it.ParentCheckpoint != 0):
			return invalid(about, "of_host and parent_checkpoint are for new sandboxes only")
		case fresh && len(it.Gone) > 0:
			return invalid(about, "a new sandbox has no namespaces that are gone")
		case fresh && len(it.Part) > 0:
			return invalid(about, "a new sandbox has nothing to part with")
		case fresh && len(it.Add) == 0:
			return invalid(about, "a new sandbox has at least one namespace")
		case len(it.Add) > MaxBindings || len(it.Gone) > MaxBindings || len(it.Part) > MaxBindings:
			return refuse(ReasonTooLarge, about, "%d namespaces to add, %d that are gone and %d to part with, %d are allowed", len(it.Add), len(it.Gone), len(it.Part), MaxBindings)
		}
		used[it.Sandbox] = true
		for _, s := range it.Part {
			if parted[s] || cmd.Spend.Contains(s) {
				return invalid(about, "serial "+s.String()+" cannot be parted from it: it stands twice, or is spent in this request")
			}
			parted[s] = true
		}
		for _, b := range it.Add {
			if !cmd.Spend.Contains(b.Serial) && !(fresh && parted[b.Serial]) {
				return invalid(about, "serial "+b.Serial.String()+" is not spent in this request")
			}
			if used[b.Serial] {
				return refuse(ReasonBound, about, "serial %s stands twice in the request", b.Serial)
			}
			if b.Parent != 0 && (it.ParentCheckpoint == 0 || !b.Parent.Valid()) {
				return invalid(about, "a binding with a parent belongs to a clone, and the parent is a serial")
			}
			key := b.Kernel.key(b.Type)
			if other, ok := live[key]; ok {
				return refuse(ReasonBound, about, "%s namespace %s stands twice in the request, under serials %s and %s", b.Type, b.Kernel.Key(b.Type), other, b.Serial)
			}
			used[b.Serial], live[key] = true, b.Serial
		}
	}
	for s := range parted {
		if !used[s] {
			return invalid("serial "+s.String(), "it is parted from a sandbox and added to none")
		}
	}
	return nil
}

func validateSpend(spend Ranges) error {
	if len(spend) > MaxGrantedRanges {
		return invalid("spend", fmt.Sprintf("%d ranges, %d are allowed", len(spend), MaxGrantedRanges))
	}
	for _, r := range spend {
		if !r.Valid() {
			return invalid("spend", fmt.Sprintf("range of %d from %d on is out of range", r.Count, uint64(r.First)))
		}
	}
	return nil
}

// register makes or changes one sandbox.
func (w *world) register(cmd RegisterCommand, it RegisterItem) (*Sandbox, error) {
	if cmd.Spend.Contains(it.Sandbox) {
		return w.newSandbox(cmd, it)
	}
	known, err := w.sandbox(it.Sandbox)
	if err != nil {
		return nil, err
	}
	sb := known.clone()
	if err := sb.ownedBy(cmd.Host, it.Epoch); err != nil {
		return nil, err
	}
	if sb.State != StateRunning {
		return nil, sb.wrongState("register namespaces of it", StateRunning)
	}
	if err := w.known(&sb); err != nil {
		return nil, err
	}
	for _, serial := range it.Gone {
		b, ok := sb.Binding(serial)
		if !ok {
			return nil, refuse(ReasonBound, subject(&sb), "serial %s is not of this sandbox", serial)
		}
		if b.Live() {
			b.Gone = w.moment.Now
		}
	}
	if err := w.part(&sb, it.Part); err != nil {
		return nil, err
	}
	if err := sb.add(it.Add, w.host.BootID, w.moment.Now); err != nil {
		return nil, err
	}
	return &sb, sb.setLabels(it.Labels)
}

func (w *world) newSandbox(cmd RegisterCommand, it RegisterItem) (*Sandbox, error) {
	if e := w.get[SandboxKey(it.Sandbox)]; e.Token != "" {
		return nil, refuse(ReasonBound, "sandbox "+it.Sandbox.String(), "there is one with this serial already")
	}
	sb := &Sandbox{
		Serial: it.Sandbox, State: StateRunning, Owner: cmd.Host, Epoch: Epoch(0).next(w.pool.Generation),
		OfHost: it.OfHost, Created: w.moment.Now,
	}
	began := BeganRegistered
	if it.ParentCheckpoint != 0 {
		c, err := w.checkpoint(it.ParentCheckpoint)
		if err != nil {
			return nil, err
		}
		parent, ok := w.parents[c.Sandbox]
		if !ok {
			return nil, refuse(ReasonSandboxNotFound, "sandbox "+c.Sandbox.String(), "checkpoint %s is of it, and the pool has no such sandbox", c.Serial)
		}
		for _, b := range it.Add {
			if _, ok := parent.Binding(b.Parent); b.Parent != 0 && !ok {
				return nil, invalid("sandbox "+it.Sandbox.String(), fmt.Sprintf("serial %s is no parent of %s: it is not of sandbox %s, which checkpoint %s is of", b.Parent, b.Serial, c.Sandbox, c.Serial))
			}
		}
		sb.Parent = &Parent{Sandbox: c.Sandbox, Checkpoint: c.Serial}
		began = BeganCloned
	}
	sb.openStint(cmd.Host, began, w.moment.Actor, it.ParentCheckpoint, w.moment.Now)
	if err := sb.add(it.Add, w.host.BootID, w.moment.Now); err != nil {
		return nil, err
	}
	if err := w.join(sb); err != nil {
		return nil, err
	}
	return sb, sb.setLabels(it.Labels)
}

// EndCommand says that a running sandbox's processes were seen gone.
type EndCommand struct {
	Mutation
	Sandbox Serial `json:"sandbox"`
	Epoch   Epoch  `json:"epoch"`
}

// End records that a sandbox is over. Committed when it returns: its end. Errors as for the hand-off, and
// ErrSettling while another host may still say that it has the sandbox; try again then.
func (s *Service) End(ctx context.Context, cmd EndCommand) (*Sandbox, error) {
	h, _, err := s.move(ctx, cmd.Mutation, cmd, cmd.Sandbox, nil, func(w *world) (Event, error) {
		return w.knownEvent(cmd.Sandbox, Over{Host: cmd.Host, Epoch: cmd.Epoch})
	})
	if err != nil {
		return nil, err
	}
	return &h.Sandbox, nil
}
