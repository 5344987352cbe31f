package wire

import "encoding/binary"

// TCP flags (RFC 9293 §3.1, RFC 3168), as they stand in byte 13 of the header.
const (
	TCPFin uint8 = 1 << iota
	TCPSyn
	TCPRst
	TCPPsh
	TCPAck
	TCPUrg
	TCPEce
	TCPCwr
)

// TCP option kinds.
const (
	tcpOptEnd uint8 = 0
	tcpOptNop uint8 = 1
	tcpOptMSS uint8 = 2
)

// TCP describes one checked TCP header.
type TCP struct {
	SrcPort, DstPort uint16
	Seq, Ack         uint32
	HdrLen           int // bytes, options included
	Flags            uint8
	Window           uint16 // not scaled
	Checksum         uint16
	Urgent           uint16
}

// ParseTCP reads the header at the start of b. ok is false when b is too short for it or the data offset is impossible. The
// checksum is not verified; options are not looked at.
func ParseTCP(b []byte) (t TCP, ok bool) {
	if len(b) < TCPLen {
		return t, false
	}
	t.HdrLen = int(b[12]>>4) * 4
	if t.HdrLen < TCPLen || t.HdrLen > len(b) {
		return t, false
	}
	t.SrcPort = binary.BigEndian.Uint16(b[0:])
	t.DstPort = binary.BigEndian.Uint16(b[2:])
	t.Seq = binary.BigEndian.Uint32(b[4:])
	t.Ack = binary.BigEndian.Uint32(b[8:])
	t.Flags = b[13]
	t.Window = binary.BigEndian.Uint16(b[14:])
	t.Checksum = binary.BigEndian.Uint16(b[16:])
	t.Urgent = binary.BigEndian.Uint16(b[18:])
	return t, true
}

// TCPMSS finds the maximum segment size option in the header at the start of b, for reading or for clamping: off is where its
// two bytes stand in b. ok is false when there is none, or the header or its options are malformed.
func TCPMSS(b []byte) (mss uint16, off int, ok bool) {
	t, ok := ParseTCP(b)
	if !ok {
		return 0, 0, false
	}
	for i := TCPLen; i < t.HdrLen; {
		switch b[i] {
		case tcpOptEnd:
			return 0, 0, false
		case tcpOptNop:
			i++
			continue
		}
		if i+1 >= t.HdrLen {
			return 0, 0, false
		}
		n := int(b[i+1])
		if n < 2 || i+n > t.HdrLen {
			return 0, 0, false
		}
		if b[i] == tcpOptMSS {
			if n != 4 {
				return 0, 0, false
			}
			return binary.BigEndian.Uint16(b[i+2:]), i + 2, true
		}
		i += n
	}
	return 0, 0, false
}

// PutTCP writes a 20-byte TCP header without options into b[:TCPLen]. The checksum is zero: finish with PutL4Checksum.
func PutTCP(b []byte, t TCP) int {
	_ = b[TCPLen-1]
	binary.BigEndian.PutUint16(b[0:], t.SrcPort)
	binary.BigEndian.PutUint16(b[2:], t.DstPort)
	binary.BigEndian.PutUint32(b[4:], t.Seq)
	binary.BigEndian.PutUint32(b[8:], t.Ack)
	b[12], b[13] = TCPLen/4<<4, t.Flags
	binary.BigEndian.PutUint16(b[14:], t.Window)
	b[16], b[17] = 0, 0
	binary.BigEndian.PutUint16(b[18:], t.Urgent)
	return TCPLen
}

// UDP describes one checked UDP header.
type UDP struct {
	SrcPort, DstPort uint16
	Len              int // bytes, header included; at most the bytes that were parsed
	Checksum         uint16
}

// ParseUDP reads the header at the start of b, which is the IP payload. ok is false when b is too short for the header or for
// the length in it. A superframe's header has the length of the whole superframe. The checksum is not verified.
func ParseUDP(b []byte) (u UDP, ok bool) {
	if len(b) < UDPLen {
		return u, false
	}
	u.Len = int(binary.BigEndian.Uint16(b[4:]))
	if u.Len < UDPLen || u.Len > len(b) {
		return u, false
	}
	u.SrcPort = binary.BigEndian.Uint16(b[0:])
	u.DstPort = binary.BigEndian.Uint16(b[2:])
	u.Checksum = binary.BigEndian.Uint16(b[6:])
	return u, true
}

// PutUDP writes a UDP header for n bytes of payload into b[:UDPLen]. The checksum is zero: finish with PutL4Checksum, or
// begin with PutPartialL4.
func PutUDP(b []byte, srcPort, dstPort uint16, n int) int {
	_ = b[UDPLen-1]
	binary.BigEndian.PutUint16(b[0:], srcPort)
	binary.BigEndian.PutUint16(b[2:], dstPort)
	binary.BigEndian.PutUint16(b[4:], uint16(UDPLen+n))
	b[6], b[7] = 0, 0
	return UDPLen
}
