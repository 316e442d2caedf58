package wire

import (
	"errors"
	"reflect"
	"strings"
	"testing"

	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// crossing is one kind of message with its way to the domain and back.
type crossing struct {
	empty func() proto.Message
	from  func(proto.Message) (any, error)
	to    func(any) proto.Message
}

func crossingOf[M proto.Message, D any](from func(M) (D, error), to func(D) M) crossing {
	var m M
	return crossing{
		func() proto.Message { return m.ProtoReflect().New().Interface() },
		func(m proto.Message) (any, error) { return from(m.(M)) },
		func(d any) proto.Message { return to(d.(D)) },
	}
}

func request[M proto.Message, D any](from func(M, string) D, to func(D) M) crossing {
	return crossingOf(func(m M) (D, error) { return from(m, "h"), nil }, to)
}

func record[M proto.Message, D any](from func(M) D, to func(D) M) crossing {
	return crossingOf(func(m M) (D, error) { return from(m), nil }, to)
}

// crossings are every message that is turned into a value of the domain.
var crossings = []crossing{
	request(AllocateCommand, AllocateRequest),
	request(HelloCommand, HelloRequest),
	request(GrantCommand, GrantRequest),
	request(RegisterCommand, RegisterRequest),
	request(EndCommand, EndRequest),
	crossingOf(func(m *nsallocv1.OpenRequest) (alloc.OpenCommand, error) { return OpenCommand(m, "h") }, OpenRequest),
	request(ConfirmCommand, ConfirmRequest),
	request(AbortCommand, AbortRequest),
	crossingOf(func(m *nsallocv1.ClaimRequest) (alloc.ClaimCommand, error) { return ClaimCommand(m, "h") }, ClaimRequest),
	request(BindCommand, BindRequest),
	request(ReleaseCommand, ReleaseRequest),
	record(ClaimAnswer, ClaimResponse),
	record(SandboxFromWire, SandboxToWire),
	record(CheckpointFromWire, CheckpointToWire),
	record(HostFromWire, HostToWire),
	record(PoolFromWire, PoolToWire),
}

// FuzzMessages: whatever crosses the wire becomes a value of the domain or a refusal, and a value that crosses
// once more stays what it is: nothing is made up on the way, and nothing is lost that the domain has a word for.
func FuzzMessages(f *testing.F) {
	const s = alloc.Serial(1<<48 + 5)
	m := alloc.Mutation{RequestID: "id", Host: "h", Incarnation: 1<<48 + 2}
	b := []alloc.Binding{{Serial: s + 1, Type: alloc.Net, Kernel: alloc.KernelID{BootID: "b", ID: 1, Inode: 2, Weak: true}, Parent: s + 2}}
	spend, labels, digest := alloc.Ranges{{First: s, Count: 9}, {First: s + 20, Count: 1}}, map[string]string{"k": "v"}, alloc.Digest{1, 2, 3}
	values := []any{
		alloc.AllocateCommand{RequestID: "id", Count: 3},
		alloc.HelloCommand{RequestID: "id", BootID: "b", Incarnation: 3, Nonce: "n", PoolUUID: "p", Labels: labels},
		alloc.GrantCommand{Mutation: m, Count: 7},
		alloc.RegisterCommand{Mutation: m, Spend: spend, Items: []alloc.RegisterItem{{Sandbox: s, Add: b, Labels: labels, OfHost: true, ParentCheckpoint: s + 3, Gone: []alloc.Serial{s + 10}}}},
		alloc.EndCommand{Mutation: m, Sandbox: s, Epoch: 4},
		alloc.OpenCommand{Mutation: m, Spend: spend, Sandbox: s, Epoch: 4, Checkpoint: s + 1, RunID: "r", Digest: digest},
		alloc.ConfirmCommand{Mutation: m, Sandbox: s, Epoch: 4, Checkpoint: s + 1, Evidence: alloc.InDoubt},
		alloc.AbortCommand{Mutation: m, Sandbox: s, Epoch: 4, Checkpoint: s + 1, ZeroGiven: true},
		alloc.ClaimCommand{Mutation: m, Checkpoint: s, Digest: digest, BootID: "b", Run: "r", Exe: "2049:131"},
		alloc.BindCommand{Mutation: m, Spend: spend, Sandbox: s, Epoch: 4, BootID: "b", Run: "r", Bindings: b, Fresh: b, Labels: labels},
		alloc.ReleaseCommand{Mutation: m, Sandbox: s, Epoch: 4, BootID: "b", Run: "r"},
		alloc.ClaimAnswer{Outcome: alloc.MayClone, Images: &alloc.Checkpoint{Serial: s, State: alloc.CheckpointVoid}, Why: "why"},
	}
	for i, v := range values {
		f.Add(uint8(i), marshal(f, crossings[i].to(v)))
	}
	for _, rec := range alloctest.Records(f) {
		for i, c := range crossings[len(values):] {
			if v, _ := c.from(c.empty()); reflect.TypeOf(v) == reflect.TypeOf(rec) {
				f.Add(uint8(len(values)+i), marshal(f, c.to(rec)))
			}
		}
	}
	f.Fuzz(func(t *testing.T, kind uint8, body []byte) {
		c := crossings[int(kind)%len(crossings)]
		m := c.empty()
		if proto.Unmarshal(body, m) != nil {
			return // gRPC refuses it
		}
		v, err := c.from(m)
		if err != nil {
			if !errors.Is(err, alloc.ErrInvalid) {
				t.Errorf("%T: %v", m, err)
			}
			return
		}
		if !known(m.ProtoReflect()) {
			return // what there is no word for stays here
		}
		again := c.empty()
		if err := proto.Unmarshal(marshal(t, c.to(v)), again); err != nil {
			t.Fatal(err)
		}
		if w, err := c.from(again); err != nil || !reflect.DeepEqual(w, v) {
			t.Errorf("%+v\nbecame\n%+v, %v", v, w, err)
		}
	})
}

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.Fatalf("%T cannot be sent: %v", m, err)
	}
	return b
}

