package main

import (
	"context"
	"strings"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

func (c *cli) checkpointCommand() *cobra.Command {
	return group("checkpoint", "Checkpoints: the images of dumps, and who restored them", c.checkpointListCommand(), c.checkpointGetCommand())
}

func (c *cli) checkpointListCommand() *cobra.Command {
	var sandbox string
	cmd := &cobra.Command{
		Use:     "list [--sandbox SERIAL]",
		Short:   "List the pool's checkpoints",
		Example: "  nsalloc checkpoint list --sandbox 7",
		Args:    usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withPool(cmd.Context(), func(ctx context.Context, p *client.Client) error { return c.checkpointList(ctx, p, sandbox) })
		},
	}
	cmd.Flags().StringVar(&sandbox, "sandbox", "", "only those of this sandbox `SERIAL`")
	return cmd
}

func (c *cli) checkpointList(ctx context.Context, p *client.Client, sandbox string) error {
	var of alloc.Serial
	if sandbox != "" {
		var err error
		if of, err = parseSerial(ctx, p, sandbox); err != nil {
			return err
		}
	}
	found, err := legible(c, p.Checkpoints(ctx, of))
	if err != nil {
		return err
	}
	doc := struct {
		Checkpoints []checkpointDoc `json:"checkpoints"`
	}{[]checkpointDoc{}}
	a := answer{empty: "no checkpoints"}
	for _, cp := range found {
		doc.Checkpoints = append(doc.Checkpoints, checkpointView(cp))
		a.names = append(a.names, cp.Serial.String())
	}
	a.doc = doc
	a.table = func() *table { return c.checkpointTable(found) }
	return c.print(a)
}

func (c *cli) checkpointTable(checkpoints []*alloc.Checkpoint) *table {
	titles := []string{"SERIAL", "STATE", "SANDBOX", "SOURCE", "EPOCH#", "AGE#", "CONSUMED#", "BY"}
	if c.wide() {
		titles = append(titles, "RUN-ID", "CRIU")
	}
	t := newTable(titles...)
	for _, cp := range checkpoints {
		by, run := "", ""
		if cp.Claimant != nil {
			by, run = cp.Claimant.Host, cp.Claimant.Run
		}
		row := []any{in(styleKey, cp.Serial.String()), imageCell(cp.State), cp.Sandbox, cp.Source, cp.Epoch, c.age(cp.Created), c.age(cp.Consumed), by}
		if c.wide() {
			row = append(row, cp.RunID, run)
		}
		t.row(row...)
	}
	return t
}

func imageCell(s alloc.CheckpointState) cell {
	switch s {
	case alloc.CheckpointOpen:
		return in(styleGood, string(s))
	case alloc.CheckpointVoid:
		return in(styleBad, string(s))
	case alloc.CheckpointConsumed:
		return in(styleDim, string(s))
	}
	return in(styleWarn, string(s))
}

func (c *cli) checkpointGetCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "get SERIAL|RUN-ID",
		Short: "Show one checkpoint, by its serial or by CRIU's run id",
		Example: `  nsalloc checkpoint get 0001000000000010
  nsalloc checkpoint get 5a3b1c7e-9d1c-4f77-8c4d-0d5f0a6b2c11`,
		Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.withPool(cmd.Context(), func(ctx context.Context, p *client.Client) error { return c.checkpointGet(ctx, p, args[0]) })
		},
	}
}

func (c *cli) checkpointGet(ctx context.Context, p *client.Client, arg string) error {
	var cp *alloc.Checkpoint
	if id, err := uuid.Parse(arg); err == nil && strings.Contains(arg, "-") {
		if cp, err = p.CheckpointByRun(ctx, id.String()); err != nil {
			return err
		}
	} else {
		serial, err := parseSerial(ctx, p, arg)
		if err != nil {
			return err
		}
		if cp, err = p.Checkpoint(ctx, serial); err != nil {
			return err
		}
	}
	if cp == nil {
		return errMissing("checkpoint")
	}
	return c.printCheckpoint(cp)
}

// meanings say what one may do with the images.
var meanings = map[alloc.CheckpointState]string{
	alloc.CheckpointOpen:     "they carry the sandbox on, once its source has confirmed that it is gone",
	alloc.CheckpointCopy:     "the source ran on: restored, they make a clone or resume what is over, by the pool's policy",
	alloc.CheckpointVoid:     "the dump was vetoed: nobody may restore them as this sandbox",
	alloc.CheckpointConsumed: "a restore took the sandbox over: restored again, they make a clone or nothing, by the pool's policy",
}

func (c *cli) printCheckpoint(cp *alloc.Checkpoint) error {
	f := fields{}
	f.add("Checkpoint", in(styleKey, cp.Serial.String()))
	f.add("State", imageCell(cp.State))
	if m := meanings[cp.State]; m != "" {
		f.add("The images", m)
	}
	f.add("Sandbox", cp.Sandbox.String()+", epoch "+cp.Epoch.String())
	f.add("Source", "host "+cp.Source)
	f.add("Dumped", c.clock(cp.Created))
	if cp.Claimant != nil {
		f.add("Restored by", "CRIU run "+cp.Claimant.Run+" on host "+cp.Claimant.Host)
	}
	f.add("Consumed", c.clock(cp.Consumed))
	f.add("CRIU's run id", cp.RunID)
	f.add("Manifest", "sha256 "+cp.Digest.String())
	return c.print(answer{
		doc:   checkpointView(cp),
		names: []string{cp.Serial.String()},
		lines: c.fieldText(f),
	})
}
