package agent

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// advice is the command that a message tells its reader to run.
var advice = regexp.MustCompile("run `([^`]+)`")

// obey runs the command that an error names, as its reader would.
func obey(t *testing.T, err error) {
	t.Helper()
	m := advice.FindStringSubmatch(err.Error())
	if m == nil {
		t.Fatalf("it names no command: %v", err)
	}
	if out, err := exec.Command("sh", "-ec", m[1]).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", m[1], err, out)
	}
}

// opened opens a state directory; whatever stands in it, that does not hang.
func opened(t *testing.T, path, host string) (*stateDir, error) {
	t.Helper()
	type result struct {
		s   *stateDir
		err error
	}
	done := make(chan result, 1)
	go func() {
		s, err := openState(path, host)
		done <- result{s, err}
	}()
	select {
	case r := <-done:
		return r.s, r.err
	case <-time.After(settledIn):
		t.Fatal("it hangs")
		return nil, nil
	}
}

// newState is a state directory that an agent of host a has left, and its identity.
func newState(t *testing.T) (path string, id identity) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "state")
	s, err := opened(t, path, "a")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if len(s.id.Nonce) != 32 || s.id.Host != "a" {
		t.Fatalf("%+v", s.id)
	}
	return path, s.id
}

// damages are what may stand where a good file stood.
var damages = map[string]struct {
	do     func(path string, good []byte) error
	reason string
}{
	"empty":        {func(p string, _ []byte) error { return os.Truncate(p, 0) }, "it is empty"},
	"cut":          {func(p string, b []byte) error { return os.Truncate(p, int64(len(b)-20)) }, "checksum does not match"},
	"another file": {func(p string, _ []byte) error { return os.WriteFile(p, []byte("hello\nworld\n"), 0o600) }, "first line is not ours"},
	"older": {func(p string, b []byte) error {
		_, body, _ := unseal(b)
		return os.WriteFile(p, seal(0, body), 0o600)
	}, "no format 0"},
	"null": {func(p string, _ []byte) error { return os.WriteFile(p, seal(stateFormat, []byte("null")), 0o600) }, "state"},
	"not JSON": {func(p string, _ []byte) error {
		return os.WriteFile(p, seal(stateFormat, []byte(`{"host":`)), 0o600)
	}, "unexpected end"},
	"huge": {func(p string, _ []byte) error { return os.Truncate(p, 1<<40) }, "more than an agent writes"},
	"writable by others": {func(p string, _ []byte) error {
		return os.Chmod(p, 0o622) //nolint:gosec // that is the point
	}, "others than its owner may write it"},
	"a directory": {func(p string, _ []byte) error { return errors.Join(os.Remove(p), os.Mkdir(p, 0o700)) }, "not a regular file"},
	"a fifo":      {func(p string, _ []byte) error { return errors.Join(os.Remove(p), unix.Mkfifo(p, 0o600)) }, "not a regular file"},
	"a link": {func(p string, _ []byte) error {
		return errors.Join(os.Rename(p, p+".elsewhere"), os.Symlink(p+".elsewhere", p))
	}, "not a regular file"},
	"a link to nothing": {func(p string, _ []byte) error { return errors.Join(os.Remove(p), os.Symlink("/nowhere", p)) }, "not a regular file"},
}

// TestDamagedIdentity: what no agent has left so is refused with a cause and a command, and stays as it is
// until that command is run; then a new life begins.
func TestDamagedIdentity(t *testing.T) {
	for name, c := range damages {
		t.Run(name, func(t *testing.T) {
			path, id := newState(t)
			file := filepath.Join(path, identityFile)
			good, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if err := c.do(file, good); err != nil {
				t.Fatal(err)
			}
			before, err := os.Lstat(file)
			if err != nil {
				t.Fatal(err)
			}
			_, err = opened(t, path, "a")
			if err == nil || !strings.Contains(err.Error(), c.reason) || !strings.Contains(err.Error(), file) {
				t.Fatalf("%v, want %q", err, c.reason)
			}
			if after, err := os.Lstat(file); err != nil || !os.SameFile(before, after) || after.Size() != before.Size() || !after.ModTime().Equal(before.ModTime()) {
				t.Errorf("%v became %v (%v)", before, after, err)
			}
			obey(t, err)
			s, err := opened(t, path, "a")
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if s.id.Nonce == id.Nonce || s.id.Incarnation != 0 {
				t.Errorf("%+v goes on as %+v", id, s.id)
			}
		})
	}
}

