package nat

import (
	"net/netip"

	"patchbay/frame"
	"patchbay/stack"
)

// verdict is what policy says of a destination.
type verdict struct {
	// host is where to go on the host; valid when ok.
	host netip.Addr
	ok   bool
	// loopback says host is the host's own loopback, reached through the host alias.
	loopback bool
	// drop is the counter of a refusal, why what ICMP tells the container. refuse says that TCP answers with a reset instead.
	drop   frame.Drop
	why    stack.Unreachable
	refuse bool
}

// policy is the one home of "where may a container go, and what host address does that mean". It is safe for concurrent use.
type policy struct {
	network        stack.Network
	subnets        []netip.Prefix // the container network's own
	internal       bool
	hostLoopback   bool
	allowLinkLocal bool
	hosts          *hostAddrs
}

var (
	denyLoopback  = verdict{drop: frame.DropPolicyLoopback, why: stack.UnreachProhibited, refuse: true}
	denyMetadata  = verdict{drop: frame.DropPolicyMetadata, why: stack.UnreachProhibited}
	denyAddress   = verdict{drop: frame.DropPolicyAddress, why: stack.UnreachProhibited}
	denyOwnSubnet = verdict{drop: frame.DropPolicyAddress, why: stack.UnreachHost}
	denyInternal  = verdict{drop: frame.DropPolicyInternal, why: stack.UnreachNet}
	denyGateway   = verdict{drop: frame.DropNotForGateway, why: stack.UnreachPort, refuse: true}
)

// Prefixes that policy knows by name.
var (
	v4This      = netip.MustParsePrefix("0.0.0.0/8")       // RFC 1122 3.2.1.3; Linux takes 0.0.0.0 for loopback
	v4Loopback  = netip.MustParsePrefix("127.0.0.0/8")     // RFC 1122
	v4Multicast = netip.MustParsePrefix("224.0.0.0/4")     // RFC 5771
	v4Broadcast = netip.MustParseAddr("255.255.255.255")   // RFC 919
	v6Compat    = netip.MustParsePrefix("::/96")           // RFC 4291 2.5.5.1; :: and ::1 are in it
	v6Mapped    = netip.MustParsePrefix("::ffff:0:0/96")   // RFC 4291 2.5.5.2
	v6SIIT      = netip.MustParsePrefix("::ffff:0:0:0/96") // RFC 7915, formerly RFC 2765
	v6NAT64     = netip.MustParsePrefix("64:ff9b::/96")    // RFC 6052
	v6NAT64Loc  = netip.MustParsePrefix("64:ff9b:1::/48")  // RFC 8215
	v6Teredo    = netip.MustParsePrefix("2001::/32")       // RFC 4380
	v66to4      = netip.MustParsePrefix("2002::/16")       // RFC 3056
	v6Multicast = netip.MustParsePrefix("ff00::/8")        // RFC 4291
	v6LinkLocal = netip.MustParsePrefix("fe80::/10")       // RFC 4291
)

// metadata are the addresses at which clouds hand out credentials to whoever asks from the machine.
var metadata = [...]netip.Prefix{
	netip.MustParsePrefix("169.254.0.0/16"),     // nearly all of them; RFC 3927
	netip.MustParsePrefix("fd00:ec2::/32"),      // Amazon, IPv6
	netip.MustParsePrefix("fd20:ce::254/128"),   // Google, IPv6
	netip.MustParsePrefix("100.100.100.200/32"), // Alibaba
	netip.MustParsePrefix("192.0.0.192/32"),     // Oracle
}

// check says whether a container may go to dst and what that means on the host.
func (p *policy) check(dst netip.Addr) verdict {
	if !dst.IsValid() || dst.Zone() != "" {
		return denyAddress
	}
	if p.internal {
		return denyInternal
	}
	if dst.Is4() {
		return p.check4(dst)
	}
	return p.check6(dst)
}

func (p *policy) check4(dst netip.Addr) verdict {
	if dst == p.network.HostAlias(4) {
		return p.alias(netip.AddrFrom4([4]byte{127, 0, 0, 1}))
	}
	if dst == p.network.Addr(4) {
		return denyGateway
	}
	if v, bad := p.forbidden4(dst); bad {
		return v
	}
	return p.own(dst)
}

