package agent

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// TestOneRefused: what the pool decides against keeps nobody else waiting, is found in few registrations, and the
// others are in order.
func TestOneRefused(t *testing.T) {
	for name, away := range map[string]bool{"direct": false, "provisional": true} {
		t.Run(name, func(t *testing.T) {
			h := idleHost(t)
			h.quiet = true
			h.start()
			if away {
				h.goAway()
			}
			var all []*proc
			for range 10 {
				all = append(all, container(t, unix.CLONE_NEWUTS))
			}
			bad := spawn(t, 0, "/proc/self/exe", roleVar+"=unsharer")
			if bad.tell("bad") != "true" || bad.tell("uts") != "true" {
				t.Fatal("the process could not do it")
			}
			for range 20 {
				all = append(all, container(t, unix.CLONE_NEWUTS))
			}
			h.pool.mu.Lock()
			h.pool.refuse = func(cmd alloc.RegisterCommand) error {
				if slices.ContainsFunc(cmd.Items, func(it alloc.RegisterItem) bool { return it.Labels["command"] == "bad" }) {
					return &alloc.Error{Reason: alloc.ReasonTooLarge, Subject: "sandbox", Msg: "it is refused"}
				}
				return nil
			}
			calls := h.pool.calls["Register"]
			h.pool.mu.Unlock()
			var given []map[alloc.NamespaceType]alloc.Serial
			h.sweepSoon()
			if away {
				for _, c := range all {
					given = append(given, h.provisional(c.pid, true))
				}
				h.comeBack()
			}
			for i, c := range all {
				now := serialsOf(h.serials(c.pid))
				if away && now[alloc.UTS] != given[i][alloc.UTS] {
					t.Errorf("%s became %s", given[i][alloc.UTS], now[alloc.UTS])
				}
			}
			h.pool.mu.Lock()
			defer h.pool.mu.Unlock()
			if n := h.pool.calls["Register"] - calls; n > 14 { // 31 halved five times, twice each, and a second sweep
				t.Errorf("%d registrations", n)
			}
			h.pool.refuse = nil
		})
	}
}

// TestPace: what is asked for follows what is used in a minute, by doubling and halving; a few at once, as when a
// host is filled, say nothing.
func TestPace(t *testing.T) {
	at := time.Now()
	p := pace{}
	left := uint64(0)
	for i, c := range []struct {
		lasts time.Duration
		used  uint64
		want  uint64
	}{
		{0, 0, minGrant}, {time.Millisecond, 9, minGrant}, {30 * time.Second, minGrant, 2 * minGrant}, {time.Second, minGrant, 4 * minGrant},
		{time.Minute, 4 * minGrant, 4 * minGrant}, {2 * time.Minute, 4 * minGrant, 4 * minGrant}, {time.Second, 4 * minGrant, maxGrant}, {time.Second, maxGrant, maxGrant},
		{5 * time.Minute, maxGrant, maxGrant / 2}, {time.Hour, maxGrant / 2, maxGrant / 4}, {time.Hour, minGrant, minGrant}, {time.Hour, minGrant, minGrant},
	} {
		at = at.Add(c.lasts)
		before := left - min(left, c.used)
		left = before + 2*maxGrant
		p.granted(at, before, left)
		if p.size() != c.want {
			t.Errorf("%d: %d after %d were used in %v, want %d", i, p.size(), c.used, c.lasts, c.want)
		}
	}
}

// TestSpare: a registration does not wait for a range, which is fetched beside it before one is needed.
func TestSpare(t *testing.T) {
	h := newHost(t)
	h.spare()
	if held := hostRecord(t, h).Granted.Count(); held > 2*minGrant {
		t.Errorf("a host that has numbered itself holds %d serials", held)
	}
	asked, answer := make(chan struct{}), make(chan struct{})
	h.pool.before("Grant", func() {
		close(asked)
		<-answer
	})
	for n := 0; n < 2*minGrant; n++ { // until it asks
		c := container(t, containerFlags)
		h.serials(c.pid)
		c.end()
		select {
		case <-asked:
			n = 2 * minGrant
		default:
		}
		if h.registrar.left.Load() >= minGrant+100 {
			h.useUpFront(h.registrar.left.Load() - minGrant)
		}
	}
	h.serials(container(t, containerFlags).pid) // while it is asked for
	before := h.registrar.left.Load()
	close(answer)
	h.eventually("the spare is there", func() error {
		if left := h.registrar.left.Load(); left < before+minGrant/2 {
			return fmt.Errorf("%d are left", left)
		}
		return nil
	})
	h.serials(container(t, containerFlags).pid)
	h.consistent()
}

// useUpFront burns n serials in the pool, as registrations do.
func (h *host) useUpFront(n uint64) {
	h.t.Helper()
	done, err := h.registrar.hold(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	defer done()
	spend, _, _ := h.registrar.ranges.Take(n)
	own := h.book.ofHost(h.bootID())
	if _, err := h.registrar.register(h.t.Context(), spend, nil, alloc.RegisterItem{Sandbox: own.Serial, Epoch: own.Epoch}); err != nil {
		h.t.Fatal(err)
	}
}
