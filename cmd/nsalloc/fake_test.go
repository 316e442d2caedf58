package main

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

// The fake answers what was recorded, for how answers and refusals are shown. That the real servers
// answer so is the end-to-end tests' business.
type fake struct {
	nsallocv1.UnimplementedAllocatorServer
	nsallocv1.UnimplementedAgentServer
	records

	away   bool // the agent does not reach its pool
	fenced bool // another agent has said Hello in its name
	down   bool // and is alive

	replaced uint64 // namespaces whose provisional serials were void

	history    []*nsallocv1.Stint // of every sandbox; nil: the server does not have the call
	unreadable uint64             // of each kind

	patience func(time.Duration) // told how long Check and Mend may take; nil: nobody asks
}

// waits tells how long the caller waits.
func (f *fake) waits(ctx context.Context) {
	if until, ok := ctx.Deadline(); ok && f.patience != nil {
		f.patience(time.Until(until))
	}
}

type records struct {
	pool        *nsallocv1.Pool
	level       *nsallocv1.PoolLevel
	standing    *nsallocv1.Standing
	sandboxes   []*nsallocv1.Sandbox
	checkpoints []*nsallocv1.Checkpoint
	hosts       []*nsallocv1.Host
	live        []*nsallocv1.LiveNamespace
}

type fakeSandboxes struct {
	nsallocv1.UnimplementedSandboxesServer
	*fake
}
type fakeHosts struct {
	nsallocv1.UnimplementedHostsServer
	*fake
}
type fakeHandoff struct {
	nsallocv1.UnimplementedHandoffServer
	*fake
}

type fakeRecords struct {
	nsallocv1.UnimplementedRecordsServer
	*fake
}

type fakeServers struct {
	nsallocv1.UnimplementedServersServer
	*fake
}

func (f fakeServers) List(context.Context, *nsallocv1.ServersListRequest) (*nsallocv1.ServersListResponse, error) {
	return &nsallocv1.ServersListResponse{Servers: []*nsallocv1.ServerInfo{
		{Name: "etcd-1-0a1b2c3d", Address: "192.0.2.1:7000", Life: 4, Started: timestamppb.New(noon.Add(-3 * time.Hour)), Answers: true},
		{Name: "etcd-2-1f4c9a03", Address: "192.0.2.2:7000", Life: 2, Started: timestamppb.New(noon.Add(-50 * time.Hour)), Trouble: "connection refused"},
	}}, nil
}

func (f fakeServers) Remove(_ context.Context, r *nsallocv1.ServersRemoveRequest) (*nsallocv1.ServersRemoveResponse, error) {
	switch {
	case r.GetForce() || r.GetName() == "etcd-2-1f4c9a03" && r.GetLife() == 2:
		return &nsallocv1.ServersRemoveResponse{}, nil
	case r.GetName() == "etcd-1-0a1b2c3d" && r.GetLife() == 4:
		return nil, refuse(alloc.ReasonServerAnswers, "server "+r.GetName(), "it answers")
	}
	return nil, refuse(alloc.ReasonRecordNotFound, "server "+r.GetName(), "the pool has no such server")
}

// serve listens at a unix socket in dir until the test is over and returns its address.
func (f *fake) serve(t testing.TB, dir, name string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.on(l).Stop)
	return "unix://" + path
}

func (f *fake) on(l net.Listener) *grpc.Server {
	s := grpc.NewServer()
	nsallocv1.RegisterAllocatorServer(s, f)
	nsallocv1.RegisterAgentServer(s, f)
	nsallocv1.RegisterSandboxesServer(s, fakeSandboxes{fake: f})
	nsallocv1.RegisterHostsServer(s, fakeHosts{fake: f})
	nsallocv1.RegisterHandoffServer(s, fakeHandoff{fake: f})
	nsallocv1.RegisterRecordsServer(s, fakeRecords{fake: f})
	nsallocv1.RegisterServersServer(s, fakeServers{fake: f})
	grpc_health_v1.RegisterHealthServer(s, health.NewServer())
	go func() { _ = s.Serve(l) }()
	return s
}

// refuse is what a server sends.
func refuse(r alloc.Reason, subject, msg string) error {
	return wire.Status(&alloc.Error{Reason: r, Subject: subject, Msg: msg}).Err()
}

// page cuts pages of two, so that every listing has several.
func page[T any](all []T, token string) ([]T, string) {
	from, _ := strconv.Atoi(token)
	to := min(from+2, len(all))
	if to == len(all) {
		return all[from:], ""
	}
	return all[from:to], strconv.Itoa(to)
}

