package alloc

import (
	"fmt"
	"slices"
	"time"
)

// Again says what a host knows of a sandbox after the store has forgotten history: mostly that it lives there, in the
// epoch in which the host has it. The epoch decides: it carries the generation, so that it never repeats, and only
// claims and fences raise it.
//
//	the store's epoch   its state             next      what else
//	lower               any                   running   the host's epoch; a checkpoint that is open, or claimed, or that it was made from, is consumed
//	the same            running, dumped       as it is  the host's bindings
//	the same            claimed               running   consumed: the bind was acknowledged and forgotten
//	the same            in_transit, ended     refused   its tree was seen dead in that epoch
//	higher              any                   refused   another host went on with it, or this one was fenced
//
// One that is dumped stays so: what became of the tree is for its host to say next, as always.
//
// With Over nothing of it lives any more, and it ends where it would run: a restore ran from images that the store
// still has as open, and no second one may.
type Again struct {
	Host  string
	Epoch Epoch
	// Bindings are all that live; what else the record has is gone.
	Bindings []Binding
	Labels   map[string]string
	// Checkpoint is the sandbox's current one, as far as the host knows; 0 for none.
	Checkpoint Serial
	Over       bool
}

func (e Again) next(h *Handoff, at Moment) error {
	s := &h.Sandbox
	if s.Epoch >= e.Epoch {
		if err := s.ownedBy(e.Host, e.Epoch); err != nil {
			return err
		}
		switch s.State {
		case StateRunning, StateDumped, StateClaimed:
		default:
			if e.Over {
				return nil // as it says
			}
			return s.wrongState("register it again", StateRunning)
		}
		if s.Again >= at.Generation {
			return nil // it was, and may have changed since
		}
	}
	if !e.Over {
		if err := s.relive(e, at); err != nil {
			return err
		}
	}
	c := h.Checkpoint
	switch {
	case s.Epoch == e.Epoch && s.State == StateClaimed:
		s.State = StateRunning
		c.State, c.Consumed = CheckpointConsumed, at.Now
	case s.Epoch < e.Epoch:
		made := e.Checkpoint != 0 && e.Checkpoint == s.Checkpoint
		if c != nil && (made || c.State == CheckpointOpen || s.State == StateClaimed) {
			// An epoch is raised through the current checkpoint: whichever one this tree was made from, nobody
			// goes on from this one as the sandbox any more. A claim of it may have been bound.
			c.State, c.Consumed = CheckpointConsumed, at.Now
			if c.Claimant != nil && c.Claimant.Host != e.Host {
				c.Claimant = nil
			}
		}
		if !made {
			s.Checkpoint = 0 // the store does not know the one that it has
		}
		s.closeStint(OverLost, at.Now)
		s.State, s.Owner, s.Epoch, s.Claim = StateRunning, e.Host, e.Epoch, nil
		s.openStint(e.Host, BeganAgain, at.Actor, e.Checkpoint, at.Now)
	}
	if e.Over && s.State == StateRunning {
		s.State, s.Claim = StateEnded, nil
		s.closeStint(OverEnded, at.Now)
	}
	s.Again = at.Generation
	return s.setLabels(e.Labels)
}

// relive makes the bindings those that live on the host that registers the sandbox again. It has been the owner all
// the time: what it has is live, and what it does not have is gone.
func (s *Sandbox) relive(e Again, at Moment) error {
	lives := make(map[Serial]bool, len(e.Bindings))
	for _, b := range e.Bindings {
		lives[b.Serial] = true
		known, ok := s.Binding(b.Serial)
		switch {
		case !ok:
			s.Bindings = append(s.Bindings, b.boundBy(at.Now))
		case known.Type != b.Type:
			return refuse(ReasonBound, subject(s), "serial %s is a %s namespace's, not a %s's", b.Serial, known.Type, b.Type)
		default:
			known.Kernel, known.Gone = b.Kernel, time.Time{}
		}
	}
	for i := range s.Bindings {
		if b := &s.Bindings[i]; b.Live() && !lives[b.Serial] {
			b.Gone = at.Now
		}
	}
	if n := len(s.Bindings); n > MaxBindings {
		return refuse(ReasonTooLarge, subject(s), "%d namespaces, %d are allowed", n, MaxBindings)
	}
	return nil
}

