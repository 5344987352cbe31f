package mmsg

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Msg is struct mmsghdr. N is how many bytes were sent or received.
type Msg struct {
	Hdr unix.Msghdr
	N   uint32
}

// Send sends ms on fd, in order, and returns how many went out. An error means that the first did not; one that happens later is returned
// by the next call, if at all. EINTR is the caller's to repeat, EAGAIN says that the socket's buffer is full. ms is not empty.
func Send(fd int, ms []Msg) (int, unix.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(ms))), uintptr(len(ms)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
	return int(n), e
}

// Recv receives what fd has into ms, at most len(ms) messages, and returns how many. flags are added to MSG_DONTWAIT. EAGAIN says that there is
// nothing. ms is not empty.
func Recv(fd int, ms []Msg, flags int) (int, unix.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(ms))), uintptr(len(ms)), uintptr(unix.MSG_DONTWAIT|flags), 0, 0)
	return int(n), e
}

// Iovec is b as the kernel wants it. b may be empty.
func Iovec(b []byte) (v unix.Iovec) {
	v.Base = unsafe.SliceData(b)
	v.SetLen(len(b))
	return v
}

// Sockaddr is a struct sockaddr_in or sockaddr_in6.
type Sockaddr [unix.SizeofSockaddrInet6]byte

// Put writes ap for a socket of family AF_INET6 (v6) or AF_INET and returns the length. An IPv4 address on an IPv6 socket is written v4-mapped; ap must
// not be IPv6 for an IPv4 socket. scope is the interface's number for a link-local address, else 0.
func (s *Sockaddr) Put(ap netip.AddrPort, v6 bool, scope uint32) uint32 {
	clear(s[:])
	binary.BigEndian.PutUint16(s[2:], ap.Port())
	if !v6 {
		binary.NativeEndian.PutUint16(s[0:], unix.AF_INET)
		a := ap.Addr().As4()
		copy(s[4:8], a[:])
		return unix.SizeofSockaddrInet4
	}
	binary.NativeEndian.PutUint16(s[0:], unix.AF_INET6)
	a := ap.Addr().As16()
	copy(s[8:24], a[:])
	binary.NativeEndian.PutUint32(s[24:], scope)
	return unix.SizeofSockaddrInet6
}

// Get reads the address: v4-mapped ones come out as IPv4, scopes are left out. ok is false for another family.
func (s *Sockaddr) Get() (ap netip.AddrPort, ok bool) {
	port := binary.BigEndian.Uint16(s[2:])
	switch binary.NativeEndian.Uint16(s[0:]) {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(s[4:8])), port), true
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(s[8:24])).Unmap(), port), true
	}
	return netip.AddrPort{}, false
}

// ControlLen is room for all control messages of one message, in bytes with their padding: of two integers and a packet info at least.
const ControlLen = 128

// Control is a buffer of control messages. It is made of words because the kernel's headers want to be aligned.
type Control struct {
	w [ControlLen / 8]uint64
	n int
}

// Bytes is the whole buffer.
func (c *Control) Bytes() []byte { return unsafe.Slice((*byte)(unsafe.Pointer(&c.w)), ControlLen) }

// Reset empties the buffer.
func (c *Control) Reset() { c.n = 0 }

// Add appends a control message of n bytes and returns where they go. It panics when there is no room.
func (c *Control) Add(level, typ, n int) []byte {
	h := (*unix.Cmsghdr)(unsafe.Pointer(&c.Bytes()[c.n]))
	h.Level, h.Type = int32(level), int32(typ)
	h.SetLen(unix.CmsgLen(n))
	d := c.Bytes()[c.n+unix.CmsgLen(0):][:n]
	c.n += unix.CmsgSpace(n)
	return d
}

// Attach makes the control messages those of h.
func (c *Control) Attach(h *unix.Msghdr) {
	h.Control = nil
	if c.n > 0 {
		h.Control = &c.Bytes()[0]
	}
	h.SetControllen(c.n)
}

// Next takes the first control message off b, what Recv left in a buffer. ok is false when there is none, or b is no such thing.
func Next(b []byte) (level, typ int, data, rest []byte, ok bool) {
	if len(b) < unix.SizeofCmsghdr {
		return 0, 0, nil, nil, false
	}
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	n := int(h.Len)
	if n < unix.CmsgLen(0) || n > len(b) {
		return 0, 0, nil, nil, false
	}
	return int(h.Level), int(h.Type), b[unix.CmsgLen(0):n], b[min(len(b), unix.CmsgSpace(n-unix.CmsgLen(0))):], true
}
