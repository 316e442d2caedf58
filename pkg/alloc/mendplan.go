package alloc

import (
	"fmt"
	"slices"
	"strings"
)

// What each kind of mend does, decided from all records at one revision.

// mend is the moves that cmd asks for. When the same request has moved something before, there
// may be nothing left to do.
func (r all) mend(cmd MendCommand) ([]move, error) {
	if r.Pool == nil {
		return nil, r.why(Key{Kind: KindPool}).Err
	}
	switch {
	case r.Pool.Format > FormatVersion, r.Pool.State != PoolOpen && cmd.Kind != KindCounter:
		return nil, r.Pool.check()
	case r.begun && cmd.Kind != KindSandbox && cmd.Kind != KindCheckpoint:
		return nil, nil // one transaction, and it has been committed
	}
	key := cmd.key()
	e := r.why(key)
	switch {
	case e.Err != nil && e.Token == "":
		return nil, e.Err // its value cannot be compared
	case ReasonOf(e.Err) == ReasonFormat && !cmd.Force:
		return nil, e.Err
	}
	moves, serials, err := r.moves(cmd)
	switch {
	case err != nil:
		return nil, err
	case len(moves) == 0 && r.begun:
		return nil, nil
	case len(moves) == 0:
		return nil, refuse(ReasonRecordNotFound, nameOf(key), "the pool has no such record")
	}
	if !r.begun && !cmd.Force && r.Pool.State == PoolOpen && !slices.ContainsFunc(Check(r.Records), func(f Finding) bool { return slices.Contains(f.keys, key) }) {
		return nil, &Error{Reason: ReasonNothingToMend, Subject: nameOf(key), Msg: "nsalloc check finds nothing that mending it would help" + r.unchanged(),
			Fix: "see what nsalloc check says; --force mends it all the same"}
	}
	if err := r.keepIssued(key, serials); err != nil {
		return nil, err
	}
	if e.Err != nil && !cmd.Force && (key.Kind == KindSandbox || key.Kind == KindHost) && r.counterWrong() {
		return nil, &Error{Reason: ReasonMendFirst, Subject: nameOf(key), Msg: "the counter is wrong, and which serials the record had cannot be read: the pool may issue them again" + r.unchanged(),
			Fix: "first: nsalloc " + CommandLine(mendArgs(Key{Kind: KindCounter}))}
	}
	return moves, nil
}

// unchanged is how a refusal to mend says what was done.
func (r all) unchanged() string {
	if r.begun {
		return "; nothing more was changed"
	}
	return "; nothing was changed"
}

// writable reports whether this version may write to the pool now.
func (r all) writable() bool { return r.Pool != nil && r.Pool.check() == nil }

// counterWrong reports whether Check finds anything that mending the counter helps.
func (r all) counterWrong() bool {
	return slices.ContainsFunc(Check(r.Records), func(f Finding) bool { return len(f.keys) > 0 && f.keys[0].Kind == KindCounter })
}

// why is the entry of a record that cannot be read; an empty one for all others.
func (r all) why(k Key) Entry {
	for _, e := range r.Unreadable {
		if e.Key == k {
			return e
		}
	}
	return Entry{}
}

// keepIssued refuses to let serials leave the records that could be issued again: nothing would show it
// any more.
func (r all) keepIssued(key Key, serials Ranges) error {
	first := func(k Key, msg string) error {
		return &Error{Reason: ReasonMendFirst, Subject: nameOf(key), Msg: msg + ", and nothing would show that any more" + r.unchanged(),
			Fix: "first: nsalloc " + CommandLine(mendArgs(k))}
	}
	if len(serials) > 0 && r.Counter == nil {
		return first(Key{Kind: KindCounter}, "nobody knows which of its serials the pool will issue again")
	}
	for _, x := range serials {
		if s := x.Last(); again(r.Records, s) && !far(s, r.Pool.Generation) {
			return first(Key{Kind: KindCounter}, fmt.Sprintf("the pool will issue serial %s of it again", s))
		}
		if holds(key) {
			continue // the others hold theirs by right, or are found themselves
		}
		for _, l := range r.Lanes {
			for _, held := range issuable(r.Records, l) {
				if held.Valid() && x.First <= held.Last() && held.First <= x.Last() {
					return first(l.Key(), fmt.Sprintf("lane %s may issue serial %s of it", l.ID, max(x.First, held.First)))
				}
			}
		}
		for _, h := range r.Hosts {
			for _, held := range spendable(r.Records, h) {
				if held.Valid() && x.First <= held.Last() && held.First <= x.Last() {
					return first(h.Key(), fmt.Sprintf("host %s may spend serial %s of it", h.Name, max(x.First, held.First)))
				}
			}
		}
	}
	return nil
}

