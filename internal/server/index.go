package server

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"

	"google.golang.org/protobuf/proto"
	"k8s.io/utils/third_party/forked/golang/btree"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

// index is a pool's records as of one revision, arranged for the questions that are asked. It has one
// writer; readers hold view.mu.
//
// It is built for a million sandboxes with eight namespaces each. So a sandbox is kept as the bytes of
// the message that answers for it, which take a third of what the decoded one does and hold nothing
// for the garbage collector to follow, and an entry stays in its place when its record changes.
type index struct {
	pool    *alloc.Pool
	counter *alloc.Counter

	// The two that have the most keep numbers of entries, so that the garbage collector need not look into them.
	bySerial map[alloc.Serial]uint32 // a sandbox's own serial, and those of all its bindings
	byKernel map[kernelKey]uint32    // live namespaces of sandboxes that are on their owner host
	entries  []*entry                // by number; nobody has number 0
	free     []uint32                // numbers that sandboxes had which are gone

	// order is by serial. Hosts register in ranges that lie beside each other, so that most new sandboxes come
	// somewhere in the middle. Those of one host come at its end, and a slice is less than a tree: owners.
	order  *btree.BTree[*entry]
	owners map[string][]*entry // by owner, each by serial

	checkpoints map[alloc.Serial]*alloc.Checkpoint
	cpOrder     []alloc.Serial
	cpsOf       map[alloc.Serial][]alloc.Serial // sandbox -> its checkpoints, by serial
	byRun       map[string]alloc.Serial         // CRIU's run id -> checkpoint

	hosts     map[string]*alloc.Host
	hostOrder []string

	// unreadable has what is in none of the above, with why. sandboxes and checkpoints that become
	// unreadable leave all indexes.
	unreadable map[alloc.Key]error
	unread     map[alloc.Kind]uint64 // how many of a kind may hide a record
	hiddenOf   map[alloc.Key]string  // of those sandboxes, the owner; "" when nobody can tell
	unreadOf   map[string]uint64     // by that owner, how many

	// clashes: two sandboxes have, or had, one serial or namespace, of which only the later is found by it.
	// The writer's alone.
	clashes bool

	texts map[string]string // one copy of each owner and boot id; the writer's alone

	placesMu sync.RWMutex
	places   map[place]uint32 // guarded by placesMu: the writer adds to it without the view's lock
}

// entry is one sandbox. Its fields change under view.mu; what packed points at never does.
type entry struct {
	serial alloc.Serial
	number uint32 // its place in entries
	state  nsallocv1.SandboxState
	owner  string
	boot   string // stands for the boot ids that packed leaves out
	packed []byte
}

// place is one boot of one host; its number stands for it in a kernelKey.
type place struct{ host, boot string }

// kernelKey is equal for two identities exactly if alloc.KernelID.Key is, on one host.
type kernelKey struct {
	number uint64 // the kernel's id, or the inode
	where  uint32 // place (27 bits), type (4 bits), and whether number is the id (1 bit)
}

// orderDegree makes nodes of 32 to 63 entries.
const orderDegree = 32

func newIndex() *index {
	return &index{
		bySerial: map[alloc.Serial]uint32{}, byKernel: map[kernelKey]uint32{}, entries: []*entry{nil},
		order: btree.New(orderDegree, func(a, b *entry) bool { return a.serial < b.serial }), owners: map[string][]*entry{},
		checkpoints: map[alloc.Serial]*alloc.Checkpoint{}, cpsOf: map[alloc.Serial][]alloc.Serial{}, byRun: map[string]alloc.Serial{},
		hosts: map[string]*alloc.Host{}, unreadable: map[alloc.Key]error{}, unread: map[alloc.Kind]uint64{},
		hiddenOf: map[alloc.Key]string{}, unreadOf: map[string]uint64{}, places: map[place]uint32{}, texts: map[string]string{},
	}
}

// update is one change, with all the work done that needs no lock.
type update struct {
	key    alloc.Key
	record alloc.Record // nil: deleted, or err says why it cannot be read
	err    error
	owner  string // of a sandbox, beside err: Change.Owner
	// Of a sandbox:
	next     entry
	bindings []alloc.Serial // the old record's when it was deleted
	left     []alloc.Serial // of the old record, and not of the new one
	gone     []kernelKey    // the old record's
	live     []kernelKey    // the new record's
}

