package nat

import (
	"net/netip"
)

// binding is one host port joined to one container port.
type binding struct {
	// host is where to listen. The unspecified IPv6 address with dual means every address of both versions, one socket; clients with IPv4
	// addresses then appear v4-mapped and must be unmapped.
	host netip.AddrPort
	dual bool
	// port is the container's. to4 and to6 are its addresses; either may be the zero Addr, not both.
	port     uint16
	to4, to6 netip.Addr
}

// target is the container address and the source address with which a client is shown to it: the client's own when that is not
// on the host, else the gateway's with port 0, which means an ephemeral one. When the container lacks an address of the client's IP version
// its other address is taken, and the gateway's address of that version is the source.
func (n *NAT) target(b *binding, client netip.AddrPort) (src, dst netip.AddrPort) {
	client = netip.AddrPortFrom(client.Addr().Unmap().WithZone(""), client.Port())
	to, version := b.to4, 4
	if client.Addr().Is6() && b.to6.IsValid() || !b.to4.IsValid() {
		to, version = b.to6, 6
	}
	dst = netip.AddrPortFrom(to, b.port)
	if client.Addr().Is4() == to.Is4() && !client.Addr().IsLinkLocalUnicast() && !n.hosts.local(client.Addr()) {
		return client, dst
	}
	return netip.AddrPortFrom(n.net.Addr(version), 0), dst
}
