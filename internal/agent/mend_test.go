package agent

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// mend is an operator's.
func (h *host) mend(kind alloc.Kind, id string) {
	h.t.Helper()
	_, err := h.pool.svc.Mend(h.t.Context(), alloc.MendCommand{RequestID: client.NewRequestID(), Actor: "operator/ann", Kind: kind, ID: id, Force: true})
	if err != nil {
		h.t.Fatal(err)
	}
}

// logged waits until the agent has said something.
func (h *host) logged(what string) {
	h.t.Helper()
	h.eventually("the log says "+what, func() error {
		if !strings.Contains(h.logs.String(), what) {
			return fmt.Errorf("it does not")
		}
		return nil
	})
}

// TestSandboxPutAside: what lives of it is registered again under fresh serials, and said loudly, whether
// the agent finds that out when it writes or when it reads; others keep theirs.
func TestSandboxPutAside(t *testing.T) {
	for _, write := range []bool{false, true} {
		t.Run(fmt.Sprintf("write=%t", write), func(t *testing.T) {
			h := newHost(t)
			p, other := spawn(t, unix.CLONE_NEWNET, "/proc/self/exe", roleVar+"=unsharer"), container(t, containerFlags)
			before, kept := h.serials(p.pid)[alloc.Net], h.serials(other.pid)
			life := h.registrar.life.Load()
			h.mend(alloc.KindSandbox, before.sandbox.String())
			if write { // a namespace more makes it register in the sandbox that it believes to have
				if p.tell("uts") != "true" {
					t.Fatal("unshare uts failed")
				}
			} else { // as after rereadAfter
				h.registrar.read.Store(nil)
			}
			h.logged("it was put aside (nsalloc mend)")
			h.eventually("it is registered again", func() error {
				if now, ok := h.book.find(alloc.Net, h.namespaces(p.pid)[alloc.Net]); !ok || now.sandbox == before.sandbox || now.binding.Serial == before.binding.Serial {
					return fmt.Errorf("%+v", now)
				}
				return nil
			})
			h.consistent()
			for typ, was := range kept {
				if now := h.serials(other.pid)[typ]; now.binding.Serial != was.binding.Serial {
					t.Errorf("another container's %s was %s and is %s", typ, was.binding.Serial, now.binding.Serial)
				}
			}
			if h.registrar.life.Load() != life {
				t.Error("the host began a new life")
			}
			p.end()
			h.consistent()
		})
	}
}

// TestHostsOwnPutAside: the host's own namespaces get fresh serials too.
func TestHostsOwnPutAside(t *testing.T) {
	h := newHost(t)
	own := h.book.ofHost(h.bootID())
	h.mend(alloc.KindSandbox, own.Serial.String())
	h.registrar.read.Store(nil)
	h.eventually("it is registered again", func() error {
		if now := h.book.ofHost(h.bootID()); now == nil || now.Serial == own.Serial {
			return fmt.Errorf("%+v", now)
		}
		return nil
	})
	h.consistent()
}

// TestRangesBurned: an agent whose ranges an operator burned, with the host or with their generation, asks
// for others and goes on: the same life, the same serials for what has some.
func TestRangesBurned(t *testing.T) {
	for kind, id := range map[alloc.Kind]string{alloc.KindHost: "a", alloc.KindCounter: ""} {
		t.Run(string(kind), func(t *testing.T) {
			h := newHost(t)
			c := container(t, containerFlags)
			before := serialsOf(h.serials(c.pid))
			life := h.registrar.life.Load()
			had := hostRecord(t, h).Granted
			h.mend(kind, id)
			if kind == alloc.KindCounter {
				h.logged("the pool is in another generation")
			}
			fresh := container(t, containerFlags)
			for typ, p := range h.serials(fresh.pid) {
				if had.Contains(p.binding.Serial) {
					t.Errorf("%s got %s of a range that was burned", typ, p.binding.Serial)
				}
				if kind == alloc.KindCounter && p.sandbox != h.book.ofHost(h.bootID()).Serial && p.binding.Serial.Generation() != 2 {
					t.Errorf("%s got %s after the generation was raised", typ, p.binding.Serial)
				}
			}
			for typ, p := range h.serials(c.pid) {
				if p.binding.Serial != before[typ] {
					t.Errorf("%s was %s and is %s", typ, before[typ], p.binding.Serial)
				}
			}
			if h.registrar.life.Load() != life {
				t.Error("the host began a new life")
			}
			h.consistent()
		})
	}
}

