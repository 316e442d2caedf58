package agent

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// onDisk is what the ledger was written last.
type onDisk struct {
	changed bool // something may be to be written
	sum     [sha256.Size]byte
	raw     map[*alloc.Sandbox]json.RawMessage // records are replaced, never changed
	trouble string
}

// load begins with what an earlier agent of this state has left. A ledger that is damaged, or gone, may have
// been the only one to know that a serial was given: the host begins a new life, with ranges of its own, and
// what was left of the old ones is burned. That is the pool's to do, at the next Hello.
func (r *registrar) load() error {
	s := r.a.state
	l, kept, err := readLedger(s.path)
	var known []*alloc.Sandbox
	if err == nil {
		known, err = l.book(s.path)
	}
	_, damaged := errors.AsType[*damage](err)
	switch {
	case err == nil:
	case errors.Is(err, fs.ErrNotExist):
		if s.id.Incarnation == 0 {
			return nil // no serial was ever given
		}
		r.a.log.Warn("the state has no record of the serials that were given; what is left of this host's ranges is burned", "file", ledgerFile)
		r.newLife()
		return nil
	case damaged:
		r.a.log.Error("the record of the serials that were given is damaged and counts as lost; look at the disk. What is left of this host's ranges is burned, and what had provisional serials gets others",
			"cause", err, "kept_as", ledgerFile+damagedSuffix)
		r.newLife()
		return s.putAside(ledgerFile)
	default:
		return err
	}
	s.keptLedger = kept
	r.pending, r.grants.n, r.seen, r.known = l.Pending, l.GrantSize, l.Seen, true
	for _, serial := range l.Burned {
		r.burn(serial)
	}
	r.id = identity{Host: s.id.Host, Pool: l.Pool, Incarnation: l.Incarnation, Nonce: l.Nonce}
	switch {
	case r.id == s.id:
		r.life.Store(uint64(s.id.Incarnation))
		r.usable.Store(true)
		r.ranges = l.Granted
	case s.id.Incarnation != 0:
		r.a.log.Warn("the record of the serials that were given is of another life; what is left of this host's ranges is burned", "file", ledgerFile)
		r.newLife()
	}
	r.a.book.replace(r.a.cfg.Host, known, r.pending, 0)
	r.count()
	return nil
}

// newLife has the next Hello begin another life, once that is on disk.
func (r *registrar) newLife() {
	id := r.a.state.id
	id.Nonce, id.Incarnation = newNonce(), 0
	r.renew(id)
}

// keep writes the ledger where it has changed; by the holder, before the turn is given back. Where it cannot be,
// it is tried again after the next turn: what is provisional is on disk by then (append).
func (r *registrar) keep() {
	if r.disk.changed {
		r.note()
	}
}

// note writes the ledger, with what the pool has just committed in it: before the book has that, and so before
// anybody can be told that it is committed. If the store forgets it, this is who remembers. By the holder.
func (r *registrar) note(committed ...*alloc.Sandbox) {
	switch err := r.save(r.pending, committed...); {
	case err == nil:
		r.disk.trouble = ""
	case r.disk.trouble != err.Error():
		r.disk.trouble = err.Error()
		r.a.log.Warn("what serials were given is not on disk; an agent that starts while the pool is away will know of them only then", "cause", err)
	}
}

