package etcdstore

import (
	"context"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/nsalloc/nsalloc/internal/storepb"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// planted is a store whose keys others write, too.
type planted struct{ *Store }

// Plant implements alloctest.Planter, behind the store's back.
func (s planted) Plant(ctx context.Context, key alloc.Key, value []byte) error {
	at, err := s.keys.etcd(key)
	if err == nil {
		_, err = s.client.etcd.Put(ctx, string(at), string(value))
	}
	return err
}

// Newer implements alloctest.Planter. A counter and what was put aside have neither an enumeration nor a
// closed message: whatever a newer version adds to them is carried along.
func (planted) Newer(rec alloc.Record) ([]byte, bool) {
	m := newMessage(rec.Key().Kind)
	value, err := encode(rec)
	if err != nil {
		panic(err)
	}
	if err := proto.Unmarshal(value, m); err != nil {
		panic(err)
	}
	ok := spoil(m.ProtoReflect(), true)
	if value, err = proto.Marshal(m); err != nil {
		panic(err)
	}
	return value, ok
}

// spoil puts a value of the future into the first enumeration, or a field into the first closed message.
func spoil(m protoreflect.Message, open bool) (done bool) {
	if !open {
		m.SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 1000, protowire.VarintType), 1))
		return true
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.Enum() != nil:
			m.Set(f, protoreflect.ValueOfEnum(99))
			done = true
		case f.IsMap() || f.Message() == nil || f.Message().FullName() == "google.protobuf.Timestamp":
		case f.IsList():
			done = v.List().Len() > 0 && spoil(v.List().Get(0).Message(), growing(f.Message()))
		default:
			done = spoil(v.Message(), growing(f.Message()))
		}
		return !done
	})
	return done
}

// TestEmptyValue: no version writes one. It is no record, and it is not absent either.
func TestEmptyValue(t *testing.T) {
	s := planted{newStore(t, shared.Endpoint())}
	if err := s.Plant(t.Context(), alloc.HostKey("a"), nil); err != nil {
		t.Fatal(err)
	}
	entries, _, err := s.Get(t.Context(), alloc.HostKey("a"))
	if err != nil || alloc.ReasonOf(entries[0].Err) != alloc.ReasonMalformed || entries[0].Revision == 0 {
		t.Errorf("%+v, %v", entries, err)
	}
	_, err = s.Commit(t.Context(), alloc.Tx{Guards: []alloc.Guard{{Key: alloc.HostKey("a"), Token: entries[0].Token}}, Put: []alloc.Record{host("a", "1")}})
	if alloc.ReasonOf(err) != alloc.ReasonConflict {
		t.Errorf("written over: %v", err)
	}
}

// TestKeysOfNoRecord: what stands where no record can stand is left alone.
func TestKeysOfNoRecord(t *testing.T) {
	s := newStore(t, shared.Endpoint())
	from, err := s.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{host("a", "1")}})
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"host/", "host", "pool/x", "hosts/a", "", "host\x00/a"} {
		if _, err := s.client.etcd.Put(t.Context(), s.keys.prefix+key, "x"); err != nil {
			t.Fatal(err)
		}
	}
	last, err := s.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{host("b", "1")}})
	if err != nil {
		t.Fatal(err)
	}
	entries, _, err := s.List(t.Context(), alloc.KindHost, "", 10, 0)
	if err != nil || len(entries) != 2 || entries[0].Record == nil || entries[1].Record == nil {
		t.Errorf("%+v, %v", entries, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var got []alloc.Key
	_ = s.Watch(ctx, from, func(rev alloc.Revision, changes []alloc.Change) {
		for _, c := range changes {
			got = append(got, c.Key)
		}
		if rev >= last {
			cancel()
		}
	})
	if len(got) != 1 || got[0] != alloc.HostKey("b") {
		t.Errorf("delivered %v", got)
	}
}

// TestGrowingMessages: what the domain keeps the unknown fields of is what the format calls open.
func TestGrowingMessages(t *testing.T) {
	for name, open := range map[protoreflect.Name]bool{
		"Policy": true, "Claim": true, "Binding": true, "Stint": true,
		"Range": false, "RequestMark": false, "KernelID": false, "Claimant": false, "Parent": false,
	} {
		d := storepb.File_store_proto.Messages().ByName(name)
		if d == nil {
			t.Fatalf("there is no message %s", name)
		}
		if growing(d) != open {
			t.Errorf("%s: open is %v", name, growing(d))
		}
	}
}

// TestPlainSandbox: what newer refuses in a sandbox is not plain, wherever it stands, and a sandbox of this
// version is.
func TestPlainSandbox(t *testing.T) {
	whole := func() *storepb.Sandbox {
		m := new(storepb.Sandbox)
		populate(m.ProtoReflect())
		m.Claim = nil
		return m
	}
	if m := whole(); !plain(m) || newer(m.ProtoReflect(), true) != nil {
		t.Fatalf("of this version: plain is %v, newer says %v", plain(m), newer(m.ProtoReflect(), true))
	}
	spoiled := 0
	for m := whole(); spoilNth(m.ProtoReflect(), new(spoiled)); m = whole() {
		if err := newer(m.ProtoReflect(), true); plain(m) && err != nil {
			t.Errorf("plain, and newer says: %v", err)
		}
		spoiled++
	}
	if spoiled < 15 {
		t.Errorf("%d places were spoiled", spoiled)
	}
	m := new(storepb.Sandbox)
	populate(m.ProtoReflect())
	if plain(m) {
		t.Error("one with a claim is plain")
	}
}

// populate gives every field of m a value of this version, down to the last message.
func populate(m protoreflect.Message) {
	for i := range m.Descriptor().Fields().Len() {
		f := m.Descriptor().Fields().Get(i)
		switch {
		case f.IsMap():
		case f.IsList() && f.Message() != nil:
			populate(m.Mutable(f).List().AppendMutable().Message())
			populate(m.Mutable(f).List().AppendMutable().Message())
		case f.Message() != nil:
			populate(m.Mutable(f).Message())
		case f.Enum() != nil:
			m.Set(f, protoreflect.ValueOfEnum(1))
		}
	}
}

// spoilNth makes the nth enumeration or message a newer version's, and reports false when there are fewer.
func spoilNth(m protoreflect.Message, n *int) (done bool) {
	if *n--; *n < 0 {
		m.SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 1000, protowire.VarintType), 1))
		return true
	}
	for i := 0; i < m.Descriptor().Fields().Len() && !done; i++ {
		f := m.Descriptor().Fields().Get(i)
		switch {
		case !m.Has(f) || f.IsMap():
		case f.Enum() != nil:
			if *n--; *n < 0 {
				m.Set(f, protoreflect.ValueOfEnum(99))
				done = true
			}
		case f.IsList():
			for k := 0; k < m.Get(f).List().Len() && !done; k++ {
				done = spoilNth(m.Get(f).List().Get(k).Message(), n)
			}
		case f.Message() != nil:
			done = spoilNth(m.Mutable(f).Message(), n)
		}
	}
	return done
}

// TestMend does what Check says over a real etcd, as pkg/alloc does over memory.
func TestMend(t *testing.T) {
	alloctest.TestMend(t, func(t *testing.T) alloctest.Planter { return planted{newStore(t, shared.Endpoint())} }, alloctest.OneOfEach())
}
