package nat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"unsafe"

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

// connect starts a nonblocking connect to dst, from an address and port of the kernel's choice or, when port is not 0, from that port. done says that
// it is complete already, which is the case for services on this machine; then no wake-up is needed.
func connect(dst netip.AddrPort, port uint16) (fd int, done bool, err error) {
	sa, family, err := tcpSockaddr(dst)
	if err != nil {
		return -1, false, err
	}
	fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, false, err
	}
	// A port that was bound with this may be bound again while its old connection is in TIME-WAIT; see recycler.
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if port != 0 {
		if err := bindPort(fd, family, port); err != nil {
			unix.Close(fd)
			return -1, false, errPortTaken
		}
	}
	if err = unix.Connect(fd, sa); errors.Is(err, unix.EINPROGRESS) {
		// On the way back from that call the kernel has taken in whatever a local peer answered at once; asking again tells.
		err = unix.Connect(fd, sa)
	}
	switch {
	case err == nil, errors.Is(err, unix.EISCONN):
		return fd, true, nil
	case errors.Is(err, unix.EALREADY), errors.Is(err, unix.EINPROGRESS):
		return fd, false, nil
	case errors.Is(err, unix.EADDRNOTAVAIL) && port != 0:
		err = errPortTaken
	}
	unix.Close(fd)
	return -1, false, err
}

// errPortTaken says that connect could not have the port it was to connect from.
var errPortTaken = errors.New("source port is taken")

func bindPort(fd, family int, port uint16) error {
	if family == unix.AF_INET {
		return unix.Bind(fd, &unix.SockaddrInet4{Port: int(port)})
	}
	return unix.Bind(fd, &unix.SockaddrInet6{Port: int(port)})
}

// localAddr is the address and port that a socket is bound to. It asks the kernel itself: unix.Getsockname asks for the protocol as well, in a system call of its own.
func localAddr(fd int) netip.AddrPort {
	var sa unix.RawSockaddrInet6 // the longer one; the port is in the same place in both
	n := uint32(unsafe.Sizeof(sa))
	if _, _, e := unix.RawSyscall(unix.SYS_GETSOCKNAME, uintptr(fd), uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&n))); e != 0 {
		return netip.AddrPort{}
	}
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&sa.Port))[:])
	switch sa.Family {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(&sa)).Addr), port)
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), port)
	}
	return netip.AddrPort{}
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

func noDelay(fd int) { unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) }

func keepAlive(fd int) {
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, keepIdle)
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, keepInterval)
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepCount)
}

// sysRead and sysWrite are recv(2) and send(2) on a nonblocking socket. They do not tell the runtime, which would otherwise take the processor away from the thread when
// the copying takes more than 20 µs, and wake another thread for it.

func sysRead(fd int, b []byte) (int, error) {
	return rawIO(unix.SYS_RECVFROM, fd, b, unix.MSG_DONTWAIT)
}

func sysWrite(fd int, b []byte) (int, error) {
	return rawIO(unix.SYS_SENDTO, fd, b, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
}

func rawIO(call uintptr, fd int, b []byte, flags uintptr) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	for {
		n, _, e := unix.RawSyscall6(call, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), flags, 0, 0)
		switch e {
		case 0:
			return int(n), nil
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return 0, unix.EAGAIN // without an allocation
		}
		return 0, e
	}
}
