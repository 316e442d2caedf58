package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/internal/etcdembed"
)

// roleVar names, in the environment, what a process of this program is.
const roleVar = "NSALLOC_BENCH_ROLE"

// roles end when their standard input does, which is when the process that started them ends.
var roles = map[string]func() error{
	"callers": callersRole,
	"echo":    echoRole,
	"etcd":    etcdRole,
}

// inRole reports whether this process had a role, which it has played then.
func inRole() bool {
	name := os.Getenv(roleVar)
	if name == "" {
		return false
	}
	role, ok := roles[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "bench: %s=%s is no role\n", roleVar, name)
		os.Exit(2)
	}
	if err := role(); err != nil {
		fmt.Fprintf(os.Stderr, "bench %s: %v\n", name, err)
		os.Exit(1)
	}
	return true
}

// roleCommand is this program in a role.
func roleCommand(ctx context.Context, role string, args ...string) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Env = append(os.Environ(), roleVar+"="+role)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // an interrupt is for us, and we end it
	return cmd, nil
}

// etcdRole is an etcd in the directory that it is given.
func etcdRole() error {
	s, err := etcdembed.Start(context.Background(), etcdembed.Config{Dir: os.Args[1], Listen: "http://127.0.0.1:0"})
	if err != nil {
		return err
	}
	fmt.Println(s.Endpoint())
	_, _ = io.Copy(io.Discard, os.Stdin)
	return s.Close()
}

// echo answers from memory at once: what gRPC takes for the messages of Allocate, and nothing else.
type echo struct {
	nsallocv1.UnimplementedAllocatorServer
	next atomic.Uint64
}

func (e *echo) Allocate(_ context.Context, req *nsallocv1.AllocateRequest) (*nsallocv1.AllocateResponse, error) {
	return e.answer(req), nil
}

func (e *echo) answer(req *nsallocv1.AllocateRequest) *nsallocv1.AllocateResponse {
	end := 1<<48 | e.next.Add(req.GetCount()) // like real serials
	return &nsallocv1.AllocateResponse{Ranges: []*nsallocv1.Range{{First: end - req.GetCount(), Count: req.GetCount()}}}
}

// streamDesc is Allocate as one stream in both directions.
var streamDesc = grpc.StreamDesc{StreamName: "Allocate", ServerStreams: true, ClientStreams: true, Handler: echoStream}

const streamMethod = "/nsalloc.bench.Stream/Allocate"

func echoStream(srv any, ss grpc.ServerStream) error {
	for {
		req := new(nsallocv1.AllocateRequest)
		if err := ss.RecvMsg(req); err != nil {
			if err == io.EOF {
				return nil
			}
			return err
		}
		if err := ss.SendMsg(srv.(*echo).answer(req)); err != nil {
			return err
		}
	}
}

func echoRole() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s, e := grpc.NewServer(), new(echo)
	nsallocv1.RegisterAllocatorServer(s, e)
	s.RegisterService(&grpc.ServiceDesc{ServiceName: "nsalloc.bench.Stream", HandlerType: (*any)(nil), Streams: []grpc.StreamDesc{streamDesc}}, e)
	fmt.Println(l.Addr())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		s.Stop()
	}()
	return s.Serve(l)
}

// machine is where the figures come from.
func machine() string {
	var u unix.Utsname
	kernel := ""
	if unix.Uname(&u) == nil {
		release, _, _ := strings.Cut(unix.ByteSliceToString(u.Release[:]), "-") // without a builder's name for it
		kernel = "Linux " + release + ", "
	}
	return fmt.Sprintf("%d cores, %s%s", runtime.NumCPU(), kernel, runtime.Version())
}
