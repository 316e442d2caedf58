package server

import (
	"errors"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/protobuf/encoding/protowire"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// otherWriter writes to a pool's keys behind its servers' backs.
type otherWriter struct {
	t    testing.TB
	raw  *clientv3.Client
	pool string
}

func otherThan(t testing.TB, pool string) *otherWriter {
	t.Helper()
	raw, err := clientv3.New(clientv3.Config{Endpoints: []string{shared.Endpoint()}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = raw.Close() })
	return &otherWriter{t, raw, pool}
}

func (w *otherWriter) key(k alloc.Key) string { return "/nsalloc/1/" + w.pool + "/" + k.String() }

func (w *otherWriter) get(k alloc.Key) string {
	w.t.Helper()
	got, err := w.raw.Get(w.t.Context(), w.key(k))
	if err != nil || len(got.Kvs) != 1 {
		w.t.Fatal(got, err)
	}
	return string(got.Kvs[0].Value)
}

func (w *otherWriter) put(k alloc.Key, value string) {
	w.t.Helper()
	if _, err := w.raw.Put(w.t.Context(), w.key(k), value); err != nil {
		w.t.Fatal(err)
	}
}

func (w *otherWriter) delete(k alloc.Key) {
	w.t.Helper()
	if _, err := w.raw.Delete(w.t.Context(), w.key(k)); err != nil {
		w.t.Fatal(err)
	}
}

// fromNewer puts a state of the future into a sandbox: of a field that stands twice the last one counts.
func (w *otherWriter) fromNewer(k alloc.Key) (was string) {
	w.t.Helper()
	was = w.get(k)
	w.put(k, was+string(protowire.AppendVarint(protowire.AppendTag(nil, 2, protowire.VarintType), 99)))
	return was
}

// TestUnreadableSandbox: of a newer version, before a server starts and while it runs. Nothing else is
// taken away, and nobody is told that it does not exist.
func TestUnreadableSandbox(t *testing.T) {
	name := newPool()
	st := openPool(t, shared.Endpoint(), name)
	initPool(t, st)
	checked(t, st)
	w := otherThan(t, name)
	first := start(t, Config{Store: st})
	first.waitLoaded()
	a := join(t, first.dial("a"), "a")
	hidden, other := a.register(), a.register()
	value := w.fromNewer(hidden.Key())
	started := start(t, Config{Store: openPool(t, shared.Endpoint(), name)})
	started.waitLoaded()

	for server, r := range map[string]*running{"first": first, "started": started} {
		c := r.dial("")
		for what, serial := range map[string]alloc.Serial{"its own": hidden.Serial, "a namespace's": hidden.Bindings[0].Serial, "nobody's": hidden.Serial + 900} {
			if _, err := c.Sandbox(t.Context(), serial, true); !errors.Is(err, alloc.ErrFormat) || !strings.Contains(err.Error(), hidden.Serial.String()) {
				t.Errorf("%s, Get by %s serial: %v", server, what, err)
			}
		}
		if _, err := c.SandboxOf(t.Context(), "a", alloc.Net, hidden.Bindings[0].Kernel, true); !errors.Is(err, alloc.ErrFormat) {
			t.Errorf("%s, Get by its namespace: %v", server, err)
		}
		if got, err := c.Sandbox(t.Context(), other.Bindings[1].Serial, true); err != nil || got.Sandbox.Serial != other.Serial {
			t.Errorf("%s, Get of the other: %+v, %v", server, got, err)
		}
		var listed []alloc.Serial
		var last error
		for s, err := range c.Sandboxes(t.Context(), client.Filter{Owner: "a", Linearizable: true}) {
			if last = err; err == nil {
				listed = append(listed, s.Serial)
			}
		}
		if len(listed) != 1 || listed[0] != other.Serial || !errors.Is(last, client.ErrIncomplete) || !strings.Contains(last.Error(), "1 of the pool") {
			t.Errorf("%s, List: %v, %v", server, listed, last)
		}
		if n := r.gauge("nsalloc_view_unreadable_records", "sandbox"); n != 1 {
			t.Errorf("%s: the metric says %v", server, n)
		}
		if !r.log.has("a record cannot be read") || !r.log.has(hidden.Serial.String()) {
			t.Errorf("%s: the log does not name it", server)
		}
		pool, err := nsallocv1.NewAllocatorClient(c.Conn()).GetPool(t.Context(), &nsallocv1.GetPoolRequest{})
		if err != nil || pool.GetUnreadable() != 1 {
			t.Errorf("%s, GetPool: %v, %v", server, pool, err)
		}
	}
	// The other one moves on, the hidden one is refused.
	b := join(t, started.dial("b"), "b")
	h := a.confirm(a.dump(other), alloc.SeenStopped)
	b.claim(h.Checkpoint, "r")
	if _, err := a.Open(t.Context(), a.openCommand(hidden)); !errors.Is(err, alloc.ErrFormat) {
		t.Errorf("Open: %v", err)
	}
	w.put(hidden.Key(), value) // as the newer version does when it goes back
	for server, r := range map[string]*running{"first": first, "started": started} {
		c := r.dial("")
		if got, err := c.Sandbox(t.Context(), hidden.Bindings[0].Serial, true); err != nil || got.Sandbox.Serial != hidden.Serial {
			t.Errorf("%s, readable again: %v", server, err)
		}
		if _, err := c.Sandbox(t.Context(), hidden.Serial+900, true); !errors.Is(err, alloc.ErrSerialNotFound) {
			t.Errorf("%s, nobody's serial: %v", server, err)
		}
		if n := r.gauge("nsalloc_view_unreadable_records", "sandbox"); n != 0 {
			t.Errorf("%s: the metric says %v", server, n)
		}
	}
	// One that is deleted is absent.
	w.put(alloc.SandboxKey(hidden.Serial+500), "\xff")
	c := started.dial("")
	if _, err := c.Sandbox(t.Context(), hidden.Serial+500, true); !errors.Is(err, alloc.ErrMalformed) {
		t.Errorf("malformed: %v", err)
	}
	w.delete(alloc.SandboxKey(hidden.Serial + 500))
	if _, err := c.Sandbox(t.Context(), hidden.Serial+500, true); !errors.Is(err, alloc.ErrSerialNotFound) {
		t.Errorf("deleted: %v", err)
	}
	// A key that no sandbox can have is in nobody's way.
	w.put(alloc.Key{Kind: alloc.KindSandbox, ID: "none"}, "\xff")
	if got, err := c.Sandbox(t.Context(), other.Serial, true); err != nil || got.Sandbox.Serial != other.Serial {
		t.Errorf("beside a strange key: %v", err)
	}
	if _, err := c.Sandbox(t.Context(), hidden.Serial+500, true); !errors.Is(err, alloc.ErrSerialNotFound) {
		t.Errorf("nobody's serial, beside a strange key: %v", err)
	}
	for _, err := range c.Sandboxes(t.Context(), client.Filter{Owner: "a", Linearizable: true}) {
		if err != nil { // or no agent would join any more
			t.Errorf("a list, beside a strange key: %v", err)
		}
	}
	w.delete(alloc.Key{Kind: alloc.KindSandbox, ID: "none"})
}

// TestUnreadableCheckpoint: its sandbox is not told as one without a checkpoint, and its run is not unknown.
func TestUnreadableCheckpoint(t *testing.T) {
	name := newPool()
	st := openPool(t, shared.Endpoint(), name)
	initPool(t, st)
	checked(t, st)
	w := otherThan(t, name)
	r := start(t, Config{Store: st})
	r.waitLoaded()
	a, c := join(t, r.dial("a"), "a"), r.dial("")
	h, other := a.dump(a.register()), a.dump(a.register())
	key := h.Checkpoint.Key()
	value := w.get(key)
	w.put(key, "\xff")
	for what, err := range map[string]error{
		"Find by serial":                           second(c.Checkpoint(t.Context(), h.Checkpoint.Serial)),
		"Find by run":                              second(c.CheckpointByRun(t.Context(), h.Checkpoint.RunID)),
		"Find of an unknown run":                   second(c.CheckpointByRun(t.Context(), "no-such-run")),
		"Get of its sandbox":                       second(c.Sandbox(t.Context(), h.Sandbox.Serial, true)),
		"Get of its sandbox by it":                 second(c.Sandbox(t.Context(), h.Checkpoint.Serial, true)),
		"Confirm, which must not take it for void": second(a.Confirm(t.Context(), alloc.ConfirmCommand{Mutation: a.mutation(), Sandbox: h.Sandbox.Serial, Epoch: h.Sandbox.Epoch, Checkpoint: h.Checkpoint.Serial, Evidence: alloc.SeenStopped})),
	} {
		if !errors.Is(err, alloc.ErrMalformed) || !strings.Contains(err.Error(), h.Checkpoint.Serial.String()) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := c.Checkpoint(t.Context(), h.Checkpoint.Serial+900); !errors.Is(err, alloc.ErrCheckpointNotFound) {
		t.Errorf("Find of a serial that no checkpoint has: %v", err)
	}
	if got, err := c.CheckpointByRun(t.Context(), other.Checkpoint.RunID); err != nil || got.Serial != other.Checkpoint.Serial {
		t.Errorf("Find of the other: %+v, %v", got, err)
	}
	n := 0
	var last error
	for cp, err := range c.Checkpoints(t.Context(), 0) {
		if last = err; cp != nil {
			n++
		}
	}
	if n != 1 || !errors.Is(last, client.ErrIncomplete) {
		t.Errorf("ListCheckpoints: %d, %v", n, last)
	}
	w.put(key, value)
	if got, err := c.CheckpointByRun(t.Context(), h.Checkpoint.RunID); err != nil || got.Serial != h.Checkpoint.Serial {
		t.Errorf("readable again: %+v, %v", got, err)
	}
}

// TestUnreadableHost: the others are listed, and this one is not unknown.
func TestUnreadableHost(t *testing.T) {
	name := newPool()
	st := openPool(t, shared.Endpoint(), name)
	initPool(t, st)
	checked(t, st)
	w := otherThan(t, name)
	r := start(t, Config{Store: st})
	r.waitLoaded()
	join(t, r.dial("a"), "a")
	join(t, r.dial("b"), "b")
	c := r.dial("")
	value := w.get(alloc.HostKey("a"))
	w.put(alloc.HostKey("a"), "\xff")
	if err := r.view.catchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Host(t.Context(), "a"); !errors.Is(err, alloc.ErrMalformed) {
		t.Errorf("Get: %v", err)
	}
	if _, err := c.Host(t.Context(), "c"); !errors.Is(err, alloc.ErrHostUnknown) {
		t.Errorf("Get of one that is not there: %v", err)
	}
	if h, err := c.Host(t.Context(), "b"); err != nil || h.Name != "b" {
		t.Errorf("Get of the other: %v", err)
	}
	n := 0
	var last error
	for h, err := range c.Hosts(t.Context()) {
		if last = err; h != nil {
			n++
		}
	}
	if n != 1 || !errors.Is(last, client.ErrIncomplete) {
		t.Errorf("List: %d, %v", n, last)
	}
	w.put(alloc.HostKey("a"), value)
}

// unreadOf waits until a server's view is up to date, and is what lists of a host's sandboxes leave out ("": of the pool's).
func (r *running) unreadOf(owner string) uint64 {
	r.t.Helper()
	resp, err := nsallocv1.NewSandboxesClient(r.dial("").Conn()).List(r.t.Context(), &nsallocv1.SandboxesListRequest{Owner: owner, Linearizable: true})
	if err != nil {
		r.t.Fatal(err)
	}
	return resp.GetUnreadable()
}

// TestUnreadableOfOneHost: a record that cannot be read makes only those lists incomplete that it may be missing
// from, or an agent that starts anywhere could not join.
func TestUnreadableOfOneHost(t *testing.T) {
	name := newPool()
	st := openPool(t, shared.Endpoint(), name)
	initPool(t, st)
	checked(t, st)
	w := otherThan(t, name)
	knew := start(t, Config{Store: st}) // what is unreadable, before it became so
	knew.waitLoaded()
	sb := join(t, knew.dial("a"), "a").register()
	join(t, knew.dial("b"), "b").register()
	value := w.get(sb.Key())
	handed := string(protowire.AppendString(protowire.AppendTag(nil, 3, protowire.BytesType), "b"))
	unknown := alloc.SandboxKey(sb.Serial + 500)
	check := func(what string, r *running, a, b, pool uint64) {
		t.Helper()
		if gotA, gotB, got := r.unreadOf("a"), r.unreadOf("b"), r.unreadOf(""); gotA != a || gotB != b || got != pool {
			t.Errorf("%s: the lists of a, b and the pool leave out %d, %d and %d, not %d, %d and %d", what, gotA, gotB, got, a, b, pool)
		}
	}
	late := func() *running { // a server that has seen nothing else
		r := start(t, Config{Store: openPool(t, shared.Endpoint(), name)})
		r.waitLoaded()
		return r
	}
	check("all is readable", knew, 0, 0, 0)
	w.fromNewer(sb.Key())
	newer := late()
	for what, r := range map[string]*running{"it knew": knew, "it started": newer} {
		check("a newer version's, "+what, r, 1, 0, 1)
	}
	w.put(sb.Key(), w.get(sb.Key())+handed) // the newer version handed it off
	for what, r := range map[string]*running{"it knew": knew, "it started": newer} {
		check("handed off, "+what, r, 0, 1, 1)
	}
	w.put(sb.Key(), "\xff")
	check("garbage, after it was b's", knew, 0, 1, 1)
	check("garbage, to who knows nothing of it", late(), 1, 1, 1)
	w.put(sb.Key(), value)
	check("readable again", knew, 0, 0, 0)
	w.put(sb.Key(), "\xff")
	check("garbage in place of a's", knew, 1, 0, 1)
	w.put(unknown, "\xff")
	check("and garbage that may be anyone's", knew, 2, 1, 2)
	w.put(unknown, value) // of another sandbox: what it names as its owner says nothing
	check("and a value of another sandbox", knew, 2, 1, 2)
	w.delete(unknown)
	check("that is gone", knew, 1, 0, 1)
	w.put(sb.Key(), value)
	check("all is readable again", knew, 0, 0, 0)
	knew.view.mu.RLock()
	defer knew.view.mu.RUnlock()
	if ix := knew.view.ix; len(ix.hiddenOf) != 0 || len(ix.unreadOf) != 0 {
		t.Errorf("left over: %v, %v", ix.hiddenOf, ix.unreadOf)
	}
}

// TestUnreadablePool: without the pool's record there is no answer and no issue, and health says so; when it is
// back, there is. Without the counter nothing is issued, and all else goes on.
func TestUnreadablePool(t *testing.T) {
	name := newPool()
	st := openPool(t, shared.Endpoint(), name)
	initPool(t, st)
	checked(t, st)
	w := otherThan(t, name)
	r := start(t, Config{Store: st})
	r.waitLoaded()
	a := join(t, r.dial("a"), "a")
	sb := a.register()
	c := r.dial("")
	for _, kind := range []alloc.Kind{alloc.KindPool, alloc.KindCounter} {
		key := alloc.Key{Kind: kind}
		value := w.get(key)
		w.put(key, "\xff")
		_, err := c.Sandbox(t.Context(), sb.Serial, true)
		switch {
		case kind == alloc.KindPool && (!errors.Is(err, alloc.ErrMalformed) || !strings.Contains(err.Error(), string(kind))):
			t.Errorf("a read without the %s: %v", kind, err)
		case kind == alloc.KindCounter && err != nil:
			t.Errorf("a read without the %s: %v", kind, err)
		}
		if _, err := a.Grant(t.Context(), alloc.GrantCommand{Mutation: a.mutation(), Count: 1}); !errors.Is(err, alloc.ErrMalformed) || !strings.Contains(err.Error(), string(kind)) {
			t.Errorf("Grant without the %s: %v", kind, err)
		}
		if _, err := c.Allocate(t.Context(), alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 1}); !errors.Is(err, alloc.ErrMalformed) || !strings.Contains(err.Error(), string(kind)) {
			t.Errorf("Allocate without the %s: %v", kind, err)
		}
		if kind == alloc.KindPool {
			eventually(t, "health says it of "+string(kind), func() bool { return r.gauge("nsalloc_serving", "") == 0 })
		} else {
			if err := r.probe(t.Context()); err != nil {
				t.Errorf("health without the %s: %v", kind, err)
			}
			if n := r.gauge("nsalloc_view_unreadable_records", string(kind)); n != 1 {
				t.Errorf("the metric of the %s says %v", kind, n)
			}
			if h, err := a.Open(t.Context(), a.openCommand(sb)); err != nil {
				t.Errorf("Open without the %s: %+v, %v", kind, h, err)
			}
		}
		w.put(key, value)
		if _, err := c.Sandbox(t.Context(), sb.Serial, true); err != nil {
			t.Errorf("with the %s: %v", kind, err)
		}
		eventually(t, "it serves again", func() bool { return r.gauge("nsalloc_serving", "") == 1 })
	}
}

func second[T any](_ T, err error) error { return err }

// gauge reads a metric; kind is its label, if it has one.
func (r *running) gauge(name, kind string) float64 {
	r.t.Helper()
	families, err := r.cfg.Registry.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && (kind == "" || m.GetLabel()[0].GetValue() == kind) {
				return m.GetGauge().GetValue()
			}
		}
	}
	r.t.Fatalf("there is no metric %s of %q", name, kind)
	return 0
}
