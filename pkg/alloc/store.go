package alloc

import (
	"context"
	"fmt"
	"time"
)

// Kind is the kind of a record; it is a part of its key.
type Kind string

// The kinds of records, with the id that completes the key.
const (
	KindPool       Kind = "pool"       // id empty
	KindCounter    Kind = "counter"    // id empty
	KindLane       Kind = "lane"       // 32 hex digits
	KindServer     Kind = "server"     // NAME
	KindSlot       Kind = "slot"       // NAME/NONCE/N
	KindHost       Kind = "host"       // NAME
	KindSandbox    Kind = "sandbox"    // SERIAL
	KindStint      Kind = "stint"      // SERIAL/EPOCH, both as 16 hex digits
	KindCheckpoint Kind = "checkpoint" // SERIAL
	KindRequest    Kind = "request"    // UUIDv7: sorts by time
	KindAside      Kind = "aside"      // REQUEST/KIND/ID: sorts by time
)

// Kinds are the kinds of records that there are many of, in the order in which they are read.
func Kinds() []Kind {
	return []Kind{KindServer, KindSlot, KindHost, KindLane, KindSandbox, KindStint, KindCheckpoint, KindRequest, KindAside}
}

// Watched reports whether watches deliver the changes of records of a kind. They leave out those that every
// Allocate changes: nobody follows them, and they would cost each server as much as issuing does.
func (k Kind) Watched() bool { return k != KindLane && k != KindRequest && k != KindSlot }

// Key names one record of one pool.
type Key struct {
	Kind Kind
	ID   string
}

func (k Key) String() string {
	if k.ID == "" {
		return string(k.Kind)
	}
	return string(k.Kind) + "/" + k.ID
}

// Record is a value of the store: *Pool, *Counter, *Server, *Slot, *Lane, *Host, *Sandbox, *OldStint, *Checkpoint, *Request
// or *Aside.
type Record interface{ Key() Key }

// Key is pool.
func (*Pool) Key() Key { return Key{Kind: KindPool} }

// Key is counter.
func (*Counter) Key() Key { return Key{Kind: KindCounter} }

// Key is server/NAME.
func (s *Server) Key() Key { return Key{Kind: KindServer, ID: s.Name} }

// Key is slot/NAME/NONCE/N.
func (s *Slot) Key() Key {
	return Key{Kind: KindSlot, ID: fmt.Sprintf("%s/%s/%d", s.Server, s.Life, s.N)}
}

// Key is lane/ID.
func (l *Lane) Key() Key { return Key{Kind: KindLane, ID: l.ID} }

// Key is host/NAME.
func (h *Host) Key() Key { return HostKey(h.Name) }

// Key is sandbox/SERIAL.
func (s *Sandbox) Key() Key { return SandboxKey(s.Serial) }

// Key is checkpoint/SERIAL.
func (c *Checkpoint) Key() Key { return CheckpointKey(c.Serial) }

// Key is request/ID.
func (r *Request) Key() Key { return Key{Kind: KindRequest, ID: r.ID} }

// Key is stint/SERIAL/EPOCH.
func (o *OldStint) Key() Key {
	return Key{Kind: KindStint, ID: o.Sandbox.String() + "/" + Serial(o.Stint.Epoch).String()}
}

// Key is aside/REQUEST/KIND/ID, without the last part for the pool and the counter.
func (a *Aside) Key() Key { return Key{Kind: KindAside, ID: a.Request + "/" + a.Of.String()} }

// HostKey is the key of a host's record.
func HostKey(name string) Key { return Key{Kind: KindHost, ID: name} }

// SandboxKey is the key of a sandbox's record.
func SandboxKey(s Serial) Key { return Key{Kind: KindSandbox, ID: s.String()} }

// CheckpointKey is the key of a checkpoint's record.
func CheckpointKey(s Serial) Key { return Key{Kind: KindCheckpoint, ID: s.String()} }

// Server is a server of the pool, as the last of its lives has said of itself.
type Server struct {
	Name string `json:"name"`
	// Incarnation counts its lives: one for each start.
	Incarnation uint64 `json:"incarnation"`
	// Nonce is the life's: a server that finds another one here has been taken over, or its store was put back.
	Nonce   string    `json:"-"`
	Started time.Time `json:"started"`
	// Address is where other servers reach it: unix:///PATH or HOST:PORT. Empty: they cannot ask it.
	Address string `json:"address"`
	// Asked is drawn anew each time that it asks the others what they have seen: who finds it in its own store
	// has the asker's.
	Asked string `json:"-"`
	// Removed is the last of its lives that an operator has removed; 0 for none.
	Removed uint64 `json:"removed,omitempty"`
	Extra   []byte `json:"-"`
}

// Listed reports whether the server is one of the pool's: the others ask it what it has seen. One that was
// removed is not, until its next life.
func (s *Server) Listed() bool { return s.Removed == 0 || s.Incarnation > s.Removed }

// Slot is a place that the writes of one life of a server go through, one at a time. Each counts, and draws a
// nonce: whoever remembers the last one can tell a store that has forgotten it.
type Slot struct {
	Server string `json:"server"`
	Life   string `json:"life"` // the Server's Nonce
	N      int    `json:"n"`
	Writes uint64 `json:"writes"`
	Nonce  string `json:"-"`
	Extra  []byte `json:"-"`
}

// OldStint is a stint that has moved out of its sandbox's record.
type OldStint struct {
	Sandbox Serial `json:"sandbox"`
	Stint   Stint  `json:"stint"`
	Extra   []byte `json:"-"`
}

