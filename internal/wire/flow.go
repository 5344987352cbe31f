package wire

import "encoding/binary"

// FlowHash spreads frames over queues and ports: equal for all frames of a flow, in both directions. It looks no deeper than it can see: what
// is not TCP or UDP over IP without options or extension headers is told apart by its addresses alone.
func FlowHash(data []byte) uint32 {
	etherType, off, ok := Payload(data)
	if !ok {
		return 0
	}
	var h uint32
	b := data[off:]
	switch {
	case etherType == EtherTypeIPv4 && len(b) >= IPv4Len:
		h = le32(b[12:]) ^ le32(b[16:])
		// Only the first fragment has ports, so no fragment may use them.
		if b[0] == 0x45 && binary.BigEndian.Uint16(b[6:])&0x3fff == 0 {
			h ^= flowPorts(b[9], b[IPv4Len:])
		}
	case etherType == EtherTypeIPv6 && len(b) >= IPv6Len:
		for i := 8; i < IPv6Len; i += 4 {
			h ^= le32(b[i:])
		}
		h ^= flowPorts(b[6], b[IPv6Len:])
	default:
		h = le32(data[2:]) ^ le32(data[8:])
	}
	// Mix the bits down: numbers of queues come from the low ones.
	h *= 0x9e3779b1
	return h >> 16
}

func flowPorts(proto uint8, l4 []byte) uint32 {
	if (proto != ProtoTCP && proto != ProtoUDP) || len(l4) < 4 {
		return 0
	}
	return uint32(binary.LittleEndian.Uint16(l4)^binary.LittleEndian.Uint16(l4[2:])) * 0x85ebca6b
}

func le32(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }
