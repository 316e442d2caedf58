package alloc

import (
	"context"
	"time"
)

// Report is what one look over all records found.
type Report struct {
	// Revision is the store's, of all that was read.
	Revision Revision
	// How many there are of each, ended sandboxes and void checkpoints too; Namespaces counts bindings,
	// Aside what Mend has put aside.
	Sandboxes, Namespaces, Checkpoints, Hosts, Aside int
	// Findings is in the order in which they are to be mended, the first MaxFindings of Total.
	Findings []Finding
	Total    int
}

// MaxFindings is how many a Report names.
const MaxFindings = 1000

// readTries bounds how often all is read anew because the revision was compacted away meanwhile.
const readTries = 3

// Check reads every record of the pool at one revision and verifies the promises; see the function. It
// changes nothing. One at a time is under way in a process, because it holds all records of a pool.
//
// Errors: ErrPoolMissing, ErrUnavailable, ErrConflict when the store compacts revisions faster than they
// can be read.
func (s *Service) Check(ctx context.Context) (Report, error) {
	all, err := s.readAll(ctx)
	if err != nil {
		return Report{}, err
	}
	r := Report{Revision: all.revision, Sandboxes: len(all.Sandboxes), Checkpoints: len(all.Checkpoints), Hosts: len(all.Hosts), Aside: all.aside}
	for _, e := range all.Unreadable { // they are there, too
		switch e.Key.Kind {
		case KindSandbox:
			r.Sandboxes++
		case KindCheckpoint:
			r.Checkpoints++
		case KindHost:
			r.Hosts++
		}
	}
	for _, sb := range all.Sandboxes {
		r.Namespaces += len(sb.Bindings)
	}
	r.Findings = Check(all.Records)
	r.Total = len(r.Findings)
	r.Findings = r.Findings[:min(r.Total, MaxFindings)]
	return r, nil
}

// all is every record of a pool as of one revision.
type all struct {
	Records
	revision Revision
	now      time.Time
	aside    int
	begun    bool // the mend that this is read for has moved something before
}

func (s *Service) readAll(ctx context.Context) (all, error) {
	select {
	case s.checking <- struct{}{}:
		defer func() { <-s.checking }()
	case <-ctx.Done():
		return all{}, &Error{Reason: ReasonUnavailable, Msg: "the deadline passed while another check was under way", Fix: "try again, with a longer deadline",
			RetryAfter: retrySoon, Err: context.Cause(ctx)}
	}
	var r all
	var err error
	for range readTries {
		if r, err = s.readOnce(ctx); ReasonOf(err) != ReasonConflict {
			break
		}
	}
	return r, err
}

// readOnce reads pool and counter, which gives the revision, and pins all listings to it. So whatever
// one transaction wrote is seen whole or not at all, and a contradiction is never one of two moments.
func (s *Service) readOnce(ctx context.Context) (all, error) {
	var r all
	single, at, err := s.store.Get(ctx, Key{Kind: KindPool}, Key{Kind: KindCounter})
	if err != nil {
		return r, err
	}
	if single[0].Token == "" && single[0].Err == nil {
		_, err := poolOf(single[0])
		return r, err
	}
	r.revision, r.now = at, s.now()
	r.add(single[0])
	r.add(single[1])
	for _, kind := range Kinds() {
		err := s.list(ctx, kind, "", at, func(e Entry) bool {
			switch a, ok := e.Record.(*Aside); {
			case kind != KindAside:
				r.add(e)
			case !ok || a.Of != refusedMend:
				r.aside++
			}
			return true
		})
		if err != nil {
			return r, err
		}
	}
	return r, nil
}

// list calls each for the records of a kind after an id, as of a revision, until it returns false.
func (s *Service) list(ctx context.Context, kind Kind, after string, at Revision, each func(Entry) bool) error {
	const page = 1000
	for {
		entries, rev, err := s.store.List(ctx, kind, after, page, at)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if !each(e) {
				return nil
			}
		}
		if len(entries) < page {
			return nil
		}
		at, after = rev, entries[page-1].Key.ID
	}
}

// add takes an entry in.
func (r *all) add(e Entry) {
	if e.Err != nil {
		r.Unreadable = append(r.Unreadable, e)
		return
	}
	switch rec := e.Record.(type) {
	case *Pool:
		r.Pool = rec
	case *Counter:
		r.Counter = rec
	case *Lane:
		r.Lanes = append(r.Lanes, rec)
	case *Host:
		r.Hosts = append(r.Hosts, rec)
	case *Sandbox:
		r.Sandboxes = append(r.Sandboxes, rec)
	case *OldStint:
		r.OldStints = append(r.OldStints, rec)
	case *Checkpoint:
		r.Checkpoints = append(r.Checkpoints, rec)
	case *Request:
		r.Requests = append(r.Requests, rec)
	}
}
