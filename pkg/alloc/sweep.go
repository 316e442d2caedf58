package alloc

import (
	"context"
	"time"
)

const (
	// sweepAge is how old a request record gets before it is deleted: longer than any server looks
	// for it.
	sweepAge = 2 * RequestLife
	// sweptID is the id of the record that says how far the sweep got: its At is the time of the
	// youngest request that was ever deleted. Its own time is 1970, so that it stands first and nobody
	// can ask under it.
	sweptID = "00000000-0000-7000-8000-000000000000"
)

// swept reports whether the record of a request may have been deleted. Clocks decide when records are
// deleted; this record decides what their absence means. Without it a server whose clock stepped
// forward would delete young records, and a retry at another server would issue a second time.
func swept(e Entry, id string) bool {
	youngest, ok := e.Record.(*Request)
	if !ok {
		return false
	}
	at, err := requestTime(id)
	return err != nil || !at.After(youngest.At)
}

// SweepRequests deletes request records that are too old to be asked for, at most limit (1 to 100) of
// them, oldest first. It returns how many. Their ids say how old they are: also one that cannot be read
// is deleted in its time.
func (s *Service) SweepRequests(ctx context.Context, limit int) (int, error) {
	limit = min(max(limit, 1), 100)
	mark := Key{Kind: KindRequest, ID: sweptID}
	marks, _, err := s.get(ctx, mark)
	if err != nil {
		return 0, err
	}
	entries, _, err := s.store.List(ctx, KindRequest, sweptID, limit, 0)
	if err != nil {
		return 0, err
	}
	tx := Tx{Guards: []Guard{{Key: mark, Token: marks[0].Token}}}
	var youngest time.Time
	oldest := s.now().Add(-sweepAge)
	for _, e := range entries {
		if at, err := requestTime(e.Key.ID); err == nil && at.Before(oldest) {
			tx.Delete = append(tx.Delete, e.Key)
			youngest = at
		}
	}
	if len(tx.Delete) == 0 {
		return 0, nil
	}
	if before, ok := marks[0].Record.(*Request); !ok || youngest.After(before.At) {
		tx.Put = []Record{&Request{ID: sweptID, At: youngest}}
	}
	if _, err := s.store.Commit(ctx, tx); err != nil {
		return 0, err
	}
	return len(tx.Delete), nil
}
