package alloctest

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// register puts a new sandbox where an older one was.
func (w *worker) register(ctx context.Context, at *slot, old alloc.Serial) error {
	done, err := w.h.hold(ctx)
	if err != nil {
		return err
	}
	defer done()
	spend, ok, err := w.take(ctx, 2)
	if err != nil || !ok {
		return err
	}
	s := slices.Collect(spend.All())
	cmd := alloc.RegisterCommand{Mutation: w.mutation(), Spend: spend, Items: []alloc.RegisterItem{{
		Sandbox: s[0], Add: []alloc.Binding{{Serial: s[1], Type: alloc.PID, Kernel: w.h.kernel("born", s[1])}}}}}
	in := asked{s[0], w.command(cmd.Mutation, "new")}
	out, err := w.tell(ctx, in, func(ctx context.Context) (*Seen, error) {
		got, _, err := w.Register(ctx, cmd)
		if err != nil {
			return nil, err
		}
		return See(got[0], nil), nil
	}, spend)
	if err != nil || out.answer != Done {
		return err
	}
	w.h.c.namespaces.Store(s[0], s[1])
	at.mu.Lock()
	defer at.mu.Unlock()
	if at.serial == old {
		at.serial = s[0]
	}
	return nil
}

func (w *worker) command(m alloc.Mutation, what string) Command {
	return Command{What: what, Host: m.Host, Life: int(uint64(m.Incarnation) & alloc.MaxCounter)}
}

// tell makes a call and records it. What it spends is off the host's ranges then; by the holder of
// spending.
func (w *worker) tell(ctx context.Context, in asked, call func(ctx context.Context) (*Seen, error), spend alloc.Ranges) (told, error) {
	var out told
	began := w.h.c.clock.Add(1)
	answer, err := w.ask(ctx, func(ctx context.Context) (err error) { out.seen, err = call(ctx); return err })
	if out.answer = answer; err != nil {
		return out, fmt.Errorf("%s: %w", in, err)
	}
	client := w.id
	if in.What == "claim" && answer == Answer(alloc.ReasonWrongState) && !w.h.c.strict {
		// Its transaction was committed, its answer was lost, and when it was looked for it had gone back.
		answer, out.answer = "", ""
	}
	switch {
	case answer == Answer(alloc.ReasonUnavailable), answer == Answer(alloc.ReasonConflict):
		return out, nil // nothing was changed
	case answer == Answer(alloc.ReasonRange):
		w.h.stale = true // nothing was changed: an earlier life's, or a lost one's, were spent meanwhile
		return out, nil
	case answer == "":
		client = int(w.h.c.clients.Add(1)) // this call never returns, and its worker goes on
		if len(spend) > 0 {
			w.h.stale = true
		}
	case answer == Answer(alloc.ReasonStaleIncarnation):
		w.h.outlived(in.Life)
	case answer == Done && len(spend) > 0:
		_, w.h.ranges, _ = w.h.ranges.Take(spend.Count())
	}
	if answer != Done && answer != Clone {
		out.seen = nil
	}
	w.h.c.move(client, began, in, out)
	if out.seen != nil {
		w.remember(in.sandbox, *out.seen)
	}
	return out, nil
}

// say is mostly what fits what was seen, in the name of somebody who may; and often not.
func (w *worker) say(ctx context.Context, at *slot, serial alloc.Serial, now Seen) error {
	m := w.mutation()
	likely := map[string][]string{
		"running": {"dump", "dump", "dump", "dump", "register", "release", "over"}, "dumped": {"stopped", "stopped", "ran-on"},
		"in_transit": {"claim"}, "claimed": {"bind", "bind", "release"}, "ended": {"claim"},
	}[now.State]
	c := w.command(m, likely[w.random.IntN(len(likely))])
	if w.one(6) {
		all := []string{"register", "dump", "stopped", "ran-on", "claim", "bind", "release", "over"}
		c.What = all[w.random.IntN(len(all))]
	}
	if c.What != "claim" && now.Owner != w.h.name && !w.one(6) {
		return nil // another host's turn
	}
	c.Epoch, c.Ckpt, c.Run = now.Epoch, now.Cur, fmt.Sprint(1+w.random.IntN(2))
	if w.one(8) {
		c.Epoch -= 1 + w.random.IntN(2)
	}
	if host, run, ok := strings.Cut(now.Holder, "/"); ok && host == w.h.name && c.What != "claim" && !w.one(8) {
		c.Run = run
	}
	at.mu.Lock()
	known := slices.Clone(at.ckpts[serial])
	at.mu.Unlock()
	if len(known) > 0 && w.one(6) {
		c.Ckpt = known[w.random.IntN(len(known))].String()
	}
	switch c.What {
	case "stopped":
		c.Seen = []string{"stopped", "stopped", "stopped", "in_doubt", "not_given"}[w.random.IntN(5)]
	case "ran-on":
		c.Seen = []string{"yes", "no"}[w.random.IntN(2)]
	case "register":
		c.Seen = m.RequestID
	case "claim":
		c.Forged = w.one(12)
	}
	if c.What == "dump" {
		return w.dump(ctx, at, serial, c)
	}
	call := w.call(serial, c, m)
	out, err := w.tell(ctx, asked{serial, c}, call, nil)
	if err == nil && out.answer == Done && w.one(6) {
		return w.again(ctx, asked{serial, c}, call)
	}
	return err
}