// Request is the committed answer of an Allocate, kept for RequestLife under its request id so that
// any server finds it when the first answer was lost.
type Request struct {
	ID     string    `json:"id"`
	Digest Digest    `json:"digest"`
	Ranges Ranges    `json:"ranges"`
	At     time.Time `json:"at"`
	Extra  []byte    `json:"-"`
}

// Aside is a record that was put aside: taken from its key because it broke a promise, or could not be
// read. Nothing rests on it, and nothing deletes it.
type Aside struct {
	// Request is the request that put it aside: all that it moved stands side by side in a listing.
	Request string `json:"request"`
	// Of is the key that the record stood under; refusedMend where the request was refused, and Value is empty.
	Of Key `json:"of"`
	// Value is the record's value in the store, byte by byte: the Token of its Entry.
	Value []byte    `json:"value"`
	At    time.Time `json:"at"`
	// Actor is who asked for it, such as operator/ann.
	Actor string `json:"actor"`
	// Digest is of the request's body.
	Digest Digest `json:"digest"`
	Extra  []byte `json:"-"`
}

// RequestMark is a request that changed a record; see RequestLog.
type RequestMark struct {
	ID     string `json:"id"`
	Digest Digest `json:"digest"`
}

// Revision orders what a store committed: a transaction that saw, or overwrote, another's effect has
// a higher revision. Revisions of one store only grow, until somebody puts the store back to an older
// snapshot; nothing but freshness of reads may rest on them.
type Revision int64

// Token is the exact value that a record had when it was read, byte by byte as the store holds it, or
// "" for its absence. It is compared by value, never by version: a store that was put back to an old
// snapshot repeats its versions but not the values of records that carry nonces, epochs or cursors.
type Token string

// Entry is a record as read. Record is nil and Token is "" when the key is absent.
type Entry struct {
	Key    Key
	Record Record
	Token  Token
	// Err says why the value under Key cannot be understood: ErrMalformed, or ErrFormat for one that a
	// newer version wrote. Record is nil then, and Token is the value's: such a record can be guarded,
	// moved and deleted, but never be mistaken for an absent one. (Only an empty value, which no version
	// writes, has no Token: no guard holds on it.)
	Err error
	// Owner, beside the Err of a sandbox, is the host that the value names as its owner, as far as that can
	// be told, or "". It only narrows down whose the record may be: nothing is decided by it.
	Owner    string
	Revision Revision // of the record's last change; 0 when absent
}

// Guard is a condition of a transaction: the record under Key still has the value that Token stands for.
type Guard struct {
	Key   Key
	Token Token
}

// Tx is one transaction. A key stands at most once in Put, Delete and DeleteSpans together. Nobody changes the
// records of Put once they were handed to Commit: a watch may deliver them.
type Tx struct {
	Guards      []Guard
	Put         []Record
	Delete      []Key
	DeleteSpans []Span
}

// Span is the records of a kind with ids after After, up to and with Through.
type Span struct {
	Kind           Kind
	After, Through string
}

// Change is one committed write of a watched kind, as a watch delivers it; Record is nil when the key was deleted, and
// when the value cannot be understood: Err says why, and Owner whose it is, as in Entry.
type Change struct {
	Key      Key
	Record   Record
	Token    Token
	Err      error
	Owner    string
	Revision Revision
}

// Store is where a pool's records live. It is dumb: all rules are above it.
//
// Durable: when Commit returns without an error, the whole transaction has been committed by the
// store's quorum and survives the loss of any minority, of this process, and of power.
//
// Atomic: either every Put and Delete took effect at one revision, at which every Guard held, or
// none did.
//
// Linearizable: Get and List (each call as a whole) answer as of a revision at or after the last
// commit that was acknowledged to anyone before the call began.
//
// Errors, all of them *Error:
//   - ErrConflict: a guard did not hold; nothing was written. Read again and decide again.
//   - ErrUnknownOutcome: the answer was lost. The transaction was committed, or not, or will be a
//     moment later; only a read that finds its effect (by request id or by value) settles it, and a
//     second transaction may stand in for it only if its guards exclude that both take effect.
//   - ErrUnavailable: the store was not reached and nothing was written.
//   - ErrTooLarge: more than the store takes in one transaction; nothing was written.
//
// A record that cannot be understood is no error of the call: its Entry or Change has it, and all others
// are there. It is left as it is.
//
// A context that ends during Commit gives ErrUnknownOutcome, during a read ErrUnavailable.
type Store interface {
	// Get reads the records under keys, in that order, all as of one revision.
	Get(ctx context.Context, keys ...Key) ([]Entry, Revision, error)
	// List reads up to limit records of a kind in the order of their ids, from the first whose id is
	// greater than after; limit 1 to 1000. at pins the revision for the pages of one listing; 0 reads
	// the newest and returns it. A pinned revision that has been compacted gives ErrConflict.
	List(ctx context.Context, kind Kind, after string, limit int, at Revision) ([]Entry, Revision, error)
	// Commit makes tx happen as a whole.
	Commit(ctx context.Context, tx Tx) (Revision, error)
	// Token is the token that rec has once a transaction that puts it has committed, so that whoever wrote
	// a record can guard it without reading it back. ErrInvalid for what cannot be stored.
	Token(rec Record) (Token, error)
	// Watch calls apply for the changes of watched kinds after revision from, in order, one call for all
	// changes of one revision (an empty call only moves the revision on), until ctx ends or the stream breaks. It
	// returns ErrConflict when from has been compacted (list again), ErrUnavailable when the store was
	// lost (watch again from the last revision applied).
	Watch(ctx context.Context, from Revision, apply func(rev Revision, changes []Change)) error
	// Sync makes running watches of this store deliver a revision at or after every commit that was
	// acknowledged before Sync was called, and soon.
	Sync(ctx context.Context) (Revision, error)
}
