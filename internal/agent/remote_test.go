package agent

import (
	"context"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// TestUnknownStays: a try that may have taken effect is not made undone by a later one that certainly
// has not; a decision settles it.
func TestUnknownStays(t *testing.T) {
	for name, c := range map[string]struct {
		errs []error
		want alloc.Reason
	}{
		"then away":    {[]error{alloc.ErrUnknownOutcome, alloc.ErrUnavailable}, alloc.ReasonUnknownOutcome},
		"then refused": {[]error{alloc.ErrUnknownOutcome, alloc.ErrWrongState}, alloc.ReasonWrongState},
		"then done":    {[]error{alloc.ErrUnknownOutcome, nil}, ""},
		"away":         {[]error{alloc.ErrUnavailable, alloc.ErrUnavailable}, alloc.ReasonUnavailable},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		tries := 0
		_, err := sent(ctx, "Release", func(string) (struct{}, error) {
			err := c.errs[tries]
			if tries++; tries == len(c.errs) {
				cancel()
			}
			return struct{}{}, err
		})
		cancel()
		if alloc.ReasonOf(err) != c.want || (err == nil) != (c.want == "") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
