package superframe

import (
	"patchbay/frame"
	"patchbay/internal/wire"
)

// RecordLen is the length in bytes of what stands in front of each record: its kind and its length.
const RecordLen = 4

// Kinds of records.
const (
	// KindFrame is a finished Ethernet frame.
	KindFrame uint8 = 1
	// KindUnfinished is a virtio_net_hdr, as on a TAP, and the Ethernet frame it belongs to: a superframe, or one with a checksum to finish.
	KindUnfinished uint8 = 2
	// KindControl is a control message of package tunnel.
	KindControl uint8 = 3
)

// PutRecord writes what stands in front of a record of n bytes, less than 1<<24, into b[:RecordLen].
func PutRecord(b []byte, kind uint8, n int) {
	_ = b[RecordLen-1]
	b[0], b[1], b[2], b[3] = kind, uint8(n>>16), uint8(n>>8), uint8(n)
}

// Records walks over the records of a message:
//
//	for r, ok := superframe.ParseRecords(msg); ok && r.Next(); {
//		// r.Kind, r.Body
//	}
type Records struct {
	// Kind and Body are of the record that Next has come to.
	Kind uint8
	Body []byte
	rest []byte
}

// ParseRecords begins to walk. ok is false when the records' lengths do not add up to msg (frame.DropMalformed); then none of them is to be believed.
func ParseRecords(msg []byte) (r Records, ok bool) {
	for rest := msg; len(rest) > 0; {
		n := recordLen(rest)
		if n < 0 {
			return r, false
		}
		rest = rest[n:]
	}
	r.rest = msg
	return r, len(msg) > 0
}

// recordLen is the length of the record that b begins with, -1 when b is too short for it.
func recordLen(b []byte) int {
	if len(b) < RecordLen {
		return -1
	}
	n := RecordLen + int(b[1])<<16 + int(b[2])<<8 + int(b[3])
	if n > len(b) {
		return -1
	}
	return n
}

// Next goes to the next record; false behind the last.
func (r *Records) Next() bool {
	if len(r.rest) == 0 {
		return false
	}
	n := recordLen(r.rest)
	r.Kind, r.Body = r.rest[0], r.rest[RecordLen:n:n]
	r.rest = r.rest[n:]
	return true
}

// Frame makes a frame of a record of KindFrame or KindUnfinished, whose Data points into Body. ok is false, for the reason why, when it is too short or too long, or its virtio header contradicts
// the frame.
func (r *Records) Frame() (f frame.Frame, why frame.Drop, ok bool) {
	f.Data = r.Body
	if r.Kind == KindUnfinished {
		if len(r.Body) < wire.VirtioNetHdrLen {
			return f, frame.DropMalformed, false
		}
		f.Hdr.Decode(r.Body)
		f.Data = r.Body[wire.VirtioNetHdrLen:]
	}
	switch {
	case len(f.Data) < wire.EthernetLen || len(f.Data) > wire.MaxFrame:
		return f, frame.DropMalformed, false
	case !f.Hdr.Validate(f.Data):
		return f, frame.DropBadHdr, false
	}
	return f, 0, true
}
