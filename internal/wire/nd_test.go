package wire

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

var (
	lla  = netip.MustParseAddr("fe80::1")
	mac1 = MAC{2, 1, 2, 3, 4, 5}
)

// parseND takes a packet through all that a receiver does.
func parseND(b []byte) (nd ND, ok bool) {
	p, ok := ParseIP(b, false)
	if !ok {
		return nd, false
	}
	l4 := b[p.HdrLen:p.Len]
	if !VerifyL4(&p, l4) || !gvisorValid(&p, l4) {
		return nd, false
	}
	return ParseND(&p, l4)
}

func TestND(t *testing.T) {
	b := make([]byte, 100)
	for _, c := range []struct {
		name     string
		src, dst netip.Addr
		nd       ND
		n        int
	}{
		{"solicitation", lla, SolicitedNode(a6), ND{Type: ICMPv6NeighborSol, Target: a6, Link: mac1}, NDNeighborLen},
		{"probe", netip.IPv6Unspecified(), SolicitedNode(a6), ND{Type: ICMPv6NeighborSol, Target: a6}, 64},
		{"advertisement", a6, lla, ND{Type: ICMPv6NeighborAdv, Target: a6, Link: mac1, Router: true, Solicited: true, Override: true}, NDNeighborLen},
		{"announcement", a6, AllNodes, ND{Type: ICMPv6NeighborAdv, Target: a6, Link: mac1, Override: true}, NDNeighborLen},
		{"router solicitation", lla, AllRouters, ND{Type: ICMPv6RouterSol, Link: mac1}, NDRouterSolLen},
		{"router solicitation without address", netip.IPv6Unspecified(), AllRouters, ND{Type: ICMPv6RouterSol}, 48},
	} {
		n := PutND(b, c.src, c.dst, c.nd)
		if n != c.n {
			t.Errorf("%s: %d bytes, want %d", c.name, n, c.n)
		}
		if got, ok := parseND(b[:n]); !ok || got != c.nd {
			t.Errorf("%s: got %+v, %v, want %+v", c.name, got, ok, c.nd)
		}
		if c.nd.Type == ICMPv6NeighborAdv {
			h := header.NDPNeighborAdvert(header.ICMPv6(b[40:n]).MessageBody())
			if naddr(h.TargetAddress()) != a6 || h.RouterFlag() != c.nd.Router || h.SolicitedFlag() != c.nd.Solicited || h.OverrideFlag() != c.nd.Override {
				t.Errorf("%s: gVisor disagrees", c.name)
			}
			it, err := h.Options().Iter(true)
			if err != nil {
				t.Fatal(err)
			}
			if o, _, err := it.Next(); err != nil || o.(header.NDPTargetLinkLayerAddressOption).EthernetAddress() != header.NDPTargetLinkLayerAddressOption(mac1[:]).EthernetAddress() {
				t.Errorf("%s: gVisor reads option %v, %v", c.name, o, err)
			}
		}
	}
	// Each rule of RFC 4861 §6.1.1, §7.1.1 and §7.1.2, broken once.
	sol := ND{Type: ICMPv6NeighborSol, Target: a6, Link: mac1}
	adv := ND{Type: ICMPv6NeighborAdv, Target: a6, Link: mac1}
	for _, c := range []struct {
		name     string
		src, dst netip.Addr
		nd       ND
		edit     func(b []byte) []byte
	}{
		{"hop limit", lla, SolicitedNode(a6), sol, func(b []byte) []byte { b[7] = 254; return b }},
		{"code", lla, SolicitedNode(a6), sol, func(b []byte) []byte { b[41] = 1; return b }},
		{"cut", lla, SolicitedNode(a6), sol, func(b []byte) []byte { return b[:63] }},
		{"multicast target", lla, SolicitedNode(a6), ND{Type: ICMPv6NeighborSol, Target: AllNodes}, nil},
		{"option length zero", lla, SolicitedNode(a6), sol, func(b []byte) []byte { b[65] = 0; return b }},
		{"option beyond", lla, SolicitedNode(a6), sol, func(b []byte) []byte { b[65] = 2; return b }},
		{"half an option", lla, SolicitedNode(a6), sol, func(b []byte) []byte { return b[:65] }},
		{"probe not to solicited-node", netip.IPv6Unspecified(), AllNodes, ND{Type: ICMPv6NeighborSol, Target: a6}, nil},
		{"probe with link address", netip.IPv6Unspecified(), SolicitedNode(a6), sol, nil},
		{"router solicitation with link address", netip.IPv6Unspecified(), AllRouters, ND{Type: ICMPv6RouterSol, Link: mac1}, nil},
		{"solicited advertisement to group", a6, AllNodes, ND{Type: ICMPv6NeighborAdv, Target: a6, Link: mac1, Solicited: true}, nil},
		{"advertisement of nothing", a6, AllNodes, ND{Type: ICMPv6NeighborAdv, Target: netip.IPv6Unspecified()}, nil},
		{"router advertisement", lla, AllNodes, adv, func(b []byte) []byte { b[40] = ICMPv6RouterAdv; return b }},
	} {
		n := PutND(b, c.src, c.dst, c.nd)
		pkt := bytes.Clone(b[:n])
		if c.edit != nil {
			pkt = c.edit(pkt)
			PutL4Checksum(pkt[40:], c.src, c.dst, ProtoICMPv6)
			pkt[4], pkt[5] = 0, uint8(len(pkt)-40)
		}
		if got, ok := parseND(pkt); ok {
			t.Errorf("%s: taken as %+v", c.name, got)
		}
	}
}

