package agent

import (
	"context"
	"fmt"
	"slices"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// The books are the book, the ranges, and what is pending. Who holds the registrar's turn has them too, but while it
// waits for an answer of the pool that others need not wait for: then they are lent, to who gives provisional serials. So
// nobody who does not wait for the pool waits for one who does.
//
// What is asked for in that answer (flying) has its serials assigned already, and who gets the books first makes it
// pending: nobody gives any of it a second serial, and all that is given is spent after it. A command that spends
// nothing, or reads, has nothing flying.
//
// What is pending when the answer comes was given meanwhile. The holder commits it before it spends again.

// holdBooks takes the books, to give provisional serials.
func (r *registrar) holdBooks(ctx context.Context) (func(), error) {
	select {
	case <-r.books:
	case <-ctx.Done():
		return nil, fmt.Errorf("another registration is under way: %w", context.Cause(ctx))
	}
	done := func() {
		r.keep()
		r.books <- struct{}{}
	}
	if len(r.flying) > 0 && r.usable.Load() {
		if err := r.append(r.flying); err != nil {
			done()
			return nil, err
		}
		r.flying = nil
	}
	return done, nil
}

// lend asks the pool for something without the books; by the holder.
func (r *registrar) lend(ask func()) {
	if r.firm {
		ask()
		return
	}
	r.books <- struct{}{}
	defer func() { <-r.books }()
	ask()
}

// commitFirmly commits what was given while this turn asked the pool for something, and lends nothing to anybody: what
// the holder knows of who has no serial yet still holds afterwards.
func (r *registrar) commitFirmly(ctx context.Context) error {
	if len(r.pending) == 0 {
		return nil
	}
	r.firm = true
	defer func() { r.firm = false }()
	return r.commitPending(ctx)
}

// canWait reports whether the wishes can be provisional.
func canWait(wishes []wish) bool {
	return !slices.ContainsFunc(wishes, func(w wish) bool { return !w.keeps || len(w.add) == 0 })
}

// commitQueued commits what is pending, entries at its end, and returns their sandboxes.
func (r *registrar) commitQueued(ctx context.Context, entries []entry) ([]*alloc.Sandbox, error) {
	if err := r.commitPending(ctx); err != nil {
		return nil, err
	}
	out := make([]*alloc.Sandbox, len(entries))
	for i, e := range entries {
		s := r.a.book.sandbox(e.Sandbox)
		if s != nil {
			_, ok := s.Binding(e.Add[0].Serial)
			if ok {
				out[i] = s
				continue
			}
		}
		return nil, &alloc.Error{Reason: alloc.ReasonConflict, Subject: "host " + r.a.cfg.Host,
			Msg: "the pool refused a registration that others had been told of as provisional; what it was of gets other serials", Fix: "ask again"}
	}
	return out, nil
}
