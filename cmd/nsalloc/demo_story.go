package main

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// stage is where the story happens: on hosts with CRIU, or in a simulation. The serials are real on both.
type stage interface {
	words() wording
	// run starts the container on host a; dump ends it there and keeps its images; move brings them to b,
	// where restore makes a container of them, as often as one likes.
	run(context.Context) (detail string, err error)
	dump(context.Context) (detail string, err error)
	move(context.Context) (detail string, err error)
	restore(ctx context.Context, id string) (detail string, err error)
	// look sees a container's namespaces. count is how far its workload has come, once that is beyond
	// least; 0 on a stage without one.
	look(ctx context.Context, host, id string) (look, error)
	count(ctx context.Context, host, id string, least int) (int, error)
	// history and check let c write what `nsalloc serial history` and `nsalloc check` do.
	history(ctx context.Context, c *cli, serial alloc.Serial) error
	check(ctx context.Context, c *cli) error
}

// wording is what the steps are called on a stage: a simulation must not claim what it does not do.
type wording struct {
	run, dump, move, restore, again string
}

const (
	demoContainer = "counter"
	demoClone     = "counter-2"
)

// How far the container counts, ten a second, before it is dumped and after it was restored: enough to tell
// going on from beginning anew.
const (
	countOnA = 19
	countOnB = 4
)

// told is what the story has shown.
type told struct {
	namespaces, sameInodes int
	weak                   bool // this kernel has no kernel ids
	history                alloc.Serial
}

// tell tells the story: run, look, move, look again, clone, look back.
func (c *cli) tell(ctx context.Context, s *screen, st stage) (told, error) {
	w := st.words()
	var before, after, clone look
	var seen int
	err := s.step(ctx, w.run, func(ctx context.Context) (detail string, err error) {
		if detail, err = st.run(ctx); err == nil {
			before, err = st.look(ctx, "a", demoContainer)
		}
		return detail, err
	})
	if err != nil {
		return told{}, err
	}
	s.say(stylePlain, "", "Its namespaces, by the kernel's numbers and by nsalloc's, the serial:", "")
	fmt.Fprint(s.out, tableText(tableOf(before), s.paint, s.width))
	s.say(stylePlain, "")

	s.doing("the container counts")
	if seen, err = st.count(ctx, "a", demoContainer, countOnA); err != nil {
		return told{}, s.done("the container counts on a", "", time.Now(), err)
	}
	if err := s.step(ctx, w.dump, st.dump); err != nil {
		return told{}, err
	}
	if err := s.step(ctx, w.move, st.move); err != nil {
		return told{}, err
	}
	err = s.step(ctx, w.restore, func(ctx context.Context) (detail string, err error) {
		if detail, err = st.restore(ctx, demoContainer); err == nil {
			after, err = st.look(ctx, "b", demoContainer)
		}
		return detail, err
	})
	if err != nil {
		return told{}, err
	}
	if err := c.showMoved(ctx, s, st, before, after, seen); err != nil {
		return told{}, err
	}

	err = s.step(ctx, w.again, func(ctx context.Context) (detail string, err error) {
		if detail, err = st.restore(ctx, demoClone); err == nil {
			clone, err = st.look(ctx, "b", demoClone)
		}
		return detail, err
	})
	if err != nil {
		return told{}, err
	}
	if err := checkClone(before, clone); err != nil {
		return told{}, err
	}
	s.say(stylePlain, "", "Two containers must not have one identity. The second one is a clone: its serials are fresh, their parents are on record.", "")
	fmt.Fprint(s.out, tableText(cloneTable(clone), s.paint, s.width))

	t := told{namespaces: len(before.own()), sameInodes: sameInodes(before, after), weak: before.own()[0].kernel.Weak, history: shownSerial(after)}
	return t, c.lookBack(ctx, s, st, t.history)
}

func (c *cli) showMoved(ctx context.Context, s *screen, st stage, before, after look, seen int) error {
	if err := checkMoved(before, after); err != nil {
		return err
	}
	s.say(stylePlain, "")
	if seen > 0 {
		s.doing("the container counts")
		now, err := st.count(ctx, "b", demoContainer, seen+countOnB)
		if err != nil {
			return s.done("the container counts on b", "", time.Now(), err)
		}
		s.clear()
		s.say(stylePlain, fmt.Sprintf("It went on where it was: it had counted to %d on a, and is at %d on b.", seen, now))
		s.say(stylePlain, "Its namespaces before and after:")
	} else {
		s.say(stylePlain, "Its namespaces before and after:")
	}
	s.say(stylePlain, "")
	fmt.Fprint(s.out, besides(before, after, s.paint, s.width))
	for _, line := range hostsOwn(before, after, s.width) {
		s.line(styleDim, line)
	}
	s.say(stylePlain, "")
	return nil
}

// lookBack shows the history of one serial and the outcome of check, as the commands of that name do.
func (c *cli) lookBack(ctx context.Context, s *screen, st stage, serial alloc.Serial) error {
	for _, command := range []struct {
		line string
		do   func(context.Context, *cli) error
	}{
		{"nsalloc serial history " + serial.String(), func(ctx context.Context, c *cli) error { return st.history(ctx, c, serial) }},
		{"nsalloc check", st.check},
	} {
		s.say(stylePlain, "")
		s.say(styleHead, "$ "+command.line)
		// Their tables fit, their sentences are as long as they are.
		var out bytes.Buffer
		as := *c
		as.out, as.output = &out, "table"
		err := command.do(ctx, &as)
		for line := range strings.Lines(out.String()) {
			line = strings.TrimRight(line, "\n")
			if columns(line) > s.width && !strings.Contains(line, "  ") { // a table's stays as it is
				line = wrap(line, s.width, 0)
			}
			fmt.Fprintln(s.out, s.accent(line))
		}
		if err != nil {
			return &stepError{command.line, err}
		}
	}
	s.say(stylePlain, "")
	return nil
}

// accent colours the verdict of check: the commands themselves colour nothing that is not for a terminal.
func (s *screen) accent(line string) string {
	const verdict = "no findings"
	return strings.ReplaceAll(line, verdict, s.paint.do(styleGood, verdict))
}

// shownSerial is the one whose history is shown: that of the network namespace, which most people know.
func shownSerial(l look) alloc.Serial {
	if s, ok := l.of(alloc.Net); ok && !s.ofHost {
		return s.serial
	}
	return l.own()[0].serial
}

// sum is what was shown, in sentences.
func (t told) sum() string {
	inodes := "their inode numbers changed"
	if t.sameInodes > 0 {
		inodes = fmt.Sprintf("%d of %d inode numbers came back by accident and name other namespaces now", t.sameInodes, t.namespaces)
	}
	ids := "their kernel ids changed (with a kernel on each machine those can coincide too)"
	if t.weak {
		ids = "this kernel has no better number (Linux 6.18 has)"
	}
	return fmt.Sprintf("The container moved and kept its %d serials, although all its namespaces are new: %s, and %s. "+
		"The same images restored again became a clone with serials of its own. "+
		"One history says which host had a namespace when.", t.namespaces, inodes, ids)
}
