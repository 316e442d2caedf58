package alloc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// MendCommand names one object to be taken out of contradiction.
type MendCommand struct {
	RequestID string `json:"-"`
	// Actor is who asks, such as operator/local.
	Actor string `json:"-"`
	Kind  Kind   `json:"kind"`
	// ID is that of the object's key; empty for the counter.
	ID string `json:"id"`
	// Force mends also what Check finds nothing about, what a newer version wrote, and what cannot be read
	// while the counter is wrong.
	Force bool `json:"force"`
}

// Mended is what a Mend has done.
type Mended struct {
	// Revision and At are those of its last transaction.
	Revision Revision
	At       time.Time
	// Changed is what was put aside or changed, in the order of kinds and ids.
	Changed []Key
}

// mendKinds is what can be mended, with what it costs.
var mendKinds = map[Kind]string{
	KindSandbox:    sandboxAside + "what lives of it is registered again by its host's agent, under fresh serials; one that is dumped, in transit or claimed may be left in its images alone: keep them. " + sandboxImages,
	KindCheckpoint: "the checkpoint is put aside, and a sandbox that ran from it or is over forgets it. Its images restore no more as that sandbox: " + wayBack,
	KindStint:      "the stint is put aside; the sandbox's history lacks it",
	KindHost:       "what is left of the host's ranges is burned, and its agent gets new ones",
	KindLane:       "what is left of the lane's range is burned, and its server takes another one",
	KindRequest:    "the request is put aside; a retry of it, or of an older one that is not committed, is refused",
	KindCounter:    "the pool goes into its next generation; what is left of all ranges of hosts and lanes is burned, and no serial changes",
}

// MendCost says what mending an object of a kind costs; "" for a kind that cannot be mended.
func MendCost(kind Kind) string { return mendKinds[kind] }

const (
	sandboxAside  = "the sandbox, its checkpoints and its older stints are put aside; "
	sandboxImages = "Its images restore no more as what it was: " + wayBack
	wayBack       = "without their nsalloc.json, in a pool whose policy for unknown images is adopt, they restore under fresh serials"
)

// MendCostOf says what mending a sandbox in a state costs, as MendCost; "" stands for a state that is not
// known.
func MendCostOf(state SandboxState) string {
	switch state {
	case StateRunning, StateEnded:
		return sandboxAside + "what lives of it is registered again by its host's agent, under fresh serials. " + sandboxImages
	case StateInTransit, StateClaimed:
		return sandboxAside + "its processes are dead, and nothing is left of them but its images: keep those. " + sandboxImages
	case StateDumped:
		return sandboxAside + "its processes are dead, unless the dump let them run on, and then nothing is left of them but its images: keep those. " + sandboxImages
	}
	return MendCost(KindSandbox)
}

func mendArgs(k Key) []string {
	if k.ID == "" {
		return []string{"mend", string(k.Kind)}
	}
	return []string{"mend", string(k.Kind), k.ID}
}