// save makes the ledger durable with pending in it, and with what is committed and not in the book yet; by the holder.
func (r *registrar) save(pending []entry, committed ...*alloc.Sandbox) error {
	if r.id.Incarnation == 0 {
		return nil // nothing was ever granted
	}
	l := ledger{Pool: r.id.Pool, Incarnation: r.id.Incarnation, Nonce: r.id.Nonce, Granted: r.ranges, Seen: r.seen, GrantSize: r.grants.n, Pending: pending}
	for s := range r.burned {
		if r.ranges.Contains(s) {
			l.Burned = append(l.Burned, s)
		}
	}
	slices.Sort(l.Burned)
	raw := map[*alloc.Sandbox]json.RawMessage{}
	add := func(s *alloc.Sandbox, provisional func(alloc.Serial) bool) error {
		sandbox, ok := r.disk.raw[s]
		if !ok {
			var err error
			if sandbox, err = noted(s, provisional); err != nil {
				return err
			}
		}
		raw[s] = sandbox
		l.Sandboxes = append(l.Sandboxes, sandbox)
		return nil
	}
	newer := map[alloc.Serial]bool{}
	for _, s := range committed {
		newer[s.Serial] = true
		if !ours(r.a.cfg.Host, s) {
			continue
		}
		if err := add(s, func(alloc.Serial) bool { return false }); err != nil {
			return err
		}
	}
	for _, s := range r.a.book.all() {
		if newer[s.Serial] || r.a.book.isProvisional(s.Serial) || r.a.book.isAbsent(s) {
			continue
		}
		if err := add(s, r.a.book.isProvisional); err != nil {
			return err
		}
	}
	r.disk.raw = raw
	body, err := json.Marshal(&l)
	if err != nil {
		return fmt.Errorf("state %s: %w", ledgerFile, err)
	}
	sum := sha256.Sum256(body)
	if sum == r.disk.sum {
		r.disk.changed = false
		return nil
	}
	r.disk.sum = [sha256.Size]byte{} // whatever is there after a failure
	if err := r.a.state.putLedger(body); err != nil {
		return err
	}
	r.disk.sum, r.disk.changed = sum, false
	return nil
}

// used counts the serials at the front of our ranges that are given to something or burned; by the holder.
func (r *registrar) used() uint64 {
	n := r.toBurn()
	for _, e := range r.pending {
		fresh := e.fresh()
		if through, ok := r.through(fresh[len(fresh)-1]); ok {
			n = max(n, through)
		}
	}
	return n
}

// provide gives the wishes provisional serials, durable when it returns nil; on an error nothing was given. By
// the holder.
func (r *registrar) provide(_ context.Context, wishes []wish) error {
	if !r.usable.Load() {
		return &alloc.Error{Reason: alloc.ReasonUnavailable, Subject: "host " + r.a.cfg.Host, Msg: "it has no serials to give while the pool is away: it never joined, or has begun a new life"}
	}
	n := 0
	for _, w := range wishes {
		n += w.serials()
	}
	used := r.used()
	taken, _, ok := r.ranges.Take(used + uint64(n))
	if !ok {
		return &alloc.Error{Reason: alloc.ReasonUnavailable, Subject: "host " + r.a.cfg.Host,
			Msg: fmt.Sprintf("the serials that it was granted are given out: %d are needed and %d are left, and the pool is away", n, r.ranges.Count()-used)}
	}
	serials := slices.Collect(taken.All())[used:]
	return r.append(itemsOf(wishes, serials))
}

// append makes registrations pending whose serials are next in our ranges. They are on disk before anybody
// can see them in the book. Dying before the write has returned leaves them on disk or not, and told to
// nobody. By the holder.
func (r *registrar) append(entries []entry) error {
	pending := slices.Concat(r.pending, entries)
	if err := r.save(pending); err != nil {
		return err
	}
	r.pending = pending
	r.a.book.provide(r.a.cfg.Host, entries)
	r.count()
	for _, e := range entries {
		r.sayReplaced(e.Add)
		r.a.tally.provisional.Add(int64(len(e.Add)))
		r.a.log.Debug("numbered provisionally", "sandbox", e.Sandbox, "namespaces", len(e.Add), "command", e.Labels["command"])
	}
	return nil
}

// keepAssigned makes a registration pending that may have been committed, or not yet: its namespaces have the
// serials that it named, or will have. Where that cannot be written nothing was given, and the pool's records
// tell. By the holder.
func (r *registrar) keepAssigned(err error, wishes []wish, entries []entry) {
	if !unreached(err) || !r.usable.Load() || len(r.pending) > 0 || !canWait(wishes) {
		return // what is pending has these in it: they were asked for meanwhile
	}
	if err := r.append(entries); err != nil {
		r.a.log.Warn("a registration whose outcome is not known cannot be written down; its namespaces wait for the pool", "cause", err)
	}
}

