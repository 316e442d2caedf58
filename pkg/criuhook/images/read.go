//go:build linux

package images

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"strconv"
	"unicode/utf8"

	criu_core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/netdev"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pidns"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Limits of what is read. Real images are far below them; a forged one costs little more than its size,
// and a forged directory no more than maxTotal.
const (
	maxTasks     = 65536
	maxInventory = 64 << 10 // some 100 bytes, and the names of CRIU's plugins
	maxPSTree    = 16 << 20 // a task is some 20 bytes, and 2 to 4 for each of its threads
	maxIDs       = 4 << 10  // 36 bytes; 12 numbers, none of which can have more than 11
	maxNS        = 1 << 20  // netns: sysctls, some KB
	maxTotal     = 32 << 20 // all of one directory: maxTasks tasks have 16 + 4 MiB
	maxPID       = 1 << 22  // PID_MAX_LIMIT of the kernel's include/linux/threads.h
	maxText      = 4096     // keys of external namespaces
)

// Magic numbers of CRIU's images (criu/include/magic.h; go-criu's package magic has the same).
const (
	magicCommon    = 0x54564319 // most images start with it, then with their own; inventory.img does not
	magicInventory = 0x58313116
	magicPSTree    = 0x50273030
	magicIDs       = 0x54432030
	magicNetNS     = 0x55933752
	magicPIDNS     = 0x61157326
)

// Field 13 of inventory_entry, since CRIU 4.1 (images/inventory.proto there); go-criu 7.2 does not know
// it, so it is looked up in the message's bytes.
const fieldRunID = 13

// source is where images come from: a directory, or the fuzzer.
type source interface {
	// read reads the whole of a regular file of no more than most bytes; an error that matches
	// os.ErrNotExist when there is none.
	read(name string, most int64) ([]byte, error)
}

type directory struct{ f *os.File }

