package agent

import (
	"log/slog"
	"sync/atomic"
)

// tally counts what was numbered and what ended since it was told last: a busy host has hundreds of
// either a second, which the log has one by one at level debug.
//
// provisional counts namespaces that got a provisional serial, and void those of which it was given up: the
// first are numbered once more when they are committed. lost counts sandboxes that live here and are another
// host's, or over, by the pool's records.
type tally struct{ sandboxes, namespaces, ended, provisional, void, lost atomic.Int64 }

func (t *tally) numbered(newSandbox bool, namespaces int) {
	if newSandbox {
		t.sandboxes.Add(1)
	}
	t.namespaces.Add(int64(namespaces))
}

// tell logs the counts, if there are any, and begins anew.
func (t *tally) tell(log *slog.Logger) {
	sandboxes, namespaces, ended := t.sandboxes.Swap(0), t.namespaces.Swap(0), t.ended.Swap(0)
	if sandboxes+namespaces+ended > 0 {
		log.Info("numbered", "sandboxes", sandboxes, "namespaces", namespaces, "ended", ended)
	}
	provisional, void := t.provisional.Swap(0), t.void.Swap(0)
	if provisional+void > 0 {
		log.Warn("numbered provisionally", "namespaces", provisional, "void", void)
	}
	if lost := t.lost.Swap(0); lost > 0 {
		log.Error("sandboxes that live here have gone on elsewhere, or are over; each is a clone now", "sandboxes", lost)
	}
}
