package alloc

import (
	"context"
	"fmt"
	"time"
)

const (
	// sweepAge is how old a request record gets before it is deleted: longer than any server looks
	// for it. A lane that was not written for as long is of a server that is gone.
	sweepAge = 2 * RequestLife
	// sweepStep is how far the mark moves at once where much is to be deleted: each move makes lanes read again.
	sweepStep = time.Minute
	// sweptID is the id of the record that says how far the sweep got: its At is a time, and the records
	// of requests up to it may have been deleted. Its own time is 1970, so that it stands first and nobody
	// can ask under it.
	sweptID = "00000000-0000-7000-8000-000000000000"
)

// swept reports whether the record of a request may have been deleted. Clocks decide when records are
// deleted; the sweep's mark decides what their absence means. Without it a server whose clock stepped
// forward would delete young records, and a retry at another server would issue a second time.
func swept(mark Entry, id string) bool {
	through := sweptThrough(mark)
	return through != "" && id[:len(through)] <= through
}

// sweptThrough is how the ids begin of the youngest requests whose records may have been deleted: UUIDv7s
// sort by their time. It is "", which is before all ids, where none has been.
func sweptThrough(mark Entry) string {
	m, ok := mark.Record.(*Request)
	if !ok {
		return ""
	}
	ms := fmt.Sprintf("%012x", max(m.At.UnixMilli(), 0))
	return ms[:8] + "-" + ms[8:]
}

// SweepRequests deletes the records of requests that are too old to be asked for, at most limit (1 to
// 1000) of them, oldest first. It returns how many. Their ids say how old they are: also one that cannot be
// read is deleted in its time.
func (s *Service) SweepRequests(ctx context.Context, limit int) (int, error) {
	limit = min(max(limit, 1), 1000)
	key := Key{Kind: KindRequest, ID: sweptID}
	marks, _, err := s.get(ctx, key)
	if err != nil {
		return 0, err
	}
	entries, _, err := s.store.List(ctx, KindRequest, sweptID, limit, 0)
	if err != nil {
		return 0, err
	}
	mark := &Request{ID: sweptID}
	if m, ok := marks[0].Record.(*Request); ok {
		mark = m
	}
	tx := Tx{Guards: []Guard{{key, marks[0].Token}}}
	if to := s.sweepTo(entries, limit); to.After(mark.At) {
		moved := *mark
		moved.At = to
		mark = &moved
		tx.Put = []Record{mark}
	}
	n := 0
	for n < len(entries) && swept(Entry{Record: mark}, entries[n].Key.ID) {
		n++
	}
	if n == 0 {
		return 0, nil
	}
	tx.DeleteSpans = []Span{{KindRequest, sweptID, entries[n-1].Key.ID}}
	if _, err := s.store.Commit(ctx, tx); err != nil {
		return 0, err
	}
	return n, nil
}

// sweepTo is where the mark may stand: at the last of the oldest records that is too old. Where there are
// many it goes a step beyond the first, so that it does not move with each of them; no further, because
// this server's clock may be far ahead, and requests up to the mark are refused.
func (s *Service) sweepTo(entries []Entry, limit int) time.Time {
	var to time.Time
	oldest := s.now().Add(-sweepAge)
	for _, e := range entries {
		at, err := requestTime(e.Key.ID)
		if err != nil || !at.Before(oldest) {
			return to
		}
		to = at
	}
	if len(entries) == limit {
		first, _ := requestTime(entries[0].Key.ID)
		if step := first.Add(sweepStep); step.After(to) && step.Before(oldest) {
			to = step
		}
	}
	return to
}

// SweepLanes deletes the records of lanes whose server is gone, at most 100 of them. It returns how many.
// A server that comes back after all finds its record gone and begins another: that costs the rest of a
// range.
func (s *Service) SweepLanes(ctx context.Context) (int, error) {
	entries, _, err := s.store.List(ctx, KindLane, "", 100, 0)
	if err != nil {
		return 0, err
	}
	var tx Tx
	for _, e := range entries {
		if l, ok := e.Record.(*Lane); ok && l.At.Before(s.now().Add(-sweepAge)) {
			tx.Guards = append(tx.Guards, Guard{e.Key, e.Token})
			tx.Delete = append(tx.Delete, e.Key)
		}
	}
	if len(tx.Delete) == 0 {
		return 0, nil
	}
	if _, err := s.store.Commit(ctx, tx); err != nil {
		return 0, err
	}
	return len(tx.Delete), nil
}
