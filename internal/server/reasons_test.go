package server

import (
	"context"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/nsalloc/nsalloc/internal/memstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// seen collects which reasons crossed the wire in this test; at its end every reason that a server can
// give must have.
type seen map[alloc.Reason]bool

// refused proves that err is a refusal with all that belongs to it, as any gRPC client sees it.
func (s seen) refused(t *testing.T, err error, reason alloc.Reason, code codes.Code, retry bool) {
	t.Helper()
	s[reason] = true
	if alloc.ReasonOf(err) != reason || status.Code(err) != code {
		t.Errorf("got %v %v (%v), want %v %v", status.Code(err), alloc.ReasonOf(err), err, code, reason)
		return
	}
	var info *errdetails.ErrorInfo
	var wait *errdetails.RetryInfo
	for _, d := range status.Convert(err).Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			info = d
		case *errdetails.RetryInfo:
			wait = d
		}
	}
	if info.GetDomain() != "nsalloc" || info.GetReason() != string(reason) {
		t.Errorf("%v: ErrorInfo %v", reason, info)
	}
	if retry != (wait.GetRetryDelay().AsDuration() > 0) {
		t.Errorf("%v: RetryInfo %v", reason, wait)
	}
	if msg := status.Convert(err).Message(); msg == "" || strings.Contains(msg, "rpc error") {
		t.Errorf("%v: message %q", reason, msg)
	}
}

func TestReasons(t *testing.T) {
	all := seen{}
	t.Run("requests", func(t *testing.T) { all.requests(t) })
	t.Run("hosts", func(t *testing.T) { all.hosts(t) })
	t.Run("sandboxes", func(t *testing.T) { all.sandboxes(t) })
	t.Run("handoff", func(t *testing.T) { all.handoff(t) })
	t.Run("pool", func(t *testing.T) { all.pool(t) })
	t.Run("store", func(t *testing.T) { all.store(t) })
	for _, r := range []alloc.Reason{
		alloc.ReasonInvalid, alloc.ReasonSandboxNotFound, alloc.ReasonCheckpointNotFound, alloc.ReasonHostUnknown, alloc.ReasonSerialNotFound,
		alloc.ReasonPoolMissing, alloc.ReasonRecovering, alloc.ReasonFormat, alloc.ReasonMalformed, alloc.ReasonStaleIncarnation,
		alloc.ReasonStaleEpoch, alloc.ReasonNotOwner, alloc.ReasonWrongState, alloc.ReasonNotConfirmed, alloc.ReasonClaimed, alloc.ReasonVoid,
		alloc.ReasonRefused, alloc.ReasonManifest, alloc.ReasonRange, alloc.ReasonBound, alloc.ReasonRequestReused, alloc.ReasonRequestExpired,
		alloc.ReasonExhausted, alloc.ReasonConflict, alloc.ReasonUnknownOutcome, alloc.ReasonUnavailable, alloc.ReasonTooLarge, alloc.ReasonCaller,
	} {
		if !all[r] {
			t.Errorf("no call was refused with %s", r)
		}
	}
	t.Log(slices.Sorted(maps.Keys(all)))
}

func (s seen) requests(t *testing.T) {
	r, _ := serving(t)
	c := r.dial("")
	ctx := t.Context()
	allocate := func(id string, n uint64) error {
		_, err := c.Allocate(ctx, alloc.AllocateCommand{RequestID: id, Count: n})
		return err
	}
	id := client.NewRequestID()
	if err := allocate(id, 1); err != nil {
		t.Fatal(err)
	}
	s.refused(t, allocate(id, 2), alloc.ReasonRequestReused, codes.FailedPrecondition, false)
	s.refused(t, allocate(requestAt(time.Now().Add(-11*time.Minute)), 1), alloc.ReasonRequestExpired, codes.FailedPrecondition, false)
	s.refused(t, allocate(requestAt(time.Now().Add(2*time.Minute)), 1), alloc.ReasonInvalid, codes.InvalidArgument, false)
	s.refused(t, allocate(uuid.NewString(), 1), alloc.ReasonInvalid, codes.InvalidArgument, false)
	s.refused(t, allocate(client.NewRequestID(), 0), alloc.ReasonInvalid, codes.InvalidArgument, false)
	s.refused(t, allocate(client.NewRequestID(), 1<<20+1), alloc.ReasonInvalid, codes.InvalidArgument, false)
	// An operator is no host.
	_, _, err := c.Hello(ctx, alloc.HelloCommand{RequestID: client.NewRequestID(), BootID: uuid.NewString(), Nonce: uuid.NewString()})
	s.refused(t, err, alloc.ReasonCaller, codes.PermissionDenied, false)
}

