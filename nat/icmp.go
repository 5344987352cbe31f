package nat

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/wire"
	"patchbay/stack"
)

// icmpNAT carries echo requests to the host's side through ping sockets (SOCK_DGRAM with IPPROTO_ICMP or IPPROTO_ICMPV6), one per container and
// identifier, and the replies and ICMP errors back. A reply is only ever one that came: an address that does not answer stays silent.
//
// Where the host forbids ping sockets (net.ipv4.ping_group_range, which governs ICMPv6 too) the container is told "administratively prohibited", so that
// its ping says so at once and does not look like a network that is down; the counter is ping-forbidden.
type icmpNAT struct {
	u      *udpNAT
	flows  *flowTable
	warned atomic.Bool
}

func newICMP(n *NAT) (*icmpNAT, error) {
	c := &icmpNAT{u: n.udp}
	c.flows = newFlowTable(n.udp, n.limits.PingFlows, n.limits.PingFlowsPerContainer, func(*flow) time.Duration { return n.limits.PingIdle })
	c.flows.open = c.open
	return c, nil
}

// open opens the ping socket of a flow.
func (c *icmpNAT) open(f *flow) (frame.Drop, error) {
	err := f.openPing(f.src.Addr().Is6(), f.src.Port())
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		if !c.warned.Swap(true) {
			c.u.n.log.Warn("containers cannot ping: the host forbids ping sockets", "remedy", `sysctl -w net.ipv4.ping_group_range="0 2147483647"`)
		}
		return frame.DropPingForbidden, err
	}
	return openDrop(err), err
}

// HandlePackets sends the echo requests of ps on their way. It never waits. Implements stack.PacketHandler.
func (c *icmpNAT) HandlePackets(ps []stack.Packet) {
	b := c.u.pool.get(c.u)
	now := c.u.now().UnixNano()
	for i := range ps {
		c.packet(b, &ps[i], now)
	}
	b.flush()
	c.u.pool.put(b)
}

func (c *icmpNAT) packet(b *sendBatch, p *stack.Packet, now int64) {
	u := c.u
	l4 := p.L4()
	if drop, ok := echoRequest(p, l4); !ok {
		u.drops.Add(drop, 1)
		return
	}
	v := u.policy.check(p.IP.Dst)
	if !v.ok {
		u.drops.Add(v.drop, 1)
		u.net.SendUnreachable(p, v.why, 0)
		return
	}
	f, drop := c.flows.get(netip.AddrPortFrom(p.IP.Src, binary.BigEndian.Uint16(l4[4:])), now)
	if f == nil {
		u.drops.Add(drop, 1)
		switch drop {
		case frame.DropPingForbidden:
			u.net.SendUnreachable(p, stack.UnreachProhibited, 0)
		case frame.DropHostSend:
			u.net.SendUnreachable(p, stack.UnreachNet, 0)
		}
		return
	}
	dst := netip.AddrPortFrom(v.host, 0)
	f.sent(dst, now)
	b.add(sendItem{sock: &f.packetSock, dst: dst, data: l4, tos: p.IP.TOS, ttl: hop(p.IP.TTL), pkt: p})
}

// echoRequest checks that p is a whole echo request. The gateway has verified its checksum, and the host makes another.
func echoRequest(p *stack.Packet, l4 []byte) (drop frame.Drop, ok bool) {
	if len(l4) < wire.ICMPLen {
		return frame.DropMalformed, false
	}
	if p.IP.Version == 4 && p.IP.Proto == wire.ProtoICMP && l4[0] == 8 || p.IP.Version == 6 && p.IP.Proto == wire.ProtoICMPv6 && l4[0] == 128 {
		if l4[1] == 0 {
			return 0, true
		}
	}
	return frame.DropNotForGateway, false
}

// queueEcho turns a received echo reply into a packet from src to the container of flow f.
func (b *recvBatch) queueEcho(u *udpNAT, f *flow, r *received, src netip.Addr) {
	dst := f.src.Addr()
	m := r.buf[headroom : headroom+r.n]
	reply, proto := uint8(0), wire.ProtoICMP
	var acc uint64
	if dst.Is6() {
		reply, proto = 129, wire.ProtoICMPv6
		acc = wire.PseudoSum(src, dst, proto, r.n)
	}
	if r.n < wire.ICMPLen || m[0] != reply {
		u.drops.Add(frame.DropMalformed, 1)
		return
	}
	// The socket's identifier becomes the container's. The kernel has checked the sum; this makes the new one.
	binary.BigEndian.PutUint16(m[4:], f.src.Port())
	m[2], m[3] = 0, 0
	binary.BigEndian.PutUint16(m[2:], ^wire.Fold(wire.Sum(m, acc)))
	ttl := r.ttl
	if ttl == 0 {
		ttl = defaultTTL
	} else if ttl > 1 {
		ttl-- // the gateway is a hop
	}
	hdr := ipHdrLen(dst)
	data := r.buf[headroom-hdr-wire.EthernetLen : headroom+r.n]
	mtu := u.net.MTU()
	putIP(data[wire.EthernetLen:], src, dst, proto, r.tos, ttl, r.n, 0, hdr+r.n <= mtu)
	fr := frame.Frame{Data: data}
	if hdr+r.n > mtu {
		b.queueFragments(u, &fr, mtu)
		return
	}
	b.fs = append(b.fs, fr)
}

func (c *icmpNAT) close() { c.flows.close() }