// prepare is called by the writer, without the lock.
func (ix *index) prepare(c alloc.Change) (update, error) {
	key, record := c.Key, c.Record
	u := update{key: key, record: record, err: c.Err, owner: c.Owner}
	if key.Kind != alloc.KindSandbox {
		return u, nil
	}
	var serial alloc.Serial
	if err := serial.UnmarshalText([]byte(key.ID)); err != nil {
		return u, nil // no record is under such a key; a value there is unreadable
	}
	if old := ix.entries[ix.bySerial[serial]]; old != nil && old.serial == serial && (onHost(old.state) || record == nil) {
		msg, err := old.unpack()
		if err != nil {
			return u, err
		}
		if onHost(old.state) {
			u.gone = ix.kernelKeys(msg)
		}
		for _, b := range msg.GetBindings() {
			u.bindings = append(u.bindings, alloc.Serial(b.GetSerial()))
		}
	}
	if record == nil && ix.clashes {
		return u, errClash
	}
	if sb, ok := record.(*alloc.Sandbox); ok {
		msg := wire.SandboxToWire(sb)
		u.left, u.bindings = u.bindings, nil
		for _, b := range sb.Bindings {
			u.bindings = append(u.bindings, b.Serial)
		}
		u.left = slices.DeleteFunc(u.left, func(s alloc.Serial) bool { return slices.Contains(u.bindings, s) })
		if onHost(msg.State) {
			u.live = ix.kernelKeys(msg)
		}
		return u, ix.pack(&u.next, msg)
	}
	return u, nil
}

// errClash has the view read anew: when one of two that have a serial leaves (Mend), the other one is to
// be found by it, and which that is the index does not know.
var errClash = errors.New("a sandbox left that had a serial in common with another one")

// noteClashes is called before u is found by its serials and namespaces.
func (ix *index) noteClashes(u update, serial alloc.Serial) {
	for _, s := range append(u.bindings, serial) {
		e := ix.entries[ix.bySerial[s]]
		ix.clashes = ix.clashes || e != nil && e.serial != serial
	}
	for _, k := range u.live {
		e := ix.entries[ix.byKernel[k]]
		ix.clashes = ix.clashes || e != nil && e.serial != serial
	}
}

// apply is called by the writer, with the lock.
func (ix *index) apply(u update) {
	ix.applyUnreadable(u)
	switch u.key.Kind {
	case alloc.KindPool:
		ix.pool, _ = u.record.(*alloc.Pool)
	case alloc.KindCounter:
		ix.counter, _ = u.record.(*alloc.Counter)
	case alloc.KindHost:
		ix.applyHost(u)
	case alloc.KindSandbox:
		ix.applySandbox(u)
	case alloc.KindCheckpoint:
		ix.applyCheckpoint(u)
	}
}

func (ix *index) applyHost(u update) {
	h, ok := u.record.(*alloc.Host)
	at, found := slices.BinarySearch(ix.hostOrder, u.key.ID)
	switch {
	case ok && !found:
		ix.hostOrder = slices.Insert(ix.hostOrder, at, u.key.ID)
	case !ok && found:
		ix.hostOrder = slices.Delete(ix.hostOrder, at, at+1)
	}
	if !ok {
		delete(ix.hosts, u.key.ID)
		return
	}
	ix.hosts[u.key.ID] = h
}

