package alloc

import (
	"cmp"
	"fmt"
	"slices"
)

// Records is what Check looks at: all of a pool's, as of one revision where that can be had. Pool,
// Counter, Requests and OldStints may be left out; what they could show is not checked then.
type Records struct {
	Pool        *Pool
	Counter     *Counter
	Sandboxes   []*Sandbox
	Checkpoints []*Checkpoint
	Hosts       []*Host
	Requests    []*Request
	OldStints   []*OldStint
}

// Finding is a promise that the records break.
type Finding struct {
	// Promise is the number of the promise, such as P1.
	Promise string `json:"promise"`
	// Subject is the object, kind first.
	Subject string `json:"subject"`
	// Evidence says what contradicts what.
	Evidence string `json:"evidence"`
	// Fix is what to do.
	Fix string `json:"fix"`
}

// Check verifies what records alone can show: P1 (no serial twice), P3 (one owner at a time), P6 (a
// checkpoint consumed once at most) and P16 (a live namespace has one serial). It returns nothing for
// records that keep them.
func Check(r Records) []Finding {
	c := &checker{
		checkpoints: map[Serial]*Checkpoint{}, sandboxes: map[Serial]*Sandbox{}, stints: map[Serial][]Stint{},
		serials: map[Serial]string{},
	}
	for _, cp := range r.Checkpoints {
		c.checkpoints[cp.Serial] = cp
	}
	for _, s := range r.Sandboxes {
		c.sandboxes[s.Serial] = s
		c.stints[s.Serial] = s.Stints
	}
	c.older(r.OldStints)
	c.unique(r)
	c.ranges(r)
	c.counter(r)
	c.liveNamespaces(r.Sandboxes)
	for _, s := range r.Sandboxes {
		c.history(s)
		c.claim(s)
		c.current(s)
	}
	c.consumed(r.Sandboxes)
	for _, cp := range r.Checkpoints {
		c.checkpoint(cp)
	}
	slices.SortStableFunc(c.findings, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.Promise, b.Promise), cmp.Compare(a.Subject, b.Subject), cmp.Compare(a.Evidence, b.Evidence))
	})
	return c.findings
}

type checker struct {
	findings    []Finding
	serials     map[Serial]string // serial -> who has it
	checkpoints map[Serial]*Checkpoint
	sandboxes   map[Serial]*Sandbox
	stints      map[Serial][]Stint // sandbox -> its history, as far as it is known
}

const (
	reportIt  = "keep a snapshot of the store and report it: no sequence of requests may lead here"
	restoreIt = "restore the store from a snapshot that holds both"
)

func (c *checker) find(promise, about, fix, format string, args ...any) {
	c.findings = append(c.findings, Finding{Promise: promise, Subject: about, Evidence: fmt.Sprintf(format, args...), Fix: fix})
}

// older puts stints that have moved out of their sandboxes' records in front.
func (c *checker) older(stints []*OldStint) {
	before := map[Serial][]Stint{}
	for _, o := range stints {
		if c.sandboxes[o.Sandbox] == nil {
			c.find("P3", "sandbox "+o.Sandbox.String(), restoreIt, "it does not exist, and a stint of it on host %s does", o.Stint.Host)
			continue
		}
		before[o.Sandbox] = append(before[o.Sandbox], o.Stint)
	}
	for serial, sts := range before {
		slices.SortFunc(sts, func(a, b Stint) int { return cmp.Compare(a.Epoch, b.Epoch) })
		c.stints[serial] = append(sts, c.stints[serial]...)
	}
}

func (s *Sandbox) owned() bool {
	return s.State == StateRunning || s.State == StateDumped || s.State == StateClaimed
}

// history proves P3: epochs rise, stints do not overlap, and the open one is the owner's.
func (c *checker) history(s *Sandbox) {
	for i, st := range c.stints[s.Serial] {
		if i > 0 {
			before := c.stints[s.Serial][i-1]
			if before.Epoch >= st.Epoch {
				c.find("P3", subject(s), reportIt, "epoch %s on host %s follows epoch %s on host %s", st.Epoch, st.Host, before.Epoch, before.Host)
			}
			if before.To.IsZero() {
				c.find("P3", subject(s), reportIt, "the stint on host %s never ended and one on host %s followed", before.Host, st.Host)
			}
		}
		if st.Epoch > s.Epoch {
			c.find("P3", subject(s), reportIt, "a stint of epoch %s is in a sandbox of epoch %s", st.Epoch, s.Epoch)
		}
	}
	last := s.Stint()
	switch {
	case last == nil:
		c.find("P3", subject(s), reportIt, "it has no history")
	case last.Host != s.Owner:
		c.find("P3", subject(s), reportIt, "it is host %s's, its last stint host %s's", s.Owner, last.Host)
	case s.owned() && (!last.To.IsZero() || last.Epoch != s.Epoch):
		c.find("P3", subject(s), reportIt, "it is %s on host %s in epoch %s, its last stint there is of epoch %s and over: %q", s.State, s.Owner, s.Epoch, last.Epoch, last.Over)
	case !s.owned() && last.To.IsZero():
		c.find("P3", subject(s), reportIt, "it is %s, its last stint on host %s is still open", s.State, last.Host)
	}
}

