package alloc

import (
	"cmp"
	"fmt"
	"slices"
)

// Records is what Check looks at: all of a pool's, as of one revision where that can be had.
type Records struct {
	Sandboxes   []*Sandbox
	Checkpoints []*Checkpoint
	Hosts       []*Host
}

// Finding is a promise that the records break.
type Finding struct {
	// Promise is the number of the promise, such as P1.
	Promise string `json:"promise"`
	// Subject is the object, kind first.
	Subject string `json:"subject"`
	// Evidence says what contradicts what.
	Evidence string `json:"evidence"`
	// Fix is what to do.
	Fix string `json:"fix"`
}

// Check verifies what records alone can show: P1 (no serial twice), P3 (one owner at a time), P6 (a
// checkpoint consumed once at most) and P16 (a live namespace has one serial). It returns nothing for
// records that keep them.
func Check(r Records) []Finding {
	c := &checker{checkpoints: map[Serial]*Checkpoint{}, serials: map[Serial]string{}}
	for _, cp := range r.Checkpoints {
		c.checkpoints[cp.Serial] = cp
		c.take(cp.Serial, "checkpoint "+cp.Serial.String())
	}
	sandboxes := map[Serial]*Sandbox{}
	for _, s := range r.Sandboxes {
		sandboxes[s.Serial] = s
		c.take(s.Serial, subject(s))
		for _, b := range s.Bindings {
			c.take(b.Serial, fmt.Sprintf("the %s namespace in %s", b.Type, subject(s)))
		}
	}
	c.ranges(r.Hosts)
	c.liveNamespaces(r.Sandboxes)
	for _, s := range r.Sandboxes {
		c.history(s)
		c.images(s)
	}
	c.consumed(r.Sandboxes)
	for _, cp := range r.Checkpoints {
		if s := sandboxes[cp.Sandbox]; s == nil {
			c.find("P6", "checkpoint "+cp.Serial.String(), fmt.Sprintf("its sandbox %s does not exist", cp.Sandbox), "restore the store from a snapshot that holds both")
		}
	}
	slices.SortStableFunc(c.findings, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.Promise, b.Promise), cmp.Compare(a.Subject, b.Subject))
	})
	return c.findings
}

type checker struct {
	findings    []Finding
	serials     map[Serial]string
	checkpoints map[Serial]*Checkpoint
}

func (c *checker) find(promise, about, evidence, fix string) {
	c.findings = append(c.findings, Finding{Promise: promise, Subject: about, Evidence: evidence, Fix: fix})
}

const reportIt = "keep a snapshot of the store and report it: no sequence of requests may lead here"

// take notes who has a serial.
func (c *checker) take(s Serial, who string) {
	if !s.Valid() {
		c.find("P1", who, fmt.Sprintf("serial %d can never have been issued", uint64(s)), reportIt)
		return
	}
	if other, ok := c.serials[s]; ok {
		c.find("P1", "serial "+s.String(), fmt.Sprintf("it is of %s and of %s", other, who), reportIt)
		return
	}
	c.serials[s] = who
}

// ranges proves that what hosts still hold overlaps neither among them nor with what is in use.
func (c *checker) ranges(hosts []*Host) {
	type held struct {
		Range
		host string
	}
	var all []held
	for _, h := range hosts {
		for _, r := range h.Granted {
			all = append(all, held{r, h.Name})
		}
	}
	slices.SortFunc(all, func(a, b held) int { return cmp.Compare(a.First, b.First) })
	for i := 1; i < len(all); i++ {
		if all[i-1].Last() >= all[i].First {
			c.find("P1", "host "+all[i].host, fmt.Sprintf("its range %s overlaps %s of host %s", all[i].Range, all[i-1].Range, all[i-1].host), reportIt)
		}
	}
	for s, who := range c.serials {
		i, _ := slices.BinarySearchFunc(all, s, func(h held, s Serial) int { return cmp.Compare(h.Last(), s) })
		if i < len(all) && all[i].Contains(s) {
			c.find("P1", "serial "+s.String(), fmt.Sprintf("it is of %s, and host %s may still spend it from %s", who, all[i].host, all[i].Range), reportIt)
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
				c.find("P16", "serial "+b.Serial.String(), fmt.Sprintf("%s namespace %s on host %s has serial %s too", b.Type, b.Kernel.Key(b.Type), s.Owner, other),
					"restart nsalloc-agent on host "+s.Owner+", which ends the sandboxes that do not live there")
				continue
			}
			seen[key] = b.Serial
		}
	}
}

