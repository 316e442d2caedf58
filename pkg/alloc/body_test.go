package alloc_test

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// TestRegisterBody: what a registration's digest is of is JSON, byte for byte, so that servers of another
// version find the same request by it.
func TestRegisterBody(t *testing.T) {
	for of, fields := range map[reflect.Type]int{
		reflect.TypeFor[alloc.RegisterCommand](): 3, reflect.TypeFor[alloc.Mutation](): 3, reflect.TypeFor[alloc.RegisterItem](): 8,
		reflect.TypeFor[alloc.Range](): 2, reflect.TypeFor[alloc.Binding](): 7, reflect.TypeFor[alloc.KernelID](): 4,
	} {
		if of.NumField() != fields {
			t.Errorf("%s has %d fields: a new one belongs into body.go and into what is drawn here", of, of.NumField())
		}
	}
	text := rapid.OneOf(rapid.StringMatching(`[-a-z0-9._]{0,12}`), rapid.String(), rapid.Map(rapid.SliceOfN(rapid.Byte(), 0, 6), func(b []byte) string { return string(b) }))
	number := rapid.OneOf(rapid.Just(uint64(0)), rapid.Uint64())
	serial := rapid.Map(number, func(n uint64) alloc.Serial { return alloc.Serial(n) })
	when := rapid.SampledFrom([]time.Time{{}, time.Unix(1, 5).UTC(), time.Unix(0, 0), time.Unix(1<<40, 0)})
	binding := rapid.Custom(func(t *rapid.T) alloc.Binding {
		b := alloc.Binding{Serial: serial.Draw(t, "serial"), Type: alloc.NamespaceType(text.Draw(t, "type")), Parent: serial.Draw(t, "parent"),
			Bound: when.Draw(t, "bound"), Gone: when.Draw(t, "gone"), Extra: []byte("x")}
		if rapid.Bool().Draw(t, "known") {
			b.Kernel = alloc.KernelID{BootID: text.Draw(t, "boot"), ID: number.Draw(t, "id"), Inode: number.Draw(t, "inode"), Weak: rapid.Bool().Draw(t, "weak")}
		}
		return b
	})
	item := rapid.Custom(func(t *rapid.T) alloc.RegisterItem {
		return alloc.RegisterItem{
			Sandbox: serial.Draw(t, "sandbox"), Epoch: alloc.Epoch(number.Draw(t, "epoch")), Add: orNil(t, binding), Gone: orNil(t, serial), Part: orNil(t, serial),
			Labels: rapid.MapOfN(text, text, 0, 3).Draw(t, "labels"), OfHost: rapid.Bool().Draw(t, "of host"), ParentCheckpoint: serial.Draw(t, "parent"),
		}
	})
	ranges := rapid.Custom(func(t *rapid.T) alloc.Range {
		return alloc.Range{First: serial.Draw(t, "first"), Count: number.Draw(t, "count")}
	})
	rapid.Check(t, func(t *rapid.T) {
		cmd := alloc.RegisterCommand{
			Mutation: alloc.Mutation{RequestID: text.Draw(t, "id"), Host: text.Draw(t, "host"), Incarnation: alloc.Incarnation(number.Draw(t, "incarnation"))},
			Spend:    orNil(t, ranges), Items: orNil(t, item),
		}
		want, wantErr := json.Marshal(cmd)
		got, err := alloc.RegisterBody(cmd)
		if (err != nil) != (wantErr != nil) {
			t.Fatalf("%v, json says %v", err, wantErr)
		}
		if err == nil && string(got) != string(want) {
			t.Fatalf("%s\nwant\n%s", got, want)
		}
	})
}

// orNil draws nil, an empty list, or a short one.
func orNil[E any](t *rapid.T, of *rapid.Generator[E]) []E {
	if rapid.Bool().Draw(t, "nil") {
		return nil
	}
	return rapid.SliceOfN(of, 0, 3).Draw(t, "list")
}
