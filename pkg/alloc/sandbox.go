package alloc

import (
	"fmt"
	"time"
)

// SandboxState says where a sandbox is in its life. The table of moves stands in the package comment.
type SandboxState string

// The states of a sandbox.
const (
	// StateRunning: it lives on its owner host.
	StateRunning SandboxState = "running"
	// StateDumped: its images are complete and recorded; the source has not said yet what became of the tree.
	StateDumped SandboxState = "dumped"
	// StateInTransit: the source saw the tree killed by the dump; whoever has the images may claim it.
	StateInTransit SandboxState = "in_transit"
	// StateClaimed: one CRIU run on the owner host is restoring it.
	StateClaimed SandboxState = "claimed"
	// StateEnded: its processes are gone, and not through a hand-off.
	StateEnded SandboxState = "ended"
)

// Limits of a sandbox record.
const (
	keptStints   = 32
	maxLabels    = 32
	maxLabelSize = 256
)

// Sandbox is the bindings that move together: what one dump takes, or what one container owns. One
// record holds them all, so that a hand-off of hundreds of namespaces changes one key.
type Sandbox struct {
	Serial Serial       `json:"serial"`
	State  SandboxState `json:"state"`
	// Owner is the host that answers for the sandbox. In transit and ended it is the last one.
	Owner string `json:"owner"`
	// Epoch counts the owners; see Epoch.
	Epoch Epoch `json:"epoch"`
	// OfHost marks the host's own sandbox: the namespaces of its PID 1. It is never handed off.
	OfHost   bool      `json:"of_host,omitempty"`
	Bindings []Binding `json:"bindings"`
	// Stints is the sandbox's history, oldest first: the last 32. Older ones are Stint records.
	Stints []Stint           `json:"stints"`
	Labels map[string]string `json:"labels,omitempty"`
	// Checkpoint is the current checkpoint: the last one committed; 0 when there was none.
	Checkpoint Serial `json:"checkpoint,omitempty"`
	// Claim is the restore that made, or is making, the tree of this epoch; nil for a tree that no
	// restore made.
	Claim *Claim `json:"claim,omitempty"`
	// Parent is set in a clone.
	Parent *Parent `json:"parent,omitempty"`
	// Created is when the sandbox was registered first, by the server's clock.
	Created time.Time `json:"created"`
	// Again is the generation in which the owner has last said that it lives there (RegisterAgain); 0 when it
	// never had to.
	Again Generation `json:"again,omitempty"`
	// Requests are the last ones that changed this record.
	Requests RequestLog `json:"-"`
	// Extra holds what a newer version stored in this record; see Pool.Extra.
	Extra []byte `json:"-"`
}

// Stint is one row of a sandbox's history: who owned it, from when to when.
type Stint struct {
	Host  string `json:"host"`
	Epoch Epoch  `json:"epoch"`
	// From and To are of the server's clock; To is zero while the stint lasts.
	From time.Time `json:"from"`
	To   time.Time `json:"to,omitzero"`
	// Began and Over say by which event; Over is "" while the stint lasts.
	Began StintBegan `json:"began"`
	Over  StintOver  `json:"over,omitempty"`
	// Checkpoint is the one that the stint began from; 0 for a tree that no restore made.
	Checkpoint Serial `json:"checkpoint,omitempty"`
	// Actor is who made the change that began the stint, such as host/a or operator/ann.
	Actor string `json:"actor"`
	// Extra holds what a newer version stored in this stint; see Pool.Extra.
	Extra []byte `json:"-"`
}

// StintBegan is the event that began a stint.
type StintBegan string

// What began a stint.
const (
	// BeganRegistered: the host registered the sandbox as a new one.
	BeganRegistered StintBegan = "registered"
	// BeganClaimed: a restore claimed the sandbox. Of the stints that began so from one checkpoint, one at
	// most ran.
	BeganClaimed StintBegan = "claimed"
	// BeganCloned: the host registered the sandbox as a clone of another one.
	BeganCloned StintBegan = "cloned"
	// BeganAgain: the host registered the sandbox again after the store had forgotten it, or how it came there.
	// What was before may be missing from the history.
	BeganAgain StintBegan = "registered again"
)

