package agent

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// helloPause is the pause between two tries to reach the pool, and between two looks at its record. Tests set
// a shorter one, as settlePause.
var helloPause = time.Second

// rereadAfter is how old our copy of the pool's records may get. It is kept by every answer; reading it
// anew finds what an answer that was lost, and a request that got through late, have changed.
var rereadAfter = 30 * time.Second

const (
	// callTimeout bounds a call to the pool that nobody waits for with a deadline of their own.
	callTimeout = 5 * time.Second
)

// stayJoined says Hello until it is answered, reads what is ours, and from then on keeps an eye on
// the pool's record.
func (a *Agent) stayJoined(ctx context.Context) error {
	t := time.NewTicker(helloPause)
	defer t.Stop()
	for {
		if err := a.state.whole(); errors.Is(err, errStateGone) {
			return err // nothing can be promised any more
		}
		err := a.lookAtPool(ctx)
		if down := a.registrar.fence.down.Load(); down != nil {
			err = down // also where it was fenced during the look
		}
		if err != nil && ctx.Err() == nil {
			a.noteTrouble(err)
			if a.registrar.usable.Load() {
				a.aloneOnce.Do(func() { close(a.alone) })
			}
		} else if err == nil && a.trouble.Swap(nil) != nil {
			a.log.Info("the pool is reached again")
			a.reached.tell()
			a.sweepSoon()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// noteTrouble has what needs the pool wait until it was looked at with success.
func (a *Agent) noteTrouble(err error) {
	text := err.Error()
	old := a.trouble.Swap(&text)
	if old == nil {
		a.lost.tell()
	}
	if a.registrar.fence.down.Load() != nil {
		return // and that was said
	}
	if old == nil || *old != text {
		a.log.Warn("the pool is not reached; what needs it waits, and new namespaces get provisional serials", "cause", err)
	}
}

// whileReached bounds what waits for the pool: by a time, and by the news that the pool is not reached.
func (a *Agent) whileReached(ctx context.Context, within time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(ctx, within)
	lost := a.lost.next()
	go func() {
		select {
		case <-lost:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// askStore makes sure that the store answers: a server has the pool's record without it.
func (a *Agent) askStore(ctx context.Context) error {
	if _, _, err := a.pool.Sandbox(ctx, 1<<48|1); unreached(err) { // no matter whether there is one
		return err
	}
	return nil
}

// lookAtPool keeps the registrar's turn free while nobody answers.
func (a *Agent) lookAtPool(parent context.Context) error {
	ctx, cancel := context.WithTimeout(parent, callTimeout)
	defer cancel()
	pool, err := a.pool.GetPool(ctx)
	if err == nil && a.trouble.Load() != nil {
		err = a.askStore(ctx)
	}
	if err != nil {
		return err
	}
	r := a.registrar
	if a.isJoined() && !r.stale.Load() && r.age() <= rereadAfter {
		known := a.poolRec.Swap(pool)
		if known == nil || known.Generation == pool.Generation {
			return a.commitProvisional(parent)
		}
		// Our ranges ended with their generation. To learn that from a refusal would cost a dump its veto.
		a.log.Warn("the pool is in another generation; this host's ranges are burned, and it asks for new ones", "old", known.Generation, "new", pool.Generation)
		r.stale.Store(true) // until it has joined anew: this look is the only one that sees the change
	}
	if !pool.IsSettled() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(parent, commitTimeout) // all that lives here may have to be registered again
		defer cancel()
	}
	if err := r.join(ctx); err != nil {
		return err
	}
	return a.commitProvisional(parent)
}

// commitTimeout bounds one try to commit what is provisional, or to register again what lives here: a full range takes
// that long on a slow store. Of the first each transaction has its own bound.
const commitTimeout = 30 * time.Second

// commitProvisional commits what is provisional, if anything is.
func (a *Agent) commitProvisional(ctx context.Context) error {
	if a.registrar.uncommitted.Load() == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, commitTimeout)
	defer cancel()
	done, err := a.registrar.holdAway(ctx)
	if err != nil {
		return err
	}
	defer done()
	return a.registrar.catchUp(ctx)
}

// away reports whether the pool was not reached when it was looked for last.
func (a *Agent) away() bool { return a.trouble.Load() != nil }

// waitReached waits until the pool is reached and the agent knows its sandboxes.
func (a *Agent) waitReached(ctx context.Context) error {
	for {
		reached := a.reached.next()
		if a.trouble.Load() == nil {
			return a.waitJoined(ctx)
		}
		select {
		case <-reached:
		case <-ctx.Done():
			return a.notReached()
		}
	}
}

func (a *Agent) isJoined() bool {
	select {
	case <-a.joined:
		return true
	default:
		return false
	}
}

// waitJoined waits until the agent knows its sandboxes.
func (a *Agent) waitJoined(ctx context.Context) error {
	select {
	case <-a.joined:
		return nil
	case <-ctx.Done():
		return a.notReached()
	}
}

func (a *Agent) notReached() error {
	cause := "no server has answered yet"
	if t := a.trouble.Load(); t != nil {
		cause = *t
	}
	return &alloc.Error{Reason: alloc.ReasonUnavailable, Subject: "host " + a.cfg.Host, Msg: "the agent has not reached its pool",
		Fix: "see that nsalloc-server runs and that `server` in agent.yaml names it", Err: errors.New(cause)}
}

// notice wakes all who wait for something that comes again and again.
type notice struct {
	mu sync.Mutex
	ch chan struct{} // guarded by mu: closed at the next tell
}

func (n *notice) next() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ch == nil {
		n.ch = make(chan struct{})
	}
	return n.ch
}

func (n *notice) tell() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ch != nil {
		close(n.ch)
		n.ch = nil
	}
}
