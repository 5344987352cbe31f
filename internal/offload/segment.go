package offload

import (
	"encoding/binary"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// Segmenter cuts one frame at a time into finished segments:
//
//	n, ok := s.Reset(&f)
//	for range n {
//		head := scratch[:s.HeadLen()] // may stand behind room for an outer header
//		payload := s.Next(head)
//		// send head, payload
//	}
//
// A frame that is no superframe has one segment, with its checksum finished; if there was nothing to finish, HeadLen is zero and the payload is
// the frame. The zero Segmenter is ready for Reset.
type Segmenter struct {
	data    []byte
	headLen int
	next    int // offset in data of the next segment's payload
	size    int // payload bytes of a segment
	n, i    int // segments in all, and handed out

	kind   kind
	l3, l4 int
	id     uint16
	seq    uint32
	flags  uint8
	ipSum  uint64 // of the IPv4 header without total length, identification and checksum
	l4Sum  uint64 // of pseudo-header and transport header without lengths, sequence number and flags
	field  uint16 // finished checksum of a frame that is no superframe
	hdr    wire.VirtioNetHdr
	v4     bool
}

type kind uint8

const (
	whole kind = iota // nothing to do
	csum              // a checksum to finish
	tcp
	udp
)

// Reset begins with frame f and returns how many segments it becomes, at least 1. ok is false when the frame contradicts its header, which a
// validated frame does not; then n is 0.
func (s *Segmenter) Reset(f *frame.Frame) (n int, ok bool) {
	s.data, s.hdr = f.Data, f.Hdr
	s.i, s.n, s.headLen = 0, 0, 0
	if !f.Superframe() {
		s.kind, s.n, s.size, s.next = whole, 1, len(f.Data), 0
		if f.Hdr.Flags&wire.VirtioNeedsCsum == 0 {
			return 1, true
		}
		field := int(f.Hdr.CsumStart) + int(f.Hdr.CsumOffset)
		if field+2 > len(f.Data) {
			s.n = 0
			return 0, false
		}
		s.kind, s.headLen, s.next = csum, field+2, field+2
		s.field = complement(wire.Sum(f.Data[f.Hdr.CsumStart:], 0))
		return 1, true
	}
	if !s.resetSuper() {
		return 0, false
	}
	s.size = int(f.Hdr.GSOSize)
	payload := len(s.data) - s.headLen
	s.next = s.headLen
	s.n = max(1, (payload+s.size-1)/s.size)
	return s.n, true
}

// resetSuper finds the headers of a superframe and sums what all segments have in common.
func (s *Segmenter) resetSuper() bool {
	d := s.data
	etherType, l3, ok := wire.Payload(d)
	l4 := int(s.hdr.CsumStart)
	// l4 > l3 and l4 within d are what makes d[l3] safe below: an unvalidated start may lie anywhere, also before a network header that is not there.
	if !ok || s.hdr.GSOSize == 0 || s.hdr.Flags&wire.VirtioNeedsCsum == 0 || l4 <= l3 || l4+wire.UDPLen > len(d) {
		return false
	}
	s.l3, s.l4 = l3, l4
	switch etherType {
	case wire.EtherTypeIPv4:
		if d[l3]>>4 != 4 || l4 != l3+int(d[l3]&0xf)*4 || l4 < l3+wire.IPv4Len {
			return false
		}
		s.v4 = true
		s.id = binary.BigEndian.Uint16(d[l3+4:])
		// all but total length (2), identification (4) and checksum (10)
		s.ipSum = uint64(binary.BigEndian.Uint16(d[l3:])) + uint64(binary.BigEndian.Uint32(d[l3+6:]))
		s.ipSum = wire.Sum(d[l3+12:l4], s.ipSum)
	case wire.EtherTypeIPv6:
		if d[l3]>>4 != 6 || l4 < l3+wire.IPv6Len {
			return false
		}
		s.v4 = false
	default:
		return false
	}
	old := uint16(len(d) - l4)
	switch s.hdr.GSO() {
	case wire.GSOTCPv4, wire.GSOTCPv6:
		t, ok := wire.ParseTCP(d[l4:])
		if !ok || s.v4 != (s.hdr.GSO() == wire.GSOTCPv4) {
			return false
		}
		s.kind, s.headLen = tcp, l4+t.HdrLen
		s.seq, s.flags = t.Seq, t.Flags
		s.l4Sum = uint64(binary.BigEndian.Uint32(d[l4:])) + uint64(binary.BigEndian.Uint32(d[l4+8:])) +
			uint64(d[l4+12])<<8 + uint64(t.Window)
		// The field holds the pseudo-header's sum: taking it rather than the addresses is right for routing headers too.
		s.l4Sum = wire.Sum(d[l4+18:s.headLen], s.l4Sum) + uint64(t.Checksum) + uint64(^old)
	case wire.GSOUDPL4:
		s.kind, s.headLen = udp, l4+wire.UDPLen
		s.l4Sum = uint64(binary.BigEndian.Uint32(d[l4:])) + uint64(binary.BigEndian.Uint16(d[l4+6:])) + uint64(^old)
	default:
		return false
	}
	return s.headLen <= wire.MaxHeaders
}

// HeadLen is how many bytes of headers each segment of the frame has, at most wire.MaxHeaders for a validated frame.
func (s *Segmenter) HeadLen() int { return s.headLen }

// MaxLen is the length in bytes of the longest segment, which is the first.
func (s *Segmenter) MaxLen() int { return s.headLen + min(s.size, len(s.data)-s.headLen) }

// Next writes the head of the next segment into head[:HeadLen] and returns its payload, which points into the frame. It is called as often
// as Reset said.
func (s *Segmenter) Next(head []byte) (payload []byte) {
	head = head[:s.headLen]
	switch s.kind {
	case whole:
		s.i++
		return s.data
	case csum:
		s.i++
		copy(head, s.data)
		binary.BigEndian.PutUint16(head[s.headLen-2:], s.field)
		return s.data[s.headLen:]
	}
	copy(head, s.data)
	payload = s.data[s.next:min(s.next+s.size, len(s.data))]
	n := s.headLen - s.l4 + len(payload) // of the upper-layer packet
	ip := head[s.l3:]
	if s.v4 {
		total, id := uint16(s.l4-s.l3+n), s.id+uint16(s.i)
		binary.BigEndian.PutUint16(ip[2:], total)
		binary.BigEndian.PutUint16(ip[4:], id)
		binary.BigEndian.PutUint16(ip[10:], ^wire.Fold(s.ipSum+uint64(total)+uint64(id)))
	} else {
		binary.BigEndian.PutUint16(ip[4:], uint16(s.l4-s.l3-wire.IPv6Len+n))
	}
	l4, sum := head[s.l4:], wire.Sum(payload, 0)
	// No carry can be lost: the payload's sum is 16 bits, l4Sum hardly more than 32.
	sum += s.l4Sum + uint64(n)
	if s.kind == tcp {
		seq, flags := s.seq+uint32(s.next-s.headLen), s.flags
		if s.i > 0 {
			flags &^= wire.TCPCwr
		}
		if s.i < s.n-1 {
			flags &^= wire.TCPFin | wire.TCPPsh
		}
		binary.BigEndian.PutUint32(l4[4:], seq)
		l4[13] = flags
		binary.BigEndian.PutUint16(l4[wire.TCPChecksumOff:], complement(sum+uint64(seq)+uint64(flags)))
	} else {
		binary.BigEndian.PutUint16(l4[4:], uint16(n))
		binary.BigEndian.PutUint16(l4[wire.UDPChecksumOff:], complement(sum+uint64(n)))
	}
	s.next += len(payload)
	s.i++
	return payload
}

// Append appends the next segment to buf, head and payload in one piece, and returns the extended buffer. It allocates only when buf has
// less than MaxLen bytes to spare.
func (s *Segmenter) Append(buf []byte) []byte {
	at := len(buf)
	buf = append(buf, s.data[:s.headLen]...) // the bytes do not matter: Next writes them all
	return append(buf, s.Next(buf[at:])...)
}