// unreached reports whether err is that the pool was not there, or did not say what became of a command.
func unreached(err error) bool {
	switch alloc.ReasonOf(err) {
	case alloc.ReasonUnavailable, alloc.ReasonUnknownOutcome, alloc.ReasonRecovering:
		return true
	}
	return errors.Is(err, context.DeadlineExceeded)
}

// commitPending registers what is provisional, in order, as much in a transaction as it takes; by the holder.
// Nothing is renumbered by dying on any line of it: what was committed is found in the pool's records under the
// serials that it has in the ledger.
func (r *registrar) commitPending(ctx context.Context) error {
	for len(r.pending) > 0 {
		n, seen := 0, map[alloc.Serial]bool{}
		for n < len(r.pending) && n < alloc.MaxRegister && !seen[r.pending[n].Sandbox] {
			seen[r.pending[n].Sandbox] = true
			n++
		}
		if err := r.commitFirst(ctx, n); err != nil {
			return err
		}
	}
	return nil
}

// commitFirst registers the first n of what is pending. Of a batch that the pool refuses each half is tried by
// itself, so that one entry holds up nobody; that one gets other serials at the next sweep, if it still needs
// any.
func (r *registrar) commitFirst(ctx context.Context, n int) error {
	err := r.commitBatch(ctx, r.pending[:n])
	switch {
	case err == nil || !refused(err):
		return err
	case n == 1:
		r.drop(err)
		return nil
	}
	until := slices.Max(r.pending[n-1].fresh())
	if err := r.commitFirst(ctx, n/2); err != nil {
		return err
	}
	// What was dropped may have taken others along, and what was given meanwhile is at the end.
	rest := 0
	for rest < len(r.pending) && r.pending[rest].fresh()[0] <= until {
		rest++
	}
	if rest > 0 {
		return r.commitFirst(ctx, rest)
	}
	return nil
}

func (r *registrar) commitBatch(ctx context.Context, batch []entry) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var items []alloc.RegisterItem
	for _, e := range batch {
		item := e.RegisterItem
		if s := r.a.book.sandbox(e.Sandbox); !e.New && s != nil {
			item.Epoch = s.Epoch
		}
		items = append(items, item)
	}
	fresh := batch[len(batch)-1].fresh()
	count, ok := r.through(fresh[len(fresh)-1])
	if !ok {
		return r.failed(&alloc.Error{Reason: alloc.ReasonRange, Subject: "host " + r.a.cfg.Host, Msg: "provisional serials are in none of its ranges"})
	}
	spend, _, _ := r.ranges.Take(count)
	cmd := alloc.RegisterCommand{Mutation: r.mutation(), Spend: spend, Items: items}
	var out []*alloc.Sandbox
	var left alloc.Ranges
	var err error
	r.lend(func() { out, left, err = r.a.pool.Register(ctx, cmd) })
	if err != nil {
		return r.failed(err)
	}
	r.pending = r.pending[len(batch):]
	r.spent(left)
	r.note(out...)
	r.a.book.commit(r.a.cfg.Host, out, r.pending)
	for _, e := range batch {
		r.a.tally.numbered(e.New, len(e.Add))
	}
	return nil
}

// drop gives the first of what is pending up, with all that is to be added to a sandbox that it would make.
func (r *registrar) drop(cause error) {
	first := r.pending[0]
	var void, rest []entry
	for i, e := range r.pending {
		if i == 0 || first.New && e.Sandbox == first.Sandbox {
			void = append(void, e)
		} else {
			rest = append(rest, e)
		}
	}
	r.pending = rest
	r.a.book.without(void)
	r.void(void, cause)
	r.a.sweepSoon()
}

