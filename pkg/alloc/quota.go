package alloc

import (
	"fmt"
	"time"
)

// QuotaWindow is the time for which a host's quota (Policy.HostQuota) holds.
const QuotaWindow = 24 * time.Hour

// Quota is what a host was granted in a window of QuotaWindow, which begins with a grant. A host can be granted its
// quota at the end of one window and again at the begin of the next.
//
// No promise rests on the clocks of the servers: they decide only when the next window begins, and its begin never
// goes back. A clock that steps ahead, or a server whose clock is ahead, begins one early; the next begins when a
// clock shows QuotaWindow more than that one did. After a step back the window lasts until the clock has caught up, and
// a host that uses its quota up meanwhile waits, or the quota is raised.
type Quota struct {
	Since time.Time `json:"since"` // when the window began, by the clock of the server that granted first
	Used  uint64    `json:"used"`  // what was granted in it
}

// At is q as it is at a moment: nothing is used of a window that has not begun.
func (q Quota) At(now time.Time) Quota {
	if q.Since.IsZero() || !now.Before(q.Since.Add(QuotaWindow)) {
		return Quota{}
	}
	return q
}

// Share is which part of its quota is used; false where the pool, nil for one that is not known, has no limit.
func (q Quota) Share(pool *Pool, now time.Time) (share float64, limited bool) {
	if pool == nil {
		return 0, false
	}
	most, limited := pool.Policy.Quota()
	if !limited {
		return 0, false
	}
	return float64(q.At(now).Used) / float64(most), true
}

// These bound what a host that has used its quota up is asked to wait before it tries again: the quota may be raised.
const (
	minQuotaWait = time.Minute
	maxQuotaWait = time.Hour
)

// grant is q after n more serials, or the refusal.
func (q Quota) grant(host string, p Policy, n uint64, now time.Time) (Quota, error) {
	q = q.At(now)
	if q.Since.IsZero() {
		q.Since = now
	}
	if most, limited := p.Quota(); limited && (n > most || q.Used > most-n) {
		until := q.Since.Add(QuotaWindow)
		return q, &Error{Reason: ReasonExhausted, Subject: "host " + host,
			Msg: fmt.Sprintf("it was granted %d serials since %s, and asks for %d more: its quota is %d in %.0f hours, and it is free again at %s; nothing was granted",
				q.Used, q.Since.Format(time.RFC3339), n, most, QuotaWindow.Hours(), until.Format(time.RFC3339)),
			Fix:        fmt.Sprintf("see what makes so many namespaces there; if it needs them: nsalloc pool policy set host-quota=%d", 2*most),
			RetryAfter: min(max(until.Sub(now), minQuotaWait), maxQuotaWait)}
	}
	q.Used += n
	return q, nil
}