func (s seen) hosts(t *testing.T) {
	r, _ := serving(t)
	ctx := t.Context()
	a := join(t, r.dial("a"), "a")
	ghost := r.dial("ghost")
	_, err := ghost.Host(ctx, "ghost")
	s.refused(t, err, alloc.ReasonHostUnknown, codes.NotFound, false)
	_, err = ghost.Grant(ctx, alloc.GrantCommand{Mutation: alloc.Mutation{RequestID: client.NewRequestID(), Incarnation: 1}, Count: 1})
	s.refused(t, err, alloc.ReasonHostUnknown, codes.NotFound, false)
	stale := a.mutation()
	stale.Incarnation--
	_, err = a.Grant(ctx, alloc.GrantCommand{Mutation: stale, Count: 1})
	s.refused(t, err, alloc.ReasonStaleIncarnation, codes.FailedPrecondition, false)
	_, _, err = a.Hello(ctx, alloc.HelloCommand{RequestID: client.NewRequestID(), BootID: a.boot, Nonce: a.nonce, PoolUUID: uuid.NewString()})
	s.refused(t, err, alloc.ReasonPoolMissing, codes.FailedPrecondition, false)
	for len(a.granted) < alloc.MaxGrantedRanges {
		// Neighbouring ranges may be joined; those of another caller lie between.
		if _, err := a.Allocate(ctx, alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 1}); err != nil {
			t.Fatal(err)
		}
		a.grant(1)
	}
	_, err = a.Grant(ctx, alloc.GrantCommand{Mutation: a.mutation(), Count: 1})
	s.refused(t, err, alloc.ReasonExhausted, codes.ResourceExhausted, false)
	// A second life of the same name.
	second := join(t, a.Client, "a")
	_, err = a.Grant(ctx, alloc.GrantCommand{Mutation: a.mutation(), Count: 1})
	s.refused(t, err, alloc.ReasonStaleIncarnation, codes.FailedPrecondition, false)
	second.register()
}

