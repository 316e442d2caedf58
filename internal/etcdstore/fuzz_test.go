package etcdstore

import (
	"bytes"
	"errors"
	"iter"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// kinds are those that have a stored form.
var kinds = []alloc.Kind{alloc.KindPool, alloc.KindCounter, alloc.KindHost, alloc.KindSandbox, alloc.KindStint, alloc.KindCheckpoint, alloc.KindRequest, alloc.KindAside}

// FuzzDecode: whatever stands in the store, decode answers with a record or with one of its two errors. A
// record that was read is written back with everything that was in it, the fields of newer versions
// included, and always with the same bytes.
func FuzzDecode(f *testing.F) {
	for _, rec := range alloctest.Records(f) {
		value, err := encode(rec)
		if err != nil {
			f.Fatal(err)
		}
		kind := uint8(slices.Index(kinds, rec.Key().Kind))
		f.Add(kind, value)
		f.Add(kind, protowire.AppendString(protowire.AppendTag(value, 1000, protowire.BytesType), "of a newer version"))
		f.Add(kind, value[:len(value)/2])
	}
	for kind, value := range recorded(f) {
		f.Add(kind, value)
	}
	f.Fuzz(func(t *testing.T, kind uint8, value []byte) {
		k := kinds[int(kind)%len(kinds)]
		key := keyIn(k, value)
		given := bytes.Clone(value)
		rec, err := decode(key, value)
		if !bytes.Equal(given, value) {
			t.Fatal("decode changed the value")
		}
		if err != nil {
			if !errors.Is(err, alloc.ErrMalformed) && !errors.Is(err, alloc.ErrFormat) {
				t.Errorf("%v", err)
			}
			return
		}
		if _, err := decode(alloc.Key{Kind: k, ID: key.ID + "x"}, value); !errors.Is(err, alloc.ErrMalformed) {
			t.Errorf("under another key: %v", err)
		}
		if rec.Key() != key {
			t.Fatalf("decoded %s under %s", rec.Key(), key)
		}
		written, err := encode(rec)
		if err != nil {
			t.Fatalf("a record that was read cannot be written: %v", err)
		}
		was, is := newMessage(key.Kind), newMessage(key.Kind)
		if err := errors.Join(proto.Unmarshal(value, was), proto.Unmarshal(written, is)); err != nil {
			t.Fatal(err)
		}
		prune(was.ProtoReflect())
		if !proto.Equal(was, is) {
			t.Errorf("read\n%v\nwritten\n%v", was, is)
		}
		again, err := decode(key, written)
		if err != nil || !reflect.DeepEqual(again, rec) {
			t.Fatalf("written and read again, %+v became %+v: %v", rec, again, err)
		}
		if twice, err := encode(again); err != nil || !bytes.Equal(twice, written) {
			t.Errorf("two values of one record, %v:\n%x\n%x", err, written, twice)
		}
	})
}

// keyIn is the key that the record in a value would stand under.
func keyIn(kind alloc.Kind, value []byte) alloc.Key {
	m := newMessage(kind)
	if proto.Unmarshal(value, m) != nil {
		return alloc.Key{Kind: kind, ID: "x"}
	}
	return new(decoder).record(m).Key()
}

// recorded yields what real hand-offs left in a store; see testdata/README.md.
func recorded(t testing.TB) iter.Seq2[uint8, []byte] {
	t.Helper()
	names, err := filepath.Glob("testdata/values/*")
	if err != nil || len(names) == 0 {
		t.Fatal(len(names), err)
	}
	return func(yield func(uint8, []byte) bool) {
		for _, name := range names {
			kind, _, _ := strings.Cut(filepath.Base(name), "-")
			value, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if !yield(uint8(slices.Index(kinds, alloc.Kind(kind))), value) {
				return
			}
		}
	}
}

// TestRecorded: values of format 1 are read, and written back byte for byte.
func TestRecorded(t *testing.T) {
	for kind, value := range recorded(t) {
		rec, err := decode(keyIn(kinds[kind], value), value)
		if err != nil {
			t.Error(err)
			continue
		}
		if again, err := encode(rec); err != nil || !bytes.Equal(again, value) {
			t.Errorf("%s, %v:\n%x\nwritten back\n%x", rec.Key(), err, value, again)
		}
	}
}

// prune removes what says nothing, where the domain has one word for that and for nothing at all: an
// identity in which nothing stands, and the time that is no time.
func prune(m protoreflect.Message) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsMap() || f.Message() == nil:
		case f.IsList():
			for i := range v.List().Len() {
				prune(v.List().Get(i).Message())
			}
		default:
			prune(v.Message())
			ts, isTime := v.Message().Interface().(*timestamppb.Timestamp)
			if f.Message().Name() == "KernelID" && proto.Size(v.Message().Interface()) == 0 || isTime && ts.AsTime().IsZero() {
				m.Clear(f)
			}
		}
		return true
	})
}
