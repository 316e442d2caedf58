package agent

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// stateFormat is the format of every file that this release writes.
	stateFormat = 1
	// oldestFormat is the oldest that it reads: the format of the release before, or its own.
	oldestFormat = 1
	// maxStateFile bounds what is read back, in bytes.
	maxStateFile = 4 << 20
	stateMagic   = "nsalloc-agent "
)

// damage is a file of the state directory that no agent left so, whatever it died of.
type damage struct{ path, what string }

func (d *damage) Error() string { return fmt.Sprintf("state %s: %s", d.path, d.what) }

// newerState is a sound file of a release to come.
type newerState struct {
	path   string
	format int
}

func (n *newerState) Error() string {
	return fmt.Sprintf("state %s: it has format %d, this agent reads up to %d; run the agent that wrote it, or a newer one; to go on with this one all the same, run `mv %s %s.newer` and start the agent again: what it held counts as lost", n.path, n.format, stateFormat, n.path, n.path)
}

// unknown are the fields of a file that this release has no name for, as they stood in it.
type unknown map[string]json.RawMessage

// seal makes a file of a body: a line with format and checksum, the body, and a newline. That line looks
// the same in all formats, and the checksum covers the format too: so a file of a newer one is told from
// one whose format was hit by what damaged it.
func seal(format int, body []byte) []byte {
	return fmt.Appendf(nil, "%s%d %x\n%s\n", stateMagic, format, sumOf(format, body), body)
}

func sumOf(format int, body []byte) []byte {
	h := sha256.New()
	fmt.Fprintf(h, "%s%d\n", stateMagic, format)
	h.Write(body)
	return h.Sum(nil)
}

// unseal is the body of a file, byte for byte as it was sealed, and its format.
func unseal(data []byte) (format int, body []byte, err error) {
	header, body, ok := bytes.Cut(data, []byte("\n"))
	number, _, _ := strings.Cut(strings.TrimPrefix(string(header), stateMagic), " ")
	format, numErr := strconv.Atoi(number)
	switch {
	case len(data) == 0:
		return 0, nil, errors.New("it is empty")
	case !ok || numErr != nil || !strings.HasPrefix(string(header), stateMagic):
		return 0, nil, errors.New("its first line is not ours")
	}
	body, ok = bytes.CutSuffix(body, []byte("\n"))
	if !ok || !bytes.Equal(seal(format, body), data) {
		return 0, nil, errors.New("its checksum does not match: it is cut or changed")
	}
	return format, body, nil
}

// encodeState is v as a file, with the fields that a newer agent had put into it.
func encodeState(v any, kept unknown) ([]byte, error) {
	body, err := json.Marshal(v)
	if err == nil {
		body, err = withKept(body, kept)
	}
	var lines bytes.Buffer
	if err == nil {
		err = json.Indent(&lines, body, "", "  ")
	}
	return seal(stateFormat, lines.Bytes()), err
}

// withKept is a body with the fields that a newer agent had put into it.
func withKept(body []byte, kept unknown) ([]byte, error) {
	if len(kept) == 0 {
		return body, nil
	}
	all := unknown{}
	if err := json.Unmarshal(body, &all); err != nil {
		return nil, err
	}
	for name, value := range kept {
		all[name] = value
	}
	return json.Marshal(all)
}

// decodeState reads a file into v, a pointer to a struct. Its errors are damage and newerState.
func decodeState(path string, data []byte, v any) (unknown, error) {
	format, body, err := unseal(data)
	switch {
	case err != nil:
		return nil, &damage{path, err.Error()}
	case format > stateFormat:
		return nil, &newerState{path, format}
	case format < oldestFormat:
		return nil, &damage{path, fmt.Sprintf("there is no format %d", format)}
	}
	var all unknown
	if err := json.Unmarshal(body, v); err != nil {
		return nil, &damage{path, err.Error()}
	}
	if err := json.Unmarshal(body, &all); err != nil {
		return nil, &damage{path, err.Error()}
	}
	t := reflect.TypeOf(v).Elem()
	for i := range t.NumField() {
		tag, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
		for name := range all {
			if strings.EqualFold(name, tag) { // as encoding/json has it
				delete(all, name)
			}
		}
	}
	return all, nil
}

// readStateFile reads a file that is ours to believe: regular, not a link, of bounded size, and nobody's
// but the agent's. It never waits, whatever stands there. An error that is not damage is the disk's, or
// says that there is nothing.
func readStateFile(path string) ([]byte, error) { return readStateFileOf(path, maxStateFile) }

// readStateFileOf is readStateFile with a bound of its own.
func readStateFileOf(path string, most int64) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENXIO): // a link; a socket
		return nil, &damage{path, "it is not a regular file"}
	case err != nil:
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, &damage{path, "it is not a regular file"}
	case st.Size > most:
		return nil, &damage{path, fmt.Sprintf("it has %d bytes, more than an agent writes", st.Size)}
	case int(st.Uid) != os.Geteuid():
		return nil, &damage{path, fmt.Sprintf("it belongs to user %d, not to the agent's", st.Uid)}
	case st.Mode&0o022 != 0:
		return nil, &damage{path, fmt.Sprintf("others than its owner may write it (%#o)", st.Mode&0o777)}
	}
	return io.ReadAll(io.LimitReader(f, most))
}
