package testhost

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Every pool uses the same addresses: its network namespace has no way out,
// and none in. What the machine itself has to say to the server goes through
// Pool.DialContext.
var (
	bridgeAddr   = netip.MustParseAddr("10.77.0.1")
	subnetPrefix = 24
)

const (
	bridgeName = "br0"
	maxHosts   = 250
)

// inNetNS runs f on a thread in the network namespace of a process. The
// goroutine ends locked, so that the runtime throws the thread away.
func inNetNS(pid int, f func() error) error {
	failed := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		failed <- func() error {
			fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/net", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return fmt.Errorf("PID 1 (process %d) is gone: %w", pid, err)
			}
			defer unix.Close(fd)
			if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("cannot enter the network namespace of process %d: %w: root is needed", pid, err)
			}
			return f()
		}()
	}()
	return <-failed
}

func linkUp(name string, addr netip.Addr) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("no link %s: %w", name, err)
	}
	if addr.IsValid() {
		a := &netlink.Addr{IPNet: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(subnetPrefix, addr.BitLen())}}
		if err := netlink.AddrAdd(link, a); err != nil {
			return fmt.Errorf("cannot give %s the address %s: %w", name, addr, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("cannot bring %s up: %w", name, err)
	}
	return nil
}

// makeBridge builds the pool's network in the pool's namespace.
func makeBridge(pid int) error {
	return inNetNS(pid, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = bridgeName
		// Without one of its own the bridge takes a port's, and changes it as
		// hosts come and go, which neighbours' caches then have wrong.
		attrs.HardwareAddr = net.HardwareAddr{0x02, 0x00, 0x0a, 0x4d, 0x00, 0x01}
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return fmt.Errorf("cannot make a bridge: %w: the kernel needs the module bridge", err)
		}
		if err := linkUp("lo", netip.Addr{}); err != nil {
			return err
		}
		return linkUp(bridgeName, bridgeAddr)
	})
}

// plug connects a host to the bridge. The pair is born with one end in either
// namespace; the machine's own never sees it.
func plug(poolPID, hostPID int, addr netip.Addr) error {
	ns, err := unix.Open(fmt.Sprintf("/proc/%d/ns/net", hostPID), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("PID 1 of the host (process %d) is gone: %w", hostPID, err)
	}
	defer unix.Close(ns)
	err = inNetNS(poolPID, func() error {
		bridge, err := netlink.LinkByName(bridgeName)
		if err != nil {
			return fmt.Errorf("the pool has no bridge: %w", err)
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = fmt.Sprintf("h%d", addr.As4()[3])
		attrs.MasterIndex = bridge.Attrs().Index
		if old, err := netlink.LinkByName(attrs.Name); err == nil {
			// Of an earlier boot: the kernel clears dead namespaces later.
			_ = netlink.LinkDel(old)
		}
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns)}); err != nil {
			return fmt.Errorf("cannot make a veth pair: %w: the kernel needs the module veth", err)
		}
		return linkUp(attrs.Name, netip.Addr{})
	})
	if err != nil {
		return err
	}
	return inNetNS(hostPID, func() error {
		if err := linkUp("lo", netip.Addr{}); err != nil {
			return err
		}
		return linkUp("eth0", addr)
	})
}

// DialContext connects from the pool's network namespace, where the server
// listens, so that the creator can talk to it. The address must be numeric: a
// name would be looked up on the machine. It fits grpc.WithContextDialer and
// http.Transport.
func (p *Pool) DialContext(ctx context.Context, network, address string) (conn net.Conn, err error) {
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("address %q is not numeric: give the address and port (%w)", address, err)
	}
	err = inNetNS(p.box.pid(), func() error {
		// With one numeric address the dialer makes its socket on this thread.
		var d net.Dialer
		conn, err = d.DialContext(ctx, network, address)
		return err
	})
	if err != nil {
		return nil, err
	}
	return conn, nil
}
