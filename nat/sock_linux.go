package nat

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"
)

// Keepalive of host sockets: a peer that is gone is noticed within about three minutes of silence. It is switched on only for flows that
// have lived for a while (see tcpNAT.sweep), because most do not live long enough to need its four system calls.
const (
	keepIdle     = 75 // seconds
	keepInterval = 15 // seconds
	keepCount    = 8
)

// tcpSockaddr turns a into what the kernel takes, and its family.
func tcpSockaddr(a netip.AddrPort) (unix.Sockaddr, int, error) {
	if ip := a.Addr().Unmap(); ip.Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: ip.As4()}, unix.AF_INET, nil
	}
	sa := &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
	if z := a.Addr().Zone(); z != "" {
		if n, err := strconv.ParseUint(z, 10, 32); err == nil {
			sa.ZoneId = uint32(n)
		} else if i, err := net.InterfaceByName(z); err == nil {
			sa.ZoneId = uint32(i.Index)
		} else {
			return nil, 0, fmt.Errorf("no interface %q", z)
		}
	}
	return sa, unix.AF_INET6, nil
}

// addrPort is the inverse of tcpSockaddr: IPv4-mapped addresses come out as IPv4, zones are left out.
func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// connect starts a nonblocking connect to dst from an address and port of the kernel's choice. done says that it is complete already, which is the case
// for services on this machine; then no wake-up is needed.
func connect(dst netip.AddrPort) (fd int, done bool, err error) {
	sa, family, err := tcpSockaddr(dst)
	if err != nil {
		return -1, false, err
	}
	fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, false, err
	}
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	if err = unix.Connect(fd, sa); err == unix.EINPROGRESS {
		// On the way back from that call the kernel has taken in whatever a local peer answered at once; asking again tells.
		err = unix.Connect(fd, sa)
	}
	switch err {
	case nil, unix.EISCONN:
		if isSelfConnect(fd) {
			unix.Close(fd)
			return -1, false, unix.ECONNREFUSED
		}
		return fd, true, nil
	case unix.EALREADY, unix.EINPROGRESS:
		return fd, false, nil
	}
	unix.Close(fd)
	return -1, false, err
}

// isSelfConnect reports whether the socket is connected to itself, which TCP's simultaneous open does when a connect to a port of this
// host that nobody listens on happens to be given that very port as its source.
func isSelfConnect(fd int) bool {
	l, err1 := unix.Getsockname(fd)
	if err1 != nil {
		return false
	}
	r, err2 := unix.Getpeername(fd)
	return err2 == nil && addrPort(l) == addrPort(r)
}

// sockErr takes the pending error of a socket.
func sockErr(fd int) error {
	n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return err
	}
	if n != 0 {
		return unix.Errno(n)
	}
	return nil
}

// resetSock makes the coming close send RST instead of FIN.
func resetSock(fd int) {
	unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
}

func keepAlive(fd int) {
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, keepIdle)
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, keepInterval)
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepCount)
}