// CommandLine is the arguments of a command as a POSIX shell takes them.
func CommandLine(args []string) string {
	quoted := make([]string, len(args))
	for i, a := range args {
		quoted[i] = a
		if a == "" || strings.ContainsFunc(a, func(c rune) bool {
			return !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.ContainsRune("-_./:", c))
		}) {
			quoted[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
	}
	return strings.Join(quoted, " ")
}

// maxMendID is more than any id of ours has.
const maxMendID = 512

func (cmd MendCommand) validate() error {
	switch {
	case mendKinds[cmd.Kind] == "":
		return invalid("kind", fmt.Sprintf("%.40q cannot be mended; there are: sandbox, checkpoint, stint, host, lane, request, counter", cmd.Kind))
	case (cmd.Kind == KindCounter) != (cmd.ID == ""):
		return invalid("id", "the counter has none, everything else has one")
	}
	return validText("id", cmd.ID, 0, maxMendID)
}

func (cmd MendCommand) key() Key { return Key{cmd.Kind, cmd.ID} }

// Mend takes one object out of contradiction. What each kind means stands in the API (records.proto).
//
// Nothing is lost: a record is changed or deleted only in the transaction that puts its value aside, byte
// by byte. Nothing is issued again: where the pool, or a host, could still issue a serial that would leave
// the records, that is refused until the counter, or the host, is mended. What a sandbox or a host had that
// cannot be read is not known: such a record is put aside only while nothing is found about the counter, or
// with force.
//
// Committed when it returns: all of it. What is more than a transaction takes goes in several. A sandbox leaves
// before what is of it: when the process dies in between, Check finds stints or checkpoints without their
// sandbox, and the same request, or a new one for that sandbox, does the rest. Before a checkpoint leaves, its
// sandbox forgets it.
//
// Of a refusal is committed that it was one, so that it is the request's last word: another call with the same
// id that is still on its way changes nothing any more.
//
// Errors: ErrInvalid, ErrRecordNotFound, ErrNothingToMend, ErrMendFirst, ErrFormat (a newer version wrote
// it; force mends it all the same), ErrPoolMissing, ErrRecovering, ErrExhausted (no generation is left),
// ErrTooLarge, ErrRequestReused, ErrRequestExpired, ErrConflict, ErrUnavailable, ErrUnknownOutcome.
func (s *Service) Mend(ctx context.Context, cmd MendCommand) (Mended, error) {
	if err := cmd.validate(); err != nil {
		return Mended{}, err
	}
	if err := s.checkRequest(cmd.RequestID); err != nil {
		return Mended{}, err
	}
	digest, err := digestOf(cmd)
	if err != nil {
		return Mended{}, err
	}
	var done Mended
	err = settle(ctx, func() (bool, error) {
		before, refused, err := s.mended(ctx, cmd.RequestID, digest)
		if err != nil {
			return false, err
		}
		begun := len(before.Changed) > 0
		all, err := s.readAll(ctx)
		if err != nil {
			return false, err
		}
		all.begun = begun
		moves, err := all.mend(cmd)
		switch {
		case err != nil && begun:
			return false, refuseRest(err)
		case err != nil && !all.writable():
			// What is on its way compares the pool's record, which does not let it through any more.
			return false, err
		case err != nil && !refused:
			return s.refuseMend(ctx, cmd, digest, err)
		case refused && !begun:
			return true, cmp.Or(err, errRefusedBefore(cmd))
		}
		wrote, err := s.moveAside(ctx, cmd, digest, all, moves, begun)
		if err == nil {
			wrote = true // all of it, now or before
			done, _, err = s.mended(ctx, cmd.RequestID, digest)
		}
		if err != nil && wrote {
			// To pass a failed read on would say that nothing was changed.
			err = &Error{Reason: ReasonUnknownOutcome, Subject: cmd.key().String(), Msg: "a part of the mend, or all of it, was written, and then the store did not answer",
				Fix: "ask again with the same request id", RetryAfter: retrySoon, Err: err}
		}
		return false, err
	})
	return done, err
}

// refuseMend commits that a request was refused, before anybody is told so. The refusal rests on all records, and
// a transaction of the same request that is on its way, its answer lost or another call's, is guarded by those
// alone that it changes: it could take effect after what refuses it now. So its first one compares that this
// record is absent.
func (s *Service) refuseMend(ctx context.Context, cmd MendCommand, digest Digest, refusal error) (decided bool, err error) {
	mark := &Aside{Request: cmd.RequestID, Of: refusedMend, At: s.now(), Actor: cmd.Actor, Digest: digest}
	if _, err := s.store.Commit(ctx, Tx{Guards: []Guard{{Key: mark.Key()}}, Put: []Record{mark}}); err != nil {
		return false, err
	}
	now, _, err := s.mended(ctx, cmd.RequestID, digest)
	switch {
	case err != nil:
		return false, err
	case len(now.Changed) > 0:
		return false, errChanged // it was faster, and what is refused now is what it has done already
	}
	return true, refusal
}

// refuseRest is the refusal of what is left of a mend: a part of it was committed before.
func refuseRest(refusal error) error {
	var e *Error
	if !errors.As(refusal, &e) {
		return refusal
	}
	rest := *e
	rest.Msg = "a part of this mend was done before, and the rest is refused: " + e.Msg
	return &rest
}

// refusedMend stands, without a value, for the key of what a refused request has put aside. Nothing else can:
// what is aside is not mended.
var refusedMend = Key{Kind: KindAside}

func errRefusedBefore(cmd MendCommand) error {
	return &Error{Reason: ReasonRequestExpired, Subject: "request " + cmd.RequestID, Msg: "this mend was refused before, and that is its last word; nothing was changed",
		Fix: "see what nsalloc check says now, and ask with a new id"}
}

// mended is what a request has put aside so far, and whether it was refused. Both is what a call has begun
// that was faster than another one's refusal: then the refusal counts for nothing.
func (s *Service) mended(ctx context.Context, id string, digest Digest) (m Mended, refused bool, err error) {
	var failed error
	err = s.list(ctx, KindAside, id+"/", 0, func(e Entry) bool {
		if !strings.HasPrefix(e.Key.ID, id+"/") {
			return false
		}
		if failed = e.Err; failed != nil {
			return false
		}
		a := e.Record.(*Aside)
		if failed = sameBody(id, a.Digest, digest); failed != nil {
			return false
		}
		if a.Of == refusedMend {
			refused = true
			return true
		}
		m.Changed = append(m.Changed, a.Of)
		m.Revision = max(m.Revision, e.Revision)
		if a.At.After(m.At) {
			m.At = a.At
		}
		return true
	})
	slices.SortFunc(m.Changed, func(a, b Key) int { return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.ID, b.ID)) })
	return m, refused, cmp.Or(err, failed)
}

