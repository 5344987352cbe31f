package wire

import "encoding/binary"

// Bounds on what a superframe from a container may ask for.
const (
	// MinTCPSegment is the smallest GSOSize of a TCP superframe in bytes: Linux's TCP_MIN_GSO_SIZE, the least MSS less the
	// longest options. It bounds how many segments one frame can become.
	MinTCPSegment = 8
	// MaxUDPSegments is how many datagrams a UDP superframe may become: Linux's UDP_MAX_SEGMENTS.
	MaxUDPSegments = 128
	// MaxHeaders is the most bytes from the start of a frame to the end of the headers of a superframe, or to the end of the checksum
	// field that is to be finished: the scratch a port needs to rewrite one. Ordinary TCP over IPv6 with options has 94.
	MaxHeaders = 512
)

// Validate checks the header of a frame that comes from outside (a container, a peer) against the frame itself, and makes it canonical.
// It is called once, where the frame enters; behind it every offset in h lies inside data and h says no more than data bears out. False means
// the frame is to be dropped (frame.DropBadHdr).
//
// A checksum to finish (VirtioNeedsCsum) lies behind the IP header, so that finishing it cannot change an address that was checked; for TCP,
// UDP and ICMPv6 right behind the IP header it is that protocol's own field. A superframe is one whole TCP segment or UDP
// datagram, not a fragment, whose IP length covers all of data, whose checksum is to be finished and which is cut into
// more than one and a bounded number of segments. IPv4 fragmentation of UDP by the device (GSOUDP) is refused.
//
// HdrLen is set to what the headers say for a superframe and to zero for any other frame. A superframe that fits in one segment is made a plain
// frame. Fields without meaning are zeroed.
func (h *VirtioNetHdr) Validate(data []byte) bool {
	if *h == (VirtioNetHdr{}) {
		return true
	}
	if h.Flags&^(VirtioNeedsCsum|VirtioDataValid) != 0 {
		return false
	}
	if h.Flags&VirtioNeedsCsum == 0 {
		// Linux never leaves a superframe's checksum finished, since each segment has another.
		if h.GSOType != GSONone {
			return false
		}
		*h = VirtioNetHdr{Flags: h.Flags}
		return true
	}
	start, field := int(h.CsumStart), int(h.CsumOffset)
	if start+field+2 > min(len(data), MaxHeaders) {
		return false
	}
	etherType, off, ok := Payload(data)
	if !ok || start < off {
		return false
	}
	if etherType != EtherTypeIPv4 && etherType != EtherTypeIPv6 {
		// A second VLAN tag, MPLS and the like: nothing there that an address filter reads. Linux cuts these itself.
		h.HdrLen, h.GSOSize = 0, 0
		return h.GSOType == GSONone
	}
	p, ok := spanIP(data[off:], etherType)
	if !ok {
		return false
	}
	l4 := off + p.hdr
	if h.GSOType != GSONone {
		return h.validateGSO(data, p, off)
	}
	h.HdrLen, h.GSOSize = 0, 0
	if start+field+2 > off+p.total {
		return false
	}
	if start == l4 && !p.frag {
		if want, known := ChecksumOff(p.proto); known {
			return field == want
		}
		return true
	}
	// A checksum deeper in the packet is that of something in a tunnel: Linux leaves the inner one to be finished.
	return start >= l4+UDPLen
}

// validateGSO is Validate for superframes. p is the packet at data[off:].
func (h *VirtioNetHdr) validateGSO(data []byte, p ipSpan, off int) bool {
	l4 := off + p.hdr
	if p.frag || off+p.total != len(data) || int(h.CsumStart) != l4 || h.GSOSize == 0 {
		return false
	}
	seg := data[l4:]
	size := int(h.GSOSize)
	switch h.GSO() {
	case GSOTCPv4, GSOTCPv6:
		if (h.GSO() == GSOTCPv4) != p.v4 || p.proto != ProtoTCP || h.CsumOffset != TCPChecksumOff {
			return false
		}
		if len(seg) < TCPLen {
			return false
		}
		hdr := int(seg[12]>>4) * 4
		if hdr < TCPLen || hdr > len(seg) {
			return false
		}
		if len(seg)-hdr <= size {
			break
		}
		if size < MinTCPSegment || seg[13]&(TCPSyn|TCPRst) != 0 {
			return false
		}
		h.HdrLen = uint16(l4 + hdr)
		return h.HdrLen <= MaxHeaders
	case GSOUDPL4:
		if h.GSOType != GSOUDPL4 || p.proto != ProtoUDP || h.CsumOffset != UDPChecksumOff {
			return false
		}
		u, ok := ParseUDP(seg)
		if !ok || u.Len != len(seg) {
			return false
		}
		if len(seg)-UDPLen <= size {
			break
		}
		if len(seg)-UDPLen > size*MaxUDPSegments {
			return false
		}
		h.HdrLen = uint16(l4 + UDPLen) // within MaxHeaders, since the checksum field is the header's end
		return true
	default:
		return false
	}
	h.GSOType, h.GSOSize, h.HdrLen = GSONone, 0, 0
	return true
}

// ipSpan is as much of IP as Validate asks for: it runs for nearly every frame that Linux sends, and IP has addresses.
type ipSpan struct {
	hdr, total int
	proto      uint8
	v4, frag   bool
}

// spanIP accepts what ParseIP accepts of the packet at the start of b, if its version is the one that etherType says.
func spanIP(b []byte, etherType uint16) (p ipSpan, ok bool) {
	if etherType == EtherTypeIPv4 {
		if len(b) < IPv4Len || b[0]>>4 != 4 {
			return p, false
		}
		p = ipSpan{
			hdr: int(b[0]&0xf) * 4, total: int(binary.BigEndian.Uint16(b[2:])), proto: b[9],
			v4: true, frag: binary.BigEndian.Uint16(b[6:])&0x3fff != 0,
		}
		return p, p.hdr >= IPv4Len && p.total >= p.hdr && p.total <= len(b) && Fold(Sum(b[:p.hdr], 0)) == 0xffff
	}
	if len(b) < IPv6Len || b[0]>>4 != 6 {
		return p, false
	}
	switch b[6] {
	case ProtoTCP, ProtoUDP, ProtoICMPv6:
		p = ipSpan{hdr: IPv6Len, total: IPv6Len + int(binary.BigEndian.Uint16(b[4:])), proto: b[6]}
		return p, p.total <= len(b)
	}
	ip, ok := parseIPv6(b, false)
	return ipSpan{hdr: ip.HdrLen, total: ip.Len, proto: ip.Proto, frag: ip.IsFragment()}, ok
}

// UnfinishedL4 reports whether the checksum that h leaves to be finished is that of the transport header at offset l4 of the frame. It is false
// for a finished frame, and for one where it belongs to something tunnelled deeper in, so that the transport header's own is complete.
func (h *VirtioNetHdr) UnfinishedL4(l4 int) bool {
	return h.Flags&VirtioNeedsCsum != 0 && int(h.CsumStart) == l4
}