// void burns the serials of entries that are no longer pending, and says so loudly.
func (r *registrar) void(entries []entry, cause error) {
	var serials []alloc.Serial
	namespaces := 0
	for _, e := range entries {
		serials = append(serials, e.fresh()...)
		for _, b := range e.Add {
			r.replaced[b.Kernel.Key(b.Type)] = b.Serial
		}
		namespaces += len(e.Add)
	}
	if len(serials) == 0 {
		return
	}
	for _, s := range serials {
		r.burn(s)
	}
	r.disk.changed = true
	r.count()
	r.a.tally.void.Add(int64(namespaces))
	r.voided.Add(uint64(namespaces))
	r.a.log.Error("provisional serials are void; the namespaces that live under them get others", "namespaces", namespaces,
		"first", serials[0], "last", serials[len(serials)-1], "cause", cause)
}

// errNotOurs is why provisional serials are void that the pool did not refuse one by one.
var errNotOurs = errors.New("the ranges that they are of are not this host's any more: another copy of its agent's state was at work, or the state was lost, or the pool is in a new generation")

// reconcile holds what is pending against what the pool says we own, and hold; by the holder. What it has
// committed, before the answer was lost or the agent died, is no longer provisional. A serial that is not in
// our ranges any more is somebody else's, or nobody's. A namespace of another boot is gone, and the pool takes
// none of those: its serial is burned.
func (r *registrar) reconcile(owned []*alloc.Sandbox) {
	if len(r.pending) == 0 {
		return
	}
	bound, running := map[string]alloc.Serial{}, map[alloc.Serial]bool{}
	for _, s := range owned {
		running[s.Serial] = s.State == alloc.StateRunning
		for _, b := range s.Bindings {
			if b.Live() && s.State != alloc.StateClaimed {
				bound[b.Kernel.Key(b.Type)] = b.Serial
			}
		}
	}
	var kept, void, gone []entry
	for _, e := range r.pending {
		rest, fits := e, true
		rest.Add = nil
		for _, b := range e.Add {
			switch bound[b.Kernel.Key(b.Type)] {
			case b.Serial:
				continue
			case 0:
			default:
				fits = false // it has another serial already, which stays
			}
			rest.Add = append(rest.Add, b)
		}
		switch {
		case len(rest.Add) == 0: // committed
			r.a.tally.numbered(e.New, len(e.Add))
		case rest.Add[0].Kernel.BootID != r.a.bootID():
			gone = append(gone, rest)
		case fits && (e.New || running[e.Sandbox]) && !slices.ContainsFunc(rest.fresh(), func(s alloc.Serial) bool { return !r.ranges.Contains(s) }):
			kept = append(kept, rest)
			running[e.Sandbox] = true
		default:
			void = append(void, rest)
		}
	}
	r.pending = kept
	for _, e := range gone {
		for _, s := range e.fresh() {
			r.burn(s)
		}
	}
	if len(gone) > 0 {
		r.a.log.Warn("namespaces of an earlier boot were gone before the pool was back; their provisional serials are burned", "registrations", len(gone))
	}
	r.void(void, errNotOurs)
	r.disk.changed = true
	r.count()
}

// forgetReplaced says what became of the namespaces whose provisional serials were void and that got no others;
// by the holder, when all that lives is numbered.
func (r *registrar) forgetReplaced() {
	if n := len(r.replaced); n > 0 && len(r.pending) == 0 {
		r.a.log.Warn("namespaces with void serials were gone before they got others", "namespaces", n)
		clear(r.replaced)
	}
}

// sayReplaced says which serials namespaces have got in place of void ones; by the holder.
func (r *registrar) sayReplaced(adds []alloc.Binding) {
	for _, b := range adds {
		if old, ok := r.replaced[b.Kernel.Key(b.Type)]; ok && old != b.Serial {
			r.a.log.Warn("a serial was replaced", "type", b.Type, "was", old, "is", b.Serial)
			delete(r.replaced, b.Kernel.Key(b.Type))
		}
	}
}
