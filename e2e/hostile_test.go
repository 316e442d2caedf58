package e2e

import (
	"bytes"
	"path"
	"reflect"
	"strings"
	"testing"

	"github.com/nsalloc/nsalloc/internal/testhost"
	"github.com/nsalloc/nsalloc/internal/testpool"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// TestTamperedImages: whatever somebody did to the images on their way, CRIU restores nothing of them, nothing
// is claimed, and CRIU's log has the reason. The genuine images restore afterwards.
func TestTamperedImages(t *testing.T) {
	p := newPool(t, "a", "b")
	a, b := p.Host("a"), p.Host("b")
	other := p.container("other", "a", testhost.BundleOptions{})
	c := p.container("ctr", "a", testhost.BundleOptions{})
	before := c.identify("a", c.id)
	count := c.countsOn("a", 2)
	for _, c := range []*container{other, c} {
		sandbox := c.identify("a", c.id).sandbox()
		if err := c.dump("a"); err != nil {
			t.Fatal(err)
		}
		p.reaches(sandbox, alloc.StateInTransit, "a")
		c.move("a", "b")
	}
	waits := p.stored(before.sandbox())
	in := func(name string) string { return path.Join(c.images, name) }
	read := func(images, name string) []byte {
		t.Helper()
		body, err := a.ReadFile(path.Join(images, name))
		if err != nil {
			t.Fatal(err)
		}
		return body
	}
	manifest := read(c.images, criuhook.ManifestName)
	m, _, err := criuhook.DecodeManifest(bytes.NewReader(manifest))
	if err != nil {
		t.Fatal(err)
	}
	forged := *m
	forged.Epoch++
	epoch, _, err := forged.Encode()
	if err != nil {
		t.Fatal(err)
	}
	put := func(name string, body []byte) func() error {
		return func() error { return b.WriteFile(in(name), body, 0o600) }
	}
	sh := func(script string) func() error {
		return func() error { return testpool.Output(b.Command(p.ctx(), "sh", "-ec", script), nil) }
	}
	for _, tampered := range []struct {
		what   string
		tamper func() error
		reason string
	}{
		{"the epoch is another", put(criuhook.ManifestName, epoch), "(it says epoch " + forged.Epoch.String()},
		{"the manifest is another container's", put(criuhook.ManifestName, read(other.images, criuhook.ManifestName)), "is of other images"},
		{"the inventory is another container's", put("inventory.img", read(other.images, "inventory.img")), "is of other images"},
		{"the ids have a byte more", put("ids-1.img", append(read(c.images, "ids-1.img"), 0)), "ids-1.img"},
		{"the manifest is huge", sh("head -c 104857600 /dev/zero > " + in(criuhook.ManifestName)), "has 104857600 bytes"},
		{"the manifest is a link", sh("mv " + in(criuhook.ManifestName) + " /root/m; ln -s /root/m " + in(criuhook.ManifestName)), "is a symbolic link"},
		{"the manifest is a fifo", sh("rm " + in(criuhook.ManifestName) + "; mkfifo " + in(criuhook.ManifestName)), "is not a regular file"},
		{"the manifest is gone", sh("rm " + in(criuhook.ManifestName)), "copy it along"},
	} {
		if err := tampered.tamper(); err != nil {
			t.Fatal(err)
		}
		if err := c.restore("b", ""); err == nil {
			t.Fatalf("%s: it was restored", tampered.what)
		}
		log, err := b.ReadFile(c.images + "-restore/restore.log")
		if err != nil || !strings.Contains(string(log), tampered.reason) {
			t.Errorf("%s: CRIU's log does not say %q (%v): %s", tampered.what, tampered.reason, err, said(log))
		}
		if pid, err := b.ContainerPID(p.ctx(), c.id); err == nil {
			t.Errorf("%s: process %d of it runs", tampered.what, pid)
		}
		if now := p.stored(before.sandbox()); !reflect.DeepEqual(now.Sandbox, waits.Sandbox) || !reflect.DeepEqual(now.Checkpoint, waits.Checkpoint) {
			t.Errorf("%s: the records became %+v, %+v", tampered.what, now.Sandbox, now.Checkpoint)
		}
		c.remove("b", c.id)
		if err := sh("rm -r " + c.images)(); err != nil {
			t.Fatal(err)
		}
		c.move("a", "b")
	}
	if err := c.restore("b", ""); err != nil {
		t.Fatal(err)
	}
	p.reaches(before.sandbox(), alloc.StateRunning, "b")
	checkMoved(t, before, c.identify("b", c.id), runtimeTypes(false))
	c.countsOn("b", count)
	p.check()
}

// said is what nsalloc wrote to CRIU's log.
func said(log []byte) string {
	var lines []string
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, "nsalloc:") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "")
}