// TestBurnedUnderHook: CRIU's action is the first to spend after the ranges were burned. It is not vetoed for
// that, and what it commits is of other ranges.
func TestBurnedUnderHook(t *testing.T) {
	for name, do := range map[string]func(h *host, burned func()) (fresh []alloc.Serial){
		"dump": func(h *host, burned func()) []alloc.Serial {
			tree := container(h.t, containerFlags)
			sandbox := h.sandbox(tree.pid)
			images := writeImages(h.t, "run", containerTypes...)
			c := h.criu()
			c.passes(criuhook.PreDump, tree.pid, images)
			burned()
			c.passes(criuhook.PostDump, tree.pid, images)
			tree.end()
			c.end()
			s, cp := h.reaches(sandbox, alloc.StateInTransit)
			again, _ := h.restored(images)
			again.end()
			h.reaches(s.Serial, alloc.StateRunning)
			return []alloc.Serial{cp.Serial}
		},
		"adopted": func(h *host, burned func()) (fresh []alloc.Serial) {
			images := writeImages(h.t, "unknown", containerTypes...)
			burned()
			c, pid := h.restored(images)
			c.end()
			serials := serialsOf(h.serials(pid))
			for _, typ := range containerTypes {
				fresh = append(fresh, serials[typ])
			}
			return fresh
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.serials(container(t, containerFlags).pid)
			var had alloc.Ranges
			fresh := do(h, func() {
				had = hostRecord(t, h).Granted
				h.mend(alloc.KindHost, "a")
			})
			for _, serial := range fresh {
				if had.Contains(serial) {
					t.Errorf("%s is of a range that was burned", serial)
				}
			}
			if !strings.Contains(h.logs.String(), "the pool knows other ranges than this agent") {
				t.Error("something else spent before the hook: this proves nothing")
			}
			h.settled()
			h.consistent()
		})
	}
}

// TestNewGenerationTwice: the pool goes away just when the agent joins its new generation; it joins when the
// pool is back, and not when its copy of the records has got old.
func TestNewGenerationTwice(t *testing.T) {
	h := newHost(t)
	h.serials(container(t, containerFlags).pid)
	h.pool.before("Hello", func() { h.pool.setAway(true) })
	h.mend(alloc.KindCounter, "")
	h.logged("the pool is in another generation")
	h.logged("the pool is not reached")
	back := time.Now()
	h.pool.setAway(false)
	h.eventually("the agent has joined anew", func() error {
		if age := h.registrar.age(); age > time.Since(back) {
			return fmt.Errorf("its records are of %v ago", age)
		}
		return nil
	})
	h.consistent()
}

func hostRecord(t *testing.T, h *host) *alloc.Host {
	t.Helper()
	entries, _, err := h.pool.store.Get(t.Context(), alloc.HostKey("a"))
	if err != nil {
		t.Fatal(err)
	}
	return entries[0].Record.(*alloc.Host)
}

// TestHostRecordBroken: the record of a host cannot be read; mended, the agent begins a new life and keeps
// what lives.
func TestHostRecordBroken(t *testing.T) {
	h := newHost(t)
	c := container(t, containerFlags)
	before := serialsOf(h.serials(c.pid))
	life := h.registrar.life.Load()
	if err := h.pool.store.Plant(t.Context(), alloc.HostKey("a"), []byte{1, 0xff}); err != nil {
		t.Fatal(err)
	}
	fresh := container(t, containerFlags)
	h.logged("it cannot be read")
	h.mend(alloc.KindHost, "a")
	h.eventually("a new life", func() error { // until then what is fresh has a provisional serial
		if now := h.registrar.life.Load(); now <= life {
			return fmt.Errorf("incarnation %d after %d", now, life)
		}
		return nil
	})
	h.serials(fresh.pid)
	for typ, p := range h.serials(c.pid) {
		if p.binding.Serial != before[typ] {
			t.Errorf("%s was %s and is %s", typ, before[typ], p.binding.Serial)
		}
	}
	h.consistent()
}
