package wire

import "encoding/binary"

// VirtioNetHdrLen is the size in bytes of the header a TAP with IFF_VNET_HDR and TUNSETVNETHDRSZ=10 puts in front of
// each frame.
const VirtioNetHdrLen = 10

// Flags of VirtioNetHdr (virtio_net.h).
const (
	// VirtioNeedsCsum: the checksum field holds the pseudo-header's sum only; CsumStart and CsumOffset say where to finish.
	VirtioNeedsCsum uint8 = 1
	// VirtioDataValid: the checksum was verified on the way; nobody needs to look again.
	VirtioDataValid uint8 = 2
)

// GSO types of VirtioNetHdr (virtio_net.h).
const (
	GSONone  uint8 = 0
	GSOTCPv4 uint8 = 1
	GSOUDP   uint8 = 3 // UFO; never enabled by us, refused on entry
	GSOTCPv6 uint8 = 4
	GSOUDPL4 uint8 = 5
	// GSOECN may be or-ed to a TCP type: the first segment carries CWR.
	GSOECN uint8 = 0x80
)

// VirtioNetHdr says what is still to be done to a frame before it is fit for a plain wire. The zero value is a
// finished frame. All fields are in host order here and little-endian on the device (TUNSETVNETLE).
type VirtioNetHdr struct {
	Flags      uint8
	GSOType    uint8  // GSONone, or a type, possibly with GSOECN
	HdrLen     uint16 // bytes of Ethernet, IP and transport header together; a hint, recomputed where it matters
	GSOSize    uint16 // payload bytes of one segment
	CsumStart  uint16 // from the start of the Ethernet frame
	CsumOffset uint16 // from CsumStart to the checksum field
}

// GSO is the type without the ECN bit.
func (h *VirtioNetHdr) GSO() uint8 { return h.GSOType &^ GSOECN }

// Decode reads the header from b, which has at least VirtioNetHdrLen bytes.
func (h *VirtioNetHdr) Decode(b []byte) {
	_ = b[VirtioNetHdrLen-1]
	h.Flags = b[0]
	h.GSOType = b[1]
	h.HdrLen = binary.LittleEndian.Uint16(b[2:])
	h.GSOSize = binary.LittleEndian.Uint16(b[4:])
	h.CsumStart = binary.LittleEndian.Uint16(b[6:])
	h.CsumOffset = binary.LittleEndian.Uint16(b[8:])
}

// Encode writes the header to b, which has at least VirtioNetHdrLen bytes.
func (h *VirtioNetHdr) Encode(b []byte) {
	_ = b[VirtioNetHdrLen-1]
	b[0] = h.Flags
	b[1] = h.GSOType
	binary.LittleEndian.PutUint16(b[2:], h.HdrLen)
	binary.LittleEndian.PutUint16(b[4:], h.GSOSize)
	binary.LittleEndian.PutUint16(b[6:], h.CsumStart)
	binary.LittleEndian.PutUint16(b[8:], h.CsumOffset)
}
