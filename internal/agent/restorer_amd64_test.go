package agent

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// What /proc said of a task that CRIU 4.1.1 had left parked at post-restore, and of the same one running.
const (
	parkedCall  = "202 0x2d010 0x0 0x4 0x0 0x0 0x0 0x24ec8 0x18269\n"
	runningCall = "61 0xffffffffffffffff 0x7fff48c055bc 0x0 0x0 0x0 0x0 0x7fff48c05550 0x4ae3f7\n"
	parkedMaps  = `00010000-0001d000 rwxp 00000000 00:00 0 
0001d000-0002a000 rw-p 00000000 00:00 0 
00400000-00401000 r--p 00000000 00:29 803023                             /bin/busybox
00401000-0058d000 r-xp 00001000 00:29 803023                             /bin/busybox
11856000-11878000 rw-p 00000000 00:00 0                                  [heap]
`
	parkedStatus  = "Name:\tsh\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000000000\nSigBlk:\tfffffffffffbfeff\n"
	runningStatus = "Name:\tsh\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\nSigBlk:\t0000000000000000\n"
)

func TestRestorer(t *testing.T) {
	for name, c := range map[string]struct {
		call, maps string
		in         bool
	}{
		"parked":           {parkedCall, parkedMaps, true},
		"its own program":  {runningCall, parkedMaps, false},
		"futex of its own": {"202 0x2d010 0x0 0x4 0x0 0x0 0x0 0x24ec8 0x4ae3f7", parkedMaps, false},
		"on a processor":   {"running\n", parkedMaps, false},
		"nothing":          {"", "", false},
		"no maps":          {parkedCall, "", false},
	} {
		if got := inRestorer([]byte(c.call), []byte(c.maps)); got != c.in {
			t.Errorf("%s: %v", name, got)
		}
	}
	if m, ok := signals([]byte(parkedStatus), "SigBlk"); !ok || m != allSignals {
		t.Errorf("blocked: %x, %v, want %x", m, ok, allSignals)
	}
	if pendingKill([]byte(parkedStatus)) || !pendingKill([]byte(runningStatus)) {
		t.Error("the pending SIGKILL is not told")
	}
	if _, ok := signals([]byte("SigBlk:\tnonsense\n"), "SigBlk"); ok {
		t.Error("nonsense is a mask")
	}
}