func (p *policy) check6(dst netip.Addr) verdict {
	if dst == p.network.HostAlias(6) {
		return p.alias(netip.IPv6Loopback())
	}
	if dst == p.network.Addr(6) {
		return denyGateway
	}
	switch {
	case dst.IsLoopback(), dst.IsUnspecified():
		return denyLoopback
	case v6Multicast.Contains(dst):
		return denyAddress
	case v6LinkLocal.Contains(dst):
		return denyMetadata // and without a zone the host could not send there either
	case p.isMetadata(dst):
		return denyMetadata
	}
	for _, v4 := range embedded4(dst) {
		if !v4.IsValid() {
			break
		}
		if v, bad := p.forbidden4(v4); bad {
			return v
		}
	}
	// A wire never carries these forms, and the host's kernel would take the mapped one for IPv4.
	if v6Mapped.Contains(dst) || v6Compat.Contains(dst) || v6SIIT.Contains(dst) {
		return denyAddress
	}
	return p.own(dst)
}

// alias is the verdict on the network's name for the host.
func (p *policy) alias(loopback netip.Addr) verdict {
	if !p.hostLoopback {
		return denyLoopback
	}
	return verdict{host: loopback, ok: true, loopback: true}
}

// own refuses the container network's subnets, which are reached through the switch and not through NAT, and addresses that the host
// keeps on a loopback interface; everything else is allowed as it is.
func (p *policy) own(dst netip.Addr) verdict {
	for _, s := range p.subnets {
		if s.Contains(dst) {
			if dst.Is4() && dst == lastAddr(s) && s.Bits() < 31 {
				return denyAddress
			}
			return denyOwnSubnet
		}
	}
	if p.hosts != nil && p.hosts.onLoopback(dst) {
		return denyLoopback
	}
	return verdict{host: dst, ok: true}
}

// forbidden4 judges IPv4 addresses by themselves, plain or found inside an IPv6 address.
func (p *policy) forbidden4(a netip.Addr) (verdict, bool) {
	switch {
	case v4Loopback.Contains(a), v4This.Contains(a):
		return denyLoopback, true
	case v4Multicast.Contains(a), a == v4Broadcast:
		return denyAddress, true
	case p.isMetadata(a):
		return denyMetadata, true
	}
	return verdict{}, false
}

func (p *policy) isMetadata(a netip.Addr) bool {
	if p.allowLinkLocal {
		return false
	}
	for _, m := range metadata {
		if m.Contains(a) {
			return true
		}
	}
	return false
}

// embedded4 lists the IPv4 addresses that a stands for under the known ways to write one inside an IPv6 address: a relay or translator
// on the host or near it would send there. Unused entries are the zero Addr, at the end.
func embedded4(a netip.Addr) (out [4]netip.Addr) {
	b := a.As16()
	at := func(i int) netip.Addr { return netip.AddrFrom4([4]byte(b[i : i+4])) }
	switch {
	case v6Mapped.Contains(a), v6Compat.Contains(a), v6SIIT.Contains(a), v6NAT64.Contains(a):
		out[0] = at(12)
	case v6NAT64Loc.Contains(a):
		// RFC 8215 leaves the prefix length to the site, and RFC 6052 puts the address elsewhere for each, around bits 64 to 71. All are
		// looked at, but those that begin with a zero, which a layout of another length leaves there.
		n := 0
		for _, v4 := range [4]netip.Addr{
			netip.AddrFrom4([4]byte{b[6], b[7], b[9], b[10]}),   // /48
			netip.AddrFrom4([4]byte{b[7], b[9], b[10], b[11]}),  // /56
			netip.AddrFrom4([4]byte{b[9], b[10], b[11], b[12]}), // /64
			at(12), // /96
		} {
			if !v4This.Contains(v4) {
				out[n], n = v4, n+1
			}
		}
		if n == 0 {
			out[0] = netip.IPv4Unspecified()
		}
	case v66to4.Contains(a):
		out[0] = at(2)
	case v6Teredo.Contains(a):
		out[0] = at(4) // the server
		out[1] = netip.AddrFrom4([4]byte{^b[12], ^b[13], ^b[14], ^b[15]})
	case (b[8] == 0 || b[8] == 2) && b[9] == 0 && b[10] == 0x5e && b[11] == 0xfe: // ISATAP
		out[0] = at(12)
	}
	return out
}

// lastAddr is the highest address of a prefix: an IPv4 subnet's broadcast address.
func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// Direct says whether a connection to dst would be made on the host to that very address: policy lets it through, and it is no other name for the host. It is for those who make it themselves, and safe for concurrent use.
func (n *NAT) Direct(dst netip.Addr) bool {
	v := n.policy.check(dst)
	return v.ok && v.host == dst
}
