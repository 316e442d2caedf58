package agent

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/internal/killpoint"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// stateFormat is the format of every file in the state directory.
const stateFormat = 1

// maxStateFile bounds what is read back.
const maxStateFile = 4 << 20

// identity is what makes this agent's state one life of its host.
type identity struct {
	Host string `json:"host"`
	// Nonce is drawn when the state is made: the pool tells lives apart by it.
	Nonce string `json:"nonce"`
	// Pool and Incarnation are what the first Hello answered; empty before.
	Pool        string            `json:"pool,omitempty"`
	Incarnation alloc.Incarnation `json:"incarnation"`
}

// stateDir is the agent's disk: `identity`, and one file a CRIU run under runs/. Each file is one line
// of header with format and SHA-256, then JSON. A file is replaced as a whole and made durable, with
// its directory, before the write returns: after a crash it is the old one or the new one. A file that
// is neither is refused and left as it is.
type stateDir struct {
	path string
	lock *os.File
}

func openState(path, host string) (*stateDir, error) {
	if err := os.MkdirAll(filepath.Join(path, "runs"), 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w; it must be writable by root", err)
	}
	lock, err := os.OpenFile(filepath.Join(path, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("state directory %s: another agent has it locked: %w; stop that one, or give this one a state directory of its own", path, err)
	}
	s := &stateDir{path: path, lock: lock}
	if err := s.clean(); err != nil {
		s.Close()
		return nil, err
	}
	id, err := s.identity()
	if err == nil && id.Host != host {
		err = fmt.Errorf("state directory %s is of host %q, this agent is configured as %q; give each host a state directory of its own, or correct `host` in agent.yaml", path, id.Host, host)
	}
	if errors.Is(err, fs.ErrNotExist) {
		killpoint.At(killpoint.AgentNonceRecording)
		err = s.putIdentity(identity{Host: host, Nonce: newNonce()})
		killpoint.At(killpoint.AgentNonceRecorded)
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// clean removes what a write that was cut off left behind.
func (s *stateDir) clean() error {
	for _, dir := range []string{s.path, filepath.Join(s.path, "runs")} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return fmt.Errorf("state directory: %w", err)
		}
		for _, e := range entries {
			if e.Type().IsRegular() && strings.HasPrefix(e.Name(), ".") {
				if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
					return fmt.Errorf("state directory: %w", err)
				}
			}
		}
	}
	return nil
}

// Close gives the directory to another agent.
func (s *stateDir) Close() { s.lock.Close() }

func (s *stateDir) identity() (identity, error) {
	var id identity
	err := s.read("identity", &id)
	return id, err
}

// putIdentity makes id durable.
func (s *stateDir) putIdentity(id identity) error { return s.write("identity", id) }

func newNonce() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}

func (s *stateDir) write(name string, v any) error {
	body, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("state %s: %w", name, err)
	}
	path := filepath.Join(s.path, name)
	data := fmt.Appendf(nil, "nsalloc-agent %d %x\n%s\n", stateFormat, sha256.Sum256(body), body)
	if err := renameio.WriteFile(path, data, 0o600, renameio.WithTempDir(filepath.Dir(path))); err != nil {
		return fmt.Errorf("state %s: %w; free or repair the disk, nothing was promised on what could not be written", path, err)
	}
	// The rename itself is durable only when the directory is.
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("state directory %s: %w", path, err)
	}
	return nil
}

func (s *stateDir) read(name string, v any) error {
	path := filepath.Join(s.path, name)
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("state: %w", err)
	}
	if info.Size() > maxStateFile {
		return s.broken(path, fmt.Sprintf("it has %d bytes", info.Size()))
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("state: %w", err)
	}
	header, body, ok := bytes.Cut(data, []byte("\n"))
	var format int
	var sum string
	if n, err := fmt.Sscanf(string(header), "nsalloc-agent %d %64s", &format, &sum); !ok || err != nil || n != 2 {
		return s.broken(path, "its first line is not ours")
	}
	if format < 1 {
		return s.broken(path, fmt.Sprintf("there is no format %d", format))
	}
	if format > stateFormat {
		return fmt.Errorf("state %s: it has format %d, this agent reads up to %d; run the agent that wrote it, or a newer one", path, format, stateFormat)
	}
	body = bytes.TrimSuffix(body, []byte("\n"))
	if want := sha256.Sum256(body); hex.EncodeToString(want[:]) != sum {
		return s.broken(path, "its checksum does not match: it is cut or changed")
	}
	if err := json.Unmarshal(body, v); err != nil {
		return s.broken(path, err.Error())
	}
	return nil
}

// broken says what is wrong with a file that a crash cannot have left like that. Without its identity the
// agent begins a new life; what it does not remember of a CRIU run counts as answered.
func (s *stateDir) broken(path, what string) error {
	return fmt.Errorf("state %s: %s; no crash of the agent leaves it so: look at the disk, then move that file away and start the agent again: it finds its sandboxes in the pool", path, what)
}

func (s *stateDir) remove(name string) error {
	if err := os.Remove(filepath.Join(s.path, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("state: %w", err)
	}
	return nil
}

// runFiles lists the names of the runs on disk, as read and write take them.
func (s *stateDir) runFiles() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.path, "runs"))
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	var names []string
	for _, e := range entries {
		if e.Type().IsRegular() && strings.HasSuffix(e.Name(), ".run") {
			names = append(names, "runs/"+e.Name())
		}
	}
	return names, nil
}
