package testhost

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// The sockets of PID 1 are SOCK_SEQPACKET, one JSON message a packet: a packet
// arrives whole or not at all, with its file descriptors, and the end of the
// peer shows as the end of the stream.

// request is what a creator or a relay asks of PID 1.
type request struct {
	Op   string   `json:"op"` // run, open-pid, tell-pid
	Args []string `json:"args,omitempty"`
	Env  []string `json:"env,omitempty"`
	PID  int      `json:"pid,omitempty"`
	// While a command runs, its relay sends these:
	Signal int `json:"signal,omitempty"`
}

// reply is PID 1's answer.
type reply struct {
	Error    string `json:"error,omitempty"`
	NotFound bool   `json:"not_found,omitempty"` // the command could not be started
	PID      int    `json:"pid,omitempty"`
	Exited   bool   `json:"exited,omitempty"`
	Code     int    `json:"code,omitempty"`
	Signal   int    `json:"signal,omitempty"`
}

// bootConfig tells a PID 1 what to become.
type bootConfig struct {
	Name     string        `json:"name"`
	Dir      string        `json:"dir,omitempty"`    // holds upper, work and merged; "" keeps the machine's file system
	RootFS   string        `json:"rootfs,omitempty"` // overlay's lower directory
	BootID   string        `json:"boot_id,omitempty"`
	Hosts    string        `json:"hosts,omitempty"` // content of /etc/hosts
	Cgroups  []cgroupMount `json:"cgroups,omitempty"`
	NewNet   bool          `json:"new_net,omitempty"`
	LeafInit bool          `json:"leaf_init,omitempty"`
}

// maxPacket is what the kernel's default socket buffer takes.
const maxPacket = 200 << 10

func sendPacket(c *net.UnixConn, v any, fds ...int) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) > maxPacket {
		return fmt.Errorf("message of %d bytes is longer than %d: shorten arguments and environment", len(b), maxPacket)
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if _, _, err := c.WriteMsgUnix(b, oob, nil); err != nil {
		if errors.Is(err, unix.EMSGSIZE) {
			return fmt.Errorf("message of %d bytes does not fit a packet: shorten arguments and environment: %w", len(b), err)
		}
		return err
	}
	return nil
}

// receivePacket returns io.EOF when the peer is gone.
func receivePacket(c *net.UnixConn, v any) ([]*os.File, error) {
	b := make([]byte, maxPacket)
	oob := make([]byte, unix.CmsgSpace(4*253)) // SCM_MAX_FD
	n, oobn, flags, _, err := c.ReadMsgUnix(b, oob)
	if err != nil {
		if errors.Is(err, unix.ECONNRESET) {
			err = io.EOF
		}
		return nil, err
	}
	if n == 0 {
		return nil, io.EOF
	}
	files, err := receivedFiles(oob[:oobn])
	if err != nil {
		return nil, err
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		err = errors.New("packet was cut short: the peer is of another version")
	} else {
		err = json.Unmarshal(b[:n], v)
	}
	if err != nil {
		closeAll(files)
		return nil, err
	}
	return files, nil
}

func receivedFiles(oob []byte) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("control message of a packet is malformed: %w", err)
	}
	var files []*os.File
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			// net.UnixConn reads with MSG_CMSG_CLOEXEC.
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// packetConn makes a connection of an inherited socket.
func packetConn(f *os.File) (*net.UnixConn, error) {
	c, err := net.FileConn(f)
	_ = f.Close()
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		_ = c.Close()
		return nil, fmt.Errorf("inherited file is a %T, not a unix socket: start this only through package testhost", c)
	}
	return u, nil
}
