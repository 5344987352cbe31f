package tunnel

import (
	"encoding/binary"

	"patchbay/internal/wire"
	"patchbay/tunnel/udp"
)

// The codepoints of RFC 3168 §5.
const (
	ecnNone udp.ECN = 0 // the transport does not know ECN
	ecnECT1 udp.ECN = 1
	ecnECT0 udp.ECN = 2
	ecnCE   udp.ECN = 3 // congestion experienced
)

// innerECN is the codepoint of an inner frame; of what is not IP, ecnNone. The outer header gets the same (RFC 6040 §4.1, normal mode).
func innerECN(data []byte) udp.ECN {
	etherType, off, ok := wire.Payload(data)
	if !ok || len(data) < off+2 {
		return ecnNone
	}
	switch etherType {
	case wire.EtherTypeIPv4:
		return udp.ECN(data[off+1] & 3)
	case wire.EtherTypeIPv6:
		return udp.ECN(data[off+1] >> 4 & 3)
	}
	return ecnNone
}

// carryECN combines the outer codepoint, which is not ecnNone, with that of the inner frame, which it edits (RFC 6040 §4.2, figure 4). It is false when
// the frame has to be dropped: congestion on the way, and a transport that would not understand the mark. What is not IP passes.
func carryECN(data []byte, outer udp.ECN) bool {
	etherType, off, ok := wire.Payload(data)
	if !ok || etherType != wire.EtherTypeIPv4 && etherType != wire.EtherTypeIPv6 || len(data) < off+2 {
		return true
	}
	inner := innerECN(data)
	switch {
	case inner == ecnNone:
		return outer != ecnCE
	case inner == outer || inner == ecnCE || inner == ecnECT1 && outer == ecnECT0:
		return true
	}
	// Congestion over a transport that understands, or codepoint 1 over 2.
	if etherType == wire.EtherTypeIPv6 {
		data[off+1] = data[off+1]&^0x30 | uint8(outer)<<4
		return true
	}
	if len(data) < off+wire.IPv4Len {
		return true
	}
	ip := data[off:]
	was := binary.BigEndian.Uint16(ip)
	ip[1] = ip[1]&^3 | uint8(outer)
	// RFC 1624, equation 3.
	sum := uint64(^binary.BigEndian.Uint16(ip[10:])) + uint64(^was) + uint64(binary.BigEndian.Uint16(ip))
	binary.BigEndian.PutUint16(ip[10:], ^wire.Fold(sum))
	return true
}
