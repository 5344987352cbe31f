package ipam

import (
	"fmt"
	"net/netip"
	"strings"
)

// Bounds of a subnet's prefix length. The longest leaves room for a gateway and one container.
const (
	minBits4, maxBits4 = 8, 30
	minBits6, maxBits6 = 16, 126
)

// special is what a network of containers cannot be made of, with the words for the error.
var special = []struct {
	p   netip.Prefix
	why string
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "it means \"this network\" (RFC 1122)"},
	{netip.MustParsePrefix("127.0.0.0/8"), "it is loopback"},
	{netip.MustParsePrefix("169.254.0.0/16"), "it is link-local"},
	{netip.MustParsePrefix("224.0.0.0/4"), "it is multicast"},
	{netip.MustParsePrefix("240.0.0.0/4"), "it is reserved (RFC 1112)"},
	{netip.MustParsePrefix("::/16"), "it holds the unspecified, loopback and IPv4-mapped addresses"},
	{netip.MustParsePrefix("fe80::/10"), "it is link-local"},
	{netip.MustParsePrefix("ff00::/8"), "it is multicast"},
}

// ParseSubnet reads what --subnet takes: a network such as 10.88.0.0/24 or fd12:3456:789a::/64, with no host bits set, of IPv4 /8 to /30
// or IPv6 /16 to /126, and of addresses that containers can have. The error is one line with the remedy.
func ParseSubnet(s string) (netip.Prefix, error) {
	fail := func(format string, a ...any) (netip.Prefix, error) {
		return netip.Prefix{}, fmt.Errorf("subnet %q: %s", s, fmt.Sprintf(format, a...))
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		if a, aerr := netip.ParseAddr(s); aerr == nil && a.Zone() == "" {
			if a.Is4() {
				return fail("want a length too, such as %s/24", a)
			}
			return fail("want a length too, such as %s/64", a)
		}
		if strings.Contains(s, "%") {
			return fail("a subnet has no zone: leave the %% and what follows away")
		}
		return fail("want an address and a length, such as 10.88.0.0/24 or fd12:3456:789a::/64")
	}
	if err := checkSubnet(p); err != nil {
		return fail("%s", err)
	}
	return p, nil
}

// checkSubnet says why p cannot be a network's subnet, or nil.
func checkSubnet(p netip.Prefix) error {
	if !p.IsValid() {
		return fmt.Errorf("no subnet given")
	}
	if p.Addr().Is4In6() {
		return fmt.Errorf("an IPv4-mapped address is no subnet: write it as IPv4")
	}
	lo, hi, v := minBits6, maxBits6, 6
	if p.Addr().Is4() {
		lo, hi, v = minBits4, maxBits4, 4
	}
	if p.Bits() > hi {
		return fmt.Errorf("too small for a gateway and a container: want /%d or shorter", hi)
	}
	for _, sp := range special {
		if sp.p.Overlaps(p) {
			return fmt.Errorf("%s: choose a private one, such as 10.88.0.0/24 or fd12:3456:789a::/64", sp.why)
		}
	}
	if p.Bits() < lo {
		return fmt.Errorf("too large: want an IPv%d subnet of /%d or longer", v, lo)
	}
	if m := p.Masked(); m != p {
		return fmt.Errorf("it has host bits set: did you mean %s?", m)
	}
	return nil
}

// ParseIP reads what --ip takes: an address in one of the network's subnets that a container can have. The error is one line with the remedy. Whether
// the address is free, Pool.Lease says.
func ParseIP(s string, subnets ...netip.Prefix) (netip.Addr, error) {
	fail := func(format string, a ...any) (netip.Addr, error) {
		return netip.Addr{}, fmt.Errorf("address %q: %s", s, fmt.Sprintf(format, a...))
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		if p, perr := netip.ParsePrefix(s); perr == nil {
			return fail("want no length: the network's subnet has one; write %s", p.Addr())
		}
		return fail("want an IPv4 or IPv6 address, such as 10.88.0.5")
	}
	if a.Zone() != "" {
		return fail("want no zone: write %s", a.WithZone(""))
	}
	if a.Is4In6() {
		return fail("an IPv4-mapped address is for nobody: write %s", a.Unmap())
	}
	names := make([]string, len(subnets))
	for i, p := range subnets {
		names[i] = p.String()
		if !p.Contains(a) {
			continue
		}
		if why := edge(p, a); why != "" {
			return fail("%s: choose another", why)
		}
		return a, nil
	}
	if len(subnets) == 0 {
		return fail("the network has no subnet of that IP version: give it one with --subnet")
	}
	return fail("not in %s: choose one that is", strings.Join(names, " or "))
}

// edge says why a, which is in p, is no host's address, or "".
func edge(p netip.Prefix, a netip.Addr) string {
	switch {
	case a == p.Addr() && a.Is4():
		return "it is the address of the subnet itself"
	case a == p.Addr():
		return "it is the subnet's router anycast address"
	case a.Is4() && a == lastAddr(p):
		return "it is the subnet's broadcast address"
	}
	return ""
}

// lastAddr is the highest address of p.
func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// hosts is the first and the last address of p that a host can have.
func hosts(p netip.Prefix) (first, last netip.Addr) {
	first, last = p.Masked().Addr().Next(), lastAddr(p)
	if last.Is4() {
		last = last.Prev()
	}
	return first, last
}

// DefaultGateway is the address a gateway takes when nobody says: the subnet's first, 10.88.0.1 or fd12:3456:789a::1.
func DefaultGateway(p netip.Prefix) netip.Addr { return p.Masked().Addr().Next() }

// DefaultHostAlias is the address that means the host when nobody says: of IPv4 the last one a host can have (10.88.0.254), of IPv6 the one
// whose last eight bits are fe, or the last but one in a subnet of fewer than 256 addresses. A subnet too small to spare one (/30, /126) has
// none: the zero Addr.
func DefaultHostAlias(p netip.Prefix) netip.Addr {
	p = p.Masked()
	free := p.Addr().BitLen() - p.Bits()
	if free <= 2 {
		return netip.Addr{}
	}
	if p.Addr().Is4() {
		return lastAddr(p).Prev()
	}
	b := p.Addr().As16()
	b[15] |= byte(1<<min(free, 8) - 2)
	return netip.AddrFrom16(b)
}
