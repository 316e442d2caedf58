package testhost

import (
	"errors"
	"fmt"
	"testing"
	"time"
)

// TestMigrate moves a container that counts from one host to another.
func TestMigrate(t *testing.T) {
	p := newPool(t, "a", "b")
	for name, o := range map[string]BundleOptions{
		"plain":  {},
		"userns": {UserNS: true},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := testContext(t, time.Minute)
			a, b := p.Host("a"), p.Host("b")
			id, bundle, images := "ctr-"+name, "/var/lib/bundles/"+name, "/var/lib/images/"+name
			for _, h := range []*Host{a, b} {
				if err := h.WriteBundle(bundle, o); err != nil {
					t.Fatal(err)
				}
			}
			if err := a.Runc(ctx, "run", "-d", "--bundle", bundle, id); err != nil {
				t.Fatal(err)
			}
			counts := func(h *Host, from int) int {
				n := 0
				eventually(t, fmt.Sprintf("host %s counts beyond %d", h.Name(), from), func() (err error) {
					if n, err = h.Counter(ctx, id); err == nil && n <= from {
						err = fmt.Errorf("count is %d", n)
					}
					return err
				})
				return n
			}
			if err := a.MkdirAll(images, 0o755); err != nil {
				t.Fatal(err)
			}
			before := counts(a, 5)
			start := time.Now()
			if err := a.Runc(ctx, "checkpoint", "--image-path", images, "--work-path", images+"-dump", id); err != nil {
				t.Fatal(err)
			}
			dumped := time.Now()
			if _, err := a.Counter(ctx, id); err == nil {
				t.Error("the container is still on its source")
			}
			if err := b.CopyDir(a, images, images); err != nil {
				t.Fatal(err)
			}
			copied := time.Now()
			if err := b.Runc(ctx, "restore", "-d", "--bundle", bundle, "--image-path", images, "--work-path", images+"-restore", id); err != nil {
				t.Fatal(err)
			}
			t.Logf("dump %v, copy %v, restore %v", dumped.Sub(start).Round(time.Millisecond),
				copied.Sub(dumped).Round(time.Millisecond), time.Since(copied).Round(time.Millisecond))
			after := counts(b, before)
			if after > before+100 {
				t.Errorf("count went from %d to %d", before, after)
			}
			counts(b, after)
			if err := b.Runc(ctx, "delete", "--force", id); err != nil {
				t.Error(err)
			}
			if _, err := b.ContainerPID(ctx, id); err == nil {
				t.Error(errors.New("a deleted container has a process"))
			}
		})
	}
}
