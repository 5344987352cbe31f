package wire

import (
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
)

func gaddr(a netip.Addr) tcpip.Address { return tcpip.AddrFromSlice(a.AsSlice()) }

func naddr(a tcpip.Address) netip.Addr {
	n, _ := netip.AddrFromSlice(a.AsSlice())
	return n
}

func transport(p uint8) tcpip.TransportProtocolNumber { return tcpip.TransportProtocolNumber(p) }