func (s seen) sandboxes(t *testing.T) {
	r, _ := serving(t)
	ctx := t.Context()
	a, b := join(t, r.dial("a"), "a"), join(t, r.dial("b"), "b")
	sb := a.register()
	end := func(m *machine, serial alloc.Serial, epoch alloc.Epoch) error {
		_, err := m.End(ctx, alloc.EndCommand{Mutation: m.mutation(), Sandbox: serial, Epoch: epoch})
		return err
	}
	s.refused(t, end(a, 1<<48+1<<40, sb.Epoch), alloc.ReasonSandboxNotFound, codes.NotFound, false)
	s.refused(t, end(a, sb.Serial, sb.Epoch+1), alloc.ReasonStaleEpoch, codes.FailedPrecondition, false)
	s.refused(t, end(b, sb.Serial, sb.Epoch), alloc.ReasonNotOwner, codes.FailedPrecondition, false)
	_, err := a.Sandbox(ctx, 1<<48+1<<40, false)
	s.refused(t, err, alloc.ReasonSerialNotFound, codes.NotFound, false)

	register := func(m *machine, cmd alloc.RegisterCommand) error {
		_, _, err := m.Register(ctx, cmd)
		return err
	}
	ahead := a.newSandbox(nil)
	ahead.Spend[0].First += 3
	for i := range ahead.Items {
		ahead.Items[i].Sandbox += 3
		for j := range ahead.Items[i].Add {
			ahead.Items[i].Add[j].Serial += 3
		}
	}
	s.refused(t, register(a, ahead), alloc.ReasonRange, codes.FailedPrecondition, false)
	twice := a.newSandbox(nil)
	twice.Spend = alloc.Ranges{{First: twice.Spend[0].First - 3, Count: 3}} // give the burned ones of ahead back
	for i := range twice.Items {
		twice.Items[i].Sandbox -= 3
		for j := range twice.Items[i].Add {
			twice.Items[i].Add[j].Serial -= 3
		}
		twice.Items[i].Add[1] = twice.Items[i].Add[0]
	}
	s.refused(t, register(a, twice), alloc.ReasonBound, codes.AlreadyExists, false)

	m := join(t, r.dial("m"), "m")
	m.grant(10_000)
	big := m.newSandbox(nil)
	more := m.take(5000)
	big.Spend = append(big.Spend, more...)
	if len(big.Spend) == 2 && big.Spend[0].Last()+1 == big.Spend[1].First { // as Take of all would have taken them
		big.Spend = alloc.Ranges{{First: big.Spend[0].First, Count: big.Spend[0].Count + big.Spend[1].Count}}
	}
	for serial := range more.All() {
		big.Items[0].Add = append(big.Items[0].Add, alloc.Binding{Serial: serial, Type: alloc.Mnt, Kernel: m.kernel()})
	}
	s.refused(t, register(m, big), alloc.ReasonTooLarge, codes.ResourceExhausted, false)
}

func (s seen) handoff(t *testing.T) {
	r, _ := serving(t)
	ctx := t.Context()
	a, b := join(t, r.dial("a"), "a"), join(t, r.dial("b"), "b")
	claim := func(c *alloc.Checkpoint, change func(*alloc.ClaimCommand)) error {
		cmd := b.claimCommand(c, "run")
		if change != nil {
			change(&cmd)
		}
		_, err := b.Claim(ctx, cmd)
		return err
	}
	_, err := b.Checkpoint(ctx, 1<<48+1<<40)
	s.refused(t, err, alloc.ReasonCheckpointNotFound, codes.NotFound, false)
	s.refused(t, claim(&alloc.Checkpoint{Serial: 1<<48 + 1<<40, Digest: digest("x")}, nil), alloc.ReasonCheckpointNotFound, codes.NotFound, false)

	h := a.dump(a.register())
	s.refused(t, claim(h.Checkpoint, nil), alloc.ReasonNotConfirmed, codes.FailedPrecondition, true)
	_, err = a.End(ctx, alloc.EndCommand{Mutation: a.mutation(), Sandbox: h.Sandbox.Serial, Epoch: h.Sandbox.Epoch})
	s.refused(t, err, alloc.ReasonWrongState, codes.FailedPrecondition, false)
	h = a.confirm(h, alloc.SeenStopped)
	s.refused(t, claim(h.Checkpoint, func(c *alloc.ClaimCommand) { c.Digest = digest("other") }), alloc.ReasonManifest, codes.FailedPrecondition, false)
	b.claim(h.Checkpoint, "first")
	s.refused(t, claim(h.Checkpoint, nil), alloc.ReasonClaimed, codes.FailedPrecondition, true)

	h = a.confirm(a.dump(a.register()), alloc.NotGiven)
	s.refused(t, claim(h.Checkpoint, nil), alloc.ReasonVoid, codes.FailedPrecondition, false)
}

