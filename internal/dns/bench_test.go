package dns

import (
	"net/netip"
	"testing"

	"patchbay/stack"

	"github.com/miekg/dns"
)

// BenchmarkLocal is one name of a container asked for by UDP, from packet to packet.
func BenchmarkLocal(b *testing.B) {
	s, _ := newServer(b, Config{Network: discard{}})
	s.SetZone(testZone)
	ps := []stack.Packet{packet(b, client4, netip.AddrPortFrom(gw4, 53), must(query("web.mynet", dns.TypeA).Pack()))}
	b.ReportAllocs()
	for b.Loop() {
		s.HandlePackets(ps)
	}
}
