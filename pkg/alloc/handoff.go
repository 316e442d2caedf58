package alloc

import (
	"fmt"
	"time"
)

// Handoff is the state that Next moves: a sandbox and its current checkpoint.
type Handoff struct {
	Sandbox Sandbox
	// Checkpoint is the one that Sandbox.Checkpoint names; nil when that is 0.
	Checkpoint *Checkpoint
}

// Moment is what Next needs to know of the world besides state and event.
type Moment struct {
	Now        time.Time
	Generation Generation
	Policy     Policy
	// Actor is who brings the event, for the history.
	Actor string
}

// Event is something that was observed of a sandbox: Dumped, Stopped, RanOn, Claimed, Bound,
// Released, Over, Fenced or Again.
type Event interface {
	next(h *Handoff, at Moment) error
}

// Next is the state after e. It changes nothing in h. An event that has had its effect already gives
// h back. A refusal is an *Error that says why.
func (h Handoff) Next(e Event, at Moment) (Handoff, error) {
	n := Handoff{Sandbox: h.Sandbox.clone()}
	if h.Checkpoint != nil {
		c := *h.Checkpoint
		n.Checkpoint = &c
	}
	if err := n.sound(); err != nil {
		return h, err
	}
	at.Now = at.Now.UTC().Round(0)
	if err := e.next(&n, at); err != nil {
		return h, err
	}
	return n, nil
}

// sound refuses records that no events lead to, so that the rules below can rest on them.
func (h *Handoff) sound() error {
	s := &h.Sandbox
	var what string
	switch claimed := s.State == StateClaimed; {
	case claimed && s.Claim == nil:
		what = "without a claimant"
	case s.Claim != nil && s.Claim.From != StateInTransit && s.Claim.From != StateEnded:
		what = fmt.Sprintf("by a claim from %q", s.Claim.From)
	case (claimed || s.Claim != nil || s.State == StateDumped || s.State == StateInTransit) && !h.current(s.Checkpoint):
		what = "without its checkpoint " + s.Checkpoint.String()
	default:
		return nil
	}
	return &Error{Reason: ReasonMalformed, Subject: subject(s), Msg: "its record says " + string(s.State) + " " + what,
		Fix: "run nsalloc check; restore the record from a snapshot"}
}

// Evidence is what a source saw of a dumped tree that is dead.
type Evidence string

// The kinds of evidence.
const (
	// SeenStopped: 0 had been answered, and every task died while the CRIU that dumped it lived.
	SeenStopped Evidence = "stopped"
	// InDoubt: 0 had been answered, but the tree may have run on before it died.
	InDoubt Evidence = "in_doubt"
	// NotGiven: the dump was never answered 0.
	NotGiven Evidence = "not_given"
)

// Dumped says that a dump of the owner's has complete images and the tree is frozen.
type Dumped struct {
	Host       string
	Epoch      Epoch
	Checkpoint Checkpoint // Serial, RunID and Digest; Next fills in the rest
}

func (e Dumped) next(h *Handoff, at Moment) error {
	s := &h.Sandbox
	if err := s.ownedBy(e.Host, e.Epoch); err != nil {
		return err
	}
	if c := h.Checkpoint; h.current(e.Checkpoint.Serial) {
		// Recorded before. What became of that dump is settled: a late hook does not begin it anew.
		switch {
		case c.RunID != e.Checkpoint.RunID || c.Digest != e.Checkpoint.Digest:
			return refuse(ReasonBound, "checkpoint "+c.Serial.String(), "it is of another dump")
		case s.State != StateDumped:
			return s.wrongState("dump it as "+c.Serial.String()+" again", StateDumped)
		}
		return nil
	}
	if s.State != StateRunning {
		return s.wrongState("dump it", StateRunning)
	}
	if s.OfHost {
		return refuse(ReasonWrongState, subject(s), "it is host %s's own and is never handed off", s.Owner)
	}
	c := e.Checkpoint
	c.State, c.Sandbox, c.Epoch, c.Source, c.Created = CheckpointOpen, s.Serial, s.Epoch, s.Owner, at.Now
	// The tree ran, or it could not have been dumped: the restore that made it has nothing to give back.
	s.State, s.Checkpoint, s.Claim = StateDumped, c.Serial, nil
	h.Checkpoint = &c
	return nil
}

// Stopped says that the dumped tree was seen dead.
type Stopped struct {
	Host       string
	Epoch      Epoch
	Checkpoint Serial
	Evidence   Evidence
}

