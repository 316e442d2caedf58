package alloc

import (
	"context"
	"fmt"
	"slices"
)

// OpenCommand records a dump.
type OpenCommand struct {
	Mutation
	Spend      Ranges `json:"spend"` // the checkpoint's serial is in it
	Sandbox    Serial `json:"sandbox"`
	Epoch      Epoch  `json:"epoch"`
	Checkpoint Serial `json:"checkpoint"`
	RunID      string `json:"run_id"`
	Digest     Digest `json:"digest"`
}

// Open records a dump whose images are complete while its tree is frozen.
//
// Committed when it returns: the checkpoint, open and current, and the sandbox as dumped. Errors, here
// and in the other moves of a hand-off: ErrInvalid, ErrStaleIncarnation, ErrHostUnknown, ErrStaleEpoch,
// ErrNotOwner, ErrWrongState, ErrSandboxNotFound, ErrCheckpointNotFound, ErrRange, ErrRequestReused,
// ErrRequestExpired, ErrConflict, ErrUnknownOutcome.
func (s *Service) Open(ctx context.Context, cmd OpenCommand) (Handoff, error) {
	if err := validateSpend(cmd.Spend); err != nil {
		return Handoff{}, err
	}
	switch {
	case !cmd.Spend.Contains(cmd.Checkpoint):
		return Handoff{}, invalid("checkpoint "+cmd.Checkpoint.String(), "its serial is not spent in this request")
	case len(cmd.RunID) > 64:
		return Handoff{}, invalid("run id", fmt.Sprintf("it has %d bytes, 64 are allowed", len(cmd.RunID)))
	case cmd.Digest == Digest{}:
		return Handoff{}, invalid("digest", "it is missing")
	}
	key := CheckpointKey(cmd.Checkpoint)
	return s.move(ctx, cmd.Mutation, cmd, cmd.Sandbox, []Key{key}, func(w *world) (Event, error) {
		if err := w.spend(cmd.Spend); err != nil {
			return nil, err
		}
		if w.get[key].Token != "" {
			return nil, refuse(ReasonBound, "checkpoint "+cmd.Checkpoint.String(), "there is one with this serial already")
		}
		return Dumped{Host: cmd.Host, Epoch: cmd.Epoch, Checkpoint: Checkpoint{Serial: cmd.Checkpoint, RunID: cmd.RunID, Digest: cmd.Digest}}, nil
	})
}

// ConfirmCommand says that a dumped tree was seen dead.
type ConfirmCommand struct {
	Mutation
	Sandbox    Serial   `json:"sandbox"`
	Epoch      Epoch    `json:"epoch"`
	Checkpoint Serial   `json:"checkpoint"`
	Evidence   Evidence `json:"evidence"`
}

// Confirm ends the source's part. Committed when it returns: in transit, or ended. Errors as for Open.
func (s *Service) Confirm(ctx context.Context, cmd ConfirmCommand) (Handoff, error) {
	return s.move(ctx, cmd.Mutation, cmd, cmd.Sandbox, nil, func(*world) (Event, error) {
		return Stopped{Host: cmd.Host, Epoch: cmd.Epoch, Checkpoint: cmd.Checkpoint, Evidence: cmd.Evidence}, nil
	})
}

// AbortCommand says that a dumped tree was seen running on.
type AbortCommand struct {
	Mutation
	Sandbox    Serial `json:"sandbox"`
	Epoch      Epoch  `json:"epoch"`
	Checkpoint Serial `json:"checkpoint"`
	ZeroGiven  bool   `json:"zero_given"`
}

// Abort takes a dump back. Committed when it returns: running under its old epoch, and the images a
// copy or void. Errors as for Open.
func (s *Service) Abort(ctx context.Context, cmd AbortCommand) (Handoff, error) {
	return s.move(ctx, cmd.Mutation, cmd, cmd.Sandbox, nil, func(*world) (Event, error) {
		return RanOn{Host: cmd.Host, Epoch: cmd.Epoch, Checkpoint: cmd.Checkpoint, ZeroGiven: cmd.ZeroGiven}, nil
	})
}

// ClaimCommand asks to restore the images of a checkpoint.
type ClaimCommand struct {
	Mutation
	Checkpoint Serial `json:"checkpoint"`
	Digest     Digest `json:"digest"`
	BootID     string `json:"boot_id"`
	Run        string `json:"run"`
}

