package alloc

import "time"

// Level is how much a pool has left, and how fast that goes.
type Level struct {
	// Next is the pool's counter, and Left how many serials of its generation nobody holds: 0 to MaxCounter.
	Next, Left uint64
	// Generations is how many the pool can still begin.
	Generations int
	// Burn is how many serials a second were taken from the counter over the last Over, an hour at most. What a
	// lane or a host took counts, whether it is used or not. Over is 0 while there is nothing to tell.
	Burn float64
	Over time.Duration
	// RunsOut is when the generation is used up at that rate; zero when that is not within MaxRunsOut, or when
	// there is nothing to tell.
	RunsOut time.Time
}

// FewGenerations is what a pool keeps for its operators: with fewer left, none is begun but by their command. Nor does
// a mend skip any of those: a serial of one of them does not lift the pool's generation above itself, but is put aside.
const FewGenerations = 1024

// MaxRunsOut is how far ahead Level.RunsOut looks.
const MaxRunsOut = 200 * 365 * 24 * time.Hour

const (
	// gaugeStep is the pause between two samples that a Gauge keeps.
	gaugeStep = time.Minute
	// gaugeKept bounds them: an hour.
	gaugeKept = 61
)

// Gauge watches a pool's counter and tells its Level. The zero Gauge has seen nothing. It is not safe for
// concurrent use while it is shown something; Level only reads.
type Gauge struct {
	generation Generation
	samples    []sample // oldest first
}

type sample struct {
	at   time.Time
	next uint64
}

// See shows it the counter as it is at a moment. A new generation, or a counter that went back, begins anew:
// what was before says nothing of it. A clock that goes back does, too.
func (g *Gauge) See(c *Counter, now time.Time) {
	if n := len(g.samples); n > 0 {
		last := g.samples[n-1]
		switch {
		case c.Generation != g.generation || c.Next < last.next || now.Before(last.at):
			g.samples = nil
		case now.Sub(last.at) < gaugeStep:
			return
		}
	}
	g.generation = c.Generation
	g.samples = append(g.samples, sample{now, c.Next})
	if n := len(g.samples); n > gaugeKept {
		g.samples = append(g.samples[:0], g.samples[n-gaugeKept:]...)
	}
}

// Level tells of the counter as it is now.
func (g *Gauge) Level(c *Counter, now time.Time) Level {
	l := Level{Next: c.Next, Left: c.left(), Generations: int(MaxGeneration - min(c.Generation, MaxGeneration))}
	if c.Generation != g.generation {
		return l
	}
	var first sample
	for i := len(g.samples) - 1; i >= 0 && now.Sub(g.samples[i].at) <= gaugeStep*gaugeKept; i-- {
		first = g.samples[i]
	}
	if first.at.IsZero() && len(g.samples) > 0 {
		first = g.samples[len(g.samples)-1] // nothing was taken for long
	}
	over := now.Sub(first.at)
	if first.at.IsZero() || over <= 0 || c.Next < first.next {
		return l
	}
	l.Over, l.Burn = over, float64(c.Next-first.next)/over.Seconds()
	if seconds := float64(l.Left) / l.Burn; l.Burn > 0 && seconds < MaxRunsOut.Seconds() {
		l.RunsOut = now.Add(time.Duration(seconds * float64(time.Second)))
	}
	return l
}
