package alloc

import (
	"cmp"
	"fmt"
	"slices"
)

// holder is who has a serial, and what to mend for it.
type holder struct {
	who string
	key Key
}

// unique proves P1 for serials in use.
func (c *checker) unique(r Records) {
	for _, cp := range r.Checkpoints {
		c.take(cp.Serial, holder{"checkpoint " + cp.Serial.String(), c.checkpointKey(cp.Serial)})
	}
	for _, s := range r.Sandboxes {
		c.take(s.Serial, holder{subject(s), s.Key()})
		for _, b := range s.Bindings {
			c.take(b.Serial, holder{fmt.Sprintf("the %s namespace in %s", b.Type, subject(s)), s.Key()})
		}
	}
	for _, e := range r.Unreadable {
		s, key := serialIn(e.Key), e.Key
		if key.Kind == KindCheckpoint {
			key = c.checkpointKey(s)
		}
		if s.Valid() {
			c.take(s, holder{nameOf(e.Key), key})
		}
	}
}

// take notes who has a serial.
func (c *checker) take(s Serial, h holder) {
	if !s.Valid() {
		c.find("P1", h.who, by(fromOutside, h.key), "serial %d can never have been issued", uint64(s))
		return
	}
	if other, ok := c.serials[s]; ok {
		c.find("P1", "serial "+s.String(), c.either(fromOutside, other.key, h.key), "it is of %s and of %s", other.who, h.who)
		return
	}
	c.serials[s] = h
}

// held is a range that somebody has and that is in no record of its own.
type held struct {
	Range
	about, who string
	key        Key
}

// spendable are the ranges that hosts may still spend, or all that they have where the generation is not
// known.
func spendable(r Records, h *Host) Ranges {
	if r.Pool == nil {
		return h.Granted
	}
	return h.in(r.Pool.Generation).Granted
}

// issuable are the ranges that a lane may still issue from, or all that it has where the generation is not
// known.
func issuable(r Records, l *Lane) Ranges {
	if r.Pool == nil {
		return l.Left
	}
	return l.Left.in(r.Pool.Generation)
}

// ranges proves that what hosts and lanes still hold, and what requests were answered, overlaps neither
// among them nor with what is in use. What a host could spend is the host's to give up, and what a lane could
// issue the lane's: the others have what was issued already.
func (c *checker) ranges(r Records) {
	var all []held
	add := func(rs Ranges, about, who string, key Key) {
		for _, x := range rs {
			switch {
			case !x.Valid():
				c.find("P1", about, by(fromOutside, key), "range of %d from %d on can never have been issued", x.Count, uint64(x.First))
			default:
				all = append(all, held{x, about, who, key})
			}
		}
	}
	for _, h := range r.Hosts {
		add(spendable(r, h), "host "+h.Name, "host "+h.Name+", which may still spend it", h.Key())
	}
	for _, l := range r.Lanes {
		add(issuable(r, l), "lane "+l.ID, "lane "+l.ID+", which may still issue it", l.Key())
	}
	for _, q := range r.Requests {
		add(q.Ranges, "request "+q.ID, "request "+q.ID, q.Key())
	}
	slices.SortFunc(all, func(a, b held) int {
		return cmp.Or(cmp.Compare(a.First, b.First), cmp.Compare(a.about, b.about))
	})
	clash := func(a, b Key) remedy {
		switch {
		case holds(a) && !holds(b):
			return by(fromOutside, a)
		case holds(b) && !holds(a):
			return by(fromOutside, b)
		}
		return c.either(fromOutside, a, b)
	}
	// furthest[i] is the one of the first i+1 that reaches furthest: it may reach over several that follow.
	furthest := make([]int, len(all))
	for i := 1; i < len(all); i++ {
		a, b := all[furthest[i-1]], all[i]
		if a.Last() >= b.First {
			c.find("P1", b.about, clash(a.key, b.key), "range %s is of %s, and range %s of %s", b.Range, b.who, a.Range, a.who)
		}
		if furthest[i] = furthest[i-1]; b.Last() > a.Last() {
			furthest[i] = i
		}
	}
	for s, h := range c.serials {
		after, _ := slices.BinarySearchFunc(all, s, func(h held, s Serial) int {
			if h.First <= s {
				return -1
			}
			return 1
		})
		if after == 0 {
			continue
		}
		if x := all[furthest[after-1]]; x.Contains(s) {
			c.find("P1", "serial "+s.String(), clash(h.key, x.key), "it is of %s, and in range %s of %s", h.who, x.Range, x.who)
		}
	}
}

// holds reports whether the record under a key has serials that nobody has got yet.
func holds(k Key) bool { return k.Kind == KindHost || k.Kind == KindLane }

// far reports whether a serial is of a generation that is not worth reaching.
func far(s Serial, pool Generation) bool {
	return s.Generation() > pool && s.Generation() > MaxGeneration-FewGenerations
}

