package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// BenchmarkLedger is what one turn of the registrar pays for its ledger, by how many sandboxes live on the host: one of
// them is new in each turn.
func BenchmarkLedger(b *testing.B) {
	for _, n := range []int{100, 1000, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			dir := b.TempDir()
			s, err := openState(dir, "a")
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			a := &Agent{cfg: Config{Host: "a"}, state: s, book: newBook()}
			a.registrar = newRegistrar(a)
			r := a.registrar
			r.id = identity{Host: "a", Pool: "0d7d2f4e-5a51-4d0e-9a65-1c1b6f3f2d10", Incarnation: 1<<48 + 1, Nonce: newNonce()}
			next := alloc.Serial(1<<48 | 1)
			fresh := func() *alloc.Sandbox {
				sb := &alloc.Sandbox{Serial: next, State: alloc.StateRunning, Owner: "a", Epoch: 1<<48 | 1, Labels: map[string]string{"command": "nginx: master process"}}
				next++
				for _, typ := range containerTypes {
					sb.Bindings = append(sb.Bindings, alloc.Binding{Serial: next, Type: typ, Kernel: alloc.KernelID{BootID: "aaaaaaaa-0000-4000-8000-000000000001", ID: uint64(next), Inode: 4026531840}})
					next++
				}
				return sb
			}
			var all []*alloc.Sandbox
			for range n {
				all = append(all, fresh())
			}
			a.book.replace("a", all, nil, 0)
			if err := r.save(nil); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				a.book.put("a", fresh())
				if err := r.save(nil); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(fileSize(b, dir))/1e6, "MB")
		})
	}
}

func fileSize(b *testing.B, dir string) int64 {
	b.Helper()
	info, err := os.Stat(filepath.Join(dir, ledgerFile))
	if err != nil {
		b.Fatal(err)
	}
	return info.Size()
}