// moves is what mending an object does, and the serials that leave the records by it.
func (r all) moves(cmd MendCommand) ([]move, Ranges, error) {
	switch cmd.Kind {
	case KindCounter:
		return r.nextGeneration()
	case KindHost:
		return r.burn(cmd.ID)
	case KindSandbox:
		return r.sandbox(cmd.ID)
	case KindCheckpoint:
		return r.checkpoint(cmd.ID)
	case KindLane:
		for _, l := range r.Lanes {
			if l.Key() == cmd.key() {
				return []move{{key: cmd.key()}}, nil, nil
			}
		}
		return r.broken(cmd.key()), nil, nil
	case KindStint:
		for _, o := range r.OldStints {
			if o.Key() == cmd.key() {
				return []move{{key: cmd.key()}}, nil, nil
			}
		}
		return r.broken(cmd.key()), nil, nil
	default:
		return r.request(cmd.ID)
	}
}

// broken is the move of a record that cannot be read; none when it can, or is not there.
func (r all) broken(k Key) []move {
	if r.why(k).Err == nil {
		return nil
	}
	return []move{{key: k}}
}

// named is the serial that the key of a record that cannot be read still shows to be in use; none for
// all others.
func (r all) named(k Key) Ranges {
	if r.why(k).Err == nil {
		return nil
	}
	return one(serialIn(k))
}

// one is a range of one serial; none of what cannot be a serial.
func one(s Serial) Ranges {
	if !s.Valid() {
		return nil
	}
	return Ranges{{First: s, Count: 1}}
}

// sandbox takes a sandbox away with all that is of it. It comes first: without it the others are found.
func (r all) sandbox(id string) (moves []move, serials Ranges, err error) {
	var found *Sandbox
	key := Key{KindSandbox, id}
	for _, s := range r.Sandboxes {
		if s.Key() == key {
			found = s
			moves = append(moves, move{key: key})
			serials = append(serials, one(s.Serial)...)
			for _, b := range s.Bindings {
				serials = append(serials, one(b.Serial)...)
			}
		}
	}
	moves = append(moves, r.broken(key)...)
	serials = append(serials, r.named(key)...)
	for _, c := range r.Checkpoints {
		if SandboxKey(c.Sandbox) == key || found != nil && c.Serial == found.Checkpoint && r.orphan(c) {
			moves = append(moves, move{key: c.Key()})
			serials = append(serials, one(c.Serial)...)
		}
	}
	if found != nil {
		moves = append(moves, r.broken(CheckpointKey(found.Checkpoint))...)
		serials = append(serials, r.named(CheckpointKey(found.Checkpoint))...)
	}
	for _, o := range r.OldStints {
		if SandboxKey(o.Sandbox) == key {
			moves = append(moves, move{key: o.Key()})
		}
	}
	for _, e := range r.Unreadable {
		if e.Key.Kind == KindStint && strings.HasPrefix(e.Key.ID, id+"/") {
			moves = append(moves, move{key: e.Key})
		}
	}
	return moves, serials, nil
}

// orphan reports whether a checkpoint's sandbox does not exist.
func (r all) orphan(c *Checkpoint) bool {
	return r.why(SandboxKey(c.Sandbox)).Err == nil && !slices.ContainsFunc(r.Sandboxes, func(s *Sandbox) bool { return s.Serial == c.Sandbox })
}

// checkpoint takes a checkpoint away. A sandbox that runs or is over goes on without, and forgets it first: if
// no more than that happens, it is a checkpoint like those from before the current one. One that is handed off
// through it would be stuck.
func (r all) checkpoint(id string) (moves []move, serials Ranges, err error) {
	key := Key{KindCheckpoint, id}
	for _, s := range r.Sandboxes {
		switch {
		case s.Checkpoint == 0 || CheckpointKey(s.Checkpoint) != key:
		case s.handedOff():
			return nil, nil, &Error{Reason: ReasonMendFirst, Subject: nameOf(key), Msg: fmt.Sprintf("%s is %s through it and would be stuck without", subject(s), s.State) + r.unchanged(),
				Fix: "mend the sandbox, which takes its checkpoints along: nsalloc " + CommandLine(mendArgs(s.Key()))}
		default:
			moves = append(moves, move{key: s.Key(), with: func(now Entry, _ Revision) Record {
				sb := *now.Record.(*Sandbox)
				sb.Checkpoint, sb.Claim = 0, nil
				return &sb
			}})
		}
	}
	for _, c := range r.Checkpoints {
		if c.Key() == key {
			moves = append(moves, move{key: key})
			serials = append(serials, one(c.Serial)...)
		}
	}
	return append(moves, r.broken(key)...), append(serials, r.named(key)...), nil
}

