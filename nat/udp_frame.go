package nat

import (
	"encoding/binary"
	"net/netip"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// headroom is what every receive buffer keeps free in front of the payload, so that the headers of the frame are written where they
// belong and the payload is never copied: Ethernet, the longer IP header, UDP, and two bytes that leave the payload 8-byte aligned.
const headroom = wire.EthernetLen + wire.IPv6Len + wire.UDPLen + 2

// defaultTTL is the time to live of what the gateway makes itself, and what Linux gives a datagram when nobody asks otherwise.
const defaultTTL = 64

// ipHdrLen is the length of the header without options of a's IP version.
func ipHdrLen(a netip.Addr) int {
	if a.Is4() {
		return wire.IPv4Len
	}
	return wire.IPv6Len
}

// putIP writes the IP header for payload bytes of proto at the start of b.
func putIP(b []byte, src, dst netip.Addr, proto, tos, ttl uint8, payload int, id uint16, df bool) int {
	if src.Is4() {
		return wire.PutIPv4(b, src, dst, proto, tos, ttl, wire.IPv4Len+payload, id, df)
	}
	return wire.PutIPv6(b, src, dst, proto, tos, ttl, payload)
}

// udpFrame makes the frame of the n payload bytes at buf[headroom:] by writing headers in front of them. With 0 < seg < n it is a
// superframe of datagrams of seg bytes. The checksum is left to finish, as its header says.
func udpFrame(buf []byte, n int, src, dst netip.AddrPort, tos uint8, seg int) frame.Frame {
	ipLen := ipHdrLen(src.Addr())
	start := headroom - wire.UDPLen - ipLen - wire.EthernetLen
	data := buf[start : headroom+n]
	l4 := wire.EthernetLen + ipLen
	u := data[l4 : l4+wire.UDPLen]
	putIP(data[wire.EthernetLen:l4], src.Addr(), dst.Addr(), wire.ProtoUDP, tos, defaultTTL, wire.UDPLen+n, 0, true)
	binary.BigEndian.PutUint16(u[0:], src.Port())
	binary.BigEndian.PutUint16(u[2:], dst.Port())
	binary.BigEndian.PutUint16(u[4:], uint16(wire.UDPLen+n))
	binary.BigEndian.PutUint16(u[6:], wire.Fold(wire.PseudoSum(src.Addr(), dst.Addr(), wire.ProtoUDP, wire.UDPLen+n)))
	f := frame.Frame{Data: data, Hdr: wire.VirtioNetHdr{
		Flags: wire.VirtioNeedsCsum, HdrLen: uint16(l4 + wire.UDPLen), CsumStart: uint16(l4), CsumOffset: 6,
	}}
	if seg > 0 && seg < n {
		f.Hdr.GSOType, f.Hdr.GSOSize = wire.GSOUDPL4, uint16(seg)
	}
	return f
}

// finishUDP completes the checksum that udpFrame left open.
func finishUDP(f *frame.Frame) {
	u := f.Data[f.Hdr.CsumStart:]
	sum := ^wire.Fold(wire.Sum(u, 0)) // the field holds the pseudo-header's sum
	if sum == 0 {
		sum = 0xffff // RFC 768: zero on the wire means none
	}
	binary.BigEndian.PutUint16(u[6:], sum)
	f.Hdr = wire.VirtioNetHdr{}
}

// fragRoom is how many bytes of scratch appendFragments needs for an IP packet of n bytes on a network of the given MTU.
func fragRoom(n, mtu int) int {
	const perFrag = wire.EthernetLen + wire.IPv6Len + 8
	return n + perFrag*(n/max(8, (mtu-wire.IPv6Len-8)&^7)+2)
}

// appendFragments cuts the finished packet of f, whose IP header has no options or extension headers, into fragments for mtu (at least
// 68 for IPv4, 1280 for IPv6; RFC 791, RFC 8200 §4.5) and appends their frames to fs. Their bytes are in room, which has fragRoom bytes; what
// is left of it is returned.
func appendFragments(fs []frame.Frame, room []byte, f *frame.Frame, mtu int, id uint32) ([]frame.Frame, []byte) {
	ip := f.Data[wire.EthernetLen:]
	v4 := ip[0]>>4 == 4
	hdr, extra := wire.IPv4Len, 0
	if !v4 {
		hdr, extra = wire.IPv6Len, 8
	}
	payload := ip[hdr:]
	chunk := (mtu - hdr - extra) &^ 7
	for off := 0; off < len(payload); off += chunk {
		n := min(chunk, len(payload)-off)
		more := uint16(0)
		if off+n < len(payload) {
			more = 1
		}
		l4 := wire.EthernetLen + hdr + extra
		d := room[: l4+n : l4+n]
		room = room[l4+n:]
		copy(d[wire.EthernetLen:], ip[:hdr])
		h := d[wire.EthernetLen:]
		if v4 {
			binary.BigEndian.PutUint16(h[2:], uint16(hdr+n))
			binary.BigEndian.PutUint16(h[4:], uint16(id))
			binary.BigEndian.PutUint16(h[6:], more<<13|uint16(off/8))
			h[10], h[11] = 0, 0
			binary.BigEndian.PutUint16(h[10:], ^wire.Fold(wire.Sum(h[:hdr], 0)))
		} else {
			binary.BigEndian.PutUint16(h[4:], uint16(extra+n))
			h[40], h[41] = h[6], 0
			h[6] = 44 // fragment header
			binary.BigEndian.PutUint16(h[42:], uint16(off)|more)
			binary.BigEndian.PutUint32(h[44:], id)
		}
		copy(d[l4:], payload[off:off+n])
		fs = append(fs, frame.Frame{Data: d})
	}
	return fs, room
}

// icmpQuote is how much of the packet that failed an ICMP error repeats, IP header included, so that the whole stays within what every
// link carries (RFC 1812 §4.3.2.3: 576 bytes; RFC 4443 §2.4: 1280).
const (
	icmpQuote4 = 576 - wire.IPv4Len - wire.ICMPLen
	icmpQuote6 = 1280 - wire.IPv6Len - wire.ICMPLen
)

// icmpErrorRoom is the longest frame that icmpError makes.
const icmpErrorRoom = wire.EthernetLen + 1280

// icmpError is an ICMP or ICMPv6 error as a container sees it.
type icmpError struct {
	from       netip.Addr     // who says so
	typ, code  uint8          // of from's IP version
	rest       uint32         // second word of the ICMP header: the MTU of "too big"
	proto      uint8          // of the packet that failed: UDP, ICMP or ICMPv6
	ttl        uint8          // what was left of it
	src, dst   netip.AddrPort // of the packet that failed, as the container sent it
	transport  [8]byte        // its first 8 bytes behind the IP header
	data       []byte         // what followed those, as far as it is known
	dataLength int            // how much followed in truth
}

// put writes the error into b, which has icmpErrorRoom bytes, and returns its frame.
func (e *icmpError) put(b []byte) frame.Frame {
	v4 := e.from.Is4()
	hdr, room, proto := wire.IPv6Len, icmpQuote6, wire.ProtoICMPv6
	if v4 {
		hdr, room, proto = wire.IPv4Len, icmpQuote4, wire.ProtoICMP
	}
	inner := e.data[:min(len(e.data), room-hdr-8)]
	n := wire.ICMPLen + hdr + 8 + len(inner)
	b = b[:wire.EthernetLen+hdr+n]
	putIP(b[wire.EthernetLen:], e.from, e.src.Addr(), proto, 0xc0, defaultTTL, n, 0, true) // RFC 1812 §4.3.2.5: precedence 6
	m := b[wire.EthernetLen+hdr:]
	m[0], m[1], m[2], m[3] = e.typ, e.code, 0, 0
	binary.BigEndian.PutUint32(m[4:], e.rest)
	q := m[wire.ICMPLen:]
	putIP(q, e.src.Addr(), e.dst.Addr(), e.proto, 0, e.ttl, 8+e.dataLength, 0, true)
	copy(q[hdr:], e.transport[:])
	copy(q[hdr+8:], inner)
	var acc uint64
	if !v4 {
		acc = wire.PseudoSum(e.from, e.src.Addr(), proto, n)
	}
	binary.BigEndian.PutUint16(m[2:], ^wire.Fold(wire.Sum(m, acc)))
	return frame.Frame{Data: b}
}
