package wire

import (
	"encoding/binary"
	"net/netip"
)

// ARPLen is the size in bytes of an ARP message for IPv4 over Ethernet.
const ARPLen = 28

// ARP operations (RFC 826).
const (
	ARPRequest uint16 = 1
	ARPReply   uint16 = 2
)

// ARP is one message for IPv4 over Ethernet. The addresses are 4-byte netip.Addr.
type ARP struct {
	Op        uint16
	SenderMAC MAC
	SenderIP  netip.Addr // 0.0.0.0 in a probe (RFC 5227)
	TargetMAC MAC        // zero in a request
	TargetIP  netip.Addr
}

// ParseARP reads the message at the start of b, behind the Ethernet header. ok is false when it is short or not for IPv4 over
// Ethernet. Operations other than request and reply are passed on.
func ParseARP(b []byte) (a ARP, ok bool) {
	if len(b) < ARPLen {
		return a, false
	}
	// hardware Ethernet (1), protocol IPv4, address lengths 6 and 4
	if binary.BigEndian.Uint64(b)>>16 != 0x0001_0800_0604 {
		return a, false
	}
	a.Op = binary.BigEndian.Uint16(b[6:])
	a.SenderMAC = MAC(b[8:14])
	a.SenderIP = netip.AddrFrom4([4]byte(b[14:18]))
	a.TargetMAC = MAC(b[18:24])
	a.TargetIP = netip.AddrFrom4([4]byte(b[24:28]))
	return a, true
}

// PutARP writes the message into b[:ARPLen]. The addresses must be IPv4.
func PutARP(b []byte, a ARP) int {
	_ = b[ARPLen-1]
	binary.BigEndian.PutUint64(b, 0x0001_0800_0604_0000|uint64(a.Op))
	s, t := a.SenderIP.As4(), a.TargetIP.As4()
	copy(b[8:14], a.SenderMAC[:])
	copy(b[14:18], s[:])
	copy(b[18:24], a.TargetMAC[:])
	copy(b[24:28], t[:])
	return ARPLen
}
