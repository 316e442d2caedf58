package alloc

import (
	"fmt"
	"strconv"
	"strings"
)

// Serial is the number of one namespace instance, sandbox or checkpoint, for ever:
//
//	generation (15 bits) << 48 | counter (48 bits)
//
// Both parts start at 1. 0 and values from 2^63 on are never issued, so 0 stands for "none" and a
// serial fits a signed 64-bit integer.
type Serial uint64

// Generation is the upper part of a serial: it is raised when the store may have lost history.
type Generation uint16

// Limits of the two parts of a serial.
const (
	counterBits = 48
	// MaxCounter is the last counter of a generation.
	MaxCounter uint64 = 1<<counterBits - 1
	// MaxGeneration is the last generation of a pool.
	MaxGeneration Generation = 1<<15 - 1
)

// NewSerial puts a serial together. It refuses a generation or a counter that is 0 or too large.
func NewSerial(g Generation, counter uint64) (Serial, error) {
	if g == 0 || g > MaxGeneration {
		return 0, invalid("serial", fmt.Sprintf("generation %d is not in 1..%d", g, MaxGeneration))
	}
	if counter == 0 || counter > MaxCounter {
		return 0, invalid("serial", fmt.Sprintf("counter %d is not in 1..%d", counter, MaxCounter))
	}
	return Serial(uint64(g)<<counterBits | counter), nil
}

// Generation is the serial's upper part.
func (s Serial) Generation() Generation { return Generation(uint64(s) >> counterBits) }

// Counter is the serial's lower part.
func (s Serial) Counter() uint64 { return uint64(s) & MaxCounter }

// Valid reports whether s can have been issued: both parts in range.
func (s Serial) Valid() bool {
	return s.Counter() != 0 && s.Generation() != 0 && uint64(s)>>63 == 0
}

// String is the one form in which a serial is written: 16 lower-case hex digits.
func (s Serial) String() string { return string(s.append(make([]byte, 0, 16))) }

func (s Serial) append(b []byte) []byte {
	for shift := 60; shift >= 0; shift -= 4 {
		b = append(b, "0123456789abcdef"[s>>shift&15])
	}
	return b
}

// MarshalText writes the 16 digits. In JSON that is a string, because 2^53 would cut a number.
func (s Serial) MarshalText() ([]byte, error) { return s.append(make([]byte, 0, 16)), nil }

// UnmarshalText reads the 16 digits; the shorter forms of ParseSerial need a generation and are
// refused here. 0000000000000000 reads as the zero Serial, "none".
func (s *Serial) UnmarshalText(text []byte) error {
	if len(text) != 16 {
		return invalid("serial", fmt.Sprintf("%.80q is not 16 hex digits", text))
	}
	v, err := strconv.ParseUint(string(text), 16, 64)
	if err != nil {
		return invalid("serial", fmt.Sprintf("%.80q is not 16 hex digits", text))
	}
	if v != 0 && !Serial(v).Valid() {
		return invalid("serial", fmt.Sprintf("%q is out of range: generation and counter start at 1, the first bit is 0", text))
	}
	*s = Serial(v)
	return nil
}

// ParseSerial reads a serial as a person writes it, in hex: 16 digits; GEN:COUNTER; or a bare
// counter of generation current, with 12 digits at most, so that a full serial that lost a digit is not
// read as another one. Upper-case digits are taken.
func ParseSerial(text string, current Generation) (Serial, error) {
	bad := func(why string) (Serial, error) {
		return 0, invalid("serial", fmt.Sprintf("%.80q %s; write 16 hex digits, GEN:COUNTER, or a counter of the current generation, all in hex", text, why))
	}
	gen, counter := uint64(current), text
	if before, after, ok := strings.Cut(text, ":"); ok {
		v, err := parseHex(before, 4)
		if err != nil {
			return bad("has a generation that is not up to 4 hex digits")
		}
		gen, counter = v, after
	} else if len(text) == 16 {
		v, err := parseHex(text, 16)
		if err != nil {
			return bad("is not hex")
		}
		if !Serial(v).Valid() {
			return bad("is out of range: generation and counter start at 1, the first bit is 0")
		}
		return Serial(v), nil
	}
	c, err := parseHex(counter, 12)
	if err != nil {
		return bad("is not hex, or too long")
	}
	if gen == 0 || gen > uint64(MaxGeneration) || c == 0 || c > MaxCounter {
		return bad("is out of range: generation 1..7fff, counter 1..ffffffffffff")
	}
	return NewSerial(Generation(gen), c)
}

