package nat

import (
	"container/list"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/stack"
)

// pubPort is one published UDP port. An idle one is this struct, a descriptor, and an entry in pubTable.
type pubPort struct {
	packetSock
	u       *udpNAT
	b       binding
	clients map[netip.AddrPort]*pubClient // by the client's address and port; nil while there is none; pubTable.mu guards it
}

// pubClient is a client of a published port, or a peer that the container has written to from it.
type pubClient struct {
	port  *pubPort
	host  netip.AddrPort // the client, as the host sees it
	inner netip.AddrPort // the client, as the container sees it
	dst   netip.AddrPort // the container's endpoint
	// local is the host's address that the client spoke to last: answers leave from it.
	local    atomic.Pointer[netip.Addr]
	seen     atomic.Int64  // Unix nanoseconds
	answered atomic.Bool   // packets have gone both ways
	inbound  bool          // the client spoke first
	fresh    *list.Element // in pubTable.fresh while it may be evicted; pubTable.mu guards it
}

// pubKey is how a container's packet names a client: which endpoint of the container answers to whom.
type pubKey struct{ dst, inner netip.AddrPort }

// pubTable holds the published ports and their clients. Safe for concurrent use.
type pubTable struct {
	u      *udpNAT
	quota  *quota       // of clients, per container
	number atomic.Int64 // of ports: none is the common case, and then the table costs a packet nothing

	mu      sync.RWMutex
	targets map[netip.AddrPort][]*pubPort // by the container's endpoint
	clients map[pubKey]*pubClient
	ports   map[*pubPort]struct{}
	// fresh are the clients that spoke first, oldest first, by the container's address. One that has been answered is taken out when it is met.
	fresh  map[netip.Addr]*list.List
	next   uint16 // mapped port to try next for clients shown as the gateway
	closed bool
}

// Mapped ports: those tried for a client shown as the gateway whose own port is taken.
const (
	mappedLo    = 49152
	mappedTries = 64
)

func (t *pubTable) init(u *udpNAT, total, each int) {
	t.u, t.quota, t.next = u, newQuota(total, each), mappedLo
	t.targets = make(map[netip.AddrPort][]*pubPort)
	t.clients = make(map[pubKey]*pubClient)
	t.fresh = make(map[netip.Addr]*list.List)
	t.ports = make(map[*pubPort]struct{})
}

// publish binds a host UDP port, or takes over the socket given unless that is -1, and forwards its datagrams; the error is the bare one of socket or bind, which the
// caller words.
func (u *udpNAT) publish(b *binding, given int) (*pubPort, error) {
	p := &pubPort{u: u, b: *b}
	p.owner = p
	if err := p.open(given); err != nil {
		return nil, err
	}
	t := &u.pubs
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		p.closeSock()
		return nil, errPollerClosed
	}
	t.ports[p] = struct{}{}
	for _, dst := range p.endpoints() {
		t.targets[dst] = append(t.targets[dst], p)
	}
	t.number.Add(1)
	t.mu.Unlock()
	if err := u.loop.add(p.fd, unix.EPOLLIN, p); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

// open opens p's socket, or takes over the one given, which is closed on error.
func (p *pubPort) open(given int) error {
	if given >= 0 {
		err := adoptSocket(given, unix.SOCK_DGRAM, &p.b)
		if err == nil {
			err = p.adoptUDP(given, true)
		}
		if err != nil {
			unix.Close(given)
		} else if p.b.dual && !p.v6 {
			p.b.host, p.b.dual = netip.AddrPortFrom(netip.IPv4Unspecified(), p.b.host.Port()), false
		}
		return err
	}
	err := p.openUDP(p.b.host, p.b.dual, true)
	if p.b.dual && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)) {
		// The host has no IPv6: every address of it is an IPv4 one.
		p.b.host, p.b.dual = netip.AddrPortFrom(netip.IPv4Unspecified(), p.b.host.Port()), false
		err = p.openUDP(p.b.host, false, true)
	}
	return err
}

// endpoints are the container's, one of each IP version it has.
func (p *pubPort) endpoints() (out []netip.AddrPort) {
	for _, a := range []netip.Addr{p.b.to4, p.b.to6} {
		if a.IsValid() {
			out = append(out, netip.AddrPortFrom(a, p.b.port))
		}
	}
	return out
}

// Close frees the port. Idempotent. It must not be called on the loop.
func (p *pubPort) Close() error {
	t := &p.u.pubs
	t.mu.Lock()
	if _, ok := t.ports[p]; !ok {
		t.mu.Unlock()
		return nil
	}
	delete(t.ports, p)
	for _, dst := range p.endpoints() {
		ps := t.targets[dst]
		for i, o := range ps {
			if o == p {
				ps = append(ps[:i:i], ps[i+1:]...)
				break
			}
		}
		if len(ps) == 0 {
			delete(t.targets, dst)
		} else {
			t.targets[dst] = ps
		}
	}
	for _, c := range p.clients {
		t.forget(c)
	}
	t.number.Add(-1)
	t.mu.Unlock()
	p.u.loop.remove(p.fd)
	p.closeSock()
	return nil
}

