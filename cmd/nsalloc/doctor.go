package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

func (c *cli) doctorCommand() *cobra.Command {
	var root string
	cmd := &cobra.Command{
		Use:   "doctor [--root DIR]",
		Short: "Look over this host: kernel, CRIU, hook, agent, server",
		Long: `Look over this host: kernel, CRIU, hook, agent, server. Every line that is not ok says what to do.

Nothing is changed. Exit code 1 when a check fails; warnings do not count.`,
		Example: `  nsalloc doctor
  nsalloc doctor -o json | jq '.checks[] | select(.status != "ok")'`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return c.doctor(cmd.Context(), hostRoot(root)) },
	}
	cmd.Flags().StringVar(&root, "root", "/", "look for the files of the host whose root is this `DIR`, and ask whom they name")
	return cmd
}

// grade is the result of one check.
type grade string

const (
	gradeOK   grade = "ok"
	gradeWarn grade = "warn"
	gradeFail grade = "fail"
	gradeSkip grade = "skip" // could not be looked at; something else says why
)

// checkup is one line of the doctor.
type checkup struct {
	Check  string `json:"check"`
	Status grade  `json:"status"`
	Seen   string `json:"seen"`
	Fix    string `json:"fix,omitempty"`
}

func good(format string, args ...any) checkup {
	return checkup{Status: gradeOK, Seen: fmt.Sprintf(format, args...)}
}

func doubtful(fix, format string, args ...any) checkup {
	return checkup{Status: gradeWarn, Fix: fix, Seen: fmt.Sprintf(format, args...)}
}

func bad(fix, format string, args ...any) checkup {
	return checkup{Status: gradeFail, Fix: fix, Seen: fmt.Sprintf(format, args...)}
}

func skipped(format string, args ...any) checkup {
	return checkup{Status: gradeSkip, Seen: fmt.Sprintf(format, args...)}
}

func (c *cli) doctor(ctx context.Context, root hostRoot) error {
	_ = c.settle(root) // "agent config" says what is wrong with the file
	ex := examination{cli: c, root: root}
	all := ex.run(ctx)
	doc := struct {
		Checks []checkup `json:"checks"`
		OK     int       `json:"ok"`
		Warn   int       `json:"warn"`
		Fail   int       `json:"fail"`
		Skip   int       `json:"skip"`
	}{Checks: all}
	a := answer{}
	for _, line := range all {
		switch line.Status {
		case gradeOK:
			doc.OK++
		case gradeWarn:
			doc.Warn++
		case gradeFail:
			doc.Fail++
			a.names = append(a.names, line.Check)
		case gradeSkip:
			doc.Skip++
		}
	}
	a.doc = doc
	a.lines = c.doctorLines(all) + "\n" + c.doctorSum(doc.Fail, doc.Warn) + "\n"
	if err := c.print(a); err != nil {
		return err
	}
	if doc.Fail > 0 {
		return silent(exitError)
	}
	return nil
}

func (c *cli) doctorSum(fails, warns int) string {
	p := c.paint(c.out)
	switch {
	case fails > 0:
		return p.do(styleBad, count(fails, "check fails", "checks fail")+", "+count(warns, "warning", "warnings"))
	case warns > 0:
		return p.do(styleWarn, "nothing fails, "+count(warns, "warning", "warnings"))
	}
	return p.do(styleGood, "this host is ready")
}

// doctorLines writes the checks as a list and not as a table: what was seen and what to do are sentences,
// which wrap where the terminal ends instead of being cut there.
func (c *cli) doctorLines(all []checkup) string {
	p := c.paint(c.out)
	styles := map[grade]style{gradeOK: styleGood, gradeWarn: styleWarn, gradeFail: styleBad, gradeSkip: styleDim}
	most, _ := terminalWidth(c.out)
	name := 0
	for _, line := range all {
		name = max(name, columns(line.Check))
	}
	var b strings.Builder
	for _, line := range all {
		margin := 6 + name + 2
		seen := wrap(printable(line.Seen), most, margin)
		fmt.Fprintf(&b, "%s  %s  %s\n", p.do(styles[line.Status], fmt.Sprintf("%-4s", line.Status)),
			line.Check+strings.Repeat(" ", name-columns(line.Check)), seen)
		if line.Fix != "" {
			const mark = "→ "
			fmt.Fprintf(&b, "%s%s%s\n", strings.Repeat(" ", margin), p.do(styles[line.Status], mark), wrap(printable(line.Fix), most, margin+2))
		}
	}
	return b.String()
}
