package alloc

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
	other := "another run"
	if s.Claim != nil {
		other = "run " + s.Claim.Run
	}
	switch {
	case c.Sandbox != s.Serial:
		return "", "", &Error{Reason: ReasonMalformed, Subject: about, Msg: "its record is of sandbox " + c.Sandbox.String() + ", not of " + s.Serial.String(),
			Fix: "run nsalloc check"}
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
			Fix: "wait; if host " + c.Source + " is down, start it and its nsalloc-agent, which says what became of them; if it is lost for good, " +
				"start an nsalloc-agent under its name on another machine", RetryAfter: retrySoon}
	case current && s.State == StateClaimed:
		return "", "", &Error{Reason: ReasonClaimed, Subject: about,
			Msg: other + " on host " + s.Owner + " is restoring it",
			Fix: "wait for that restore to end", RetryAfter: retrySoon}
	case current && s.State == StateEnded && c.State == CheckpointCopy:
		return MayClone, "sandbox " + s.Serial.String() + " is over and the pool's policy clones copies", nil
	case p.Live == PolicyRefuse:
		return "", "", refuse(ReasonRefused, about, "it is %s, sandbox %s is %s, and the pool's policy refuses a clone", c.State, s.Serial, s.State)
	default:
		return MayClone, "checkpoint " + c.Serial.String() + " is " + string(c.State) + " and its sandbox " + s.Serial.String() + " is " + string(s.State) + " on host " + s.Owner, nil
	}
}