// known reports whether each value of an enum is one of ours, and each time one that there is.
func known(m protoreflect.Message) (ok bool) {
	if ts, isTime := m.Interface().(*timestamppb.Timestamp); isTime {
		return ts.IsValid()
	}
	ok = true
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.Enum() != nil:
			ok = f.Enum().Values().ByNumber(v.Enum()) != nil
		case f.IsMap() || f.Message() == nil:
		case f.IsList():
			for i := 0; i < v.List().Len() && ok; i++ {
				ok = known(v.List().Get(i).Message())
			}
		default:
			ok = known(v.Message())
		}
		return ok
	})
	return ok
}

// FuzzStatus: whatever a server answers in place of a response becomes an error of which nobody believes too
// much: a mutation that may have arrived is refused only in words of ours, or by what never looks at it.
func FuzzStatus(f *testing.F) {
	for _, err := range []error{
		&alloc.Error{Reason: alloc.ReasonStaleEpoch, Subject: "sandbox 0001000000000007", Msg: "it is so", Fix: "do this"},
		&alloc.Error{Reason: alloc.ReasonNotConfirmed, Msg: "x", RetryAfter: 1},
		status.Error(codes.Unavailable, "gone"),
	} {
		f.Add(marshal(f, Status(err).Proto()), uint8(MaybeSent))
	}
	f.Fuzz(func(t *testing.T, body []byte, sent uint8) {
		var p spb.Status
		if proto.Unmarshal(body, &p) != nil || p.GetCode() == 0 {
			return
		}
		how := Sent(sent % 3)
		err := FromError(status.ErrorProto(&p), how)
		if err == nil {
			t.Fatalf("%v became nothing", &p)
		}
		ours := strings.Contains(string(body), Domain)
		e, refused := errors.AsType[*alloc.Error](err)
		if refused && (e.Error() == "" || e.RetryAfter < 0) {
			t.Errorf("%v became %#v", &p, e)
		}
		if how == MaybeSent && !ours {
			switch codes.Code(p.GetCode()) {
			case codes.Unimplemented, codes.Unauthenticated, codes.PermissionDenied, codes.InvalidArgument:
			default:
				if !errors.Is(err, alloc.ErrUnknownOutcome) {
					t.Errorf("%v became %v, and it may have been committed", &p, err)
				}
			}
		}
		// A proxy that passes it on passes on the same.
		if passed := Status(err); refused && e.Reason != "" && reasonCodes[e.Reason] != codes.OK {
			if again, ok := errors.AsType[*alloc.Error](FromError(passed.Err(), how)); !ok || again.Reason != e.Reason {
				t.Errorf("%v, passed on, became %v", err, again)
			}
		}
		_ = marshal(t, Status(err).Proto())
	})
}
