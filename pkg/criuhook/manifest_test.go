package criuhook

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

const boot = "08bc26e3-0256-4394-b19f-be2f618f0197"

func manifest() *Manifest {
	return &Manifest{
		Format: ManifestFormat, Pool: "f47ac10b-58cc-4372-a567-0e02b2c3d479", Checkpoint: 0x0001_0000_0000_002a, Sandbox: 0x0001_0000_0000_0010,
		Epoch: 1<<48 | 3, RunID: "d7749f40-109f-4054-b3bf-95a31bd7197e", Source: "host-a",
		Namespaces: []ManifestNamespace{
			{Type: alloc.Mnt, Serial: 0x0001_0000_0000_0011, CRIUID: 13, Kernel: alloc.KernelID{BootID: boot, ID: 77, Inode: 4026532250}, Owner: OwnerSandbox},
			{Type: alloc.Net, Serial: 0x0001_0000_0000_0012, CRIUID: 10, Kernel: alloc.KernelID{BootID: boot, ID: 78, Inode: 4026532255}, Owner: OwnerExternal},
			{Type: alloc.User, Serial: 0x0001_0000_0000_0001, CRIUID: 7, Kernel: alloc.KernelID{BootID: boot, Inode: 4026531837, Weak: true}, Owner: OwnerHost},
		},
		Images: sha256.Sum256([]byte("images")),
	}
}

func TestManifestRoundTrip(t *testing.T) {
	want := manifest()
	b, digest, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if digest != sha256.Sum256(b) {
		t.Error("the digest is not of the bytes")
	}
	got, again, err := DecodeManifest(iotest.OneByteReader(bytes.NewReader(b)))
	if err != nil || again != digest || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	// A manifest lies in images for years: its form changes with the format only.
	pinned, err := os.ReadFile("testdata/manifest.json")
	if err != nil || !bytes.Equal(b, pinned) {
		t.Errorf("%v; format %d is now written as\n%s", err, ManifestFormat, b)
	}
}

func TestManifestFields(t *testing.T) {
	for name, change := range map[string]func(m *Manifest){
		"format":              func(m *Manifest) { m.Format = 2 },
		"no pool":             func(m *Manifest) { m.Pool = "" },
		"pool too long":       func(m *Manifest) { m.Pool = strings.Repeat("p", 65) },
		"pool of two lines":   func(m *Manifest) { m.Pool = "a\nb" },
		"no source":           func(m *Manifest) { m.Source = "" },
		"source with a slash": func(m *Manifest) { m.Source = "../x" },
		"run id not a word":   func(m *Manifest) { m.RunID = "\xff" },
		"no checkpoint":       func(m *Manifest) { m.Checkpoint = 0 },
		"checkpoint negative": func(m *Manifest) { m.Checkpoint |= 1 << 63 },
		"no sandbox":          func(m *Manifest) { m.Sandbox = 0 },
		"one serial for two":  func(m *Manifest) { m.Sandbox = m.Checkpoint },
		"no epoch":            func(m *Manifest) { m.Epoch = 0 },
		"no namespaces":       func(m *Manifest) { m.Namespaces = nil },
		"too many namespaces": func(m *Manifest) { m.Namespaces = many(alloc.MaxBindings + 1) },
		"no digest":           func(m *Manifest) { m.Images = alloc.Digest{} },
		"type":                func(m *Manifest) { m.Namespaces[0].Type = "mount" },
		"no serial":           func(m *Manifest) { m.Namespaces[0].Serial = 0 },
		"serial twice":        func(m *Manifest) { m.Namespaces[0].Serial = m.Namespaces[1].Serial },
		"the sandbox's":       func(m *Manifest) { m.Namespaces[0].Serial = m.Sandbox },
		"no CRIU id":          func(m *Manifest) { m.Namespaces[0].CRIUID = 0 },
		"CRIU id twice": func(m *Manifest) {
			m.Namespaces[0].Type, m.Namespaces[0].CRIUID = m.Namespaces[1].Type, m.Namespaces[1].CRIUID
		},
		"no kernel identity": func(m *Manifest) { m.Namespaces[0].Kernel = alloc.KernelID{} },
		"no boot":            func(m *Manifest) { m.Namespaces[0].Kernel.BootID = "" },
		"no id nor inode":    func(m *Manifest) { m.Namespaces[0].Kernel = alloc.KernelID{BootID: boot} },
		"kernel identity twice": func(m *Manifest) {
			m.Namespaces[0].Type, m.Namespaces[0].Kernel = m.Namespaces[1].Type, m.Namespaces[1].Kernel
		},
		"owner": func(m *Manifest) { m.Namespaces[0].Owner = "" },
	} {
		t.Run(name, func(t *testing.T) {
			m := manifest()
			change(m)
			if b, _, err := m.Encode(); err == nil {
				t.Errorf("encoded: %s", b)
			}
		})
	}
	m := manifest()
	m.RunID = "" // CRIU before 4.1
	m.Namespaces = many(alloc.MaxBindings)
	b, digest, err := m.Encode()
	if err != nil {
		t.Fatalf("the largest manifest: %v", err)
	}
	if _, again, err := DecodeManifest(bytes.NewReader(b)); err != nil || again != digest {
		t.Errorf("the largest manifest, %d bytes: %v", len(b), err)
	}
}

