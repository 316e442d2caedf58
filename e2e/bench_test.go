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

// BenchmarkHooks compares CRIU's own figures (stats-dump, stats-restore) of migrations without a script,
// with /bin/true as the script, which is what CRIU itself takes to run one, and with the hook; in turn, so
// that a machine that slows down slows all. One iteration is one migration of each kind. It reports
// medians in microseconds, and what a script and the hook add.
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
	hook, err := p.Host("a").ReadFile("/etc/criu/default.conf")
	if err != nil {
		b.Fatal(err)
	}
	kinds := []string{"none", "true", "hook"}
	conf := map[string][]byte{"true": []byte("action-script /bin/true\n"), "hook": hook}
	figures := map[string][]float64{}
	n := 0
	migrate := func(kind string) {
		n++
		for _, h := range p.Hosts() {
			if err := h.WriteFile("/etc/criu/default.conf", conf[kind], 0o644); err != nil {
				b.Fatal(err)
			}
		}
		f, err := migration(ctx, p, fmt.Sprintf("bench%d", n))
		if err != nil {
			b.Fatalf("%v\n%s", err, p.Logs())
		}
		for name, v := range f {
			figures[name+"_"+kind] = append(figures[name+"_"+kind], v)
		}
	}
	migrate("hook") // warm up: the page cache has the binaries from then on
	clear(figures)
	b.ResetTimer()
	for i := 0; b.Loop(); i++ {
		for k := range kinds {
			migrate(kinds[(i+k)%len(kinds)])
		}
	}
	b.StopTimer()
	b.ReportMetric(0, "ns/op")
	for _, name := range []string{"frozen", "restore"} {
		none := median(figures[name+"_none"])
		for _, kind := range kinds {
			v := figures[name+"_"+kind]
			b.Logf("%-8s %-5s median %6.0f us, min %.0f, max %.0f, added %.0f, ratio %.2f", name, kind, median(v), slices.Min(v), slices.Max(v), median(v)-none, median(v)/none)
			b.ReportMetric(median(v), name+"_"+kind+"_us")
		}
	}
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
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
