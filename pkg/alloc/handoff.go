package alloc

import (
	"slices"
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
// Released, Over or Fenced.
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
	if err := e.next(&n, at); err != nil {
		return h, err
	}
	return n, nil
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

// What Stint.Began and Stint.Over say.
const (
	beganRegistered = "registered"
	beganClaimed    = "claimed"
	beganCloned     = "cloned"
	overHandedOff   = "handed off"
	overReleased    = "released"
	overEnded       = "ended"
	overFenced      = "fenced"
)

// Dumped: a dump of the owner's has complete images, the tree is frozen.
type Dumped struct {
	Host       string
	Epoch      Epoch
	Checkpoint Checkpoint // Serial, RunID and Digest; Next fills in the rest
}

func (e Dumped) next(h *Handoff, at Moment) error {
	s := &h.Sandbox
	if s.State == StateDumped && s.Owner == e.Host && s.Epoch == e.Epoch && s.Checkpoint == e.Checkpoint.Serial {
		return nil
	}
	if err := s.ownedBy(e.Host, e.Epoch); err != nil {
		return err
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

// Stopped: the dumped tree was seen dead.
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
		return invalid(subject(s), "evidence "+string(e.Evidence)+" is not known")
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
		s.closeStint(overHandedOff, at.Now)
	} else {
		s.closeStint(overEnded, at.Now)
	}
	return nil
}

// RanOn: after its CRIU had gone the dumped tree was seen alive.
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

// Claimed: a restore wants to take the sandbox over. Admit says before whether it may.
type Claimed struct {
	Claimant   Claimant
	Checkpoint Serial
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
	s.Claim = &Claim{Claimant: e.Claimant, From: s.State}
	s.State, s.Owner, s.Epoch = StateClaimed, e.Claimant.Host, s.Epoch.next(at.Generation)
	s.openStint(s.Owner, beganClaimed, at.Actor, e.Checkpoint, at.Now)
	h.Checkpoint.Claimant = &e.Claimant
	return nil
}

// Bound: the claimed tree stands with its final namespaces.
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
		return nil
	}
	if s.State != StateClaimed {
		return s.wrongState("bind it", StateClaimed)
	}
	if err := s.rebind(e, at.Now); err != nil {
		return err
	}
	s.State = StateRunning
	h.Checkpoint.State, h.Checkpoint.Consumed = CheckpointConsumed, at.Now
	return nil
}

// Released: the restore came to nothing; nothing of its tree ever ran, and it is gone.
type Released struct {
	Claimant Claimant
	Epoch    Epoch
}

func (e Released) next(h *Handoff, at Moment) error {
	s := &h.Sandbox
	if err := s.ownedBy(e.Claimant.Host, e.Epoch); err != nil {
		return err
	}
	if st := s.Stint(); s.Claim == nil && (s.State == StateInTransit || s.State == StateEnded) && st != nil && st.Epoch == e.Epoch && st.Over == overReleased {
		return nil
	}
	if !s.holds(e.Claimant) {
		return h.claimLost(e.Claimant)
	}
	if s.State != StateClaimed && s.State != StateRunning {
		return s.wrongState("give the claim back", StateClaimed)
	}
	h.giveBack(overReleased, at.Now)
	return nil
}

// giveBack puts a claim back where it came from. The epoch stays raised.
func (h *Handoff) giveBack(over string, now time.Time) {
	s := &h.Sandbox
	s.State = s.Claim.From
	h.Checkpoint.State, h.Checkpoint.Claimant, h.Checkpoint.Consumed = CheckpointOpen, nil, time.Time{}
	if s.State == StateEnded {
		h.Checkpoint.State = CheckpointCopy
	}
	s.Claim = nil
	s.closeStint(over, now)
}

// Over: the processes of a running sandbox were seen gone.
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
	s.closeStint(overEnded, at.Now)
	return nil
}

// Fenced: the owner host is given up.
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
		h.giveBack(overFenced, at.Now)
	default:
		return nil // nothing of it is on that host any more
	}
	s.Epoch = s.Epoch.next(at.Generation)
	s.closeStint(overFenced, at.Now)
	return nil
}

// Outcome is what a restore may do.
type Outcome string

// The outcomes of Admit.
const (
	// MayClaim: go on as the sandbox itself.
	MayClaim Outcome = "claim"
	// MayClone: go on with fresh serials.
	MayClone Outcome = "clone"
)

