package wire

import (
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// constants are the values of a string type's constants, as the domain's source declares them.
func constants(t *testing.T, typeName string) (values []string) {
	t.Helper()
	paths, err := filepath.Glob("../../alloc/*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			if spec, ok := n.(*ast.ValueSpec); ok {
				if id, ok := spec.Type.(*ast.Ident); ok && id.Name == typeName {
					for _, v := range spec.Values {
						if lit, ok := v.(*ast.BasicLit); ok {
							s, err := strconv.Unquote(lit.Value)
							if err != nil {
								t.Fatal(err)
							}
							values = append(values, s)
						}
					}
				}
			}
			return true
		})
	}
	if len(values) == 0 {
		t.Fatalf("the domain has no constants of type %s", typeName)
	}
	return values
}

// TestEveryReason: each reason of the domain has a code, and comes back as what it was.
func TestEveryReason(t *testing.T) {
	for _, reason := range constants(t, "Reason") {
		if _, ok := reasonCodes[alloc.Reason(reason)]; !ok {
			t.Errorf("reason %s has no code", reason)
		}
		sent := &alloc.Error{Reason: alloc.Reason(reason), Subject: "sandbox 0001000000000007", Msg: "it is so", Fix: "do this", RetryAfter: 300 * time.Millisecond}
		err := FromError(fmt.Errorf("call: %w", Status(fmt.Errorf("use case: %w", sent)).Err()), MaybeSent)
		got, ok := errors.AsType[*alloc.Error](err)
		if !ok || !reflect.DeepEqual(got, sent) || !errors.Is(err, &alloc.Error{Reason: sent.Reason}) || err.Error() != sent.Error() {
			t.Errorf("%s came back as %#v", reason, err)
		}
		if status.Code(err) != reasonCodes[sent.Reason] {
			t.Errorf("%s: code %v", reason, status.Code(err))
		}
	}
}

// TestEveryWord: each word of the domain has a value on the wire, and each value a word.
func TestEveryWord(t *testing.T) {
	check := func(typeName string, values int, toWire func(string) int32, fromWire func(int32) string) {
		t.Helper()
		words := constants(t, typeName)
		if len(words) != values-1 { // but the unspecified one
			t.Errorf("%s: %d words, %d values", typeName, len(words), values)
		}
		for _, w := range words {
			if e := toWire(w); e == 0 || fromWire(e) != w {
				t.Errorf("%s %q becomes %d, and that %q", typeName, w, e, fromWire(e))
			}
		}
		if fromWire(0) != "" || fromWire(99) != "unknown(99)" || toWire("nonsense") != 0 {
			t.Errorf("%s: %q, %q, %d", typeName, fromWire(0), fromWire(99), toWire("nonsense"))
		}
	}
	check("NamespaceType", len(nsallocv1.NamespaceType_name), to(namespaceTypes), from(namespaceTypes))
	check("SandboxState", len(nsallocv1.SandboxState_name), to(sandboxStates), from(sandboxStates))
	check("CheckpointState", len(nsallocv1.CheckpointState_name), to(checkpointStates), from(checkpointStates))
	check("Evidence", len(nsallocv1.Evidence_name), to(evidences), from(evidences))
	check("Outcome", len(nsallocv1.ClaimOutcome_name), to(outcomes), from(outcomes))
	check("PoolState", len(nsallocv1.PoolState_name), to(poolStates), from(poolStates))
	check("StintBegan", len(nsallocv1.StintBegan_name), to(stintBegans), from(stintBegans))
	check("StintOver", len(nsallocv1.StintOver_name), to(stintOvers), from(stintOvers))
	check("Unheard", len(nsallocv1.UnheardWitness_name), to(unheards), from(unheards))
	check("Saying", len(nsallocv1.Saying_name), to(sayings), from(sayings))
	check("Action", len(nsallocv1.PolicyAction_name), to(policyActions), from(policyActions))
}

