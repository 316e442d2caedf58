package alloc

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"sync"
	"time"
)

// Service is the use cases of a pool over its Store. It is safe for concurrent use, and several of
// them, in as many servers, may work on one store.
type Service struct {
	store Store
	now   func() time.Time

	counter sync.Mutex // held by whoever moves the pool's counter: callers in one process never race on that key

	mu      sync.Mutex
	queue   []*allocation // guarded by mu
	issuing bool          // guarded by mu: a goroutine drains queue
}

// NewService makes the use cases over store. now is the clock that stamps records; nothing but those
// stamps and the age of request ids rests on it. nil means time.Now.
func NewService(store Store, now func() time.Time) *Service {
	if now == nil {
		now = time.Now
	}
	return &Service{store: store, now: func() time.Time { return now().UTC().Round(0) }}
}

// Mutation is what every change by a host carries.
type Mutation struct {
	// RequestID is a UUIDv7, one for one intent.
	RequestID string `json:"-"`
	// Host is the caller, from its certificate and never from the request's body.
	Host string `json:"host"`
	// Incarnation is the caller's life.
	Incarnation Incarnation `json:"incarnation"`
}

func (m Mutation) actor() string { return "host/" + m.Host }

// InitPool creates the pool in an empty store, in generation 1 with the given policy. It refuses with
// ErrPoolExists where a pool is: an empty store is never taken for a new pool by any other call.
func (s *Service) InitPool(ctx context.Context, p Policy) (*Pool, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	pool := &Pool{UUID: newUUID(), Generation: 1, State: PoolOpen, Policy: p, Format: FormatVersion, Nonce: newNonce()}
	counter := &Counter{Generation: 1, Next: 1, Nonce: newNonce()}
	_, err := s.store.Commit(ctx, Tx{
		Guards: []Guard{{Key: pool.Key()}, {Key: counter.Key()}},
		Put:    []Record{pool, counter},
	})
	if ReasonOf(err) == ReasonUnknownOutcome || ReasonOf(err) == ReasonConflict {
		// Ours is told from another's by its UUID.
		found, _, readErr := s.Pool(ctx)
		if readErr == nil && found.UUID == pool.UUID {
			return found, nil
		}
		if readErr == nil {
			return nil, refuse(ReasonPoolExists, "pool "+found.UUID, "the store holds this pool already; nothing was changed")
		}
	}
	if err != nil {
		return nil, err
	}
	return pool, nil
}

// Pool reads the pool's record. ErrPoolMissing when there is none.
func (s *Service) Pool(ctx context.Context) (*Pool, Revision, error) {
	entries, rev, err := s.store.Get(ctx, Key{Kind: KindPool})
	if err != nil {
		return nil, 0, err
	}
	pool, err := poolOf(entries[0])
	return pool, rev, err
}

func poolOf(e Entry) (*Pool, error) {
	pool, ok := e.Record.(*Pool)
	if !ok {
		return nil, &Error{Reason: ReasonPoolMissing, Msg: "the store holds no pool",
			Fix: "check that it is the right etcd and pool name; create a new pool with: nsalloc pool init"}
	}
	return pool, nil
}

// world is the records that one change read, and what it wants to write.
type world struct {
	pool   *Pool
	host   *Host
	moment Moment
	get    map[Key]Entry
	tx     Tx
}

func (w *world) sandbox(serial Serial) (*Sandbox, error) {
	if s, ok := w.get[SandboxKey(serial)].Record.(*Sandbox); ok {
		return s, nil
	}
	return nil, refuse(ReasonSandboxNotFound, "sandbox "+serial.String(), "the pool has no such sandbox")
}

func (w *world) checkpoint(serial Serial) (*Checkpoint, error) {
	if c, ok := w.get[CheckpointKey(serial)].Record.(*Checkpoint); ok {
		return c, nil
	}
	return nil, refuse(ReasonCheckpointNotFound, "checkpoint "+serial.String(), "the pool has no such checkpoint")
}

// put writes r in this transaction.
func (w *world) put(r Record) { w.tx.Put = append(w.tx.Put, r) }

// spend takes serials from the front of the host's ranges.
func (w *world) spend(spent Ranges) error {
	if len(spent) == 0 {
		return nil
	}
	rest, ok := w.host.Granted.Spend(spent)
	if !ok {
		return &Error{Reason: ReasonRange, Subject: "host " + w.host.Name,
			Msg: fmt.Sprintf("serials %v are not next in its ranges %v: another life of its agent's state has spent them", spent, w.host.Granted),
			Fix: "say Hello with a new nonce"}
	}
	w.host.Granted = rest
	w.put(w.host)
	return nil
}

// conflictTries bounds how often a change starts anew because others wrote the same records.
const conflictTries = 16

// change reads the pool, the caller's host and keys, lets decide fill in a transaction, and commits it
// guarded by all that was read. It starts anew when a guard failed, and also when the outcome is
// unknown: whatever the lost transaction does, it and its successor never both take effect, because
// both compare values that each of them changes; decide finds the effect of the lost one by its
// request mark.
//
// If the process dies here, the transaction was committed as a whole or not at all.
func (s *Service) change(ctx context.Context, m Mutation, keys []Key, decide func(*world) error) error {
	var unknown error
	for try := range conflictTries {
		if try > 0 {
			if err := pause(ctx, try); err != nil {
				break
			}
		}
		w, err := s.read(ctx, m, keys)
		if err != nil {
			if unknown != nil {
				return unknown
			}
			return err
		}
		// A refusal is final also after an unknown outcome: it rests on values other than those that the
		// lost transaction compares, so that one can take effect no more.
		if err := decide(w); err != nil {
			return err
		}
		if len(w.tx.Put) == 0 && len(w.tx.Delete) == 0 {
			return nil
		}
		_, err = s.store.Commit(ctx, w.tx)
		switch ReasonOf(err) {
		case ReasonConflict:
		case ReasonUnknownOutcome:
			unknown = err
		default:
			return err
		}
	}
	if unknown != nil {
		return unknown
	}
	return &Error{Reason: ReasonConflict, Msg: "others changed the same records again and again; nothing was changed",
		Fix: "try again", RetryAfter: retrySoon}
}

