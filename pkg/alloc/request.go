package alloc

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// digestOf is the identity of a request's body. Fields that are added later and are empty do not change it.
func digestOf(body any) (Digest, error) {
	var b []byte
	var err error
	if cmd, ok := body.(RegisterCommand); ok {
		b, err = cmd.body()
	} else {
		b, err = json.Marshal(body)
	}
	if err != nil {
		// A time that no clock shows, for one.
		return Digest{}, &Error{Reason: ReasonInvalid, Subject: "request", Msg: "its body cannot be written down", Err: err}
	}
	return sha256.Sum256(b), nil
}

// RequestLog is the requests that changed a record, kept in the record: it changes with what it tells of.
//
// What is not in Marks and not above Forgotten may have been committed, and is refused. That rests on no
// clock: ids are compared with ids. A clock decides only whether a refusal is needless: a fresh id of a
// caller whose clock is behind, on a record that had more than KeptRequests requests since the moment
// that this clock shows.
type RequestLog struct {
	// Marks are the last requests, in the order of their commits.
	Marks []RequestMark
	// Forgotten is the greatest id that ever left Marks; "" while none has.
	Forgotten string
}

// KeptRequests is how many marks a record keeps at most. Those that no server answers any more leave
// earlier, so that a record of many requests, long ago, is small.
const KeptRequests = 32

// find looks for a request. It is an error when the request was of another body, or may have been
// committed and forgotten.
func (l RequestLog) find(id string, d Digest) (bool, error) {
	for _, m := range l.Marks {
		if m.ID == id {
			return true, sameBody(id, m.Digest, d)
		}
	}
	if id <= l.Forgotten { // UUIDv7s sort by their time
		return false, &Error{Reason: ReasonRequestExpired, Subject: "request " + id,
			Msg: "the record that it is about has forgotten requests as late as this one: whether it was committed cannot be told any more",
			Fix: "look at what there is, and ask with a new id; if that is refused too, set the caller's clock right"}
	}
	return false, nil
}

// with is l after one more request.
func (l RequestLog) with(id string, d Digest, now time.Time) RequestLog {
	l.Marks = append(slices.Clone(l.Marks), RequestMark{ID: id, Digest: d})
	for len(l.Marks) > KeptRequests || len(l.Marks) > 1 && l.Marks[0].older(now.Add(-sweepAge)) {
		l.Forgotten = max(l.Forgotten, l.Marks[0].ID)
		l.Marks = l.Marks[1:]
	}
	return l
}

func (m RequestMark) older(than time.Time) bool {
	at, err := requestTime(m.ID)
	return err == nil && at.Before(than)
}

func sameBody(id string, a, b Digest) error {
	if a != b {
		return &Error{Reason: ReasonRequestReused, Subject: "request " + id, Msg: "this id was used before with another body",
			Fix: "draw a new UUIDv7 for each intent"}
	}
	return nil
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
		return requestExpired(id)
	}
	return nil
}

func requestExpired(id string) error {
	at, _ := requestTime(id)
	return &Error{Reason: ReasonRequestExpired, Subject: "request " + id,
		Msg: "it is of " + at.Format(time.RFC3339) + ", and such are kept for " + RequestLife.String() + ": whether it was committed cannot be told any more",
		Fix: "look at what there is, and ask with a new id"}
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

// validText bounds a text that is stored as it came. Stores keep UTF-8 only.
func validText(what, text string, least, most int) error {
	switch {
	case len(text) < least || len(text) > most:
		return invalid(what, fmt.Sprintf("it has %d bytes, %d to %d are allowed", len(text), least, most))
	case !utf8.ValidString(text):
		return invalid(what, "it is not UTF-8")
	}
	return nil
}