func (ix *index) applySandbox(u update) {
	var serial alloc.Serial
	if serial.UnmarshalText([]byte(u.key.ID)) != nil {
		return
	}
	e := ix.entries[ix.bySerial[serial]]
	for _, k := range u.gone {
		if e != nil && ix.byKernel[k] == e.number {
			delete(ix.byKernel, k)
		}
	}
	if u.record == nil {
		if e == nil || e.serial != serial {
			return
		}
		ix.order.Delete(e)
		ix.disown(e)
		for _, s := range append(u.bindings, serial) {
			if ix.bySerial[s] == e.number {
				delete(ix.bySerial, s)
			}
		}
		ix.entries[e.number], ix.free = nil, append(ix.free, e.number)
		return
	}
	fresh := e == nil || e.serial != serial
	if fresh {
		e = ix.newEntry(serial)
		ix.order.ReplaceOrInsert(e)
	}
	if e.owner != u.next.owner {
		ix.disown(e)
		ix.owners[u.next.owner] = with(ix.owners[u.next.owner], e)
	}
	u.next.number = e.number
	*e = u.next
	// What one sandbox parts with another one of the same revision gets: that is no clash.
	for _, s := range u.left {
		if ix.bySerial[s] == e.number {
			delete(ix.bySerial, s)
		}
	}
	if !fresh {
		ix.noteClashes(u, serial)
	}
	before := len(ix.bySerial) + len(ix.byKernel)
	ix.bySerial[serial] = e.number
	for _, s := range u.bindings {
		ix.bySerial[s] = e.number
	}
	for _, k := range u.live {
		ix.byKernel[k] = e.number
	}
	// A new one adds as many as it has, or some were another one's. That is what noteClashes finds, without
	// looking for each before it is put.
	if found := len(ix.bySerial) + len(ix.byKernel); fresh && found != before+1+len(u.bindings)+len(u.live) {
		ix.clashes = true
	}
}

func (ix *index) newEntry(serial alloc.Serial) *entry {
	e := &entry{serial: serial, number: uint32(len(ix.entries))}
	if n := len(ix.free); n > 0 {
		e.number, ix.free = ix.free[n-1], ix.free[:n-1]
		ix.entries[e.number] = e
	} else {
		ix.entries = append(ix.entries, e)
	}
	return e
}

func (ix *index) disown(e *entry) {
	if rest := without(ix.owners[e.owner], e); len(rest) > 0 {
		ix.owners[e.owner] = rest
	} else {
		delete(ix.owners, e.owner)
	}
}

func (ix *index) applyCheckpoint(u update) {
	var serial alloc.Serial
	if serial.UnmarshalText([]byte(u.key.ID)) != nil {
		return
	}
	old := ix.checkpoints[serial]
	c, ok := u.record.(*alloc.Checkpoint)
	if old != nil && (!ok || old.RunID != c.RunID) && ix.byRun[old.RunID] == serial {
		delete(ix.byRun, old.RunID)
	}
	if !ok {
		if old != nil {
			delete(ix.checkpoints, serial)
			ix.cpOrder = remove(ix.cpOrder, serial)
			ix.cpsOf[old.Sandbox] = remove(ix.cpsOf[old.Sandbox], serial)
		}
		return
	}
	ix.checkpoints[serial] = c
	if old == nil {
		ix.cpOrder = insert(ix.cpOrder, serial)
		ix.cpsOf[c.Sandbox] = insert(ix.cpsOf[c.Sandbox], serial)
	}
	// Of two dumps that claim one run id the later one counts.
	if c.RunID != "" && ix.byRun[c.RunID] <= serial {
		ix.byRun[c.RunID] = serial
	}
}

// after is an owner's sandboxes, or with "" the pool's, that have greater serials than after, in their order.
func (ix *index) after(owner string, after alloc.Serial) iter.Seq[*entry] {
	if owner == "" {
		return func(yield func(*entry) bool) { ix.order.AscendGreaterOrEqual(&entry{serial: after + 1}, yield) }
	}
	list := ix.owners[owner]
	at, _ := slices.BinarySearchFunc(list, after+1, bySerial)
	return slices.Values(list[at:])
}

// sandbox finds by a sandbox's serial, a namespace's, or a checkpoint's.
func (ix *index) sandbox(s alloc.Serial) *entry {
	if e := ix.entries[ix.bySerial[s]]; e != nil {
		return e
	}
	if c := ix.checkpoints[s]; c != nil {
		return ix.entries[ix.bySerial[c.Sandbox]]
	}
	return nil
}

func (ix *index) namespace(host string, t nsallocv1.NamespaceType, k *nsallocv1.KernelId) *entry {
	ix.placesMu.RLock()
	p, ok := ix.places[place{host, k.GetBootId()}]
	ix.placesMu.RUnlock()
	if !ok {
		return nil
	}
	return ix.entries[ix.byKernel[keyAt(p, t, k)]]
}

