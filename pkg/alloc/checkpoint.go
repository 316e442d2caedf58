package alloc

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"time"
)

// CheckpointState says what may be done with the images of one dump.
type CheckpointState string

// The states of a checkpoint.
const (
	// CheckpointOpen: recorded by a dump whose end is not known yet, or that handed its sandbox off; the
	// images carry the sandbox on.
	CheckpointOpen CheckpointState = "open"
	// CheckpointCopy: the dump was answered 0 and the source ran on, or may have: the images are a second
	// beginning, not the continuation.
	CheckpointCopy CheckpointState = "copy"
	// CheckpointVoid: the dump was vetoed, so nobody may restore these images as this sandbox.
	CheckpointVoid CheckpointState = "void"
	// CheckpointConsumed: a restore took the sandbox over from these images.
	CheckpointConsumed CheckpointState = "consumed"
)

// Digest is the SHA-256 of a manifest's exact bytes.
type Digest [sha256.Size]byte

// String is the digest in lower-case hex.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// MarshalText writes the digest in lower-case hex.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads a digest in hex.
func (d *Digest) UnmarshalText(text []byte) error {
	b, err := hex.DecodeString(string(text))
	if err != nil || len(b) != len(d) {
		return invalid("digest", fmt.Sprintf("%.80q is not %d hex digits", text, 2*len(d)))
	}
	copy(d[:], b)
	return nil
}

// Checkpoint is the record of one dump's images.
type Checkpoint struct {
	Serial  Serial          `json:"serial"`
	State   CheckpointState `json:"state"`
	Sandbox Serial          `json:"sandbox"`
	// Epoch is the sandbox's epoch when it was dumped.
	Epoch Epoch `json:"epoch"`
	// Source is the host that dumped.
	Source string `json:"source"`
	// RunID is CRIU's dump_criu_run_id, a UUID for each dump; empty from CRIU before 4.1.
	RunID string `json:"run_id,omitempty"`
	// Digest is of the manifest that stands in the images.
	Digest Digest `json:"digest"`
	// Claimant is who claims or has consumed it; nil before.
	Claimant *Claimant `json:"claimant,omitempty"`
	// Created and Consumed are of the server's clock.
	Created  time.Time `json:"created"`
	Consumed time.Time `json:"consumed,omitzero"`
	// Extra holds what a newer version stored in this record; see Pool.Extra.
	Extra []byte `json:"-"`
}