// TestEveryBit: no bit of a file can be flipped, nothing cut off or added, without its being noticed as
// damage; not even where it makes another format of it.
func TestEveryBit(t *testing.T) {
	rec := runRecord{BootID: "11111111-2222-4333-8444-555555555555", CRIUPID: 7, CRIUStart: 8, Mode: modeOwn, Sandbox: 1<<48 + 1}
	for name, v := range map[string]any{"identity": identity{Host: "a", Nonce: newNonce(), Incarnation: 3}, "run": rec} {
		good, err := encodeState(v, nil)
		if err != nil {
			t.Fatal(err)
		}
		refused := func(what string, data []byte) {
			var id identity
			var r runRecord
			for _, into := range []any{&id, &r} {
				_, err := decodeState(name, data, into)
				if _, ok := errors.AsType[*damage](err); !ok {
					t.Fatalf("%s: %s: %v", name, what, err)
				}
			}
		}
		for n := range good {
			refused("cut", good[:n])
			for bit := range 8 {
				flipped := append([]byte(nil), good...)
				flipped[n] ^= 1 << bit
				refused("flipped", flipped)
			}
		}
		refused("longer", append(append([]byte(nil), good...), '\n'))
	}
}

// TestForeignState: what is sound and not ours to use is refused, left alone, and can be put out of the way
// as the message says.
func TestForeignState(t *testing.T) {
	for name, c := range map[string]struct {
		do     func(t *testing.T, path string)
		host   string
		reason string
	}{
		"newer": {func(t *testing.T, path string) {
			file := filepath.Join(path, identityFile)
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			_, body, err := unseal(data)
			if err == nil {
				err = os.WriteFile(file, seal(stateFormat+1, body), 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}, "a", "it has format 2, this agent reads up to 1; run the agent that wrote it, or a newer one"},
		"another host's": {func(*testing.T, string) {}, "b", `is of host "a", this agent is configured as "b"`},
		"writable by others": {func(t *testing.T, path string) {
			if err := os.Chmod(filepath.Join(path, runsDir), 0o777); err != nil { //nolint:gosec // that is the point
				t.Fatal(err)
			}
		}, "a", "others than the agent's user may write it"},
	} {
		t.Run(name, func(t *testing.T) {
			path, _ := newState(t)
			c.do(t, path)
			before, err := os.ReadFile(filepath.Join(path, identityFile))
			if err != nil {
				t.Fatal(err)
			}
			for range 2 {
				_, err = opened(t, path, c.host)
				if err == nil || !strings.Contains(err.Error(), c.reason) || !strings.Contains(err.Error(), path) {
					t.Fatalf("%v, want %q", err, c.reason)
				}
			}
			if after, err := os.ReadFile(filepath.Join(path, identityFile)); err != nil || string(after) != string(before) {
				t.Errorf("it was changed: %s", after)
			}
			obey(t, err)
			s, err := opened(t, path, c.host)
			if err != nil {
				t.Fatal(err)
			}
			s.Close()
		})
	}
}

// TestStateDirectory: the lock, what is cleaned up, what is shut, and that a life goes on.
func TestStateDirectory(t *testing.T) {
	path, id := newState(t)
	// What a crash leaves behind is cleaned up; what people put there is not.
	left := map[string]bool{".identity123": false, "runs/.x.run456": false, "notes": true, ".notes": true, "runs/x.run": true, "runs/.x": true}
	for name := range left {
		if err := os.WriteFile(filepath.Join(path, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(path, 0o755); err != nil { //nolint:gosec // as mkdir makes it
		t.Fatal(err)
	}
	s, err := opened(t, path, "a")
	if err != nil {
		t.Fatal(err)
	}
	if s.id != id {
		t.Errorf("%+v became %+v", id, s.id)
	}
	for name, there := range left {
		if _, err := os.Stat(filepath.Join(path, name)); (err == nil) != there {
			t.Errorf("%s: there %v", name, err == nil)
		}
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if _, err := opened(t, path, "a"); err == nil || !strings.Contains(err.Error(), "another agent has it locked") {
		t.Errorf("a second agent: %v", err)
	}
	s.Close()
	// Without its runs it may have forgotten what it spent: a new life.
	if err := os.RemoveAll(filepath.Join(path, runsDir)); err != nil {
		t.Fatal(err)
	}
	s, err = opened(t, path, "a")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if s.id.Nonce == id.Nonce {
		t.Error("it goes on as the same life")
	}
}

// TestKeptFields: what a newer agent has put into a file of our format is still in it when we write it.
func TestKeptFields(t *testing.T) {
	path, id := newState(t)
	file := filepath.Join(path, identityFile)
	body := `{"host": "a", "nonce": "` + id.Nonce + `", "incarnation": "1.3", "colour": {"of": "light"}}`
	if err := os.WriteFile(file, seal(stateFormat, []byte(body)), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := opened(t, path, "a")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.newLife(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var after identity
	kept, err := decodeState(file, data, &after)
	if err != nil || after != s.id || after.Nonce == id.Nonce || len(kept) != 1 || !strings.Contains(string(kept["colour"]), `"light"`) {
		t.Errorf("%+v, %s, %v", after, kept, err)
	}
	rec := runRecord{BootID: "11111111-2222-4333-8444-555555555555", CRIUPID: 7, CRIUStart: 8, kept: unknown{"sound": []byte(`"loud"`)}}
	if err := s.write(fileOf(rec), rec, rec.kept); err != nil {
		t.Fatal(err)
	}
	n, ok := parseRunFile(filepath.Base(fileOf(rec)))
	if !ok {
		t.Fatalf("%s is not a run's", fileOf(rec))
	}
	if back, err := readRun(path, n); err != nil || string(back.kept["sound"]) != `"loud"` {
		t.Errorf("%+v, %v", back, err)
	}
}

// TestNoStart: what keeps an agent from using a directory at all is told with its remedy.
func TestNoStart(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	path, _ := newState(t)
	lock := filepath.Join(path, lockFile)
	if err := errors.Join(os.Remove(lock), os.Symlink(file, lock)); err != nil {
		t.Fatal(err)
	}
	for where, want := range map[string]string{file: "move away what stands in its place", path: "move away what stands in its place"} {
		if _, err := opened(t, where, "a"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", where, err)
		}
	}
}

// FuzzState: whatever stands in a file, reading it ends in an error or in what was sealed there; and what
// is read can be written and read again.
func FuzzState(f *testing.F) {
	good, err := encodeState(identity{Host: "a", Nonce: newNonce(), Incarnation: 3}, nil)
	if err != nil {
		f.Fatal(err)
	}
	rec, err := encodeState(runRecord{
		BootID: "11111111-2222-4333-8444-555555555555", CRIUPID: 7, CRIUStart: 8, Mode: modeOwn, Sandbox: 1<<48 + 1, Tasks: []task{{1, 2}}, Began: time.Unix(1, 0).UTC(),
	}, unknown{"later": []byte("1")})
	if err != nil {
		f.Fatal(err)
	}
	for _, data := range [][]byte{nil, good, rec, good[:40], seal(0, nil), seal(2, []byte("{}")), []byte(`{"host": "a", "HOST": "b"}`), []byte(`{"tasks": [{"pid": -1}], "answers": null}`)} {
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if format, body, err := unseal(data); err == nil && string(seal(format, body)) != string(data) {
			t.Fatalf("%q was accepted, and was not sealed so", data)
		}
		// As it is, and as the body of a file whose checksum is right.
		for _, file := range [][]byte{data, seal(stateFormat, data)} {
			var id, id2 identity
			if kept, err := decodeState("f", file, &id); err == nil {
				again(t, id, kept, &id2)
				if id2 != id {
					t.Fatalf("%+v was read again as %+v", id, id2)
				}
			}
			var r, r2 runRecord
			if kept, err := decodeState("f", file, &r); err == nil {
				again(t, r, kept, &r2)
				if fileOf(r2) != fileOf(r) || r2.Sandbox != r.Sandbox || r2.ZeroGiven != r.ZeroGiven || len(r2.Tasks) != len(r.Tasks) {
					t.Fatalf("%+v was read again as %+v", r, r2)
				}
			}
		}
	})
}

// again writes v and reads it into out.
func again(t *testing.T, v any, kept unknown, out any) {
	t.Helper()
	data, err := encodeState(v, kept)
	if err != nil {
		return // such a time, say, cannot be written: an agent would report it
	}
	left, err := decodeState("f", data, out)
	if err != nil || len(left) != len(kept) {
		t.Fatalf("what was read cannot be read again: %v, kept %d of %d", err, len(left), len(kept))
	}
}