func (d directory) read(name string, most int64) ([]byte, error) {
	raw, err := d.f.SyscallConn() // keeps the descriptor open meanwhile, and leaves it as it is
	if err != nil {
		return nil, err
	}
	var fd int
	var openErr error
	err = raw.Control(func(dir uintptr) {
		// Without O_NONBLOCK a fifo of that name would block the agent.
		fd, openErr = unix.Openat(int(dir), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	})
	if err == nil {
		err = openErr
	}
	if err != nil {
		if errors.Is(err, unix.ELOOP) {
			err = errors.New("it is a symbolic link, which CRIU never writes")
		}
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: it is no regular file (%s)", name, st.Mode().Type())
	}
	// The size is asked first and then not trusted: the file may grow.
	if st.Size() > most {
		return nil, tooLarge(name, most)
	}
	var buf bytes.Buffer
	buf.Grow(int(st.Size()) + bytes.MinRead) // a tree has thousands of files: one read for each, and one for its end
	_, err = buf.ReadFrom(io.LimitReader(f, most+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s: %w", name, err)
	case int64(buf.Len()) > most:
		return nil, tooLarge(name, most)
	}
	return buf.Bytes(), nil
}

func tooLarge(name string, most int64) error {
	return fmt.Errorf("%s: larger than %d bytes, so it is no image that CRIU wrote of a tree of up to %d tasks", name, most, maxTasks)
}

// reader reads one set and sums it up on the way: what is parsed is what is hashed.
type reader struct {
	ctx  context.Context
	src  source
	left int64 // of maxTotal
	sum  hash.Hash
}

func read(ctx context.Context, src source) (*Set, error) {
	r := reader{ctx, src, maxTotal, sha256.New()}
	s := &Set{External: map[ID]string{}}
	if err := r.inventory(s); err != nil {
		return nil, err
	}
	if err := r.pstree(s); err != nil {
		return nil, err
	}
	for i := range s.Tasks {
		if err := r.ids(&s.Tasks[i]); err != nil {
			return nil, err
		}
	}
	if s.Root().Dead() {
		return nil, fmt.Errorf("%s: it is missing, and CRIU dumps no tree whose root is dead: %w", idsName(s.Root()), ErrIncomplete)
	}
	r.sum.Sum(s.Digest[:0])
	return s, r.external(s)
}

func (r *reader) inventory(s *Set) error {
	const name = "inventory.img"
	entries, err := r.image(name, magicInventory, maxInventory)
	if err != nil {
		return err
	}
	var e inventory.InventoryEntry
	if err := one(name, entries, &e); err != nil {
		return err
	}
	if s.Host, err = namespaceIDs(name, e.GetRootIds()); err != nil {
		return err
	}
	if s.RunID, err = text(entries[0], fieldRunID); err != nil || len(s.RunID) > 64 {
		return fmt.Errorf("%s: the run id (field %d) is not a text of at most 64 bytes", name, fieldRunID)
	}
	return nil
}

func (r *reader) pstree(s *Set) error {
	const name = "pstree.img"
	entries, err := r.image(name, magicPSTree, maxPSTree)
	if err != nil {
		return err
	}
	if len(entries) == 0 {
		return fmt.Errorf("%s: it names no task: %w", name, ErrIncomplete)
	}
	seen := make(map[int]bool, len(entries))
	for i, b := range entries {
		var e pstree.PstreeEntry
		if err := unmarshal(name, b, &e); err != nil {
			return err
		}
		t := Task{VPID: int(e.GetPid()), PPID: int(e.GetPpid())}
		// CRIU writes parents before children and reads no other order (read_one_pstree_item).
		switch {
		case t.VPID <= 0 || t.VPID > maxPID:
			return fmt.Errorf("%s: pid %d is out of range", name, t.VPID)
		case seen[t.VPID]:
			return fmt.Errorf("%s: pid %d stands twice", name, t.VPID)
		case (t.PPID == 0) != (i == 0):
			return fmt.Errorf("%s: task %d has the parent %d: the first task, and no other, is a root with parent 0", name, t.VPID, t.PPID)
		case i > 0 && !seen[t.PPID]:
			return fmt.Errorf("%s: task %d has the parent %d, which does not stand before it", name, t.VPID, t.PPID)
		}
		seen[t.VPID] = true
		s.Tasks = append(s.Tasks, t)
	}
	return nil
}

func idsName(t Task) string { return "ids-" + strconv.Itoa(t.VPID) + ".img" }

func (r *reader) ids(t *Task) error {
	name := idsName(*t)
	entries, err := r.image(name, magicIDs, maxIDs)
	if errors.Is(err, os.ErrNotExist) {
		return nil // a zombie (dump_one_zombie writes a core image and no more)
	}
	if err != nil {
		return err
	}
	var e criu_core.TaskKobjIdsEntry
	if err := one(name, entries, &e); err != nil {
		return err
	}
	if t.IDs, err = namespaceIDs(name, &e); err == nil && len(t.IDs) == 0 {
		err = fmt.Errorf("%s: it has no namespace ids, which CRIU writes since 1.0", name)
	}
	return err
}

// external looks for the keys of external namespaces. CRIU knows external network and PID namespaces
// only (criu/external.c, criu/namespaces.c); their images are not under the digest: what they say
// decides whose serial a namespace has on the source, which the manifest records.
func (r *reader) external(s *Set) error {
	asked := map[ID]bool{}
	for _, t := range s.Tasks {
		for _, typ := range []alloc.NamespaceType{alloc.Net, alloc.PID} {
			id := ID{typ, t.IDs[typ]}
			if id.CRIU == 0 || id.CRIU == s.Host[typ] || asked[id] {
				continue
			}
			asked[id] = true
			key, err := r.externalKey(id)
			if err != nil {
				return err
			}
			if key != "" {
				s.External[id] = key
			}
		}
	}
	return nil
}

func (r *reader) externalKey(id ID) (string, error) {
	var key func() string
	var e proto.Message
	var magic uint32
	if id.Type == alloc.Net {
		m := &netdev.NetnsEntry{}
		e, key, magic = m, m.GetExtKey, magicNetNS
	} else {
		m := &pidns.PidnsEntry{}
		e, key, magic = m, m.GetExtKey, magicPIDNS
	}
	name := string(id.Type) + "ns-" + strconv.FormatUint(uint64(id.CRIU), 10) + ".img"
	b, err := r.file(name, maxNS)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil // CRIU writes none for a PID namespace of the tree's own
	}
	if err != nil {
		return "", err
	}
	entries, err := split(name, b, magic)
	if err != nil {
		return "", err
	}
	if err := one(name, entries, e); err != nil {
		return "", err
	}
	if k := key(); len(k) > maxText || !utf8.ValidString(k) {
		return "", fmt.Errorf("%s: the key of the external namespace is longer than %d bytes or not text", name, maxText)
	}
	return key(), nil
}

// file reads a file, out of what is left to read.
func (r *reader) file(name string, most int64) ([]byte, error) {
	if r.ctx.Err() != nil {
		return nil, fmt.Errorf("%s: not read: %w", name, context.Cause(r.ctx))
	}
	b, err := r.src.read(name, most)
	if r.left -= int64(len(b)); r.left < 0 {
		return nil, fmt.Errorf("%s: with it more than %d bytes were read to learn who is who, which no tree of up to %d tasks needs", name, int64(maxTotal), maxTasks)
	}
	return b, err
}

// image reads a file, sums it up and splits it.
func (r *reader) image(name string, magic uint32, most int64) ([][]byte, error) {
	b, err := r.file(name, most)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", err, ErrIncomplete)
	}
	if err != nil {
		return nil, err
	}
	// The name and the length make it impossible to move bytes from one file to the next.
	fmt.Fprintf(r.sum, "%s %d\n", name, len(b))
	r.sum.Write(b)
	return split(name, b, magic)
}

