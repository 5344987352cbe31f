package nat

import (
	"net/netip"
	"testing"

	"patchbay/stack"
)

// BenchmarkUDPOut is one datagram of 1400 bytes from the gateway to a socket outside, in batches of 64; to one port or to two in turns;
// what goes to one destination goes in one call either way.
func BenchmarkUDPOut(b *testing.B) {
	for _, kind := range []string{"alike", "different"} {
		b.Run(kind, func(b *testing.B) {
			bed := newBed(b, Config{})
			sinks := [...]netip.AddrPort{addrOf(bindUDP(b, bed.out.NS, bed.out.Addr4, 0)), addrOf(bindUDP(b, bed.out.NS, bed.out.Addr4, 0))}
			ps := make([]stack.Packet, 64)
			for i := range ps {
				dst := sinks[0]
				if kind == "different" {
					dst = sinks[i%2]
				}
				ps[i] = udpPacket(netip.AddrPortFrom(bedC4, 40000), dst, pattern(1400))
			}
			b.SetBytes(1400)
			b.ReportAllocs()
			for n := 0; n < b.N; n += len(ps) {
				bed.UDP().HandlePackets(ps)
			}
		})
	}
}