// claim proves that who claims a sandbox is its owner, and nobody else.
func (c *checker) claim(s *Sandbox) {
	switch {
	case s.Claim == nil && s.State == StateClaimed:
		c.find("P3", subject(s), reportIt, "it is claimed by nobody")
	case s.Claim == nil:
	case s.State != StateClaimed && s.State != StateRunning:
		c.find("P3", subject(s), reportIt, "it is %s and claimed by run %s on host %s", s.State, s.Claim.Run, s.Claim.Host)
	case s.Claim.Host != s.Owner:
		c.find("P3", subject(s), reportIt, "host %s owns it, host %s claims it", s.Owner, s.Claim.Host)
	}
}

// current proves that a sandbox and its current checkpoint agree.
func (c *checker) current(s *Sandbox) {
	if s.Checkpoint == 0 {
		if s.State == StateDumped || s.State == StateInTransit || s.State == StateClaimed || s.Claim != nil {
			c.find("P3", subject(s), reportIt, "it is %s without a checkpoint", s.State)
		}
		return
	}
	cp := c.checkpoints[s.Checkpoint]
	if cp == nil {
		c.find("P6", subject(s), restoreIt, "its checkpoint %s does not exist", s.Checkpoint)
		return
	}
	if cp.Sandbox != s.Serial {
		c.find("P6", subject(s), reportIt, "its checkpoint %s is of sandbox %s", cp.Serial, cp.Sandbox)
	}
	if cp.Epoch > s.Epoch {
		c.find("P3", subject(s), reportIt, "its checkpoint is of epoch %s, it is in epoch %s", cp.Epoch, s.Epoch)
	}
	var fits bool
	switch s.State {
	case StateDumped, StateInTransit:
		fits = cp.State == CheckpointOpen
	case StateClaimed:
		fits = cp.State == CheckpointOpen || cp.State == CheckpointCopy
		if s.Claim != nil && s.Claim.From != "" { // it does not cross the wire
			fits = fits && (s.Claim.From == StateEnded) == (cp.State == CheckpointCopy)
		}
	case StateRunning:
		fits = cp.State != CheckpointOpen && (s.Claim == nil || cp.State == CheckpointConsumed)
	default:
		fits = cp.State != CheckpointOpen
	}
	if !fits {
		c.find("P6", subject(s), reportIt, "it is %s and its checkpoint %s is %s", s.State, cp.Serial, cp.State)
	}
}

// checkpoint proves that one that can still be claimed is its sandbox's current one.
func (c *checker) checkpoint(cp *Checkpoint) {
	about := "checkpoint " + cp.Serial.String()
	s := c.sandboxes[cp.Sandbox]
	switch {
	case s == nil:
		c.find("P6", about, restoreIt, "its sandbox %s does not exist", cp.Sandbox)
	case cp.State == CheckpointOpen && s.Checkpoint != cp.Serial:
		c.find("P6", about, reportIt, "it is open, and the current checkpoint of %s is %s", subject(s), s.Checkpoint)
	}
}

// consumed proves P6: of the stints that began from one checkpoint, one at most ran.
func (c *checker) consumed(sandboxes []*Sandbox) {
	by := map[Serial]Serial{}
	for _, s := range sandboxes {
		for _, st := range c.stints[s.Serial] {
			if st.Began != BeganClaimed || st.Over == OverReleased || st.Over == OverClaimFenced || st.To.IsZero() && s.State == StateClaimed {
				continue
			}
			cp := c.checkpoints[st.Checkpoint]
			if cp != nil && cp.State != CheckpointConsumed {
				c.find("P6", "checkpoint "+cp.Serial.String(), reportIt, "%s ran from it on host %s, and it is %s", subject(s), st.Host, cp.State)
			}
			if other, ok := by[st.Checkpoint]; ok {
				c.find("P6", "checkpoint "+st.Checkpoint.String(), reportIt, "sandboxes %s and %s both ran from it", other, s.Serial)
			}
			by[st.Checkpoint] = s.Serial
		}
	}
}
