package agent

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync/atomic"
	"time"

	"github.com/nsalloc/nsalloc/internal/killpoint"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// registrar is the one place that spends serials of this host. Who holds its turn has the book to itself, but for what
// is lent (see holdBooks): what the book does not know is unnumbered, and stays so until the holder numbers it.
type registrar struct {
	a      *Agent
	turn   chan struct{} // holds one token: a lock that can be waited for with a deadline
	books  chan struct{} // as turn; who has both took the turn first
	ranges alloc.Ranges  // what is left to spend; by whoever holds books
	flying []entry       // what the pool is asked for while the books are lent; by whoever holds books
	firm   bool          // nothing is lent; by whoever holds turn
	// id is this life, as the last Hello knew it, and renewed what is to be on disk before the next one, nil
	// mostly; by whoever holds turn.
	id      identity
	renewed *identity
	// burned are serials that a record on our disk names although the pool may never have seen them: they
	// are spent with the next command and given to nothing, or one serial would stand for two things. By
	// whoever holds turn.
	burned map[alloc.Serial]bool
	// pending is what has provisional serials, in the order in which it is to be registered, and replaced
	// which namespaces had serials that are void, until they have others; by whoever holds books.
	pending  []entry
	replaced map[string]alloc.Serial
	fence    fence
	// unsure says that ranges may not be what the pool has: a command's outcome is unknown, and it may still come.
	// granting says that a range is asked for without the turn. By whoever holds turn.
	unsure   bool
	granting bool
	// seen is what this state has seen of the pool, for Hello, and known that the book is what this host has, from
	// the ledger or because it was read since; by whoever holds turn.
	seen   alloc.Seen
	known  bool
	joins  int           // how often the pool's records were read; by whoever holds turn
	grants pace          // how much to ask for; by whoever holds turn
	low    chan struct{} // asks for a range; holds one
	disk   onDisk        // by whoever holds books
	stale  atomic.Bool   // the pool's records must be read anew before anything is spent
	usable atomic.Bool   // the ranges are this life's: provisional serials can be given from them

	read        atomic.Pointer[time.Time] // when they were, by a clock that nobody sets; nil before
	left        atomic.Uint64             // ranges.Count() without what is spent provisionally, for readers
	life        atomic.Uint64             // id.Incarnation, for readers
	uncommitted atomic.Uint64             // provisional serials of namespaces, for readers
	voided      atomic.Uint64             // namespaces whose provisional serials were void, for readers
}

func newRegistrar(a *Agent) *registrar {
	r := &registrar{a: a, turn: make(chan struct{}, 1), books: make(chan struct{}, 1), burned: map[alloc.Serial]bool{}, replaced: map[string]alloc.Serial{}, low: make(chan struct{}, 1), unsure: true}
	r.turn <- struct{}{}
	r.books <- struct{}{}
	return r
}

// hold takes the turn to work with the pool: what is known of the pool's records holds, and nothing is
// provisional. The returned function gives the turn back.
func (r *registrar) hold(ctx context.Context) (func(), error) {
	if err := r.a.waitReached(ctx); err != nil {
		return nil, err
	}
	done, err := r.holdAway(ctx)
	if err != nil {
		return nil, err
	}
	if err := r.catchUp(ctx); err != nil {
		done()
		return nil, err
	}
	return done, nil
}

// holdAway takes the turn, and asks nobody anything.
func (r *registrar) holdAway(ctx context.Context) (func(), error) {
	select {
	case <-r.turn:
	case <-ctx.Done():
		return nil, fmt.Errorf("another registration is under way: %w", context.Cause(ctx))
	}
	<-r.books // nobody keeps them for longer than a write to the disk takes
	return func() {
		r.keep()
		r.books <- struct{}{}
		r.turn <- struct{}{}
	}, nil
}

