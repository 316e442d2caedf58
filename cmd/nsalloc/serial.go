package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

func (c *cli) serialCommand() *cobra.Command {
	return group("serial", "Serials: what one names, and where it has been", c.serialHistoryCommand())
}

func (c *cli) serialHistoryCommand() *cobra.Command {
	var at string
	cmd := &cobra.Command{
		Use:   "history SERIAL [--at TIME]",
		Short: "Say what a serial names and on which hosts it was, when",
		Long: `Say what a serial names (a sandbox, a namespace, a checkpoint) and on which hosts it was.

A stint is the time during which one host owned it. Between two stints it was in transit: its images
lay somewhere and nothing ran.`,
		Example: `  nsalloc serial history 0001000000000008
  nsalloc serial history 8 --at 10:42        which host had it at 10:42 today?
  nsalloc serial history 8 --at 2026-07-01T10:42:00Z`,
		Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			moment, err := c.parseMoment(at)
			if err != nil {
				return err
			}
			return c.withPool(cmd.Context(), func(ctx context.Context, p *client.Client) error {
				serial, err := parseSerial(ctx, p, args[0])
				if err != nil {
					return err
				}
				return c.serialHistory(ctx, p, serial, moment)
			})
		},
	}
	cmd.Flags().StringVar(&at, "at", "", "only where it was at this `TIME`: 10:42, 10:42:05, 2026-07-01 10:42 or RFC 3339")
	return cmd
}

// wholeHistory puts the stints into s that its record keeps no more. A server that is older than the call
// has none to give; cut is true then.
func wholeHistory(ctx context.Context, p *client.Client, s *alloc.Sandbox) (cut bool, err error) {
	if len(s.Stints) > 0 && s.Stints[0].Began != alloc.BeganClaimed {
		return false, nil // it begins with the sandbox's beginning
	}
	stints, err := all(p.History(ctx, s.Serial))
	if status.Code(err) == codes.Unimplemented {
		return true, nil
	}
	if err == nil {
		s.Stints = stints
	}
	return false, err
}

func (c *cli) serialHistory(ctx context.Context, p *client.Client, serial alloc.Serial, at time.Time) error {
	found, err := p.Sandbox(ctx, serial, true)
	if err != nil {
		return err
	}
	s := found.Sandbox
	if s == nil {
		return errMissing("sandbox")
	}
	cut, err := wholeHistory(ctx, p, s)
	if err != nil {
		return err
	}
	kind, sentence := c.what(s, serial)
	stints := s.Stints
	if !at.IsZero() {
		stints = stintsAt(stints, at)
	}

	doc := struct {
		Serial           string     `json:"serial"`
		Kind             string     `json:"kind"`
		NamespaceType    string     `json:"namespace_type,omitempty"`
		Sandbox          string     `json:"sandbox"`
		State            string     `json:"state"`
		Parent           string     `json:"parent,omitempty"`         // what has been cloned: of the same kind
		ParentSandbox    string     `json:"parent_sandbox,omitempty"` // where that was
		ParentCheckpoint string     `json:"parent_checkpoint,omitempty"`
		Stints           []stintDoc `json:"stints"`
	}{Serial: serial.String(), Kind: kind, Sandbox: s.Serial.String(), State: string(s.State), Stints: []stintDoc{}}
	for _, st := range stints {
		doc.Stints = append(doc.Stints, stintView(st))
	}
	if s.Parent != nil {
		doc.ParentSandbox, doc.ParentCheckpoint = serialText(s.Parent.Sandbox), serialText(s.Parent.Checkpoint)
		doc.Parent = doc.ParentSandbox
	}
	if b, ok := s.Binding(serial); ok {
		doc.NamespaceType, doc.Parent = string(b.Type), serialText(b.Parent)
	}

	if day := c.oneDay(stints); day != "" {
		sentence += "\nTimes are of " + day + "."
	}
	a := answer{doc: doc, before: c.wrapped(sentence) + "\n", table: func() *table { return c.stintTable(stints) }}
	if len(stints) == 0 {
		a.table, a.lines = nil, c.wrapped(c.between(s.Stints, at))+"\n"
	}
	for _, st := range stints {
		a.names = append(a.names, st.Host)
	}
	if cut {
		a.after = "\n" + c.wrapped(fmt.Sprintf("These are the last %d stints; there were earlier ones, which a server of a newer version can tell.", len(s.Stints)))
	}
	return c.print(a)
}

// wrapped breaks each line of a text where the terminal ends; what is no terminal gets it as it is.
func (c *cli) wrapped(text string) string {
	most, _ := terminalWidth(c.out)
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		lines[i] = wrap(line, most, 0)
	}
	return strings.Join(lines, "\n")
}

