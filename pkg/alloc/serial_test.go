package alloc_test

import (
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

func TestParseSerial(t *testing.T) {
	for text, want := range map[string]alloc.Serial{
		"0001000000000007":  1<<48 | 7,
		"7fffffffffffffff":  1<<63 - 1,
		"7FFFffffFFFFffff":  1<<63 - 1,
		"0001000000000001":  1<<48 | 1,
		"1:7":               1<<48 | 7,
		"0001:000000000007": 1<<48 | 7,
		"7fff:ffffffffffff": 1<<63 - 1,
		"7":                 3<<48 | 7,
		"ffffffffffff":      3<<48 | (1<<48 - 1),
		"00000000000f":      3<<48 | 15,
	} {
		if got, err := alloc.ParseSerial(text, 3); err != nil || got != want {
			t.Errorf("%q is %s, %v; want %s", text, got, err, want)
		}
	}
	for _, text := range []string{
		"", ":", "1:", ":1", "0", "0:1", "1:0", "0000000000000000", "0000000000000001", "0001000000000000",
		"8000000000000001", "ffffffffffffffff", "8000:1", "1:1000000000000", "1000000000000",
		"00000000000000001", "1:0000000000000001", "00001:1", "1:2:3", "+7", "-7", "0x7", "7_0", " 7", "7 ", "g", "７",
		"1:+1", "+1:1", "000100000000000g", "0001 00000000007", "7\n", "\x00",
	} {
		if got, err := alloc.ParseSerial(text, 3); !errors.Is(err, alloc.ErrInvalid) || got != 0 {
			t.Errorf("%q is %s, %v", text, got, err)
		}
	}
	if _, err := alloc.ParseSerial("7", 0); !errors.Is(err, alloc.ErrInvalid) {
		t.Errorf("a bare counter without a generation: %v", err)
	}
	if _, err := alloc.ParseSerial("7", alloc.MaxGeneration+1); !errors.Is(err, alloc.ErrInvalid) {
		t.Errorf("a bare counter of generation 8000: %v", err)
	}
}

func TestErrorsStayShort(t *testing.T) {
	long := strings.Repeat("x", 1<<20)
	var s alloc.Serial
	var e alloc.Epoch
	_, err := alloc.ParseSerial(long, 1)
	for _, err := range []error{err, s.UnmarshalText([]byte(long)), e.UnmarshalText([]byte(long)), alloc.ValidateName("host", long), alloc.ValidateBootID(long)} {
		if err == nil || len(err.Error()) > 500 {
			t.Errorf("an error of %d bytes about an input of %d", len(fmt.Sprint(err)), len(long))
		}
	}
}

func TestNewSerial(t *testing.T) {
	for _, c := range []struct {
		gen     alloc.Generation
		counter uint64
		ok      bool
	}{
		{1, 1, true}, {alloc.MaxGeneration, alloc.MaxCounter, true},
		{0, 1, false}, {1, 0, false}, {alloc.MaxGeneration + 1, 1, false}, {1, alloc.MaxCounter + 1, false}, {1, 1 << 63, false},
	} {
		s, err := alloc.NewSerial(c.gen, c.counter)
		if (err == nil) != c.ok || s.Valid() != c.ok || c.ok && (s.Generation() != c.gen || s.Counter() != c.counter) {
			t.Errorf("%d, %d: %s, %v", c.gen, c.counter, s, err)
		}
	}
}

func genSerial() *rapid.Generator[alloc.Serial] {
	return rapid.Custom(func(t *rapid.T) alloc.Serial {
		g := rapid.Uint16Range(1, uint16(alloc.MaxGeneration)).Draw(t, "generation")
		return alloc.Serial(uint64(g)<<48 | rapid.Uint64Range(1, alloc.MaxCounter).Draw(t, "counter"))
	})
}

func TestSerialForms(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := genSerial().Draw(t, "serial")
		for _, text := range []string{s.String(), fmt.Sprintf("%x:%x", s.Generation(), s.Counter()), fmt.Sprintf("%X:%X", s.Generation(), s.Counter())} {
			if got, err := alloc.ParseSerial(text, 1); err != nil || got != s {
				t.Errorf("%q is %s, %v; want %s", text, got, err, s)
			}
		}
		if got, err := alloc.ParseSerial(fmt.Sprintf("%x", s.Counter()), s.Generation()); err != nil || got != s {
			t.Errorf("the bare counter of %s is %s, %v", s, got, err)
		}
		b, err := json.Marshal(s)
		var back alloc.Serial
		if err != nil || len(b) != 18 || json.Unmarshal(b, &back) != nil || back != s {
			t.Errorf("%s is %s in JSON, and %s again", s, b, back)
		}
	})
}

