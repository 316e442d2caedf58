package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"go.yaml.in/yaml/v3"
)

// formats are the values of -o.
var formats = []string{"table", "wide", "json", "yaml", "name"}

// answer is what a verb has to say, in every form that somebody can ask for.
type answer struct {
	doc   any           // for json and yaml: one of the structs of views.go
	table func() *table // for table and wide
	lines string        // instead of a table
	names []string      // for name: one a line, what other commands take as an argument
	// around the table, for people
	before string
	after  string
	empty  string // instead of a table without rows
}

func (c *cli) wide() bool { return c.output == "wide" }

func (c *cli) print(a answer) error {
	switch c.output {
	case "json":
		e := json.NewEncoder(c.out)
		e.SetEscapeHTML(false)
		e.SetIndent("", "  ")
		return e.Encode(a.doc)
	case "yaml":
		return writeYAML(c.out, a.doc)
	case "name":
		for _, n := range a.names {
			if _, err := fmt.Fprintln(c.out, n); err != nil {
				return err
			}
		}
		return nil
	}
	if a.before != "" {
		fmt.Fprintln(c.out, a.before)
	}
	if a.table == nil {
		_, err := io.WriteString(c.out, a.lines)
		return err
	}
	t := a.table()
	if len(t.rows) == 0 && a.empty != "" {
		// Not on standard output: a script that counts lines must not count this one.
		fmt.Fprintln(c.err, a.empty)
		return nil
	}
	if err := c.printTable(t); err != nil {
		return err
	}
	if a.after != "" {
		fmt.Fprintln(c.out, a.after)
	}
	return nil
}

// writeYAML goes through JSON, so that both have the same names, order and strings: a serial such as
// 0001000000000007 stays quoted, or a reader would take it for a number.
func writeYAML(w io.Writer, doc any) error {
	b, err := json.Marshal(doc)
	if err != nil {
		return err
	}
	var n yaml.Node
	if err := yaml.Unmarshal(b, &n); err != nil {
		return err
	}
	blockStyle(&n)
	var out bytes.Buffer
	e := yaml.NewEncoder(&out)
	e.SetIndent(2)
	if err := e.Encode(&n); err != nil {
		return err
	}
	_, err = w.Write(out.Bytes())
	return err
}

// blockStyle drops JSON's braces and the quotes of keys. Values stay quoted as JSON has them.
func blockStyle(n *yaml.Node) {
	if n.Kind != yaml.ScalarNode && len(n.Content) > 0 {
		n.Style &^= yaml.FlowStyle
	}
	for i, sub := range n.Content {
		if n.Kind == yaml.MappingNode && i%2 == 0 {
			sub.Style = 0
		}
		blockStyle(sub)
	}
}

// age is how long ago t was, in at most two units; "-" when t is not known.
func (c *cli) age(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return span(c.now().Sub(t))
}

// span writes a duration as people say it: exact while that matters, short when not.
func span(d time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case d < time.Second: // also of a clock that is a little ahead of ours
		return "0s"
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < 10*time.Minute:
		return fmt.Sprintf("%dm%02ds", d/time.Minute, d%time.Minute/time.Second)
	case d < 3*time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 8*time.Hour:
		return fmt.Sprintf("%dh%02dm", d/time.Hour, d%time.Hour/time.Minute)
	case d < 2*day:
		return fmt.Sprintf("%dh", d/time.Hour)
	case d < 8*day:
		return fmt.Sprintf("%dd%dh", d/day, d%day/time.Hour)
	case d < 2*365*day:
		return fmt.Sprintf("%dd", d/day)
	}
	return fmt.Sprintf("%dy", d/(365*day))
}

// clock is a moment for people, where ages would not line up with a log: local, as the rest of what
// they look at.
func (c *cli) clock(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return c.local(t).Format(time.DateTime)
}

func (c *cli) local(t time.Time) time.Time { return t.In(c.now().Location()) }

// rfc3339 is a moment in JSON; nil when it is not known.
func rfc3339(t time.Time) *string {
	if t.IsZero() {
		return nil
	}
	s := t.UTC().Format(time.RFC3339Nano)
	return &s
}
