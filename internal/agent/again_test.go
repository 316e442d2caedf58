package agent

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
	"github.com/nsalloc/nsalloc/pkg/client"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// snapshot is of the pool's store.
func (h *host) snapshot() alloctest.Snapshot { return alloctest.TakeSnapshot(h.t, h.pool.store) }

// putBack has the store forget, and the pool go on in a generation that nobody has seen.
func (h *host) putBack(then alloctest.Snapshot) alloc.Generation {
	h.t.Helper()
	pool, _, err := h.pool.svc.Pool(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	then.PutBack(h.t, h.pool.store, pool.Generation+1)
	h.mend(alloc.KindCounter, "")
	return pool.Generation + 1
}

// hasSettled waits until the host has said everything, and its agent knows what became of it.
func (h *host) hasSettled(g alloc.Generation) {
	h.t.Helper()
	h.eventually(fmt.Sprintf("the host is settled in generation %d", g), func() error {
		if rec := hostRecord(h.t, h); rec.Settled != g {
			return fmt.Errorf("it is in generation %d", rec.Settled)
		}
		if pool := h.poolRec.Load(); pool == nil || pool.Generation != g {
			return errors.New("its agent is not in it")
		}
		return nil
	})
}

// keepsSerials fails the test where a process has other serials than before.
func (h *host) keepsSerials(pid int, before map[alloc.NamespaceType]alloc.Serial) {
	h.t.Helper()
	for typ, now := range serialsOf(h.serials(pid)) {
		if now != before[typ] {
			h.t.Errorf("%s of process %d had %s and has %s", typ, pid, before[typ], now)
		}
	}
}

// otherHost joins as another host of the pool, and holds nothing.
func (h *host) otherHost() {
	h.t.Helper()
	_, _, err := h.pool.svc.Hello(h.t.Context(), alloc.HelloCommand{RequestID: client.NewRequestID(), Host: "b", BootID: alloctest.BootID(2), Nonce: "b-0123456789abcdef"})
	if err != nil {
		h.t.Fatal(err)
	}
}

// TestStoreForgets: what was committed after the snapshot keeps its serials, while the agent goes on and when it is
// started anew, twice; what is born later gets serials of the new generation.
func TestStoreForgets(t *testing.T) {
	for _, restarts := range []bool{false, true} {
		t.Run(fmt.Sprintf("restarts=%t", restarts), func(t *testing.T) {
			h := newHost(t)
			early := container(t, containerFlags)
			before := map[int]map[alloc.NamespaceType]alloc.Serial{early.pid: serialsOf(h.serials(early.pid))}
			h.consistent()
			then := h.snapshot()
			for range 3 {
				c := container(t, containerFlags)
				before[c.pid] = serialsOf(h.serials(c.pid))
			}
			life := h.registrar.life.Load()
			for range 2 {
				h.consistent() // all is committed
				if restarts {
					if err := h.stop(); err != nil {
						t.Fatal(err)
					}
				}
				g := h.putBack(then)
				if restarts {
					h.start()
				}
				h.hasSettled(g)
				for pid, serials := range before {
					h.keepsSerials(pid, serials)
				}
				fresh := container(t, containerFlags)
				for _, typ := range containerTypes {
					if s := h.serials(fresh.pid)[typ].binding.Serial; s.Generation() != g {
						t.Errorf("in generation %d %s of a new one is %s", g, typ, s)
					}
				}
				before[fresh.pid] = serialsOf(h.serials(fresh.pid))
				h.consistent()
			}
			if h.registrar.life.Load() != life {
				t.Error("the host began a new life")
			}
			early.end()
			h.reaches(h.sandboxOfSerial(before[early.pid][alloc.Mnt]), alloc.StateEnded)
			h.consistent()
		})
	}
}

// sandboxOfSerial is the one that the store has a namespace's serial in.
func (h *host) sandboxOfSerial(s alloc.Serial) alloc.Serial {
	h.t.Helper()
	sb, _, err := h.pool.Sandbox(h.t.Context(), s)
	if err != nil {
		h.t.Fatal(err)
	}
	return sb.Serial
}

// TestForgetsWhileAgentDies: an agent that dies after a request that registers again, whatever became of that, is
// followed by one that does the rest.
func TestForgetsWhileAgentDies(t *testing.T) {
	for _, f := range []memstore.Outcome{memstore.Stored, memstore.Lost, memstore.Unavailable, memstore.Conflict} {
		t.Run(fmt.Sprint(f), func(t *testing.T) {
			h := newHost(t)
			then := h.snapshot()
			c := container(t, containerFlags)
			before := serialsOf(h.serials(c.pid))
			h.consistent()
			if err := h.stop(); err != nil {
				t.Fatal(err)
			}
			hit := h.pool.hitBy("RegisterAgain", 1, memstore.Fault{Outcome: f})
			h.pool.before("Owned", nil)
			g := h.putBack(then)
			h.startOnly()
			h.eventually("the request meets the fault", func() error {
				if !h.pool.wasHit(hit) {
					return errors.New("not yet")
				}
				return nil
			})
			h.restart()
			h.hasSettled(g)
			h.keepsSerials(c.pid, before)
			h.consistent()
		})
	}
}

// TestForgetsWhatIsElsewhere: by the pool's records a sandbox has gone on in a higher epoch: what lives of it here
// gets fresh serials, and that is said loudly; all else keeps its own.
func TestForgetsWhatIsElsewhere(t *testing.T) {
	h := newHost(t)
	lost, other := container(t, containerFlags), container(t, containerFlags)
	before, kept := serialsOf(h.serials(lost.pid)), serialsOf(h.serials(other.pid))
	sandbox := h.sandbox(lost.pid)
	h.consistent()
	then := h.snapshot()
	rec := *then[alloc.SandboxKey(sandbox)].(*alloc.Sandbox)
	rec.Stints = append([]alloc.Stint(nil), rec.Stints...)
	rec.Stints[0].To, rec.Stints[0].Over = rec.Created, alloc.OverFenced
	rec.State, rec.Epoch = alloc.StateEnded, rec.Epoch+1
	then = maps.Clone(then)
	then[rec.Key()] = &rec
	h.hasSettled(h.putBack(then))
	h.logged("what lives here is a clone of it from now on")
	h.eventually("it has other serials", func() error {
		for _, typ := range containerTypes {
			if now := serialsOf(h.serials(lost.pid))[typ]; now == before[typ] {
				return fmt.Errorf("%s has %s still", typ, now)
			}
		}
		return nil
	})
	h.logged("a serial was replaced")
	h.keepsSerials(other.pid, kept)
	h.consistent()
}

// TestForgetsWhatParted: a namespace that parted from its container is in one record.
func TestForgetsWhatParted(t *testing.T) {
	h := newHost(t)
	here := madeNet(t)
	tree := withNet(t, here, withoutNet)
	places := h.serials(tree.pid)
	h.consistent()
	then := h.snapshot()
	c := h.criu()
	images := external(t, writeImages(t, "run", containerTypes...), alloc.Net)
	c.passes(criuhook.PreDump, tree.pid, images)
	c.passes(criuhook.PostDump, tree.pid, images)
	parted := h.serials(tree.pid)[alloc.Net].sandbox
	if parted == places[alloc.Net].sandbox {
		t.Fatal("nothing parted")
	}
	c.end() // and the tree runs on
	h.settled()
	h.hasSettled(h.putBack(then))
	h.keepsSerials(tree.pid, serialsOf(places))
	if now := h.serials(tree.pid)[alloc.Net].sandbox; now != parted {
		t.Errorf("it is in sandbox %s, it was in %s", now, parted)
	}
	h.consistent()
	tree.end()
	h.reaches(places[alloc.Mnt].sandbox, alloc.StateEnded)
}

// TestForgetsStateLost: where the agent's state is lost too, what the store knows keeps its serials.
func TestForgetsStateLost(t *testing.T) {
	h := newHost(t)
	c := container(t, containerFlags)
	before := serialsOf(h.serials(c.pid))
	h.consistent()
	then := h.snapshot()
	late := container(t, containerFlags)
	forgotten := serialsOf(h.serials(late.pid))
	if err := h.stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(h.dir, "state")); err != nil {
		t.Fatal(err)
	}
	g := h.putBack(then)
	h.start()
	h.hasSettled(g)
	h.keepsSerials(c.pid, before)
	for _, typ := range containerTypes {
		if now := serialsOf(h.serials(late.pid))[typ]; now == forgotten[typ] || now.Generation() != g {
			t.Errorf("%s that nobody remembers has %s, it had %s", typ, now, forgotten[typ])
		}
	}
	h.consistent()
}

