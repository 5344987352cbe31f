package dns

import (
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// Domain is the domain under which everything of patchbay has its full name. It is never asked outside.
const Domain = "patchbay.internal"

// SearchDomain is the domain of a network's containers.
func SearchDomain(network string) string { return network + "." + Domain }

// Host is a container as the resolver knows it.
type Host struct {
	Name    string
	Aliases []string     // other names; they may be shared by several hosts, as Name may
	Addrs   []netip.Addr // of either IP version
}

// Zone is what the resolver answers by itself. It is a plain value; SetZone copies what it needs. Names are taken without regard to case; what is no
// domain name (an empty label, more than 63 bytes between dots) is left out.
type Zone struct {
	Network   string         // the network's name
	Subnets   []netip.Prefix // whose reverse names are answered here alone
	Hosts     []Host
	Gateway   []netip.Addr            // gateway.patchbay.internal
	HostAlias []netip.Addr            // host.patchbay.internal
	Names     map[string][]netip.Addr // further full names, such as host.docker.internal
}

// entry is the addresses of one name.
type entry struct{ v4, v6 []netip.Addr }

// zone is a compiled Zone: immutable, read by many. Keys are in canonical form: lower case with the dot at the end.
type zone struct {
	names   map[string]*entry
	nodes   map[string]bool // names inside Domain that exist only because there are names below them
	ptr     map[netip.Addr][]string
	subnets []netip.Prefix
}

const apex = Domain + "."

func compile(z *Zone) *zone {
	c := &zone{names: map[string]*entry{}, nodes: map[string]bool{apex: true}, ptr: map[netip.Addr][]string{}, subnets: append([]netip.Prefix(nil), z.Subnets...)}
	c.node(SearchDomain(z.Network))
	for _, h := range z.Hosts {
		for i, n := range append([]string{h.Name}, h.Aliases...) {
			full := n + "." + SearchDomain(z.Network)
			c.add(n, h.Addrs)
			c.add(n+"."+z.Network, h.Addrs)
			c.add(full, h.Addrs)
			if i == 0 {
				c.reverse(full, h.Addrs)
			}
		}
	}
	for n, as := range z.Names {
		c.add(n, as)
	}
	c.add("gateway."+Domain, z.Gateway)
	c.reverse("gateway."+Domain, z.Gateway)
	c.add("host."+Domain, z.HostAlias)
	c.reverse("host."+Domain, z.HostAlias)
	return c
}

// node makes name and what is between it and the apex exist.
func (z *zone) node(name string) {
	name = dns.CanonicalName(name)
	for dns.IsSubDomain(apex, name) && name != apex {
		z.nodes[name] = true
		_, name, _ = strings.Cut(name, ".")
	}
}

func (z *zone) add(name string, as []netip.Addr) {
	// A name with a backslash is one in the library's notation for odd bytes; nobody is called so.
	if _, ok := dns.IsDomainName(name); !ok || strings.TrimSuffix(name, ".") == "" || strings.ContainsAny(name, "\\ \t\r\n") {
		return
	}
	name = dns.CanonicalName(name)
	z.node(name)
	e := z.names[name]
	if e == nil {
		e = &entry{}
		z.names[name] = e
	}
	for _, a := range as {
		list := &e.v6
		if a = a.WithZone("").Unmap(); a.Is4() {
			list = &e.v4
		}
		if a.IsValid() && !contains(*list, a) {
			*list = append(*list, a)
		}
	}
}

func contains(as []netip.Addr, a netip.Addr) bool {
	for _, b := range as {
		if a == b {
			return true
		}
	}
	return false
}

func (z *zone) reverse(name string, as []netip.Addr) {
	name = dns.CanonicalName(name)
	if z.names[name] == nil {
		return
	}
	for _, a := range as {
		a = a.WithZone("").Unmap()
		z.ptr[a] = append(z.ptr[a], name)
	}
}

// localhost is what localhost and all below it mean.
var localhost = &entry{
	v4: []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})},
	v6: []netip.Addr{netip.IPv6Loopback()},
}

