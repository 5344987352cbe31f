package frame

import "patchbay/internal/wire"

// Frame is one Ethernet frame in flight.
type Frame struct {
	// Hdr says what is still to be done to Data: a checksum to finish, a segment size to cut by. The zero Hdr is a
	// finished frame. It is validated once, where the frame enters.
	Hdr wire.VirtioNetHdr
	// Data starts at the destination MAC and carries no FCS. Its length is at least wire.EthernetLen and at most wire.MaxFrame.
	Data []byte
}

// Superframe reports whether the frame is above the MTU and waits to be cut into segments.
func (f *Frame) Superframe() bool { return f.Hdr.GSOType != wire.GSONone }

// Caps is the set of things a port can take unfinished. A port that lacks one finishes the frame inside its own Transmit
// (offload.Segment, offload.Finish); the switch never does.
type Caps uint8

// What a port may be able to take.
const (
	CapCsum Caps = 1 << iota // frames with VirtioNeedsCsum
	CapTSO4                  // superframes of TCP over IPv4
	CapTSO6                  // superframes of TCP over IPv6
	CapECN                   // superframes whose first segment carries CWR
	CapUSO                   // superframes of UDP, both IP versions
)

// CapAll is every capability: what a TAP with a virtio header on a recent kernel has.
const CapAll = CapCsum | CapTSO4 | CapTSO6 | CapECN | CapUSO

// Takes reports whether a port with these capabilities can be given a frame with header h as it is.
func (c Caps) Takes(h wire.VirtioNetHdr) bool {
	if h.Flags&wire.VirtioNeedsCsum != 0 && c&CapCsum == 0 {
		return false
	}
	if h.GSOType&wire.GSOECN != 0 && c&CapECN == 0 {
		return false
	}
	switch h.GSO() {
	case wire.GSONone:
		return true
	case wire.GSOTCPv4:
		return c&CapTSO4 != 0
	case wire.GSOTCPv6:
		return c&CapTSO6 != 0
	case wire.GSOUDPL4:
		return c&CapUSO != 0
	}
	return false
}

// Sink is where an edge hands the frames it has read. vswitch.Ingress is the one implementation that matters; the interface lets
// tap, tunnel and stack feed a switch without importing it.
//
// Forward runs to completion: when it returns, every frame of fs has been transmitted, or counted as dropped, and the caller may
// reuse the bytes. It does not wait for a peer. A Sink is owned by one goroutine at a time.
type Sink interface {
	Forward(fs []Frame)
}
