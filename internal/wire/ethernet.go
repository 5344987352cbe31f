package wire

import (
	"encoding/binary"
	"fmt"
	"net"
)

// Lengths in bytes of the headers that have a fixed size.
const (
	EthernetLen = 14
	VLANTagLen  = 4
	// MaxFrame is the longest frame the data plane carries: a 64 KiB IP packet behind an Ethernet header with one
	// VLAN tag.
	MaxFrame = EthernetLen + VLANTagLen + 65535
)

// EtherType values (IEEE 802 numbers).
const (
	EtherTypeIPv4 uint16 = 0x0800
	EtherTypeARP  uint16 = 0x0806
	EtherTypeVLAN uint16 = 0x8100
	EtherTypeIPv6 uint16 = 0x86dd
	EtherTypeQinQ uint16 = 0x88a8
)

// MAC is a 48-bit Ethernet address. It is comparable, so that it can key a map.
type MAC [6]byte

// Broadcast is the address that every station hears.
var Broadcast = MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// IsGroup reports whether the address is multicast or broadcast (the I/G bit of IEEE 802).
func (m MAC) IsGroup() bool { return m[0]&1 != 0 }

// IsZero reports whether all 48 bits are zero.
func (m MAC) IsZero() bool { return m == MAC{} }

func (m MAC) String() string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// MarshalText writes the colon form, so that JSON shows an address as people write it.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText reads what ParseMAC reads.
func (m *MAC) UnmarshalText(b []byte) error {
	p, err := ParseMAC(string(b))
	if err != nil {
		return err
	}
	*m = p
	return nil
}

// ParseMAC reads a 48-bit address in any form net.ParseMAC takes.
func ParseMAC(s string) (MAC, error) {
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != 6 {
		return MAC{}, fmt.Errorf("MAC address %q: want six hexadecimal bytes, such as 02:00:5e:10:00:01", s)
	}
	return MAC(hw), nil
}

// Dst is the destination address of a frame of at least EthernetLen bytes.
func Dst(frame []byte) MAC { return MAC(frame[0:6]) }

// Src is the source address of a frame of at least EthernetLen bytes.
func Src(frame []byte) MAC { return MAC(frame[6:12]) }

// Payload finds what an Ethernet frame carries: the EtherType and the offset of the first byte behind the header.
// One 802.1Q or 802.1ad tag is stepped over. ok is false when the frame is too short for its own header.
func Payload(frame []byte) (etherType uint16, off int, ok bool) {
	if len(frame) < EthernetLen {
		return 0, 0, false
	}
	etherType = binary.BigEndian.Uint16(frame[12:])
	if etherType != EtherTypeVLAN && etherType != EtherTypeQinQ {
		return etherType, EthernetLen, true
	}
	if len(frame) < EthernetLen+VLANTagLen {
		return 0, 0, false
	}
	return binary.BigEndian.Uint16(frame[16:]), EthernetLen + VLANTagLen, true
}

// PutEthernet writes an untagged Ethernet header into b[:EthernetLen].
func PutEthernet(b []byte, dst, src MAC, etherType uint16) int {
	_ = b[EthernetLen-1]
	copy(b[0:6], dst[:])
	copy(b[6:12], src[:])
	binary.BigEndian.PutUint16(b[12:], etherType)
	return EthernetLen
}
