package agent

import (
	"encoding/json"
	"maps"
	"slices"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// addDeeds adds to what lives here what was done here last with sandboxes that do not, as far as the records of runs go:
// a dump that was answered 0, so that its images are known; or a restore, so that nobody goes on from the same images
// once more. Of a sandbox that lives in the middle of a dump it says that too.
func (a *Agent) addDeeds(items []alloc.AgainItem, g alloc.Generation, done map[alloc.Serial]bool) []alloc.AgainItem {
	at := map[alloc.Serial]int{}
	for i, it := range items {
		at[it.Sandbox] = i
	}
	last := map[alloc.Serial]runRecord{}
	for _, rec := range a.runs.list() {
		dumped := rec.Phase == criuhook.Dump && rec.Checkpoint != 0 && len(rec.Dumped) > 0 && (rec.Over.IsZero() || rec.Evidence != "")
		if rec.Mode != modeOwn || !rec.ZeroGiven || rec.Sandbox == 0 || rec.Epoch.Generation() >= g || done[rec.Sandbox] || !dumped && rec.Phase != criuhook.Restore {
			continue
		}
		if known := last[rec.Sandbox]; rec.Epoch > known.Epoch || rec.Epoch == known.Epoch && rec.Phase == criuhook.Dump {
			last[rec.Sandbox] = rec
		}
	}
	for _, serial := range slices.Sorted(maps.Keys(last)) {
		rec := last[serial]
		i, lives := at[serial]
		if lives && (items[i].Epoch != rec.Epoch || rec.Phase != criuhook.Dump) {
			continue
		}
		if !lives {
			it := alloc.AgainItem{Sandbox: serial, Epoch: rec.Epoch, Checkpoint: rec.Checkpoint, Over: true}
			if rec.Phase == criuhook.Dump {
				var s alloc.Sandbox
				if err := json.Unmarshal(rec.Dumped, &s); err != nil || s.Serial != serial || s.Epoch != rec.Epoch {
					continue // nobody wrote that; the images are unknown then
				}
				it = alloc.AgainItem{Sandbox: serial, Epoch: s.Epoch, Bindings: s.Bindings, Labels: s.Labels, Checkpoint: s.Checkpoint, Parent: s.Parent, Created: s.Created}
			}
			i, items = len(items), append(items, it)
		}
		if rec.Phase == criuhook.Dump {
			items[i].Dump = &alloc.AgainDump{Checkpoint: rec.Checkpoint, RunID: rec.RunID, Digest: rec.Manifest}
		}
	}
	return items
}