func to[E ~int32, W ~string](v vocabulary[E, W]) func(string) int32 {
	return func(w string) int32 { return int32(v.value(W(w))) }
}

func from[E ~int32, W ~string](v vocabulary[E, W]) func(int32) string {
	return func(e int32) string { return string(v.word(E(e))) }
}

// TestRecords: what the wire has fields for comes back as it was.
func TestRecords(t *testing.T) {
	for _, r := range alloctest.Records(t) {
		switch want := r.(type) {
		case *alloc.Sandbox:
			got := SandboxFromWire(through(t, SandboxToWire(want)))
			clean := *want
			clean.Requests, clean.Extra = alloc.RequestLog{}, nil
			if clean.Claim != nil {
				clean.Claim = &alloc.Claim{Claimant: clean.Claim.Claimant, Exe: clean.Claim.Exe}
			}
			clean.Bindings = append([]alloc.Binding(nil), clean.Bindings...)
			for i := range clean.Bindings {
				clean.Bindings[i].Extra = nil
			}
			clean.Stints = append([]alloc.Stint(nil), clean.Stints...)
			for i := range clean.Stints {
				clean.Stints[i].Extra = nil
			}
			same(t, got, &clean)
		case *alloc.Checkpoint:
			clean := *want
			clean.Extra = nil
			same(t, CheckpointFromWire(through(t, CheckpointToWire(want))), &clean)
		case *alloc.Host:
			clean := *want
			clean.Nonce, clean.Requests, clean.Extra = "", alloc.RequestLog{}, nil
			same(t, HostFromWire(through(t, HostToWire(want))), &clean)
		case *alloc.Pool:
			clean := *want
			clean.Nonce, clean.PolicyExtra, clean.Extra = "", nil, nil
			clean.Target, clean.Raised, clean.Created = 0, time.Time{}, time.Time{} // the servers' own
			same(t, PoolFromWire(through(t, PoolToWire(want))), &clean)
		}
	}
	if SandboxToWire(nil) != nil || SandboxFromWire(nil) != nil || CheckpointToWire(nil) != nil || CheckpointFromWire(nil) != nil ||
		HostToWire(nil) != nil || HostFromWire(nil) != nil || PoolToWire(nil) != nil || PoolFromWire(nil) != nil {
		t.Error("nil became something")
	}
}

// through encodes and decodes.
func through[M proto.Message](t *testing.T, m M) M {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	out := m.ProtoReflect().New().Interface()
	if err := proto.Unmarshal(b, out); err != nil {
		t.Fatal(err)
	}
	return out.(M)
}

func same(t *testing.T, got, want any) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
}