// forget takes a client out. t.mu is held.
func (t *pubTable) forget(c *pubClient) {
	delete(t.clients, pubKey{c.dst, c.inner})
	delete(c.port.clients, c.host)
	if len(c.port.clients) == 0 {
		c.port.clients = nil
	}
	t.settle(c)
	t.quota.give(c.dst.Addr())
}

// settle takes c out of those that may be evicted. t.mu is held.
func (t *pubTable) settle(c *pubClient) {
	if c.fresh == nil {
		return
	}
	l := t.fresh[c.dst.Addr()]
	l.Remove(c.fresh)
	c.fresh = nil
	if l.Len() == 0 {
		delete(t.fresh, c.dst.Addr())
	}
}

// evict makes room for a client of container a by taking out the oldest one that its container never answered, and reports whether there was one: where a
// has its share, one of a; else one of the container that has most of them. Source addresses of datagrams cost nothing to make up, so
// clients that nobody answers must not keep others out. t.mu is held.
func (t *pubTable) evict(a netip.Addr) bool {
	own := t.quota.heldBy(a) >= t.quota.each
	for {
		l := t.fresh[a]
		if !own {
			for _, o := range t.fresh {
				if l == nil || o.Len() > l.Len() {
					l = o
				}
			}
		}
		if l == nil {
			return false
		}
		c := l.Front().Value.(*pubClient)
		if c.answered.Load() {
			t.settle(c)
			continue
		}
		t.forget(c)
		t.u.n.stats.evicted.Add(1)
		return true
	}
}

// route finds the client that a container's packet from src to dst answers.
func (t *pubTable) route(src, dst netip.AddrPort, now int64) (r route, ok bool) {
	if t.number.Load() == 0 {
		return r, false
	}
	t.mu.RLock()
	c := t.clients[pubKey{src, dst}]
	if c != nil {
		c.seen.Store(now)
	}
	t.mu.RUnlock()
	if c == nil {
		return r, false
	}
	return c.outward(), true
}

// outward is the way to the client. The container has just sent to it.
func (c *pubClient) outward() route {
	if c.inbound && !c.answered.Load() {
		c.answered.Store(true)
	}
	r := route{sock: &c.port.packetSock, dst: c.host}
	if a := c.port.local(c); a != nil {
		r.from = *a
	}
	return r
}

// local is the address to leave from, where the socket is bound to more than one.
func (p *pubPort) local(c *pubClient) *netip.Addr {
	if !p.b.host.Addr().IsUnspecified() {
		return nil
	}
	return c.local.Load()
}

