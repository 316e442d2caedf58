package alloc

import (
	"slices"
	"time"
)

// A namespace that is handed in from outside is first seen in the container that it was made for, and only
// CRIU tells, at a dump, that it does not move. It then parts from that container's sandbox: the container
// goes, the namespace stays on its host under the serial that it has.

// part takes live bindings out of a sandbox, for a later item to add.
func (w *world) part(sb *Sandbox, serials []Serial) error {
	for _, serial := range serials {
		b, ok := sb.Binding(serial)
		switch {
		case !ok:
			return refuse(ReasonBound, subject(sb), "serial %s is not of this sandbox", serial)
		case !b.Live():
			return refuse(ReasonBound, subject(sb), "serial %s is of a namespace that is gone since %s", serial, b.Gone.Format(time.RFC3339))
		case sb.OfHost:
			return refuse(ReasonWrongState, subject(sb), "it is host %s's own, and parts with nothing", sb.Owner)
		}
		w.parted[serial] = *b
		sb.Bindings = slices.DeleteFunc(sb.Bindings, func(b Binding) bool { return b.Serial == serial })
	}
	if len(serials) > 0 {
		// Images from before have what is of another sandbox now: they can become a clone of this one, and
		// never be it again. It was about to be dumped, so it runs, and a restore that made it has nothing to
		// give back.
		sb.Checkpoint, sb.Claim = 0, nil
	}
	return nil
}

// join proves that what was parted with is added as what it was, and keeps what was known of it.
func (w *world) join(sb *Sandbox) error {
	for i, b := range sb.Bindings {
		was, ok := w.parted[b.Serial]
		if !ok {
			continue
		}
		if b.Type != was.Type || b.Kernel != was.Kernel {
			return refuse(ReasonBound, subject(sb), "serial %s is parted with as another namespace's", b.Serial)
		}
		sb.Bindings[i] = was
	}
	return nil
}
