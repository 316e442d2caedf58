package agent

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// goAway takes the pool away, and waits until the agent knows.
func (h *host) goAway() {
	h.t.Helper()
	h.pool.setAway(true)
	h.eventually("the agent knows that the pool is away", func() error {
		if !h.away() {
			return errors.New("it does not")
		}
		return nil
	})
}

// startAway starts an agent while the pool is away.
func (h *host) startAway() {
	h.t.Helper()
	h.startOnly()
	h.eventually("the agent knows that the pool is away", func() error {
		if h.trouble.Load() == nil {
			return errors.New("it does not")
		}
		return nil
	})
}

// comeBack brings the pool back, and waits until nothing is provisional any more.
func (h *host) comeBack() {
	h.t.Helper()
	h.pool.setAway(false)
	h.eventually("all is committed", func() error {
		if h.away() || h.registrar.uncommitted.Load() > 0 {
			return fmt.Errorf("away %v, %d namespaces are not", h.away(), h.registrar.uncommitted.Load())
		}
		return nil
	})
}

// provisional holds what a process has against what it should be, in every answer.
func (h *host) provisional(pid int, want bool) map[alloc.NamespaceType]alloc.Serial {
	h.t.Helper()
	found := serialsOf(h.serials(pid))
	resp, err := (&local{a: h.Agent}).Identify(h.t.Context(), &nsallocv1.IdentifyRequest{Pid: int32(pid)})
	if err != nil {
		h.t.Fatal(err)
	}
	list, err := (&local{a: h.Agent}).ListNamespaces(h.t.Context(), &nsallocv1.ListNamespacesRequest{})
	if err != nil {
		h.t.Fatal(err)
	}
	marked := map[uint64]bool{}
	for _, n := range list.GetNamespaces() {
		marked[n.GetBinding().GetSerial()] = n.GetProvisional()
	}
	for _, n := range resp.GetNamespaces() {
		if n.GetOfHost() {
			continue
		}
		if n.GetProvisional() != want || n.GetSandboxProvisional() != want || marked[n.GetBinding().GetSerial()] != want {
			h.t.Errorf("%s: provisional %v, in the list %v, its sandbox %v; want %v", n.GetBinding().GetType(), n.GetProvisional(), marked[n.GetBinding().GetSerial()], n.GetSandboxProvisional(), want)
		}
	}
	return found
}

// spare waits until the agent holds a whole range.
func (h *host) spare() {
	h.t.Helper()
	h.eventually("it holds a range", func() error {
		if left := h.registrar.left.Load(); left < minGrant {
			return fmt.Errorf("%d are left", left)
		}
		return nil
	})
}

