package alloc_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// admission is what handoff.pml's pre-restore does with (checkpoint, sandbox), in its words. It is
// also asked about pairs that no history leads to: a damaged store must not be worse than a refusal
// or a clone.
func admission(images alloc.CheckpointState, state alloc.SandboxState, cur, mine bool, p alloc.Policy) (alloc.Outcome, *alloc.Error) {
	over := cur && state == alloc.StateEnded && images == alloc.CheckpointCopy
	bad := images == alloc.CheckpointVoid
	claimable := cur && state == alloc.StateInTransit && images == alloc.CheckpointOpen || over && p.Over == alloc.PolicyResume
	waits := cur && (state == alloc.StateDumped || state == alloc.StateClaimed)
	switch {
	case cur && mine && (state == alloc.StateClaimed || state == alloc.StateRunning):
		return alloc.MayClaim, nil
	case bad:
		return "", alloc.ErrVoid
	case claimable:
		return alloc.MayClaim, nil
	case waits && state == alloc.StateDumped:
		return "", alloc.ErrNotConfirmed
	case waits:
		return "", alloc.ErrClaimed
	case over && p.Over == alloc.PolicyRefuse, !over && p.Live == alloc.PolicyRefuse:
		return "", alloc.ErrRefused
	}
	return alloc.MayClone, nil
}

func TestAdmit(t *testing.T) {
	me, n := who("b", "1"), 0
	claims := map[string]*alloc.Claim{
		"nobody":       nil,
		"me":           {Claimant: me, From: alloc.StateInTransit},
		"my other run": {Claimant: who("b", "2"), From: alloc.StateInTransit},
		"other host":   {Claimant: who("c", "1"), From: alloc.StateInTransit},
	}
	for _, images := range []alloc.CheckpointState{alloc.CheckpointOpen, alloc.CheckpointCopy, alloc.CheckpointVoid, alloc.CheckpointConsumed} {
		for _, state := range []alloc.SandboxState{alloc.StateRunning, alloc.StateDumped, alloc.StateInTransit, alloc.StateClaimed, alloc.StateEnded} {
			for _, cur := range []bool{true, false} {
				for _, live := range []alloc.Action{alloc.PolicyClone, alloc.PolicyRefuse} {
					for _, over := range []alloc.Action{alloc.PolicyResume, alloc.PolicyClone, alloc.PolicyRefuse} {
						for holder, claim := range claims {
							n++
							s := running("b")
							s.State, s.Claim, s.Checkpoint = state, claim, serial(9)
							c := &alloc.Checkpoint{Serial: serial(9), State: images, Sandbox: s.Serial, Source: "a", Digest: alloc.Digest{1}}
							if !cur {
								s.Checkpoint = serial(10)
							}
							p := alloc.Policy{Live: live, Over: over, Unknown: alloc.PolicyAdopt}
							name := fmt.Sprintf("%s of a %s sandbox, current %v, claimed by %s, policy %s/%s", images, state, cur, holder, live, over)
							want, wantErr := admission(images, state, cur, holder == "me", p)
							got, why, err := alloc.Admit(c, &s, c.Digest, me, p)
							if got != want || (err == nil) != (wantErr == nil) || wantErr != nil && !errors.Is(err, wantErr) {
								t.Errorf("%s: %q, %v; want %q, %v", name, got, err, want, wantErr)
							}
							if (why != "") != (got == alloc.MayClone) {
								t.Errorf("%s: %q because %q", name, got, why)
							}
							var e *alloc.Error
							if errors.As(err, &e) && (e.RetryAfter > 0) != (e.Reason == alloc.ReasonNotConfirmed || e.Reason == alloc.ReasonClaimed) {
								t.Errorf("%s: %v says to wait %v", name, err, e.RetryAfter)
							}
							if _, _, err := alloc.Admit(c, &s, alloc.Digest{2}, me, p); !errors.Is(err, alloc.ErrManifest) {
								t.Errorf("%s: an altered manifest gives %v", name, err)
							}
						}
					}
				}
			}
		}
	}
	if n != 4*5*2*2*3*4 {
		t.Errorf("%d combinations", n)
	}
	s := running("a")
	if _, _, err := alloc.Admit(&alloc.Checkpoint{Serial: serial(9), Sandbox: serial(77)}, &s, alloc.Digest{}, me, alloc.DefaultPolicy()); !errors.Is(err, alloc.ErrMalformed) {
		t.Errorf("a checkpoint of another sandbox: %v", err)
	}
}