// StintOver is the event that a stint was over by.
type StintOver string

// What a stint was over by.
const (
	// OverHandedOff: a dump killed the tree, and whoever has the images may claim the sandbox.
	OverHandedOff StintOver = "handed off"
	// OverReleased: the claim was given back; nothing of its tree ever ran.
	OverReleased StintOver = "released"
	// OverEnded: the processes were seen gone, and not through a hand-off.
	OverEnded StintOver = "ended"
	// OverFenced: the host was given up while the sandbox ran there, or was dumped.
	OverFenced StintOver = "fenced"
	// OverClaimFenced: the host was given up while it was restoring the sandbox; unlike a fenced run, nothing ran.
	OverClaimFenced StintOver = "claim fenced"
	// OverLost: the store has forgotten how it was over: another host has registered the sandbox again, under a
	// higher epoch.
	OverLost StintOver = "lost"
)

// Claimant names one restore: a second CRIU run on the same host is another claimant.
type Claimant struct {
	Host   string `json:"host"`
	BootID string `json:"boot_id"`
	// Run is the key of the CRIU process on that boot, as the agent makes it (pid and start time).
	Run string `json:"run"`
}

// Claim is a claimant with the state that its claim goes back to when nothing ran.
type Claim struct {
	Claimant
	From SandboxState `json:"from"` // StateInTransit or StateEnded
	// Exe names the file that the claimant's CRIU executes, as ClaimCommand.Exe did; "" where nobody said.
	Exe string `json:"exe,omitempty"`
	// Extra holds what a newer version stored in this claim; see Pool.Extra.
	Extra []byte `json:"-"`
}

// Parent says what a clone was made from.
type Parent struct {
	Sandbox    Serial `json:"sandbox"`
	Checkpoint Serial `json:"checkpoint"`
}

// Binding finds a binding by serial.
func (s *Sandbox) Binding(serial Serial) (*Binding, bool) {
	for i := range s.Bindings {
		if s.Bindings[i].Serial == serial {
			return &s.Bindings[i], true
		}
	}
	return nil, false
}

// Stint is the current or last row of the history.
func (s *Sandbox) Stint() *Stint {
	if len(s.Stints) == 0 {
		return nil
	}
	return &s.Stints[len(s.Stints)-1]
}

func (s *Sandbox) openStint(host string, began StintBegan, actor string, checkpoint Serial, now time.Time) {
	s.Stints = append(s.Stints, Stint{Host: host, Epoch: s.Epoch, From: now, Began: began, Actor: actor, Checkpoint: checkpoint})
}

func (s *Sandbox) closeStint(over StintOver, now time.Time) {
	if st := s.Stint(); st != nil && st.To.IsZero() {
		st.To, st.Over = now, over
	}
}

// clone copies what Next changes, so that a refused event leaves the old value as it was.
func (s Sandbox) clone() Sandbox {
	s.Bindings = append([]Binding(nil), s.Bindings...)
	s.Stints = append([]Stint(nil), s.Stints...)
	if s.Claim != nil {
		c := *s.Claim
		s.Claim = &c
	}
	return s
}

func validateLabels(subject string, labels map[string]string) error {
	if len(labels) > maxLabels {
		return invalid(subject, fmt.Sprintf("%d labels, %d are allowed", len(labels), maxLabels))
	}
	for k, v := range labels {
		if err := validText(fmt.Sprintf("%s: name of label %.40q", subject, k), k, 1, maxLabelSize); err != nil {
			return err
		}
		if err := validText(fmt.Sprintf("%s: value of label %.40q", subject, k), v, 0, maxLabelSize); err != nil {
			return err
		}
	}
	return nil
}
