package tunnel

import (
	"fmt"
	"net/netip"

	"patchbay/tunnel/vxlan"
)

// Wire is how frames travel to a peer. What a peer sends is taken in any wire, so that the two ends need not agree.
type Wire uint8

const (
	// WireVXLAN is RFC 7348: one finished frame a datagram, for kernels and everybody else.
	WireVXLAN Wire = iota
	// WirePatchbay is that of our own nodes: superframes travel whole, and small frames share a datagram.
	WirePatchbay
)

var wireNames = [...]string{WireVXLAN: "vxlan", WirePatchbay: "patchbay"}

// String is the name in the command line and in JSON.
func (w Wire) String() string {
	if int(w) < len(wireNames) {
		return wireNames[w]
	}
	return "unknown"
}

// MarshalText is String.
func (w Wire) MarshalText() ([]byte, error) { return []byte(w.String()), nil }

// UnmarshalText reads a name; the empty one is WireVXLAN.
func (w *Wire) UnmarshalText(b []byte) error {
	switch string(b) {
	case "", "vxlan":
		*w = WireVXLAN
	case "patchbay":
		*w = WirePatchbay
	default:
		return fmt.Errorf("wire %.40q is not known; use vxlan (kernels understand it) or patchbay (faster, between patchbay nodes)", b)
	}
	return nil
}

// ParseWire is UnmarshalText for a string.
func ParseWire(s string) (w Wire, err error) { return w, w.UnmarshalText([]byte(s)) }

// Bytes of the patchbay wire in front of an Ethernet frame, and what sealing adds behind it. A sealed frame travels in that format whatever the wire.
const (
	patchbayOverhead = 20 + 4 // header of a fragment, and of the record in it
	sealOverhead     = 16     // AES-GCM's tag
)

// GSOMaxSize is what the interfaces of containers on WirePatchbay should have as their longest superframe (tap.IfConfig.GSOMaxSize): in bytes, such that its datagrams, headers included, are together no
// longer than what one UDP_SEGMENT send takes, 65,507 bytes, on any path of MinPathMTU or more. A longer superframe takes two sends and a copy more.
const GSOMaxSize = 64000

// Overhead is how many bytes of an underlay packet towards remote are not the inner IP packet: 50 for VXLAN over IPv4, 70 over IPv6; 66 and 86 on the patchbay
// wire, and 16 more where it is sealed, whatever the wire.
func Overhead(w Wire, sealed bool, remote netip.Addr) int {
	n := vxlan.Overhead(remote)
	if w == WirePatchbay || sealed {
		n += patchbayOverhead - vxlan.HeaderLen
	}
	if sealed {
		n += sealOverhead
	}
	return n
}

// InnerMTU is the MTU of a network in bytes of IP packet when the underlay towards remote carries packets of pathMTU bytes.
func InnerMTU(pathMTU int, w Wire, sealed bool, remote netip.Addr) int {
	return pathMTU - Overhead(w, sealed, remote)
}

// MinPathMTU is the smallest MTU in bytes that a path to an address can have: what IPv6 demands of every link (RFC 8200 §5), and what is taken for granted of IPv4 too, where
// RFC 791 promises less.
const MinPathMTU = 1280