// TestAgentIsWitness: the store was put back and nobody has noticed. The agent says what it has seen, the pool closes,
// and in its next generation everything is as it was.
func TestAgentIsWitness(t *testing.T) {
	var images string
	for name, since := range map[string]func(h *host){
		"moved": func(h *host) { // and no serial was spent for it
			c, _ := h.restored(images)
			c.end()
			h.settled()
		},
		"spent": func(h *host) { h.serials(container(h.t, unix.CLONE_NEWNET).pid) },
		"life": func(h *host) {
			life := h.registrar.life.Load()
			_, _, err := h.pool.svc.Hello(h.t.Context(), alloc.HelloCommand{RequestID: client.NewRequestID(), Host: "a", BootID: h.bootID(), Nonce: "another-life-012345678"})
			if err != nil {
				h.t.Fatal(err)
			}
			h.eventually("a new life", func() error {
				h.registrar.stale.Store(true)
				if h.registrar.life.Load() == life {
					return errors.New("not yet")
				}
				return nil
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			c := container(t, containerFlags)
			before := serialsOf(h.serials(c.pid))
			images = h.moved().images
			h.consistent()
			then := h.snapshot()
			since(h)
			h.consistent()
			then.PutBack(t, h.pool.store, 0)
			h.registrar.read.Store(nil) // as after rereadAfter
			h.eventually("the pool is closed", func() error {
				pool, _, err := h.pool.svc.Pool(t.Context())
				if err == nil && (pool.State != alloc.PoolRecovering || pool.Target != 2) {
					err = fmt.Errorf("it is %+v", pool)
				}
				return err
			})
			h.mend(alloc.KindCounter, "")
			h.hasSettled(2)
			h.keepsSerials(c.pid, before)
			h.consistent()
		})
	}
}

// TestAbsentIsNotHere: what the pool says is here, of before its generation and not registered again, does not stand for
// the namespaces that have its identities by now, and the ledger does not have it.
func TestAbsentIsNotHere(t *testing.T) {
	ns := alloc.KernelID{BootID: alloctest.BootID(1), Inode: 7, Weak: true}
	sandbox := func(serial alloc.Serial, again alloc.Generation) *alloc.Sandbox {
		return &alloc.Sandbox{Serial: serial, State: alloc.StateRunning, Owner: "a", Epoch: 1<<48 | 1, Again: again, Bindings: []alloc.Binding{{Serial: serial + 1, Type: alloc.Net, Kernel: ns}}}
	}
	for _, list := range [][]*alloc.Sandbox{
		{sandbox(1<<48|10, 2), sandbox(1<<48|20, 0)},
		{sandbox(1<<48|10, 0), sandbox(1<<48|20, 2)},
	} {
		b := newBook()
		b.replace("a", list, nil, 2)
		for _, s := range list {
			if b.isAbsent(s) != (s.Again == 0) || b.sandbox(s.Serial) == nil {
				t.Errorf("%+v: absent %v", s, b.isAbsent(s))
			}
			if p, ok := b.find(alloc.Net, ns); s.Again == 2 && (!ok || p.sandbox != s.Serial) {
				t.Errorf("the namespace is in sandbox %s, want %s", p.sandbox, s.Serial)
			}
		}
		b.replace("a", list[:1], nil, 0) // of the ledger: all of it is here
		if _, ok := b.find(alloc.Net, ns); !ok {
			t.Error("what the ledger has is not here")
		}
	}
}

// TestCommittedIsNoted: what can be seen to be committed is on the host's disk by then: if the store forgets it, and the
// agent dies at once, the next one knows.
func TestCommittedIsNoted(t *testing.T) {
	h := newHost(t)
	p := spawn(t, unix.CLONE_NEWNET, "/proc/self/exe", roleVar+"=unsharer")
	h.serials(p.pid)
	for range 10 {
		if p.tell("uts") != "true" {
			t.Fatal("unshare uts failed")
		}
		serial := h.serials(p.pid)[alloc.UTS].binding.Serial
		l, _, err := readLedger(h.state.path)
		if err != nil {
			t.Fatal(err)
		}
		known, err := l.book(h.state.path)
		if err != nil {
			t.Fatal(err)
		}
		if h.book.isProvisional(serial) || !slices.ContainsFunc(known, func(s *alloc.Sandbox) bool { _, ok := s.Binding(serial); return ok }) {
			t.Errorf("%s is committed, and the ledger does not have it", serial)
		}
	}
}

// TestForgetsBeforeLedger: what was committed when the agent died, and is not in its ledger, keeps its serials in a
// new generation: the pool knows it, and it was numbered from what the ledger says is left.
func TestForgetsBeforeLedger(t *testing.T) {
	h := newHost(t)
	early := container(t, containerFlags)
	before := map[int]map[alloc.NamespaceType]alloc.Serial{early.pid: serialsOf(h.serials(early.pid))}
	h.consistent()
	if err := h.stop(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(h.dir, "state", ledgerFile)
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	h.start()
	late := container(t, containerFlags)
	before[late.pid] = serialsOf(h.serials(late.pid))
	h.consistent()
	if err := h.stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, old, 0o600); err != nil {
		t.Fatal(err)
	}
	g := h.putBack(h.snapshot())
	h.start()
	h.hasSettled(g)
	for pid, serials := range before {
		h.keepsSerials(pid, serials)
	}
	h.consistent()
}

// TestRaisedByOlderServer: a server that knows nothing of registering again is asked by an agent that does: nothing is
// renumbered.
func TestRaisedByOlderServer(t *testing.T) {
	h := newHost(t)
	c := container(t, containerFlags)
	before := serialsOf(h.serials(c.pid))
	h.consistent()
	h.pool.withoutAgain(true)
	g := h.putBack(h.snapshot())
	h.eventually("its agent is in the generation", func() error {
		if pool := h.poolRec.Load(); pool == nil || pool.Generation != g {
			return errors.New("it is not")
		}
		return nil
	})
	fresh := container(t, containerFlags)
	h.serials(fresh.pid) // there was a sweep
	h.keepsSerials(c.pid, before)
	h.pool.withoutAgain(false)
	h.registrar.stale.Store(true)
	h.hasSettled(g)
	h.keepsSerials(c.pid, before)
	h.consistent()
}
