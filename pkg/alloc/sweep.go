package alloc

import (
	"context"
	"fmt"
	"time"
)

const (
	// sweepAge is how old a request record gets before it is deleted: longer than any server looks
	// for it. A lane that was not written for as long is of a server that is gone.
	sweepAge = RequestLife + 2*time.Minute
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
	return through != "" && len(id) >= len(through) && id[:len(through)] <= through
}

// sweptThrough is how the ids begin of the youngest requests whose records may have been deleted: UUIDv7s
// sort by their time. It is "", which is before all ids, where none has been.
func sweptThrough(mark Entry) string {
	m, ok := mark.Record.(*Request)
	if !ok {
		return ""
	}
	return idsOf(m.At)
}

// idsOf is how the ids begin of requests of a millisecond.
func idsOf(at time.Time) string {
	ms := fmt.Sprintf("%012x", max(at.UnixMilli(), 0))
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
	to, err := s.sweepTo(ctx, entries, limit)
	if err != nil {
		return 0, err
	}
	tx := Tx{Guards: []Guard{{key, marks[0].Token}}}
	if to.After(mark.At) {
		moved := *mark
		moved.At = to
		mark = &moved
		tx.Put = []Record{mark}
	}
	n, through := 0, ""
	for _, e := range entries {
		if _, err := requestTime(e.Key.ID); err == nil && swept(Entry{Record: mark}, e.Key.ID) {
			n, through = n+1, e.Key.ID
		}
	}
	if n == 0 {
		return 0, nil
	}
	tx.DeleteSpans = []Span{{KindRequest, sweptID, through}}
	if _, err := s.store.Commit(ctx, tx); err != nil {
		return 0, err
	}
	return n, nil
}

// sweepTo is where the mark may stand: at the last of the oldest records that is too old. Where there are
// many it goes a step beyond the first, so that it does not move with each of them, if a record beyond that
// shows that time has come so far: requests up to the mark are refused, and this server's clock may be ahead.
func (s *Service) sweepTo(ctx context.Context, entries []Entry, limit int) (to time.Time, err error) {
	oldest := s.now().Add(-sweepAge)
	var first time.Time
	for _, e := range entries {
		at, err := requestTime(e.Key.ID)
		switch {
		case err != nil: // the key of no request
		case !at.Before(oldest):
			return to, nil
		default:
			to = at
			if first.IsZero() {
				first = at
			}
		}
	}
	step := first.Add(sweepStep)
	if first.IsZero() || len(entries) < limit || !step.After(to) || !step.Before(oldest) {
		return to, nil
	}
	beyond := false
	err = s.list(ctx, KindRequest, idsOf(step)+"~", 0, func(e Entry) bool { // ~ is after all that an id has
		_, err := requestTime(e.Key.ID)
		beyond = err == nil
		return !beyond
	})
	if beyond {
		to = step
	}
	return to, err
}

// SweepLanes deletes the records of lanes whose server is gone, at most 100 of them. It returns how many.
// A server that comes back after all finds its record gone and begins another: that costs the rest of a
// range.
func (s *Service) SweepLanes(ctx context.Context) (int, error) {
	var tx Tx
	err := s.list(ctx, KindLane, "", 0, func(e Entry) bool {
		if l, ok := e.Record.(*Lane); ok && l.At.Before(s.now().Add(-sweepAge)) {
			tx.Guards = append(tx.Guards, Guard{e.Key, e.Token})
			tx.Delete = append(tx.Delete, e.Key)
		}
		return len(tx.Delete) < 100
	})
	if err != nil || len(tx.Delete) == 0 {
		return 0, err
	}
	if _, err := s.store.Commit(ctx, tx); err != nil {
		return 0, err
	}
	return len(tx.Delete), nil
}