// TestCommands: what a client asks for is what the server hears, but for the caller's name, which the
// server knows.
func TestCommands(t *testing.T) {
	const s = alloc.Serial(1<<48 + 5)
	m := alloc.Mutation{RequestID: "id", Host: "h", Incarnation: 1<<48 + 2}
	b := []alloc.Binding{{Serial: s + 1, Type: alloc.Net, Kernel: alloc.KernelID{BootID: "b", ID: 1, Inode: 2, Weak: true}, Parent: s + 2}}
	spend := alloc.Ranges{{First: s, Count: 9}, {First: s + 20, Count: 1}}
	labels := map[string]string{"k": "v"}
	digest := alloc.Digest{1, 2, 3}

	same(t, AllocateCommand(through(t, AllocateRequest(alloc.AllocateCommand{RequestID: "id", Caller: "forged", Count: 3})), "host/h"), alloc.AllocateCommand{RequestID: "id", Caller: "host/h", Count: 3})
	hello := alloc.HelloCommand{RequestID: "id", Host: "h", BootID: "b", Incarnation: 3, Nonce: "n", PoolUUID: "p", Labels: labels,
		Seen: alloc.Seen{Generation: 2, Highest: s, Spent: s + 1, Sandbox: s + 2, Epoch: 3}}
	same(t, HelloCommand(through(t, HelloRequest(hello)), "h"), hello)
	grant := alloc.GrantCommand{Mutation: m, Count: 7}
	same(t, GrantCommand(through(t, GrantRequest(grant)), "h"), grant)
	register := alloc.RegisterCommand{Mutation: m, Spend: spend, Items: []alloc.RegisterItem{
		{Sandbox: s, Add: b, Labels: labels, OfHost: true, ParentCheckpoint: s + 3}, {Sandbox: s + 9, Epoch: 4, Gone: []alloc.Serial{s + 10}}}}
	same(t, RegisterCommand(through(t, RegisterRequest(register)), "h"), register)
	again := alloc.AgainCommand{Mutation: m, Last: true, Items: []alloc.AgainItem{
		{Sandbox: s, Epoch: 4, Bindings: b, Labels: labels, OfHost: true, Checkpoint: s + 3, Parent: &alloc.Parent{Sandbox: s + 4, Checkpoint: s + 5}, Created: time.Unix(7, 0).UTC(), From: []alloc.Serial{s + 6}},
		{Sandbox: s + 9, Epoch: 5, Bindings: b, Dump: &alloc.AgainDump{Checkpoint: s + 7, RunID: "r", Digest: digest}}, {Sandbox: s + 10, Epoch: 6, Over: true}}}
	heardAgain, err0 := AgainCommand(through(t, AgainRequest(again)), "h")
	same(t, heardAgain, again)
	if _, err := AgainCommand(&nsallocv1.RegisterAgainRequest{Items: []*nsallocv1.AgainItem{{Dump: &nsallocv1.AgainDump{Digest: []byte{1}}}}}, "h"); err0 != nil || !errors.Is(err, alloc.ErrInvalid) {
		t.Errorf("%v; a digest of 1 byte: %v", err0, err)
	}
	answers := []alloc.AgainAnswer{{Sandbox: &alloc.Sandbox{Serial: s, State: alloc.StateRunning}}, {Err: &alloc.Error{Reason: alloc.ReasonBound, Msg: "it is bound"}}}
	same(t, AgainAnswers(through(t, AgainResponse(answers))), answers)
	waive := alloc.WaiveCommand{RequestID: "id", Actor: "forged", Host: "h"}
	same(t, WaiveCommand(through(t, WaiveRequest(waive)), "operator/o"), alloc.WaiveCommand{RequestID: "id", Actor: "operator/o", Host: "h"})
	end := alloc.EndCommand{Mutation: m, Sandbox: s, Epoch: 4}
	same(t, EndCommand(through(t, EndRequest(end)), "h"), end)
	open := alloc.OpenCommand{Mutation: m, Spend: spend, Sandbox: s, Epoch: 4, Checkpoint: s + 1, RunID: "r", Digest: digest}
	heard, err := OpenCommand(through(t, OpenRequest(open)), "h")
	same(t, heard, open)
	confirm := alloc.ConfirmCommand{Mutation: m, Sandbox: s, Epoch: 4, Checkpoint: s + 1, Evidence: alloc.InDoubt}
	same(t, ConfirmCommand(through(t, ConfirmRequest(confirm)), "h"), confirm)
	abort := alloc.AbortCommand{Mutation: m, Sandbox: s, Epoch: 4, Checkpoint: s + 1, ZeroGiven: true}
	same(t, AbortCommand(through(t, AbortRequest(abort)), "h"), abort)
	claim := alloc.ClaimCommand{Mutation: m, Checkpoint: s, Digest: digest, BootID: "b", Run: "r", Exe: "2049:131"}
	claimed, err2 := ClaimCommand(through(t, ClaimRequest(claim)), "h")
	same(t, claimed, claim)
	if err != nil || err2 != nil {
		t.Error(err, err2)
	}
	bind := alloc.BindCommand{Mutation: m, Spend: spend, Sandbox: s, Epoch: 4, BootID: "b", Run: "r", Bindings: b, Fresh: b, Labels: labels}
	same(t, BindCommand(through(t, BindRequest(bind)), "h"), bind)
	release := alloc.ReleaseCommand{Mutation: m, Sandbox: s, Epoch: 4, BootID: "b", Run: "r"}
	same(t, ReleaseCommand(through(t, ReleaseRequest(release)), "h"), release)

	for _, bad := range [][]byte{nil, {}, make([]byte, 31), make([]byte, 33)} {
		if _, err := OpenCommand(&nsallocv1.OpenRequest{Digest: bad}, "h"); !errors.Is(err, alloc.ErrInvalid) {
			t.Errorf("a digest of %d bytes: %v", len(bad), err)
		}
	}
	// What is ignored in requests does not make two of them differ.
	at := time.Now()
	register.Items[0].Add[0].Bound, register.Items[0].Add[0].Gone = at, at
	if got := RegisterCommand(RegisterRequest(register), "h").Items[0].Add[0]; !got.Bound.IsZero() || !got.Gone.IsZero() {
		t.Errorf("heard %+v", got)
	}
}