func TestSerialText(t *testing.T) {
	var s alloc.Serial = 9
	if err := s.UnmarshalText([]byte("0000000000000000")); err != nil || s != 0 {
		t.Errorf("none is %s, %v", s, err)
	}
	for _, text := range []string{"", "7", "1:7", "0000000000000001", "0001000000000000", "8001000000000001", "+001000000000001", "0x01000000000001"} {
		if err := s.UnmarshalText([]byte(text)); !errors.Is(err, alloc.ErrInvalid) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestEpochText(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := genSerial().Draw(t, "epoch")
		var e alloc.Epoch
		var i alloc.Incarnation
		text, _ := alloc.Epoch(s).MarshalText()
		if want := fmt.Sprintf("%d.%d", s.Generation(), s.Counter()); string(text) != want {
			t.Errorf("%s, want %s", text, want)
		}
		if e.UnmarshalText(text) != nil || uint64(e) != uint64(s) || i.UnmarshalText(text) != nil || uint64(i) != uint64(s) || i.String() != e.String() {
			t.Errorf("%s reads as epoch %s, incarnation %s", text, e, i)
		}
	})
	var e alloc.Epoch
	if err := e.UnmarshalText([]byte("0.0")); err != nil || e != 0 {
		t.Errorf("0.0 is %s, %v", e, err)
	}
	for _, text := range []string{"", ".", "1", "1.", ".1", "0.1", "1.0", "32768.1", "1.281474976710656", "-1.1", "+1.1", "1.1.1", "0x1.1", "1. 1"} {
		if err := e.UnmarshalText([]byte(text)); !errors.Is(err, alloc.ErrInvalid) {
			t.Errorf("%q is %s, %v", text, e, err)
		}
	}
}

func FuzzParseSerial(f *testing.F) {
	for _, text := range []string{"0001000000000007", "1:7", "7", "7fff:ffffffffffff", "", ":", "8000000000000000", "00000000000000000"} {
		f.Add(text, uint16(1))
	}
	f.Fuzz(func(t *testing.T, text string, gen uint16) {
		s, err := alloc.ParseSerial(text, alloc.Generation(gen))
		if err != nil {
			if s != 0 || !errors.Is(err, alloc.ErrInvalid) || len(err.Error()) > 600 {
				t.Errorf("%q: %s, %v", text, s, err)
			}
			return
		}
		if !s.Valid() {
			t.Errorf("%q is %s, which can never have been issued", text, s)
		}
		if again, err := alloc.ParseSerial(s.String(), 1); err != nil || again != s {
			t.Errorf("%q is %s, which reads as %s, %v", text, s, again, err)
		}
		if len(text) != 16 && !strings.Contains(text, ":") && s.Generation() != alloc.Generation(gen) {
			t.Errorf("the bare counter %q is of generation %d, not %d", text, s.Generation(), gen)
		}
		// The number is what the digits say and nothing else, whatever their case.
		digits, want := text, fmt.Sprintf("%x", s.Counter())
		if before, after, ok := strings.Cut(text, ":"); ok {
			digits = after
			if g := strings.TrimLeft(strings.ToLower(before), "0"); g != fmt.Sprintf("%x", s.Generation()) {
				t.Errorf("%q is of generation %x", text, s.Generation())
			}
		} else if len(text) == 16 {
			want = fmt.Sprintf("%x", uint64(s))
		}
		if strings.TrimLeft(strings.ToLower(digits), "0") != want {
			t.Errorf("%q is %s", text, s)
		}
		if other, err := alloc.ParseSerial(strings.ToUpper(text), alloc.Generation(gen)); err != nil || other != s {
			t.Errorf("%q is %s, in capitals %s, %v", text, s, other, err)
		}
	})
}

// FuzzTexts: numbers of the domain as they stand in JSON. What is read is written as a text that reads as
// the same; else the text is refused as invalid.
func FuzzTexts(f *testing.F) {
	for _, text := range []string{"", "0001000000000007", "0000000000000000", "8000000000000000", "1.3", "0.0", "32767.281474976710655", "01.3", strings.Repeat("0f", 32), strings.Repeat("0F", 32)} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if s, ok := checkText[alloc.Serial](t, text); ok && !s.Valid() && s != 0 {
			t.Errorf("serial %q can never have been issued", text)
		}
		checkText[alloc.Epoch](t, text)
		checkText[alloc.Incarnation](t, text)
		if d, ok := checkText[alloc.Digest](t, text); ok && !strings.EqualFold(d.String(), text) {
			t.Errorf("digest %q is %s", text, d)
		}
	})
}

func checkText[T comparable, P interface {
	*T
	encoding.TextMarshaler
	encoding.TextUnmarshaler
}](t *testing.T, text string) (v T, ok bool) {
	t.Helper()
	if err := P(&v).UnmarshalText([]byte(text)); err != nil {
		if !errors.Is(err, alloc.ErrInvalid) || len(err.Error()) > 600 {
			t.Errorf("%T %q: %v", v, text, err)
		}
		return v, false
	}
	var again T
	b, err := P(&v).MarshalText()
	if err == nil {
		err = P(&again).UnmarshalText(b)
	}
	if err != nil || again != v {
		t.Errorf("%T %q is %v, written %q, which reads as %v: %v", v, text, v, b, again, err)
	}
	return v, true
}
