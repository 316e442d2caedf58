package etcdstore

import (
	"errors"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/nsalloc/nsalloc/internal/storepb"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

func sizeOf(req *pb.TxnRequest) int { return proto.Size(req) }

// words are the values of the domain's enums.
var words = map[reflect.Type][]string{
	reflect.TypeFor[alloc.PoolState]():       wordsOf(poolStates),
	reflect.TypeFor[alloc.Action]():          wordsOf(actions),
	reflect.TypeFor[alloc.Unheard]():         wordsOf(unheards),
	reflect.TypeFor[alloc.SandboxState]():    wordsOf(sandboxStates),
	reflect.TypeFor[alloc.CheckpointState](): wordsOf(checkpointStates),
	reflect.TypeFor[alloc.NamespaceType]():   wordsOf(namespaceTypes),
	reflect.TypeFor[alloc.StintBegan]():      wordsOf(stintBegans),
	reflect.TypeFor[alloc.StintOver]():       wordsOf(stintOvers),
}

func wordsOf[D ~string, P ~int32](e enum[D, P]) (ws []string) {
	for d := range e.stored {
		ws = append(ws, string(d))
	}
	return ws
}

// fill draws every field by its type, so that a field which is added to the domain and forgotten in
// the stored form fails the round trip.
func fill(t *rapid.T, v reflect.Value, name string) {
	switch {
	case v.Type() == reflect.TypeFor[time.Time]():
		if rapid.Bool().Draw(t, name+" set") {
			sec := rapid.Int64Range(0, 1<<34).Draw(t, name)
			v.Set(reflect.ValueOf(time.Unix(sec, rapid.Int64Range(0, 999_999_999).Draw(t, name)).UTC()))
		}
		return
	case words[v.Type()] != nil:
		v.SetString(rapid.SampledFrom(words[v.Type()]).Draw(t, name))
		return
	case strings.HasSuffix(name, "Extra"):
		v.SetBytes(drawExtra(t))
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(t, v.Field(i), v.Type().Field(i).Name)
		}
	case reflect.Pointer:
		if rapid.Bool().Draw(t, name+" set") {
			v.Set(reflect.New(v.Type().Elem()))
			fill(t, v.Elem(), name)
		}
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			if b := rapid.SliceOf(rapid.Byte()).Draw(t, name); len(b) > 0 {
				v.SetBytes(b)
			}
			return
		}
		for range rapid.IntRange(0, 4).Draw(t, name+" length") {
			e := reflect.New(v.Type().Elem()).Elem()
			fill(t, e, name)
			v.Set(reflect.Append(v, e))
		}
	case reflect.Array:
		for i := range v.Len() {
			v.Index(i).SetUint(uint64(rapid.Byte().Draw(t, name)))
		}
	case reflect.Map:
		if m := rapid.MapOfN(rapid.String(), rapid.String(), 0, 3).Draw(t, name); len(m) > 0 {
			v.Set(reflect.ValueOf(m))
		}
	case reflect.String:
		v.SetString(rapid.String().Draw(t, name))
	case reflect.Bool:
		v.SetBool(rapid.Bool().Draw(t, name))
	case reflect.Uint16, reflect.Uint64:
		v.SetUint(rapid.Uint64Max(1<<v.Type().Bits()-1).Draw(t, name))
	case reflect.Int:
		v.SetInt(int64(rapid.IntRange(0, math.MaxInt32).Draw(t, name)))
	default:
		t.Fatalf("%s: teach fill about %s", name, v.Type())
	}
}

// drawExtra is fields that this version does not know.
func drawExtra(t *rapid.T) (b []byte) {
	for range rapid.IntRange(0, 3).Draw(t, "extra fields") {
		n := protowire.Number(rapid.IntRange(1000, 2000).Draw(t, "number"))
		if rapid.Bool().Draw(t, "varint") {
			b = protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), rapid.Uint64().Draw(t, "value"))
		} else {
			b = protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), rapid.SliceOf(rapid.Byte()).Draw(t, "value"))
		}
	}
	return b
}

func TestRoundTrip(t *testing.T) {
	for _, sample := range alloctest.Records(t) {
		typ := reflect.TypeOf(sample).Elem()
		t.Run(typ.Name(), func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				v := reflect.New(typ)
				fill(t, v.Elem(), typ.Name())
				rec := v.Interface().(alloc.Record)
				value, err := encode(rec)
				if err != nil {
					if reflect.ValueOf(rec).Elem().IsZero() && errors.Is(err, alloc.ErrInvalid) {
						t.Skip("no record is all zero")
					}
					t.Fatal(err)
				}
				got, err := decode(rec.Key(), value)
				if err != nil {
					t.Fatal(err)
				}
				if !reflect.DeepEqual(got, rec) {
					t.Fatalf("put %+v\ngot %+v", rec, got)
				}
			})
		})
	}
}