// catchUp reads the pool's records anew where that is due, and commits what is provisional. Another life of
// this state may have spent our serials meanwhile; then what is ours is told from the records once more.
func (r *registrar) catchUp(ctx context.Context) error {
	for again := true; ; again = false {
		if r.stale.Load() {
			if err := r.joinHeld(ctx); err != nil {
				return err
			}
		}
		err := r.commitPending(ctx)
		if err == nil && !r.stale.Load() || !again || err != nil && alloc.ReasonOf(err) != alloc.ReasonRange {
			return err
		}
	}
}

// join says Hello and reads what is ours.
func (r *registrar) join(ctx context.Context) error {
	done, err := r.holdAway(ctx)
	if err != nil {
		return err
	}
	defer done()
	return r.joinHeld(ctx)
}

// joinHeld is join for the holder of the turn. Dying on any line of it leaves a state that says Hello
// as the same life again: the nonce was durable before it was said first.
func (r *registrar) joinHeld(ctx context.Context) error {
	a := r.a
	if err := r.stayDown(ctx); err != nil {
		return err
	}
	if err := r.keepRenewed(); err != nil {
		return err
	}
	id := a.state.id
	if err := r.replacedElsewhere(ctx, id); err != nil {
		return err
	}
	var host *alloc.Host
	var pool *alloc.Pool
	var err error
	hello := alloc.HelloCommand{
		Host: a.cfg.Host, BootID: a.bootID(), Incarnation: id.Incarnation, Nonce: id.Nonce, PoolUUID: id.Pool, Labels: r.labels(), Seen: r.seen,
	}
	r.lend(func() { host, pool, err = a.pool.Hello(ctx, hello) })
	if err != nil {
		return err
	}
	if id.Pool != pool.UUID || id.Incarnation != host.Incarnation {
		if id.Incarnation != 0 {
			a.log.Warn("this host got a new incarnation: its agent's state was lost or taken over elsewhere", "old", id.Incarnation, "new", host.Incarnation)
			if r.joins > 0 {
				r.fence.fenced(r.id.Incarnation, time.Now()) // and this Hello has fenced the other one: this agent is the one at work
			}
		}
		id.Pool, id.Incarnation = pool.UUID, host.Incarnation
		r.renew(id)
		killpoint.At(killpoint.AgentIdentityRecording)
		if err := r.keepRenewed(); err != nil {
			return err
		}
		killpoint.At(killpoint.AgentIdentityRecorded)
	}
	if r.joins > 0 && r.id == id && r.shared(host.Granted, pool) {
		a.log.Error("another agent works with a copy of this agent's state; beginning a new life", "ranges", r.ranges, "found", host.Granted)
		r.fence.fenced(r.id.Incarnation, time.Now())
		id.Nonce, id.Incarnation = newNonce(), 0
		r.renew(id)
		killpoint.At(killpoint.AgentNewLifeRecording)
		if err := r.keepRenewed(); err != nil {
			return err
		}
		killpoint.At(killpoint.AgentNewLifeRecorded)
		return r.joinHeld(ctx) // with a nonce that nobody has a copy of
	}
	owned, g, err := r.owned(ctx, host, pool)
	if err != nil {
		return err
	}
	if err := r.compare(ctx, owned, pool); err != nil {
		return err
	}
	r.id = id
	r.seen.Generation, r.seen.Sandbox, r.seen.Epoch = pool.Generation, 0, 0
	r.joins++
	r.life.Store(uint64(id.Incarnation))
	r.usable.Store(true)
	unsure := r.unsure
	r.spent(host.Granted)
	r.unsure = unsure // what is under way still compares what this has read
	if err := r.first(ctx); err != nil {
		return err
	}
	a.poolRec.Store(pool)
	r.reconcile(owned)
	a.book.replace(a.cfg.Host, owned, r.pending, g)
	r.known = true
	r.stale.Store(false)
	now := time.Now()
	r.read.Store(&now)
	a.joinOnce.Do(func() {
		a.log.Info("joined the pool", "pool", pool.UUID, "incarnation", host.Incarnation, "sandboxes", len(owned))
		close(a.joined)
	})
	a.sweepSoon()
	return nil
}

