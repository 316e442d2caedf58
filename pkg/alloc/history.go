package alloc

import (
	"context"
	"fmt"
	"strings"
)

// MaxHistory is the most stints that one History returns.
const MaxHistory = 1000

// History reads the stints of a sandbox whose epochs are greater than after, oldest first, at most limit
// (1 to MaxHistory), also those that have moved out of its record. Less than limit is the end. It is one
// state of the sandbox, of the revision that it returns: a stint that moves out meanwhile is neither
// missed nor seen twice.
//
// Errors: ErrInvalid, ErrSandboxNotFound, ErrConflict (the revision was compacted again and again),
// ErrUnavailable, and ErrMalformed or ErrFormat when the record or one of its stints cannot be read: a
// history with a hole in it is none.
func (s *Service) History(ctx context.Context, sandbox Serial, after Epoch, limit int) (stints []Stint, rev Revision, err error) {
	if limit < 1 || limit > MaxHistory {
		return nil, 0, invalid("limit", fmt.Sprintf("%d is not in 1..%d", limit, MaxHistory))
	}
	err = settle(ctx, func() (bool, error) {
		var entries []Entry
		if entries, rev, err = s.get(ctx, SandboxKey(sandbox)); err != nil {
			return false, err
		}
		sb, ok := entries[0].Record.(*Sandbox)
		if !ok {
			return true, refuse(ReasonSandboxNotFound, "sandbox "+sandbox.String(), "the pool has no such sandbox")
		}
		if stints, err = s.olderStints(ctx, sb, after, limit, rev); err != nil {
			return false, err
		}
		for _, st := range sb.Stints {
			if st.Epoch > after && len(stints) < limit {
				stints = append(stints, st)
			}
		}
		return true, nil
	})
	if err != nil {
		return nil, 0, err
	}
	return stints, rev, nil
}

// olderStints reads those that have moved out of sb's record, as of the revision that sb was read at.
func (s *Service) olderStints(ctx context.Context, sb *Sandbox, after Epoch, limit int, at Revision) ([]Stint, error) {
	if len(sb.Stints) > 0 && sb.Stints[0].Epoch <= after {
		return nil, nil // older ones have smaller epochs
	}
	from := (&OldStint{Sandbox: sb.Serial, Stint: Stint{Epoch: after}}).Key().ID
	entries, _, err := s.store.List(ctx, KindStint, from, limit, at)
	if err != nil {
		return nil, err
	}
	var stints []Stint
	for _, e := range entries {
		if !strings.HasPrefix(e.Key.ID, sb.Serial.String()+"/") {
			break // of the next sandbox
		}
		if e.Err != nil {
			return nil, e.Err
		}
		if o, ok := e.Record.(*OldStint); ok {
			stints = append(stints, o.Stint)
		}
	}
	return stints, nil
}