func TestRA(t *testing.T) {
	ra := RA{
		HopLimit: 64, Other: true, Preference: 1, Lifetime: 1800, Reachable: 30000, Retrans: 1000, Link: mac1, MTU: 1450,
		Prefixes: []RAPrefix{
			{Prefix: netip.MustParsePrefix("fd00:1:2:3::99/64"), OnLink: true, Auto: true, Valid: 86400, Preferred: 14400},
			{Prefix: netip.MustParsePrefix("2001:db8::/48"), OnLink: true, Valid: 0xffffffff},
		},
		DNS: []netip.Addr{a6, b6}, Search: []string{"patchbay.internal", "example.test."}, DNSLifetime: 600,
	}
	b := bytes.Repeat([]byte{0xee}, 400) // dirt shows a forgotten clear
	n, ok := PutRA(b, lla, AllNodes, &ra)
	if !ok {
		t.Fatal("refused")
	}
	p, ok := ParseIP(b[:n], false)
	if !ok || p.TTL != 255 || p.Len != n || !VerifyL4(&p, b[40:n]) || !gvisorValid(&p, b[40:n]) {
		t.Fatalf("%+v, %v", p, ok)
	}
	h := header.NDPRouterAdvert(header.ICMPv6(b[40:n]).MessageBody())
	if h.CurrHopLimit() != 64 || h.ManagedAddrConfFlag() || !h.OtherConfFlag() || h.DefaultRouterPreference() != header.HighRoutePreference ||
		h.RouterLifetime() != 1800*time.Second || h.ReachableTime() != 30*time.Second || h.RetransTimer() != time.Second {
		t.Error("gVisor disagrees on the fixed part")
	}
	it, err := h.Options().Iter(true)
	if err != nil {
		t.Fatal(err)
	}
	var prefixes, servers, lists int
	for {
		o, done, err := it.Next()
		if err != nil {
			t.Fatal(err)
		}
		if done {
			break
		}
		switch o := o.(type) {
		case header.NDPPrefixInformation:
			want := ra.Prefixes[prefixes]
			if int(o.PrefixLength()) != want.Prefix.Bits() || naddr(o.Prefix()) != want.Prefix.Masked().Addr() || o.OnLinkFlag() != want.OnLink ||
				o.AutonomousAddressConfigurationFlag() != want.Auto || want.Valid != 0xffffffff && o.ValidLifetime() != time.Duration(want.Valid)*time.Second ||
				o.PreferredLifetime() != time.Duration(want.Preferred)*time.Second {
				t.Errorf("prefix %v", o)
			}
			prefixes++
		case header.NDPRecursiveDNSServer:
			got, err := o.Addresses()
			if err != nil || len(got) != 2 || naddr(got[0]) != a6 || naddr(got[1]) != b6 || o.Lifetime() != 600*time.Second {
				t.Errorf("resolvers %v, %v", got, err)
			}
			servers++
		case header.NDPDNSSearchList:
			got, err := o.DomainNames()
			if err != nil || len(got) != 2 || got[0] != "patchbay.internal" || got[1] != "example.test" || o.Lifetime() != 600*time.Second {
				t.Errorf("search list %v, %v", got, err)
			}
			lists++
		}
	}
	if prefixes != 2 || servers != 1 || lists != 1 {
		t.Errorf("%d prefixes, %d resolver options, %d search lists", prefixes, servers, lists)
	}
	// gVisor skips MTU: walk for it, and count what is there.
	seen := map[uint8]int{}
	for opts := b[40+16 : n]; len(opts) > 0; {
		typ, val, rest, ok := NextNDOption(opts)
		if !ok {
			t.Fatal("walk ends early")
		}
		if typ == NDMTU && !bytes.Equal(val, []byte{0, 0, 0, 0, 0x05, 0xaa}) {
			t.Errorf("MTU option %x", val)
		}
		if typ == NDSourceLL && MAC(val) != mac1 {
			t.Errorf("link address %x", val)
		}
		seen[typ]++
		opts = rest
	}
	if seen[NDMTU] != 1 || seen[NDSourceLL] != 1 || len(seen) != 5 {
		t.Errorf("options %v", seen)
	}
	if _, ok := PutRA(b[:n-1], lla, AllNodes, &ra); ok {
		t.Error("written beyond the buffer's end")
	}
	for _, bad := range []string{"", ".", "a..b", string(bytes.Repeat([]byte{'x'}, 64)), string(bytes.Repeat([]byte("abc."), 64))} {
		if _, ok := PutRA(b, lla, AllNodes, &RA{Search: []string{bad}}); ok {
			t.Errorf("search domain %q is taken", bad)
		}
	}
	if n, ok := PutRA(b, lla, AllNodes, &RA{}); !ok || n != 56 {
		t.Errorf("empty advertisement: %d, %v", n, ok)
	}
	if _, ok := PutRA(make([]byte, 4000), lla, AllNodes, &RA{DNS: make([]netip.Addr, 128)}); ok {
		t.Error("128 resolvers are taken")
	}
}

