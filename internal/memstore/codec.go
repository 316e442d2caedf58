package memstore

import (
	"encoding/binary"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// newRecord makes an empty record of a kind, nil for a kind that there is not.
func newRecord(k alloc.Kind) alloc.Record {
	switch k {
	case alloc.KindPool:
		return new(alloc.Pool)
	case alloc.KindCounter:
		return new(alloc.Counter)
	case alloc.KindServer:
		return new(alloc.Server)
	case alloc.KindSlot:
		return new(alloc.Slot)
	case alloc.KindLane:
		return new(alloc.Lane)
	case alloc.KindHost:
		return new(alloc.Host)
	case alloc.KindSandbox:
		return new(alloc.Sandbox)
	case alloc.KindStint:
		return new(alloc.OldStint)
	case alloc.KindCheckpoint:
		return new(alloc.Checkpoint)
	case alloc.KindRequest:
		return new(alloc.Request)
	case alloc.KindAside:
		return new(alloc.Aside)
	}
	return nil
}

func known(k alloc.Kind) bool { return newRecord(k) != nil }

func singleton(k alloc.Kind) bool { return k == alloc.KindPool || k == alloc.KindCounter }

func validKey(k alloc.Key) error {
	if !known(k.Kind) || singleton(k.Kind) != (k.ID == "") {
		return invalid("key "+k.String(), "no record has this key")
	}
	return nil
}

// words are the values of the domain's enumerations; a real store keeps numbers for them.
var words = map[reflect.Type][]string{
	reflect.TypeFor[alloc.PoolState]():       {"open", "recovering"},
	reflect.TypeFor[alloc.Action]():          {"clone", "resume", "adopt", "refuse"},
	reflect.TypeFor[alloc.Unheard]():         {"", "new-generation", "wait"},
	reflect.TypeFor[alloc.SandboxState]():    {"running", "dumped", "in_transit", "claimed", "ended"},
	reflect.TypeFor[alloc.CheckpointState](): {"open", "copy", "void", "consumed"},
	reflect.TypeFor[alloc.NamespaceType]():   {"mnt", "uts", "ipc", "pid", "net", "cgroup", "user", "time"},
	reflect.TypeFor[alloc.StintBegan]():      {"registered", "claimed", "cloned", "registered again"},
	reflect.TypeFor[alloc.StintOver]():       {"", "handed off", "released", "ended", "fenced", "claim fenced", "lost"},
}

var timeType = reflect.TypeFor[time.Time]()

// form is the version of what encode writes. decode takes a higher one for a newer version's.
const form = 1

// encode writes every field of a record in the order of its type, maps by key: equal values, and only
// they, have equal bytes. The first byte is the version of this form.
func encode(rec alloc.Record) (value []byte, err error) {
	if v := reflect.ValueOf(rec); v.Kind() != reflect.Pointer || v.IsNil() || !known(rec.Key().Kind) {
		return nil, invalid("record", fmt.Sprintf("a %T cannot be stored", rec))
	}
	e := encoder{out: []byte{form}}
	e.value(reflect.ValueOf(rec).Elem())
	if e.err != "" {
		return nil, invalid("record "+rec.Key().String(), e.err)
	}
	return e.out, nil
}

type encoder struct {
	out []byte
	err string
}

func (e *encoder) number(n uint64) { e.out = binary.AppendUvarint(e.out, n) }

func (e *encoder) text(s string) {
	if !utf8.ValidString(s) {
		e.err = fmt.Sprintf("%.80q is not UTF-8", s)
	}
	e.number(uint64(len(s)))
	e.out = append(e.out, s...)
}

func (e *encoder) value(v reflect.Value) {
	if of, ok := words[v.Type()]; ok && !slices.Contains(of, v.String()) {
		e.err = fmt.Sprintf("%q is not a %s", v.String(), v.Type())
	}
	if v.Type() == timeType {
		// The zero time is far before 1970; both numbers are as Unix has them.
		t := v.Interface().(time.Time)
		e.out = binary.AppendVarint(e.out, t.Unix())
		e.number(uint64(t.Nanosecond()))
		return
	}
	switch v.Kind() {
	case reflect.String:
		e.text(v.String())
	case reflect.Bool:
		if v.Bool() {
			e.number(1)
		} else {
			e.number(0)
		}
	case reflect.Int:
		e.out = binary.AppendVarint(e.out, v.Int())
	case reflect.Uint16, reflect.Uint64:
		e.number(v.Uint())
	case reflect.Struct:
		for i := range v.NumField() {
			e.value(v.Field(i))
		}
	case reflect.Pointer:
		if v.IsNil() {
			e.number(0)
			return
		}
		e.number(1)
		e.value(v.Elem())
	case reflect.Slice:
		e.number(uint64(v.Len()))
		fallthrough
	case reflect.Array:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			e.out = append(e.out, v.Bytes()...)
			return
		}
		for i := range v.Len() {
			e.value(v.Index(i))
		}
	case reflect.Map:
		keys := v.MapKeys()
		slices.SortFunc(keys, func(a, b reflect.Value) int { return strings.Compare(a.String(), b.String()) })
		e.number(uint64(len(keys)))
		for _, k := range keys {
			e.value(k)
			e.value(v.MapIndex(k))
		}
	default:
		e.err = fmt.Sprintf("a %s cannot be stored", v.Type())
	}
}