// counter proves that everything in use or held lies before the pool's cursor: what lies behind it
// would be issued again.
func (c *checker) counter(r Records) {
	if r.Pool == nil {
		return
	}
	mend := by("the counter went back or a record was changed: the store was put back to an older snapshot, or changed from outside", Key{Kind: KindCounter})
	switch {
	case c.unreadable[Key{Kind: KindCounter}]:
		return
	case r.Counter == nil:
		c.find("P1", "counter", mend, "it does not exist: nobody knows what has been issued in generation %d", r.Pool.Generation)
		return
	case r.Pool.Generation == 0 || r.Pool.Generation > MaxGeneration:
		c.find("P1", "pool "+r.Pool.UUID, mend, "it is in generation %d, which cannot be", r.Pool.Generation)
	case r.Counter.Generation != r.Pool.Generation:
		c.find("P1", "counter", mend, "it is of generation %d, the pool is in generation %d", r.Counter.Generation, r.Pool.Generation)
	case r.Counter.Next == 0 || r.Counter.Next > MaxCounter+1:
		c.find("P1", "counter", mend, "it is at %x, which cannot be", r.Counter.Next)
	}
	// One finding for all that one command mends: after a counter went back they are many.
	behind, highest, whose := 0, Serial(0), ""
	last := func(s Serial, about, who string, key Key) {
		switch {
		case !again(r, s):
		case far(s, r.Pool.Generation):
			c.find("P1", about, by(fromOutside, key), "%s has serial %s, the pool is in generation %d", who, s, r.Pool.Generation)
		default:
			behind++
			if s > highest || s == highest && who < whose {
				highest, whose = s, who
			}
		}
	}
	defer func() {
		if behind > 0 {
			c.find("P1", "counter", mend, "it is at %x in generation %d, and the pool will issue again what %d holders have, up to serial %s of %s",
				r.Counter.Next, r.Pool.Generation, behind, highest, whose)
		}
	}()
	for s, h := range c.serials {
		last(s, "serial "+s.String(), h.who, h.key)
	}
	c.generations(r, mend)
	for _, h := range r.Hosts {
		for _, x := range h.Granted {
			if x.Valid() {
				last(x.Last(), "host "+h.Name, "host "+h.Name, h.Key())
			}
		}
	}
	for _, l := range r.Lanes {
		for _, x := range l.Left {
			if x.Valid() {
				last(x.Last(), "lane "+l.ID, "lane "+l.ID, l.Key())
			}
		}
	}
	for _, q := range r.Requests {
		for _, x := range q.Ranges {
			if x.Valid() {
				last(x.Last(), "request "+q.ID, "request "+q.ID, q.Key())
			}
		}
	}
}

// serialIn is the serial of the sandbox or the checkpoint that a key is of, 0 where it is of none. It is in
// use also when the record under the key cannot be read.
func serialIn(k Key) Serial {
	if k.Kind != KindSandbox && k.Kind != KindCheckpoint {
		return 0
	}
	var s Serial
	if err := s.UnmarshalText([]byte(k.ID)); err != nil {
		return 0
	}
	return s
}

// again reports whether the pool, as its record and its counter stand, would issue a serial some day.
func again(r Records, s Serial) bool {
	g := r.Pool.Generation
	return s.Generation() > g || s.Generation() == g && (r.Counter == nil || s.Counter() >= r.Counter.Next)
}

// generations proves that no record has been in a generation that the pool has not come to.
func (c *checker) generations(r Records, mend remedy) {
	for at := range r.beenIn {
		switch {
		case at.generation <= r.Pool.Generation:
		case at.far(r.Pool.Generation):
			c.find("P1", at.about, by(fromOutside, at.key), "it %s in generation %d, the pool is in generation %d", at.what, at.generation, r.Pool.Generation)
		default:
			c.find("P1", at.about, mend, "it %s in generation %d, the pool is in generation %d", at.what, at.generation, r.Pool.Generation)
		}
	}
}

// been is a generation in which something has happened to a record.
type been struct {
	generation  Generation
	about, what string
	key         Key
}

// far reports whether the generation is not worth reaching, as for serials.
func (b been) far(pool Generation) bool {
	return b.generation > pool && b.generation > MaxGeneration-FewGenerations
}

// beenIn yields the generations that records have been in, but for those of serials.
func (r Records) beenIn(yield func(been) bool) {
	if r.Pool != nil && !yield(been{r.Pool.Settled, "pool " + r.Pool.UUID, "was settled", Key{Kind: KindCounter}}) {
		return
	}
	for _, h := range r.Hosts {
		if !yield(been{h.Settled, "host " + h.Name, "has said what lives on it", h.Key()}) || !yield(been{h.Waived, "host " + h.Name, "was waived", h.Key()}) {
			return
		}
	}
	for _, s := range r.Sandboxes {
		if !yield(been{s.Again, subject(s), "was registered again", s.Key()}) || !yield(been{s.Epoch.Generation(), subject(s), "has an epoch that began", s.Key()}) {
			return
		}
	}
}

// liveNamespaces proves P16: one serial for one live namespace of a host. Of a sandbox that may be elsewhere,
// because its host has not registered it again, nobody knows what lives of it.
func (c *checker) liveNamespaces(pool *Pool, sandboxes []*Sandbox) {
	type place struct {
		serial Serial
		key    Key
	}
	seen := map[string]place{}
	for _, s := range sandboxes {
		if s.State != StateRunning && s.State != StateDumped || pool != nil && pool.Missing(s) {
			continue
		}
		for _, b := range s.Bindings {
			if !b.Live() {
				continue
			}
			key := s.Owner + "/" + b.Kernel.Key(b.Type)
			if other, ok := seen[key]; ok {
				c.find("P16", "serial "+b.Serial.String(), c.either("the agent of host "+s.Owner+" registered it twice, or a record was changed from outside", s.Key(), other.key),
					"%s namespace %s on host %s has serial %s too", b.Type, b.Kernel.Key(b.Type), s.Owner, other.serial)
				continue
			}
			seen[key] = place{b.Serial, s.Key()}
		}
	}
}
