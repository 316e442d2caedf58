package agent

import (
	"crypto/rand"
	"encoding/hex"
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

// identity is what makes this agent's state one life of its host.
type identity struct {
	Host string `json:"host"`
	// Nonce is drawn when the state is made: the pool tells lives apart by it.
	Nonce string `json:"nonce"`
	// Pool and Incarnation are what the first Hello answered; empty before.
	Pool        string            `json:"pool,omitempty"`
	Incarnation alloc.Incarnation `json:"incarnation"`
}

const (
	identityFile = "identity"
	lockFile     = "lock"
	runsDir      = "runs"
	runSuffix    = ".run"
	// damagedSuffix is added to the name of a record that is lost.
	damagedSuffix = ".damaged"
)

// stateDir is the agent's disk; the package comment says what is on it and what damage to it does.
type stateDir struct {
	path string
	lock *os.File
	// id is the identity as it is on disk, kept what a newer agent had put beside it; by the registrar's
	// holder once the agent runs.
	id   identity
	kept unknown
	// keptLedger is what a newer agent had put into the ledger; by the registrar's holder.
	keptLedger unknown
}

// errStateGone says that the directory in use is not the one at its path any more.
var errStateGone = errors.New("it was removed or replaced while the agent used it; start the agent again: it begins a new life of this host and finds its sandboxes in the pool")

// openState opens the state of a host and locks it, or makes it where there is none. What is refused is
// left as it is.
func openState(path, host string) (*stateDir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w; %s", err, mend(err))
	}
	if err := guardState(path); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(path, lockFile), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w; %s", err, mend(err))
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("state directory %s: another agent has it locked: %w; stop that one, or give this one a state directory of its own", path, err)
	}
	s := &stateDir{path: path, lock: lock}
	if err := s.open(host); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// open is openState for the holder of the lock.
func (s *stateDir) open(host string) error {
	runs := filepath.Join(s.path, runsDir)
	_, runsErr := os.Stat(runs)
	if runsErr == nil {
		if err := guardState(runs); err != nil {
			return err
		}
	}
	if err := s.clean(); err != nil {
		return err
	}
	var err error
	s.id, s.kept, err = readIdentity(s.path, host)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		killpoint.At(killpoint.AgentNonceRecording)
		err = s.putIdentity(identity{Host: host, Nonce: newNonce()})
		killpoint.At(killpoint.AgentNonceRecorded)
	case err == nil && errors.Is(runsErr, fs.ErrNotExist):
		err = s.newLife() // somebody took the runs away and left the identity
	}
	if err != nil {
		return err
	}
	if err := os.MkdirAll(runs, 0o700); err != nil {
		return fmt.Errorf("state directory: %w; %s", err, mend(err))
	}
	return syncDir(s.path)
}

// guardState keeps a directory to the agent. Others who may read it are shut out; where others could
// have written, a person has to look: what stands there decides what the agent ends and claims.
func guardState(dir string) error {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return fmt.Errorf("state directory: %w", &os.PathError{Op: "stat", Path: dir, Err: err})
	}
	switch {
	case int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0:
		return fmt.Errorf("state directory %s: others than the agent's user may write it (owner %d, mode %#o); see that nobody put anything there, then run `chown %d %s && chmod 700 %s` and start the agent again", dir, st.Uid, st.Mode&0o7777, os.Geteuid(), dir, dir)
	case st.Mode&0o077 != 0:
		if err := os.Chmod(dir, 0o700); err != nil {
			return fmt.Errorf("state directory: %w; %s", err, mend(err))
		}
	}
	return nil
}

// clean removes what a write that was cut off left behind, and nothing that people put there.
func (s *stateDir) clean() error {
	for _, left := range []string{"." + identityFile + "*", "." + ledgerFile + "*", runsDir + "/.*" + runSuffix + "*"} {
		names, err := filepath.Glob(filepath.Join(s.path, left))
		if err != nil {
			return fmt.Errorf("state directory: %w", err)
		}
		for _, name := range names {
			if info, err := os.Lstat(name); err != nil || !info.Mode().IsRegular() {
				continue
			}
			if err := os.Remove(name); err != nil {
				return fmt.Errorf("state directory: %w; %s", err, mend(err))
			}
		}
	}
	return nil
}

