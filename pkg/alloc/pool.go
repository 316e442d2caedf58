package alloc

import (
	"fmt"
	"math"
	"time"
)

// FormatVersion is the format of the records that this version writes. A store of a newer format is
// refused.
const FormatVersion = 1

// PoolState says whether serials may be issued.
type PoolState string

// The states of a pool.
const (
	PoolOpen       PoolState = "open"
	PoolRecovering PoolState = "recovering"
)

// Pool is the record of the pool itself. Every issuing transaction compares it.
type Pool struct {
	// UUID names the pool for ever, wherever its store moves.
	UUID       string     `json:"uuid"`
	Generation Generation `json:"generation"`
	State      PoolState  `json:"state"`
	Policy     Policy     `json:"policy"`
	Format     int        `json:"format"`
	// Nonce is drawn anew with every generation, so that two recoveries that could not hear of each
	// other are told apart.
	Nonce string `json:"-"`
	// Target, while State is PoolRecovering, is the least generation in which the pool may open again: later than
	// all that those have seen who found that the store has lost history; 0 for the next one.
	Target Generation `json:"target,omitempty"`
	// Settled is the last generation of which every host has said what lives on it, or was waived; 0 when none was
	// noted. See IsSettled.
	Settled Generation `json:"settled,omitempty"`
	// Raised says until when the generations are accounted for that servers have taken by themselves, RaiseEvery for
	// each, by their clocks; zero while none has. It can be RaiseBurst times that ahead of now.
	Raised time.Time `json:"raised,omitzero"`
	// Created is when InitPool made the pool, by its clock; zero in pools of before.
	Created time.Time `json:"created,omitzero"`
	// PolicyExtra holds what a newer version stored in the policy. It stands here so that a Policy can be
	// compared and replaced without it.
	PolicyExtra []byte `json:"-"`
	// Extra holds the fields of the stored record that this version does not know, so that writing
	// the record back loses nothing that a newer version put there. Only stores touch it.
	Extra []byte `json:"-"`
}

// Action is what a policy orders.
type Action string

// The actions of a policy.
const (
	// PolicyClone: fresh serials, parents recorded.
	PolicyClone Action = "clone"
	// PolicyResume: the same serials go on.
	PolicyResume Action = "resume"
	// PolicyAdopt: fresh serials and a warning.
	PolicyAdopt Action = "adopt"
	// PolicyRefuse: the restore is vetoed.
	PolicyRefuse Action = "refuse"
)

// Unheard is what a server does that does not hear the witness of another one, which may have seen more of
// the store than itself.
type Unheard string

// The choices. The empty one, of pools from before there was a choice, is UnheardNewGeneration.
const (
	// UnheardNewGeneration: it takes a new generation before it issues anything.
	UnheardNewGeneration Unheard = "new-generation"
	// UnheardWait: it issues nothing until it has heard that one, or that one is removed.
	UnheardWait Unheard = "wait"
)

// Policy says what a restore gets when it is not the straight continuation of its sandbox, how much a host gets, and
// what a server does that cannot be sure of its store. An operator changes it (SetPolicy).
type Policy struct {
	// Live: images that are consumed, or a copy, while their sandbox lives: PolicyClone or PolicyRefuse.
	Live Action `json:"live"`
	// Over: the current copy of a sandbox that is over: PolicyResume, PolicyClone or PolicyRefuse.
	Over Action `json:"over"`
	// Unknown: images without a manifest that the pool never heard of: PolicyAdopt or PolicyRefuse.
	Unknown Action `json:"unknown"`
	// HostQuota is the most serials that one host is granted in 24 hours, MinHostQuota or more; NoHostQuota for no
	// limit. In records of before there were quotas it is 0, which stands for DefaultHostQuota.
	HostQuota uint64 `json:"host_quota"`
	// UnheardWitness: the witness of another server is not heard: UnheardNewGeneration or UnheardWait.
	UnheardWitness Unheard `json:"unheard_witness,omitempty"`
}

// Quota is the most serials that one host is granted in 24 hours, and whether there is a limit; 0 where there is none.
func (p Policy) Quota() (n uint64, limited bool) {
	switch p.HostQuota {
	case 0:
		return DefaultHostQuota, true
	case NoHostQuota:
		return 0, false
	}
	return p.HostQuota, true
}

const (
	// NoHostQuota is no limit.
	NoHostQuota = math.MaxUint64
	// DefaultHostQuota lets one host that runs wild burn a generation in 2^24 days.
	DefaultHostQuota = 1 << 24
	// MinHostQuota is the largest range that can be asked for at once.
	MinHostQuota = MaxAllocate
)

// DefaultPolicy is what a new pool has.
func DefaultPolicy() Policy {
	return Policy{Live: PolicyClone, Over: PolicyResume, Unknown: PolicyAdopt, UnheardWitness: UnheardNewGeneration, HostQuota: DefaultHostQuota}
}

// Validate checks that each field has one of its values.
func (p Policy) Validate() error {
	switch {
	case p.Live != PolicyClone && p.Live != PolicyRefuse:
		return invalid("policy live", fmt.Sprintf("%.40q is not clone or refuse", p.Live))
	case p.Over != PolicyResume && p.Over != PolicyClone && p.Over != PolicyRefuse:
		return invalid("policy over", fmt.Sprintf("%.40q is not resume, clone or refuse", p.Over))
	case p.Unknown != PolicyAdopt && p.Unknown != PolicyRefuse:
		return invalid("policy unknown", fmt.Sprintf("%.40q is not adopt or refuse", p.Unknown))
	case p.HostQuota != 0 && p.HostQuota < MinHostQuota:
		return invalid("policy host-quota", fmt.Sprintf("%d is less than %d, what a host can ask for at once", p.HostQuota, MinHostQuota))
	case p.UnheardWitness != "" && p.UnheardWitness != UnheardNewGeneration && p.UnheardWitness != UnheardWait:
		return invalid("policy unheard-witness", fmt.Sprintf("%.40q is not new-generation or wait", p.UnheardWitness))
	}
	return nil
}

// Counter is the pool's cursor: the next counter of the current generation that nobody holds.
type Counter struct {
	Generation Generation `json:"generation"`
	Next       uint64     `json:"next"` // 1..MaxCounter+1
	// Nonce is drawn anew with every write: two transactions never write the same value.
	Nonce string `json:"-"`
	Extra []byte `json:"-"`
}

// check refuses what this version must not write to.
func (p *Pool) check() error {
	switch {
	case p.Format > FormatVersion:
		return &Error{Reason: ReasonFormat, Subject: "pool " + p.UUID,
			Msg: fmt.Sprintf("the store has format %d, this version writes %d", p.Format, FormatVersion),
			Fix: "run servers of the version that wrote it, or a newer one"}
	case p.Generation == 0 || p.Generation > MaxGeneration:
		return &Error{Reason: ReasonMalformed, Subject: "pool " + p.UUID, Msg: fmt.Sprintf("its record has generation %d", p.Generation),
			Fix: "restore the store from a snapshot; nothing is issued from this one"}
	case p.State != PoolOpen:
		return &Error{Reason: ReasonRecovering, Subject: "pool " + p.UUID,
			Msg: "the store may have lost history, nothing is issued until the generation was raised",
			Fix: "the servers raise it when all of them were heard, and nsalloc pool status says what they wait for; a newer snapshot of the store loses nothing, and nsalloc pool recover waits for nobody", RetryAfter: retrySoon}
	}
	return nil
}
