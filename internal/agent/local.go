package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

// maxPIDs is how many pids of a namespace an answer names.
const maxPIDs = 16

// listenLocal opens the socket of the local service, for root only.
func listenLocal(path string) (*net.UnixListener, error) { return listenUnix("unix", path) }

// serveLocal serves nsalloc.v1.Agent.
func (a *Agent) serveLocal(ctx context.Context, l *net.UnixListener) error {
	s := grpc.NewServer(
		// Clients of ours ping idle connections every 10 s (pkg/client).
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.Creds(rootOnly{}), grpc.MaxRecvMsgSize(64<<10), grpc.MaxConcurrentStreams(64), grpc.ConnectionTimeout(5*time.Second),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			resp, err := h(ctx, req)
			return resp, a.localStatus(info.FullMethod, err)
		}),
	)
	nsallocv1.RegisterAgentServer(s, &local{a: a})
	stop := context.AfterFunc(ctx, s.Stop)
	defer stop()
	if err := s.Serve(l); err != nil && ctx.Err() == nil {
		return err
	}
	return nil
}

// localStatus is err as the local service answers it. What is no refusal has gone wrong here: the log
// has it, and root, who alone asks, may read it too.
func (a *Agent) localStatus(method string, err error) error {
	s := wire.Status(err)
	if err != nil && alloc.ReasonOf(err) == "" && s.Code() == codes.Internal {
		a.log.Error("a call failed", "method", method, "cause", err)
		return status.Errorf(codes.Internal, "the agent failed: %s; see its log", strings.ToValidUTF8(err.Error(), "?"))
	}
	return s.Err()
}

// rootOnly refuses every peer but root, also where the socket's mode was changed.
type rootOnly struct{}

func (rootOnly) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, nil, errors.New("not a unix socket")
	}
	if _, err := peerOf(u); err != nil {
		return nil, nil, err
	}
	return c, peerInfo{}, nil
}

func (rootOnly) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("this side only serves")
}
func (rootOnly) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}
func (rootOnly) Clone() credentials.TransportCredentials { return rootOnly{} }
func (rootOnly) OverrideServerName(string) error         { return nil }

type peerInfo struct{}

func (peerInfo) AuthType() string { return "peercred" }

type local struct {
	nsallocv1.UnimplementedAgentServer
	a *Agent
}

// Status says how the agent does.
func (l *local) Status(context.Context, *nsallocv1.StatusRequest) (*nsallocv1.StatusResponse, error) {
	a := l.a
	resp := &nsallocv1.StatusResponse{
		Host: a.cfg.Host, BootId: a.bootID(), Connected: a.isJoined(), Version: a.cfg.Version,
		KernelIds: a.kernel.Features().KernelIDs, HookSocket: a.cfg.HookSocket,
		Incarnation: a.registrar.life.Load(), Granted: a.registrar.left.Load(), Provisional: a.registrar.uncommitted.Load(), Replaced: a.registrar.voided.Load(),
	}
	if t := a.trouble.Load(); t != nil {
		resp.Connected, resp.Trouble = false, *t
	}
	resp.Fenced = a.registrar.fence.times.Load()
	if down := a.registrar.fence.down.Load(); down != nil {
		resp.Connected, resp.Down, resp.Trouble = false, true, down.Error()
	}
	if p := a.poolRec.Load(); p != nil {
		resp.Pool = wire.PoolToWire(p)
	}
	if t := a.swept.Load(); t != nil {
		resp.Swept = timestamppb.New(*t)
	}
	for _, s := range a.book.all() {
		if s.State != alloc.StateRunning && s.State != alloc.StateDumped {
			continue
		}
		resp.Sandboxes++
		for _, b := range s.Bindings {
			if b.Live() {
				resp.Namespaces++
			}
		}
	}
	return resp, nil
}

