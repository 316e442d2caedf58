package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/google/renameio/v2"

	"github.com/nsalloc/nsalloc/internal/hookconf"
)

// confFiles are the configuration files that make some CRIU on a host run scripts.
var confFiles = []string{hookconf.ConfPath, "/etc/criu/runc.conf", "/etc/criu/crun.conf"}

// hostRoot is the root directory of the host that is worked on: "/" or where an image is being built.
type hostRoot string

func (r hostRoot) path(name string) string { return filepath.Join(string(r), name) }

func (r hostRoot) isThisHost() bool { return filepath.Clean(string(r)) == "/" }

func (r hostRoot) exists(name string) bool {
	_, err := os.Stat(r.path(name))
	return err == nil
}

// confFile is a configuration file as it was read.
type confFile struct {
	path string
	file string // behind symbolic links: what is written
	text []byte // nil when there is none
}

func (r hostRoot) readConf(name string) (confFile, error) {
	f := confFile{path: r.path(name), file: r.path(name)}
	if target, err := filepath.EvalSymlinks(f.path); err == nil && target != f.path {
		if st, err := os.Lstat(f.path); err == nil && st.Mode()&fs.ModeSymlink != 0 && !r.isThisHost() {
			// Its target would be looked for in the wrong root.
			return f, fail(exitError, "%s is a symbolic link, which --root cannot follow; give the file itself", f.path)
		}
		f.file = target
	}
	var err error
	f.text, err = os.ReadFile(f.file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		f.text = nil
		return f, nil
	case err != nil:
		return f, fail(exitError, "%w; run it as root", err)
	case f.text == nil:
		f.text = []byte{}
	}
	return f, nil
}

// write replaces the file as a whole or not at all: a CRIU that starts meanwhile reads the old text or
// the new one. The mode stays. What somebody else wrote since it was read is not overwritten.
func (f confFile) write(text []byte, remove bool) error {
	now, err := os.ReadFile(f.file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fail(exitError, "%w; run it as root", err)
	}
	if !bytes.Equal(now, f.text) || (err != nil) != (f.text == nil) {
		return fail(exitConflict, "%s was changed while this command ran; nothing was written, run it again", f.path)
	}
	dir := filepath.Dir(f.file)
	if remove {
		err = os.Remove(f.file)
	} else {
		if err = os.MkdirAll(dir, 0o755); err == nil {
			err = renameio.WriteFile(f.file, text, 0o644, renameio.WithExistingPermissions())
		}
	}
	if err == nil {
		err = syncDir(dir)
	}
	if err != nil {
		return fail(exitError, "%w; is this root, and is the file system writable?", err)
	}
	return nil
}

// syncDir makes a rename survive a power loss.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// findHook settles which program CRIU is to run: absolute, and nobody but root can replace it, because CRIU
// runs it as root.
func (r hostRoot) findHook(given string) (string, error) {
	hook := given
	if abs, err := filepath.Abs(hook); err == nil && r.isThisHost() {
		hook = abs
	}
	if err := hookconf.CheckPath(hook); err != nil {
		return "", usage("%w", err)
	}
	hook = filepath.Clean(hook)
	if err := r.checkHook(hook); err != nil {
		return "", fail(exitError, "%w", err)
	}
	return hook, nil
}

// checkHook says what is wrong with the hook as a program that CRIU runs as root. On another root owners
// do not count: in an image that is being built they are not the final ones.
func (r hostRoot) checkHook(hook string) error {
	path := r.path(hook)
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s does not exist, and CRIU fails every dump and restore when its script is missing; install it there or name another with --hook", path)
	}
	if err != nil {
		return err
	}
	switch {
	case !st.Mode().IsRegular():
		return fmt.Errorf("%s is not a file; name the nsalloc-hook program", path)
	case st.Mode().Perm()&0o111 == 0:
		return fmt.Errorf("%s is not executable; chmod 755 it", path)
	case st.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("%s can be written by others than its owner (%s), and CRIU runs it as root; chmod 755 it", path, st.Mode().Perm())
	}
	if !r.isThisHost() {
		return nil
	}
	target, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	for _, start := range []string{target, path} { // the link's directories count as well as the file's
		for p := start; ; p = filepath.Dir(p) {
			if err := rootOnly(p); err != nil {
				return fmt.Errorf("%w, so that somebody else could make CRIU run another program as root; install the hook below /usr", err)
			}
			if p == "/" {
				break
			}
		}
	}
	return nil
}

// rootOnly says who else can replace a file or what is in a directory.
func rootOnly(path string) error {
	st, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok && sys.Uid != 0 {
		return fmt.Errorf("%s belongs to uid %d and not to root", path, sys.Uid)
	}
	// In a sticky directory (/tmp) others cannot replace what is root's.
	if st.Mode()&fs.ModeSymlink == 0 && st.Mode().Perm()&0o022 != 0 && st.Mode()&fs.ModeSticky == 0 {
		return fmt.Errorf("%s can be written by others than root (%s)", path, st.Mode().Perm())
	}
	return nil
}

// shadow is a line of another file that gets in our hook's way.
type shadow struct{ seen, fix string }

// shadows finds what doubles the hook. Both files are read besides default.conf, so what they name runs
// as well.
func (r hostRoot) shadows() []shadow {
	var found []shadow
	for _, name := range confFiles[1:] {
		conf, err := r.readConf(name)
		if err != nil {
			found = append(found, shadow{err.Error(), "make it readable for root"})
			continue
		}
		for _, s := range hookconf.Scripts(conf.text) {
			at := fmt.Sprintf("%s:%d", conf.path, s.Line)
			if s.Ours {
				found = append(found, shadow{at + " runs " + s.Path + " as well, so that the agent is asked twice",
					"remove that line: " + hookconf.ConfPath + " is enough"})
			}
		}
	}
	return found
}

// others lists scripts that are not ours, for people to know of: CRIU runs all of them, also after a veto.
func (r hostRoot) others() []string {
	var found []string
	for _, name := range confFiles {
		conf, err := r.readConf(name)
		if err != nil {
			continue
		}
		for _, s := range hookconf.Scripts(conf.text) {
			if !s.Ours {
				found = append(found, fmt.Sprintf("%s (%s:%d)", strings.TrimSpace(s.Path), conf.path, s.Line))
			}
		}
	}
	return found
}