func TestNotStorable(t *testing.T) {
	for name, rec := range map[string]alloc.Record{
		"no state":      &alloc.Sandbox{Serial: 1},
		"strange state": &alloc.Checkpoint{Serial: 1, State: "torn"},
		"strange type":  &alloc.Sandbox{Serial: 1, State: alloc.StateRunning, Bindings: []alloc.Binding{{Type: "disk"}}},
		"no policy":     &alloc.Pool{UUID: "u", State: alloc.PoolOpen},
		"strange stint": &alloc.OldStint{Sandbox: 1, Stint: alloc.Stint{Began: "found"}},
		"no beginning":  &alloc.OldStint{Sandbox: 1},
		"strange end":   &alloc.OldStint{Sandbox: 1, Stint: alloc.Stint{Began: alloc.BeganClaimed, Over: "gone"}},
		"not UTF-8":     host("a", "\xff"),
		"all zero":      &alloc.Counter{},
		"year 10000":    &alloc.Host{Name: "a", Hello: time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)},
		"format":        &alloc.Pool{State: alloc.PoolOpen, Policy: alloc.DefaultPolicy(), Format: -1},
	} {
		if _, err := encode(rec); !errors.Is(err, alloc.ErrInvalid) || !strings.Contains(err.Error(), rec.Key().String()) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNotReadable(t *testing.T) {
	unknown := func(m proto.Message) {
		m.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 1000, protowire.VarintType), 1))
	}
	sandbox := func(change func(*storepb.Sandbox)) proto.Message {
		m := &storepb.Sandbox{Serial: 7, State: storepb.SandboxState_SANDBOX_STATE_RUNNING,
			Bindings: []*storepb.Binding{{Type: storepb.NamespaceType_NAMESPACE_TYPE_PID, Kernel: &storepb.KernelID{Inode: 1}}},
			Claim:    &storepb.Claim{Claimant: &storepb.Claimant{}, From: storepb.SandboxState_SANDBOX_STATE_ENDED}}
		change(m)
		return m
	}
	key := alloc.SandboxKey(7)
	for name, c := range map[string]struct {
		m    proto.Message
		want *alloc.Error
	}{
		"good":                  {sandbox(func(*storepb.Sandbox) {}), nil},
		"no state":              {sandbox(func(m *storepb.Sandbox) { m.State = 0 }), alloc.ErrMalformed},
		"no type":               {sandbox(func(m *storepb.Sandbox) { m.Bindings[0].Type = 0 }), alloc.ErrMalformed},
		"no claimant":           {sandbox(func(m *storepb.Sandbox) { m.Claim.Claimant = nil }), alloc.ErrMalformed},
		"another key":           {sandbox(func(m *storepb.Sandbox) { m.Serial = 8 }), alloc.ErrMalformed},
		"digest":                {sandbox(func(m *storepb.Sandbox) { m.Requests = []*storepb.RequestMark{{Digest: []byte{1}}} }), alloc.ErrMalformed},
		"another kind":          {&storepb.Counter{Generation: 1, Nonce: "n"}, alloc.ErrMalformed},
		"state of the future":   {sandbox(func(m *storepb.Sandbox) { m.State = 99 }), alloc.ErrFormat},
		"no beginning":          {sandbox(func(m *storepb.Sandbox) { m.Stints = []*storepb.Stint{{}} }), alloc.ErrMalformed},
		"end of the future":     {sandbox(func(m *storepb.Sandbox) { m.Stints = []*storepb.Stint{{Began: 1, Over: 99}} }), alloc.ErrFormat},
		"type of the future":    {sandbox(func(m *storepb.Sandbox) { m.Bindings[0].Type = 99 }), alloc.ErrFormat},
		"unknown field":         {sandbox(func(m *storepb.Sandbox) { unknown(m) }), nil},
		"unknown in a binding":  {sandbox(func(m *storepb.Sandbox) { unknown(m.Bindings[0]) }), nil},
		"unknown in a kernelid": {sandbox(func(m *storepb.Sandbox) { unknown(m.Bindings[0].Kernel) }), alloc.ErrFormat},
		"unknown in a claim":    {sandbox(func(m *storepb.Sandbox) { unknown(m.Claim) }), nil},
		"unknown in a claimant": {sandbox(func(m *storepb.Sandbox) { unknown(m.Claim.Claimant) }), alloc.ErrFormat},
	} {
		value, err := proto.Marshal(c.m)
		if err != nil {
			t.Fatal(err)
		}
		_, err = decode(key, value)
		if c.want == nil && err != nil || c.want != nil && (!errors.Is(err, c.want) || !strings.Contains(err.Error(), key.String())) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := decode(key, nil); !errors.Is(err, alloc.ErrMalformed) {
		t.Errorf("an empty value: %v", err)
	}
	if _, err := decode((&alloc.Counter{}).Key(), []byte{8, 0}); !errors.Is(err, alloc.ErrMalformed) {
		t.Errorf("a zero: %v", err)
	}
	value, err := proto.Marshal(&storepb.Counter{Generation: 1 << 16})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := decode((&alloc.Counter{}).Key(), value); !errors.Is(err, alloc.ErrMalformed) {
		t.Errorf("a generation that does not fit: %v", err)
	}
}

// Every enum value that can be written can be read.
func TestEnumsAreComplete(t *testing.T) {
	for name, n := range map[string]struct{ known, all int }{
		"pool state":       {len(poolStates.stored), len(storepb.PoolState_name) - 1},
		"action":           {len(actions.stored), len(storepb.Action_name) - 1},
		"unheard witness":  {len(unheards.stored), len(storepb.UnheardWitness_name)}, // unspecified is a word: before there was a choice
		"sandbox state":    {len(sandboxStates.stored), len(storepb.SandboxState_name) - 1},
		"checkpoint state": {len(checkpointStates.stored), len(storepb.CheckpointState_name) - 1},
		"namespace type":   {len(namespaceTypes.stored), len(storepb.NamespaceType_name) - 1},
		"stint began":      {len(stintBegans.stored), len(storepb.StintBegan_name) - 1},
		"stint over":       {len(stintOvers.stored), len(storepb.StintOver_name)}, // unspecified is a word: it lasts
	} {
		if n.known != n.all {
			t.Errorf("%s: %d words, %d values", name, n.known, n.all)
		}
	}
}