func (cmd ClaimCommand) claimant() Claimant {
	return Claimant{Host: cmd.Host, BootID: cmd.BootID, Run: cmd.Run}
}

// ClaimAnswer is what a restore may do.
type ClaimAnswer struct {
	Handoff
	Outcome Outcome
	// Images is the checkpoint that was asked for; it need not be the sandbox's current one.
	Images *Checkpoint
	// Why says why it is a clone; "" for a claim.
	Why string
}

// Claim decides about a restore. Committed when it returns MayClaim: the caller owns the sandbox under
// a new epoch in the name of this run. MayClone commits nothing. Errors: those of Open, and ErrManifest,
// ErrVoid, ErrRefused; ErrNotConfirmed and ErrClaimed are worth waiting for.
func (s *Service) Claim(ctx context.Context, cmd ClaimCommand) (ClaimAnswer, error) {
	if cmd.Run == "" || len(cmd.Run) > 128 {
		return ClaimAnswer{}, invalid("run", "it has 1 to 128 bytes")
	}
	if err := ValidateBootID(cmd.BootID); err != nil {
		return ClaimAnswer{}, err
	}
	// The checkpoint names the sandbox for ever, so that reading it first needs no guard of its own.
	entries, _, err := s.store.Get(ctx, CheckpointKey(cmd.Checkpoint))
	if err != nil {
		return ClaimAnswer{}, err
	}
	found, ok := entries[0].Record.(*Checkpoint)
	if !ok {
		return ClaimAnswer{}, &Error{Reason: ReasonCheckpointNotFound, Subject: "checkpoint " + cmd.Checkpoint.String(), Msg: "the pool has no such checkpoint",
			Fix: "check that the images are of this pool; to restore them as unknown ones, remove nsalloc.json from them"}
	}
	var a ClaimAnswer
	a.Handoff, err = s.move(ctx, cmd.Mutation, cmd, found.Sandbox, []Key{CheckpointKey(cmd.Checkpoint)}, func(w *world) (Event, error) {
		if w.host.BootID != cmd.BootID {
			return nil, invalid("boot id", fmt.Sprintf("%s is not the boot that host %s said Hello for, %s", cmd.BootID, cmd.Host, w.host.BootID))
		}
		sb, err := w.sandbox(found.Sandbox)
		if err != nil {
			return nil, err
		}
		c, err := w.checkpoint(cmd.Checkpoint)
		if err != nil {
			return nil, err
		}
		a.Images = c
		a.Outcome, a.Why, err = Admit(c, sb, cmd.Digest, cmd.claimant(), w.pool.Policy)
		if err != nil || a.Outcome == MayClone {
			return nil, err
		}
		return Claimed{Claimant: cmd.claimant(), Checkpoint: cmd.Checkpoint}, nil
	})
	if err != nil {
		return ClaimAnswer{}, err
	}
	if a.Outcome == "" { // found by its request mark: it was committed
		a.Outcome, a.Images = MayClaim, a.Checkpoint
	}
	return a, nil
}

// BindCommand carries the final namespaces of a claimed tree.
type BindCommand struct {
	Mutation
	Spend    Ranges            `json:"spend,omitempty"`
	Sandbox  Serial            `json:"sandbox"`
	Epoch    Epoch             `json:"epoch"`
	BootID   string            `json:"boot_id"`
	Run      string            `json:"run"`
	Bindings []Binding         `json:"bindings"`
	Fresh    []Binding         `json:"fresh,omitempty"`
	Labels   map[string]string `json:"labels,omitempty"`
}

// Bind makes a claimed sandbox run on the caller. Committed when it returns: running, the checkpoint
// consumed. It also returns what the host has left to spend. Errors: those of Open, and ErrBound.
func (s *Service) Bind(ctx context.Context, cmd BindCommand) (Handoff, Ranges, error) {
	if err := validateSpend(cmd.Spend); err != nil {
		return Handoff{}, nil, err
	}
	for _, b := range cmd.Fresh {
		if !cmd.Spend.Contains(b.Serial) {
			return Handoff{}, nil, invalid("sandbox "+cmd.Sandbox.String(), "serial "+b.Serial.String()+" is not spent in this request")
		}
	}
	var granted Ranges
	h, err := s.move(ctx, cmd.Mutation, cmd, cmd.Sandbox, nil, func(w *world) (Event, error) {
		if err := w.spend(cmd.Spend); err != nil {
			return nil, err
		}
		granted = w.host.Granted
		return Bound{
			Claimant: Claimant{Host: cmd.Host, BootID: cmd.BootID, Run: cmd.Run}, Epoch: cmd.Epoch,
			Bindings: cmd.Bindings, Fresh: cmd.Fresh, Labels: cmd.Labels,
		}, nil
	})
	return h, granted, err
}