// TestRegisterBrief: a brief answer says the same as a whole one, whatever became of the sandboxes since.
func TestRegisterBrief(t *testing.T) {
	const s = alloc.Serial(1<<48 | 1)
	at := time.Now().UTC().Round(0)
	fresh := func(serial alloc.Serial) (*alloc.Sandbox, alloc.RegisterItem) {
		item := alloc.RegisterItem{Sandbox: serial, Labels: map[string]string{"k": "v"}}
		sb := &alloc.Sandbox{Serial: serial, State: alloc.StateRunning, Owner: "h", Epoch: 1 << 48, Labels: item.Labels, Created: at}
		for i, ns := range []alloc.NamespaceType{alloc.Net, alloc.Mnt} {
			b := alloc.Binding{Serial: serial + 1 + alloc.Serial(i), Type: ns, Kernel: alloc.KernelID{BootID: "b", ID: uint64(serial), Inode: 2}, Parent: 7}
			item.Add = append(item.Add, b)
			b.Bound = at
			sb.Bindings = append(sb.Bindings, b)
		}
		return sb, item
	}
	for name, change := range map[string]func(*alloc.Sandbox){
		"as it was made":       func(*alloc.Sandbox) {},
		"one is gone":          func(sb *alloc.Sandbox) { sb.Bindings[1].Gone = at.Add(1) },
		"one was added":        func(sb *alloc.Sandbox) { sb.Bindings = append(sb.Bindings, alloc.Binding{Serial: s + 5, Bound: at}) },
		"one was parted with":  func(sb *alloc.Sandbox) { sb.Bindings = sb.Bindings[1:] },
		"restored elsewhere":   func(sb *alloc.Sandbox) { sb.Owner, sb.Bindings[0].Kernel.BootID = "i", "c" },
		"one is older than it": func(sb *alloc.Sandbox) { sb.Bindings[0].Bound = at.Add(-1) },
		"another serial":       func(sb *alloc.Sandbox) { sb.Bindings[0].Serial = s + 8 },
		"another type":         func(sb *alloc.Sandbox) { sb.Bindings[0].Type = alloc.IPC },
		"another parent":       func(sb *alloc.Sandbox) { sb.Bindings[0].Parent = 0 },
		"parted with all":      func(sb *alloc.Sandbox) { sb.Bindings = nil },
	} {
		t.Run(name, func(t *testing.T) {
			changed, first := fresh(s)
			change(changed)
			second, item := fresh(s + 10)
			cmd := alloc.RegisterCommand{Items: []alloc.RegisterItem{first, item}}
			want := []*alloc.Sandbox{changed, second}
			for _, brief := range []bool{false, true} {
				resp := through(t, RegisterResponse(cmd, want, alloc.Ranges{{First: s + 90, Count: 3}}, brief))
				if n := len(resp.GetSandboxes()[1].GetBindings()); brief != (n == 0) {
					t.Errorf("brief %v: %d bindings of the one that is as asked for", brief, n)
				}
				got, left := RegisterAnswer(cmd, resp)
				same(t, got, want)
				same(t, left, alloc.Ranges{{First: s + 90, Count: 3}})
			}
		})
	}
}

