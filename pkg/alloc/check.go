package alloc

import (
	"cmp"
	"fmt"
	"slices"
	"unicode/utf8"
)

// Records is what Check looks at: all of a pool's, as of one revision. Pool with Counter, Requests and
// OldStints may be left out; what they could show is not checked then.
type Records struct {
	Pool        *Pool
	Counter     *Counter
	Sandboxes   []*Sandbox
	Checkpoints []*Checkpoint
	Hosts       []*Host
	Lanes       []*Lane
	Requests    []*Request
	OldStints   []*OldStint
	// Unreadable are those that could not be understood; each Entry says why.
	Unreadable []Entry
}

// Finding is a promise that the records break.
type Finding struct {
	// Promise is the number of the promise, such as P1; RECORD for a record that cannot be read.
	Promise string `json:"promise"`
	// Subject is the object, kind first.
	Subject string `json:"subject"`
	// Evidence says what contradicts what.
	Evidence string `json:"evidence"`
	// Fix says what happened, as far as it can be told, and what mending costs.
	Fix string `json:"fix"`
	// Mend is the arguments of nsalloc that mend it; empty when no command can.
	Mend []string `json:"mend"`

	keys []Key // what can be mended for it: Mend's object first
}

// Check verifies what records alone can show: P1 (no serial twice), P3 (one owner at a time), P6 (a
// checkpoint consumed once at most) and P16 (a live namespace has one serial). It returns nothing for
// records that keep them, else what is to be mended in that order: the counter first and hosts next,
// because what they could issue again must not leave the records before (Service.Mend).
//
// Where two objects clash, either can be mended. Named is the one that costs less: a request before a
// checkpoint before a sandbox, and of two sandboxes the one that does not run; else the one of the lower
// epoch; else the younger serial.
//
// A checkpoint that is consumed and that no stint began from is no finding: P6 says at most once, and
// such images get fresh serials or a refusal.
func Check(r Records) []Finding {
	c := &checker{
		checkpoints: map[Serial]*Checkpoint{}, sandboxes: map[Serial]*Sandbox{}, stints: map[Serial][]row{},
		current: map[Serial][]*Sandbox{}, serials: map[Serial]holder{}, unreadable: map[Key]bool{},
	}
	for _, e := range r.Unreadable {
		c.unreadable[e.Key] = true
	}
	for _, cp := range r.Checkpoints {
		c.checkpoints[cp.Serial] = cp
	}
	for _, s := range r.Sandboxes {
		c.sandboxes[s.Serial] = s
		if s.Checkpoint != 0 {
			c.current[s.Checkpoint] = append(c.current[s.Checkpoint], s)
		}
	}
	c.records(r.Unreadable)
	c.histories(r)
	c.unique(r)
	c.ranges(r)
	c.counter(r)
	c.liveNamespaces(r.Pool, r.Sandboxes)
	for _, s := range r.Sandboxes {
		c.history(s)
		c.claim(s)
		c.currentCheckpoint(s)
	}
	c.consumed(r.Sandboxes)
	for _, cp := range r.Checkpoints {
		c.checkpoint(cp)
	}
	slices.SortStableFunc(c.findings, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.first(), b.first()), cmp.Compare(a.Promise, b.Promise), cmp.Compare(a.Subject, b.Subject), cmp.Compare(a.Evidence, b.Evidence))
	})
	return c.findings
}

// first is how early a finding is to be mended.
func (f Finding) first() int {
	if len(f.keys) > 0 {
		switch f.keys[0].Kind {
		case KindCounter:
			return 0
		case KindHost, KindLane:
			return 1
		}
	}
	return 2
}

type checker struct {
	findings    []Finding
	serials     map[Serial]holder // serial -> who has it
	checkpoints map[Serial]*Checkpoint
	sandboxes   map[Serial]*Sandbox
	stints      map[Serial][]row // sandbox -> its history, as far as it is known
	current     map[Serial][]*Sandbox
	unreadable  map[Key]bool
}

// row is a stint. old is its own record's key, the zero Key for one in its sandbox's record.
type row struct {
	Stint
	old Key
}

// What happened, as far as it can be told.
const (
	fromOutside = "no sequence of requests leads here: the store was changed from outside, or put back to an older snapshot"
	partLost    = "no sequence of requests leads here: a record was lost or changed from outside"
)