func (s seen) pool(t *testing.T) {
	ctx := t.Context()
	change := func(st alloc.Store, of alloc.Key, edit func(alloc.Record)) {
		t.Helper()
		found, _, err := st.Get(ctx, of)
		if err != nil {
			t.Fatal(err)
		}
		edit(found[0].Record)
		if _, err := st.Commit(ctx, alloc.Tx{Guards: []alloc.Guard{{Key: of, Token: found[0].Token}}, Put: []alloc.Record{found[0].Record}}); err != nil {
			t.Fatal(err)
		}
	}
	pool, counter := alloc.Key{Kind: alloc.KindPool}, alloc.Key{Kind: alloc.KindCounter}

	r, st := serving(t)
	c, b := r.dial(""), join(t, r.dial("b"), "b")
	allocate := func() error {
		_, err := c.Allocate(ctx, alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 5})
		return err
	}
	h := b.confirm(b.dump(b.register()), alloc.InDoubt)
	change(st, pool, func(r alloc.Record) { r.(*alloc.Pool).Policy.Over = alloc.PolicyRefuse })
	_, err := b.Claim(ctx, b.claimCommand(h.Checkpoint, "run"))
	s.refused(t, err, alloc.ReasonRefused, codes.FailedPrecondition, false)

	change(st, counter, func(r alloc.Record) { r.(*alloc.Counter).Next = alloc.MaxCounter - 3 })
	s.refused(t, allocate(), alloc.ReasonExhausted, codes.ResourceExhausted, false)

	change(st, pool, func(r alloc.Record) { r.(*alloc.Pool).State = alloc.PoolRecovering })
	s.refused(t, allocate(), alloc.ReasonRecovering, codes.Unavailable, true)

	change(st, pool, func(r alloc.Record) { r.(*alloc.Pool).Format = alloc.FormatVersion + 1 })
	s.refused(t, allocate(), alloc.ReasonFormat, codes.FailedPrecondition, false)
	eventually(t, "reads are refused too", func() bool {
		_, _, err := c.Pool(ctx)
		return alloc.ReasonOf(err) == alloc.ReasonFormat
	})
}

func (s seen) store(t *testing.T) {
	ctx := t.Context()
	// A record that nobody can read.
	name := newPool()
	st := openPool(t, shared.Endpoint(), name)
	initPool(t, st)
	r := start(t, Config{Store: st})
	r.waitLoaded()
	a := join(t, r.dial("a"), "a")
	sb := a.register()
	raw, err := clientv3.New(clientv3.Config{Endpoints: []string{shared.Endpoint()}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	key := "/nsalloc/1/" + name + "/sandbox/" + sb.Serial.String()
	good, err := raw.Get(ctx, key)
	if err != nil || len(good.Kvs) != 1 {
		t.Fatal(good, err)
	}
	if _, err := raw.Put(ctx, key, "\xff\xff\xff"); err != nil {
		t.Fatal(err)
	}
	_, err = a.End(ctx, alloc.EndCommand{Mutation: a.mutation(), Sandbox: sb.Serial, Epoch: sb.Epoch})
	s.refused(t, err, alloc.ReasonMalformed, codes.DataLoss, false)
	eventually(t, "reads are refused", func() bool {
		_, err := a.Sandbox(ctx, sb.Serial, false)
		return alloc.ReasonOf(err) == alloc.ReasonMalformed
	})
	if _, err := raw.Put(ctx, key, string(good.Kvs[0].Value)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a repaired record heals the view", func() bool {
		got, err := a.Sandbox(ctx, sb.Serial, false)
		return err == nil && got.Sandbox.Serial == sb.Serial
	})

	// What a store's network does.
	mem := memstore.New()
	initPool(t, mem)
	r = start(t, Config{Store: mem, CallTimeout: 2 * time.Second})
	r.waitLoaded()
	c := r.dial("")
	for _, f := range []struct {
		outcome memstore.Outcome
		reason  alloc.Reason
		code    codes.Code
	}{
		{memstore.Conflict, alloc.ReasonConflict, codes.Aborted},
		{memstore.Lost, alloc.ReasonUnknownOutcome, codes.Unavailable},
		{memstore.Unavailable, alloc.ReasonUnavailable, codes.Unavailable},
	} {
		mem.SetFaults(func(op memstore.Op) memstore.Fault {
			if !op.Commit {
				return memstore.Fault{}
			}
			return memstore.Fault{Outcome: f.outcome}
		})
		call, cancel := context.WithTimeout(ctx, 5*time.Second)
		_, err := c.Allocate(call, alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 1})
		cancel()
		s.refused(t, err, f.reason, f.code, true)
	}
	mem.SetFaults(nil)
}