// what says what a serial names.
func (c *cli) what(s *alloc.Sandbox, serial alloc.Serial) (kind, sentence string) {
	is := "which is " + string(s.State)
	if name := sandboxName(s); name != "" {
		is += " (" + strings.Trim(printable(name), "()") + ")"
	}
	b, ok := s.Binding(serial)
	switch {
	case serial == s.Serial:
		kind, sentence = "sandbox", fmt.Sprintf("%s is a sandbox, %s", serial, is)
	case ok:
		kind, sentence = "namespace", fmt.Sprintf("%s is the %s namespace of sandbox %s, %s", serial, b.Type, s.Serial, is)
	default:
		kind, sentence = "checkpoint", fmt.Sprintf("%s is a checkpoint of sandbox %s, %s", serial, s.Serial, is)
	}
	if ok && !b.Live() {
		sentence += fmt.Sprintf("\nThe namespace was seen gone at %s.", c.clock(b.Gone))
	}
	if ok && b.Parent != 0 {
		sentence += fmt.Sprintf("\nIt was cloned from %s.", b.Parent)
	}
	if s.Parent != nil {
		sentence += fmt.Sprintf("\nThe sandbox is a clone of %s, made from checkpoint %s.", s.Parent.Sandbox, s.Parent.Checkpoint)
	}
	return kind, sentence
}

// between says what was at a moment at which no host owned the sandbox.
func (c *cli) between(stints []alloc.Stint, at time.Time) string {
	var last *alloc.Stint
	for i, st := range stints {
		if at.Before(st.From) {
			if last == nil {
				return fmt.Sprintf("It was not there yet: host %s has it since %s.", st.Host, c.clock(st.From))
			}
			return fmt.Sprintf("No host owned it: host %s let it go at %s (%s), host %s took it at %s (%s).",
				last.Host, c.clock(last.To), last.Over, st.Host, c.clock(st.From), st.Began)
		}
		last = &stints[i]
	}
	if last == nil {
		return "It has no history."
	}
	return fmt.Sprintf("No host owned it any more: the last one was host %s, until %s (%s).", last.Host, c.clock(last.To), last.Over)
}

// stintTable shows moments and not ages: they have to line up with a log. The date is left out where all
// of them are of one day, which the line above the table then names.
func (c *cli) stintTable(stints []alloc.Stint) *table {
	titles := []string{"HOST", "EPOCH#", "FROM", "TO", "BEGAN", "ENDED", "CHECKPOINT"}
	if c.wide() {
		titles = append(titles, "ACTOR")
	}
	layout := time.DateTime
	if c.oneDay(stints) != "" {
		layout = time.TimeOnly
	}
	t := newTable(titles...)
	for _, st := range stints {
		to := in(styleGood, "now")
		if !st.To.IsZero() {
			to = in(stylePlain, c.local(st.To).Format(layout))
		}
		row := []any{st.Host, st.Epoch, c.local(st.From).Format(layout), to, st.Began, st.Over, serialText(st.Checkpoint)}
		if c.wide() {
			row = append(row, st.Actor)
		}
		t.row(row...)
	}
	return t
}

// oneDay is the day of all moments of a history, or nothing when there are several.
func (c *cli) oneDay(stints []alloc.Stint) string {
	day := ""
	for _, st := range stints {
		for _, at := range []time.Time{st.From, st.To} {
			d := c.local(at).Format(time.DateOnly)
			if at.IsZero() || d == day {
				continue
			}
			if day != "" {
				return ""
			}
			day = d
		}
	}
	return day
}

// stintsAt finds the stint that a moment is in. The first instant is in it, the last is not: at a
// hand-off's instant one host is named and not two.
func stintsAt(stints []alloc.Stint, at time.Time) []alloc.Stint {
	var found []alloc.Stint
	for _, st := range stints {
		if !at.Before(st.From) && (st.To.IsZero() || at.Before(st.To)) {
			found = append(found, st)
		}
	}
	return found
}

// parseMoment reads a time as people write it; times without a date are of today, all are local unless
// they say otherwise.
func (c *cli) parseMoment(text string) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	now := c.now()
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02 15:04:05", "2006-01-02 15:04"} {
		if t, err := time.ParseInLocation(layout, text, now.Location()); err == nil {
			return t, nil
		}
	}
	for _, layout := range []string{"15:04", "15:04:05"} {
		if t, err := time.Parse(layout, text); err == nil {
			return time.Date(now.Year(), now.Month(), now.Day(), t.Hour(), t.Minute(), t.Second(), 0, now.Location()), nil
		}
	}
	return time.Time{}, usage("time %q is none; write 10:42, 2026-07-01 10:42 or 2026-07-01T10:42:00Z", text)
}
