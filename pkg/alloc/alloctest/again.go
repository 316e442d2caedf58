package alloctest

import (
	"maps"
	"slices"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Snapshot is all records of a pool at a moment.
type Snapshot map[alloc.Key]alloc.Record

// TakeSnapshot takes one of a pool that is quiet, or of a store that reads all at once.
func TakeSnapshot(t testing.TB, s alloc.Store) Snapshot {
	t.Helper()
	return reads(everything(t, s))
}

// PutBack makes the store what it was, in one transaction where it takes that. With a target the pool is recovering,
// to be opened in that generation; with 0 nobody has noticed.
func (then Snapshot) PutBack(t testing.TB, s alloc.Store, target alloc.Generation) {
	t.Helper()
	records := maps.Clone(then)
	if target > 0 {
		pool := *records[alloc.Key{Kind: alloc.KindPool}].(*alloc.Pool)
		pool.State, pool.Target = alloc.PoolRecovering, target
		records[pool.Key()] = &pool
	}
	var since []alloc.Key
	for key := range TakeSnapshot(t, s) {
		if records[key] == nil {
			since = append(since, key)
		}
	}
	all := slices.Collect(maps.Values(records))
	if _, err := s.Commit(t.Context(), alloc.Tx{Put: all, Delete: since}); err == nil {
		return
	}
	for some := range slices.Chunk(since, 100) {
		commit(t, s, alloc.Tx{Delete: some})
	}
	for some := range slices.Chunk(all, 100) {
		put(t, s, some...)
	}
}

// Snapshot takes one.
func (p *Pool) Snapshot() Snapshot {
	p.t.Helper()
	return TakeSnapshot(p.t, p.Store)
}

// PutBack makes the store what it was, and has the pool recover in a generation after all that it has had, as
// servers do that have seen it: it is open again then.
func (p *Pool) PutBack(then Snapshot) {
	p.t.Helper()
	p.seen = max(p.seen, p.generation())
	then.PutBack(p.t, p.Store, p.seen+1)
	must[alloc.Mended](p.t)(p.Mend(p.t.Context(), alloc.MendCommand{RequestID: p.Request(), Actor: "operator/ann", Kind: alloc.KindCounter, Force: true}))
}

func (p *Pool) generation() alloc.Generation {
	p.t.Helper()
	return get(p.t, p.Store, alloc.Key{Kind: alloc.KindPool})[0].Record.(*alloc.Pool).Generation
}

// Item is sb as the agent has it, with what lives of it.
func (a *Agent) Item(sb *alloc.Sandbox) alloc.AgainItem {
	it := alloc.AgainItem{Sandbox: sb.Serial, Epoch: sb.Epoch, Labels: sb.Labels, OfHost: sb.OfHost, Checkpoint: sb.Checkpoint, Parent: sb.Parent, Created: sb.Created}
	for _, b := range sb.Bindings {
		if b.Live() {
			it.Bindings = append(it.Bindings, b)
		}
	}
	return it
}

// Again says that the sandboxes live on the host, and that these are all.
func (a *Agent) Again(sbs ...*alloc.Sandbox) alloc.AgainCommand {
	cmd := alloc.AgainCommand{Mutation: a.Mutation(), Last: true}
	for _, sb := range sbs {
		cmd.Items = append(cmd.Items, a.Item(sb))
	}
	return cmd
}

// Return has the host come back in a new generation with what lives on it, and get a range.
func (a *Agent) Return(sbs ...*alloc.Sandbox) []alloc.AgainAnswer {
	a.t.Helper()
	a.Rejoin()
	answers := must[[]alloc.AgainAnswer](a.t)(a.Pool.RegisterAgain(a.t.Context(), a.Again(sbs...)))
	must[alloc.Ranges](a.t)(a.Pool.Grant(a.t.Context(), alloc.GrantCommand{Mutation: a.Mutation(), Count: 1000}))
	return answers
}

// Rejoin says Hello, in the pool as it is now.
func (a *Agent) Rejoin() *alloc.Host {
	a.t.Helper()
	h, _, err := a.Pool.Hello(a.t.Context(), a.Hello())
	if err != nil {
		a.t.Fatal(err)
	}
	a.Incarnation = h.Incarnation
	return h
}

// done fails the test where an item was refused.
func done(t testing.TB, answers []alloc.AgainAnswer) *alloc.Sandbox {
	t.Helper()
	for _, a := range answers {
		if a.Err != nil {
			t.Fatal(a.Err)
		}
	}
	return answers[0].Sandbox
}