func (e Stopped) next(h *Handoff, at Moment) error {
	s := &h.Sandbox
	if err := s.ownedBy(e.Host, e.Epoch); err != nil {
		return err
	}
	state, images := StateInTransit, CheckpointOpen
	switch e.Evidence {
	case SeenStopped:
	case InDoubt:
		state, images = StateEnded, CheckpointCopy
	case NotGiven:
		state, images = StateEnded, CheckpointVoid
	default:
		return invalid(subject(s), fmt.Sprintf("evidence %.40q is not known", e.Evidence))
	}
	if !h.current(e.Checkpoint) {
		return h.notCurrent(e.Checkpoint)
	}
	if s.State == state && h.Checkpoint.State == images {
		return nil
	}
	if s.State != StateDumped {
		return s.wrongState("confirm that it stopped", StateDumped)
	}
	s.State, h.Checkpoint.State = state, images
	if state == StateInTransit {
		s.closeStint(OverHandedOff, at.Now)
	} else {
		s.closeStint(OverEnded, at.Now)
	}
	return nil
}

// RanOn says that after its CRIU had gone the dumped tree was seen alive.
type RanOn struct {
	Host       string
	Epoch      Epoch
	Checkpoint Serial
	ZeroGiven  bool
}

func (e RanOn) next(h *Handoff, _ Moment) error {
	s := &h.Sandbox
	if err := s.ownedBy(e.Host, e.Epoch); err != nil {
		return err
	}
	if !h.current(e.Checkpoint) {
		return h.notCurrent(e.Checkpoint)
	}
	images := CheckpointVoid
	if e.ZeroGiven {
		images = CheckpointCopy
	}
	if s.State == StateRunning && h.Checkpoint.State == images {
		return nil
	}
	if s.State != StateDumped {
		return s.wrongState("take the dump back", StateDumped)
	}
	s.State, h.Checkpoint.State = StateRunning, images
	return nil
}

// Claimed says that a restore wants to take the sandbox over. Admit tells before whether it may.
type Claimed struct {
	Claimant   Claimant
	Checkpoint Serial
	Exe        string // of the claimant's CRIU; see Claim
}

func (e Claimed) next(h *Handoff, at Moment) error {
	s := &h.Sandbox
	if s.holds(e.Claimant) && s.Checkpoint == e.Checkpoint {
		return nil
	}
	if !h.current(e.Checkpoint) {
		return h.notCurrent(e.Checkpoint)
	}
	fresh := s.State == StateInTransit && h.Checkpoint.State == CheckpointOpen
	resumed := s.State == StateEnded && h.Checkpoint.State == CheckpointCopy && at.Policy.Over == PolicyResume
	if !fresh && !resumed {
		return s.wrongState("claim it", StateInTransit)
	}
	s.Claim = &Claim{Claimant: e.Claimant, From: s.State, Exe: e.Exe}
	s.State, s.Owner, s.Epoch = StateClaimed, e.Claimant.Host, s.Epoch.next(at.Generation)
	s.openStint(s.Owner, BeganClaimed, at.Actor, e.Checkpoint, at.Now)
	h.Checkpoint.Claimant = &e.Claimant
	return nil
}

// Bound says that the claimed tree stands with its final namespaces.
type Bound struct {
	Claimant Claimant
	Epoch    Epoch
	// Bindings are serials of the sandbox with the namespaces that they name now.
	Bindings []Binding
	// Fresh are namespaces that the dump did not have.
	Fresh []Binding
	// Labels are set; others stay.
	Labels map[string]string
}

func (e Bound) next(h *Handoff, at Moment) error {
	s := &h.Sandbox
	if err := s.ownedBy(e.Claimant.Host, e.Epoch); err != nil {
		return err
	}
	if !s.holds(e.Claimant) {
		return h.claimLost(e.Claimant)
	}
	if s.State == StateRunning {
		return s.boundAs(e)
	}
	if err := s.claimLasts(at.Generation); err != nil {
		return err
	}
	if err := s.rebind(e, at.Now); err != nil {
		return err
	}
	s.State = StateRunning
	h.Checkpoint.State, h.Checkpoint.Consumed = CheckpointConsumed, at.Now
	return nil
}

// Released says that the restore came to nothing: nothing of its tree ever ran, and it is gone.
type Released struct {
	Claimant Claimant
	Epoch    Epoch
}

