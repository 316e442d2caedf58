package agent

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
	"github.com/nsalloc/nsalloc/pkg/criuhook/images"
)

// forgery is the text of a manifest that is not the genuine one, and why it has to be refused.
type forgery struct {
	name   string
	text   []byte
	reason string
}

// reasons are what is said when a field of the manifest is another one, by the field's name. A field that is
// missing here is new: somebody has to think of what its change means.
var reasons = map[string]string{
	"Format":     "manifest: format 2, this version reads 1",
	"Pool":       "the images are of pool",
	"Checkpoint": "the pool has no such checkpoint",
	"Sandbox":    "(it says sandbox",
	"Epoch":      "(it says epoch",
	"RunID":      "(it says run id",
	"Source":     "(it says source host",
	"Namespaces": "(its list of namespaces was changed",
	"Images":     "is of other images than those that it stands in",
}

// forge makes every manifest that differs from m in one field, however deep, as somebody would who knows the
// format: it is valid wherever the field leaves that open, in its one form, and of these very images. What
// they cannot have is its digest in the pool.
func forge(t *testing.T, m *criuhook.Manifest) (list []forgery) {
	t.Helper()
	typ := reflect.TypeFor[criuhook.Manifest]()
	for i := range typ.NumField() {
		field := typ.Field(i).Name
		reason, ok := reasons[field]
		if !ok {
			t.Errorf("nobody said what is refused when %s is changed", field)
		}
		for _, path := range leaves(reflect.ValueOf(m).Elem().Field(i), field) {
			text, ok := change(t, m, path)
			if !ok {
				t.Errorf("%s: found no other value", path)
				continue
			}
			list = append(list, forgery{path, text, reason})
		}
	}
	return append(list, forgeLists(t, m)...)
}

// leaves are the paths of the values in v that hold no others, as Namespaces.2.Kernel.ID.
func leaves(v reflect.Value, path string) (list []string) {
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			list = append(list, leaves(v.Field(i), path+"."+v.Type().Field(i).Name)...)
		}
	case reflect.Slice:
		for _, i := range ends(v.Len()) {
			list = append(list, leaves(v.Index(i), fmt.Sprintf("%s.%d", path, i))...)
		}
	default:
		list = append(list, path)
	}
	return list
}

// ends are the first and the last of n: the entries between are no others.
func ends(n int) []int { return []int{0, n - 1} }

