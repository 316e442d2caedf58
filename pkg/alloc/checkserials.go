package alloc

import (
	"cmp"
	"fmt"
	"slices"
)

// unique proves P1 for serials in use.
func (c *checker) unique(r Records) {
	for _, cp := range r.Checkpoints {
		c.take(cp.Serial, "checkpoint "+cp.Serial.String())
	}
	for _, s := range r.Sandboxes {
		c.take(s.Serial, subject(s))
		for _, b := range s.Bindings {
			c.take(b.Serial, fmt.Sprintf("the %s namespace in %s", b.Type, subject(s)))
		}
	}
}

// take notes who has a serial.
func (c *checker) take(s Serial, who string) {
	if !s.Valid() {
		c.find("P1", who, reportIt, "serial %d can never have been issued", uint64(s))
		return
	}
	if other, ok := c.serials[s]; ok {
		c.find("P1", "serial "+s.String(), reportIt, "it is of %s and of %s", other, who)
		return
	}
	c.serials[s] = who
}

// held is a range that somebody has and that is in no record of its own.
type held struct {
	Range
	about, who string
}

// ranges proves that what hosts still hold, and what requests were answered, overlaps neither among
// them nor with what is in use.
func (c *checker) ranges(r Records) {
	var all []held
	add := func(rs Ranges, about, who string) {
		for _, x := range rs {
			switch {
			case !x.Valid():
				c.find("P1", about, reportIt, "range of %d from %d on can never have been issued", x.Count, uint64(x.First))
			default:
				all = append(all, held{x, about, who})
			}
		}
	}
	for _, h := range r.Hosts {
		granted := h.Granted
		if r.Pool != nil {
			granted = h.in(r.Pool.Generation).Granted // nobody can spend the others
		}
		add(granted, "host "+h.Name, "host "+h.Name+", which may still spend it")
	}
	for _, q := range r.Requests {
		add(q.Ranges, "request "+q.ID, "request "+q.ID)
	}
	slices.SortFunc(all, func(a, b held) int {
		return cmp.Or(cmp.Compare(a.First, b.First), cmp.Compare(a.about, b.about))
	})
	for i := 1; i < len(all); i++ {
		if a, b := all[i-1], all[i]; a.Last() >= b.First {
			c.find("P1", b.about, reportIt, "range %s is of %s, and range %s of %s", b.Range, b.who, a.Range, a.who)
		}
	}
	for s, who := range c.serials {
		i, _ := slices.BinarySearchFunc(all, s, func(h held, s Serial) int { return cmp.Compare(h.Last(), s) })
		if i < len(all) && all[i].Contains(s) {
			c.find("P1", "serial "+s.String(), reportIt, "it is of %s, and in range %s of %s", who, all[i].Range, all[i].who)
		}
	}
}

// counter proves that everything in use or held lies before the pool's cursor: what lies behind it
// would be issued again.
func (c *checker) counter(r Records) {
	if r.Counter == nil {
		return
	}
	last := func(s Serial, about, who string) {
		switch g := r.Counter.Generation; {
		case s.Generation() > g:
			c.find("P1", about, reportIt, "%s has serial %s, the pool is in generation %d", who, s, g)
		case s.Generation() == g && s.Counter() >= r.Counter.Next:
			c.find("P1", about, reportIt, "%s has serial %s, and the pool will issue it again: its counter is at %x", who, s, r.Counter.Next)
		}
	}
	for s, who := range c.serials {
		last(s, "serial "+s.String(), who)
	}
	for _, h := range r.Hosts {
		for _, x := range h.Granted {
			last(x.Last(), "host "+h.Name, "host "+h.Name)
		}
	}
	for _, q := range r.Requests {
		for _, x := range q.Ranges {
			last(x.Last(), "request "+q.ID, "request "+q.ID)
		}
	}
}

// liveNamespaces proves P16: one serial for one live namespace of a host.
func (c *checker) liveNamespaces(sandboxes []*Sandbox) {
	seen := map[string]Serial{}
	for _, s := range sandboxes {
		if s.State != StateRunning && s.State != StateDumped {
			continue
		}
		for _, b := range s.Bindings {
			if !b.Live() {
				continue
			}
			key := s.Owner + "/" + b.Kernel.Key(b.Type)
			if other, ok := seen[key]; ok {
				c.find("P16", "serial "+b.Serial.String(), "restart nsalloc-agent on host "+s.Owner+", which ends the sandboxes that do not live there",
					"%s namespace %s on host %s has serial %s too", b.Type, b.Kernel.Key(b.Type), s.Owner, other)
				continue
			}
			seen[key] = b.Serial
		}
	}
}
