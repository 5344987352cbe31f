package nat

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"
	"time"

	"patchbay/frame"
	"patchbay/internal/wire"
	"patchbay/stack"
)

// errorsPerSecond bounds the ICMP errors that are carried to one container.
const errorsPerSecond = 1000

// udpNAT translates datagrams between a container network and sockets of the host, packet by packet.
//
// Outwards (HandlePackets, on the goroutine that read the TAP): each packet finds the host socket of its container endpoint, all those
// of one batch are grouped by socket (sendBatch), and equal datagrams to one destination leave in one UDP_SEGMENT call. Inwards
// (ready, on the loop of NAT.packets): recvmmsg with UDP_GRO into buffers with headroom; the frame is built around the payload where it lies.
//
// It is also the engine of icmpNAT, whose ping sockets differ in little.
type udpNAT struct {
	n      *NAT
	net    stack.Network
	drops  *frame.DropCounters
	policy *policy
	loop   *poller
	now    func() time.Time

	flows  *flowTable
	pubs   pubTable
	pool   sendPool
	rx     *recvBatch // the loop's
	errors budgets
	peers  atomic.Int64 // held by all flows; see flow.learn
}

func newUDP(n *NAT) (*udpNAT, error) {
	u := &udpNAT{n: n, net: n.net, drops: n.drops, policy: n.policy, loop: n.packets, now: n.now, rx: newRecvBatch()}
	u.errors.rate = errorsPerSecond
	u.flows = newFlowTable(u, n.limits.UDPFlows, n.limits.UDPFlowsPerContainer, func(f *flow) time.Duration { return udpIdle(f, &n.limits) })
	u.flows.open = openUDPFlow(ephemeralPorts())
	u.pubs.init(u, n.limits.UDPClients, n.limits.UDPClientsPerContainer)
	n.packets.setTick(u.tick)
	return u, nil
}

// HandlePackets sends the datagrams of ps on their way. It never waits. Implements stack.PacketHandler.
func (u *udpNAT) HandlePackets(ps []stack.Packet) {
	b := u.pool.get(u)
	c := outbound{u: u, b: b, now: u.now().UnixNano()}
	for i := range ps {
		c.packet(&ps[i])
	}
	b.flush()
	u.pool.put(b)
}

// outbound classifies the packets of one batch. It remembers the last answer, since neighbours in a batch are mostly of one flow.
type outbound struct {
	u   *udpNAT
	b   *sendBatch
	now int64

	src, dst netip.AddrPort
	route    route
	routed   bool
}

// route is where a datagram leaves.
type route struct {
	sock *packetSock
	dst  netip.AddrPort
	from netip.Addr
}

func (c *outbound) packet(p *stack.Packet) {
	u := c.u
	l4 := p.L4()
	data, drop, ok := udpPayload(p, l4)
	if !ok {
		u.drops.Add(drop, 1)
		return
	}
	src := netip.AddrPortFrom(p.IP.Src, binary.BigEndian.Uint16(l4[0:]))
	dst := netip.AddrPortFrom(p.IP.Dst, binary.BigEndian.Uint16(l4[2:]))
	if !c.routed || src != c.src || dst != c.dst {
		c.routed = false
		if c.route, ok = u.route(p, src, dst, c.now); !ok {
			return
		}
		c.src, c.dst, c.routed = src, dst, true
	}
	it := sendItem{sock: c.route.sock, dst: c.route.dst, from: c.route.from, data: data, tos: p.IP.TOS, ttl: hop(p.IP.TTL), df: p.IP.DontFragment && p.IP.Len <= u.net.MTU(), pkt: p}
	if p.Frame.Hdr.GSO() == wire.GSOUDPL4 && int(p.Frame.Hdr.GSOSize) < len(data) {
		it.seg, it.df = int(p.Frame.Hdr.GSOSize), p.IP.DontFragment
	}
	if p.IP.Version == 6 && c.route.sock.mtu.Load() != 0 {
		// The container was told of a smaller path MTU. IPv6 has no DF bit to say so, but what is longer still came in fragments of its own making,
		// which the gateway put together: it must be cut again, not refused again.
		it.df = false
	}
	c.b.add(it)
}

