package client

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/google/uuid"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

const (
	firstPause = 20 * time.Millisecond
	maxPause   = 2 * time.Second
	// renewAfter is when a request id is drawn anew that certainly had no effect: well before servers
	// call it expired.
	renewAfter = alloc.RequestLife / 2
)

// NewRequestID draws the id of one intent: a UUIDv7.
func NewRequestID() string {
	id, err := uuid.NewV7()
	if err != nil {
		panic(err) // the system's random numbers failed; crypto/rand ends the process by itself
	}
	return id.String()
}

// Reason is the stable name of why a call was refused, "" where err has none.
func Reason(err error) string { return string(alloc.ReasonOf(err)) }

// Retry makes a mutation happen: it calls do with a request id, and again with the same one while the
// outcome is unknown, the server or its store is away, or others were faster; until ctx ends. Between
// two tries it waits as long as the refusal asks for, or longer each time. An answer of the pool is
// returned as it is: it is final, also for the tries before it.
//
// A try whose outcome is unknown leaves it unknown until a later one is answered: that the last try never
// left this host says nothing of the first. So what is returned without an answer matches
// alloc.ErrUnknownOutcome if any try did, whatever came after it, and then the mutation may have happened,
// or may yet: RetryID with the id that the error's text names finds out. If it does not match, nothing
// changed. When it was ctx that ended the error has its cause in its chain as well; it is that cause
// alone only where no try was made.
//
// An id that certainly had no effect is drawn anew before servers call it expired.
func Retry(ctx context.Context, do func(requestID string) error) error {
	return retry(ctx, NewRequestID(), true, do)
}

// RetryID is Retry under an id that the caller keeps, so that a mutation whose outcome is unknown can
// be settled later, also by another process. The id is never drawn anew.
func RetryID(ctx context.Context, requestID string, do func(requestID string) error) error {
	return retry(ctx, requestID, false, do)
}

func retry(ctx context.Context, id string, mayRenew bool, do func(string) error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var unknown error // of the last try under id whose outcome is
	drawn, pause := time.Now(), firstPause
	for {
		err := do(id)
		switch {
		case errors.Is(err, alloc.ErrUnknownOutcome):
			unknown, mayRenew = err, false // it may stand in the store under this id
		case err == nil || answers(err):
			return err
		}
		if !Again(err) {
			return open(id, unknown, err)
		}
		// Half to all of the pause, so that callers who were refused together part.
		wait := pause/2 + rand.N(pause/2+1)
		pause = min(2*pause, maxPause)
		if e, ok := errors.AsType[*alloc.Error](err); ok {
			wait = max(wait, e.RetryAfter)
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
		if ctx.Err() != nil { // also when both had come
			return fmt.Errorf("%w (gave up: %w)", open(id, unknown, err), context.Cause(ctx))
		}
		if mayRenew && time.Since(drawn) > renewAfter {
			id, drawn = NewRequestID(), time.Now()
		}
	}
}

// open is the error of a request that was not answered, the last try of which ended in err.
func open(id string, unknown, err error) error {
	switch {
	case unknown == nil:
		return err
	case errors.Is(err, alloc.ErrUnknownOutcome):
		return fmt.Errorf("request %s: %w", id, err)
	}
	return fmt.Errorf("request %s: %w (the last try: %w)", id, unknown, err)
}

// answers reports whether err is what the pool decided about the request, having looked for what earlier
// tries of it did. Who was turned away before that learned nothing of them.
func answers(err error) bool {
	switch alloc.ReasonOf(err) {
	case "", alloc.ReasonCaller, alloc.ReasonPoolMissing, alloc.ReasonFormat, alloc.ReasonMalformed:
		return false
	}
	return !Again(err)
}

// Again reports whether the same request, under the same id, can succeed a moment later without
// anybody doing anything about it.
func Again(err error) bool {
	e, ok := errors.AsType[*alloc.Error](err)
	if !ok {
		return false
	}
	switch e.Reason {
	case alloc.ReasonUnknownOutcome, alloc.ReasonUnavailable, alloc.ReasonConflict, alloc.ReasonRecovering:
		return true
	case alloc.ReasonExhausted: // a server's queue, not the pool's serials or a host's quota
		return e.RetryAfter > 0 && e.RetryAfter <= maxPause
	}
	return false
}
