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
// two tries it waits as long as the refusal asks for, or longer each time. Any other error of do is
// returned as it is.
//
// When ctx ends the last error is returned, with ctx's cause in its chain. If that is
// alloc.ErrUnknownOutcome, the mutation may have happened: keep the id (RetryID) to ask later.
func Retry(ctx context.Context, do func(requestID string) error) error {
	return retry(ctx, NewRequestID(), true, do)
}

// RetryID is Retry under an id that the caller keeps, so that a mutation whose outcome is unknown can
// be settled later, also by another process.
func RetryID(ctx context.Context, requestID string, do func(requestID string) error) error {
	return retry(ctx, requestID, false, do)
}

func retry(ctx context.Context, id string, mayRenew bool, do func(string) error) error {
	drawn, pause := time.Now(), firstPause
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		err := do(id)
		if !Again(err) {
			return err
		}
		if errors.Is(err, alloc.ErrUnknownOutcome) {
			mayRenew = false // it may stand in the store under this id
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
			return fmt.Errorf("%w (gave up: %w)", err, context.Cause(ctx))
		}
		if mayRenew && time.Since(drawn) > renewAfter {
			id, drawn = NewRequestID(), time.Now()
		}
	}
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
	case alloc.ReasonExhausted: // a server's queue, not the pool's serials
		return e.RetryAfter > 0
	}
	return false
}