// many makes namespaces whose records are as long as they get.
func many(n int) (list []ManifestNamespace) {
	for i := range n {
		list = append(list, ManifestNamespace{
			Type: alloc.Cgroup, Serial: alloc.Serial(1<<48 | 1000 + i), CRIUID: 1<<32 - 1 - uint32(i),
			Kernel: alloc.KernelID{BootID: boot, ID: 1<<64 - 1 - uint64(i), Inode: 1<<32 - 1}, Owner: OwnerExternal,
		})
	}
	return list
}

func TestHostileManifests(t *testing.T) {
	b, _, err := manifest().Encode()
	if err != nil {
		t.Fatal(err)
	}
	good := string(b)
	replace := func(old, with string) string {
		if !strings.Contains(good, old) {
			t.Fatalf("no %s in the manifest", old)
		}
		return strings.Replace(good, old, with, 1)
	}
	for name, text := range map[string]string{
		"empty":              "",
		"null":               "null",
		"cut":                good[:len(good)/2],
		"no newline":         strings.TrimSuffix(good, "\n"),
		"a second value":     good + "{}",
		"a second manifest":  good + good,
		"bytes follow":       good + "\x00",
		"byte order mark":    "\ufeff" + good,
		"unknown field":      replace(`"pool"`, `"color": "red", "pool"`),
		"another format":     replace(`"format": 1`, `"format": 2`),
		"no format":          replace(`"format": 1,`, ""),
		"field twice":        replace(`"epoch": "1.3"`, `"epoch": "1.2", "epoch": "1.3"`),
		"field in capitals":  replace(`"epoch"`, `"Epoch"`),
		"other spacing":      replace(`"format": 1`, `"format":1`),
		"escaped letter":     replace("host-a", `h\u006fst-a`),
		"broken UTF-8":       replace("host-a", "host-\xff"),
		"serial as a number": replace(`"000100000000002a"`, "281474976710698"),
		"serial in capitals": replace(`"000100000000002a"`, `"000100000000002A"`),
		"serial too short":   replace(`"000100000000002a"`, `"2a"`),
		"negative epoch":     replace(`"1.3"`, `"1.-3"`),
		"CRIU id too large":  replace(`"criu_id": 13`, `"criu_id": 4294967296`),
		"CRIU id negative":   replace(`"criu_id": 13`, `"criu_id": -13`),
		"digest too short":   replace(`"images": "`, `"images": "00`),
		"html escape":        replace("host-a", `\u003c`),
	} {
		t.Run(name, func(t *testing.T) {
			if m, _, err := DecodeManifest(strings.NewReader(text)); err == nil {
				t.Errorf("decoded: %+v", m)
			}
		})
	}
	t.Run("huge", func(t *testing.T) {
		r := &endless{}
		if _, _, err := DecodeManifest(r); err == nil || r.read > 2*MaxManifest {
			t.Errorf("%v after %d bytes", err, r.read)
		}
	})
	t.Run("a number without an end", func(t *testing.T) {
		_, _, err := DecodeManifest(strings.NewReader(`{"format":` + strings.Repeat("1", 1<<20) + "}"))
		if err == nil || len(err.Error()) > 300 {
			t.Errorf("refused with %d bytes: %.200v", len(err.Error()), err)
		}
	})
	t.Run("read error", func(t *testing.T) {
		broken := errors.New("disk")
		if _, _, err := DecodeManifest(iotest.ErrReader(broken)); !errors.Is(err, broken) {
			t.Error(err)
		}
	})
}