// initiate has a container that writes to somebody new from a published port do so from the host's published port, so that the port
// is the same to everybody (RFC 4787 REQ-1). It needs a port published on every address. dst is the container's name for host.
func (t *pubTable) initiate(src, dst, host netip.AddrPort, now int64) (r route, ok bool) {
	if t.number.Load() == 0 {
		return r, false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := t.clients[pubKey{src, dst}]; c != nil {
		return c.outward(), true
	}
	for _, p := range t.targets[src] {
		if !p.b.host.Addr().IsUnspecified() || p.v6 != host.Addr().Is6() && !p.b.dual || p.clients[host] != nil {
			continue
		}
		c := &pubClient{port: p, host: host, inner: dst, dst: src}
		if drop := t.keep(c, now); drop != 0 {
			return r, false // the flow table has the last word
		}
		return c.outward(), true
	}
	return r, false
}

// keep adds a client. It returns 0 or the reason against it. t.mu is held.
func (t *pubTable) keep(c *pubClient, now int64) frame.Drop {
	a := c.dst.Addr()
	// The container itself evicts nobody: there is the flow table for what it sends.
	if t.closed || !t.quota.take(a) && !(c.inbound && t.evict(a) && t.quota.take(a)) {
		return frame.DropFlowLimit
	}
	if c.inbound {
		l := t.fresh[a]
		if l == nil {
			l = list.New()
			t.fresh[a] = l
		}
		c.fresh = l.PushBack(c)
	}
	c.seen.Store(now)
	if c.port.clients == nil {
		c.port.clients = make(map[netip.AddrPort]*pubClient)
	}
	c.port.clients[c.host] = c
	t.clients[pubKey{c.dst, c.inner}] = c
	t.u.loop.armTick(udpSweepEvery)
	return 0
}

// client finds the client that r came from, or adds it.
func (p *pubPort) client(r *received, now int64) (*pubClient, frame.Drop) {
	t := &p.u.pubs
	t.mu.RLock()
	c := p.clients[r.peer]
	t.mu.RUnlock()
	if c == nil {
		var drop frame.Drop
		if c, drop = t.admit(p, r.peer, now); c == nil {
			return nil, drop
		}
	}
	c.seen.Store(now)
	if !c.inbound && !c.answered.Load() {
		c.answered.Store(true)
	}
	if old := c.local.Load(); r.local.IsValid() && (old == nil || *old != r.local) {
		a := r.local
		c.local.Store(&a)
	}
	return c, 0
}

// admit adds the client peer of p: shown with its own address where that can be, else as the gateway.
func (t *pubTable) admit(p *pubPort, peer netip.AddrPort, now int64) (*pubClient, frame.Drop) {
	inner, dst := p.u.n.target(&p.b, peer)
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.ports[p]; !ok {
		return nil, frame.DropNoFlow
	}
	if inner.Port() != 0 && t.clients[pubKey{dst, inner}] != nil {
		// Two published ports of one container port, and the client uses both from one port of its own: only one can look like that client.
		inner = netip.AddrPortFrom(p.u.n.net.Addr(versionOf(dst.Addr())), 0)
	}
	if inner.Port() == 0 {
		var ok bool
		if inner, ok = t.mapped(dst, inner.Addr(), peer.Port()); !ok {
			return nil, frame.DropFlowLimit
		}
	}
	c := &pubClient{port: p, host: peer, inner: inner, dst: dst, inbound: true}
	if drop := t.keep(c, now); drop != 0 {
		return nil, drop
	}
	return c, 0
}

// mapped finds a port of the gateway for a client: the client's own if that is free and not one of the gateway's services', else any.
func (t *pubTable) mapped(dst netip.AddrPort, gateway netip.Addr, want uint16) (netip.AddrPort, bool) {
	if !gateway.IsValid() {
		return netip.AddrPort{}, false
	}
	ap := netip.AddrPortFrom(gateway, want)
	for try := 0; want < 1024 || t.clients[pubKey{dst, ap}] != nil; try++ {
		if try == mappedTries {
			return ap, false
		}
		want = t.next
		ap = netip.AddrPortFrom(gateway, want)
		if t.next++; t.next < mappedLo {
			t.next = mappedLo
		}
	}
	return ap, true
}

func versionOf(a netip.Addr) int {
	if a.Is4() {
		return 4
	}
	return 6
}

// ready implements pollHandler.
func (p *pubPort) ready(events uint32) {
	u := p.u
	if events&unix.EPOLLERR != 0 {
		u.drainErrors(&p.packetSock)
	}
	if events&unix.EPOLLIN == 0 {
		return
	}
	now := u.now().UnixNano()
	var c *pubClient // of the message before
	u.receive(&p.packetSock, func(r *received) {
		if c == nil || c.host != r.peer {
			var drop frame.Drop
			if c, drop = p.client(r, now); c == nil {
				u.drops.Add(drop, 1)
				return
			}
		}
		u.rx.queueUDP(u, r, c.inner, c.dst)
	})
}

// origin implements sockOwner.
func (p *pubPort) origin(peer netip.AddrPort) (src, dst netip.AddrPort, ok bool) {
	t := &p.u.pubs
	t.mu.RLock()
	defer t.mu.RUnlock()
	if c := p.clients[peer]; c != nil {
		return c.dst, c.inner, true
	}
	return src, dst, false
}

// idle is how long a client may be silent.
func (c *pubClient) idle(l *Limits) time.Duration {
	if c.answered.Load() {
		return l.UDPIdle
	}
	return min(l.UDPNewIdle, l.UDPIdle)
}

// sweep forgets silent clients and returns how many are left. It runs on the loop.
func (t *pubTable) sweep(now time.Time) int {
	t.mu.RLock()
	var dead []*pubClient
	idle := func(c *pubClient) bool { return now.UnixNano()-c.seen.Load() > int64(c.idle(&t.u.n.limits)) }
	for _, c := range t.clients {
		if idle(c) {
			dead = append(dead, c)
		}
	}
	left := len(t.clients)
	t.mu.RUnlock()
	if len(dead) == 0 {
		return left
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range dead {
		if idle(c) && t.clients[pubKey{c.dst, c.inner}] == c {
			t.forget(c)
		}
	}
	return len(t.clients)
}

// close frees every port. It must not run on the loop.
func (t *pubTable) close() {
	t.mu.Lock()
	t.closed = true
	ps := make([]*pubPort, 0, len(t.ports))
	for p := range t.ports {
		ps = append(ps, p)
	}
	t.mu.Unlock()
	for _, p := range ps {
		p.Close()
	}
}

var _ stack.PacketHandler = (*udpNAT)(nil)
