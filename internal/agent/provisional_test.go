package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
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

// ledgerFile is the ledger as it is now, and puts it back later.
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

// TestNoWait: who does not wait gets a provisional serial while the pool is there, and the same one is committed.
func TestNoWait(t *testing.T) {
	h := idleHost(t)
	h.quiet = true
	h.start()
	c := container(t, containerFlags)
	l := &local{a: h.Agent}
	resp, err := l.Identify(t.Context(), &nsallocv1.IdentifyRequest{Pid: int32(c.pid), NoWait: true})
	if err != nil {
		t.Fatal(err)
	}
	given := map[uint64]bool{}
	for _, n := range resp.GetNamespaces() {
		if n.GetProvisional() == n.GetOfHost() {
			t.Errorf("%v", n)
		}
		given[n.GetBinding().GetSerial()] = true
	}
	if resp, err = l.Identify(t.Context(), &nsallocv1.IdentifyRequest{Pid: int32(c.pid)}); err != nil {
		t.Fatal(err)
	}
	for _, n := range resp.GetNamespaces() {
		if n.GetProvisional() || !given[n.GetBinding().GetSerial()] {
			t.Errorf("%v", n)
		}
	}
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
			h.logged("provisional serials are void")
			h.logged("a provisional serial was replaced")
			h.consistent()
		})
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
			bad := spawn(t, 0, "/proc/self/exe", roleVar+"=unsharer")
			if bad.tell("bad") != "true" || bad.tell("uts") != "true" {
				t.Fatal("the process could not do it")
			}
			var all []*proc
			for range 30 {
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

// TestPace: what is asked for follows what is used.
func TestPace(t *testing.T) {
	at := time.Now()
	p := pace{}
	for i, c := range []struct {
		lasts time.Duration
		want  uint64
	}{
		{0, minGrant}, {time.Second, 2 * minGrant}, {29 * time.Second, 4 * minGrant}, {time.Minute, 4 * minGrant}, {time.Second, maxGrant}, {time.Second, maxGrant},
		{3 * time.Minute, maxGrant / 2}, {time.Hour, maxGrant / 4}, {time.Hour, minGrant}, {time.Hour, minGrant},
	} {
		at = at.Add(c.lasts)
		p.granted(at)
		if p.size() != c.want {
			t.Errorf("%d: %d after one that lasted %v, want %d", i, p.size(), c.lasts, c.want)
		}
	}
}

// TestSpare: a registration does not wait for a range, which is fetched beside it before one is needed.
func TestSpare(t *testing.T) {
	h := newHost(t)
	h.spare()
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
	if _, err := h.registrar.register(h.t.Context(), spend, alloc.RegisterItem{Sandbox: own.Serial, Epoch: own.Epoch}); err != nil {
		h.t.Fatal(err)
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
