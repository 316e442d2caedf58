package alloc

import (
	"encoding/json"
	"strconv"
)

// A registration of 60 sandboxes is 70 kB of JSON, which encoding/json takes as long to write as the rest of
// deciding it takes. So it is written here: byte for byte the same, because servers of the version before
// find the same request by the digest of it.

// body is what json.Marshal makes of cmd.
func (cmd RegisterCommand) body() ([]byte, error) {
	size := 256 // about, to allocate once
	for _, it := range cmd.Items {
		size += 128 + 160*len(it.Add)
	}
	w := bodyWriter{b: make([]byte, 0, size)}
	w.open('{').name("host").text(cmd.Host).name("incarnation").text(cmd.Incarnation.String()).name("spend")
	list(&w, cmd.Spend, func(r Range) {
		w.open('{').name("first").serial(r.First).name("count").number(r.Count).shut('}')
	})
	w.name("items")
	list(&w, cmd.Items, w.item)
	return w.shut('}').b, w.err
}

// bodyWriter appends JSON; err is the first thing that has no form in it.
type bodyWriter struct {
	b   []byte
	err error
}

func (w *bodyWriter) item(it RegisterItem) {
	w.open('{').name("sandbox").serial(it.Sandbox)
	if it.Epoch != 0 {
		w.name("epoch").text(it.Epoch.String())
	}
	if len(it.Add) > 0 {
		w.name("add")
		list(w, it.Add, w.binding)
	}
	w.serials("gone", it.Gone)
	w.serials("part", it.Part)
	if len(it.Labels) > 0 {
		w.name("labels").any(it.Labels)
	}
	if it.OfHost {
		w.name("of_host").any(true)
	}
	if it.ParentCheckpoint != 0 {
		w.name("parent_checkpoint").serial(it.ParentCheckpoint)
	}
	w.shut('}')
}

func (w *bodyWriter) binding(b Binding) {
	w.open('{').name("serial").serial(b.Serial).name("type").text(string(b.Type))
	if !b.Kernel.IsZero() {
		w.name("kernel").open('{').name("boot_id").text(b.Kernel.BootID)
		if b.Kernel.ID != 0 {
			w.name("id").number(b.Kernel.ID)
		}
		w.name("inode").number(b.Kernel.Inode)
		if b.Kernel.Weak {
			w.name("weak").any(true)
		}
		w.shut('}')
	}
	if b.Parent != 0 {
		w.name("parent").serial(b.Parent)
	}
	if !b.Bound.IsZero() {
		w.name("bound").any(b.Bound)
	}
	if !b.Gone.IsZero() {
		w.name("gone").any(b.Gone)
	}
	w.shut('}')
}

func (w *bodyWriter) serials(name string, s []Serial) {
	if len(s) > 0 {
		w.name(name)
		list(w, s, func(s Serial) { w.serial(s) })
	}
}

func list[E any](w *bodyWriter, of []E, write func(E)) {
	if of == nil {
		w.b = append(w.b, "null"...)
		return
	}
	w.open('[')
	for i, e := range of {
		if i > 0 {
			w.b = append(w.b, ',')
		}
		write(e)
	}
	w.shut(']')
}

func (w *bodyWriter) open(c byte) *bodyWriter { w.b = append(w.b, c); return w }
func (w *bodyWriter) shut(c byte) *bodyWriter { w.b = append(w.b, c); return w }

// name begins a field.
func (w *bodyWriter) name(n string) *bodyWriter {
	if w.b[len(w.b)-1] != '{' {
		w.b = append(w.b, ',')
	}
	w.b = append(append(append(w.b, '"'), n...), '"', ':')
	return w
}

func (w *bodyWriter) number(n uint64) *bodyWriter {
	w.b = strconv.AppendUint(w.b, n, 10)
	return w
}

func (w *bodyWriter) serial(s Serial) *bodyWriter {
	w.b = append(s.append(append(w.b, '"')), '"')
	return w
}

func (w *bodyWriter) text(s string) *bodyWriter {
	for _, c := range []byte(s) {
		if !('0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '-' || c == '.' || c == '_') {
			return w.any(s) // which knows what to escape
		}
	}
	w.b = append(append(append(w.b, '"'), s...), '"')
	return w
}

func (w *bodyWriter) any(v any) *bodyWriter {
	b, err := json.Marshal(v)
	if err != nil && w.err == nil {
		w.err = err
	}
	w.b = append(w.b, b...)
	return w
}
