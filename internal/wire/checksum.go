package wire

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
)

// Offsets of the checksum field from the start of the transport header.
const (
	TCPChecksumOff  = 16
	UDPChecksumOff  = 6
	ICMPChecksumOff = 2
)

// Sum adds b to a running ones'-complement sum (RFC 1071) and returns it unfolded. Odd lengths are padded with a zero
// byte, so only the last piece of a message may have one.
func Sum(b []byte, acc uint64) uint64 {
	// The sum is the same in either byte order but for a final swap (RFC 1071 §2 (B)), so bytes are loaded as amd64 and
	// arm64 have them, 64 in a turn, in one carry chain. Adding the last carry cannot carry again: s is all ones beside a
	// carry only if both addends of that step were and a carry came in, so the step before would have had to be such a one.
	var s, c uint64
	for len(b) >= 64 {
		s, c = bits.Add64(s, binary.LittleEndian.Uint64(b), 0)
		s, c = bits.Add64(s, binary.LittleEndian.Uint64(b[8:]), c)
		s, c = bits.Add64(s, binary.LittleEndian.Uint64(b[16:]), c)
		s, c = bits.Add64(s, binary.LittleEndian.Uint64(b[24:]), c)
		s, c = bits.Add64(s, binary.LittleEndian.Uint64(b[32:]), c)
		s, c = bits.Add64(s, binary.LittleEndian.Uint64(b[40:]), c)
		s, c = bits.Add64(s, binary.LittleEndian.Uint64(b[48:]), c)
		s, c = bits.Add64(s, binary.LittleEndian.Uint64(b[56:]), c)
		s += c
		b = b[64:]
	}
	for len(b) >= 8 {
		s, c = bits.Add64(s, binary.LittleEndian.Uint64(b), 0)
		s += c
		b = b[8:]
	}
	if len(b) > 0 {
		var tail uint64
		n := 0
		if len(b) >= 4 {
			tail, n = uint64(binary.LittleEndian.Uint32(b)), 4
		}
		for i := n; i < len(b); i++ {
			tail |= uint64(b[i]) << (8 * i)
		}
		s, c = bits.Add64(s, tail, 0)
		s += c
	}
	acc, c = bits.Add64(acc, uint64(bits.ReverseBytes16(Fold(s))), 0)
	return acc + c
}

// Fold reduces a sum to its 16 bits. The checksum field holds the complement of it.
func Fold(acc uint64) uint16 {
	acc = acc>>32 + acc&0xffffffff
	acc = acc>>32 + acc&0xffffffff
	acc = acc>>16 + acc&0xffff
	acc = acc>>16 + acc&0xffff
	return uint16(acc)
}

// PseudoSum is the unfolded sum of the pseudo-header of RFC 793 or RFC 8200 §8.1 for an upper-layer packet of n bytes.
// Both addresses are of one family.
func PseudoSum(src, dst netip.Addr, proto uint8, n int) uint64 {
	acc := uint64(proto) + uint64(n)
	if src.Is4() {
		s, d := src.As4(), dst.As4()
		return acc + uint64(binary.BigEndian.Uint32(s[:])) + uint64(binary.BigEndian.Uint32(d[:]))
	}
	s, d := src.As16(), dst.As16()
	return Sum(d[:], Sum(s[:], acc))
}

// ChecksumOff is the offset of the checksum field in a transport header of protocol proto, and whether the protocol is one
// this package knows.
func ChecksumOff(proto uint8) (off int, ok bool) {
	switch proto {
	case ProtoTCP:
		return TCPChecksumOff, true
	case ProtoUDP:
		return UDPChecksumOff, true
	case ProtoICMP, ProtoICMPv6:
		return ICMPChecksumOff, true
	}
	return 0, false
}

// VerifyL4 reports whether the checksum of an upper-layer packet is right. l4 is the packet from p.HdrLen to p.Len. It is true for
// protocols this package does not know and for UDP over IPv4 without a checksum (zero); it is false for UDP over IPv6
// without one (RFC 8200 §8.1). Do not call it for a frame with VirtioNeedsCsum, whose checksum is not finished, or for a fragment.
func VerifyL4(p *IP, l4 []byte) bool {
	off, ok := ChecksumOff(p.Proto)
	if !ok {
		return true
	}
	if len(l4) < off+2 {
		return false
	}
	if p.Proto == ProtoUDP {
		if l4[UDPChecksumOff] == 0 && l4[UDPChecksumOff+1] == 0 {
			return p.Version == 4
		}
		// The datagram may be shorter than the IP payload; the checksum is over the datagram (RFC 768).
		n := int(binary.BigEndian.Uint16(l4[4:]))
		if n < UDPLen || n > len(l4) {
			return false
		}
		l4 = l4[:n]
	}
	var acc uint64
	if p.Proto != ProtoICMP {
		acc = PseudoSum(p.Src, p.Dst, p.Proto, len(l4))
	}
	return Fold(Sum(l4, acc)) == 0xffff
}

// PutL4Checksum writes the whole checksum of the upper-layer packet l4 into its field, whatever the field holds. proto is one that
// ChecksumOff knows and l4 is long enough for its header; otherwise nothing is written.
func PutL4Checksum(l4 []byte, src, dst netip.Addr, proto uint8) {
	off, ok := ChecksumOff(proto)
	if !ok || len(l4) < off+2 {
		return
	}
	l4[off], l4[off+1] = 0, 0
	var acc uint64
	if proto != ProtoICMP {
		acc = PseudoSum(src, dst, proto, len(l4))
	}
	c := ^Fold(Sum(l4, acc))
	if c == 0 && proto == ProtoUDP {
		c = 0xffff // zero would say "no checksum" (RFC 768)
	}
	binary.BigEndian.PutUint16(l4[off:], c)
}

// PutPartialL4 writes the pseudo-header's sum for n bytes of TCP, UDP or ICMPv6 into the checksum field of l4, as a frame with
// VirtioNeedsCsum has it. For a superframe n is the length of the whole upper-layer packet.
func PutPartialL4(l4 []byte, src, dst netip.Addr, proto uint8, n int) {
	if off, ok := ChecksumOff(proto); ok && len(l4) >= off+2 {
		binary.BigEndian.PutUint16(l4[off:], Fold(PseudoSum(src, dst, proto, n)))
	}
}