// remedy is what can be mended for a finding, the choice first, and what led to it.
type remedy struct {
	why  string
	keys []Key
}

func by(why string, keys ...Key) remedy { return remedy{why, keys} }

func (c *checker) find(promise, about string, r remedy, format string, args ...any) {
	f := Finding{Promise: promise, Subject: about, Evidence: fmt.Sprintf(format, args...), Fix: r.why}
	f.keys = slices.Compact(r.keys)
	if len(f.keys) > 0 {
		f.Mend = mendArgs(f.keys[0])
		f.Fix += ". Mending: " + c.cost(f.keys[0])
	}
	if len(f.keys) > 1 {
		f.Fix += ". Instead of that one: nsalloc " + CommandLine(mendArgs(f.keys[1]))
	}
	c.findings = append(c.findings, f)
}

// cost is what mending an object costs, as it stands.
func (c *checker) cost(k Key) string {
	if k.Kind == KindSandbox {
		return MendCostOf(c.sandboxOf(k).State)
	}
	return MendCost(k.Kind)
}

// records names what could not be read.
func (c *checker) records(entries []Entry) {
	for _, e := range entries {
		r := by("something else wrote to the store, or its disk is bad", e.Key)
		switch {
		case ReasonOf(e.Err) == ReasonFormat:
			r = by("a newer version wrote it: run servers of that version, or a newer one")
		case e.Key.Kind == KindPool:
			r = by("something else wrote to the store, or its disk is bad: restore this key from a snapshot of the store; until then nothing is issued")
		case e.Token == "", !utf8.ValidString(e.Key.ID), len(e.Key.ID) > maxMendID:
			// Its value cannot be compared, or no request can name it.
			r = by("something else wrote to the store: delete this key with etcdctl")
		case len(e.Token) > maxAside:
			r = by(fmt.Sprintf("something else wrote to the store: it is %d bytes, and over %d cannot be moved aside. See that the counter is right (no finding about it), get the key with etcdctl into a file, and delete it", len(e.Token), maxAside))
		case e.Key.Kind == KindCheckpoint:
			if serial, err := ParseSerial(e.Key.ID, 0); err == nil {
				r.keys = []Key{c.checkpointKey(serial)}
			}
		}
		c.find("RECORD", nameOf(e.Key), r, "%v", e.Err)
	}
}

// nameOf is a record's key as people read it: kind first.
func nameOf(k Key) string {
	if k.ID == "" {
		return string(k.Kind)
	}
	return string(k.Kind) + " " + k.ID
}

// histories puts the stints that have moved out of their sandboxes' records in front of the others.
func (c *checker) histories(r Records) {
	lost := map[Serial]int{}
	for _, o := range r.OldStints {
		if c.sandboxes[o.Sandbox] == nil {
			lost[o.Sandbox]++
			continue
		}
		c.stints[o.Sandbox] = append(c.stints[o.Sandbox], row{o.Stint, o.Key()})
	}
	for serial, n := range lost {
		if !c.unreadable[SandboxKey(serial)] {
			c.find("P3", "sandbox "+serial.String(), by("its record was lost, or a mend of it was cut off", SandboxKey(serial)),
				"it does not exist, and %d old stints of it do", n)
		}
	}
	for _, rows := range c.stints {
		slices.SortFunc(rows, func(a, b row) int { return cmp.Compare(a.Epoch, b.Epoch) })
	}
	for _, s := range r.Sandboxes {
		for _, st := range s.Stints {
			c.stints[s.Serial] = append(c.stints[s.Serial], row{Stint: st})
		}
	}
}

func (s *Sandbox) owned() bool {
	return s.State == StateRunning || s.State == StateDumped || s.State == StateClaimed
}

// handedOff reports whether the sandbox is between two runs: it cannot go on without its checkpoint.
func (s *Sandbox) handedOff() bool {
	return s.State == StateDumped || s.State == StateInTransit || s.State == StateClaimed
}

// rowOrAll is what to mend for a stint: its own record, else the sandbox that it stands in.
func rowOrAll(s *Sandbox, r row) remedy {
	if r.old.Kind != "" {
		return by(fromOutside, r.old)
	}
	return by(fromOutside, s.Key())
}