// again delivers a request once more that was answered: it must not have a second effect.
func (w *worker) again(ctx context.Context, in asked, call func(ctx context.Context) (*Seen, error)) error {
	began := w.h.c.clock.Add(1)
	var seen *Seen
	answer, err := w.ask(ctx, func(ctx context.Context) (err error) { seen, err = call(ctx); return err })
	switch {
	case err != nil:
		return fmt.Errorf("%s, again: %w", in, err)
	case answer == Done:
		w.h.c.move(w.id, began, asked{in.sandbox, Command{What: "get"}}, told{Done, seen})
	case answer == "", answer == Answer(alloc.ReasonUnavailable), answer == Answer(alloc.ReasonConflict), answer == Answer(alloc.ReasonStaleIncarnation):
	case in.What == "claim" && answer == Answer(alloc.ReasonWrongState): // it had it, and has it no more
	case in.What == "claim" && answer != Clone: // as before, or refused for what happened since
	default:
		return fmt.Errorf("%s was done, and again it is answered %s", in, answer)
	}
	return nil
}

func (w *worker) dump(ctx context.Context, at *slot, serial alloc.Serial, c Command) error {
	done, err := w.h.hold(ctx)
	if err != nil {
		return err
	}
	defer done()
	spend, ok, err := w.take(ctx, 1)
	if err != nil || !ok {
		return err
	}
	m := w.mutation()
	c.Life = w.command(m, "").Life
	ckpt := spend[0].First
	if !w.one(8) || c.Ckpt == "" { // else it is one that was recorded, or known, before
		c.Ckpt = ckpt.String()
	} else if err := ckpt.UnmarshalText([]byte(c.Ckpt)); err != nil {
		return err
	}
	if !spend.Contains(ckpt) {
		return nil // a serial that was spent before is no front of the ranges
	}
	cmd := alloc.OpenCommand{Mutation: m, Spend: spend, Sandbox: serial, Epoch: crowdEpoch(c.Epoch), Checkpoint: ckpt, RunID: c.Ckpt, Digest: alloc.Digest{1}}
	out, err := w.tell(ctx, asked{serial, c}, func(ctx context.Context) (*Seen, error) { return seeing(w.Open(ctx, cmd)) }, spend)
	if out.answer == Done { // else the serial is not spent, and may be another sandbox's checkpoint
		at.mu.Lock()
		defer at.mu.Unlock()
		at.ckpts[serial] = append(at.ckpts[serial], ckpt)
	}
	return err
}

// crowdEpoch is the n-th epoch in generation 1.
func crowdEpoch(n int) alloc.Epoch { return alloc.Epoch(1<<48 + uint64(max(n, 0))) }

func seeing(h alloc.Handoff, err error) (*Seen, error) {
	if err != nil {
		return nil, err
	}
	return See(&h.Sandbox, h.Checkpoint), nil
}

// call is the pool's side of a command that spends nothing.
func (w *worker) call(serial alloc.Serial, c Command, m alloc.Mutation) func(ctx context.Context) (*Seen, error) {
	var ckpt alloc.Serial
	_ = ckpt.UnmarshalText([]byte(c.Ckpt))
	e := crowdEpoch(c.Epoch)
	switch c.What {
	case "register":
		cmd := alloc.RegisterCommand{Mutation: m, Items: []alloc.RegisterItem{{Sandbox: serial, Epoch: e, Labels: map[string]string{label: c.Seen}}}}
		return func(ctx context.Context) (*Seen, error) {
			_, _, err := w.Register(ctx, cmd) // it answers the sandbox without its checkpoint
			return nil, err
		}
	case "stopped":
		cmd := alloc.ConfirmCommand{Mutation: m, Sandbox: serial, Epoch: e, Checkpoint: ckpt, Evidence: alloc.Evidence(c.Seen)}
		return func(ctx context.Context) (*Seen, error) { return seeing(w.Confirm(ctx, cmd)) }
	case "ran-on":
		cmd := alloc.AbortCommand{Mutation: m, Sandbox: serial, Epoch: e, Checkpoint: ckpt, ZeroGiven: c.Seen == "yes"}
		return func(ctx context.Context) (*Seen, error) { return seeing(w.Abort(ctx, cmd)) }
	case "claim":
		cmd := alloc.ClaimCommand{Mutation: m, Checkpoint: ckpt, Digest: alloc.Digest{1}, BootID: w.h.boot, Run: c.Run}
		if c.Forged {
			cmd.Digest = alloc.Digest{2}
		}
		return func(ctx context.Context) (*Seen, error) {
			got, err := w.Claim(ctx, cmd)
			if err == nil && got.Outcome == alloc.MayClone {
				return nil, errClone
			}
			return seeing(got.Handoff, err)
		}
	case "bind":
		cmd := alloc.BindCommand{Mutation: m, Sandbox: serial, Epoch: e, BootID: w.h.boot, Run: c.Run}
		if of, ok := w.h.c.namespaces.Load(serial); ok {
			ns := of.(alloc.Serial)
			cmd.Bindings = []alloc.Binding{{Serial: ns, Type: alloc.PID, Kernel: w.h.kernel(c.Run, ns)}}
		}
		return func(ctx context.Context) (*Seen, error) {
			h, _, err := w.Bind(ctx, cmd)
			return seeing(h, err)
		}
	case "release":
		cmd := alloc.ReleaseCommand{Mutation: m, Sandbox: serial, Epoch: e, BootID: w.h.boot, Run: c.Run}
		return func(ctx context.Context) (*Seen, error) { return seeing(w.Release(ctx, cmd)) }
	case "over":
		cmd := alloc.EndCommand{Mutation: m, Sandbox: serial, Epoch: e}
		return func(ctx context.Context) (*Seen, error) { _, err := w.End(ctx, cmd); return nil, err }
	}
	panic(c.What)
}

// errClone makes a clone an answer of its own.
var errClone = &alloc.Error{Reason: alloc.Reason(Clone)}
