package agent

import (
	"context"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// A host's ranges. While the pool is there nothing waits for one: when less than a whole range is left, the
// next is fetched in the background, beside what is registered meanwhile. So when the pool goes away there is at
// least one whole range to number from, and that is about a minute of use, or minGrant.
const (
	// minGrant is what a quiet host holds. That it would use up in hours; but hosts are quiet until they are
	// filled anew, perhaps while the pool is away: it takes 4,000 sandboxes of one namespace, or 900 of
	// eight. What a lost state burns of it is nothing: 2^48 serials are 17 billion such ranges.
	minGrant = 8192
	// maxGrant is a minute at 1,000 serials a second, and bounds what a runaway host can burn.
	maxGrant = 65536
)

// pace is how many serials this host asks for at once: about what it uses in a minute.
type pace struct {
	n    uint64
	at   time.Time // when a range was granted last; zero before
	left uint64    // what there was left then, with that range
}

func (p *pace) size() uint64 { return min(max(p.n, minGrant), maxGrant) }

// granted notes that another range came when before were left, and how many are now. What was used since the range
// before says how fast they go, if it was enough to tell: a host that is filled takes its first ones all at once.
func (p *pace) granted(now time.Time, before, after uint64) {
	if used, took := p.left-min(before, p.left), now.Sub(p.at); !p.at.IsZero() {
		inMinute := uint64(float64(used) / max(took.Minutes(), 1e-6))
		switch {
		case used >= p.size()/2 && inMinute > p.size():
			p.n = min(2*p.size(), maxGrant)
		case inMinute < p.size()/2:
			p.n = max(p.size()/2, minGrant)
		}
	}
	p.at, p.left = now, after
}

// granted notes what the pool has granted; by the holder.
func (r *registrar) granted(all alloc.Ranges) {
	r.grants.granted(time.Now(), r.left.Load(), all.Count())
	r.spent(all)
}

// count tells readers what is left, and asks for more in time; by the holder.
func (r *registrar) count() {
	left, namespaces := r.ranges.Count()-r.used(), 0
	for _, e := range r.pending {
		namespaces += len(e.Add)
	}
	r.left.Store(left)
	r.uncommitted.Store(uint64(namespaces))
	if left < r.grants.size() {
		select {
		case r.low <- struct{}{}:
		default: // it is asked for
		}
	}
}

// first gets a host that holds nothing its first range; by the holder. Who is refused goes on without: nothing is
// numbered until another try is answered.
func (r *registrar) first(ctx context.Context) error {
	if len(r.ranges) > 0 {
		return nil
	}
	all, err := r.a.pool.Grant(ctx, alloc.GrantCommand{Mutation: r.mutation(), Count: r.grants.size()})
	switch {
	case err == nil:
		r.granted(all)
	case unreached(err):
		return r.failed(err)
	default:
		r.a.log.Warn("the pool grants this host no serials", "cause", r.failed(err))
	}
	return nil
}

// rangesLoop fetches ranges. What fails is asked for again at the next registration, or when the pool's
// records are read anew.
func (a *Agent) rangesLoop(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.registrar.low:
		}
		if err := a.registrar.refill(ctx); err != nil && ctx.Err() == nil {
			a.log.Debug("no range was granted", "cause", err)
		}
	}
}

// refill fetches a range, without the turn while the pool works on it.
func (r *registrar) refill(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	done, err := r.hold(ctx)
	if err != nil {
		return err
	}
	cmd := alloc.GrantCommand{Mutation: r.mutation(), Count: r.grants.size()}
	enough, joins := r.left.Load() >= r.grants.size(), r.joins
	r.granting = !enough
	done()
	if enough {
		return nil
	}
	all, grantErr := r.a.pool.Grant(ctx, cmd)
	if done, err = r.holdAway(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	defer done()
	r.granting = false
	switch {
	case grantErr != nil && (r.joins == joins || alloc.ReasonOf(grantErr) != alloc.ReasonStaleIncarnation):
		return r.failed(grantErr)
	case r.joins != joins: // of another life, perhaps: that it was replaced is known
		r.stale.Store(true) // what was read meanwhile may have it, or not
		r.unsure = true
		return nil
	}
	// What was spent meanwhile is in all still, or is not: only the range that came is news. Ranges of one
	// generation are granted in ascending order.
	last := all[len(all)-1]
	if n := len(r.ranges); n == 0 || r.ranges[n-1].Last() < last.First {
		unsure := r.unsure
		r.granted(append(r.ranges[:n:n], last))
		r.unsure = unsure // the rest of our ranges was not compared
	}
	return nil
}
