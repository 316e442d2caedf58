package main

import (
	"bytes"
	"context"
	"io"
	"strings"
	"testing"
)

func TestAsk(t *testing.T) {
	for in, want := range map[string]bool{"y\n": true, " Yes\n": true, "y": true, "n\n": false, "\n": false, "": false, "yo\n": false} {
		c := &cli{in: strings.NewReader(in), out: io.Discard}
		if got, err := c.ask(t.Context(), "Write?"); err != nil || got != want {
			t.Errorf("%q: %t, %v", in, got, err)
		}
	}
}

// TestAskEnds: nobody answers, and ^C comes.
func TestAskEnds(t *testing.T) {
	in, _ := io.Pipe()
	defer in.Close()
	var out bytes.Buffer
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	yes, err := (&cli{in: in, out: &out}).ask(ctx, "Write?")
	if f := explain(err); yes || f.code != exitError || f.message != "interrupted; nothing was written" {
		t.Errorf("%t, %+v", yes, f)
	}
	// An answer that was typed before counts no more.
	if yes, err := (&cli{in: strings.NewReader("y\n"), out: &out}).ask(ctx, "Write?"); yes || err == nil {
		t.Errorf("%t, %v", yes, err)
	}
}
