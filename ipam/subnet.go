package ipam

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"slices"
)

// Route is one destination the host can reach, as far as a clash is concerned.
type Route struct {
	Prefix    netip.Prefix
	Interface string // "" when the route has none
}

func (r Route) String() string {
	if r.Interface == "" {
		return "the host's route to " + r.Prefix.String()
	}
	return fmt.Sprintf("the host's route to %s on %s", r.Prefix, r.Interface)
}

// Host answers which subnets the host leaves free. The zero value asks the kernel, in the caller's network namespace.
type Host struct {
	// Routes lists all routes of both IP versions, of every table. Zero: over netlink.
	Routes func() ([]Route, error)
	// Rand is where a ULA comes from. Zero: crypto/rand.
	Rand io.Reader
}

// defaultBits is the longest prefix that counts as a way out rather than a place: the default route, and the halves of it that VPN
// clients install to shadow it.
const defaultBits = 1

// Clash finds a route of the host that p overlaps. Default routes do not count.
func Clash(p netip.Prefix, routes []Route) (Route, bool) {
	for _, r := range routes {
		if r.Prefix.Bits() > defaultBits && r.Prefix.Overlaps(p) {
			return r, true
		}
	}
	return Route{}, false
}

func (h Host) routes() ([]Route, error) {
	list := h.Routes
	if list == nil {
		list = kernelRoutes
	}
	rs, err := list()
	if err != nil {
		return nil, fmt.Errorf("read the host's routes: %w", err)
	}
	return rs, nil
}

// CheckSubnet is for a subnet that was asked for by name: the error names the route it clashes with, and the remedy. Containers on a
// network with such a subnet could not reach what the route leads to.
func (h Host) CheckSubnet(p netip.Prefix) error {
	rs, err := h.routes()
	if err != nil {
		return fmt.Errorf("subnet %s: %w", p, err)
	}
	r, clash := Clash(p, rs)
	if !clash {
		return nil
	}
	instead := "leave --subnet away and patchbay picks a free one"
	if free, err := h.choose(p.Addr().Is4(), rs, []netip.Prefix{p}, nil); err == nil {
		instead = fmt.Sprintf("choose another, such as %s, or leave --subnet away", free)
	}
	return fmt.Errorf("subnet %s: it clashes with %s: %s", p, r, instead)
}

// ChooseSubnet picks the IPv4 subnet of a network that did not ask for one: the first /24 of the candidates that neither a route of the host nor a
// prefix of taken overlaps. The candidates are 10.88.0.0/24 to 10.127.255.0/24, 172.20.0.0/24 to 172.31.255.0/24 and 192.168.100.0/24 to
// 192.168.254.0/24.
func (h Host) ChooseSubnet(taken ...netip.Prefix) (netip.Prefix, error) {
	rs, err := h.routes()
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("choose an IPv4 subnet: %w", err)
	}
	return h.choose(true, rs, taken, nil)
}

// ChooseSubnet6 picks the IPv6 subnet of a network that did not ask for one: a unique local /64 (RFC 4193). With a seed (what
// names the host and the network) its global id is derived from the seed, so that the network has the same subnet after a restart; without, it
// is random.
func (h Host) ChooseSubnet6(seed []byte, taken ...netip.Prefix) (netip.Prefix, error) {
	rs, err := h.routes()
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("choose an IPv6 subnet: %w", err)
	}
	return h.choose(false, rs, taken, seed)
}

func (h Host) choose(v4 bool, rs []Route, taken []netip.Prefix, seed []byte) (netip.Prefix, error) {
	rs = slices.Clone(rs)
	for _, t := range taken {
		rs = append(rs, Route{Prefix: t})
	}
	if v4 {
		return choose4(rs)
	}
	return h.choose6(rs, seed)
}

// candidates4 are the ranges that /24s are taken from, in order: away from the home router's 192.168.0/1, Docker's 172.17, clouds' 10.0 and 172.16.
var candidates4 = [...][2]string{
	{"10.88.0.0", "10.127.255.0"},
	{"172.20.0.0", "172.31.255.0"},
	{"192.168.100.0", "192.168.254.0"},
}

func choose4(rs []Route) (netip.Prefix, error) {
	for _, c := range candidates4 {
		a, end := netip.MustParseAddr(c[0]), netip.MustParseAddr(c[1])
		for a.IsValid() && !end.Less(a) {
			p := netip.PrefixFrom(a, 24)
			r, clash := Clash(p, rs)
			if !clash {
				return p, nil
			}
			// Step behind whatever is larger: a route to 10.0.0.0/8 costs one step, not ten thousand.
			a = maxAddr(lastAddr(p), lastAddr(r.Prefix)).Next()
			if a.IsValid() {
				a = netip.PrefixFrom(a, 24).Masked().Addr()
				if a.Less(p.Addr()) || a == p.Addr() {
					a = lastAddr(p).Next()
				}
			}
		}
	}
	return netip.Prefix{}, fmt.Errorf("choose an IPv4 subnet: every private /24 patchbay would take clashes with a route of the host: name one with --subnet")
}

// tries6 is how many unique local prefixes are tried. A clash of even one is a chance of about one in 2^40 for each route.
const tries6 = 64

func (h Host) choose6(rs []Route, seed []byte) (netip.Prefix, error) {
	for i := range tries6 {
		b := [16]byte{0xfd}
		if len(seed) > 0 {
			sum := sha256.Sum256(binary.BigEndian.AppendUint32(slices.Clone(seed), uint32(i)))
			copy(b[1:6], sum[:])
		} else {
			src := h.Rand
			if src == nil {
				src = rand.Reader
			}
			if _, err := io.ReadFull(src, b[1:6]); err != nil {
				return netip.Prefix{}, fmt.Errorf("choose an IPv6 subnet: read random bytes: %w", err)
			}
		}
		p := netip.PrefixFrom(netip.AddrFrom16(b), 64)
		if _, clash := Clash(p, rs); !clash {
			return p, nil
		}
	}
	return netip.Prefix{}, fmt.Errorf("choose an IPv6 subnet: every unique local prefix tried clashes with a route of the host: name one with --subnet")
}