// renew has id on disk before anything more is asked of the pool; by the holder.
func (r *registrar) renew(id identity) {
	r.renewed = &id
	r.usable.Store(false)
	r.stale.Store(true)
}

// keepRenewed is renew's second half. Where the disk does not take it, it is tried again before the next
// Hello, which would else take the life that the pool has just begun for another's.
func (r *registrar) keepRenewed() error {
	if r.renewed == nil {
		return nil
	}
	if err := r.a.state.putIdentity(*r.renewed); err != nil {
		return err
	}
	r.renewed = nil
	return nil
}

// age is how long ago the pool's records were read anew.
func (r *registrar) age() time.Duration {
	if at := r.read.Load(); at != nil {
		return time.Since(*at)
	}
	return math.MaxInt64
}

// notThere reports whether the pool has answered that it has no such sandbox.
func notThere(err error) bool {
	r := alloc.ReasonOf(err)
	return r == alloc.ReasonSandboxNotFound || r == alloc.ReasonSerialNotFound
}

// mutation heads every command of this host.
func (r *registrar) mutation() alloc.Mutation {
	return alloc.Mutation{Host: r.a.cfg.Host, Incarnation: r.id.Incarnation}
}

// take sets aside n serials for one command; by the holder. Nothing is spent until that command commits: it names all
// of spend, and the pool compares. spend begins with what has to be burned. It waits for the pool only where the spare
// has not come in time, or something is provisional.
func (r *registrar) take(ctx context.Context, n int) (spend alloc.Ranges, serials []alloc.Serial, err error) {
	if err := r.commitFirmly(ctx); err != nil {
		return nil, nil, err
	}
	skip := r.toBurn()
	need := skip + uint64(n)
	if n > 0 && r.ranges.Count() < need {
		granted, err := r.a.pool.Grant(ctx, alloc.GrantCommand{Mutation: r.mutation(), Count: max(r.grants.size(), need)})
		if err != nil {
			return nil, nil, r.failed(err)
		}
		r.granted(granted)
	}
	spend, _, ok := r.ranges.Take(need)
	if !ok {
		return nil, nil, fmt.Errorf("%d serials are needed, the pool granted %d", need, r.ranges.Count())
	}
	for s := range spend.All() {
		if skip > 0 {
			skip--
			continue
		}
		serials = append(serials, s)
	}
	return spend, serials, nil
}

// burn keeps a serial from being given to anything else; by the holder.
func (r *registrar) burn(s alloc.Serial) { r.burned[s] = true }

// toBurn counts the serials at the front of our ranges up to the last burned one, and forgets those
// that are spent.
func (r *registrar) toBurn() uint64 {
	var skip uint64
	for s := range r.burned {
		through, found := r.through(s)
		if !found {
			delete(r.burned, s)
			continue
		}
		skip = max(skip, through)
	}
	return skip
}

// through counts the serials at the front of our ranges up to s, s included.
func (r *registrar) through(s alloc.Serial) (n uint64, found bool) {
	for _, held := range r.ranges {
		if held.Contains(s) {
			return n + uint64(s-held.First) + 1, true
		}
		n += held.Count
	}
	return 0, false
}

// spent notes what the pool says is left, in its answer to what has changed that: of what was sent before and is not
// answered nothing comes any more, because it compares what is there no longer.
func (r *registrar) spent(left alloc.Ranges) {
	r.sees(left)
	r.ranges, r.unsure = left, false
	r.disk.changed = true
	r.count()
}

// failed notes what an error means for our copy of the pool's records, and hands it on.
func (r *registrar) failed(err error) error {
	if err == nil {
		return nil
	}
	reason := alloc.ReasonOf(err)
	switch reason {
	case alloc.ReasonRecovering:
		// Nothing was changed; but the next Hello shows the pool what this host has seen of it.
		r.stale.Store(true)
		return err
	case alloc.ReasonUnavailable, alloc.ReasonConflict, alloc.ReasonExhausted, alloc.ReasonTooLarge,
		alloc.ReasonInvalid, alloc.ReasonSettling, alloc.ReasonNotConfirmed, alloc.ReasonClaimed, alloc.ReasonManifest, alloc.ReasonVoid, alloc.ReasonRefused,
		alloc.ReasonCheckpointNotFound:
		// Nothing was changed: what we know still holds.
		return err
	case alloc.ReasonStaleIncarnation:
		// Another life of this state has taken our place. A new nonce begins a life of our own.
		r.a.log.Error("another copy of this agent's state was at work; beginning a new life", "cause", err)
		err = r.lostLife(err)
	case alloc.ReasonRange:
	default:
		r.unsure = true
	}
	// Anything else, an unknown outcome above all: read our records again before the next step.
	r.stale.Store(true)
	return err
}