// parseHex reads 1 to most hex digits and nothing else: no sign, no prefix, no underscore.
func parseHex(text string, most int) (uint64, error) {
	if len(text) == 0 || len(text) > most {
		return 0, strconv.ErrSyntax
	}
	for _, c := range []byte(text) {
		if !('0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F') {
			return 0, strconv.ErrSyntax
		}
	}
	return strconv.ParseUint(text, 16, 64)
}

// counted is the shape of the numbers that only grow and must never repeat after the store lost
// history: they carry the generation on top, as serials do.
func counted(g Generation, n uint64) uint64 { return uint64(g)<<counterBits | n }

func formatCounted(v uint64) string {
	return fmt.Sprintf("%d.%d", v>>counterBits, v&MaxCounter)
}

func parseCounted(what, text string) (uint64, error) {
	before, after, ok := strings.Cut(text, ".")
	g, err1 := strconv.ParseUint(before, 10, 15)
	n, err2 := strconv.ParseUint(after, 10, counterBits)
	if !ok || err1 != nil || err2 != nil || (g == 0) != (n == 0) {
		return 0, invalid(what, fmt.Sprintf("%.80q is not GENERATION.NUMBER in decimal, such as 1.3", text))
	}
	return counted(Generation(g), n), nil
}

// Epoch counts the owners of a sandbox and is its fencing token: every claim and every fence raises
// it and nothing lowers it. It carries the generation in which it was raised, in the layout of a
// serial, so that it does not repeat when the store forgets. It prints as GENERATION.NUMBER.
type Epoch uint64

// String is GENERATION.NUMBER in decimal.
func (e Epoch) String() string { return formatCounted(uint64(e)) }

// MarshalText writes GENERATION.NUMBER.
func (e Epoch) MarshalText() ([]byte, error) { return []byte(e.String()), nil }

// UnmarshalText reads GENERATION.NUMBER.
func (e *Epoch) UnmarshalText(text []byte) error {
	v, err := parseCounted("epoch", string(text))
	*e = Epoch(v)
	return err
}

// Generation is the one in which the epoch was raised.
func (e Epoch) Generation() Generation { return Generation(e >> counterBits) }

// next is the epoch after e in generation g.
func (e Epoch) next(g Generation) Epoch { return Epoch(nextCounted(uint64(e), g)) }

// Incarnation counts the lives of a host's agent state and is the host's fencing token. It has the
// layout of an Epoch.
type Incarnation uint64

// String is GENERATION.NUMBER in decimal.
func (i Incarnation) String() string { return formatCounted(uint64(i)) }

// MarshalText writes GENERATION.NUMBER.
func (i Incarnation) MarshalText() ([]byte, error) { return []byte(i.String()), nil }

// UnmarshalText reads GENERATION.NUMBER.
func (i *Incarnation) UnmarshalText(text []byte) error {
	v, err := parseCounted("incarnation", string(text))
	*i = Incarnation(v)
	return err
}

func (i Incarnation) next(g Generation) Incarnation {
	return Incarnation(nextCounted(uint64(i), g))
}

// nextCounted raises v within generation g, or starts g: always more than v, because a generation
// never goes back.
func nextCounted(v uint64, g Generation) uint64 {
	if Generation(v>>counterBits) >= g {
		return v + 1
	}
	return counted(g, 1)
}