func (f *fake) GetPool(context.Context, *nsallocv1.GetPoolRequest) (*nsallocv1.GetPoolResponse, error) {
	return &nsallocv1.GetPoolResponse{Pool: f.pool, Level: f.level, Revision: 42, Standing: f.standing}, nil
}

func (f fakeSandboxes) Get(_ context.Context, r *nsallocv1.SandboxesGetRequest) (*nsallocv1.SandboxesGetResponse, error) {
	for _, s := range f.sandboxes {
		is := s.Serial == r.GetSerial()
		for _, b := range s.Bindings {
			is = is || b.Serial == r.GetSerial()
		}
		answer := &nsallocv1.SandboxesGetResponse{Sandbox: s, Revision: 42}
		for _, c := range f.checkpoints {
			is = is || c.Serial == r.GetSerial() && c.Sandbox == s.Serial
			if c.Serial == s.Checkpoint {
				answer.Checkpoint = c
			}
		}
		if is {
			return answer, nil
		}
	}
	return nil, refuse(alloc.ReasonSerialNotFound, fmt.Sprintf("serial %016x", r.GetSerial()), "the pool never issued it, or it belongs to nothing")
}

func (f fakeSandboxes) List(_ context.Context, r *nsallocv1.SandboxesListRequest) (*nsallocv1.SandboxesListResponse, error) {
	var all []*nsallocv1.Sandbox
	for _, s := range f.sandboxes {
		in := len(r.States) == 0
		for _, st := range r.States {
			in = in || st == s.State
		}
		if in && (r.Owner == "" || r.Owner == s.Owner) {
			all = append(all, s)
		}
	}
	some, next := page(all, r.PageToken)
	return &nsallocv1.SandboxesListResponse{Sandboxes: some, NextPageToken: next, Revision: 42, Unreadable: f.unreadable}, nil
}

