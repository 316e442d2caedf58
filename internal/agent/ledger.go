package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/nsalloc/nsalloc/internal/killpoint"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

const (
	// ledgerFile is the name of the ledger in the state directory.
	ledgerFile = "serials"
	// maxLedger bounds what is read back of it, in bytes: some 300,000 namespaces.
	maxLedger = 64 << 20
)

// ledger is what an agent must remember of serials, as it is on disk: what it holds, what it has given out of
// that and the pool has not committed, and what of this host the pool has committed. With it an agent that
// starts while the pool is away knows which namespace has a serial, and can give others theirs.
//
// It is whole after every turn of the registrar that changed any of it, before what was done in that turn is
// told to anybody. Of what is committed, that is an effort: a disk that takes no writes keeps nobody from being
// numbered while the pool is there. A provisional serial that could not be written is not given.
type ledger struct {
	// Pool, Incarnation and Nonce are the life that the ranges are of: another one spends nothing of them.
	Pool        string            `json:"pool"`
	Incarnation alloc.Incarnation `json:"incarnation"`
	Nonce       string            `json:"nonce"`
	// Granted is what the pool said last is left, from the front of which everything is spent. Provisional
	// and burned serials are in it still.
	Granted alloc.Ranges `json:"granted,omitempty"`
	// Seen is what the state has seen of the pool; see alloc.Seen. Its generation is the one in which the sandboxes
	// below were the pool's.
	Seen alloc.Seen `json:"seen,omitzero"`
	// GrantSize is how many serials are asked for at once.
	GrantSize uint64 `json:"grant_size,omitempty"`
	// Burned are serials in Granted that are given to nothing.
	Burned []alloc.Serial `json:"burned,omitempty"`
	// Pending is what has provisional serials, in their order.
	Pending []entry `json:"pending,omitempty"`
	// Sandboxes are the book's, without history and without what is gone.
	Sandboxes []json.RawMessage `json:"sandboxes,omitempty"`
}

// entry is one registration that is still to be committed: all its fresh serials are provisional, and follow
// each other in the host's ranges with nothing between them but what is burned.
type entry struct {
	alloc.RegisterItem
	// New says that the sandbox's own serial is provisional too, and of this entry. Else the entry adds to a
	// sandbox that the pool has, or to one of an entry before it.
	New bool `json:"new,omitempty"`
}

// fresh lists the serials that an entry spends, in order.
func (e entry) fresh() []alloc.Serial {
	var list []alloc.Serial
	if e.New {
		list = append(list, e.Sandbox)
	}
	for _, b := range e.Add {
		list = append(list, b.Serial)
	}
	return list
}

// readLedger reads the ledger of a state directory; fs.ErrNotExist when there is none.
func readLedger(path string) (l ledger, kept unknown, err error) {
	file := filepath.Join(path, ledgerFile)
	data, err := readStateFileOf(file, maxLedger)
	if err == nil {
		kept, err = decodeState(file, data, &l)
	}
	if err == nil {
		err = l.check(file)
	}
	if _, disk := errors.AsType[*fs.PathError](err); disk && !errors.Is(err, fs.ErrNotExist) {
		err = &damage{file, err.Error() + "; " + mend(err)} // nothing is lost with it but serials
	}
	return l, kept, err
}

// check refuses what no agent has written: what is read here decides which serial is whose.
func (l *ledger) check(file string) error {
	if l.Pool == "" || l.Incarnation == 0 || l.Nonce == "" {
		return &damage{file, "it is of no life of a host"}
	}
	last := alloc.Serial(0)
	for _, r := range l.Granted {
		if !r.Valid() || r.First <= last {
			return &damage{file, "its ranges are out of order"}
		}
		last = r.Last()
	}
	last = 0
	for _, e := range l.Pending {
		if !e.Sandbox.Valid() || len(e.Add) == 0 {
			return &damage{file, "a registration that is pending is of nothing"}
		}
		for _, s := range e.fresh() {
			if !s.Valid() || s <= last {
				return &damage{file, "provisional serials are out of order"}
			}
			last = s
		}
	}
	return nil
}

// book decodes the committed sandboxes.
func (l *ledger) book(path string) ([]*alloc.Sandbox, error) {
	var list []*alloc.Sandbox
	for _, raw := range l.Sandboxes {
		var s alloc.Sandbox
		if err := json.Unmarshal(raw, &s); err != nil || !s.Serial.Valid() {
			return nil, &damage{filepath.Join(path, ledgerFile), fmt.Sprintf("a sandbox of it cannot be read: %v", err)}
		}
		list = append(list, &s)
	}
	return list, nil
}

// putLedger makes a ledger durable; it is written whole, in one line.
func (s *stateDir) putLedger(body []byte) error {
	body, err := withKept(body, s.keptLedger)
	if err != nil {
		return fmt.Errorf("state %s: %w", ledgerFile, err)
	}
	killpoint.At(killpoint.AgentSerialsRecording)
	err = s.writeSealed(ledgerFile, seal(stateFormat, body))
	killpoint.At(killpoint.AgentSerialsRecorded)
	return err
}

// noted is what the pool has committed of one sandbox of the book, as the ledger has it.
func noted(s *alloc.Sandbox, provisional func(alloc.Serial) bool) (json.RawMessage, error) {
	c := *s
	c.Stints, c.Bindings = nil, nil
	for _, b := range s.Bindings {
		if b.Live() && !provisional(b.Serial) {
			c.Bindings = append(c.Bindings, b)
		}
	}
	return json.Marshal(&c)
}