// residents says which pids are in which namespace.
func (a *Agent) residents(ctx context.Context) (map[string][]kernelns.Process, error) {
	procs, err := a.kernel.Sweep(ctx)
	if err != nil {
		return nil, err
	}
	in := map[string][]kernelns.Process{}
	for _, p := range procs { // in order of pid
		for t, k := range p.Namespaces {
			in[k.Key(t)] = append(in[k.Key(t)], p)
		}
	}
	return in, nil
}

func (a *Agent) liveNamespace(s *alloc.Sandbox, b alloc.Binding, in map[string][]kernelns.Process) *nsallocv1.LiveNamespace {
	n := &nsallocv1.LiveNamespace{Binding: wire.BindingToWire(b), Sandbox: uint64(s.Serial), OfHost: s.OfHost,
		Provisional: a.book.isProvisional(b.Serial), SandboxProvisional: a.book.isProvisional(s.Serial)}
	for i, p := range in[b.Kernel.Key(b.Type)] {
		if i == 0 {
			n.Command = p.Comm
		}
		if i < maxPIDs {
			n.Pids = append(n.Pids, int32(p.PID))
		}
	}
	return n
}

// ListNamespaces reads what lives here and has a serial.
func (l *local) ListNamespaces(ctx context.Context, req *nsallocv1.ListNamespacesRequest) (*nsallocv1.ListNamespacesResponse, error) {
	in, err := l.a.residents(ctx)
	if err != nil {
		return nil, err
	}
	resp := &nsallocv1.ListNamespacesResponse{}
	for _, s := range l.a.book.all() {
		if req.GetSandbox() != 0 && alloc.Serial(req.GetSandbox()) != s.Serial || s.State == alloc.StateClaimed {
			continue
		}
		bindings := slices.Clone(s.Bindings)
		order := alloc.NamespaceTypes()
		slices.SortFunc(bindings, func(x, y alloc.Binding) int {
			return cmp.Or(cmp.Compare(slices.Index(order, x.Type), slices.Index(order, y.Type)), cmp.Compare(x.Serial, y.Serial))
		})
		for _, b := range bindings {
			if b.Live() && b.Kernel.BootID == l.a.bootID() {
				resp.Namespaces = append(resp.Namespaces, l.a.liveNamespace(s, b, in))
			}
		}
	}
	return resp, nil
}

// Identify answers which namespaces a process is in. What has no serial yet is registered first; while the pool
// is away, or for who does not wait, it gets a provisional one.
func (l *local) Identify(ctx context.Context, req *nsallocv1.IdentifyRequest) (*nsallocv1.IdentifyResponse, error) {
	a := l.a
	p, err := a.kernel.Process(int(req.GetPid()))
	if err != nil {
		if isGone(err) {
			return nil, &alloc.Error{Reason: alloc.ReasonProcessNotFound, Subject: "process", Msg: err.Error(), Fix: "name a pid of the host's PID namespace"}
		}
		return nil, err
	}
	switch {
	case p.KernelThread:
		p.Namespaces = a.host
	case p.Ended:
		return nil, &alloc.Error{Reason: alloc.ReasonProcessNotFound, Subject: fmt.Sprintf("process %d", p.PID), Msg: "it has ended and left its namespaces", Fix: "name a pid that runs"}
	}
	if err := a.numberSoon(ctx, p, req.GetNoWait()); err != nil {
		return nil, err
	}
	in, err := a.residents(ctx)
	if err != nil {
		return nil, err
	}
	resp := &nsallocv1.IdentifyResponse{}
	for _, t := range alloc.NamespaceTypes() {
		k, ok := p.Namespaces[t]
		if !ok {
			continue
		}
		place, ok := a.book.find(t, k)
		if !ok {
			return nil, &alloc.Error{Reason: alloc.ReasonUnavailable, Msg: "the process belongs to a restore that is under way, or has just changed its namespaces", Fix: "ask again", RetryAfter: time.Second}
		}
		if s := a.book.sandbox(place.sandbox); s != nil {
			resp.Namespaces = append(resp.Namespaces, a.liveNamespace(s, place.binding, in))
		}
	}
	return resp, nil
}