// lostLife has the next Hello begin a life of our own, because another one has taken our place; when that is alive there
// is none before it is gone. By the holder.
func (r *registrar) lostLife(cause error) error {
	if r.fence.life == r.id.Incarnation {
		return cause // it is known, and the next Hello is another life's
	}
	alive := r.fence.fenced(r.id.Incarnation, time.Now())
	id := r.a.state.id
	id.Nonce, id.Incarnation = newNonce(), 0
	r.renew(id)
	killpoint.At(killpoint.AgentNewLifeRecording)
	if err := r.keepRenewed(); err != nil {
		cause = errors.Join(cause, err)
	}
	killpoint.At(killpoint.AgentNewLifeRecorded)
	if alive {
		r.standDown(cause)
	}
	return cause
}

// replacedElsewhere looks, where this agent was fenced before, whether it has been again: to say Hello in a life that was
// replaced would fence the other one once more. By the holder.
func (r *registrar) replacedElsewhere(ctx context.Context, id identity) error {
	if r.fence.times.Load() == 0 || r.joins == 0 || id.Incarnation == 0 {
		return nil
	}
	var host *alloc.Host
	var err error
	r.lend(func() { host, err = r.a.pool.Host(ctx, r.a.cfg.Host) })
	if err != nil {
		return err
	}
	if host.Incarnation <= id.Incarnation { // a server may be moments behind
		return nil
	}
	return r.lostLife(&alloc.Error{Reason: alloc.ReasonStaleIncarnation, Subject: "host " + r.a.cfg.Host,
		Msg: fmt.Sprintf("it is in incarnation %s, this agent is of incarnation %s", host.Incarnation, id.Incarnation)})
}

// register commits items that make or change sandboxes; by the holder. flying is the same items where all of them may
// be provisional. The books are lent meanwhile where that is so, or where the items number nothing.
func (r *registrar) register(ctx context.Context, spend alloc.Ranges, flying []entry, items ...alloc.RegisterItem) (out []*alloc.Sandbox, err error) {
	cmd := alloc.RegisterCommand{Mutation: r.mutation(), Spend: spend, Items: items}
	var left alloc.Ranges
	ask := func() { out, left, err = r.a.pool.Register(ctx, cmd) }
	if len(flying) == 0 && slices.ContainsFunc(items, func(it alloc.RegisterItem) bool { return len(it.Add) > 0 }) {
		ask()
	} else {
		r.flying = flying
		r.lend(ask)
	}
	told := len(flying) > 0 && r.flying == nil // somebody has the serials, as provisional ones
	r.flying = nil
	switch {
	case err == nil:
		if told {
			r.pending = r.pending[len(flying):]
		}
		r.spent(left)
		r.note(out...)
		r.a.book.commit(r.a.cfg.Host, out, r.pending)
		return out, nil
	case told && refused(err):
		// One by one: what is not at fault keeps what it was told.
		err = r.failed(err)
		r.a.log.Debug("a registration that is provisional by now was refused", "cause", err)
		return r.commitQueued(ctx, flying)
	}
	return nil, r.failed(err)
}

// moved notes the outcome of a hand-off's step.
func (r *registrar) moved(h alloc.Handoff, err error) error {
	if err != nil {
		return r.failed(err)
	}
	s := h.Sandbox
	r.disk.changed = true
	r.note(&s)
	r.a.book.put(r.a.cfg.Host, &s)
	return nil
}