// useUp leaves n serials of what the agent holds.
func (h *host) useUp(n uint64) {
	h.t.Helper()
	done, err := h.registrar.holdAway(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	defer done()
	_, rest, _ := h.registrar.ranges.Take(h.registrar.ranges.Count() - n)
	h.registrar.spent(rest)
}

// TestPoolAway: without a pool what is known is answered, and what is new gets a serial that says that it is
// provisional, and that stays when the pool is back.
func TestPoolAway(t *testing.T) {
	h := newHost(t)
	known := container(t, containerFlags)
	before := h.provisional(known.pid, false)
	h.goAway()
	same(t, before, h.provisional(known.pid, false))
	fresh := container(t, containerFlags)
	given := h.provisional(fresh.pid, true)
	s, err := (&local{a: h.Agent}).Status(t.Context(), nil)
	if err != nil || s.GetConnected() || s.GetTrouble() == "" || s.GetProvisional() != 5 {
		t.Errorf("%v, %v", s, err)
	}
	// More in a sandbox that is committed, and in one that is not.
	guest := inside(t, known.pid, []string{"--net", "--mount"}, unix.CLONE_NEWUTS)
	h.named(guest.pid, "cat")
	later := h.serials(guest.pid)[alloc.UTS].binding.Serial
	h.comeBack()
	same(t, before, h.provisional(known.pid, false))
	same(t, given, h.provisional(fresh.pid, false))
	if now := h.serials(guest.pid)[alloc.UTS].binding.Serial; now != later {
		t.Errorf("%s became %s", later, now)
	}
	h.consistent()
	h.logged("numbered provisionally")
}

// TestStoreAway: servers answer from what they know, and the store behind them does not. Once that is known, nothing
// new waits for it, and a dump is refused before anything is frozen.
func TestStoreAway(t *testing.T) {
	h := newHost(t)
	tree := container(t, containerFlags)
	h.provisional(tree.pid, false)
	setStore := func(away bool) {
		h.pool.mu.Lock()
		defer h.pool.mu.Unlock()
		h.pool.storeAway = away
	}
	setStore(true)
	first := container(t, containerFlags)
	given := h.provisional(first.pid, true)
	began := time.Now()
	second := container(t, containerFlags)
	later := h.provisional(second.pid, true)
	if took := time.Since(began); took > committedWithin {
		t.Errorf("the second waited %v", took)
	}
	images := writeImages(t, "run", containerTypes...)
	c := h.criu()
	c.vetoed(criuhook.PreDump, tree.pid, images, "the store is away")
	c.end()
	setStore(false)
	h.comeBack()
	same(t, given, h.provisional(first.pid, false))
	same(t, later, h.provisional(second.pid, false))
	h.settled()
	h.consistent()
}

// TestStepByStepAway: a sandbox that is provisional grows, and is one when it is committed.
func TestStepByStepAway(t *testing.T) {
	h := newHost(t)
	h.goAway()
	p := spawn(t, 0, "/proc/self/exe", roleVar+"=unsharer")
	var given []map[alloc.NamespaceType]place
	for _, typ := range []string{"uts", "mnt"} {
		if p.tell(typ) != "true" {
			t.Fatalf("unshare %s failed", typ)
		}
		given = append(given, h.serials(p.pid))
	}
	h.comeBack()
	now := h.serials(p.pid)
	for typ, pl := range given[1] {
		if now[typ].binding.Serial != pl.binding.Serial || now[typ].sandbox != pl.sandbox {
			t.Errorf("%s: %+v became %+v", typ, pl, now[typ])
		}
	}
	if now[alloc.UTS].sandbox != now[alloc.Mnt].sandbox || given[0][alloc.UTS].binding.Serial != now[alloc.UTS].binding.Serial {
		t.Errorf("%+v became %+v", given, now)
	}
	h.consistent()
}

// TestGoneWhileAway: what did not live to see the pool again is recorded, and over.
func TestGoneWhileAway(t *testing.T) {
	h := newHost(t)
	h.goAway()
	c := container(t, containerFlags)
	sandbox := h.sandbox(c.pid)
	c.end()
	h.comeBack()
	h.reaches(sandbox, alloc.StateEnded)
	h.consistent()
}

// TestRestartAway: an agent that is started while the pool is away knows what is committed and what is
// provisional, and goes on. It does what it can be killed in the middle of.
func TestRestartAway(t *testing.T) {
	h := newHost(t)
	known := container(t, containerFlags)
	committed := h.provisional(known.pid, false)
	h.goAway()
	first := container(t, containerFlags)
	given := h.provisional(first.pid, true)
	life := h.registrar.life.Load()
	h.mustStop()
	h.startAway()
	same(t, committed, h.provisional(known.pid, false))
	same(t, given, h.provisional(first.pid, true))
	second := container(t, containerFlags)
	later := h.provisional(second.pid, true)
	disjoint(t, given, later)
	disjoint(t, committed, later)
	h.comeBack()
	same(t, committed, h.provisional(known.pid, false))
	same(t, given, h.provisional(first.pid, false))
	same(t, later, h.provisional(second.pid, false))
	if now := h.registrar.life.Load(); now != life {
		t.Errorf("incarnation %d became %d", life, now)
	}
	h.consistent()
}

// disjoint proves that no own namespace of two containers has one serial.
func disjoint(t *testing.T, a, b map[alloc.NamespaceType]alloc.Serial) {
	t.Helper()
	for _, x := range containerTypes {
		for _, y := range containerTypes {
			if a[x] == b[y] {
				t.Errorf("%s and %s both have %s", x, y, a[x])
			}
		}
	}
}

// TestAnswerLostAndAway: a registration's outcome is not known, and then the pool is away. Its namespaces have the
// serials that it named, provisionally, and keep them whatever became of it.
func TestAnswerLostAndAway(t *testing.T) {
	for _, f := range []memstore.Fault{{Outcome: memstore.Stored}, {Outcome: memstore.Lost}, {Outcome: memstore.Delayed, After: 1}, {Outcome: memstore.Delayed, After: 1000}, {Outcome: memstore.Unavailable}} {
		for name, restarted := range map[string]bool{"goes on": false, "restarted": true} {
			t.Run(fmt.Sprintf("%s %d %s", f.Outcome, f.After, name), func(t *testing.T) {
				h := newHost(t)
				c := container(t, containerFlags)
				h.serials(c.pid)
				meets := h.pool.hitBy("Register", 1, f)
				fresh := container(t, containerFlags)
				h.eventually("the answer is lost", func() error {
					if !h.pool.wasHit(meets) {
						return errors.New("it is not")
					}
					return nil
				})
				h.goAway()
				given := serialsOf(h.serials(fresh.pid))
				if restarted {
					h.mustStop()
					h.startAway()
					same(t, given, serialsOf(h.serials(fresh.pid)))
				}
				another := container(t, containerFlags)
				later := serialsOf(h.serials(another.pid))
				disjoint(t, given, later)
				h.comeBack()
				same(t, given, h.provisional(fresh.pid, false))
				same(t, later, h.provisional(another.pid, false))
				h.consistent()
			})
		}
	}
}

// TestRangesLostAway: what the serials are of is this host's no more when the pool is back. What was provisional
// gets others, loudly; what was committed keeps its own.
func TestRangesLostAway(t *testing.T) {
	for name, lose := range map[string]func(h *host){
		"a twin spent them": func(h *host) {
			record := hostRecord(h.t, h)
			spend, _, _ := record.Granted.Take(3)
			serials := slices.Collect(spend.All())
			_, _, err := h.pool.svc.Register(h.t.Context(), alloc.RegisterCommand{
				Mutation: alloc.Mutation{Host: "a", Incarnation: record.Incarnation, RequestID: client.NewRequestID()}, Spend: spend,
				Items: []alloc.RegisterItem{{Sandbox: serials[0], Add: []alloc.Binding{{Serial: serials[1], Type: alloc.UTS, Kernel: alloc.KernelID{BootID: h.bootID(), ID: 1 << 60, Inode: 1}}}}},
			})
			if err != nil {
				h.t.Fatal(err)
			}
		},
		"a new generation":   func(h *host) { h.mend(alloc.KindCounter, "") },
		"an operator burned": func(h *host) { h.mend(alloc.KindHost, "a") },
		"another life": func(h *host) {
			if _, _, err := h.pool.svc.Hello(h.t.Context(), alloc.HelloCommand{RequestID: client.NewRequestID(), Host: "a", BootID: h.bootID(), Nonce: newNonce()}); err != nil {
				h.t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			known := container(t, containerFlags)
			committed := h.provisional(known.pid, false)
			h.goAway()
			fresh := container(t, containerFlags)
			given := h.provisional(fresh.pid, true)
			lose(h)
			h.comeBack()
			h.eventually("it has committed serials", func() error {
				for typ, k := range h.namespaces(fresh.pid) {
					if p, ok := h.book.find(typ, k); !ok || h.book.isProvisional(p.binding.Serial) {
						return fmt.Errorf("%s: %+v", typ, p)
					}
				}
				return nil
			})
			now := h.provisional(fresh.pid, false)
			for _, typ := range containerTypes[:1] {
				if now[typ] == given[typ] {
					t.Errorf("%s kept %s", typ, now[typ])
				}
			}
			same(t, committed, h.provisional(known.pid, false))
			if s, err := (&local{a: h.Agent}).Status(t.Context(), nil); err != nil || s.GetReplaced() != 5 || s.GetProvisional() != 0 {
				t.Errorf("%v, %v", s, err)
			}
			h.logged("provisional serials are void")
			h.logged("a serial was replaced")
			h.consistent()
		})
	}
}

// TestDumpAway: a tree whose serials are provisional is not dumped while the pool is away, and is when it is back.
func TestDumpAway(t *testing.T) {
	h := newHost(t)
	h.goAway()
	tree := container(t, containerFlags)
	given := h.provisional(tree.pid, true)
	images := writeImages(t, "run", containerTypes...)
	c := h.criu()
	c.vetoed(criuhook.PreDump, tree.pid, images, "away")
	c.end()
	h.comeBack()
	same(t, given, h.provisional(tree.pid, false))
	h.settled()
	next := h.criu()
	images = writeImages(t, "next", containerTypes...)
	next.passes(criuhook.PreDump, tree.pid, images)
	next.passes(criuhook.PostDump, tree.pid, images)
	tree.end()
	h.reaches(h.book.all()[0].Serial, alloc.StateRunning) // the host's own
	next.end()
	h.settled()
	h.consistent()
}