// burn ends what a host may spend. Its life goes on, unless its record is lost: then it begins a new one.
// The incarnation of that is higher than any that this store remembers: each life was a commit of its own,
// and so the revision counts at least as many. A store that was put back counts fewer, and may repeat one of a
// life that it has forgotten, unless its generation was raised.
func (r all) burn(name string) ([]move, Ranges, error) {
	key := HostKey(name)
	if r.why(key).Err != nil {
		return []move{{key: key, with: func(_ Entry, at Revision) Record {
			return &Host{Name: name, Nonce: newNonce(), Incarnation: Incarnation(counted(r.Pool.Generation, uint64(at))), Settled: r.Pool.Settled}
		}}}, nil, nil
	}
	for _, h := range r.Hosts {
		if h.Name != name {
			continue
		}
		var serials Ranges
		for _, x := range spendable(r.Records, h) {
			if x.Valid() {
				serials = append(serials, x)
			}
		}
		return []move{{key: key, with: func(now Entry, _ Revision) Record {
			h := *now.Record.(*Host)
			h.Granted = nil
			h.Settled, h.Waived = min(h.Settled, r.Pool.Generation), min(h.Waived, r.Pool.Generation)
			return &h
		}}}, serials, nil
	}
	return nil, nil, nil
}

// request takes a request away. What it was answered stays issued; that nobody asks under it again, and
// is given others, is up to the mark of the sweep, which refuses whatever is as old.
func (r all) request(id string) ([]move, Ranges, error) {
	key := Key{KindRequest, id}
	mark := Key{KindRequest, sweptID}
	moves := r.broken(key)
	var serials Ranges
	for _, q := range r.Requests {
		if q.Key() == key {
			moves = append(moves, move{key: key})
			for _, x := range q.Ranges {
				if x.Valid() {
					serials = append(serials, x)
				}
			}
		}
	}
	if len(moves) == 0 {
		return nil, nil, nil
	}
	youngest := r.now
	if id != sweptID {
		var err error
		if youngest, err = requestTime(id); err != nil || youngest.After(r.now.Add(requestSkew)) {
			return moves, serials, nil // nobody can ask under it
		}
	} else {
		moves = nil // it is replaced itself
	}
	return append(moves, move{key: mark, whatever: true, with: func(now Entry, _ Revision) Record {
		q := Request{ID: sweptID}
		if before, ok := now.Record.(*Request); ok {
			q = *before
		}
		if youngest.After(q.At) {
			q.At = youngest
		}
		return &q
	}}), serials, nil
}

// nextGeneration is above every generation that a serial, or the pool, is of, so that nothing that the
// records name is issued again. Its counter begins at a random point, for what the records have forgotten.
func (r all) nextGeneration() ([]move, Ranges, error) {
	top := r.Pool.Generation
	see := func(s Serial) {
		if s.Valid() && !far(s, r.Pool.Generation) {
			top = max(top, s.Generation())
		}
	}
	if top > MaxGeneration {
		top = 0
	}
	if r.Pool.Target > 0 && r.Pool.Target <= MaxGeneration {
		top = max(top, r.Pool.Target-1)
	}
	if r.Counter != nil && r.Counter.Generation <= MaxGeneration-FewGenerations {
		top = max(top, r.Counter.Generation)
	}
	for at := range r.beenIn {
		if !at.far(r.Pool.Generation) {
			top = max(top, at.generation)
		}
	}
	for _, s := range r.Sandboxes {
		see(s.Serial)
		for _, b := range s.Bindings {
			see(b.Serial)
		}
	}
	for _, c := range r.Checkpoints {
		see(c.Serial)
	}
	for _, e := range r.Unreadable {
		see(serialIn(e.Key))
	}
	for _, h := range r.Hosts {
		for _, x := range h.Granted {
			see(x.First)
		}
	}
	for _, l := range r.Lanes {
		for _, x := range l.Left {
			see(x.First)
		}
	}
	for _, q := range r.Requests {
		for _, x := range q.Ranges {
			see(x.First)
		}
	}
	if top >= MaxGeneration {
		return nil, nil, &Error{Reason: ReasonExhausted, Subject: "pool " + r.Pool.UUID,
			Msg: fmt.Sprintf("it is in generation %d, its records name generation %d, and there is none after %d", r.Pool.Generation, top, MaxGeneration), Fix: noGeneration}
	}
	next, start := top+1, randomStart()
	return []move{
		{key: Key{Kind: KindPool}, with: func(now Entry, _ Revision) Record {
			return raised(now.Record.(*Pool), next)
		}},
		{key: Key{Kind: KindCounter}, whatever: true, with: func(now Entry, _ Revision) Record {
			return atStart(now, next, start)
		}},
	}, nil, nil
}