// ReleaseCommand gives a claim back.
type ReleaseCommand struct {
	Mutation
	Sandbox Serial `json:"sandbox"`
	Epoch   Epoch  `json:"epoch"`
	BootID  string `json:"boot_id"`
	Run     string `json:"run"`
}

// Release gives a claim back. Committed when it returns: the sandbox is where the claim took it from,
// under the raised epoch. Errors as for Open.
func (s *Service) Release(ctx context.Context, cmd ReleaseCommand) (Handoff, error) {
	return s.move(ctx, cmd.Mutation, cmd, cmd.Sandbox, nil, func(*world) (Event, error) {
		return Released{Claimant: Claimant{Host: cmd.Host, BootID: cmd.BootID, Run: cmd.Run}, Epoch: cmd.Epoch}, nil
	})
}

// move reads a sandbox with its current checkpoint, lets choose name the event, applies it, and
// commits both records. A nil event changes nothing. body is what the request id stands for.
func (s *Service) move(ctx context.Context, m Mutation, body any, sandbox Serial, more []Key, choose func(*world) (Event, error)) (Handoff, error) {
	if err := s.checkRequest(m.RequestID); err != nil {
		return Handoff{}, err
	}
	digest, err := digestOf(body)
	if err != nil {
		return Handoff{}, err
	}
	var out Handoff
	for try := range conflictTries {
		if try > 0 && pause(ctx, try) != nil {
			break
		}
		// Which checkpoint is current is known only after a read; the guarded read below proves it.
		current, err := s.currentCheckpoint(ctx, sandbox)
		if err != nil {
			return Handoff{}, err
		}
		keys := append([]Key{SandboxKey(sandbox)}, more...)
		if current != 0 && !slices.Contains(more, CheckpointKey(current)) {
			keys = append(keys, CheckpointKey(current))
		}
		moved := false
		err = s.change(ctx, m, keys, func(w *world) error {
			sb, err := w.sandbox(sandbox)
			if err != nil {
				return err
			}
			if moved = sb.Checkpoint != current; moved {
				return errMoved
			}
			out = Handoff{Sandbox: *sb}
			if current != 0 {
				if out.Checkpoint, err = w.checkpoint(current); err != nil {
					return err
				}
			}
			if found, err := marked(sb.Requests, m.RequestID, digest); found || err != nil {
				return err
			}
			return w.apply(&out, m, digest, choose)
		})
		if !moved {
			return out, err
		}
	}
	return Handoff{}, &Error{Reason: ReasonConflict, Subject: "sandbox " + sandbox.String(), Msg: "others changed it again and again; nothing was changed", Fix: "try again", RetryAfter: retrySoon}
}

// errMoved makes a move start anew: between two reads the sandbox got another checkpoint.
var errMoved = &Error{Reason: ReasonConflict, Msg: "the sandbox got another checkpoint meanwhile"}

func (w *world) apply(out *Handoff, m Mutation, digest Digest, choose func(*world) (Event, error)) error {
	event, err := choose(w)
	if err != nil || event == nil {
		return err
	}
	next, err := out.Next(event, w.moment)
	if err != nil {
		return err
	}
	next.Sandbox.Requests = mark(next.Sandbox.Requests, m.RequestID, digest)
	// One record stays bounded however long the history: older stints become records of their own.
	for len(next.Sandbox.Stints) > keptStints {
		w.put(&OldStint{Sandbox: next.Sandbox.Serial, Stint: next.Sandbox.Stints[0]})
		next.Sandbox.Stints = next.Sandbox.Stints[1:]
	}
	w.put(&next.Sandbox)
	if next.Checkpoint != nil {
		w.put(next.Checkpoint)
	}
	*out = next
	return nil
}

func (s *Service) currentCheckpoint(ctx context.Context, sandbox Serial) (Serial, error) {
	entries, _, err := s.store.Get(ctx, SandboxKey(sandbox))
	if err != nil {
		return 0, err
	}
	sb, ok := entries[0].Record.(*Sandbox)
	if !ok {
		return 0, refuse(ReasonSandboxNotFound, "sandbox "+sandbox.String(), "the pool has no such sandbox")
	}
	return sb.Checkpoint, nil
}