func FuzzND(f *testing.F) {
	b := make([]byte, 400)
	n := PutND(b, lla, SolicitedNode(a6), ND{Type: ICMPv6NeighborSol, Target: a6, Link: mac1})
	f.Add(bytes.Clone(b[40:n]))
	n = PutND(b, lla, AllRouters, ND{Type: ICMPv6RouterSol, Link: mac1})
	f.Add(bytes.Clone(b[40:n]))
	n, _ = PutRA(b, lla, AllNodes, &RA{MTU: 1500, DNS: []netip.Addr{a6}, Search: []string{"a.test"}})
	f.Add(bytes.Clone(b[40:n]))
	f.Fuzz(func(t *testing.T, l4 []byte) {
		for _, src := range []netip.Addr{lla, netip.IPv6Unspecified()} {
			p := IP{Src: src, Dst: SolicitedNode(a6), Version: 6, Proto: ProtoICMPv6, TTL: 255}
			nd, ok := ParseND(&p, l4)
			if !ok {
				continue
			}
			// What is taken comes back from PutND the same, and gVisor takes its options.
			out := make([]byte, NDNeighborLen)
			if back, ok := parseND(out[:PutND(out, src, p.Dst, nd)]); !ok || back != nd {
				t.Fatalf("%+v comes back as %+v, %v", nd, back, ok)
			}
			opts := l4[ICMPLen:]
			if nd.Type != ICMPv6RouterSol {
				opts = l4[24:]
				if naddr(header.NDPNeighborSolicit(l4[4:]).TargetAddress()) != nd.Target {
					t.Fatal("gVisor disagrees on the target")
				}
			}
			for rest := opts; len(rest) > 0; {
				var val []byte
				if _, val, rest, ok = NextNDOption(rest); !ok || len(val)%8 != 6 {
					t.Fatal("an option is malformed")
				}
			}
			it, _ := header.NDPOptions(opts).Iter(false)
			for {
				if _, done, err := it.Next(); done || err != nil {
					break
				}
			}
		}
		for rest, ok := l4, true; ok; {
			_, _, rest, ok = NextNDOption(rest)
		}
	})
}
