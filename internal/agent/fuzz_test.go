package agent

import (
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// FuzzReceive sends any packet with any descriptors to the hook socket's reading end. Either each name in it
// has its descriptor, or nothing of it is kept.
func FuzzReceive(f *testing.F) {
	if os.Geteuid() != 0 {
		f.Skip("the hook socket is root's")
	}
	packets, err := filepath.Glob("../../pkg/criuhook/testdata/packets/*.request")
	if err != nil || len(packets) == 0 {
		f.Fatal(len(packets), err)
	}
	for _, name := range packets {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, uint8(3))
	}
	f.Add([]byte(`{"version":1,"action":"pre-dump","caller":"script","criu_pid":7,"fds":["criu","init"]}`), uint8(1))
	f.Add([]byte(`{"version":1,"action":"pre-dump","caller":"script","criu_pid":7,"fds":["a","b","c","d","e","f","g","h"]}`), uint8(9))
	f.Add([]byte("x"), uint8(255))
	f.Fuzz(func(t *testing.T, packet []byte, descriptors uint8) {
		n := int(descriptors) % 20 // SCM_RIGHTS takes 253; 8 are allowed
		before := lowest(t)
		c, ok := waiting(t, packet, n)
		if !ok {
			return // longer than a packet can be
		}
		defer c.Close()
		r, err := receive(c)
		if err != nil {
			if len(r.files) != 0 || len(err.Error()) > 1000 {
				t.Errorf("%d descriptors are kept of what was refused: %.300v", len(r.files), err)
			}
		} else if len(r.FDs) != n || len(r.files) != n || n > criuhook.MaxFDs || r.peer != os.Getpid() {
			t.Errorf("%d descriptors, names %v, files %v, peer %d", n, r.FDs, r.files, r.peer)
		}
		for name, file := range r.files {
			var st unix.Stat_t
			if err := unix.Fstat(int(file.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR {
				t.Errorf("%s: mode %o, %v", name, st.Mode, err)
			}
			if flags, err := unix.FcntlInt(file.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("%s goes to every child: %v", name, err)
			}
		}
		r.close()
		c.Close()
		if after := lowest(t); after > before { // it is lower where the garbage collector closed what another test left
			t.Errorf("the lowest free descriptor was %d and is %d: one was left open", before, after)
		}
	})
}

// waiting is a connection on which a packet waits with n descriptors, and nothing else will.
func waiting(t *testing.T, packet []byte, n int) (*net.UnixConn, bool) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	near := os.NewFile(uintptr(pair[1]), "hook")
	defer near.Close()
	null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var rights []int
	for range n {
		rights = append(rights, null)
	}
	var oob []byte
	if n > 0 {
		oob = unix.UnixRights(rights...)
	}
	err = unix.Sendmsg(pair[0], packet, oob, nil, unix.MSG_DONTWAIT)
	unix.Close(null)
	unix.Close(pair[0])
	if err != nil {
		return nil, false
	}
	c, err := net.FileConn(near)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(saidWithin)); err != nil {
		t.Fatal(err)
	}
	return c.(*net.UnixConn), true
}

// lowest is the lowest descriptor that is free.
func lowest(t *testing.T) int {
	t.Helper()
	fd, err := unix.Open("/", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	return fd
}
