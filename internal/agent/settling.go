package agent

import (
	"context"
	"sync"
	"time"
)

// settlePause is the pause between two looks at what is not settled. Tests, which wait for it most of their
// time, set a shorter one before an agent runs.
var settlePause = time.Second

// secondLook is the pause between two looks that it takes to believe what only looking tells.
const secondLook = 200 * time.Millisecond

// settling is which runs somebody wants settled now. Asking never blocks and is never lost; a run is
// settled by one worker at a time, so there are at most as many workers as runs that are open.
type settling struct {
	mu    sync.Mutex
	asked map[*run]bool // guarded by mu
	busy  map[*run]bool // guarded by mu: a worker is at it
	kick  chan struct{} // holds one
}

func newSettling() settling {
	return settling{asked: map[*run]bool{}, busy: map[*run]bool{}, kick: make(chan struct{}, 1)}
}

func (s *settling) wake() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// take gives the runs that are asked for and that no worker is at.
func (s *settling) take() []*run {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []*run
	for n := range s.asked {
		if !s.busy[n] {
			delete(s.asked, n)
			s.busy[n] = true
			list = append(list, n)
		}
	}
	return list
}

func (s *settling) done(n *run) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.busy, n)
	if s.asked[n] {
		s.wake()
	}
}

// settleAsk has a run settled soon.
func (a *Agent) settleAsk(n *run) {
	a.settling.mu.Lock()
	defer a.settling.mu.Unlock()
	a.settling.asked[n] = true
	a.settling.wake()
}

// settleLoop settles what is asked for, and looks at every open run again and again, so that what could
// not be told to the pool is told later, and what nobody watches is seen all the same.
func (a *Agent) settleLoop(ctx context.Context) error {
	if err := a.waitJoined(ctx); err != nil {
		return nil // ctx ended
	}
	var workers sync.WaitGroup
	defer workers.Wait()
	t := time.NewTicker(settlePause)
	defer t.Stop()
	for _, n := range a.runs.open() {
		a.settleAsk(n) // those of an earlier life
	}
	for {
		for _, n := range a.settling.take() {
			workers.Go(func() {
				defer a.settling.done(n)
				a.settleOne(ctx, n)
			})
		}
		select {
		case <-ctx.Done():
			return nil
		case <-a.settling.kick:
		case <-t.C:
			for _, n := range a.runs.open() {
				a.settleAsk(n)
			}
			a.runs.forget()
		}
	}
}

// settleOne settles one run now; what fails is tried again by the loop.
func (a *Agent) settleOne(ctx context.Context, n *run) {
	try, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err := a.settle(try, n)
	switch {
	case ctx.Err() != nil:
	case err == nil:
		n.trouble = ""
	case n.trouble != err.Error(): // once, not every second
		n.trouble = err.Error()
		a.log.Warn("a run is not settled yet", "run", n.key, "cause", err)
	}
}

// twice reports whether what was seen of a run is what was seen a moment before already; else it has the
// run looked at once more. By the holder of the run's turn.
func (a *Agent) twice(n *run, seen fate) bool {
	if n.seen != seen {
		n.seen, n.seenSince = seen, time.Now()
		a.lookAgain(n)
		return false
	}
	return time.Since(n.seenSince) >= secondLook
}

// lookAgain has a run looked at once more in a moment, sooner than the loop comes by.
func (a *Agent) lookAgain(n *run) {
	if !n.again.Swap(true) {
		time.AfterFunc(secondLook, func() {
			n.again.Store(false)
			a.settleAsk(n)
		})
	}
}