func TestStatus(t *testing.T) {
	for _, c := range []struct {
		err  error
		code codes.Code
	}{
		{nil, codes.OK},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		{fmt.Errorf("read: %w", context.Canceled), codes.Canceled},
		{status.Error(codes.NotFound, "x"), codes.NotFound},
		{errors.New("password=secret"), codes.Internal},
		{&alloc.Error{Reason: "NEWER_REASON", Msg: "x"}, codes.Internal},
		{&alloc.Error{Reason: alloc.ReasonUnavailable, Msg: "x", Err: context.DeadlineExceeded}, codes.Unavailable},
	} {
		if got := Status(c.err); got.Code() != c.code || strings.Contains(got.Message(), "secret") {
			t.Errorf("%v: %v", c.err, got)
		}
	}
	// What a caller sent and an error quotes cannot make the status impossible to encode.
	st := Status(&alloc.Error{Reason: alloc.ReasonInvalid, Subject: "name \xff", Msg: "\xfe", Fix: "\xfd"})
	if _, err := proto.Marshal(st.Proto()); err != nil || len(st.Details()) == 0 {
		t.Errorf("%v: %v", st, err)
	}
}

func TestFromTransport(t *testing.T) {
	for _, c := range []struct {
		code codes.Code
		sent Sent
		want *alloc.Error // nil: as it was
	}{
		{codes.Unavailable, MaybeSent, alloc.ErrUnknownOutcome},
		{codes.DeadlineExceeded, MaybeSent, alloc.ErrUnknownOutcome},
		{codes.Canceled, MaybeSent, alloc.ErrUnknownOutcome},
		{codes.Internal, MaybeSent, alloc.ErrUnknownOutcome},
		{codes.Unknown, MaybeSent, alloc.ErrUnknownOutcome},
		{codes.Unavailable, NotSent, alloc.ErrUnavailable},
		{codes.Canceled, NotSent, alloc.ErrUnavailable},
		{codes.Unavailable, NothingToLose, alloc.ErrUnavailable},
		{codes.DeadlineExceeded, NothingToLose, alloc.ErrUnavailable},
		{codes.Internal, NothingToLose, nil},
		{codes.Unimplemented, MaybeSent, nil},
		{codes.InvalidArgument, MaybeSent, nil},
		{codes.ResourceExhausted, MaybeSent, alloc.ErrUnknownOutcome},
		{codes.ResourceExhausted, NotSent, nil},
		{codes.ResourceExhausted, NothingToLose, nil},
	} {
		in := status.Error(c.code, "words of the transport")
		got := FromError(in, c.sent)
		switch {
		case c.want == nil && got != in:
			t.Errorf("%v, %d: %v", c.code, c.sent, got)
		case c.want != nil && !errors.Is(got, c.want):
			t.Errorf("%v, %d: %v", c.code, c.sent, got)
		}
		if status.Code(got) != c.code || !strings.Contains(got.Error(), "words of the transport") {
			t.Errorf("%v, %d: became %v", c.code, c.sent, got)
		}
		if c.want != nil && errors.Is(got, context.DeadlineExceeded) != (c.code == codes.DeadlineExceeded) {
			t.Errorf("%v: errors.Is DeadlineExceeded is wrong", c.code)
		}
	}
	if FromError(nil, MaybeSent) != nil {
		t.Error("no error became one")
	}
	// Ours is never a lost answer: it says by itself that nothing changed.
	for _, e := range []*alloc.Error{alloc.ErrExhausted, alloc.ErrTooLarge} {
		got := FromError(Status(&alloc.Error{Reason: e.Reason, Msg: "x"}).Err(), MaybeSent)
		if !errors.Is(got, e) || errors.Is(got, alloc.ErrUnknownOutcome) {
			t.Errorf("%s became %v", e.Reason, got)
		}
	}
}