// Close gives the directory to another agent.
func (s *stateDir) Close() { s.lock.Close() }

// held says whether the directory that is locked still is the one at its path.
func (s *stateDir) held() error {
	mine, err := s.lock.Stat()
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	there, err := os.Lstat(filepath.Join(s.path, lockFile))
	if err == nil && !os.SameFile(mine, there) {
		err = fs.ErrNotExist
	}
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("state directory %s: %w", s.path, errStateGone)
	}
	if err != nil {
		return fmt.Errorf("state directory: %w; %s", err, mend(err))
	}
	return nil
}

// whole is held, and that the directory of the runs is still there.
func (s *stateDir) whole() error {
	if err := s.held(); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(s.path, runsDir)); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("state directory %s: %s: %w", s.path, runsDir, errStateGone)
	}
	return nil
}

// readIdentity reads the identity of a host; fs.ErrNotExist when there is none.
func readIdentity(path, host string) (id identity, kept unknown, err error) {
	file := filepath.Join(path, identityFile)
	data, err := readStateFile(file)
	if err == nil {
		kept, err = decodeState(file, data, &id)
	}
	if err == nil && (alloc.ValidateName("host name", id.Host) != nil || len(id.Nonce) != len(newNonce())) {
		err = &damage{file, "it names no host, or no life of it"}
	}
	switch _, damaged := errors.AsType[*damage](err); {
	case damaged:
		// Nothing is lost with it but the right to go on as the same life: that is a person's to give up.
		err = fmt.Errorf("%w; no crash of the agent leaves it so: look at the disk, then run `mv %s %s.damaged` and start the agent again: it begins a new life of this host and finds its sandboxes in the pool", err, file, file)
	case err == nil && id.Host != host:
		err = fmt.Errorf("state directory %s is of host %q, this agent is configured as %q; correct `host` in agent.yaml, or run `mv %s %s.of-%s` and start the agent again: it begins with a state directory of its own", path, id.Host, host, path, path, id.Host)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		if _, newer := errors.AsType[*newerState](err); !newer {
			err = fmt.Errorf("state: %w; %s", err, mend(err))
		}
	}
	return id, kept, err
}

// newLife has the next Hello begin another life of the same host in the same pool.
func (s *stateDir) newLife() error {
	id := s.id
	id.Nonce, id.Incarnation = newNonce(), 0
	killpoint.At(killpoint.AgentLostLifeRecording)
	err := s.putIdentity(id)
	killpoint.At(killpoint.AgentLostLifeRecorded)
	return err
}

// putIdentity makes id durable, and then the one that counts.
func (s *stateDir) putIdentity(id identity) error {
	if err := s.write(identityFile, id, s.kept); err != nil {
		return err
	}
	s.id = id
	return nil
}

func newNonce() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}

// mend says what to do about an error of the disk.
func mend(err error) string {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return "free space, or inodes, on its disk (df, df -i)"
	case errors.Is(err, unix.EROFS):
		return "have it mounted writable again; the kernel's log says why it is not"
	case errors.Is(err, fs.ErrPermission):
		return "it must be writable by the agent, which runs as root"
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, fs.ErrExist), errors.Is(err, unix.EISDIR), errors.Is(err, unix.ELOOP):
		return "move away what stands in its place, and start the agent again"
	}
	return "free or repair the disk; the kernel's log says what ails it"
}

// write replaces a file as a whole. When it returns nil the file is durable; on an error the old one is,
// or, where only the last step failed, perhaps the new one.
func (s *stateDir) write(name string, v any, kept unknown) error {
	data, err := encodeState(v, kept)
	if err != nil {
		return fmt.Errorf("state %s: %w", name, err)
	}
	return s.writeSealed(name, data)
}

