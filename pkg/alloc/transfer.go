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
	case cmd.Digest == Digest{}:
		return Handoff{}, invalid("digest", "it is missing")
	}
	if err := validText("run id", cmd.RunID, 0, 64); err != nil {
		return Handoff{}, err
	}
	key := CheckpointKey(cmd.Checkpoint)
	h, _, err := s.move(ctx, cmd.Mutation, cmd, cmd.Sandbox, []Key{key}, func(w *world) (Event, error) {
		sb, err := w.sandbox(cmd.Sandbox)
		if err != nil {
			return nil, err
		}
		switch recorded := w.get[key].Token != ""; {
		case recorded && sb.Checkpoint != cmd.Checkpoint:
			return nil, refuse(ReasonBound, "checkpoint "+cmd.Checkpoint.String(), "there is one with this serial already")
		case !recorded: // else its serial was spent before, and Next says whether this is the same dump
			err = w.spend(cmd.Spend)
		}
		if err == nil {
			err = w.known(sb)
		}
		return Dumped{Host: cmd.Host, Epoch: cmd.Epoch, Checkpoint: Checkpoint{Serial: cmd.Checkpoint, RunID: cmd.RunID, Digest: cmd.Digest}}, err
	})
	return h, err
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
	h, _, err := s.move(ctx, cmd.Mutation, cmd, cmd.Sandbox, nil, func(w *world) (Event, error) {
		return w.knownEvent(cmd.Sandbox, Stopped{Host: cmd.Host, Epoch: cmd.Epoch, Checkpoint: cmd.Checkpoint, Evidence: cmd.Evidence})
	})
	return h, err
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
	h, _, err := s.move(ctx, cmd.Mutation, cmd, cmd.Sandbox, nil, func(w *world) (Event, error) {
		return w.knownEvent(cmd.Sandbox, RanOn{Host: cmd.Host, Epoch: cmd.Epoch, Checkpoint: cmd.Checkpoint, ZeroGiven: cmd.ZeroGiven})
	})
	return h, err
}