// Admit says what a restore of checkpoint c may do, given c's sandbox. The digest is that of the
// manifest found in the images. An error means: do not restore, or wait when it says RetryAfter.
func Admit(c *Checkpoint, s *Sandbox, digest Digest, who Claimant, p Policy) (Outcome, string, error) {
	about := "checkpoint " + c.Serial.String()
	current := s.Checkpoint == c.Serial
	switch {
	case digest != c.Digest:
		return "", "", &Error{Reason: ReasonManifest, Subject: about,
			Msg: "the manifest in the images is not the one that host " + c.Source + " recorded",
			Fix: "copy the image directory again, with nsalloc.json as it was"}
	case current && s.holds(who):
		return MayClaim, "", nil
	case c.State == CheckpointVoid:
		return "", "", &Error{Reason: ReasonVoid, Subject: about,
			Msg: "its dump on host " + c.Source + " was vetoed, and the sandbox ran on",
			Fix: "dump sandbox " + s.Serial.String() + " again"}
	case current && s.State == StateInTransit && c.State == CheckpointOpen:
		return MayClaim, "", nil
	case current && s.State == StateEnded && c.State == CheckpointCopy && p.Over == PolicyResume:
		return MayClaim, "", nil
	case current && s.State == StateEnded && c.State == CheckpointCopy && p.Over == PolicyRefuse:
		return "", "", refuse(ReasonRefused, about, "sandbox %s is over and the pool's policy refuses to bring it back from a copy", s.Serial)
	case current && s.State == StateDumped:
		return "", "", &Error{Reason: ReasonNotConfirmed, Subject: about,
			Msg: "source host " + c.Source + " has not confirmed that the dumped processes are gone",
			Fix: "wait; if host " + c.Source + " is lost for good, fence it", RetryAfter: retrySoon}
	case current && s.State == StateClaimed:
		return "", "", &Error{Reason: ReasonClaimed, Subject: about,
			Msg: "run " + s.Claim.Run + " on host " + s.Owner + " is restoring it",
			Fix: "wait for that restore to end", RetryAfter: retrySoon}
	case current && s.State == StateEnded && c.State == CheckpointCopy:
		return MayClone, "sandbox " + s.Serial.String() + " is over and the pool's policy clones copies", nil
	case p.Live == PolicyRefuse:
		return "", "", refuse(ReasonRefused, about, "it is %s, sandbox %s is %s, and the pool's policy refuses a clone", c.State, s.Serial, s.State)
	default:
		return MayClone, "checkpoint " + c.Serial.String() + " is " + string(c.State) + " and its sandbox " + s.Serial.String() + " is " + string(s.State) + " on host " + s.Owner, nil
	}
}

// rebind replaces the kernel identities after a restore. What is not in e.Bindings was not in the
// images: it is gone.
func (s *Sandbox) rebind(e Bound, now time.Time) error {
	now = now.UTC()
	seen := map[Serial]bool{}
	for _, n := range e.Bindings {
		b, ok := s.Binding(n.Serial)
		switch {
		case seen[n.Serial]:
			return refuse(ReasonBound, subject(s), "serial %s stands twice in the bindings", n.Serial)
		case !ok:
			return refuse(ReasonBound, subject(s), "serial %s is not of this sandbox", n.Serial)
		case b.Type != n.Type:
			return refuse(ReasonBound, subject(s), "serial %s is a %s namespace's, not a %s's", n.Serial, b.Type, n.Type)
		case !b.Live():
			return refuse(ReasonBound, subject(s), "serial %s is of a namespace that is gone since %s", n.Serial, b.Gone.Format(time.RFC3339))
		}
		if err := n.validate(e.Claimant.BootID); err != nil {
			return err
		}
		seen[n.Serial], b.Kernel = true, n.Kernel
	}
	for i := range s.Bindings {
		if b := &s.Bindings[i]; b.Live() && !seen[b.Serial] {
			b.Gone = now
		}
	}
	if err := s.add(e.Fresh, e.Claimant.BootID, now); err != nil {
		return err
	}
	return s.setLabels(e.Labels)
}

// add appends bindings of namespaces that the sandbox did not have, and proves that each live
// namespace of it stands under one serial.
func (s *Sandbox) add(fresh []Binding, bootID string, now time.Time) error {
	for _, b := range fresh {
		if err := b.validate(bootID); err != nil {
			return err
		}
		if _, ok := s.Binding(b.Serial); ok {
			return refuse(ReasonBound, subject(s), "serial %s is bound already", b.Serial)
		}
		b.Bound, b.Gone = now, time.Time{}
		s.Bindings = append(s.Bindings, b)
	}
	if len(s.Bindings) > MaxBindings {
		return refuse(ReasonTooLarge, subject(s), "%d namespaces, %d are allowed", len(s.Bindings), MaxBindings)
	}
	live := map[string]Serial{}
	for _, b := range s.Bindings {
		if !b.Live() {
			continue
		}
		key := b.Kernel.Key(b.Type)
		if other, ok := live[key]; ok {
			return refuse(ReasonBound, subject(s), "%s namespace %s has serial %s already, %s cannot be added", b.Type, key, other, b.Serial)
		}
		live[key] = b.Serial
	}
	return nil
}

func (s *Sandbox) setLabels(set map[string]string) error {
	if len(set) == 0 {
		return nil
	}
	labels := make(map[string]string, len(s.Labels)+len(set))
	for k, v := range s.Labels {
		labels[k] = v
	}
	for k, v := range set {
		labels[k] = v
	}
	if err := validateLabels(subject(s), labels); err != nil {
		return err
	}
	s.Labels = labels
	return nil
}

// holds reports whether who claimed the sandbox, or restored it, in this epoch.
func (s *Sandbox) holds(who Claimant) bool {
	return s.Claim != nil && s.Claim.Claimant == who && slices.Contains([]SandboxState{StateClaimed, StateRunning}, s.State)
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
