package tunnel

import (
	"encoding/binary"

	"patchbay/internal/wire"
	"patchbay/tunnel/vxlan"
)

// A kernel's vxlan device hands its packets on with what its link's device offers to do left undone. Where that link is no wire but a veth or a virtual
// machine's interface on this very host, nobody ever does it: the outer header is complete, the inner checksum holds the pseudo-header's sum alone, and
// a superframe arrives in one datagram. Nothing says so but the packet itself. The outer checksum has been verified, so the bytes are those that
// the peer sent, and what is left undone is written into the frame's header, as on a frame from a TAP.

// unfinished is what is left to be done to an inner frame, which is the zero header for nearly all. mtu is the longest inner IP packet that the peer should
// send in one piece; size is the segment size where the kernel told it, or 0.
//
// One finished packet in 65,536 looks unfinished, since its checksum happens to be what an unfinished one would hold. Finishing it yields the
// same checksum.
func unfinished(data []byte, mtu, size int) (h wire.VirtioNetHdr) {
	etherType, off, ok := wire.Payload(data)
	if !ok {
		return h
	}
	ip := data[off:]
	var proto uint8
	var hdr, total int
	var sum uint64
	switch {
	case etherType == wire.EtherTypeIPv4 && len(ip) >= wire.IPv4Len && ip[0] == 0x45 && binary.BigEndian.Uint16(ip[6:])&0x3fff == 0:
		proto, hdr, total = ip[9], wire.IPv4Len, int(binary.BigEndian.Uint16(ip[2:]))
		sum = uint64(binary.BigEndian.Uint32(ip[12:])) + uint64(binary.BigEndian.Uint32(ip[16:]))
	case etherType == wire.EtherTypeIPv6 && len(ip) >= wire.IPv6Len:
		proto, hdr, total = ip[6], wire.IPv6Len, wire.IPv6Len+int(binary.BigEndian.Uint16(ip[4:]))
		if proto == wire.ProtoTCP || proto == wire.ProtoUDP {
			sum = wire.Sum(ip[8:wire.IPv6Len], 0)
		}
	}
	field, known := wire.TCPChecksumOff, proto == wire.ProtoTCP || proto == wire.ProtoUDP
	if proto == wire.ProtoUDP {
		field = wire.UDPChecksumOff
	}
	if !known || total > len(ip) || hdr+field+2 > total {
		return h
	}
	if binary.BigEndian.Uint16(ip[hdr+field:]) != wire.Fold(sum+uint64(proto)+uint64(total-hdr)) {
		return h
	}
	h = wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum, CsumStart: uint16(off + hdr), CsumOffset: uint16(field)}
	if total <= mtu {
		return h
	}
	l4 := ip[hdr:total]
	switch {
	case proto == wire.ProtoUDP && size > 0:
		h.GSOType, h.GSOSize = wire.GSOUDPL4, uint16(size)
	case proto == wire.ProtoTCP && len(l4) >= wire.TCPLen:
		if size == 0 {
			size = mtu - hdr - int(l4[12]>>4)*4
		}
		h.GSOType, h.GSOSize = wire.GSOTCPv4, uint16(max(size, wire.MinTCPSegment))
		if etherType == wire.EtherTypeIPv6 {
			h.GSOType = wire.GSOTCPv6
		}
		if l4[13]&wire.TCPCwr != 0 {
			h.GSOType |= wire.GSOECN
		}
	}
	return h
}

// uncut reports whether what the kernel calls a train is one datagram: an inner UDP superframe whose segment size it took for that of the outer datagrams. Its
// inner IP packet then is as long as all of it.
func uncut(train []byte) bool {
	if len(train) < vxlan.HeaderLen {
		return false
	}
	data := train[vxlan.HeaderLen:]
	etherType, off, ok := wire.Payload(data)
	if !ok || len(data) < off+wire.IPv6Len {
		return false
	}
	switch etherType {
	case wire.EtherTypeIPv4:
		return data[off+9] == wire.ProtoUDP && off+int(binary.BigEndian.Uint16(data[off+2:])) == len(data)
	case wire.EtherTypeIPv6:
		return data[off+6] == wire.ProtoUDP && off+wire.IPv6Len+int(binary.BigEndian.Uint16(data[off+4:])) == len(data)
	}
	return false
}