func (e Released) next(h *Handoff, at Moment) error {
	s := &h.Sandbox
	if err := s.ownedBy(e.Claimant.Host, e.Epoch); err != nil {
		return err
	}
	if st := s.Stint(); s.Claim == nil && (s.State == StateInTransit || s.State == StateEnded) && st != nil && st.Epoch == e.Epoch && st.Over == OverReleased {
		return nil
	}
	if !s.holds(e.Claimant) {
		return h.claimLost(e.Claimant)
	}
	if s.State != StateClaimed && s.State != StateRunning {
		return s.wrongState("give the claim back", StateClaimed)
	}
	h.giveBack(OverReleased, at.Now)
	return nil
}

// giveBack puts a claim back where it came from. The epoch stays raised.
func (h *Handoff) giveBack(over StintOver, now time.Time) {
	s := &h.Sandbox
	s.State = s.Claim.From
	s.undoBind(h.Checkpoint.Consumed)
	h.Checkpoint.State, h.Checkpoint.Claimant, h.Checkpoint.Consumed = CheckpointOpen, nil, time.Time{}
	if s.State == StateEnded {
		h.Checkpoint.State = CheckpointCopy
	}
	s.Claim = nil
	s.closeStint(over, now)
}

// Over says that the processes of a running sandbox were seen gone.
type Over struct {
	Host  string
	Epoch Epoch
}

func (e Over) next(h *Handoff, at Moment) error {
	s := &h.Sandbox
	if err := s.ownedBy(e.Host, e.Epoch); err != nil {
		return err
	}
	if s.State == StateEnded {
		return nil
	}
	if s.State != StateRunning {
		return s.wrongState("end it", StateRunning)
	}
	s.State, s.Claim = StateEnded, nil
	s.closeStint(OverEnded, at.Now)
	return nil
}

// Fenced says that the owner host is given up.
type Fenced struct{ Host string }

func (e Fenced) next(h *Handoff, at Moment) error {
	s := &h.Sandbox
	if s.Owner != e.Host {
		return refuse(ReasonNotOwner, subject(s), "it belongs to host %s, not to %s", s.Owner, e.Host)
	}
	switch s.State {
	case StateRunning:
		s.State, s.Claim = StateEnded, nil
	case StateDumped:
		s.State = StateInTransit
	case StateClaimed:
		h.giveBack(OverClaimFenced, at.Now)
	default:
		return nil // nothing of it is on that host any more
	}
	s.Epoch = s.Epoch.next(at.Generation)
	s.closeStint(OverFenced, at.Now)
	return nil
}

// claimLasts refuses to go on with a claim of an older generation: what the store says of it may be from before
// another host restored the same images.
func (s *Sandbox) claimLasts(g Generation) error {
	if s.State == StateClaimed && s.Epoch.Generation() < g {
		return &Error{Reason: ReasonStaleEpoch, Subject: subject(s),
			Msg: fmt.Sprintf("it was claimed in epoch %s, and the pool's store has forgotten history since: the pool is in generation %d", s.Epoch, g),
			Fix: "begin the restore anew"}
	}
	return nil
}

// holds reports whether who claimed the sandbox, or restored it, in this epoch.
func (s *Sandbox) holds(who Claimant) bool {
	return s.Claim != nil && s.Claim.Claimant == who && (s.State == StateClaimed || s.State == StateRunning)
}

func (s *Sandbox) ownedBy(host string, epoch Epoch) error {
	if s.Epoch != epoch {
		return &Error{Reason: ReasonStaleEpoch, Subject: subject(s),
			Msg: "it is in epoch " + s.Epoch.String() + " on host " + s.Owner + ", not in epoch " + epoch.String(),
			Fix: "treat what runs under the old epoch as a clone"}
	}
	if s.Owner != host {
		return refuse(ReasonNotOwner, subject(s), "it belongs to host %s, not to %s", s.Owner, host)
	}
	return nil
}

func (s *Sandbox) wrongState(what string, want SandboxState) error {
	return refuse(ReasonWrongState, subject(s), "cannot %s: it is %s on host %s (epoch %s), not %s", what, s.State, s.Owner, s.Epoch, want)
}

// current reports whether c is the sandbox's current checkpoint, and at hand.
func (h *Handoff) current(c Serial) bool {
	return c != 0 && h.Sandbox.Checkpoint == c && h.Checkpoint != nil && h.Checkpoint.Serial == c
}

func (h *Handoff) notCurrent(c Serial) error {
	return refuse(ReasonWrongState, subject(&h.Sandbox), "its current checkpoint is %s, not %s", h.Sandbox.Checkpoint, c)
}

func (h *Handoff) claimLost(who Claimant) error {
	return refuse(ReasonWrongState, subject(&h.Sandbox), "run %s on host %s does not hold it", who.Run, who.Host)
}

func subject(s *Sandbox) string { return "sandbox " + s.Serial.String() }
