package bypass

import (
	"bytes"
	"encoding/binary"
	"fmt"
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
	{unix.SOL_SOCKET, unix.SO_OOBINLINE, 4},
	{unix.SOL_SOCKET, unix.SO_ZEROCOPY, 4}, // without it the completions that a program waits for do not come
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

func (o option) read(fd int, buf *[16]byte) ([]byte, error) {
	n := uint32(o.size)
	_, _, no := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(o.level), uintptr(o.name), uintptr(unsafe.Pointer(buf)), uintptr(unsafe.Pointer(&n)), 0)
	if no != 0 {
		return nil, no
	}
	return buf[:min(int(n), o.size)], nil
}

func (o option) get(fd int, buf *[16]byte) ([]byte, bool) {
	v, err := o.read(fd, buf)
	return v, err == nil
}

func (o option) set(fd int, v []byte) {
	_, _, _ = unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(o.level), uintptr(o.name), uintptr(unsafe.Pointer(&v[0])), uintptr(len(v)), 0)
}

// socketState is what decides about a socket.
type socketState struct {
	network uint64 // the cookie of its network namespace
	unix    bool   // of AF_UNIX
	tcp     bool   // and then the rest is known
	family  int
	state   uint8 // TCP_CLOSE and the like
	chosen  bool  // bound to an address, port or interface, or marked, by whoever made it: the way it is to take is not the usual one
}

// Of net/tcp_states.h.
const (
	tcpSynSent = 2
	tcpSynRecv = 3
	tcpClose   = 7
)

// look reads fd's state. An error means that fd is no socket.
func look(fd int) (st socketState, err error) {
	if st.network, err = netnsCookie(fd); err != nil {
		return st, err
	}
	protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err != nil || protocol != unix.IPPROTO_TCP {
		domain, derr := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
		st.unix = derr == nil && domain == unix.AF_UNIX
		return st, err
	}
	switch sa, _ := unix.Getsockname(fd); sa := sa.(type) {
	case *unix.SockaddrInet4:
		st.family, st.chosen = unix.AF_INET, sa.Port != 0 || sa.Addr != [4]byte{}
	case *unix.SockaddrInet6:
		st.family, st.chosen = unix.AF_INET6, sa.Port != 0 || sa.Addr != [16]byte{}
	default:
		return st, nil
	}
	st.tcp = true
	st.state = tcpState(fd)
	for _, name := range []int{unix.SO_BINDTOIFINDEX, unix.SO_MARK} {
		if v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, name); err != nil || v != 0 {
			st.chosen = true
		}
	}
	return st, nil
}

// tcpState is a number of net/tcp_states.h; 0 if it cannot be read, which is none.
func tcpState(fd int) uint8 {
	var buf [16]byte
	if v, ok := (option{unix.IPPROTO_TCP, unix.TCP_INFO, 1}).get(fd, &buf); ok && len(v) == 1 {
		return v[0]
	}
	return 0
}

func connecting(state uint8) bool { return state == tcpSynSent || state == tcpSynRecv }

// Network is the number of the network namespace that the calling thread is in, which a Supervisor has to know.
func Network() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return 0, fmt.Errorf("open a TCP socket: %w; a sandbox around patchbay refuses it", err)
	}
	defer unix.Close(fd)
	cookie, err := netnsCookie(fd)
	if err != nil {
		return 0, fmt.Errorf("number of the network namespace (SO_NETNS_COOKIE): %w; it needs Linux 5.14 or newer", err)
	}
	return cookie, nil
}

// socketCookie is fd's own number; it is never used twice. 0 is none.
func socketCookie(fd int) uint64 {
	var buf [16]byte
	v, ok := option{unix.SOL_SOCKET, unix.SO_COOKIE, 8}.get(fd, &buf)
	if !ok || len(v) != 8 {
		return 0
	}
	return binary.NativeEndian.Uint64(v)
}

// netnsCookie is the number of fd's network namespace; it is never used twice.
func netnsCookie(fd int) (uint64, error) {
	var buf [16]byte
	o := option{unix.SOL_SOCKET, unix.SO_NETNS_COOKIE, 8}
	v, err := o.read(fd, &buf)
	if err != nil {
		return 0, err
	}
	if len(v) != 8 {
		return 0, unix.ENOPROTOOPT
	}
	return binary.NativeEndian.Uint64(v), nil
}
