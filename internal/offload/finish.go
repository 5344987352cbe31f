package offload

import (
	"encoding/binary"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// Finish completes the partial checksum of a frame that is no superframe. The finished frame is head followed by rest: head is scratch[:0] with a copy of the
// frame up to the end of the checksum field appended, at most wire.MaxHeaders bytes for a validated frame; rest points into f.Data. A frame with nothing to
// finish has an empty head. ok is false for a superframe, and when the header's offsets lie outside the frame.
func Finish(f *frame.Frame, scratch []byte) (head, rest []byte, ok bool) {
	if f.Superframe() {
		return nil, nil, false
	}
	if f.Hdr.Flags&wire.VirtioNeedsCsum == 0 {
		return nil, f.Data, true
	}
	field := int(f.Hdr.CsumStart) + int(f.Hdr.CsumOffset)
	if field+2 > len(f.Data) {
		return nil, nil, false
	}
	head = append(scratch[:0], f.Data[:field+2]...)
	binary.BigEndian.PutUint16(head[field:], complement(wire.Sum(f.Data[f.Hdr.CsumStart:], 0)))
	return head, f.Data[field+2:], true
}

// complement makes a sum into a checksum field. Zero becomes its other form 0xffff: to UDP it would mean "none", to the others
// the two are the same.
func complement(acc uint64) uint16 {
	if c := ^wire.Fold(acc); c != 0 {
		return c
	}
	return 0xffff
}
