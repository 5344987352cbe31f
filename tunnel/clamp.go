package tunnel

import (
	"encoding/binary"

	"patchbay/internal/wire"
)

// A TCP connection across a tunnel should never learn its path's MTU the hard way: the maximum segment size that its two ends announce is lowered to what fits, in each direction, at each
// of our ends, so that a kernel's end of the tunnel profits too.

// synTCP is where the TCP header of a frame stands that opens a connection: a SYN, in a packet that is no fragment and has no IPv6 extension headers.
func synTCP(data []byte) (l4 int, v4, ok bool) {
	etherType, off, ok := wire.Payload(data)
	if !ok {
		return 0, false, false
	}
	ip := data[off:]
	switch {
	case etherType == wire.EtherTypeIPv4 && len(ip) >= wire.IPv4Len+wire.TCPLen && ip[9] == wire.ProtoTCP && ip[0]>>4 == 4 && binary.BigEndian.Uint16(ip[6:])&0x3fff == 0:
		l4, v4 = off+int(ip[0]&0xf)*4, true
		if l4 < off+wire.IPv4Len {
			return 0, false, false
		}
	case etherType == wire.EtherTypeIPv6 && len(ip) >= wire.IPv6Len+wire.TCPLen && ip[6] == wire.ProtoTCP && ip[0]>>4 == 6:
		l4 = off + wire.IPv6Len
	default:
		return 0, false, false
	}
	if l4+wire.TCPLen > len(data) || data[l4+13]&(wire.TCPSyn|wire.TCPRst) != wire.TCPSyn {
		return 0, false, false
	}
	return l4, v4, true
}

// clampMSS lowers the maximum segment size that a SYN in data announces to what an IP packet of mtu bytes carries, and keeps the checksum right. With partial the checksum is not
// computed yet, and so not touched. Everything else is left alone.
func clampMSS(data []byte, mtu int, partial bool) {
	l4, v4, ok := synTCP(data)
	if !ok {
		return
	}
	most := mtu - wire.IPv6Len - wire.TCPLen
	if v4 {
		most = mtu - wire.IPv4Len - wire.TCPLen
	}
	tcp := data[l4:]
	mss, off, ok := wire.TCPMSS(tcp)
	if !ok || most < wire.MinTCPSegment || int(mss) <= most {
		return
	}
	binary.BigEndian.PutUint16(tcp[off:], uint16(most))
	if partial {
		return
	}
	// RFC 1624, equation 3; an option may stand at an odd offset, where each of its bytes counts for the other half of a word.
	was, is := mss, uint16(most)
	if off%2 == 1 {
		was, is = was<<8|was>>8, is<<8|is>>8
	}
	sum := uint64(^binary.BigEndian.Uint16(tcp[wire.TCPChecksumOff:])) + uint64(^was) + uint64(is)
	binary.BigEndian.PutUint16(tcp[wire.TCPChecksumOff:], ^wire.Fold(sum))
}
