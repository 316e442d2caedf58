package killpoint_test

import (
	"slices"
	"testing"

	"github.com/nsalloc/nsalloc/internal/killpoint"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// TestEveryAction: what is registered of the hook is every action that CRIU brings, and nothing else.
func TestEveryAction(t *testing.T) {
	all := killpoint.All()
	for _, s := range criuhook.Stages() {
		for _, step := range []string{"asking", "asked", "answered"} {
			if p := killpoint.Point("hook/" + string(s.Action) + "/" + step); !slices.Contains(all, p) {
				t.Errorf("%s is not registered", p)
			}
		}
	}
	if n := slices.IndexFunc(all, func(p killpoint.Point) bool { return p[:5] == "hook/" }); len(all)-n != 3*len(criuhook.Stages()) {
		t.Errorf("%d points of the hook, %d actions of three", len(all)-n, len(criuhook.Stages()))
	}
}
