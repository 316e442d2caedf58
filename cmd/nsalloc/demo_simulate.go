package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// simulate tells the story without hosts. Serials and history come from the rules that servers run, over
// a store in memory; what a dump and a restore do to processes is made up, and every line says so.
func (c *cli) simulate(ctx context.Context, s *screen) error {
	return c.simulateOn(ctx, s, newSimKernel())
}

func (c *cli) simulateOn(ctx context.Context, s *screen, k simKernel) error {
	defer k.close()
	s = s.simulated()
	s.say(styleHead, "Nothing is dumped or restored: there is no CRIU, no runc and no image in this.")
	s.say(styleDim, "", "The pool's rules are the real ones, over a store in memory. Hosts a and b are names with a boot id. "+k.about(), "")
	st, err := newSimulation(ctx, k)
	if err != nil {
		return c.demoFailed(err, nil)
	}
	shown, err := c.tell(ctx, s, st)
	switch {
	case ctx.Err() != nil:
		return c.interrupted(s)
	case err != nil:
		return c.demoFailed(err, nil)
	}
	s.say(stylePlain, "This is what the pool's records say. "+shown.sum(), "", "To see a real container moved by CRIU, run nsalloc demo as root on Debian or Ubuntu.")
	return nil
}

// simulation is the stage of a simulation. One goroutine uses it.
type simulation struct {
	store  *memstore.Store
	svc    *alloc.Service
	kernel simKernel
	hosts  map[string]*simHost

	containers map[string]alloc.Serial // id -> sandbox
	end        func()                  // ends the container's process on a
	checkpoint alloc.Serial
	epoch      alloc.Epoch // on a
	runs       int
}

// simHost is a host's part of the records.
type simHost struct {
	name        string
	boot        string
	incarnation alloc.Incarnation
	left        alloc.Ranges // granted and not spent
	sandbox     alloc.Serial // its own
}

// numbers are the kernel's names of a process's namespaces.
type numbers map[alloc.NamespaceType]alloc.KernelID

// manifestDigest stands for that of a manifest in images that do not exist.
var manifestDigest = alloc.Digest(sha256.Sum256([]byte("simulated")))

func newSimulation(ctx context.Context, k simKernel) (*simulation, error) {
	st := &simulation{store: memstore.New(), kernel: k, hosts: map[string]*simHost{}, containers: map[string]alloc.Serial{}}
	st.svc = alloc.NewService(st.store, nil)
	if _, err := st.svc.InitPool(ctx, alloc.DefaultPolicy()); err != nil {
		return nil, err
	}
	for _, name := range []string{"a", "b"} {
		h := &simHost{name: name, boot: uuid.NewString()}
		st.hosts[name] = h
		said, _, err := st.svc.Hello(ctx, alloc.HelloCommand{RequestID: client.NewRequestID(), Host: name, BootID: h.boot, Nonce: uuid.NewString()})
		if err != nil {
			return nil, err
		}
		h.incarnation = said.Incarnation
		if h.left, err = st.svc.Grant(ctx, alloc.GrantCommand{Mutation: h.mutation(), Count: 4096}); err != nil {
			return nil, err
		}
		if h.sandbox, err = st.register(ctx, h, k.host(), alloc.RegisterItem{OfHost: true}, nil); err != nil {
			return nil, err
		}
	}
	return st, nil
}

func (h *simHost) mutation() alloc.Mutation {
	return alloc.Mutation{RequestID: client.NewRequestID(), Host: h.name, Incarnation: h.incarnation}
}

// take is the next serials of the host, to be spent in one request.
func (h *simHost) take(n int) (spend alloc.Ranges, serials []alloc.Serial, err error) {
	spend, _, ok := h.left.Take(uint64(n))
	if !ok {
		return nil, nil, fmt.Errorf("host %s has no %d serials left", h.name, n)
	}
	for s := range spend.All() {
		serials = append(serials, s)
	}
	return spend, serials, nil
}

// register records a new sandbox of ids; parents are serials by type, for a clone.
func (st *simulation) register(ctx context.Context, h *simHost, ids numbers, it alloc.RegisterItem, parents map[alloc.NamespaceType]alloc.Serial) (alloc.Serial, error) {
	spend, serials, err := h.take(len(ids) + 1)
	if err != nil {
		return 0, err
	}
	it.Sandbox = serials[0]
	for _, t := range alloc.NamespaceTypes() {
		if id, ok := ids[t]; ok {
			serials = serials[1:]
			id.BootID = h.boot
			it.Add = append(it.Add, alloc.Binding{Serial: serials[0], Type: t, Kernel: id, Parent: parents[t]})
		}
	}
	_, h.left, err = st.svc.Register(ctx, alloc.RegisterCommand{Mutation: h.mutation(), Spend: spend, Items: []alloc.RegisterItem{it}})
	return it.Sandbox, err
}

func (st *simulation) words() wording {
	return wording{
		run:     "say that a container runs on a: " + st.kernel.stands(),
		dump:    "record a dump on a, and end the container",
		move:    "copy no images: there are none",
		restore: "record a restore on b, of a new container",
		again:   "record the same restore again, as " + demoClone,
	}
}

func (st *simulation) run(ctx context.Context) (_ string, err error) {
	ids, end, err := st.kernel.start()
	if err != nil {
		return "", err
	}
	st.end, st.epoch = end, 0
	st.containers[demoContainer], err = st.register(ctx, st.hosts["a"], ids, alloc.RegisterItem{Labels: map[string]string{"command": "a simulated container"}}, nil)
	if err == nil {
		var sb *alloc.Sandbox
		if sb, err = st.read(ctx, st.containers[demoContainer]); err == nil {
			st.epoch = sb.Epoch
		}
	}
	return "", err
}