// boundBy is b as a new row of a record: bound when the host says, if that is over, and live.
func (b Binding) boundBy(now time.Time) Binding {
	if b.Bound.IsZero() || b.Bound.After(now) {
		b.Bound = now
	}
	b.Gone, b.Extra = time.Time{}, nil
	return b
}

// sandbox is the record of one that the store does not know at all.
func (it AgainItem) sandbox(host string, at Moment) *Sandbox {
	s := &Sandbox{
		Serial: it.Sandbox, State: StateRunning, Owner: host, Epoch: it.Epoch, OfHost: it.OfHost, Labels: it.Labels,
		Created: it.Created, Again: at.Generation,
	}
	if s.Created.IsZero() || s.Created.After(at.Now) {
		s.Created = at.Now
	}
	if it.Parent != nil {
		parent := *it.Parent
		s.Parent = &parent
	}
	for _, b := range it.Bindings {
		s.Bindings = append(s.Bindings, b.boundBy(at.Now))
	}
	s.openStint(host, BeganAgain, at.Actor, it.Checkpoint, at.Now)
	if it.Over {
		s.State = StateEnded
		s.closeStint(OverEnded, at.Now)
	}
	return s
}

// takeFrom removes from the record of another sandbox the serials of namespaces that the host has in one of its
// own: they were parted from it (Register), and the store has forgotten that. known says that the record is what
// its owner has said in this generation: what lives there by that stays there.
func (s *Sandbox) takeFrom(bindings []Binding, known bool) error {
	before := len(s.Bindings)
	for _, b := range bindings {
		was, ok := s.Binding(b.Serial)
		switch {
		case !ok:
			continue
		case was.Type != b.Type, known && s.owned() && was.Live() && was.Kernel != b.Kernel:
			return refuse(ReasonBound, subject(s), "serial %s is of another namespace there", b.Serial)
		}
		s.Bindings = slices.DeleteFunc(s.Bindings, func(x Binding) bool { return x.Serial == b.Serial })
	}
	if len(s.Bindings) < before && !s.handedOff() {
		s.Checkpoint, s.Claim = 0, nil // as for all that something parts from (part.go)
	}
	return nil
}

// validate checks what needs no store.
func (it AgainItem) validate(g Generation, bootID string) error {
	about := "sandbox " + it.Sandbox.String()
	older := func(what string, s Serial) error {
		if !s.Valid() || s.Generation() >= g {
			return invalid(about, fmt.Sprintf("%s %s is not of a generation before %d, in which it is registered again", what, s, g))
		}
		return nil
	}
	if err := older("its serial", it.Sandbox); err != nil {
		return err
	}
	switch {
	case it.Epoch == 0 || it.Epoch.Generation() >= g || it.Epoch.Generation() == 0:
		return invalid(about, fmt.Sprintf("epoch %s is not of a generation before %d, in which it is registered again", it.Epoch, g))
	case it.Over != (len(it.Bindings) == 0):
		return invalid(about, "what lives has namespaces, and what is over has none")
	case it.Over && it.Dump != nil:
		return invalid(about, "it cannot be over and dumped")
	}
	if d := it.Dump; d != nil {
		if err := older("checkpoint", d.Checkpoint); err != nil {
			return err
		}
		if err := validText("run id", d.RunID, 0, 64); err != nil {
			return err
		}
		if d.Digest == (Digest{}) {
			return invalid("digest", "it is missing")
		}
	}
	for _, b := range it.Bindings {
		if err := older("serial", b.Serial); err != nil {
			return err
		}
		boot := bootID
		if it.Dump != nil { // what was dumped may be of an earlier one
			boot = b.Kernel.BootID
			if err := ValidateBootID(boot); err != nil {
				return err
			}
		}
		if err := b.validate(boot); err != nil {
			return err
		}
	}
	return validateLabels(about, it.Labels)
}