// decode reads what encode wrote. Times come back in UTC, empty slices and maps as nil. Of a sandbox that
// it refuses as a newer version's it tells the owner, if it can.
func decode(k alloc.Key, value []byte) (_ alloc.Record, owner string, _ error) {
	rec := newRecord(k.Kind)
	d := decoder{in: value[1:]}
	d.value(reflect.ValueOf(rec).Elem())
	whole := !d.bad && len(d.in) == 0 && rec.Key() == k
	if value[0] > form {
		if sb, ok := rec.(*alloc.Sandbox); ok && whole && alloc.ValidateName("host name", sb.Owner) == nil {
			owner = sb.Owner
		}
		return nil, owner, &alloc.Error{Reason: alloc.ReasonFormat, Subject: "record " + k.String(), Msg: "a newer version wrote it"}
	}
	if value[0] < form || !whole {
		return nil, "", &alloc.Error{Reason: alloc.ReasonMalformed, Subject: "record " + k.String(), Msg: "it cannot be read"}
	}
	return rec, "", nil
}

type decoder struct {
	in  []byte
	bad bool
}

func (d *decoder) number() uint64 {
	n, size := binary.Uvarint(d.in)
	return n * d.took(size)
}

func (d *decoder) signed() int64 {
	n, size := binary.Varint(d.in)
	return n * int64(d.took(size))
}

// took moves on; it gives 0, and not 1, when there was nothing to take.
func (d *decoder) took(size int) uint64 {
	if size <= 0 {
		d.bad, d.in = true, nil
		return 0
	}
	d.in = d.in[size:]
	return 1
}

// length is a number of things of which each takes a byte at least.
func (d *decoder) length() int {
	n := d.number()
	if n > uint64(len(d.in)) {
		d.bad, d.in, n = true, nil, 0
	}
	return int(n)
}

func (d *decoder) value(v reflect.Value) {
	if v.Type() == timeType {
		sec := d.signed()
		v.Set(reflect.ValueOf(time.Unix(sec, int64(d.number())).UTC()))
		return
	}
	switch v.Kind() {
	case reflect.String:
		n := d.length()
		v.SetString(string(d.in[:n]))
		d.in = d.in[n:]
	case reflect.Bool:
		v.SetBool(d.number() == 1)
	case reflect.Int:
		v.SetInt(d.signed())
	case reflect.Uint16, reflect.Uint64:
		v.SetUint(d.number())
	case reflect.Struct:
		for i := range v.NumField() {
			d.value(v.Field(i))
		}
	case reflect.Pointer:
		if d.number() == 1 {
			v.Set(reflect.New(v.Type().Elem()))
			d.value(v.Elem())
		}
	case reflect.Slice:
		n := d.length()
		if n == 0 {
			return
		}
		v.Set(reflect.MakeSlice(v.Type(), n, n))
		fallthrough
	case reflect.Array:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			n := copy(v.Bytes(), d.in)
			d.bad = d.bad || n < v.Len()
			d.in = d.in[n:]
			return
		}
		for i := range v.Len() {
			d.value(v.Index(i))
		}
	case reflect.Map:
		n := d.length()
		if n == 0 {
			return
		}
		v.Set(reflect.MakeMapWithSize(v.Type(), n))
		for range n {
			k, e := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
			d.value(k)
			d.value(e)
			v.SetMapIndex(k, e)
		}
	}
}