// restorer is a program that stands as a task does in CRIU's restorer: it blocks every signal, maps a page
// that is writable and executable, and waits in futex(2) from there, for ever.
func restorer(t *testing.T) string {
	t.Helper()
	code := []byte{
		0x48, 0x83, 0xec, 0x08, // sub rsp, 8
		0x48, 0xc7, 0x04, 0x24, 0xff, 0xff, 0xff, 0xff, // mov qword [rsp], -1
		0xb8, unix.SYS_RT_SIGPROCMASK, 0, 0, 0, // mov eax
		0xbf, unix.SIG_SETMASK, 0, 0, 0, // mov edi
		0x48, 0x89, 0xe6, // mov rsi, rsp
		0x31, 0xd2, // xor edx, edx
		0x41, 0xba, 8, 0, 0, 0, // mov r10d, 8
		0x0f, 0x05, // syscall
		0xb8, unix.SYS_MMAP, 0, 0, 0, // mov eax
		0x31, 0xff, // xor edi, edi
		0xbe, 0, 0x10, 0, 0, // mov esi, 4096
		0xba, unix.PROT_READ | unix.PROT_WRITE | unix.PROT_EXEC, 0, 0, 0, // mov edx
		0x41, 0xba, unix.MAP_PRIVATE | unix.MAP_ANONYMOUS, 0, 0, 0, // mov r10d
		0x49, 0xc7, 0xc0, 0xff, 0xff, 0xff, 0xff, // mov r8, -1
		0x45, 0x31, 0xc9, // xor r9d, r9d
		0x0f, 0x05, // syscall
		0x48, 0x89, 0xc3, // mov rbx, rax
		0x48, 0xb9, 0xb8, unix.SYS_FUTEX, 0, 0, 0, 0x0f, 0x05, 0xeb, // mov rcx, "mov eax, SYS_futex; syscall; jmp
		0x48, 0x89, 0x0b, // mov [rbx], rcx
		0xc6, 0x43, 0x08, 0xf7, // mov byte [rbx+8], back"
		0x48, 0x8d, 0xbb, 0, 1, 0, 0, // lea rdi, [rbx+256]: it is 0
		0x31, 0xf6, // xor esi, esi: FUTEX_WAIT
		0x31, 0xd2, // xor edx, edx: while it is 0
		0x45, 0x31, 0xd2, // xor r10d, r10d: no time-out
		0xff, 0xe3, // jmp rbx
	}
	const base, header, segment = 0x400000, 64, 56
	size := uint64(header + segment + len(code))
	var b bytes.Buffer
	for _, part := range []any{
		elf.Header64{
			Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
			Type:  uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
			Entry: base + header + segment, Phoff: header, Ehsize: header, Phentsize: segment, Phnum: 1,
		},
		elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X), Vaddr: base, Paddr: base, Filesz: size, Memsz: size, Align: 0x1000},
		code,
	} {
		if err := binary.Write(&b, binary.LittleEndian, part); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(t.TempDir(), "restorer")
	if err := os.WriteFile(path, b.Bytes(), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestForgottenInRestorer: CRIU dies and leaves its tree in the restorer, while the agent is away and loses
// what it remembers. The tree is ended and what was committed goes back, before and after post-restore.
func TestForgottenInRestorer(t *testing.T) {
	for name, committed := range map[string]bool{"claimed": false, "committed": true} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			d := h.moved()
			c := h.criu()
			c.passes(criuhook.PreRestore, 0, d.images)
			made := c.order(order{Tree: containerFlags, Program: restorer(t)})
			if made.Err != "" {
				t.Fatal(made.Err)
			}
			t.Cleanup(func() { kill(made.PID) })
			c.passes(criuhook.SetupNamespaces, made.PID, d.images)
			if committed {
				c.passes(criuhook.PostRestore, made.PID, d.images)
				h.is(d.sandbox, alloc.StateRunning)
			}
			p, err := h.kernel.Process(made.PID)
			if err != nil {
				t.Fatal(err)
			}
			root := task{p.PID, p.StartTime}
			h.eventually("it stands in the restorer", func() error {
				if halfBuilt(root, "") != parked {
					return errors.New("it does not yet")
				}
				return nil
			})
			h.mustStop()
			if err := os.RemoveAll(h.stateDir()); err != nil {
				t.Fatal(err)
			}
			h.start()
			c.passes(criuhook.PreResume, made.PID, d.images) // CRIU lives: nothing is touched
			if h.gone(root) {
				t.Error("the tree was ended under a CRIU that lives")
			}
			c.end()
			_, cp := h.reaches(d.sandbox, alloc.StateInTransit)
			if cp.State != alloc.CheckpointOpen || !h.gone(root) {
				t.Errorf("the images are %s; the tree is gone: %v", cp.State, h.gone(root))
			}
			kill(made.PID) // it has become ours to reap: until then its PID namespace lives
			h.settled()
			h.consistent()
			again, pid := h.restored(d.images)
			again.end()
			h.reaches(d.sandbox, alloc.StateRunning)
			same(t, d.before, serialsOf(h.serials(pid)))
			h.settled()
			h.consistent()
		})
	}
}

// TestForgottenCopyInRestorer: the same for a restore that claimed nothing, as its images are nobody's or a
// copy: it was answered 0 at post-restore, and what the pool has of it says which CRIU that was.
func TestForgottenCopyInRestorer(t *testing.T) {
	for name, imagesOf := range map[string]func(h *host) string{
		"adopted": func(h *host) string { return writeImages(h.t, "unknown", containerTypes...) },
		"clone": func(h *host) string {
			d := h.dump()
			d.end() // it runs on
			h.reaches(d.sandbox, alloc.StateRunning)
			return d.images
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			images := imagesOf(h)
			c := h.criu()
			c.passes(criuhook.PreRestore, 0, images)
			made := c.order(order{Tree: containerFlags, Program: restorer(t)})
			if made.Err != "" {
				t.Fatal(made.Err)
			}
			t.Cleanup(func() { kill(made.PID) })
			c.passes(criuhook.SetupNamespaces, made.PID, images)
			c.passes(criuhook.PostRestore, made.PID, images)
			sandbox := h.sandbox(made.PID)
			p, err := h.kernel.Process(made.PID)
			if err != nil {
				t.Fatal(err)
			}
			root := task{p.PID, p.StartTime}
			h.mustStop()
			if err := os.RemoveAll(h.stateDir()); err != nil {
				t.Fatal(err)
			}
			h.start()
			c.passes(criuhook.PreResume, made.PID, images) // CRIU lives: nothing is touched
			if h.gone(root) {
				t.Error("the tree was ended under a CRIU that lives")
			}
			c.end()
			h.eventually("the tree is ended", func() error {
				if !h.gone(root) {
					return errors.New("it is not")
				}
				return nil
			})
			kill(made.PID) // it has become ours to reap: until then its PID namespace lives
			h.reaches(sandbox, alloc.StateEnded)
			again, pid := h.restored(images)
			again.end()
			h.serials(pid)
			h.settled()
			h.consistent()
		})
	}
}