// split takes an image apart: one or two magic numbers, then entries of a 32-bit size and a message. go-criu's
// crit does that too, but makes a buffer of up to 4 GiB on the word of a size field, and does not notice
// a short read.
func split(name string, b []byte, magic uint32) ([][]byte, error) {
	u32 := func() (uint32, bool) {
		if len(b) < 4 {
			return 0, false
		}
		v := binary.LittleEndian.Uint32(b)
		b = b[4:]
		return v, true
	}
	got, ok := u32()
	if ok && got == magicCommon {
		got, ok = u32()
	}
	switch {
	case !ok:
		return nil, fmt.Errorf("%s: empty or cut short: %w", name, ErrIncomplete)
	case got != magic:
		return nil, fmt.Errorf("%s: magic number %#x, not %#x: no such image of CRIU", name, got, magic)
	}
	var entries [][]byte
	for len(b) > 0 {
		size, ok := u32()
		if !ok || uint64(size) > uint64(len(b)) {
			return nil, fmt.Errorf("%s: cut short within entry %d: %w", name, len(entries)+1, ErrIncomplete)
		}
		if len(entries) == maxTasks {
			return nil, fmt.Errorf("%s: more than %d entries", name, maxTasks)
		}
		entries = append(entries, b[:size:size])
		b = b[size:]
	}
	return entries, nil
}

func one(name string, entries [][]byte, m proto.Message) error {
	if len(entries) != 1 {
		return fmt.Errorf("%s: %d entries where CRIU writes one", name, len(entries))
	}
	return unmarshal(name, entries[0], m)
}

func unmarshal(name string, b []byte, m proto.Message) error {
	if err := proto.Unmarshal(b, m); err != nil {
		return fmt.Errorf("%s: damaged: %w", name, err)
	}
	return nil
}

// namespaceIDs leaves out what is 0: the kernel of the source had no such type.
func namespaceIDs(name string, e *criu_core.TaskKobjIdsEntry) (map[alloc.NamespaceType]uint32, error) {
	if e == nil {
		return nil, fmt.Errorf("%s: it does not say in which namespaces CRIU ran (root_ids, CRIU >= 1.4)", name)
	}
	ids := map[alloc.NamespaceType]uint32{
		alloc.Mnt: e.GetMntNsId(), alloc.UTS: e.GetUtsNsId(), alloc.IPC: e.GetIpcNsId(), alloc.PID: e.GetPidNsId(),
		alloc.Net: e.GetNetNsId(), alloc.Cgroup: e.GetCgroupNsId(), alloc.User: e.GetUserNsId(), alloc.Time: e.GetTimeNsId(),
	}
	for t, id := range ids {
		if id == 0 {
			delete(ids, t)
		}
	}
	return ids, nil
}

// text finds a text field in a message; "" when there is none. The last one counts, as everywhere in
// protobuf.
func text(b []byte, field protowire.Number) (string, error) {
	s := ""
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return "", protowire.ParseError(n)
		}
		b = b[n:]
		if num == field && typ == protowire.BytesType {
			v, n := protowire.ConsumeBytes(b)
			if n < 0 {
				return "", protowire.ParseError(n)
			}
			if s = string(v); !utf8.ValidString(s) {
				return "", errors.New("not UTF-8")
			}
			b = b[n:]
			continue
		}
		if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
			return "", protowire.ParseError(n)
		}
		b = b[n:]
	}
	return s, nil
}