// TestChangedWhileRead: of a file that changes while it is read come bytes of both. They are refused, or they are
// a manifest; then its digest is of these bytes, and so neither of the two that were written.
func TestChangedWhileRead(t *testing.T) {
	var texts [2]string
	digests := map[alloc.Digest]bool{}
	for i := range texts {
		m := manifest()
		m.Epoch, m.Namespaces = alloc.Epoch(1<<48+i+1), many(5)
		for n := range m.Namespaces {
			m.Namespaces[n].Serial += alloc.Serial(i * 1000)
		}
		b, digest, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		texts[i], digests[digest] = string(b), true
	}
	accepted := 0
	for n := 1; n < len(texts[0]); n++ {
		m, digest, err := DecodeManifest(io.MultiReader(strings.NewReader(texts[0][:n]), strings.NewReader(texts[1][n:])))
		if err != nil {
			continue
		}
		accepted++
		b, _, err := m.Encode()
		mixed := texts[0][:n] + texts[1][n:]
		if err != nil || string(b) != mixed || digest != sha256.Sum256(b) || digests[digest] != (mixed == texts[0] || mixed == texts[1]) {
			t.Fatalf("%d bytes of one and the rest of the other, %v: digest %s", n, err, digest)
		}
	}
	if accepted == 0 {
		t.Error("all were refused: the test shows nothing")
	}
}

type endless struct{ read int }

func (e *endless) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = ' '
	}
	e.read += len(b)
	return len(b), nil
}

// FuzzManifest: what is a manifest is the one text of what it says, and what it says can be relied on.
func FuzzManifest(f *testing.F) {
	b, _, err := manifest().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(bytes.Replace(b, []byte(`"weak"`), []byte(`"Weak"`), 1))
	f.Add(append(bytes.Clone(b), '\n'))
	f.Add([]byte(`{"format":2,"namespaces":{}}`))
	for _, b := range recorded(f, "manifests/*.json") {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, digest, err := DecodeManifest(bytes.NewReader(b))
		if err != nil {
			if m != nil || digest != (alloc.Digest{}) || len(err.Error()) > 2000 {
				t.Errorf("refused with a manifest, %s, or at length: %v", digest, err)
			}
			return
		}
		again, d, err := m.Encode()
		if err != nil || d != digest || digest != sha256.Sum256(b) || !bytes.Equal(again, b) {
			t.Errorf("%s\nbecame\n%s\n%v", b, again, err)
		}
		serials := map[alloc.Serial]bool{m.Checkpoint: true, m.Sandbox: true}
		for _, n := range m.Namespaces {
			serials[n.Serial] = true
			if !n.Serial.Valid() || !n.Type.Valid() || n.Kernel.IsZero() {
				t.Errorf("%+v", n)
			}
		}
		if len(serials) != 2+len(m.Namespaces) || m.Images == (alloc.Digest{}) || m.Pool == "" || m.Epoch == 0 {
			t.Errorf("%+v", m)
		}
	})
}

// recorded reads what real dumps and restores left in testdata.
func recorded(t testing.TB, pattern string) (list [][]byte) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join("testdata", pattern))
	if err != nil || len(names) == 0 {
		t.Fatalf("testdata/%s: %d files, %v", pattern, len(names), err)
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, b)
	}
	return list
}
