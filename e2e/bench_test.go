package e2e

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"testing"
	"time"

	criustats "github.com/checkpoint-restore/go-criu/v7/stats"

	"github.com/nsalloc/nsalloc/internal/testhost"
	"github.com/nsalloc/nsalloc/internal/testpool"
)

// BenchmarkHooks compares CRIU's own figures (stats-dump, stats-restore) of migrations with and without
// the hook, in turn, so that a machine that slows down slows both. One iteration is one migration of
// each kind. It reports medians in microseconds, and what the hook adds.
//
//	go test ./e2e -run '^$' -bench Hooks -benchtime 10x
func BenchmarkHooks(b *testing.B) {
	if err := testhost.Check(); err != nil {
		b.Skip(err)
	}
	ctx, cancel := context.WithTimeout(b.Context(), 15*time.Minute)
	defer cancel()
	p, err := testpool.Start(ctx, testpool.Options{Bin: binaries, Hosts: []string{"a", "b"}, Log: io.Discard})
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	hooked := map[bool][]byte{}
	if hooked[true], err = p.Host("a").ReadFile("/etc/criu/default.conf"); err != nil {
		b.Fatal(err)
	}
	figures := map[string][]float64{}
	n := 0
	migrate := func(with bool) {
		n++
		for _, h := range p.Hosts() {
			if err := h.WriteFile("/etc/criu/default.conf", hooked[with], 0o644); err != nil {
				b.Fatal(err)
			}
		}
		f, err := migration(ctx, p, fmt.Sprintf("bench%d", n))
		if err != nil {
			b.Fatalf("%v\n%s", err, p.Logs())
		}
		for name, v := range f {
			key := fmt.Sprintf("%s_without_us", name)
			if with {
				key = fmt.Sprintf("%s_with_us", name)
			}
			figures[key] = append(figures[key], v)
		}
	}
	migrate(true) // warm up: the page cache has the binaries from then on
	clear(figures)
	b.ResetTimer()
	for i := 0; b.Loop(); i++ {
		migrate(i%2 == 0)
		migrate(i%2 != 0)
	}
	b.StopTimer()
	b.ReportMetric(0, "ns/op")
	for name, values := range figures {
		slices.Sort(values)
		b.Logf("%-24s min %.0f median %.0f max %.0f", name, values[0], median(values), values[len(values)-1])
		b.ReportMetric(median(values), name)
	}
	for _, name := range []string{"frozen", "restore"} {
		with, without := median(figures[name+"_with_us"]), median(figures[name+"_without_us"])
		b.ReportMetric(with-without, name+"_added_us")
		b.ReportMetric(with/without, name+"_ratio")
	}
}

func median(sorted []float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
}

// migration moves a new container from a to b and returns what CRIU measured.
func migration(ctx context.Context, p *testpool.Pool, id string) (map[string]float64, error) {
	a, b := p.Host("a"), p.Host("b")
	bundle, images := "/var/lib/bundles/"+id, "/var/lib/images/"+id
	for _, h := range p.Hosts() {
		if err := h.WriteBundle(bundle, testhost.BundleOptions{}); err != nil {
			return nil, err
		}
	}
	if err := a.MkdirAll(images, 0o755); err != nil {
		return nil, err
	}
	if err := b.MkdirAll("/var/lib/images", 0o755); err != nil {
		return nil, err
	}
	if err := a.Runc(ctx, "run", "-d", "--bundle", bundle, id); err != nil {
		return nil, err
	}
	if err := a.Runc(ctx, "checkpoint", "--image-path", images, "--work-path", images+"-dump", id); err != nil {
		return nil, err
	}
	if err := b.CopyDir(a, images, images); err != nil {
		return nil, err
	}
	if err := b.Runc(ctx, "restore", "-d", "--bundle", bundle, "--image-path", images, "--work-path", images+"-restore", id); err != nil {
		return nil, err
	}
	defer func() { _ = b.Runc(ctx, "delete", "--force", id) }()
	dump, err := os.Open(a.Path(images + "-dump"))
	if err != nil {
		return nil, err
	}
	defer dump.Close()
	d, err := criustats.CriuGetDumpStats(dump)
	if err != nil {
		return nil, err
	}
	restore, err := os.Open(b.Path(images + "-restore"))
	if err != nil {
		return nil, err
	}
	defer restore.Close()
	r, err := criustats.CriuGetRestoreStats(restore)
	if err != nil {
		return nil, err
	}
	return map[string]float64{"frozen": float64(d.GetFrozenTime()), "restore": float64(r.GetRestoreTime())}, nil
}