func (f fakeHosts) Get(ctx context.Context, r *nsallocv1.HostsGetRequest) (*nsallocv1.HostsGetResponse, error) {
	for _, h := range f.hosts {
		if h.Name == r.Name {
			return &nsallocv1.HostsGetResponse{Host: h, Revision: 42}, nil
		}
	}
	switch r.Name {
	case "busy":
		return nil, refuse(alloc.ReasonConflict, "", "others wrote the same records again and again")
	case "etcd-away":
		return nil, wire.Status(&alloc.Error{Reason: alloc.ReasonUnavailable, Msg: "the store was not reached", Fix: "start etcd"}).Err()
	case "malicious":
		return nil, refuse(alloc.ReasonHostUnknown, "", "no \x1b[2Jsuch\nhost")
	case "new":
		return nil, status.Error(codes.Unimplemented, "unknown method Get")
	case "silent":
		<-ctx.Done() // until the command has given up, or is about to: the deadline came along
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	return nil, refuse(alloc.ReasonHostUnknown, "host "+r.Name, "no host of that name has said Hello")
}

func (f fakeHosts) Waive(_ context.Context, r *nsallocv1.WaiveRequest) (*nsallocv1.WaiveResponse, error) {
	for _, h := range f.hosts {
		if h.Name == r.Name && f.pool.Generation > 1 {
			return &nsallocv1.WaiveResponse{Host: h, WaitsFor: []string{"c"}}, nil
		}
	}
	return nil, refuse(alloc.ReasonWrongState, "host "+r.Name, "nobody waits for it")
}

func (f fakeHosts) List(_ context.Context, r *nsallocv1.HostsListRequest) (*nsallocv1.HostsListResponse, error) {
	some, next := page(f.hosts, r.PageToken)
	return &nsallocv1.HostsListResponse{Hosts: some, NextPageToken: next, Revision: 42, Unreadable: f.unreadable}, nil
}

func (f fakeHandoff) Find(_ context.Context, r *nsallocv1.FindRequest) (*nsallocv1.FindResponse, error) {
	for _, c := range f.checkpoints {
		if r.GetSerial() == c.Serial || r.GetRunId() != "" && r.GetRunId() == c.RunId {
			return &nsallocv1.FindResponse{Checkpoint: c, Revision: 42}, nil
		}
	}
	return nil, refuse(alloc.ReasonCheckpointNotFound, "", "the pool has no such checkpoint")
}

func (f fakeHandoff) ListCheckpoints(_ context.Context, r *nsallocv1.ListCheckpointsRequest) (*nsallocv1.ListCheckpointsResponse, error) {
	var all []*nsallocv1.Checkpoint
	for _, c := range f.checkpoints {
		if r.Sandbox == 0 || r.Sandbox == c.Sandbox {
			all = append(all, c)
		}
	}
	some, next := page(all, r.PageToken)
	return &nsallocv1.ListCheckpointsResponse{Checkpoints: some, NextPageToken: next, Revision: 42, Unreadable: f.unreadable}, nil
}

func (f fakeRecords) Check(ctx context.Context, _ *nsallocv1.CheckRequest) (*nsallocv1.CheckResponse, error) {
	f.waits(ctx)
	report := alloc.Report{Revision: 42, Sandboxes: len(f.sandboxes), Checkpoints: len(f.checkpoints), Hosts: len(f.hosts)}
	var r alloc.Records
	for _, s := range f.sandboxes {
		r.Sandboxes = append(r.Sandboxes, wire.SandboxFromWire(s))
		report.Namespaces += len(s.Bindings)
	}
	for _, c := range f.checkpoints {
		r.Checkpoints = append(r.Checkpoints, wire.CheckpointFromWire(c))
	}
	report.Findings = alloc.Check(r)
	report.Total = len(report.Findings)
	return wire.ReportToWire(report), nil
}

func (f fakeRecords) Mend(ctx context.Context, r *nsallocv1.MendRequest) (*nsallocv1.MendResponse, error) {
	f.waits(ctx)
	switch {
	case r.Id == "0001000000000070":
		return wire.MendedToWire(alloc.Mended{Revision: 43, At: noon, Changed: []alloc.Key{alloc.CheckpointKey(1<<48 | 0x71), alloc.SandboxKey(1<<48 | 0x70)}}), nil
	case r.Kind == "host":
		return nil, refuse(alloc.ReasonRecordNotFound, "host "+r.Id, "the pool has no such record")
	}
	return nil, refuse(alloc.ReasonNothingToMend, r.Kind+" "+r.Id, "nsalloc check finds nothing that mending it would help; nothing was changed")
}

func (f fakeRecords) SetPolicy(_ context.Context, r *nsallocv1.SetPolicyRequest) (*nsallocv1.SetPolicyResponse, error) {
	pool := wire.PoolFromWire(f.pool)
	var err error
	if pool.Policy, err = pool.Policy.With(r.Fields); err != nil {
		return nil, wire.Status(err).Err()
	}
	return &nsallocv1.SetPolicyResponse{Pool: wire.PoolToWire(pool)}, nil
}

func (f *fake) Status(context.Context, *nsallocv1.StatusRequest) (*nsallocv1.StatusResponse, error) {
	st := &nsallocv1.StatusResponse{
		Host: "b", Incarnation: 1<<48 | 3, BootId: bootB, Pool: f.pool, Connected: !f.away, Granted: 900,
		Sandboxes: 2, Namespaces: 8, Swept: timestamppb.New(time.Now().Add(-3 * time.Second)), Version: "v0.1.0",
		KernelIds: true, HookSocket: "/run/nsalloc/hook.sock", Replaced: f.replaced,
	}
	if f.away {
		st.Trouble = "connection refused"
	}
	if f.down {
		st.Connected, st.Down, st.Fenced = false, true, 2
		st.Trouble = "host b: two agents of this name are alive; this one does nothing; give one of the two machines another host name; or wait"
	}
	if f.fenced {
		st.Incarnation--
	}
	return st, nil
}

func (f *fake) ListNamespaces(_ context.Context, r *nsallocv1.ListNamespacesRequest) (*nsallocv1.ListNamespacesResponse, error) {
	answer := &nsallocv1.ListNamespacesResponse{}
	for _, n := range f.live {
		if r.Sandbox == 0 || r.Sandbox == n.Sandbox {
			answer.Namespaces = append(answer.Namespaces, n)
		}
	}
	return answer, nil
}

func (f *fake) Identify(_ context.Context, r *nsallocv1.IdentifyRequest) (*nsallocv1.IdentifyResponse, error) {
	answer := &nsallocv1.IdentifyResponse{}
	for _, n := range f.live {
		if n.OfHost && (r.Pid == 1 || n.Binding.Type == nsallocv1.NamespaceType_NAMESPACE_TYPE_USER) || !n.OfHost && r.Pid == 4711 {
			answer.Namespaces = append(answer.Namespaces, n)
		}
	}
	if r.Pid == 1 || r.Pid == 4711 {
		return answer, nil
	}
	// As another implementation would say it: a reason that the domain's own table may not have.
	s, err := status.New(codes.NotFound, fmt.Sprintf("process %d: no such process", r.Pid)).WithDetails(
		&errdetails.ErrorInfo{Domain: wire.Domain, Reason: "PROCESS_NOT_FOUND"})
	if err != nil {
		return nil, err
	}
	return nil, s.Err()
}
