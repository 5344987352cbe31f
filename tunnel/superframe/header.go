package superframe

import (
	"encoding/binary"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// Sizes of the format, in bytes.
const (
	// Type is the first byte of every datagram of the format; a VXLAN header has 0x08 there.
	Type = 0xc1
	// HeaderLen is the length of the header that each fragment has.
	HeaderLen = 20
	// MaxFragments is how many fragments a message can have.
	MaxFragments = 256
	// MaxMessage is the longest clear message: one record with the longest unfinished frame.
	MaxMessage = RecordLen + wire.VirtioNetHdrLen + wire.MaxFrame
	// SealRoom is how much longer a sealed message may be.
	SealRoom = 64
	// minMessage is the shortest: a record of no length.
	minMessage = RecordLen
)

// flagSealed is the one flag of version 1.
const flagSealed = 1

// Header is what stands in front of each fragment of a message.
type Header struct {
	// Sealed says that the message is encrypted and authenticated, and Channel the session whose key it is.
	Sealed bool
	// Index is the fragment's number and Last that of the message's last one, both counted from 0.
	Index, Last uint8
	// Channel is the VNI of a clear message and the session's identifier of a sealed one.
	Channel uint32
	// Seq numbers the messages of one sender on one channel.
	Seq uint64
	// Total is the length of the message in bytes.
	Total uint32

	// step is how many bytes of the message each fragment but the last has. Parse finds it out.
	step int
}

// Put writes h into b[:HeaderLen].
func (h *Header) Put(b []byte) {
	_ = b[HeaderLen-1]
	b[0], b[1], b[2], b[3] = Type, 0, h.Index, h.Last
	if h.Sealed {
		b[1] = flagSealed
	}
	binary.BigEndian.PutUint32(b[4:], h.Channel)
	binary.BigEndian.PutUint64(b[8:], h.Seq)
	binary.BigEndian.PutUint32(b[16:], h.Total)
}

// AADLen is the length in bytes of what AppendAAD appends.
const AADLen = 18

// AppendAAD appends what a seal covers beside the message: the header without the two bytes in which the fragments of one message differ or that say only how it was cut.
func (h *Header) AppendAAD(b []byte) []byte {
	var x [HeaderLen]byte
	h.Put(x[:])
	return append(append(b, x[0], x[1]), x[4:]...)
}

// Parse reads the header of a datagram; its part of the message is datagram[HeaderLen:]. ok is false, for the reason why, when there is no message of which that can be a fragment
// (frame.DropTunnelHeader): another type, a flag that is not known, an index behind the last, a total that is too short or too long, no payload, or one whose length contradicts index, last and total.
func Parse(datagram []byte) (h Header, why frame.Drop, ok bool) {
	n := len(datagram) - HeaderLen
	if n < 1 || datagram[0] != Type || datagram[1]&^flagSealed != 0 {
		return h, frame.DropTunnelHeader, false
	}
	h = Header{
		Sealed: datagram[1] == flagSealed, Index: datagram[2], Last: datagram[3],
		Channel: binary.BigEndian.Uint32(datagram[4:]), Seq: binary.BigEndian.Uint64(datagram[8:]), Total: binary.BigEndian.Uint32(datagram[16:]),
	}
	most := uint32(MaxMessage)
	if h.Sealed {
		most += SealRoom
	}
	if h.Index > h.Last || h.Total < minMessage || h.Total > most {
		return h, frame.DropTunnelHeader, false
	}
	last, total := int(h.Last), int(h.Total)
	switch {
	case last == 0:
		h.step = n
		ok = n == total
	case h.Index < h.Last:
		h.step = n
		ok = n*last < total && total <= n*(last+1)
	default:
		off := total - n
		h.step = off / last
		ok = off > 0 && off%last == 0 && h.step >= n
	}
	if !ok {
		return h, frame.DropTunnelHeader, false
	}
	return h, 0, true
}

// sameMessage reports whether datagram is the fragment with number index of the very message that the datagram first is a fragment of. Both are at least HeaderLen bytes.
func sameMessage(first, datagram []byte, index int) bool {
	const all = 1<<64 - 1
	const indexByte = 0xff << 40 // byte 2 of 8
	x := binary.BigEndian.Uint64(first) ^ binary.BigEndian.Uint64(datagram)
	return x&(all&^indexByte) == 0 && int(datagram[2]) == index &&
		binary.BigEndian.Uint64(first[8:]) == binary.BigEndian.Uint64(datagram[8:]) && binary.BigEndian.Uint32(first[16:]) == binary.BigEndian.Uint32(datagram[16:])
}