// history proves P3: epochs rise, stints do not overlap, and the open one is the owner's.
func (c *checker) history(s *Sandbox) {
	for i, st := range s.Stints {
		if i > 0 {
			before := s.Stints[i-1]
			if before.Epoch >= st.Epoch {
				c.find("P3", subject(s), fmt.Sprintf("epoch %s on host %s follows epoch %s on host %s", st.Epoch, st.Host, before.Epoch, before.Host), reportIt)
			}
			if before.To.IsZero() {
				c.find("P3", subject(s), fmt.Sprintf("the stint on host %s never ended and one on host %s followed", before.Host, st.Host), reportIt)
			}
		}
		if st.Epoch > s.Epoch {
			c.find("P3", subject(s), fmt.Sprintf("a stint of epoch %s is in a sandbox of epoch %s", st.Epoch, s.Epoch), reportIt)
		}
	}
	owned := s.State == StateRunning || s.State == StateDumped || s.State == StateClaimed
	last := s.Stint()
	switch {
	case last == nil:
		c.find("P3", subject(s), "it has no history", reportIt)
	case owned && (!last.To.IsZero() || last.Host != s.Owner || last.Epoch != s.Epoch):
		c.find("P3", subject(s), fmt.Sprintf("it is %s on host %s in epoch %s, its last stint says host %s, epoch %s", s.State, s.Owner, s.Epoch, last.Host, last.Epoch), reportIt)
	case !owned && last.To.IsZero():
		c.find("P3", subject(s), fmt.Sprintf("it is %s, its last stint on host %s is still open", s.State, last.Host), reportIt)
	}
}

// images proves that a sandbox and its current checkpoint agree.
func (c *checker) images(s *Sandbox) {
	if s.Checkpoint == 0 {
		if s.State == StateDumped || s.State == StateInTransit || s.State == StateClaimed {
			c.find("P3", subject(s), fmt.Sprintf("it is %s without a checkpoint", s.State), reportIt)
		}
		return
	}
	cp := c.checkpoints[s.Checkpoint]
	if cp == nil {
		c.find("P6", subject(s), fmt.Sprintf("its checkpoint %s does not exist", s.Checkpoint), "restore the store from a snapshot that holds both")
		return
	}
	if cp.Sandbox != s.Serial {
		c.find("P6", subject(s), fmt.Sprintf("its checkpoint %s is of sandbox %s", cp.Serial, cp.Sandbox), reportIt)
	}
	if cp.Epoch > s.Epoch {
		c.find("P3", subject(s), fmt.Sprintf("its checkpoint is of epoch %s, it is in epoch %s", cp.Epoch, s.Epoch), reportIt)
	}
	open := cp.State == CheckpointOpen || cp.State == CheckpointCopy
	if (s.State == StateInTransit || s.State == StateDumped) && cp.State != CheckpointOpen || s.State == StateClaimed && !open {
		c.find("P6", subject(s), fmt.Sprintf("it is %s and its checkpoint is %s", s.State, cp.State), reportIt)
	}
	if s.State == StateRunning && cp.State == CheckpointOpen {
		c.find("P6", subject(s), "it runs while its checkpoint is open: a restore could take it over", reportIt)
	}
}

// consumed proves P6: of the stints that began from one checkpoint, one at most was not released.
func (c *checker) consumed(sandboxes []*Sandbox) {
	by := map[Serial]Serial{}
	for _, s := range sandboxes {
		for _, st := range s.Stints {
			if st.Began != beganClaimed || st.Over == overReleased || st.To.IsZero() && s.State == StateClaimed {
				continue
			}
			cp := c.checkpoints[st.Checkpoint]
			if cp != nil && cp.State != CheckpointConsumed && st.Over != overFenced {
				c.find("P6", "checkpoint "+cp.Serial.String(), fmt.Sprintf("%s ran from it on host %s, and it is %s", subject(s), st.Host, cp.State), reportIt)
			}
			if other, ok := by[st.Checkpoint]; ok && st.Over != overFenced {
				c.find("P6", "checkpoint "+st.Checkpoint.String(), fmt.Sprintf("sandboxes %s and %s both ran from it", other, s.Serial), reportIt)
			}
			by[st.Checkpoint] = s.Serial
		}
	}
}