// history proves P3: epochs rise, stints do not overlap, and the open one is the owner's.
func (c *checker) history(s *Sandbox) {
	rows := c.stints[s.Serial]
	for i, st := range rows {
		if i > 0 {
			before := rows[i-1]
			if before.Epoch >= st.Epoch {
				c.find("P3", subject(s), rowOrAll(s, before), "epoch %s on host %s follows epoch %s on host %s", st.Epoch, st.Host, before.Epoch, before.Host)
			}
			if before.To.IsZero() {
				c.find("P3", subject(s), rowOrAll(s, before), "the stint on host %s never ended and one on host %s followed", before.Host, st.Host)
			}
		}
		if st.Epoch > s.Epoch {
			c.find("P3", subject(s), rowOrAll(s, st), "a stint of epoch %s is in a sandbox of epoch %s", st.Epoch, s.Epoch)
		}
		switch over := st.Over != ""; {
		case over && st.To.IsZero():
			c.find("P3", subject(s), rowOrAll(s, st), "the stint of epoch %s on host %s is over (%q) and has no end", st.Epoch, st.Host, st.Over)
		case !over && !st.To.IsZero():
			c.find("P3", subject(s), rowOrAll(s, st), "the stint of epoch %s on host %s has an end and nothing that it was over by", st.Epoch, st.Host)
		}
	}
	all := by(fromOutside, s.Key())
	last := s.Stint()
	switch {
	case last == nil:
		c.find("P3", subject(s), all, "it has no history")
	case last.Host != s.Owner:
		c.find("P3", subject(s), all, "it is host %s's, its last stint host %s's", s.Owner, last.Host)
	case s.owned() && (!last.To.IsZero() || last.Epoch != s.Epoch):
		c.find("P3", subject(s), all, "it is %s on host %s in epoch %s, its last stint there is of epoch %s and over: %q", s.State, s.Owner, s.Epoch, last.Epoch, last.Over)
	case !s.owned() && last.To.IsZero():
		c.find("P3", subject(s), all, "it is %s, its last stint on host %s is still open", s.State, last.Host)
	}
}

// claim proves that who claims a sandbox is its owner, and nobody else.
func (c *checker) claim(s *Sandbox) {
	all := by(fromOutside, s.Key())
	switch {
	case s.Claim == nil && s.State == StateClaimed:
		c.find("P3", subject(s), all, "it is claimed by nobody")
	case s.Claim == nil:
	case s.State != StateClaimed && s.State != StateRunning:
		c.find("P3", subject(s), all, "it is %s and claimed by run %s on host %s", s.State, s.Claim.Run, s.Claim.Host)
	case s.Claim.Host != s.Owner:
		c.find("P3", subject(s), all, "host %s owns it, host %s claims it", s.Owner, s.Claim.Host)
	}
}

// checkpointKey is what to mend for a checkpoint: the checkpoint, or the sandbox that is handed off
// through it and would be stuck without.
func (c *checker) checkpointKey(cp Serial) Key {
	for _, s := range c.current[cp] {
		if s.handedOff() {
			return s.Key()
		}
	}
	return CheckpointKey(cp)
}

// currentCheckpoint proves that a sandbox and its current checkpoint agree.
func (c *checker) currentCheckpoint(s *Sandbox) {
	if s.Checkpoint == 0 {
		if s.handedOff() || s.Claim != nil {
			c.find("P3", subject(s), by(fromOutside, s.Key()), "it is %s without a checkpoint", s.State)
		}
		return
	}
	images := c.checkpointKey(s.Checkpoint)
	cp := c.checkpoints[s.Checkpoint]
	if cp == nil {
		if !c.unreadable[CheckpointKey(s.Checkpoint)] {
			c.find("P6", subject(s), by(partLost, images), "its checkpoint %s does not exist", s.Checkpoint)
		}
		return
	}
	if cp.Sandbox != s.Serial {
		c.find("P6", subject(s), by(fromOutside, s.Key()), "its checkpoint %s is of sandbox %s", cp.Serial, cp.Sandbox)
	}
	if cp.Epoch > s.Epoch {
		c.find("P3", subject(s), by(fromOutside, images), "its checkpoint is of epoch %s, it is in epoch %s", cp.Epoch, s.Epoch)
	}
	var fits bool
	switch s.State {
	case StateDumped, StateInTransit:
		fits = cp.State == CheckpointOpen
	case StateClaimed:
		fits = cp.State == CheckpointOpen || cp.State == CheckpointCopy
		if s.Claim != nil && s.Claim.From != "" { // it does not cross the wire
			fits = fits && (s.Claim.From == StateEnded) == (cp.State == CheckpointCopy)
		}
	case StateRunning:
		fits = cp.State != CheckpointOpen && (s.Claim == nil || cp.State == CheckpointConsumed)
	default:
		fits = cp.State != CheckpointOpen
	}
	if !fits {
		c.find("P6", subject(s), by(fromOutside, images), "it is %s and its checkpoint %s is %s", s.State, cp.Serial, cp.State)
	}
}