// answer is the reply to the one question of q, or nil when it is to be asked outside. turn says which address comes first.
func (z *zone) answer(q *dns.Msg, ttl time.Duration, turn uint32) *dns.Msg {
	ques := q.Question[0]
	name := dns.CanonicalName(ques.Name)
	hdr := func(t uint16) dns.RR_Header {
		return dns.RR_Header{Name: ques.Name, Rrtype: t, Class: dns.ClassINET, Ttl: uint32(ttl / time.Second)}
	}
	e := z.names[name]
	if e == nil && (name == "localhost." || strings.HasSuffix(name, ".localhost.")) {
		e = localhost
	}
	if e != nil {
		m := reply(q, dns.RcodeSuccess)
		if ques.Qtype == dns.TypeA || ques.Qtype == dns.TypeANY {
			for i := range e.v4 {
				a := e.v4[(i+int(turn%uint32(len(e.v4))))%len(e.v4)]
				m.Answer = append(m.Answer, &dns.A{Hdr: hdr(dns.TypeA), A: a.AsSlice()})
			}
		}
		if ques.Qtype == dns.TypeAAAA || ques.Qtype == dns.TypeANY {
			for i := range e.v6 {
				a := e.v6[(i+int(turn%uint32(len(e.v6))))%len(e.v6)]
				m.Answer = append(m.Answer, &dns.AAAA{Hdr: hdr(dns.TypeAAAA), AAAA: a.AsSlice()})
			}
		}
		return negative(m, parentZone(name, name), ttl)
	}
	if dns.IsSubDomain(apex, name) {
		if z.nodes[name] {
			return negative(reply(q, dns.RcodeSuccess), apex, ttl)
		}
		return negative(reply(q, dns.RcodeNameError), apex, ttl)
	}
	if a, ok := arpaAddr(name); ok {
		_, parent, _ := strings.Cut(name, ".")
		if names := z.ptr[a]; names != nil {
			m := reply(q, dns.RcodeSuccess)
			if ques.Qtype == dns.TypePTR || ques.Qtype == dns.TypeANY {
				for _, n := range names {
					m.Answer = append(m.Answer, &dns.PTR{Hdr: hdr(dns.TypePTR), Ptr: n})
				}
			}
			return negative(m, parent, ttl)
		}
		for _, p := range z.subnets {
			if p.Contains(a) {
				return negative(reply(q, dns.RcodeNameError), parent, ttl)
			}
		}
	}
	return nil
}

// parentZone is the zone whose SOA goes with a negative answer about name.
func parentZone(name, otherwise string) string {
	if dns.IsSubDomain(apex, name) {
		return apex
	}
	return otherwise
}

// negative puts the SOA of zone into m when m answers nothing, so that caches know for how long that holds (RFC 2308 §3).
func negative(m *dns.Msg, zone string, ttl time.Duration) *dns.Msg {
	if len(m.Answer) > 0 {
		return m
	}
	sec := uint32(ttl / time.Second)
	m.Ns = []dns.RR{&dns.SOA{
		Hdr: dns.RR_Header{Name: zone, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: sec},
		Ns:  "gateway." + apex, Mbox: "nobody." + apex, Serial: 1, Refresh: 3600, Retry: 600, Expire: 86400, Minttl: sec,
	}}
	return m
}

// arpaAddr is the address whose reverse name is name (canonical form), if it is a whole one.
func arpaAddr(name string) (netip.Addr, bool) {
	if rest, ok := strings.CutSuffix(name, ".in-addr.arpa."); ok {
		l := strings.Split(rest, ".")
		if len(l) != 4 {
			return netip.Addr{}, false
		}
		a, err := netip.ParseAddr(l[3] + "." + l[2] + "." + l[1] + "." + l[0])
		return a, err == nil && a.Is4()
	}
	rest, ok := strings.CutSuffix(name, ".ip6.arpa.")
	if !ok || len(rest) != 63 {
		return netip.Addr{}, false
	}
	var b [16]byte
	for i := range 32 {
		n := strings.IndexByte("0123456789abcdef", rest[62-2*i])
		if n < 0 || i < 31 && rest[61-2*i] != '.' {
			return netip.Addr{}, false
		}
		b[i/2] |= byte(n) << (4 * (1 - i%2))
	}
	return netip.AddrFrom16(b), true
}