// udpPayload checks the lengths in the UDP header of p and returns what it carries. The gateway has verified a finished checksum; an unfinished
// one needs none, since the host makes its own.
func udpPayload(p *stack.Packet, l4 []byte) (data []byte, drop frame.Drop, ok bool) {
	if len(l4) < wire.UDPLen {
		return nil, frame.DropMalformed, false
	}
	gso := p.Frame.Hdr.GSO() == wire.GSOUDPL4
	n := int(binary.BigEndian.Uint16(l4[4:]))
	if gso {
		// The length of a superframe is the frame's: writers differ in what they put here.
		if p.Frame.Hdr.GSOSize == 0 {
			return nil, frame.DropBadHdr, false
		}
		return l4[wire.UDPLen:], 0, true
	}
	if n < wire.UDPLen || n > len(l4) {
		return nil, frame.DropMalformed, false
	}
	return l4[wire.UDPLen:n], 0, true
}

// hop is the time to live with which a packet goes on, or 0 for the host's default, which saves a control message on nearly all of them.
func hop(ttl uint8) uint8 {
	if ttl == defaultTTL || ttl == defaultTTL+1 {
		return 0
	}
	return max(1, ttl-1) // the gateway has answered those that end here
}

// route finds the socket and host address for a datagram of container endpoint src to dst, and opens the flow if there is none. A
// refusal is counted and answered.
func (u *udpNAT) route(p *stack.Packet, src, dst netip.AddrPort, now int64) (r route, ok bool) {
	if r, ok := u.pubs.route(src, dst, now); ok {
		return r, true
	}
	v := u.policy.check(dst.Addr())
	if !v.ok {
		u.drops.Add(v.drop, 1)
		u.net.SendUnreachable(p, v.why, 0)
		return r, false
	}
	host := netip.AddrPortFrom(v.host, dst.Port())
	if dst.Port() == 0 {
		u.drops.Add(frame.DropMalformed, 1)
		return r, false
	}
	if r, ok := u.pubs.initiate(src, dst, host, now); ok {
		return r, true
	}
	f, drop := u.flows.get(src, now)
	if f == nil {
		u.drops.Add(drop, 1)
		if drop == frame.DropHostSend {
			u.net.SendUnreachable(p, stack.UnreachNet, 0)
		}
		return r, false
	}
	f.sent(host, now)
	return route{sock: &f.packetSock, dst: host}, true
}

// gsoFits is the largest datagram worth joining with others in one call: what fits the network, and so most likely the way out.
func (u *udpNAT) gsoFits(s *packetSock) int {
	if s.ping {
		return -1
	}
	if s.v6 && !s.dual {
		return u.net.MTU() - wire.IPv6Len - wire.UDPLen
	}
	return u.net.MTU() - wire.IPv4Len - wire.UDPLen
}

// receive takes what waits on s and gives each message to f, which queues frames on u.rx. It is called on the loop.
func (u *udpNAT) receive(s *packetSock, f func(r *received)) {
	for range recvRounds {
		n, _ := u.rx.recv(s)
		for i := range n {
			var r received
			if !u.rx.at(i, &r) {
				u.drops.Add(frame.DropMalformed, 1)
				continue
			}
			f(&r)
		}
		u.rx.flush(u)
		if n < recvMsgs {
			return
		}
	}
}

// tick expires idle flows; the loop calls it. It returns 0 when there is nothing left to watch.
func (u *udpNAT) tick() time.Duration {
	now := u.now()
	left := u.flows.sweep(now) + u.pubs.sweep(now)
	if u.n.icmp != nil {
		left += u.n.icmp.flows.sweep(now)
	}
	if left == 0 {
		return 0
	}
	return udpSweepEvery
}

func (u *udpNAT) close() {
	u.flows.close()
	u.pubs.close()
}