// checkpoint proves that one that can still be claimed is its sandbox's current one.
func (c *checker) checkpoint(cp *Checkpoint) {
	about := "checkpoint " + cp.Serial.String()
	s := c.sandboxes[cp.Sandbox]
	switch {
	case s == nil && c.unreadable[SandboxKey(cp.Sandbox)]:
	case s == nil:
		c.find("P6", about, by(partLost, c.checkpointKey(cp.Serial)), "its sandbox %s does not exist", cp.Sandbox)
	case cp.State == CheckpointOpen && s.Checkpoint != cp.Serial:
		c.find("P6", about, by(fromOutside, c.checkpointKey(cp.Serial)), "it is open, and the current checkpoint of %s is %s", subject(s), s.Checkpoint)
	}
}

// consumed proves P6: of the stints that began from one checkpoint, one at most ran.
func (c *checker) consumed(sandboxes []*Sandbox) {
	type ran struct {
		s  *Sandbox
		st row
	}
	from := map[Serial]ran{}
	for _, s := range sandboxes {
		for _, st := range c.stints[s.Serial] {
			if st.Began != BeganClaimed || st.Over == OverReleased || st.Over == OverClaimFenced || st.To.IsZero() && s.State == StateClaimed {
				continue
			}
			about := "checkpoint " + st.Checkpoint.String()
			cp := c.checkpoints[st.Checkpoint]
			if cp != nil && cp.State != CheckpointConsumed {
				c.find("P6", about, by(fromOutside, c.checkpointKey(cp.Serial)), "%s ran from it on host %s, and it is %s", subject(s), st.Host, cp.State)
			}
			if other, ok := from[st.Checkpoint]; ok {
				keys := append(rowOrAll(other.s, other.st).keys, rowOrAll(s, st).keys...)
				c.find("P6", about, c.either(fromOutside, keys...), "sandboxes %s and %s both ran from it", other.s.Serial, s.Serial)
			}
			from[st.Checkpoint] = ran{s, st}
		}
	}
}

// either is a remedy for a clash: the keys by what they cost, the least first.
func (c *checker) either(why string, keys ...Key) remedy {
	slices.SortFunc(keys, func(a, b Key) int {
		x, y := c.sandboxOf(a), c.sandboxOf(b)
		return cmp.Or(
			cmp.Compare(c.rank(a), c.rank(b)),
			cmp.Compare(x.Epoch, y.Epoch),
			cmp.Compare(b.ID, a.ID), // ids sort by age
		)
	})
	return by(why, keys...)
}

// sandboxOf is the sandbox under a key, an empty one where there is none.
func (c *checker) sandboxOf(k Key) *Sandbox {
	if serial, err := ParseSerial(k.ID, 0); k.Kind == KindSandbox && err == nil && c.sandboxes[serial] != nil {
		return c.sandboxes[serial]
	}
	return &Sandbox{}
}

// rank is what it costs to mend an object, from nearly nothing on.
func (c *checker) rank(k Key) int {
	switch k.Kind {
	case KindStint:
		return 0
	case KindRequest:
		return 1
	case KindCheckpoint:
		return 2
	case KindSandbox:
		if c.sandboxOf(k).State != StateRunning {
			return 3
		}
		return 4
	case KindLane:
		return 5
	}
	return 6
}
