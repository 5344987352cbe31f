package bypass

import (
	"bytes"
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// option is one that a program may set before it connects.
type option struct{ level, name, size int }

// anyFamily are carried from the container's socket to the host's; each costs a system call for a connection, so what hardly anybody sets before connecting is not among them.
var anyFamily = []option{
	{unix.IPPROTO_TCP, unix.TCP_NODELAY, 4},
	{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 4},
	{unix.IPPROTO_TCP, unix.TCP_CONGESTION, 16},
	{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 4},
	{unix.SOL_SOCKET, unix.SO_LINGER, 8},
	{unix.SOL_SOCKET, unix.SO_RCVTIMEO, 16},
	{unix.SOL_SOCKET, unix.SO_SNDTIMEO, 16},
	{unix.IPPROTO_IP, unix.IP_TOS, 4},
}

// keepalive are carried where SO_KEEPALIVE is set.
var keepalive = []option{{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 4}, {unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 4}, {unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 4}}

// v6Only are carried for AF_INET6 as well.
var v6Only = []option{
	{unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 4},
	{unix.IPPROTO_IPV6, unix.IPV6_TCLASS, 4},
}

// carrier carries options. It knows what a socket of the host has by itself, so that only what differs is set.
type carrier struct {
	v6    []option
	fresh map[int]map[option][]byte // by address family
}

func newCarrier() *carrier {
	c := &carrier{v6: append(append([]option(nil), anyFamily...), v6Only...), fresh: map[int]map[option][]byte{}}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		if err != nil {
			continue // a host without IPv6: there will be no such sockets
		}
		c.fresh[family] = map[option][]byte{}
		for _, o := range c.options(family) {
			var buf [16]byte
			if v, ok := o.get(fd, &buf); ok {
				c.fresh[family][o] = bytes.Clone(v)
			}
		}
		unix.Close(fd)
	}
	return c
}

func (c *carrier) options(family int) []option {
	if family == unix.AF_INET6 {
		return c.v6
	}
	return anyFamily
}

// carry sets on to what from has set. What to refuses, such as a congestion control that the host does not let users have, stays as it is: a default, not an error that the program did not ask for.
func (c *carrier) carry(from, to, family int) {
	fresh := c.fresh[family]
	for _, o := range c.options(family) {
		var buf [16]byte
		if v, ok := o.get(from, &buf); ok && !bytes.Equal(v, fresh[o]) {
			o.set(to, v)
			if o.name == unix.SO_KEEPALIVE && o.level == unix.SOL_SOCKET {
				carryAll(keepalive, from, to)
			}
		}
	}
	// Sizes that were asked for; the kernel tells twice what was set. Without SO_BUF_LOCK (Linux 5.16) both kernels' autotuning decides.
	if locked, err := unix.GetsockoptInt(from, unix.SOL_SOCKET, unix.SO_BUF_LOCK); err == nil && locked != 0 {
		for bit, name := range map[int]int{sendLocked: unix.SO_SNDBUF, receiveLocked: unix.SO_RCVBUF} {
			if n, err := unix.GetsockoptInt(from, unix.SOL_SOCKET, name); err == nil && locked&bit != 0 {
				_ = unix.SetsockoptInt(to, unix.SOL_SOCKET, name, n/2)
			}
		}
	}
}

func carryAll(os []option, from, to int) {
	for _, o := range os {
		var buf [16]byte
		if v, ok := o.get(from, &buf); ok {
			o.set(to, v)
		}
	}
}

// Bits of SO_BUF_LOCK, as linux/sock.h has them.
const (
	sendLocked    = 1
	receiveLocked = 2
)

func (o option) get(fd int, buf *[16]byte) ([]byte, bool) {
	n := uint32(o.size)
	_, _, no := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(o.level), uintptr(o.name), uintptr(unsafe.Pointer(buf)), uintptr(unsafe.Pointer(&n)), 0)
	return buf[:min(int(n), o.size)], no == 0
}

func (o option) set(fd int, v []byte) {
	_, _, _ = unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(o.level), uintptr(o.name), uintptr(unsafe.Pointer(&v[0])), uintptr(len(v)), 0)
}

// socketState is what decides about a socket.
type socketState struct {
	tcp    bool // and then the rest is known
	family int
	state  uint8 // TCP_CLOSE and the like
	bound  bool  // to an address or port of its own
	host   bool  // of the host's network namespace: one that was handed over
}

// Of net/tcp_states.h.
const (
	tcpSynSent = 2
	tcpSynRecv = 3
	tcpClose   = 7
)

// look reads fd's state; hostCookie names the host's network namespace. What cannot be read counts as a socket of the host, which has the fewest rights.
func look(fd int, hostCookie uint64) (st socketState) {
	protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err != nil || protocol != unix.IPPROTO_TCP {
		return st
	}
	if st.family, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil || st.family != unix.AF_INET && st.family != unix.AF_INET6 {
		return st
	}
	st.tcp = true
	cookie, err := netnsCookie(fd)
	st.host = err != nil || cookie == hostCookie
	var buf [16]byte
	if v, ok := (option{unix.IPPROTO_TCP, unix.TCP_INFO, 1}).get(fd, &buf); ok && len(v) == 1 {
		st.state = v[0]
	}
	switch sa, _ := unix.Getsockname(fd); sa := sa.(type) {
	case *unix.SockaddrInet4:
		st.bound = sa.Port != 0 || sa.Addr != [4]byte{}
	case *unix.SockaddrInet6:
		st.bound = sa.Port != 0 || sa.Addr != [16]byte{}
	default:
		st.bound = true
	}
	return st
}

// netnsCookie is the number of fd's network namespace; it is never used twice.
func netnsCookie(fd int) (uint64, error) {
	var buf [16]byte
	o := option{unix.SOL_SOCKET, unix.SO_NETNS_COOKIE, 8}
	v, ok := o.get(fd, &buf)
	if !ok || len(v) != 8 {
		return 0, unix.ENOPROTOOPT
	}
	return binary.NativeEndian.Uint64(v), nil
}