func (s *Service) read(ctx context.Context, m Mutation, keys []Key) (*world, error) {
	all := append([]Key{{Kind: KindPool}, HostKey(m.Host)}, keys...)
	entries, _, err := s.store.Get(ctx, all...)
	if err != nil {
		return nil, err
	}
	w := &world{get: make(map[Key]Entry, len(entries))}
	for _, e := range entries {
		w.get[e.Key] = e
		w.tx.Guards = append(w.tx.Guards, Guard{Key: e.Key, Token: e.Token})
	}
	if w.pool, err = poolOf(entries[0]); err != nil {
		return nil, err
	}
	if err := w.pool.check(); err != nil {
		return nil, err
	}
	w.moment = Moment{Now: s.now(), Generation: w.pool.Generation, Policy: w.pool.Policy, Actor: m.actor()}
	host, ok := entries[1].Record.(*Host)
	if !ok {
		return nil, &Error{Reason: ReasonHostUnknown, Subject: "host " + m.Host, Msg: "the pool does not know it", Fix: "start its nsalloc-agent, which says Hello first"}
	}
	if host.Incarnation != m.Incarnation {
		return nil, &Error{Reason: ReasonStaleIncarnation, Subject: "host " + m.Host,
			Msg: fmt.Sprintf("it is in incarnation %s, this request is of incarnation %s", host.Incarnation, m.Incarnation),
			Fix: "if two machines share this name or this agent state, give one its own; then start its agent again"}
	}
	h := *host
	w.host = &h
	return w, nil
}

// pause waits a random moment that grows with the tries, so that two who collided part.
func pause(ctx context.Context, try int) error {
	most := big.NewInt(int64(min(try, 8)) * int64(4*time.Millisecond))
	d, err := rand.Int(rand.Reader, most)
	if err != nil {
		return err
	}
	t := time.NewTimer(time.Duration(d.Int64()))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// digestOf is the identity of a request's body. Fields that are added later and are empty do not change it.
func digestOf(body any) (Digest, error) {
	b, err := json.Marshal(body)
	if err != nil {
		return Digest{}, fmt.Errorf("digest of a request: %w", err)
	}
	return sha256.Sum256(b), nil
}

// marked looks for a request among the last ones that changed a record.
func marked(marks []RequestMark, id string, d Digest) (bool, error) {
	for _, m := range marks {
		if m.ID == id {
			return true, sameBody(id, m.Digest, d)
		}
	}
	return false, nil
}

func sameBody(id string, a, b Digest) error {
	if a != b {
		return &Error{Reason: ReasonRequestReused, Subject: "request " + id, Msg: "this id was used before with another body",
			Fix: "draw a new UUIDv7 for each intent"}
	}
	return nil
}

func mark(marks []RequestMark, id string, d Digest) []RequestMark {
	marks = append(slices.Clone(marks), RequestMark{ID: id, Digest: d})
	if len(marks) > keptRequests {
		marks = marks[len(marks)-keptRequests:]
	}
	return marks
}

// RequestLife is how long the outcome of a request can be asked for under its id.
const RequestLife = 10 * time.Minute

// requestSkew is how far ahead a caller's clock may be.
const requestSkew = time.Minute

// checkRequest checks the form and the age of a request id.
func (s *Service) checkRequest(id string) error {
	at, err := requestTime(id)
	if err != nil {
		return err
	}
	now := s.now()
	if at.After(now.Add(requestSkew)) {
		return invalid("request "+id, fmt.Sprintf("its time %s is ahead of this server's clock %s; set the clocks right", at.Format(time.RFC3339), now.Format(time.RFC3339)))
	}
	if at.Before(now.Add(-RequestLife)) {
		return &Error{Reason: ReasonRequestExpired, Subject: "request " + id,
			Msg: "it is of " + at.Format(time.RFC3339) + ", more than " + RequestLife.String() + " ago: whether it was committed cannot be told any more",
			Fix: "look at what there is, and ask with a new id"}
	}
	return nil
}

// requestTime reads the time in a UUIDv7 (RFC 9562, section 5.7): 48 bits of milliseconds first.
func requestTime(id string) (time.Time, error) {
	if !uuidForm.MatchString(id) || id[14] != '7' || !strings.ContainsRune("89ab", rune(id[19])) {
		return time.Time{}, invalid("request id", fmt.Sprintf("%.80q is not a UUIDv7 in lower case", id))
	}
	b, err := hex.DecodeString(id[:8] + id[9:13])
	if err != nil {
		return time.Time{}, invalid("request id", "not hex")
	}
	var ms int64
	for _, c := range b {
		ms = ms<<8 | int64(c)
	}
	return time.UnixMilli(ms).UTC(), nil
}

// newNonce is 128 random bits in hex.
func newNonce() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}

// newUUID is a random UUID (version 4).
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