// ClaimCommand asks to restore the images of a checkpoint.
type ClaimCommand struct {
	Mutation
	Checkpoint Serial `json:"checkpoint"`
	Digest     Digest `json:"digest"`
	BootID     string `json:"boot_id"`
	Run        string `json:"run"`
	// Exe names the file that the CRIU process executes, so that the host knows a task that CRIU was making
	// even if its agent remembers nothing: 0 to 64 bytes that only the host's agent reads and
	// that hold for that boot. It is kept with the claim and decides nothing. Not in the request's digest: a
	// server that does not know it takes a retry for the same request.
	Exe string `json:"-"`
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
// ErrVoid, ErrRefused; ErrNotConfirmed, ErrClaimed and ErrSettling are worth waiting for.
func (s *Service) Claim(ctx context.Context, cmd ClaimCommand) (ClaimAnswer, error) {
	a, err := s.claim(ctx, cmd)
	if ReasonOf(err) != ReasonSettling {
		return a, err
	}
	missing, settleErr := s.Settle(ctx) // the last host may just have come
	switch {
	case settleErr != nil:
		return a, settleErr
	case len(missing) > 0:
		return a, waitsFor(err, missing)
	}
	return s.claim(ctx, cmd)
}

func (s *Service) claim(ctx context.Context, cmd ClaimCommand) (ClaimAnswer, error) {
	if err := validText("run", cmd.Run, 1, 128); err != nil {
		return ClaimAnswer{}, err
	}
	if err := validText("exe", cmd.Exe, 0, 64); err != nil {
		return ClaimAnswer{}, err
	}
	if err := ValidateBootID(cmd.BootID); err != nil {
		return ClaimAnswer{}, err
	}
	// The checkpoint names the sandbox for ever, so that reading it first needs no guard of its own.
	entries, _, err := s.get(ctx, CheckpointKey(cmd.Checkpoint), Key{Kind: KindPool})
	if err != nil {
		return ClaimAnswer{}, err
	}
	found, ok := entries[0].Record.(*Checkpoint)
	if pool, err := openPool(entries[1]); !ok && err == nil {
		// A host that has not come back may know of the dump that made it.
		if err := (&world{pool: pool}).hold(&Checkpoint{Serial: cmd.Checkpoint}); err != nil {
			return ClaimAnswer{}, err
		}
	}
	if !ok {
		return ClaimAnswer{}, &Error{Reason: ReasonCheckpointNotFound, Subject: "checkpoint " + cmd.Checkpoint.String(), Msg: "the pool has no such checkpoint",
			Fix: "check that the images are of this pool; to restore them as unknown ones, remove nsalloc.json from them"}
	}
	var a ClaimAnswer
	a.Handoff, _, err = s.move(ctx, cmd.Mutation, cmd, found.Sandbox, []Key{CheckpointKey(cmd.Checkpoint)}, func(w *world) (Event, error) {
		if err := w.onBoot(cmd.BootID); err != nil {
			return nil, err
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
		switch {
		case err != nil || a.Outcome == MayClone:
			return nil, err
		case sb.holds(cmd.claimant()):
			err = sb.claimLasts(w.pool.Generation)
		default:
			err = w.hold(c)
		}
		if err != nil {
			return nil, err
		}
		return Claimed{Claimant: cmd.claimant(), Checkpoint: cmd.Checkpoint, Exe: cmd.Exe}, nil
	})
	if err != nil {
		return ClaimAnswer{}, err
	}
	if a.Outcome == MayClone {
		return a, nil
	}
	// Committed just now, or before under this request id: then others may have gone on since.
	if a.Sandbox.Checkpoint != cmd.Checkpoint || !a.Sandbox.holds(cmd.claimant()) {
		return ClaimAnswer{}, a.claimLost(cmd.claimant())
	}
	a.Outcome, a.Images = MayClaim, a.Checkpoint
	return a, nil
}

// onBoot refuses what is said of a boot that the host has left, or not said Hello for.
func (w *world) onBoot(id string) error {
	if w.host.BootID != id {
		return invalid("boot id", fmt.Sprintf("%.80q is not the boot that host %s said Hello for, %s", id, w.host.Name, w.host.BootID))
	}
	return nil
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
		if b.Parent != 0 {
			return Handoff{}, nil, invalid("sandbox "+cmd.Sandbox.String(), "a binding with a parent belongs to a clone")
		}
	}
	who := Claimant{Host: cmd.Host, BootID: cmd.BootID, Run: cmd.Run}
	return s.move(ctx, cmd.Mutation, cmd, cmd.Sandbox, nil, func(w *world) (Event, error) {
		if err := w.onBoot(cmd.BootID); err != nil {
			return nil, err
		}
		sb, err := w.sandbox(cmd.Sandbox)
		if err != nil {
			return nil, err
		}
		if !sb.holds(who) || sb.State != StateRunning { // else they were spent by the Bind that made it run
			err = w.spend(cmd.Spend)
		}
		return Bound{Claimant: who, Epoch: cmd.Epoch, Bindings: cmd.Bindings, Fresh: cmd.Fresh, Labels: cmd.Labels}, err
	})
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
	h, _, err := s.move(ctx, cmd.Mutation, cmd, cmd.Sandbox, nil, func(*world) (Event, error) {
		return Released{Claimant: Claimant{Host: cmd.Host, BootID: cmd.BootID, Run: cmd.Run}, Epoch: cmd.Epoch}, nil
	})
	return h, err
}

// move reads a sandbox with its current checkpoint, lets choose name the event, applies it, and
// commits both records. It returns them, and what is left of the host's ranges. A nil event changes
// nothing. body is what the request id stands for; choose is not asked when that has been done.
func (s *Service) move(ctx context.Context, m Mutation, body any, sandbox Serial, more []Key, choose func(*world) (Event, error)) (Handoff, Ranges, error) {
	if err := s.checkRequest(m.RequestID); err != nil {
		return Handoff{}, nil, err
	}
	digest, err := digestOf(body)
	if err != nil {
		return Handoff{}, nil, err
	}
	var out Handoff
	var left Ranges
	var current Serial
	keys := func() ([]Key, error) {
		// Which checkpoint is current is known only after a read; decide's guarded read proves it.
		var err error
		if current, err = s.currentCheckpoint(ctx, sandbox); err != nil {
			return nil, err
		}
		keys := append([]Key{SandboxKey(sandbox)}, more...)
		if current != 0 && !slices.Contains(more, CheckpointKey(current)) {
			keys = append(keys, CheckpointKey(current))
		}
		return keys, nil
	}
	err = s.change(ctx, m, keys, func(w *world) error {
		sb, err := w.sandbox(sandbox)
		if err != nil {
			return err
		}
		if sb.Checkpoint != current {
			return errMoved
		}
		out = Handoff{Sandbox: *sb}
		if current != 0 {
			if out.Checkpoint, err = w.checkpoint(current); err != nil {
				return err
			}
		}
		found, err := sb.Requests.find(m.RequestID, digest)
		if err == nil && !found {
			err = w.apply(&out, m, digest, choose)
		}
		left = w.host.Granted
		return err
	})
	if err != nil {
		return Handoff{}, nil, err
	}
	return out, left, nil
}

// errMoved makes a change start anew, because it has to read more: between two reads the sandbox got another
// checkpoint, or what was taken for new was not.
var errMoved = &Error{Reason: ReasonConflict, Msg: "the sandbox was changed meanwhile"}

func (w *world) apply(out *Handoff, m Mutation, digest Digest, choose func(*world) (Event, error)) error {
	event, err := choose(w)
	if err != nil || event == nil {
		return err
	}
	next, err := out.Next(event, w.moment)
	if err != nil {
		return err
	}
	next.Sandbox.Requests = next.Sandbox.Requests.with(m.RequestID, digest, w.moment.Now)
	*out = w.putMoved(next)
	return nil
}

// putMoved writes what an event has made of a sandbox and of its checkpoint, and gives what is written.
func (w *world) putMoved(h Handoff) Handoff {
	// One record stays bounded however long the history: older stints become records of their own.
	for len(h.Sandbox.Stints) > keptStints {
		w.put(&OldStint{Sandbox: h.Sandbox.Serial, Stint: h.Sandbox.Stints[0]})
		h.Sandbox.Stints = h.Sandbox.Stints[1:]
	}
	w.put(&h.Sandbox)
	if h.Checkpoint != nil {
		w.put(h.Checkpoint)
	}
	return h
}

func (s *Service) currentCheckpoint(ctx context.Context, sandbox Serial) (Serial, error) {
	entries, _, err := s.get(ctx, SandboxKey(sandbox))
	if err != nil {
		return 0, err
	}
	sb, ok := entries[0].Record.(*Sandbox)
	if !ok {
		return 0, refuse(ReasonSandboxNotFound, "sandbox "+sandbox.String(), "the pool has no such sandbox")
	}
	return sb.Checkpoint, nil
}
