package witness

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/internal/killpoint"
)

// File is a Seen on disk. It has two pages that are written in turn, each with a number and a checksum, so
// that a write which is cut off leaves the one before. Both are there in full from the beginning: a disk that
// runs full later does not matter, on file systems that write in place.
type File struct {
	path string
	f    *os.File

	mu      sync.Mutex
	seen    Seen   // guarded by mu
	changes uint64 // guarded by mu: how often seen has changed
	failed  bool   // guarded by mu: the last write did not succeed

	writing sync.Mutex
	number  uint64 // guarded by writing: of the last page
	durable uint64 // guarded by writing: the change that is on disk
}

const (
	pageSize = 32 << 10
	fileName = "witness"
	magic    = "nsalloc-witness 1\n"
)

// page is what a page holds.
type page struct {
	Number uint64 `json:"number"`
	Seen   Seen   `json:"seen"`
}

// Open opens the witness in a directory, which it makes. fresh says that there was none. One process at a time
// has it. A file that is damaged is an error: what it held decides whether a store may be trusted.
func Open(dir string) (w *File, fresh bool, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, false, err
	}
	path := filepath.Join(dir, fileName)
	_, err = os.Lstat(path)
	fresh = errors.Is(err, fs.ErrNotExist)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, false, err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
		}
	}()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, false, fmt.Errorf("%s: another nsalloc-server has it: give each server a directory of its own: %w", path, err)
	}
	w = &File{path: path, f: f}
	data, err := io.ReadAll(io.LimitReader(f, 2*pageSize+1))
	if err != nil {
		return nil, false, err
	}
	if len(data) == 0 {
		// It was made, and nothing was ever seen.
		if err = w.begin(dir); err != nil {
			return nil, false, fmt.Errorf("%w: what this server sees of its pool is kept there; make room on its disk, or mount it writable", err)
		}
		return w, true, nil
	}
	found := false
	for i := range 2 {
		if p, ok := readPage(data, i); ok && (!found || p.Number > w.number) {
			found, w.number, w.seen = true, p.Number, p.Seen
		}
	}
	if !found {
		return nil, false, fmt.Errorf("%s is damaged: what this server has seen of its pool is not known; put it back from a backup, or move it away and start the server again: "+
			"it then takes a new generation before it issues anything", path)
	}
	return w, false, nil
}

// begin makes both pages.
func (w *File) begin(dir string) error {
	for range 2 {
		if err := w.write(Seen{}); err != nil {
			return err
		}
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func readPage(data []byte, i int) (p page, ok bool) {
	data = data[min(i*pageSize, len(data)):min((i+1)*pageSize, len(data))]
	head, rest, ok := bytes.Cut(data, []byte("\n"))
	if !ok || string(head)+"\n" != magic || len(rest) < sha256.Size+4 {
		return p, false
	}
	sum, rest := rest[:sha256.Size], rest[sha256.Size:]
	n := binary.BigEndian.Uint32(rest)
	if rest = rest[4:]; uint64(n) > uint64(len(rest)) {
		return p, false
	}
	body := rest[:n]
	if got := sha256.Sum256(body); !bytes.Equal(got[:], sum) || json.Unmarshal(body, &p) != nil {
		return p, false
	}
	return p, true
}

// write writes the next page, and returns when it is on disk. The caller holds writing, or is alone.
func (w *File) write(seen Seen) error {
	body, err := json.Marshal(page{Number: w.number + 1, Seen: seen})
	if err != nil {
		return err
	}
	sum := sha256.Sum256(body)
	data := slices.Concat([]byte(magic), sum[:], binary.BigEndian.AppendUint32(nil, uint32(len(body))), body)
	if len(data) > pageSize {
		return fmt.Errorf("%s: %d bytes do not fit a page", w.path, len(data))
	}
	if w.number < 2 { // the whole page, so that it is there
		data = append(data, make([]byte, pageSize-len(data))...)
	}
	killpoint.At(killpoint.ServerWitnessRecording)
	if _, err := w.f.WriteAt(data, int64((w.number+1)%2)*pageSize); err != nil {
		return err
	}
	if err := unix.Fdatasync(int(w.f.Fd())); err != nil {
		return &os.PathError{Op: "fdatasync", Path: w.path, Err: err}
	}
	killpoint.At(killpoint.ServerWitnessRecorded)
	w.number++
	return nil
}

// Seen is what is remembered.
func (w *File) Seen() Seen {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.seen.clone()
}

// Update changes what is remembered. When it returns without an error the change is on disk; those that wait
// at the same time share a write. After an error the change is remembered, and on disk with the next
// Update that succeeds.
func (w *File) Update(change func(*Seen)) error {
	w.mu.Lock()
	change(&w.seen)
	w.changes++
	mine := w.changes
	w.mu.Unlock()
	w.writing.Lock()
	defer w.writing.Unlock()
	if w.durable >= mine {
		return nil
	}
	w.mu.Lock()
	seen, upTo := w.seen.clone(), w.changes
	w.mu.Unlock()
	err := w.write(seen)
	w.mu.Lock()
	w.failed = err != nil
	w.mu.Unlock()
	if err == nil {
		w.durable = upTo
	}
	return err
}

// Kept writes what an Update before could not, if there is any such thing.
func (w *File) Kept() error {
	w.mu.Lock()
	failed := w.failed
	w.mu.Unlock()
	if !failed {
		return nil
	}
	return w.Update(func(*Seen) {})
}

// Close gives the file up.
func (w *File) Close() error { return w.f.Close() }