// writeSealed is write for what is a file already.
func (s *stateDir) writeSealed(name string, data []byte) error {
	if err := s.held(); err != nil {
		return err
	}
	path := filepath.Join(s.path, name)
	dir := filepath.Dir(path)
	if err := renameio.WriteFile(path, data, 0o600, renameio.WithTempDir(dir)); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("state directory %s: %w", dir, errStateGone)
	} else if err != nil {
		return fmt.Errorf("state %s: %w; %s: nothing was promised on what could not be written", path, err, mend(err))
	}
	// The rename itself is durable only when the directory is.
	return syncDir(dir)
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

func (s *stateDir) remove(name string) error {
	if err := os.Remove(filepath.Join(s.path, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("state: %w", err)
	}
	return nil
}

// runFiles lists the names under which runs are on disk, and those that were put aside. What people put
// beside them is not among either.
func runFiles(path string) (names, aside []runName, err error) {
	entries, err := os.ReadDir(filepath.Join(path, runsDir))
	if err != nil {
		return nil, nil, fmt.Errorf("state: %w; %s", err, mend(err))
	}
	for _, e := range entries {
		base, damaged := strings.CutSuffix(e.Name(), damagedSuffix)
		n, ok := parseRunFile(base)
		switch {
		case ok && damaged:
			aside = append(aside, n)
		case ok:
			names = append(names, n)
		}
	}
	return names, aside, nil
}

// readRun reads one run's record. What the disk cannot read any more is damage, and so is a record that
// its own file does not name: it is another's.
func readRun(path string, n runName) (rec runRecord, err error) {
	file := filepath.Join(path, n.file())
	data, err := readStateFile(file)
	if err == nil {
		rec.kept, err = decodeState(file, data, &rec)
	}
	if err == nil && fileOf(rec) != n.file() {
		err = &damage{file, "it is the record of another run"}
	}
	if errors.Is(err, unix.EIO) {
		err = &damage{file, err.Error()}
	}
	if _, disk := errors.AsType[*fs.PathError](err); disk {
		err = fmt.Errorf("state: %w; %s", err, mend(err))
	}
	return rec, err
}

// putAside makes it durable that a file is lost, such as the record of a run. It is kept for people to look at.
func (s *stateDir) putAside(name string) error {
	file := filepath.Join(s.path, name)
	killpoint.At(killpoint.AgentAsideRenaming)
	err := os.Rename(file, file+damagedSuffix)
	killpoint.At(killpoint.AgentAsideRenamed)
	if err == nil {
		err = syncDir(filepath.Dir(file))
	}
	if err != nil {
		return fmt.Errorf("state: %w; %s", err, mend(err))
	}
	return nil
}

// ExamineState looks at a state directory as an agent of that host would, changes nothing and takes no
// lock. err is why the agent would not start; fs.ErrNotExist when it would begin a new life. lost says
// which records of runs count as lost, and what to do.
func ExamineState(path, host string) (lost []error, err error) {
	if _, _, err := readIdentity(path, host); err != nil {
		return nil, err
	}
	_, _, err = readLedger(path)
	if _, damaged := errors.AsType[*damage](err); damaged {
		lost = append(lost, fmt.Errorf("%w; look at the disk and start the agent, which begins a new life with serials of its own and puts it aside", err))
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	names, aside, err := runFiles(path)
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		_, err := readRun(path, n)
		if _, damaged := errors.AsType[*damage](err); damaged {
			lost = append(lost, fmt.Errorf("%w; look at the disk and start the agent, which goes on without that record and puts it aside", err))
		} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	for _, n := range aside {
		file := filepath.Join(path, n.file()+damagedSuffix)
		lost = append(lost, fmt.Errorf("state %s: the record of a run that was damaged, and that the agent went on without; look at the disk, then run `rm -r %s` once CRIU %d is gone", file, file, n.pid))
	}
	return lost, nil
}
