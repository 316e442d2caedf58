package agent

import (
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// ledgerNow keeps the ledger as it is now, and puts it back later.
func (h *host) ledgerNow() (putBack func()) {
	h.t.Helper()
	path := filepath.Join(h.stateDir(), ledgerFile)
	body, err := os.ReadFile(path)
	if err != nil {
		h.t.Fatal(err)
	}
	return func() {
		h.t.Helper()
		if err := os.WriteFile(path, body, 0o600); err != nil {
			h.t.Fatal(err)
		}
	}
}

// TestLedgerBehind: the agent dies when something was committed and before it has written so: after the pool's
// return, and after a registration of which the answer is on its way. What the ledger has as provisional is found
// committed, under the same serials.
func TestLedgerBehind(t *testing.T) {
	h := newHost(t)
	h.goAway()
	c := container(t, containerFlags)
	given := h.provisional(c.pid, true)
	putBack := h.ledgerNow()
	h.comeBack()
	h.consistent()
	for range 2 { // the second time the ledger is older than what the pool granted since, too
		h.mustStop()
		putBack()
		h.pool.setAway(true)
		h.startAway()
		same(t, given, h.provisional(c.pid, true))
		fresh := container(t, containerFlags)
		h.serials(fresh.pid)
		h.comeBack()
		same(t, given, h.provisional(c.pid, false))
		h.provisional(fresh.pid, false)
		h.consistent()
	}
	if strings.Contains(h.logs.String(), "are void") {
		t.Error("what was committed is called void")
	}
}

// TestLedgerLost: the ledger is damaged or gone. The agent gives nothing while the pool is away, since it does
// not know what it gave; then it begins a new life, and no serial is given twice.
func TestLedgerLost(t *testing.T) {
	lost := map[string]func(path string, good []byte) error{"gone": func(p string, _ []byte) error { return os.Remove(p) }}
	for name, d := range damages {
		lost[name] = d.do
	}
	for name, lose := range lost {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			known := container(t, containerFlags)
			committed := h.provisional(known.pid, false)
			h.goAway()
			fresh := container(t, containerFlags)
			given := h.provisional(fresh.pid, true)
			life := h.registrar.life.Load()
			h.mustStop()
			path := filepath.Join(h.stateDir(), ledgerFile)
			good, err := os.ReadFile(path)
			if err == nil {
				err = lose(path, good)
			}
			if err != nil {
				t.Fatal(err)
			}
			lost, err := ExamineState(h.stateDir(), "a")
			if err != nil || (len(lost) == 0) != (name == "gone") && name != "a link to nothing" {
				t.Errorf("doctor is told %v, %v", lost, err)
			}
			h.startAway()
			if _, err := (&local{a: h.Agent}).Identify(t.Context(), &nsallocv1.IdentifyRequest{Pid: int32(fresh.pid)}); alloc.ReasonOf(err) != alloc.ReasonUnavailable {
				t.Errorf("it answers %v", err)
			}
			h.comeBack()
			now := h.provisional(fresh.pid, false)
			disjoint(t, given, now)
			same(t, committed, h.provisional(known.pid, false))
			if h.registrar.life.Load() <= life {
				t.Error("it goes on with the life that it forgot half of")
			}
			h.consistent()
		})
	}
}

// TestProvisionalDiskTrouble: a serial that cannot be written down is not given, and the answer says why; one
// that the pool commits is. It goes on by itself when there is space.
func TestProvisionalDiskTrouble(t *testing.T) {
	for _, name := range []string{"full", "no inodes"} {
		t.Run(name, func(t *testing.T) {
			disk := troubles[name]
			h := idleHost(t)
			h.ownDisk()
			h.start()
			if err := disk.begin(h.stateDir()); err != nil {
				t.Fatal(err)
			}
			known := container(t, containerFlags)
			committed := h.provisional(known.pid, false)
			h.logged("is not on disk")
			h.goAway()
			fresh := container(t, containerFlags)
			_, err := (&local{a: h.Agent}).Identify(t.Context(), &nsallocv1.IdentifyRequest{Pid: int32(fresh.pid)})
			if err == nil || !strings.Contains(err.Error(), disk.reason) {
				t.Errorf("a serial that is not on disk: %v", err)
			}
			if err := disk.end(h.stateDir()); err != nil {
				t.Fatal(err)
			}
			given := h.provisional(fresh.pid, true)
			h.mustStop()
			h.startAway()
			same(t, given, h.provisional(fresh.pid, true))
			same(t, committed, h.provisional(known.pid, false))
			h.comeBack()
			same(t, given, h.provisional(fresh.pid, false))
			h.consistent()
		})
	}
}

// FuzzLedger reads any ledger. What is accepted gives no serial a second time.
func FuzzLedger(f *testing.F) {
	f.Add([]byte(`{"pool":"p","incarnation":"1.1","nonce":"n","granted":[{"first":"0001000000000001","count":10}],"burned":["0001000000000005"],"pending":[{"sandbox":"0001000000000001","new":true,"add":[{"serial":"0001000000000002","type":"uts","kernel":{"boot_id":"b","id":7,"inode":8}}]}]}`))
	f.Add([]byte(`{"pending":[{}]}`))
	f.Add([]byte(`{"granted":[{"first":"7fffffffffffffff","count":18446744073709551615}]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, ledgerFile), seal(stateFormat, body), 0o600); err != nil {
			t.Fatal(err)
		}
		a := &Agent{cfg: Config{Host: "a"}, log: slog.New(slog.NewTextHandler(io.Discard, nil)), book: newBook(), kick: make(chan struct{}, 1)}
		a.registrar = newRegistrar(a)
		lock, err := os.Create(filepath.Join(dir, lockFile))
		if err != nil {
			t.Fatal(err)
		}
		defer lock.Close()
		a.state = &stateDir{path: dir, lock: lock, id: identity{Host: "a", Pool: "p", Incarnation: 1<<48 | 1, Nonce: "n"}}
		if err := a.registrar.load(); err != nil {
			t.Fatal(err) // nothing that stands in it keeps the agent from starting
		}
		given := map[alloc.Serial]bool{}
		for _, e := range a.registrar.pending {
			for _, s := range e.fresh() {
				given[s] = true
			}
		}
		for s := range a.registrar.burned {
			given[s] = true
		}
		w := wish{add: []unnumbered{{alloc.UTS, alloc.KernelID{BootID: "b", ID: 1 << 50, Inode: 9}}}}
		n := len(a.registrar.pending)
		if err := a.registrar.provide(context.Background(), []wish{w}); err != nil {
			return
		}
		for _, s := range a.registrar.pending[n].fresh() {
			if given[s] {
				t.Errorf("%s is given twice", s)
			}
		}
	})
}
