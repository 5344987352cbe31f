package ipam

import (
	"errors"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// dumps is how often a listing is repeated when routes change while the kernel lists them.
const dumps = 5

// kernelRoutes lists the routes of every table, the local one included: an address of the host clashes too.
func kernelRoutes() ([]Route, error) {
	var names map[int]string
	var out []Route
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rs, err := listRoutes(family)
		if err != nil {
			return nil, err
		}
		if names == nil {
			if names, err = linkNames(); err != nil {
				return nil, err
			}
		}
		for _, r := range rs {
			p, ok := routePrefix(&r)
			if !ok {
				continue
			}
			index := r.LinkIndex
			if index == 0 && len(r.MultiPath) > 0 {
				index = r.MultiPath[0].LinkIndex
			}
			out = append(out, Route{Prefix: p, Interface: names[index]})
		}
	}
	return out, nil
}

func listRoutes(family int) (rs []netlink.Route, err error) {
	for range dumps {
		rs, err = netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return rs, err
		}
	}
	// What was listed in spite of the changes is as good as a listing a moment earlier or later.
	return rs, nil
}

func linkNames() (map[int]string, error) {
	var links []netlink.Link
	var err error
	for range dumps {
		if links, err = netlink.LinkList(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, err
	}
	names := make(map[int]string, len(links))
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	return names, nil
}

// routePrefix is a route's destination. ok is false for what is no place to send unicast to.
func routePrefix(r *netlink.Route) (p netip.Prefix, ok bool) {
	if r.Type == unix.RTN_MULTICAST || r.Dst == nil {
		return p, false // no destination: the default route
	}
	a, ok := netip.AddrFromSlice(r.Dst.IP)
	if !ok {
		return p, false
	}
	ones, bits := r.Dst.Mask.Size()
	if a = a.Unmap(); bits != a.BitLen() {
		return p, false
	}
	return netip.PrefixFrom(a, ones), true
}
