package tap

import (
	"encoding/binary"

	"patchbay/internal/wire"
)

// flowHash spreads frames over queues: equal for all frames of a flow, in both directions. It looks no deeper than it can see: what
// is not TCP or UDP over IP without options or extension headers is told apart by its addresses alone.
func flowHash(data []byte) uint32 {
	etherType, off, ok := wire.Payload(data)
	if !ok {
		return 0
	}
	var h uint32
	b := data[off:]
	switch {
	case etherType == wire.EtherTypeIPv4 && len(b) >= wire.IPv4Len:
		h = le32(b[12:]) ^ le32(b[16:])
		// Only the first fragment has ports, so no fragment may use them.
		if b[0] == 0x45 && binary.BigEndian.Uint16(b[6:])&0x3fff == 0 {
			h ^= ports(b[9], b[wire.IPv4Len:])
		}
	case etherType == wire.EtherTypeIPv6 && len(b) >= wire.IPv6Len:
		for i := 8; i < wire.IPv6Len; i += 4 {
			h ^= le32(b[i:])
		}
		h ^= ports(b[6], b[wire.IPv6Len:])
	default:
		h = le32(data[2:]) ^ le32(data[8:])
	}
	// Mix the bits down: queue numbers come from the low ones.
	h *= 0x9e3779b1
	return h >> 16
}

func ports(proto uint8, l4 []byte) uint32 {
	if (proto != wire.ProtoTCP && proto != wire.ProtoUDP) || len(l4) < 4 {
		return 0
	}
	return uint32(binary.LittleEndian.Uint16(l4)^binary.LittleEndian.Uint16(l4[2:])) * 0x85ebca6b
}

func le32(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }
