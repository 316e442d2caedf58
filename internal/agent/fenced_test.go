package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// twin is another agent of the host's name, which is not started yet.
func (h *host) twin() *host {
	h.t.Helper()
	dir, err := os.MkdirTemp("", "agent")
	if err != nil {
		h.t.Fatal(err)
	}
	b := &host{t: h.t, pool: h.pool, dir: dir, logs: &lockedBuffer{}, stop: func() error { return nil }}
	h.t.Cleanup(func() {
		if err := b.stop(); err != nil {
			h.t.Errorf("the other agent ended: %v", err)
		}
		os.RemoveAll(dir)
		if h.t.Failed() {
			h.t.Log("the other agent:\n" + b.logs.String())
		}
	})
	return b
}

// quick has fenced agents look, and those at work show themselves, in moments. Before the first agent starts.
func quick(t *testing.T, look time.Duration) {
	first, last, reread := firstLook, lastLook, rereadAfter
	firstLook, lastLook, rereadAfter = look, 4*look, time.Millisecond
	t.Cleanup(func() { firstLook, lastLook, rereadAfter = first, last, reread })
}

// status is what the agent's own service says.
func (h *host) status() *nsallocv1.StatusResponse {
	h.t.Helper()
	st, err := (&local{a: h.Agent}).Status(h.t.Context(), &nsallocv1.StatusRequest{})
	if err != nil {
		h.t.Fatal(err)
	}
	return st
}

// fight has two agents number containers until one of them is down, and returns who goes on and who does not.
func fight(t *testing.T, a, b *host) (up, down *host) {
	t.Helper()
	for deadline := time.Now().Add(6 * settledIn); ; {
		switch aDown, bDown := a.status().GetDown(), b.status().GetDown(); {
		case aDown && bDown:
			t.Fatal("both are down")
		case aDown:
			return b, a
		case bDown:
			return a, b
		case time.Now().After(deadline):
			t.Fatal("they fence each other still")
		}
		c := container(t, containerFlags)
		a.eventually("one of them numbers it", func() error {
			for _, k := range a.namespaces(c.pid) {
				if _, ok := a.book.find(alloc.Mnt, k); ok {
					return nil
				}
				if _, ok := b.book.find(alloc.Mnt, k); ok {
					return nil
				}
			}
			return errors.New("nobody has")
		})
		c.end()
	}
}

// TestTwins: two agents of one name, both alive. One of them goes on, after a few lives; the other one does nothing and
// says why; what was committed keeps its serials.
func TestTwins(t *testing.T) {
	for name, begin := range map[string]func(t *testing.T, a, b *host){
		"a copy of the state": func(t *testing.T, a, b *host) {
			a.mustStop()
			if err := os.CopyFS(filepath.Join(b.dir, "state"), os.DirFS(a.stateDir())); err != nil {
				t.Fatal(err)
			}
			a.start()
			b.startOnly()
		},
		"a state of its own": func(_ *testing.T, _, b *host) { b.startOnly() },
		"both at once": func(t *testing.T, a, b *host) {
			a.mustStop()
			if err := os.CopyFS(filepath.Join(b.dir, "state"), os.DirFS(a.stateDir())); err != nil {
				t.Fatal(err)
			}
			a.startOnly()
			b.startOnly()
		},
	} {
		t.Run(name, func(t *testing.T) {
			quick(t, time.Hour)
			a := idleHost(t)
			b := a.twin()
			a.start()
			tree := container(t, containerFlags)
			before := serialsOf(a.serials(tree.pid))
			life := a.registrar.life.Load()
			begin(t, a, b)
			up, down := fight(t, a, b)

			fresh := container(t, containerFlags)
			fresh1 := serialsOf(up.serials(fresh.pid))
			same(t, before, serialsOf(up.serials(tree.pid)))
			record := hostRecord(t, up)
			n := uint64(record.Incarnation) - life
			t.Logf("%d lives were begun in the fight", n)
			if n > 4 {
				t.Errorf("%d lives were begun", n)
			}
			if got := up.registrar.life.Load(); got != uint64(record.Incarnation) {
				t.Errorf("life %d goes on, the pool has %s", got, record.Incarnation)
			}
			if record.Labels[contendedLabel] == "" {
				t.Errorf("the one that goes on does not show itself: %v", record.Labels)
			}
			// The other one says nothing to the pool, gives nothing, and says why.
			st := down.status()
			for _, want := range []string{"two agents of this name are alive", "give one of the two machines another host name", "an empty state directory"} {
				if !strings.Contains(st.GetTrouble(), want) {
					t.Errorf("it does not say %q: %s", want, st.GetTrouble())
				}
			}
			if st.GetConnected() || st.GetFenced() == 0 || !strings.Contains(down.logs.String(), "this agent is down") {
				t.Errorf("%v", st)
			}
			if err := down.registrar.provide(t.Context(), []wish{{}}); err == nil {
				t.Error("it gives serials")
			}
			if _, err := down.registrar.hold(expired(t)); err == nil || !strings.Contains(err.Error(), "two agents of this name are alive") {
				t.Errorf("who waits for it is told %v", err)
			}
			for typ, k := range down.namespaces(fresh.pid) {
				if p, ok := down.book.find(typ, k); ok && p.sandbox != down.book.ofHost(down.bootID()).Serial {
					t.Errorf("it numbered %s: %v", typ, p)
				}
			}
			if err := down.stop(); err != nil {
				t.Error(err)
			}
			up.consistent()
			same(t, fresh1, serialsOf(up.serials(fresh.pid)))
			if now := hostRecord(t, up).Incarnation; now != record.Incarnation {
				t.Errorf("life %s, then %s", record.Incarnation, now)
			}
		})
	}
}

// expired is a context that is over.
func expired(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

// TestTwinGone: an agent that is down stays so while the other one is at work, also idle, and goes on by itself when it
// is gone.
func TestTwinGone(t *testing.T) {
	quick(t, 500*time.Millisecond)
	a := idleHost(t)
	b := a.twin()
	a.start()
	b.startOnly()
	up, down := fight(t, a, b)
	life := hostRecord(t, up).Incarnation
	down.eventually("it has looked twice", func() error {
		if n := strings.Count(down.logs.String(), "this agent is down still"); n < 2 {
			return fmt.Errorf("%d times", n)
		}
		return nil
	})
	if now := hostRecord(t, up).Incarnation; now != life {
		t.Errorf("life %s, then %s", life, now)
	}
	if !down.status().GetDown() || up.status().GetDown() {
		t.Error("they have changed places")
	}
	up.mustStop()
	down.logged("the other agent of this name is silent")
	c := container(t, containerFlags)
	down.serials(c.pid)
	if st := down.status(); st.GetDown() || !st.GetConnected() {
		t.Errorf("%v", st)
	}
	if now := hostRecord(t, down).Incarnation; now != life+1 {
		t.Errorf("life %s, then %s", life, now)
	}
	down.consistent()
}

// TestFencedAlone: an agent that is alone and was fenced, because what it knows was put back, is at work again at once.
func TestFencedAlone(t *testing.T) {
	h := newHost(t)
	tree := container(t, containerFlags)
	before := serialsOf(h.serials(tree.pid))
	life := h.registrar.life.Load()
	// What it was itself, after the moment to which it is put back.
	if _, _, err := h.pool.Hello(t.Context(), alloc.HelloCommand{Host: "a", BootID: h.bootID(), Nonce: newNonce()}); err != nil {
		t.Fatal(err)
	}
	h.serials(container(t, containerFlags).pid) // to number it finds out
	h.eventually("it is at work in a life of its own", func() error {
		if got := h.registrar.life.Load(); got < life+2 {
			return fmt.Errorf("life %d", got)
		}
		return nil
	})
	h.serials(container(t, containerFlags).pid)
	if st := h.status(); st.GetDown() || st.GetFenced() != 1 || h.registrar.life.Load() != life+2 {
		t.Errorf("%v", st)
	}
	same(t, before, serialsOf(h.serials(tree.pid)))
	h.consistent()
}
