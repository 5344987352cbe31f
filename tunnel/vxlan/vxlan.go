package vxlan

import (
	"encoding/binary"
	"net/netip"

	"patchbay/frame"
	"patchbay/internal/wire"
)

const (
	// HeaderLen is the length of the header in bytes.
	HeaderLen = 8
	// Port is what IANA has assigned; Docker and Open vSwitch use it.
	Port = 4789
	// LinuxPort is what Linux used before there was one, and flannel and Cilium still do.
	LinuxPort = 8472
	// MaxVNI is the largest network identifier. 0 is one like any other to Linux; RFC 7348 says nothing against it.
	MaxVNI = 1<<24 - 1
)

const flagVNI = 0x08 << 24 // I: the VNI is valid

// Put writes the header of network vni, at most MaxVNI, into b[:HeaderLen].
func Put(b []byte, vni uint32) {
	binary.BigEndian.PutUint64(b[:HeaderLen], flagVNI<<32|uint64(vni)<<8)
}

// Parse reads the header of a datagram; the frame is datagram[HeaderLen:], at least an Ethernet header long. ok is false, for the reason why, when the
// datagram is too short for both, the I flag is missing or a reserved bit is set.
func Parse(datagram []byte) (vni uint32, why frame.Drop, ok bool) {
	if len(datagram) < HeaderLen {
		return 0, frame.DropTunnelHeader, false
	}
	h := binary.BigEndian.Uint64(datagram)
	if h&^(MaxVNI<<8) != flagVNI<<32 {
		return 0, frame.DropTunnelHeader, false
	}
	if len(datagram) < HeaderLen+wire.EthernetLen {
		return 0, frame.DropMalformed, false
	}
	return uint32(h>>8) & MaxVNI, 0, true
}

// Overhead is how many bytes of an underlay packet are not the inner IP packet: the outer IP and UDP headers, this one, and the inner Ethernet header
// without tags. It is 50 for an IPv4 underlay and 70 for IPv6.
func Overhead(underlay netip.Addr) int {
	ip := wire.IPv6Len
	if underlay.Unmap().Is4() {
		ip = wire.IPv4Len
	}
	return ip + wire.UDPLen + HeaderLen + wire.EthernetLen
}