// committedWithin bounds how long an answer waits for the pool to commit what is in it.
const committedWithin = 3 * time.Second

// numberSoon is numberProcess for a caller who waits; who does not, or while the pool does not answer, gets
// provisional serials. Where there are none to give, it says why as far as the agent knows.
func (a *Agent) numberSoon(call context.Context, p kernelns.Process, noWait bool) error {
	numbered, committed := a.numbered(p)
	if committed || numbered && (noWait || a.away()) {
		return nil
	}
	var err error
	if !noWait && !a.away() {
		ctx, cancel := a.whileReached(call, committedWithin)
		defer cancel()
		err = a.withNumberable(ctx, a.numberProcess(ctx, p, a.registerEach))
		if err == nil || ctx.Err() == nil && !unreached(err) {
			return err
		}
		if errors.Is(ctx.Err(), context.DeadlineExceeded) && call.Err() == nil {
			a.noteTrouble(err)
		}
		if numbered, _ = a.numbered(p); numbered {
			return nil
		}
	}
	away := a.withNumberableAway(call, a.numberProcess(call, p, a.registrar.provide))
	if away == nil || alloc.ReasonOf(away) == "" && call.Err() == nil {
		return away
	}
	if t := a.trouble.Load(); err == nil && t != nil {
		err = errors.New(*t)
	}
	// gRPC's client must not try again by itself: the caller's time would be over before it is told why.
	_ = grpc.SetTrailer(call, metadata.Pairs("grpc-retry-pushback-ms", "-1")) // fails only without a gRPC call
	return &alloc.Error{Reason: alloc.ReasonUnavailable, Subject: fmt.Sprintf("process %d", p.PID), Msg: "it has a namespace without a serial, and the pool gave none in time",
		Fix: "see that nsalloc-server runs and that `server` in agent.yaml names it, then ask again", RetryAfter: time.Second, Err: errors.Join(err, away)}
}

// numbered reports whether everything that a process is in has a serial, and whether all of them are committed.
func (a *Agent) numbered(p kernelns.Process) (numbered, committed bool) {
	committed = true
	for t, k := range p.Namespaces {
		place, ok := a.book.find(t, k)
		if !ok {
			return false, false
		}
		committed = committed && !a.book.isProvisional(place.binding.Serial) && !a.book.isProvisional(place.sandbox)
	}
	return true, committed
}

// numberProcess numbers what the tree of a process has, for a holder of the turn who knows what may be
// numbered.
func (a *Agent) numberProcess(ctx context.Context, p kernelns.Process, commit func(context.Context, []wish) error) func([]kernelns.Process) error {
	return func(procs []kernelns.Process) error {
		for _, g := range a.groups(procs) {
			if slices.ContainsFunc(g.procs, func(q kernelns.Process) bool { return q.PID == p.PID && q.StartTime == p.StartTime }) {
				if _, w := a.wishOf(g.root, g.procs, false); w != nil {
					return commit(ctx, []wish{*w})
				}
			}
		}
		return nil
	}
}

// ListRuns reads the CRIU runs that are not forgotten.
func (l *local) ListRuns(context.Context, *nsallocv1.ListRunsRequest) (*nsallocv1.ListRunsResponse, error) {
	resp := &nsallocv1.ListRunsResponse{}
	for _, rec := range l.a.runs.list() {
		if len(resp.Runs) == keepRuns {
			break
		}
		r := &nsallocv1.Run{
			Key: runKey(rec.CRIUPID, rec.CRIUStart), Kind: string(rec.Phase), CriuPid: int32(rec.CRIUPID), Action: string(rec.Last),
			Sandbox: uint64(rec.Sandbox), Checkpoint: uint64(rec.Checkpoint), Outcome: rec.Outcome, Vetoed: rec.Closed, Began: timestamppb.New(rec.Began),
		}
		if !rec.Over.IsZero() {
			r.Over = timestamppb.New(rec.Over)
		}
		resp.Runs = append(resp.Runs, r)
	}
	return resp, nil
}