// change returns a manifest in which the value at a path is another one: the first of several that makes a
// valid manifest, else any.
func change(t *testing.T, m *criuhook.Manifest, path string) ([]byte, bool) {
	t.Helper()
	var invalid []byte
	for i := range 16 {
		c := copyOf(t, m)
		v := reflect.ValueOf(c).Elem()
		for part := range strings.SplitSeq(path, ".") {
			if v.Kind() == reflect.Slice {
				v = v.Index(int(part[0] - '0'))
			} else {
				v = v.FieldByName(part)
			}
		}
		was := fmt.Sprint(v.Interface())
		if other(t, v, i); fmt.Sprint(v.Interface()) == was {
			continue
		}
		if b, _, err := c.Encode(); err == nil {
			return b, true
		}
		b, err := json.MarshalIndent(c, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		if invalid == nil {
			invalid = append(b, '\n')
		}
	}
	return invalid, invalid != nil
}

// other sets v to its i-th other value.
func other(t *testing.T, v reflect.Value, i int) {
	t.Helper()
	switch x := v.Interface().(type) {
	case alloc.NamespaceType:
		types := alloc.NamespaceTypes()
		v.SetString(string(types[i%len(types)]))
		return
	case criuhook.NamespaceOwner:
		owners := []criuhook.NamespaceOwner{criuhook.OwnerSandbox, criuhook.OwnerHost, criuhook.OwnerExternal}
		v.SetString(string(owners[i%len(owners)]))
		return
	case alloc.Digest:
		x[i] ^= 1
		v.Set(reflect.ValueOf(x))
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(v.String() + string(rune('a'+i)))
		if len(v.String()) > 36 { // a UUID stays one
			v.SetString(v.String()[1:])
		}
	case reflect.Int:
		v.SetInt(v.Int() + int64(i) + 1)
	case reflect.Uint32, reflect.Uint64:
		v.SetUint(v.Uint() + uint64(i)*1000 + 1)
	case reflect.Bool:
		v.SetBool(!v.Bool())
	default:
		t.Fatalf("teach other about %s", v.Type())
	}
}

// forgeLists changes the list of namespaces, and the text.
func forgeLists(t *testing.T, m *criuhook.Manifest) (list []forgery) {
	t.Helper()
	add := func(name, reason string, change func(c *criuhook.Manifest)) {
		c := copyOf(t, m)
		change(c)
		b, _, err := c.Encode()
		if err != nil {
			if b, err = json.MarshalIndent(c, "", "  "); err != nil {
				t.Fatal(err)
			}
			b = append(b, '\n')
		}
		list = append(list, forgery{name, b, reason})
	}
	changed := reasons["Namespaces"]
	for _, i := range ends(len(m.Namespaces)) {
		name, n := fmt.Sprintf("namespace %d ", i), m.Namespaces[i]
		add(name+"taken away", changed, func(c *criuhook.Manifest) { c.Namespaces = slices.Delete(c.Namespaces, i, i+1) })
		add(name+"twice", "stands twice", func(c *criuhook.Manifest) { c.Namespaces = append(c.Namespaces, n) })
		if i > 0 {
			add(name+"first", changed, func(c *criuhook.Manifest) { c.Namespaces[0], c.Namespaces[i] = c.Namespaces[i], c.Namespaces[0] })
			add(name+"has the serial of the first", changed, func(c *criuhook.Manifest) {
				c.Namespaces[0].Serial, c.Namespaces[i].Serial = c.Namespaces[i].Serial, c.Namespaces[0].Serial
			})
		}
	}
	add("a namespace more", changed, func(c *criuhook.Manifest) {
		n := c.Namespaces[0]
		n.Serial, n.CRIUID, n.Kernel.ID = n.Serial+5000, n.CRIUID+5000, n.Kernel.ID+5000
		c.Namespaces = append(c.Namespaces, n)
	})
	add("no namespaces", "0 namespaces, 1 to", func(c *criuhook.Manifest) { c.Namespaces = nil })
	b, _, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for _, f := range []struct{ name, text, reason string }{
		{"empty", "", "not the JSON of a manifest"},
		{"cut", text[:len(text)/2], "not the JSON of a manifest"},
		{"two", text + text, "not the JSON of a manifest"},
		{"a field more", strings.Replace(text, `"pool"`, `"color": "red", "pool"`, 1), "not in the form in which nsalloc writes it"},
		{"a field twice", strings.Replace(text, `"epoch"`, `"epoch": "1.1", "epoch"`, 1), "not in the form in which nsalloc writes it"},
		{"a field in capitals", strings.Replace(text, `"epoch"`, `"EPOCH"`, 1), "not in the form in which nsalloc writes it"},
		{"a space more", text + " ", "not in the form in which nsalloc writes it"},
	} {
		list = append(list, forgery{f.name, []byte(f.text), f.reason})
	}
	return list
}

func copyOf(t *testing.T, m *criuhook.Manifest) *criuhook.Manifest {
	t.Helper()
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	c := new(criuhook.Manifest)
	if err := json.Unmarshal(b, c); err != nil {
		t.Fatal(err)
	}
	return c
}

// manifestIn reads the manifest of images.
func manifestIn(t *testing.T, dir string) *criuhook.Manifest {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, criuhook.ManifestName))
	if err != nil {
		t.Fatal(err)
	}
	m, _, err := criuhook.DecodeManifest(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// recompute makes a manifest that is of the images in a directory, as they are now.
func recompute(t *testing.T, m *criuhook.Manifest, dir string) []byte {
	t.Helper()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	set, err := images.Read(d)
	if err != nil {
		t.Fatal(err)
	}
	c := copyOf(t, m)
	c.Images = set.Digest
	b, _, err := c.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}
