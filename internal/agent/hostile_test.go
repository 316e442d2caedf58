package agent

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// ticket is a checkpoint that waits to be claimed, with its genuine images.
type ticket struct {
	h          *host
	d          *dumped
	sandbox    *alloc.Sandbox
	checkpoint *alloc.Checkpoint
}

// ticket dumps a container and sees it gone.
func (h *host) ticket() *ticket {
	h.t.Helper()
	d := h.moved()
	h.settled()
	s, c := h.reaches(d.sandbox, alloc.StateInTransit)
	return &ticket{h, d, s, c}
}

// copied is a copy of the images, to be tampered with.
func (k *ticket) copied() string {
	k.h.t.Helper()
	return copyImages(k.h.t, k.d.images)
}

func copyImages(t *testing.T, from string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "images")
	if err := os.CopyFS(dir, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// refused has a restore of images vetoed at pre-restore, for a reason, with nothing changed in the store.
func (k *ticket) refused(what, images, reason string) {
	k.h.t.Helper()
	c := k.h.criu()
	answer := c.bring(criuhook.PreRestore, 0, images)
	c.end()
	if answer.Err != "" || answer.Verdict != criuhook.Veto || !strings.Contains(answer.Message, reason) {
		k.h.t.Errorf("%s: %+v, want a veto that says %q", what, answer, reason)
	}
	k.unclaimed(what)
}

// unclaimed proves that the records are what they were before.
func (k *ticket) unclaimed(what string) {
	k.h.t.Helper()
	s, c, err := k.h.pool.Sandbox(k.h.t.Context(), k.sandbox.Serial)
	if err != nil || !reflect.DeepEqual(s, k.sandbox) || !reflect.DeepEqual(c, k.checkpoint) {
		k.h.t.Errorf("%s changed the records, %v:\n%+v %+v\nwere\n%+v %+v", what, err, s, c, k.sandbox, k.checkpoint)
	}
}

// restores proves that the genuine images still restore, under the serials of before.
func (k *ticket) restores() {
	k.h.t.Helper()
	c, pid := k.h.restored(k.d.images)
	c.end()
	k.h.reaches(k.d.sandbox, alloc.StateRunning)
	after := serialsOf(k.h.serials(pid))
	for _, typ := range containerTypes {
		if after[typ] != k.d.before[typ] {
			k.h.t.Errorf("%s: %s became %s", typ, k.d.before[typ], after[typ])
		}
	}
	k.h.settled()
	k.h.consistent()
}

func (k *ticket) write(images string, text []byte) {
	k.h.t.Helper()
	if err := os.WriteFile(filepath.Join(images, criuhook.ManifestName), text, 0o600); err != nil {
		k.h.t.Fatal(err)
	}
}

// TestForgedManifests: no field can be changed, and nothing is claimed by who tries.
func TestForgedManifests(t *testing.T) {
	h := newHost(t)
	k := h.ticket()
	images := k.copied()
	m := manifestIn(t, images)
	if len(m.Namespaces) != len(alloc.NamespaceTypes()) || m.RunID == "" {
		t.Fatalf("a manifest that leaves fields out: %+v", m)
	}
	list := forge(t, m)
	if len(list) < 35 {
		t.Errorf("only %d forgeries", len(list))
	}
	for _, f := range list {
		k.write(images, f.text)
		k.refused(f.name, images, f.reason)
	}
	t.Logf("%d forged manifests", len(list))
	k.restores()
}

// TestForgedAfterClaim: what was changed between pre-restore and post-restore is refused, and the claim goes
// back.
func TestForgedAfterClaim(t *testing.T) {
	h := newHost(t)
	k := h.ticket()
	m := manifestIn(t, k.d.images)
	seen := map[string]bool{}
	var list []forgery
	for _, f := range forge(t, m) { // one of each kind
		if !seen[f.reason] {
			seen[f.reason] = true
			list = append(list, f)
		}
	}
	if len(list) < 12 {
		t.Errorf("only %d kinds of forgery", len(list))
	}
	for _, f := range list {
		images := k.copied()
		reason := f.reason
		if b, _, err := readText(f.text); err == nil && b != nil {
			reason = "were changed between pre-restore and post-restore"
		}
		k.refusedLate(f.name, images, reason, func() { k.write(images, f.text) })
	}
	images := k.copied()
	k.refusedLate("the manifest is gone", images, criuhook.ManifestName, func() {
		if err := os.Remove(filepath.Join(images, criuhook.ManifestName)); err != nil {
			t.Fatal(err)
		}
	})
	// The directory that CRIU was given by a link, which now leads to another one.
	link := filepath.Join(t.TempDir(), "link")
	one, two := k.copied(), writeImages(t, "another run", containerTypes...)
	put := func(to string) {
		if err := errors.Join(os.RemoveAll(link), os.Symlink(to, link)); err != nil {
			t.Fatal(err)
		}
	}
	put(one)
	body, err := os.ReadFile(filepath.Join(one, criuhook.ManifestName))
	if err != nil {
		t.Fatal(err)
	}
	k.write(two, body)
	k.refusedLate("the images are others", link, "were changed between pre-restore and post-restore", func() { put(two) })
	k.restores()
}

func readText(text []byte) (*criuhook.Manifest, alloc.Digest, error) {
	return criuhook.DecodeManifest(strings.NewReader(string(text)))
}

// refusedLate has a restore claim with genuine images, that are tampered with before post-restore.
func (k *ticket) refusedLate(what, images, reason string, tamper func()) {
	k.h.t.Helper()
	c := k.h.criu()
	c.passes(criuhook.PreRestore, 0, images)
	tamper()
	pid := c.tree(containerFlags, false)
	c.passes(criuhook.SetupNamespaces, pid, images)
	answer := c.bring(criuhook.PostRestore, pid, images)
	if answer.Err != "" || answer.Verdict != criuhook.Veto || !strings.Contains(answer.Message, reason) {
		k.h.t.Errorf("%s: %+v, want a veto that says %q", what, answer, reason)
	}
	kill(pid)
	c.end()
	s, cp := k.h.reaches(k.d.sandbox, alloc.StateInTransit)
	if cp.State != alloc.CheckpointOpen || cp.Claimant != nil || !reflect.DeepEqual(s.Bindings, k.sandbox.Bindings) {
		k.h.t.Errorf("%s: given back as %+v, %+v", what, s, cp)
	}
	k.h.settled()
}

// TestSwappedImages: other images under a genuine manifest, with the digest in it as it was or recomputed.
func TestSwappedImages(t *testing.T) {
	h := newHost(t)
	other := h.ticket() // another sandbox's
	first := h.ticket()
	older := first.copied() // of the same sandbox, an epoch ago
	again, pid := h.restored(first.d.images)
	again.end()
	h.reaches(first.d.sandbox, alloc.StateRunning)
	h.settled()
	second := &dumped{criu: h.criu(), sandbox: first.d.sandbox, before: first.d.before, images: writeImages(t, "run-2", containerTypes...)}
	second.passes(criuhook.PreDump, pid, second.images)
	second.passes(criuhook.PostDump, pid, second.images)
	kill(pid)
	h.reaches(second.sandbox, alloc.StateInTransit)
	second.end()
	h.settled()
	s, c := h.reaches(second.sandbox, alloc.StateInTransit)
	k := &ticket{h, second, s, c}

	swap := func(from string, names ...string) string {
		t.Helper()
		dir := k.copied()
		for _, name := range names {
			b, err := os.ReadFile(filepath.Join(from, name))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	const covered = "is of other images than those that it stands in"
	all := []string{"inventory.img", "pstree.img", "ids-1.img"}
	userns := writeImages(t, "run-2", append([]alloc.NamespaceType{alloc.User}, containerTypes...)...)
	for _, swapped := range []struct {
		what, from string
		names      []string
	}{
		{"the images of an epoch ago", older, all},
		{"another sandbox's", other.d.images, all},
		{"inventory of an epoch ago", older, all[:1]},
		{"ids of another tree", userns, all[2:]},
	} {
		dir := swap(swapped.from, swapped.names...)
		k.refused(swapped.what, dir, covered)
		k.write(dir, recompute(t, manifestIn(t, dir), dir))
		k.refused(swapped.what+", digest recomputed", dir, "(its list of namespaces was changed, or the images were replaced")
	}
	// A bit in each image that is covered; what cannot be understood any more is refused for that.
	for _, name := range all {
		dir := k.copied()
		flip(t, filepath.Join(dir, name))
		k.refused("a bit of "+name, dir, "images")
	}
	// The manifest of an epoch ago, with its images: its checkpoint is consumed.
	clone, twin := h.restored(older)
	k.unclaimed("a restore of older images")
	clone.end()
	copies := h.serials(twin)
	for _, typ := range containerTypes {
		if b := copies[typ].binding; b.Serial == k.d.before[typ] {
			t.Errorf("a restore of older images took %s serial %s", typ, b.Serial)
		}
	}
	kill(twin)
	k.restores()
}

// flip changes the last bit of a file.
func flip(t *testing.T, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-1] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestAnotherPools: genuine images of another pool, and the same with this pool's name written over.
func TestAnotherPools(t *testing.T) {
	there := newHost(t)
	foreign := there.ticket()
	if err := there.stop(); err != nil {
		t.Fatal(err)
	}
	h := newHost(t)
	k := h.ticket()
	k.refused("another pool's", foreign.d.images, "the images are of pool "+there.poolUUID()+", this host is in pool "+h.poolUUID())
	images := foreign.copied()
	m := manifestIn(t, images)
	m.Pool = h.poolUUID()
	k.write(images, recompute(t, m, images))
	k.refused("another pool's, renamed", images, "checkpoint "+m.Checkpoint.String())
	// Its manifest among our images.
	images = k.copied()
	m.Checkpoint, m.Sandbox = k.checkpoint.Serial, k.sandbox.Serial
	for i := range m.Namespaces { // not the same serials twice
		m.Namespaces[i].Serial += 1 << 20
	}
	k.write(images, recompute(t, m, images))
	k.refused("another pool's, renamed, for our images", images, "the manifest in the images is not the one that host a recorded")
	k.restores()
}
