package agent

import (
	"cmp"
	"slices"
	"sync"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// book is the agent's copy of the pool's records for this host: the sandboxes that it owns and that
// are not over, found by serial and by live namespace.
type book struct {
	mu        sync.RWMutex
	sandboxes map[alloc.Serial]*alloc.Sandbox // records are replaced, never changed
	byKernel  map[string]place                // alloc.KernelID.Key of every live binding of running and dumped sandboxes
	// provisional are the serials, of sandboxes and of bindings, that the pool has not committed. What is in
	// the book without being here, the pool has.
	provisional map[alloc.Serial]bool
	// generation is the pool's when the records were read; 0 for those of the ledger. What is of before and was not
	// registered again in it is absent: the pool says that it is here, and it is not.
	generation alloc.Generation
}

// place is where a live namespace stands.
type place struct {
	sandbox alloc.Serial
	binding alloc.Binding
}

func newBook() *book {
	return &book{sandboxes: map[alloc.Serial]*alloc.Sandbox{}, byKernel: map[string]place{}, provisional: map[alloc.Serial]bool{}}
}

// put replaces a sandbox's record; one that host does not own, or that is over, leaves the book.
func (b *book) put(host string, s *alloc.Sandbox) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.set(host, s)
}

// set is put for the holder of mu.
func (b *book) set(host string, s *alloc.Sandbox) {
	b.drop(s.Serial)
	if !ours(host, s) {
		return
	}
	b.sandboxes[s.Serial] = s
	if s.State != alloc.StateRunning && s.State != alloc.StateDumped || s.Unconfirmed(b.generation) {
		return
	}
	for _, bd := range s.Bindings {
		if bd.Live() {
			b.byKernel[bd.Kernel.Key(bd.Type)] = place{s.Serial, bd}
		}
	}
}

// ours reports whether a sandbox is in the book of a host.
func ours(host string, s *alloc.Sandbox) bool {
	return s.Owner == host && s.State != alloc.StateEnded && s.State != alloc.StateInTransit
}

// drop forgets a sandbox; by the holder of mu.
func (b *book) drop(serial alloc.Serial) {
	old := b.sandboxes[serial]
	if old == nil {
		return
	}
	for _, bd := range old.Bindings {
		if key := bd.Kernel.Key(bd.Type); b.byKernel[key].sandbox == serial {
			delete(b.byKernel, key)
		}
	}
	delete(b.sandboxes, serial)
}

// replace makes the book exactly list, of a generation, and what is pending, at once: no reader sees a half.
func (b *book) replace(host string, list []*alloc.Sandbox, pending []entry, g alloc.Generation) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.generation = g
	b.sandboxes, b.byKernel, b.provisional = map[alloc.Serial]*alloc.Sandbox{}, map[string]place{}, map[alloc.Serial]bool{}
	for _, s := range list {
		b.set(host, s)
	}
	b.addPending(host, pending)
}

// commit puts what the pool has committed, at once. pending is what is left of what was provisional: a
// sandbox of list may have more in it.
func (b *book) commit(host string, list []*alloc.Sandbox, pending []entry) {
	b.mu.Lock()
	defer b.mu.Unlock()
	changed := map[alloc.Serial]bool{}
	for _, s := range list {
		b.set(host, s)
		changed[s.Serial] = true
		delete(b.provisional, s.Serial)
		for _, bd := range s.Bindings {
			delete(b.provisional, bd.Serial)
		}
	}
	for _, e := range pending {
		if changed[e.Sandbox] {
			b.addPending(host, []entry{e})
		}
	}
}

// provide puts what has got provisional serials.
func (b *book) provide(host string, pending []entry) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.addPending(host, pending)
}

// addPending is provide for the holder of mu.
func (b *book) addPending(host string, pending []entry) {
	for _, e := range pending {
		s := alloc.Sandbox{Serial: e.Sandbox, State: alloc.StateRunning, Owner: host, OfHost: e.OfHost, Labels: e.Labels}
		if known := b.sandboxes[e.Sandbox]; known != nil {
			s = *known
		} else {
			b.provisional[e.Sandbox] = true
		}
		s.Bindings = append(slices.Clone(s.Bindings), e.Add...)
		b.set(host, &s)
		for _, bd := range e.Add {
			b.provisional[bd.Serial] = true
		}
	}
}

// without takes entries out of the book that are no longer pending.
func (b *book) without(entries []entry) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, e := range entries {
		known := b.sandboxes[e.Sandbox]
		if known == nil {
			continue
		}
		s := *known
		s.Bindings = slices.DeleteFunc(slices.Clone(s.Bindings), func(bd alloc.Binding) bool {
			return slices.ContainsFunc(e.Add, func(x alloc.Binding) bool { return x.Serial == bd.Serial })
		})
		b.drop(e.Sandbox)
		for _, serial := range e.fresh() {
			delete(b.provisional, serial)
		}
		if !e.New {
			b.set(s.Owner, &s)
		}
	}
}

// isAbsent reports whether the pool says that a sandbox is here, and it is not.
func (b *book) isAbsent(s *alloc.Sandbox) bool {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return s.Unconfirmed(b.generation)
}

// isProvisional reports whether a serial, of a sandbox or of a namespace, is not committed.
func (b *book) isProvisional(serial alloc.Serial) bool {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.provisional[serial]
}

// find looks a live namespace up.
func (b *book) find(t alloc.NamespaceType, k alloc.KernelID) (place, bool) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	p, ok := b.byKernel[k.Key(t)]
	return p, ok
}

// sandbox is the record under a serial, or nil.
func (b *book) sandbox(serial alloc.Serial) *alloc.Sandbox {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.sandboxes[serial]
}

// all lists the records in the order of their serials.
func (b *book) all() []*alloc.Sandbox {
	b.mu.RLock()
	defer b.mu.RUnlock()
	list := make([]*alloc.Sandbox, 0, len(b.sandboxes))
	for _, s := range b.sandboxes {
		list = append(list, s)
	}
	slices.SortFunc(list, func(x, y *alloc.Sandbox) int { return cmp.Compare(x.Serial, y.Serial) })
	return list
}

// ofHost is the host's own sandbox of this boot, or nil.
func (b *book) ofHost(bootID string) *alloc.Sandbox {
	for _, s := range b.all() {
		if s.OfHost && s.State == alloc.StateRunning && bootOf(s) == bootID {
			return s
		}
	}
	return nil
}

// bootOf is the boot that a sandbox's live namespaces are of; "" when it has none.
func bootOf(s *alloc.Sandbox) string {
	for _, b := range s.Bindings {
		if b.Live() {
			return b.Kernel.BootID
		}
	}
	return ""
}
