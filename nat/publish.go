package nat

import (
	"fmt"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Published is a range of host ports that lead to a container. Safe for concurrent use.
type Published struct {
	spec     Spec
	to4, to6 netip.Addr
	n        *NAT
	tcp      []tcpListener // indexed like the range; empty for UDP
	udp      []*pubPort

	mu       sync.Mutex
	closed   bool
	exported bool
}

// Spec is what was published.
func (p *Published) Spec() Spec { return p.spec }

// Targets are the container's addresses that the ports lead to.
func (p *Published) Targets() (v4, v6 netip.Addr) { return p.to4, p.to6 }

// binding is one host port joined to one container port.
type binding struct {
	// host is where to listen. The unspecified IPv6 address with dual means every address of both versions, one socket; clients with IPv4
	// addresses then appear v4-mapped and must be unmapped. Otherwise an IPv6 socket is for IPv6 alone.
	host netip.AddrPort
	dual bool
	// port is the container's. to4 and to6 are its addresses; either may be the zero Addr, not both.
	port     uint16
	to4, to6 netip.Addr
}

// Publish opens the host ports of s and leads them to the container that has the addresses in to, of which there is one of each IP version
// at most. Either all ports of the range are open when it returns or none is. A port in use is an error that names the holder where that can be known.
// It does not block on the network.
func (n *NAT) Publish(s Spec, to []netip.Addr) (*Published, error) { return n.publish(s, to, nil) }

// publish opens the ports, or takes over the sockets in given.
func (n *NAT) publish(s Spec, to []netip.Addr, given *givenSockets) (*Published, error) {
	p := &Published{spec: s, n: n}
	for _, a := range to {
		switch a = a.Unmap(); {
		case a.Is4() && !p.to4.IsValid():
			p.to4 = a
		case a.Is6() && !p.to6.IsValid():
			p.to6 = a
		default:
			return nil, fmt.Errorf("publish %s: container addresses %v hold more than one of an IP version, or an invalid one; give at most one of each", s, to)
		}
	}
	if !p.to4.IsValid() && !p.to6.IsValid() {
		return nil, fmt.Errorf("publish %s: the container has no address; attach it to the network first", s)
	}
	if s.Count < 1 || s.HostPort == 0 || s.Port == 0 || int(s.HostPort)+s.Count > 65536 || int(s.Port)+s.ports() > 65536 || s.Proto != TCP && s.Proto != UDP {
		return nil, fmt.Errorf("publish %s: not a valid spec; make it with ParseSpec", s)
	}
	var err error
	if given == nil {
		err = checkDescriptors(s.Count)
	} else if len(given.fds) != s.Count {
		err = fmt.Errorf("%d sockets for %d ports; give one for each, in the order of Export", len(given.fds), s.Count)
	}
	if err != nil {
		return nil, fmt.Errorf("publish %s: %w", s, err)
	}
	if s.Proto == TCP {
		err = p.listenTCP(given)
	} else {
		err = p.listenUDP(given)
	}
	if err == nil {
		err = n.keep(p)
	}
	if err != nil {
		p.Close()
		return nil, err
	}
	n.log.Info("published", "ports", s.String(), "to4", p.to4, "to6", p.to6)
	return p, nil
}

// binding is the i-th of the range.
func (p *Published) binding(i int) binding {
	b := binding{port: p.spec.Port, to4: p.to4, to6: p.to6}
	if !p.spec.Single {
		b.port += uint16(i)
	}
	host := p.spec.Host
	if !host.IsValid() {
		host, b.dual = netip.IPv6Unspecified(), true
	}
	b.host = netip.AddrPortFrom(host, p.spec.HostPort+uint16(i))
	return b
}

func (p *Published) listenUDP(given *givenSockets) error {
	for i := range p.spec.Count {
		b := p.binding(i)
		c, err := p.n.udp.publish(&b, given.take(i))
		if err != nil {
			return p.bindError(&b, err)
		}
		p.udp = append(p.udp, c)
	}
	return nil
}

// keep puts p on the books, so that NAT.Close closes it.
func (n *NAT) keep(p *Published) error {
	n.pubMu.Lock()
	defer n.pubMu.Unlock()
	if n.pubClosed {
		return fmt.Errorf("publish %s: the gateway is closed", p.spec)
	}
	n.published[p] = struct{}{}
	return nil
}

// Close frees the host ports. Flows that came through them live on. When it returns the ports can be bound by others. Idempotent.
func (p *Published) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	p.closed = true
	p.n.pubMu.Lock()
	_, kept := p.n.published[p]
	delete(p.n.published, p)
	p.n.pubMu.Unlock()
	for i := range p.tcp {
		p.tcp[i].close()
	}
	for _, c := range p.udp {
		c.Close()
	}
	if kept {
		p.n.log.Info("unpublished", "ports", p.spec.String())
	}
	return nil
}

// publishedPorts is how many ports of the host are open.
func (n *NAT) publishedPorts() (ports int) {
	n.pubMu.Lock()
	defer n.pubMu.Unlock()
	for p := range n.published {
		ports += p.spec.Count
	}
	return ports
}

func (n *NAT) closePublished() {
	n.pubMu.Lock()
	n.pubClosed = true
	var ps []*Published
	for p := range n.published {
		ps = append(ps, p)
	}
	n.pubMu.Unlock()
	for _, p := range ps {
		p.Close()
	}
}

// target is the container address and the source address with which a client is shown to it: the client's own when that is
// on neither the host nor the container's network, else the gateway's with port 0, which means an ephemeral one. When the container lacks an address
// of the client's IP version its other address is taken, and the gateway's address of that version is the source.
func (n *NAT) target(b *binding, client netip.AddrPort) (src, dst netip.AddrPort) {
	client = netip.AddrPortFrom(client.Addr().Unmap().WithZone(""), client.Port())
	to, version := b.to4, 4
	if client.Addr().Is6() && b.to6.IsValid() || !b.to4.IsValid() {
		to, version = b.to6, 6
	}
	dst = netip.AddrPortFrom(to, b.port)
	if client.Addr().Is4() == to.Is4() && n.foreign(client.Addr()) {
		return client, dst
	}
	return netip.AddrPortFrom(n.net.Addr(version), 0), dst
}

// foreign reports whether answers to a find their way back here when a container sends them to its default gateway.
func (n *NAT) foreign(a netip.Addr) bool {
	if a.IsLinkLocalUnicast() || n.hosts.local(a) {
		return false
	}
	for _, s := range n.policy.subnets {
		if s.Contains(a) {
			return false
		}
	}
	return true
}

// Descriptors that publishing leaves for connections: a sixteenth of the limit, between these bounds.
const minSpareFDs, maxSpareFDs = 16, 1024

// checkDescriptors says whether the process may open count more descriptors and still have some for connections.
func checkDescriptors(count int) error {
	if count < 16 {
		return nil // bind itself will tell
	}
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return nil
	}
	limit := int(min(l.Cur, 1<<30))
	d, err := os.Open("/proc/self/fd")
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	spare := min(max(limit/16, minSpareFDs), maxSpareFDs)
	if left := limit - len(names) - spare; count > left {
		return fmt.Errorf("%d ports need as many file descriptors and %d of %d are left; raise the limit (ulimit -n, LimitNOFILE=) or publish fewer", count, max(left, 0), limit)
	}
	return nil
}