// onHost: the kernel identities of a record are of namespaces that stand on its owner.
func onHost(s nsallocv1.SandboxState) bool {
	return s == nsallocv1.SandboxState_SANDBOX_STATE_RUNNING || s == nsallocv1.SandboxState_SANDBOX_STATE_DUMPED
}

func keyAt(p uint32, t nsallocv1.NamespaceType, k *nsallocv1.KernelId) kernelKey {
	where := p<<5 | uint32(t&15)<<1
	if k.GetId() != 0 {
		return kernelKey{k.GetId(), where | 1}
	}
	return kernelKey{k.GetInode(), where}
}

func (ix *index) kernelKeys(s *nsallocv1.Sandbox) []kernelKey {
	keys := make([]kernelKey, 0, len(s.GetBindings()))
	for _, b := range s.GetBindings() {
		if b.GetGone() == nil && b.GetKernel() != nil {
			keys = append(keys, keyAt(ix.placeOf(s.GetOwner(), b.GetKernel().GetBootId()), b.GetType(), b.GetKernel()))
		}
	}
	return keys
}

func (ix *index) placeOf(host, boot string) uint32 {
	ix.placesMu.Lock()
	defer ix.placesMu.Unlock()
	p, ok := ix.places[place{host, boot}]
	if !ok {
		p = uint32(len(ix.places))
		ix.places[place{ix.text(host), ix.text(boot)}] = p
	}
	return p
}

// text keeps one copy of what a million records repeat.
func (ix *index) text(s string) string {
	if known, ok := ix.texts[s]; ok {
		return known
	}
	ix.texts[s] = s
	return s
}

// pack makes e of msg, which it changes: the boot id that the bindings share is kept once, outside.
func (ix *index) pack(e *entry, msg *nsallocv1.Sandbox) error {
	boot := ""
	for i, b := range msg.GetBindings() {
		id := b.GetKernel().GetBootId()
		if i == 0 {
			boot = id
		}
		if b.GetKernel() != nil && id == "" {
			boot = "" // an absent one could not be told from one that was left out
			break
		}
	}
	if boot != "" {
		for _, b := range msg.GetBindings() {
			if b.GetKernel().GetBootId() == boot {
				b.Kernel.BootId = ""
			}
		}
	}
	packed, err := proto.Marshal(msg)
	if err != nil {
		return &alloc.Error{Reason: alloc.ReasonMalformed, Subject: "sandbox " + alloc.Serial(msg.GetSerial()).String(), Msg: "it cannot be told on the wire", Err: err}
	}
	*e = entry{serial: alloc.Serial(msg.GetSerial()), state: msg.GetState(), owner: ix.text(msg.GetOwner()), boot: ix.text(boot), packed: packed}
	return nil
}

// unpack is the sandbox as it is answered.
func (e entry) unpack() (*nsallocv1.Sandbox, error) {
	msg := new(nsallocv1.Sandbox)
	if err := proto.Unmarshal(e.packed, msg); err != nil {
		return nil, fmt.Errorf("unpack sandbox %s: %w", e.serial, err)
	}
	for _, b := range msg.GetBindings() {
		if k := b.GetKernel(); k != nil && k.BootId == "" {
			k.BootId = e.boot
		}
	}
	return msg, nil
}

func bySerial(e *entry, s alloc.Serial) int { return cmp.Compare(e.serial, s) }

func with(list []*entry, e *entry) []*entry {
	at, found := slices.BinarySearchFunc(list, e.serial, bySerial)
	if found {
		return list
	}
	return slices.Insert(list, at, e)
}

func without(list []*entry, e *entry) []*entry {
	at, found := slices.BinarySearchFunc(list, e.serial, bySerial)
	if !found {
		return list
	}
	return slices.Delete(list, at, at+1)
}

func insert(list []alloc.Serial, s alloc.Serial) []alloc.Serial {
	at, found := slices.BinarySearch(list, s)
	if found {
		return list
	}
	return slices.Insert(list, at, s)
}

func remove(list []alloc.Serial, s alloc.Serial) []alloc.Serial {
	at, found := slices.BinarySearch(list, s)
	if !found {
		return list
	}
	return slices.Delete(list, at, at+1)
}