func (st *simulation) dump(ctx context.Context) (string, error) {
	h := st.hosts["a"]
	spend, serials, err := h.take(1)
	if err != nil {
		return "", err
	}
	st.checkpoint = serials[0]
	if _, err := st.svc.Open(ctx, alloc.OpenCommand{Mutation: h.mutation(), Spend: spend, Sandbox: st.containers[demoContainer], Epoch: st.epoch,
		Checkpoint: st.checkpoint, RunID: uuid.NewString(), Digest: manifestDigest}); err != nil {
		return "", err
	}
	_, h.left, _ = h.left.Take(1)
	st.end()
	_, err = st.svc.Confirm(ctx, alloc.ConfirmCommand{Mutation: h.mutation(), Sandbox: st.containers[demoContainer], Epoch: st.epoch,
		Checkpoint: st.checkpoint, Evidence: alloc.SeenStopped})
	return "", err
}

func (st *simulation) move(context.Context) (string, error) { return "", nil }

// restore asks to claim, as every restore does, and goes on as the sandbox or as a clone of it.
func (st *simulation) restore(ctx context.Context, id string) (string, error) {
	h := st.hosts["b"]
	st.runs++
	run := fmt.Sprintf("simulated-%d", st.runs)
	may, err := st.svc.Claim(ctx, alloc.ClaimCommand{Mutation: h.mutation(), Checkpoint: st.checkpoint, Digest: manifestDigest, BootID: h.boot, Run: run})
	if err != nil {
		return "", err
	}
	ids, _, err := st.kernel.start()
	if err != nil {
		return "", err
	}
	if may.Outcome == alloc.MayClone {
		parents := map[alloc.NamespaceType]alloc.Serial{}
		for _, b := range may.Sandbox.Bindings {
			parents[b.Type] = b.Serial
		}
		st.containers[id], err = st.register(ctx, h, ids, alloc.RegisterItem{ParentCheckpoint: st.checkpoint, Labels: may.Sandbox.Labels}, parents)
		return "", err
	}
	bind := alloc.BindCommand{Mutation: h.mutation(), Sandbox: may.Sandbox.Serial, Epoch: may.Sandbox.Epoch, BootID: h.boot, Run: run}
	for _, b := range may.Sandbox.Bindings {
		b.Kernel = ids[b.Type]
		b.Kernel.BootID = h.boot
		bind.Bindings = append(bind.Bindings, b)
	}
	_, h.left, err = st.svc.Bind(ctx, bind)
	return "", err
}

// look reads the records: what a container has itself, and the rest from its host.
func (st *simulation) look(ctx context.Context, host, id string) (look, error) {
	sb, err := st.read(ctx, st.containers[id])
	if err != nil {
		return look{}, err
	}
	if sb.Owner != host {
		return look{}, fmt.Errorf("sandbox %s is on host %s, not on %s", sb.Serial, sb.Owner, host)
	}
	own, err := st.read(ctx, st.hosts[host].sandbox)
	if err != nil {
		return look{}, err
	}
	l := look{host: host, sandbox: sb.Serial}
	for _, t := range alloc.NamespaceTypes() {
		for _, of := range []*alloc.Sandbox{sb, own} {
			if b, ok := bindingOf(of, t); ok {
				l.seen = append(l.seen, sight{t, b.Kernel, b.Serial, b.Parent, of == own})
				break
			}
		}
	}
	return l, nil
}

func bindingOf(s *alloc.Sandbox, t alloc.NamespaceType) (alloc.Binding, bool) {
	for _, b := range s.Bindings {
		if b.Type == t && b.Live() {
			return b, true
		}
	}
	return alloc.Binding{}, false
}

func (st *simulation) count(context.Context, string, string, int) (int, error) { return 0, nil }

func (st *simulation) read(ctx context.Context, serial alloc.Serial) (*alloc.Sandbox, error) {
	entries, _, err := st.store.Get(ctx, alloc.SandboxKey(serial))
	if err != nil {
		return nil, err
	}
	sb, ok := entries[0].Record.(*alloc.Sandbox)
	if !ok {
		return nil, errMissing("sandbox")
	}
	return sb, nil
}

func (st *simulation) history(ctx context.Context, c *cli, serial alloc.Serial) error {
	sb, err := st.read(ctx, st.containers[demoContainer])
	if err != nil {
		return err
	}
	_, sentence := c.what(sb, serial)
	if day := c.oneDay(sb.Stints); day != "" {
		sentence += "\nTimes are of " + day + "."
	}
	return c.print(answer{before: sentence + "\n", table: func() *table {
		return without(c.stintTable(sb.Stints), "EPOCH") // or it would not fit behind the mark
	}})
}

// without is a table without one of its columns.
func without(t *table, title string) *table {
	at := slices.Index(t.head, title)
	if at < 0 {
		return t
	}
	less := newTable(slices.Delete(slices.Clone(t.head), at, at+1)...)
	for _, row := range t.rows {
		less.rows = append(less.rows, slices.Delete(slices.Clone(row), at, at+1))
	}
	return less
}

func (st *simulation) check(ctx context.Context, c *cli) error {
	report, err := st.svc.Check(ctx)
	if err != nil {
		return err
	}
	return c.reported(report)
}
