package dns

import (
	"net/netip"

	"patchbay/frame"
	"patchbay/internal/wire"
	"patchbay/stack"
)

// Port is where the resolver is asked, by UDP and by TCP.
const Port = 53

// ttl of the packets we send; hop limit of IPv6.
const ttl = 64

// HandlePackets implements stack.PacketHandler for datagrams to the gateway's port 53.
func (s *Server) HandlePackets(ps []stack.Packet) {
	for i := range ps {
		p := &ps[i]
		l4 := p.L4()
		u, ok := wire.ParseUDP(l4)
		if !ok || u.SrcPort == 0 || p.IP.Src.IsMulticast() || p.IP.Src.IsUnspecified() {
			s.c.Drops.Add(frame.DropMalformed, 1)
			continue
		}
		h := &p.Frame.Hdr
		if h.Flags&wire.VirtioDataValid == 0 && !h.UnfinishedL4(p.L3+p.IP.HdrLen) && !wire.VerifyL4(&p.IP, l4) {
			s.c.Drops.Add(frame.DropChecksum, 1)
			continue
		}
		client, server := netip.AddrPortFrom(p.IP.Src, u.SrcPort), netip.AddrPortFrom(p.IP.Dst, u.DstPort)
		data := l4[wire.UDPLen:u.Len]
		for h.GSO() == wire.GSOUDPL4 && h.GSOSize > 0 && len(data) > int(h.GSOSize) { // each segment is a query
			s.query(client, server, data[:h.GSOSize])
			data = data[h.GSOSize:]
		}
		s.query(client, server, data)
	}
}

// query answers one datagram, now or on a goroutine of its own.
func (s *Server) query(client, server netip.AddrPort, data []byte) {
	v := s.judge(client.Addr(), data)
	switch {
	case v.drop:
		s.c.Drops.Add(frame.DropMalformed, 1)
	case v.answer != nil:
		s.send(client, server, fit(v.answer, limitUDP(v.limit, s.room(client))))
	case !s.queries.enter(client.Addr()):
		s.c.Drops.Add(frame.DropServiceLimit, 1)
	default:
		s.forwarded.Add(1)
		query := append([]byte(nil), data...)
		go func() {
			defer s.queries.leave(client.Addr())
			if b := s.resolve("udp", query, v.q); b != nil && s.ctx.Err() == nil {
				s.send(client, server, fit(b, limitUDP(v.limit, s.room(client))))
			}
		}()
	}
}

// room is how many bytes of UDP payload one packet to the client can carry.
func (s *Server) room(client netip.AddrPort) int {
	return s.c.Network.MTU() - ipLen(client.Addr()) - wire.UDPLen
}

func ipLen(a netip.Addr) int {
	if a.Is4() {
		return wire.IPv4Len
	}
	return wire.IPv6Len
}

// send puts one datagram on the network.
func (s *Server) send(to, from netip.AddrPort, data []byte) {
	buf, _ := s.scratch.Get().(*[]byte)
	if buf == nil {
		buf = new([]byte)
	}
	defer s.scratch.Put(buf)
	l3 := wire.EthernetLen
	l4 := l3 + ipLen(to.Addr())
	end := l4 + wire.UDPLen + len(data)
	if cap(*buf) < end {
		*buf = make([]byte, end)
	}
	b := (*buf)[:end]
	clear(b[:l3])
	if to.Addr().Is4() {
		wire.PutIPv4(b[l3:], from.Addr(), to.Addr(), wire.ProtoUDP, 0, ttl, end-l3, 0, true)
	} else {
		wire.PutIPv6(b[l3:], from.Addr(), to.Addr(), wire.ProtoUDP, 0, ttl, end-l4)
	}
	wire.PutUDP(b[l4:], from.Port(), to.Port(), len(data))
	copy(b[l4+wire.UDPLen:], data)
	wire.PutL4Checksum(b[l4:], from.Addr(), to.Addr(), wire.ProtoUDP)
	s.c.Network.Send([]frame.Frame{{Data: b}})
}
