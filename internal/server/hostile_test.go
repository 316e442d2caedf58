package server

import (
	"context"
	"errors"
	"math"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// TestHostileRequests: each gets a clear refusal, and nothing is lost.
func TestHostileRequests(t *testing.T) {
	r, _ := serving(t)
	ctx := t.Context()
	a, b := join(t, r.dial("a"), "a"), join(t, r.dial("b"), "b")
	sb := a.register()
	conn := a.Conn()
	as, ah, ahosts, aa := nsallocv1.NewSandboxesClient(conn), nsallocv1.NewHandoffClient(conn), nsallocv1.NewHostsClient(conn), nsallocv1.NewAllocatorClient(conn)
	id := client.NewRequestID
	life := uint64(a.life)
	net, mnt := nsallocv1.NamespaceType_NAMESPACE_TYPE_NET, nsallocv1.NamespaceType_NAMESPACE_TYPE_MNT
	kernel := func() *nsallocv1.KernelId {
		k := a.kernel()
		return &nsallocv1.KernelId{BootId: k.BootID, Id: k.ID, Inode: k.Inode}
	}
	// register asks for one new sandbox, changed by edit.
	register := func(edit func(*nsallocv1.RegisterRequest)) error {
		spend := a.granted[0]
		req := &nsallocv1.RegisterRequest{RequestId: id(), Incarnation: life, Spend: []*nsallocv1.Range{{First: uint64(spend.First), Count: 2}},
			Items: []*nsallocv1.RegisterItem{{Sandbox: uint64(spend.First), Add: []*nsallocv1.Binding{{Serial: uint64(spend.First) + 1, Type: net, Kernel: kernel()}}}}}
		edit(req)
		_, err := as.Register(ctx, req)
		return err
	}
	get := func(req *nsallocv1.SandboxesGetRequest) error { _, err := as.Get(ctx, req); return err }
	list := func(req *nsallocv1.SandboxesListRequest) error { _, err := as.List(ctx, req); return err }
	many := func(n int) map[string]string {
		m := map[string]string{}
		for i := range n {
			m[strings.Repeat("k", i+1)] = "v"
		}
		return m
	}
	for what, c := range map[string]struct {
		err  error
		want *alloc.Error
	}{
		"empty Allocate":    {call(aa.Allocate(ctx, &nsallocv1.AllocateRequest{})), alloc.ErrInvalid},
		"all serials":       {call(aa.Allocate(ctx, &nsallocv1.AllocateRequest{RequestId: id(), Count: math.MaxUint64})), alloc.ErrInvalid},
		"an id of rubbish":  {call(aa.Allocate(ctx, &nsallocv1.AllocateRequest{RequestId: strings.Repeat("7", 36), Count: 1})), alloc.ErrInvalid},
		"an id with a path": {call(aa.Allocate(ctx, &nsallocv1.AllocateRequest{RequestId: "../../../../../../../../../pool/x", Count: 1})), alloc.ErrInvalid},
		"a long id":         {call(aa.Allocate(ctx, &nsallocv1.AllocateRequest{RequestId: strings.Repeat("x", 1<<20), Count: 1})), alloc.ErrInvalid},
		"empty Hello":       {call(ahosts.Hello(ctx, &nsallocv1.HelloRequest{})), alloc.ErrInvalid},
		"empty Grant":       {call(ahosts.Grant(ctx, &nsallocv1.GrantRequest{})), alloc.ErrInvalid},
		"huge Grant":        {call(ahosts.Grant(ctx, &nsallocv1.GrantRequest{RequestId: id(), Incarnation: life, Count: math.MaxUint64})), alloc.ErrInvalid},
		"Grant of no life":  {call(ahosts.Grant(ctx, &nsallocv1.GrantRequest{RequestId: id(), Count: 1})), alloc.ErrStaleIncarnation},
		"Grant of a later":  {call(ahosts.Grant(ctx, &nsallocv1.GrantRequest{RequestId: id(), Incarnation: math.MaxUint64, Count: 1})), alloc.ErrRecovering},
		"empty host name":   {call(ahosts.Get(ctx, &nsallocv1.HostsGetRequest{})), alloc.ErrInvalid},
		"host name path":    {call(ahosts.Get(ctx, &nsallocv1.HostsGetRequest{Name: "../pool"})), alloc.ErrInvalid},
		"empty Register":    {call(as.Register(ctx, &nsallocv1.RegisterRequest{})), alloc.ErrInvalid},
		"61 items":          {register(func(r *nsallocv1.RegisterRequest) { r.Items = make([]*nsallocv1.RegisterItem, 61) }), alloc.ErrInvalid},
		"nil item":          {register(func(r *nsallocv1.RegisterRequest) { r.Items = []*nsallocv1.RegisterItem{nil} }), alloc.ErrInvalid},
		"zero sandbox":      {register(func(r *nsallocv1.RegisterRequest) { r.Items[0].Sandbox = 0 }), alloc.ErrInvalid},
		"sandbox out of it": {register(func(r *nsallocv1.RegisterRequest) { r.Items[0].Sandbox = math.MaxUint64 }), alloc.ErrInvalid},
		"zero binding":      {register(func(r *nsallocv1.RegisterRequest) { r.Items[0].Add[0].Serial = 0 }), alloc.ErrInvalid},
		"range of none":     {register(func(r *nsallocv1.RegisterRequest) { r.Spend[0].Count = 0 }), alloc.ErrInvalid},
		"range that wraps":  {register(func(r *nsallocv1.RegisterRequest) { r.Spend[0].Count = math.MaxUint64 }), alloc.ErrInvalid},
		"range from zero":   {register(func(r *nsallocv1.RegisterRequest) { r.Spend[0].First = 0 }), alloc.ErrInvalid},
		"unknown type":      {register(func(r *nsallocv1.RegisterRequest) { r.Items[0].Add[0].Type = 99 }), alloc.ErrInvalid},
		"no type":           {register(func(r *nsallocv1.RegisterRequest) { r.Items[0].Add[0].Type = 0 }), alloc.ErrInvalid},
		"no kernel":         {register(func(r *nsallocv1.RegisterRequest) { r.Items[0].Add[0].Kernel = nil }), alloc.ErrInvalid},
		"another boot":      {register(func(r *nsallocv1.RegisterRequest) { r.Items[0].Add[0].Kernel.BootId = b.boot }), alloc.ErrInvalid},
		"33 labels":         {register(func(r *nsallocv1.RegisterRequest) { r.Items[0].Labels = many(33) }), alloc.ErrInvalid},
		"a long label": {register(func(r *nsallocv1.RegisterRequest) {
			r.Items[0].Labels = map[string]string{"k": strings.Repeat("v", 257)}
		}), alloc.ErrInvalid},
		"another's range": {register(func(r *nsallocv1.RegisterRequest) {
			r.Spend[0].First = uint64(b.granted[0].First)
			r.Items[0].Sandbox = r.Spend[0].First
			r.Items[0].Add[0].Serial = r.Spend[0].First + 1
		}), alloc.ErrRange},
		"range never issued": {register(func(r *nsallocv1.RegisterRequest) {
			r.Spend[0].First = 1<<48 + 1<<47
			r.Items[0].Sandbox = r.Spend[0].First
			r.Items[0].Add[0].Serial = r.Spend[0].First + 1
		}), alloc.ErrRange},
		"a parent from afar": {register(func(r *nsallocv1.RegisterRequest) { r.Items[0].ParentCheckpoint = 1<<48 + 1<<47 }), alloc.ErrCheckpointNotFound},
		"two of one kernel": {register(func(r *nsallocv1.RegisterRequest) {
			r.Spend[0].Count = 3
			r.Items[0].Add = append(r.Items[0].Add, &nsallocv1.Binding{Serial: r.Spend[0].First + 2, Type: net, Kernel: r.Items[0].Add[0].Kernel})
		}), alloc.ErrBound},
		"empty Get":           {get(&nsallocv1.SandboxesGetRequest{}), alloc.ErrInvalid},
		"Get serial 0":        {get(&nsallocv1.SandboxesGetRequest{By: &nsallocv1.SandboxesGetRequest_Serial{}}), alloc.ErrInvalid},
		"Get the last serial": {get(&nsallocv1.SandboxesGetRequest{By: &nsallocv1.SandboxesGetRequest_Serial{Serial: math.MaxUint64}}), alloc.ErrInvalid},
		"Get no namespace":    {get(&nsallocv1.SandboxesGetRequest{By: &nsallocv1.SandboxesGetRequest_Namespace{}}), alloc.ErrInvalid},
		"Get an empty one":    {get(&nsallocv1.SandboxesGetRequest{By: &nsallocv1.SandboxesGetRequest_Namespace{Namespace: &nsallocv1.HostNamespace{Host: "a", Type: mnt}}}), alloc.ErrInvalid},
		"Get an unknown type": {get(&nsallocv1.SandboxesGetRequest{By: &nsallocv1.SandboxesGetRequest_Namespace{Namespace: &nsallocv1.HostNamespace{Host: "a", Type: 44, Kernel: kernel()}}}), alloc.ErrInvalid},
		"negative page":       {list(&nsallocv1.SandboxesListRequest{PageSize: -1}), alloc.ErrInvalid},
		"huge page":           {list(&nsallocv1.SandboxesListRequest{PageSize: math.MaxInt32}), alloc.ErrInvalid},
		"a forged token":      {list(&nsallocv1.SandboxesListRequest{PageToken: "zzzz"}), alloc.ErrInvalid},
		"another list's":      {list(&nsallocv1.SandboxesListRequest{PageToken: pageToken("hosts", "a")}), alloc.ErrInvalid},
		"an unknown state":    {list(&nsallocv1.SandboxesListRequest{States: []nsallocv1.SandboxState{1, 77}}), alloc.ErrInvalid},
		"a negative state":    {list(&nsallocv1.SandboxesListRequest{States: []nsallocv1.SandboxState{-1}}), alloc.ErrInvalid},
		"empty Open":          {call(ah.Open(ctx, &nsallocv1.OpenRequest{})), alloc.ErrInvalid},
		"a short digest":      {call(ah.Open(ctx, &nsallocv1.OpenRequest{RequestId: id(), Incarnation: life, Sandbox: uint64(sb.Serial), Epoch: uint64(sb.Epoch), Digest: []byte("x")})), alloc.ErrInvalid},
		"empty Confirm":       {call(ah.Confirm(ctx, &nsallocv1.ConfirmRequest{})), alloc.ErrInvalid},
		"unknown evidence":    {call(ah.Confirm(ctx, &nsallocv1.ConfirmRequest{RequestId: id(), Incarnation: life, Sandbox: uint64(sb.Serial), Epoch: uint64(sb.Epoch), Evidence: 9})), alloc.ErrInvalid},
		"empty Abort":         {call(ah.Abort(ctx, &nsallocv1.AbortRequest{})), alloc.ErrInvalid},
		"empty Claim":         {call(ah.Claim(ctx, &nsallocv1.ClaimRequest{})), alloc.ErrInvalid},
		"Claim by nobody":     {call(ah.Claim(ctx, &nsallocv1.ClaimRequest{RequestId: id(), Incarnation: life, Checkpoint: 1<<48 + 9, Digest: make([]byte, 32)})), alloc.ErrInvalid},
		"empty Bind":          {call(ah.Bind(ctx, &nsallocv1.BindRequest{})), alloc.ErrInvalid},
		"empty Release":       {call(ah.Release(ctx, &nsallocv1.ReleaseRequest{})), alloc.ErrInvalid},
		"empty Find":          {call(ah.Find(ctx, &nsallocv1.FindRequest{})), alloc.ErrInvalid},
		"Find no run":         {call(ah.Find(ctx, &nsallocv1.FindRequest{By: &nsallocv1.FindRequest_RunId{}})), alloc.ErrInvalid},
		"Find a long run":     {call(ah.Find(ctx, &nsallocv1.FindRequest{By: &nsallocv1.FindRequest_RunId{RunId: strings.Repeat("x", 65)}})), alloc.ErrInvalid},
	} {
		if !errors.Is(c.err, c.want) {
			t.Errorf("%s: %v, want %s", what, c.err, c.want.Reason)
		}
	}

	// Another host's sandbox, by every call that names one.
	claimant := &nsallocv1.Claimant{BootId: b.boot, Run: "r"}
	bh := nsallocv1.NewHandoffClient(b.Conn())
	serial, epoch, blife := uint64(sb.Serial), uint64(sb.Epoch), uint64(b.life)
	cp := b.take(1)[0]
	for what, err := range map[string]error{
		"End":      call(nsallocv1.NewSandboxesClient(b.Conn()).End(ctx, &nsallocv1.EndRequest{RequestId: id(), Incarnation: blife, Sandbox: serial, Epoch: epoch})),
		"Register": call(nsallocv1.NewSandboxesClient(b.Conn()).Register(ctx, &nsallocv1.RegisterRequest{RequestId: id(), Incarnation: blife, Items: []*nsallocv1.RegisterItem{{Sandbox: serial, Epoch: epoch, Labels: many(1)}}})),
		"Open":     call(bh.Open(ctx, &nsallocv1.OpenRequest{RequestId: id(), Incarnation: blife, Sandbox: serial, Epoch: epoch, Spend: []*nsallocv1.Range{{First: uint64(cp.First), Count: 1}}, Checkpoint: uint64(cp.First), Digest: append(make([]byte, 31), 1)})),
		"Confirm":  call(bh.Confirm(ctx, &nsallocv1.ConfirmRequest{RequestId: id(), Incarnation: blife, Sandbox: serial, Epoch: epoch, Checkpoint: 1<<48 + 1, Evidence: 1})),
		"Abort":    call(bh.Abort(ctx, &nsallocv1.AbortRequest{RequestId: id(), Incarnation: blife, Sandbox: serial, Epoch: epoch, Checkpoint: 1<<48 + 1})),
		"Bind":     call(bh.Bind(ctx, &nsallocv1.BindRequest{RequestId: id(), Incarnation: blife, Sandbox: serial, Epoch: epoch, Claimant: claimant})),
		"Release":  call(bh.Release(ctx, &nsallocv1.ReleaseRequest{RequestId: id(), Incarnation: blife, Sandbox: serial, Epoch: epoch, Claimant: claimant})),
	} {
		if !errors.Is(err, alloc.ErrNotOwner) {
			t.Errorf("%s of another host's sandbox: %v", what, err)
		}
	}
	got, err := a.Sandbox(ctx, sb.Serial, true)
	if err != nil || got.Sandbox.State != alloc.StateRunning || got.Sandbox.Epoch != sb.Epoch || len(got.Sandbox.Labels) != 0 {
		t.Errorf("the sandbox is %+v now: %v", got.Sandbox, err)
	}
	host, err := a.Host(ctx, "a")
	if err != nil || host.Granted.Count() != a.granted.Count() {
		t.Errorf("host a holds %v, was left with %v: %v", host.Granted, a.granted, err)
	}
	if r.log.has("panicked") {
		t.Error("a handler panicked")
	}
}

func call[T any](_ T, err error) error { return err }

// TestHostileBytes: what is not even a message.
func TestHostileBytes(t *testing.T) {
	r, _ := serving(t)
	c := r.dial("a")
	// A megabyte of nested unknown fields, and more than a message may be.
	deep := []byte{}
	for range 5000 {
		deep = protowire.AppendBytes(protowire.AppendTag(nil, 99, protowire.BytesType), deep)
	}
	for what, raw := range map[string][]byte{"junk": []byte("\xff\xff\xff\xff"), "deep": deep, "oversize": make([]byte, maxMessage+1)} {
		req := rawMessage(raw)
		var resp nsallocv1.AllocateResponse
		err := c.Conn().Invoke(t.Context(), nsallocv1.Allocator_Allocate_FullMethodName, &req, &resp, rawCodec)
		if err == nil {
			t.Errorf("%s was answered %v", what, &resp)
		}
	}
	// Not gRPC at all, and a connection that says nothing.
	for _, hello := range []string{"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + strings.Repeat("\xff", 100), ""} {
		raw, err := net.Dial("tcp", r.tcp)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = raw.Write([]byte(hello))
		_ = raw.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		_, _ = raw.Read(make([]byte, 1))
		_ = raw.Close()
	}
	for what, md := range map[string]metadata.MD{
		"two names":  metadata.Pairs("nsalloc-host", "a", "nsalloc-host", "b"),
		"a path":     metadata.Pairs("nsalloc-host", "../a"),
		"upper case": metadata.Pairs("nsalloc-host", "A"),
	} {
		conn := r.dial("").Conn()
		_, err := nsallocv1.NewAllocatorClient(conn).GetPool(metadata.NewOutgoingContext(t.Context(), md), &nsallocv1.GetPoolRequest{})
		if !errors.Is(err, alloc.ErrCaller) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, _, err := c.Pool(t.Context()); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

// TestCancelled: callers who leave do not stop others, and get the truth.
func TestCancelled(t *testing.T) {
	r, _ := serving(t)
	c := r.dial("")
	for i := range 50 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*200*time.Microsecond)
		_, err := c.Allocate(ctx, alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 1})
		cancel()
		if err != nil && !errors.Is(err, alloc.ErrUnknownOutcome) && !errors.Is(err, alloc.ErrUnavailable) && !errors.Is(err, alloc.ErrExhausted) {
			t.Fatalf("%v (%v)", err, status.Code(err))
		}
	}
	if _, err := c.Allocate(t.Context(), alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 1}); err != nil {
		t.Fatal(err)
	}
}
