package agent

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Two machines of one host name, both alive: a disk or a machine that was copied, or a name that was given twice.
// Each begins a life of the host, which fences the other's. To fence each other for ever would leave none at work.
//
//	at work --another life takes its place--> at work, in a life of its own
//	at work --and once more, within fenceWindow--> down: the other one is alive
//	down --the other one was silent between two looks--> at work, in a life of its own
//
// A host whose state was put back or lost while its agent ran is alone: what has fenced it is what it was itself, which
// is not there any more. So it is fenced once, and comes back at once. Whoever is fenced a second time was fenced after it
// had begun its own life, by somebody who runs now. Of several the one that said the last Hello goes on, and nobody is
// down without having been fenced after its last Hello: so one is left at work, whatever the order.
//
// While it is down an agent says nothing to the pool, gives no serials, keeps what is on its disk, and looks at the
// host's record from time to time. One that has been fenced and is at work says Hello in a way that shows there
// (contendedLabel), as often as it reads the pool's records anew.
//
// Provisional serials are renumbered by who lost its life, each time; what is committed is by nobody.
const (
	// fenceWindow is for how long it counts that this agent was fenced.
	fenceWindow = 10 * time.Minute
	// contendedLabel is a label of a host whose agent was fenced while it was at work: when it has read the pool's
	// records last since then.
	contendedLabel = "contended-at"
)

// firstLook is the pause before a fenced agent looks whether the other one is alive, and lastLook what it doubles to.
// The other one shows itself each rereadAfter.
var (
	firstLook = time.Minute
	lastLook  = 10 * time.Minute
)

// fence is what a registrar knows of other lives of its host; all of it but what readers see by the holder of the turn.
type fence struct {
	last      time.Time         // when this agent was fenced last; zero before
	life      alloc.Incarnation // which it had then
	contended bool              // it was down once: another one is about

	looked alloc.Incarnation // the life at work, and its last Hello, at the last look; 0 before the first
	hello  time.Time
	next   time.Time // when to look again
	pause  time.Duration

	times atomic.Uint64               // how often this agent was fenced, for readers
	down  atomic.Pointer[alloc.Error] // why it is down, for readers; nil while it is not
}

// fenced notes that another life of this host has taken the place of this one while it was at work, and reports whether
// the other one is alive. A life is fenced once, however many of its commands find that out.
func (f *fence) fenced(life alloc.Incarnation, now time.Time) (alive bool) {
	if life == f.life {
		return false
	}
	alive = f.contended || !f.last.IsZero() && now.Sub(f.last) < fenceWindow
	f.last, f.life = now, life
	f.times.Add(1)
	return alive
}

// standDown has this agent do nothing any more until the other one is gone; by the holder.
func (r *registrar) standDown(cause error) {
	f := &r.fence
	f.contended, f.looked = true, 0
	f.pause, f.next = firstLook, time.Now().Add(firstLook)
	err := &alloc.Error{Reason: alloc.ReasonStaleIncarnation, Subject: "host " + r.a.cfg.Host,
		Msg: fmt.Sprintf("two agents of this name are alive; this one was fenced again after it had begun a life of its own, so the other one goes on and this one does nothing: no namespace here is numbered, dumps and restores are vetoed (%s)", alloc.ReasonOf(cause)),
		Fix: "give one of the two machines another host name (host in agent.yaml) and an empty state directory, and start its agent again; when the other one is gone for good, this one goes on by itself, or when it is started again"}
	f.down.Store(err)
	r.a.log.Error("this agent is down", "cause", err)
	r.a.noteTrouble(err)
}

// stayDown is why this agent is to say nothing to the pool; nil when it may. By the holder.
func (r *registrar) stayDown(ctx context.Context) error {
	f := &r.fence
	down := f.down.Load()
	if down == nil {
		return nil
	}
	if time.Now().Before(f.next) {
		return down
	}
	host, err := r.a.pool.Host(ctx, r.a.cfg.Host)
	if err != nil {
		return down // nothing is known of the other one
	}
	if f.looked == host.Incarnation && f.hello.Equal(host.Hello) {
		r.a.log.Warn("the other agent of this name is silent; this one goes on in its place", "incarnation", host.Incarnation, "hello", host.Hello)
		f.down.Store(nil)
		return nil
	}
	f.looked, f.hello = host.Incarnation, host.Hello
	f.pause = min(2*f.pause, lastLook)
	f.next = time.Now().Add(f.pause)
	r.a.log.Error("this agent is down still", "cause", down, "next_look_in", f.pause)
	return down
}

// labels are what the next Hello says of this host.
func (r *registrar) labels() map[string]string {
	if r.fence.times.Load() == 0 {
		return r.a.cfg.Labels
	}
	labels := maps.Clone(r.a.cfg.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	labels[contendedLabel] = time.Now().UTC().Format(time.RFC3339Nano)
	return labels
}

// shared reports whether somebody else works in this very life: a copy of this agent's state that has its nonce. Then
// its serials were spent, or others granted, by nobody here. An operator can have burned them all. By the holder, with
// what the pool says is left.
func (r *registrar) shared(left alloc.Ranges, pool *alloc.Pool) bool {
	known := r.a.poolRec.Load()
	return !r.unsure && !r.granting && len(left) > 0 && known != nil && known.Generation == pool.Generation && !slices.Equal(left, r.ranges)
}