// Limits of one transaction of a mend, below those of etcd (1.5 MiB): two guards and two writes a move, and a
// value stands in the guard, in what is put aside, and in what replaces it. What is larger goes by itself: the
// largest sandbox there can be, in all three places, is just taken.
const (
	maxMoves     = 60
	maxMoveBytes = 1 << 20
	// maxAside is the largest value that is moved aside: twice that, with what is around it, is within the
	// 1.5 MiB that etcd takes for a request.
	maxAside = 700 << 10
)

// moveAside commits the moves, as many as fit in one transaction, in their order; wrote says that a part of
// them is committed, also with an error. What was read for the decision must not have changed since, but for
// records that are replaced whatever they say.
func (s *Service) moveAside(ctx context.Context, cmd MendCommand, digest Digest, r all, moves []move, begun bool) (wrote bool, err error) {
	if cmd.Kind == KindCounter { // or this process's own issuing would win over and over
		release, err := s.holdCounter(ctx)
		if err != nil {
			return wrote, err
		}
		defer release()
	}
	for len(moves) > 0 {
		batch := moves[:min(len(moves), maxMoves)]
		keys := []Key{{Kind: KindPool}}
		for _, m := range batch {
			if m.key.Kind != KindPool {
				keys = append(keys, m.key)
			}
		}
		entries, at, err := s.store.Get(ctx, keys...)
		if err != nil {
			return wrote, err
		}
		if entries[0].Revision > r.revision {
			return wrote, errChanged
		}
		read := map[Key]Entry{}
		for _, e := range entries {
			read[e.Key] = e
		}
		tx := Tx{Guards: []Guard{{Key: entries[0].Key, Token: entries[0].Token}}}
		if !begun && !wrote {
			tx.Guards = append(tx.Guards, Guard{Key: (&Aside{Request: cmd.RequestID, Of: refusedMend}).Key()}) // see refuseMend
		}
		size, n := 0, 0
		for _, m := range batch {
			e := read[m.key]
			if size += m.size(e); n > 0 && size > maxMoveBytes {
				break
			}
			n++
			if err := m.into(&tx, e, r, at); err != nil {
				return wrote, err
			}
			if e.Token != "" {
				aside := &Aside{Request: cmd.RequestID, Of: e.Key, Value: []byte(e.Token), At: s.now(), Actor: cmd.Actor, Digest: digest}
				// A lost transaction of this request may have come through between the reads: not twice.
				tx.Guards = append(tx.Guards, Guard{Key: aside.Key()})
				tx.Put = append(tx.Put, aside)
			}
		}
		if _, err := s.store.Commit(ctx, tx); err != nil {
			return wrote, err
		}
		wrote, moves = true, moves[n:]
	}
	return wrote, nil
}

// errChanged makes a mend start anew.
var errChanged = &Error{Reason: ReasonConflict, Msg: "what is to be mended changed meanwhile"}

// move is one record that a mend takes away, or replaces.
type move struct {
	key Key
	// with makes the record that stands there from then on, of what stands there now and the revision
	// of that; nil for none.
	with func(now Entry, at Revision) Record
	// whatever: with takes a record also when it has changed since all were read, or is absent.
	whatever bool
}

// size is about how much a move takes of a transaction.
func (m move) size(e Entry) int {
	if m.with != nil {
		return 3 * len(e.Token)
	}
	return 2 * len(e.Token)
}

// into adds the move to a transaction.
func (m move) into(tx *Tx, e Entry, r all, at Revision) error {
	if !m.whatever && (e.Token == "" || e.Revision > r.revision) {
		return errChanged
	}
	if m.key.Kind != KindPool { // guarded already
		tx.Guards = append(tx.Guards, Guard{Key: e.Key, Token: e.Token})
	}
	if m.with == nil {
		tx.Delete = append(tx.Delete, e.Key)
	} else {
		tx.Put = append(tx.Put, m.with(e, at))
	}
	return nil
}
