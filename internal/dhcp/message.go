package dhcp

import (
	"context"
	"net"
	"net/netip"
	"time"

	"patchbay/frame"
	"patchbay/internal/wire"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"
	"github.com/insomniacslk/dhcp/rfc1035label"
)

const (
	leaserTimeout = 5 * time.Second // a client asks again after 4 s (RFC 2131 §4.1)
	minMessage    = 548             // bytes every client takes: 576 of IP packet
	maxClientID   = 64              // bytes of client identifier given back
	maxHostname   = 63              // bytes of host name, a DNS label's
)

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// addr is ip as an Addr, zero for what is absent or 0.0.0.0.
func addr(ip net.IP) netip.Addr {
	a, ok := netip.AddrFromSlice(ip.To4())
	if !ok || a.IsUnspecified() {
		return netip.Addr{}
	}
	return a
}

// serve answers one message.
func (s *Server) serve(r request) {
	m, err := dhcpv4.FromBytes(r.data)
	if err != nil || m.OpCode != dhcpv4.OpcodeBootRequest || m.HWType != iana.HWTypeEthernet || len(m.ClientHWAddr) != len(wire.MAC{}) ||
		wire.MAC(m.ClientHWAddr).IsGroup() || wire.MAC(m.ClientHWAddr).IsZero() {
		s.c.Drops.Add(frame.DropMalformed, 1)
		return
	}
	if wire.MAC(m.ClientHWAddr) != r.mac {
		s.c.Drops.Add(frame.DropSpoofMAC, 1)
		return
	}
	server := addr(m.ServerIdentifier())
	if addr(m.GatewayIPAddr).IsValid() || server.IsValid() && server != s.c.Addr {
		// Through a relay, from another network; or the client took another server's offer.
		s.c.Drops.Add(frame.DropNotForGateway, 1)
		return
	}
	ctx, cancel := context.WithTimeout(s.ctx, leaserTimeout)
	defer cancel()
	client, requested := addr(m.ClientIPAddr), addr(m.RequestedIPAddress())
	switch m.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		if l, ok := s.lease(ctx, m, r.mac, requested, s.c.OfferTime); ok {
			s.reply(m, dhcpv4.MessageTypeOffer, l)
		}
	case dhcpv4.MessageTypeRequest:
		want := requested // SELECTING, INIT-REBOOT
		if client.IsValid() {
			want = client // RENEWING, REBINDING
		}
		if !want.IsValid() {
			s.c.Drops.Add(frame.DropMalformed, 1)
			return
		}
		if !s.c.Prefix.Contains(want) {
			s.nak(m, want, "that address is not of this network")
			return
		}
		l, ok := s.lease(ctx, m, r.mac, want, s.c.LeaseTime)
		switch {
		case !ok: // nothing is known about the address: the client goes on with what it has, or asks again
		case l.Addr != want:
			s.nak(m, want, "that address is another's")
		default:
			s.reply(m, dhcpv4.MessageTypeAck, l)
		}
	case dhcpv4.MessageTypeDecline:
		if requested.IsValid() {
			s.c.Logger.Warn("dhcp: address is in use by another machine", "addr", requested, "told by", r.mac)
			s.told("decline", r.mac, s.c.Leaser.Decline(ctx, r.mac, requested))
		}
	case dhcpv4.MessageTypeRelease:
		if client.IsValid() {
			s.told("release", r.mac, s.c.Leaser.Release(ctx, r.mac, client))
		}
	case dhcpv4.MessageTypeInform:
		if !client.IsValid() || !s.c.Prefix.Contains(client) {
			s.c.Drops.Add(frame.DropNotForGateway, 1)
			return
		}
		s.reply(m, dhcpv4.MessageTypeAck, Lease{})
	default:
		s.c.Drops.Add(frame.DropMalformed, 1)
	}
}

// told logs what the Leaser could not do.
func (s *Server) told(what string, mac wire.MAC, err error) {
	if err != nil && s.ctx.Err() == nil {
		s.c.Logger.Warn("dhcp: "+what+" failed", "mac", mac, "error", err)
	}
}

func (s *Server) lease(ctx context.Context, m *dhcpv4.DHCPv4, mac wire.MAC, want netip.Addr, d time.Duration) (Lease, bool) {
	l, err := s.c.Leaser.Lease(ctx, mac, want, hostname(m.HostName()), d)
	if err == nil && (!l.Addr.Is4() || !s.c.Prefix.Contains(l.Addr)) {
		return l, false // an attachment without an address here
	}
	if err != nil {
		s.c.Drops.Add(frame.DropServiceLimit, 1)
		s.told("lease", mac, err)
	}
	return l, err == nil
}

// hostname is what of a client's word can be a name.
func hostname(h string) string {
	if len(h) > maxHostname {
		return ""
	}
	for i := range len(h) {
		if c := h[i]; c != '-' && c != '_' && c != '.' && (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
			return ""
		}
	}
	return h
}

// base is the reply to m without what depends on its kind.
func (s *Server) base(m *dhcpv4.DHCPv4, t dhcpv4.MessageType) (*dhcpv4.DHCPv4, error) {
	r, err := dhcpv4.NewReplyFromRequest(m)
	if err != nil {
		return nil, err
	}
	if len(r.Options[dhcpv4.OptionClientIdentifier.Code()]) > maxClientID {
		r.DeleteOption(dhcpv4.OptionClientIdentifier)
	}
	r.DeleteOption(dhcpv4.OptionRelayAgentInformation)
	r.UpdateOption(dhcpv4.OptMessageType(t))
	r.UpdateOption(dhcpv4.OptServerIdentifier(s.c.Addr.AsSlice()))
	return r, nil
}

// nak tells the client to start over.
func (s *Server) nak(m *dhcpv4.DHCPv4, want netip.Addr, why string) {
	r, err := s.base(m, dhcpv4.MessageTypeNak)
	if err != nil {
		s.told("reply", wire.MAC(m.ClientHWAddr), err)
		return
	}
	r.UpdateOption(dhcpv4.OptMessage(why))
	s.send(r, broadcast, wire.Broadcast)
	s.c.Logger.Info("dhcp: refused", "mac", wire.MAC(m.ClientHWAddr), "addr", want, "why", why)
}

// reply sends an OFFER or ACK. With a zero l.Addr, it is the answer to INFORM.
func (s *Server) reply(m *dhcpv4.DHCPv4, t dhcpv4.MessageType, l Lease) {
	mac := wire.MAC(m.ClientHWAddr)
	r, err := s.base(m, t)
	if err != nil {
		s.told("reply", mac, err)
		return
	}
	r.ClientIPAddr = m.ClientIPAddr
	if t == dhcpv4.MessageTypeOffer {
		r.ClientIPAddr = net.IPv4zero // RFC 2131 table 3
	}
	if l.Addr.IsValid() {
		r.YourIPAddr = l.Addr.AsSlice()
		r.UpdateOption(dhcpv4.OptIPAddressLeaseTime(s.c.LeaseTime))
		r.UpdateOption(dhcpv4.OptRenewTimeValue(s.c.LeaseTime / 2))
		r.UpdateOption(dhcpv4.OptRebindingTimeValue(s.c.LeaseTime / 8 * 7))
	}
	s.options(r, l)
	limit := minMessage
	if n, err := m.MaxMessageSize(); err == nil {
		limit = max(limit, min(int(n), s.networkMTU())-wire.IPv4Len-wire.UDPLen)
	}
	for _, o := range []dhcpv4.OptionCode{dhcpv4.OptionDNSDomainSearchList, dhcpv4.OptionClientIdentifier} {
		if len(r.ToBytes()) > limit {
			r.DeleteOption(o)
		}
	}
	switch c := addr(m.ClientIPAddr); {
	case c.IsValid() && t == dhcpv4.MessageTypeAck:
		s.send(r, c, wire.MAC{})
	case m.IsBroadcast() || !l.Addr.IsValid():
		s.send(r, broadcast, wire.Broadcast)
	default:
		s.send(r, l.Addr, mac)
	}
}

// options is what every client is told, asked for or not: clients pass over what they do not need.
func (s *Server) options(r *dhcpv4.DHCPv4, l Lease) {
	r.UpdateOption(dhcpv4.OptSubnetMask(net.CIDRMask(s.c.Prefix.Bits(), 32)))
	if !s.c.NoRouter {
		r.UpdateOption(dhcpv4.OptRouter(s.c.Router.AsSlice()))
	}
	ips := make([]net.IP, len(s.c.DNS))
	for i, a := range s.c.DNS {
		ips[i] = a.AsSlice()
	}
	r.UpdateOption(dhcpv4.OptDNS(ips...))
	mtu := s.networkMTU()
	r.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionInterfaceMTU, []byte{byte(mtu >> 8), byte(mtu)}))
	if s.c.Domain != "" {
		r.UpdateOption(dhcpv4.OptDomainName(s.c.Domain))
	}
	if len(s.c.Search) > 0 {
		r.UpdateOption(dhcpv4.OptDomainSearch(&rfc1035label.Labels{Labels: s.c.Search}))
	}
	if l.Hostname != "" {
		r.UpdateOption(dhcpv4.OptHostName(l.Hostname))
	}
}

// send puts r on the network. mac is where it goes when the network cannot know yet: zero when it can.
func (s *Server) send(r *dhcpv4.DHCPv4, to netip.Addr, mac wire.MAC) {
	direct, can := s.c.Network.(MACSender)
	if !mac.IsZero() && !mac.IsGroup() && !can {
		to, mac = broadcast, wire.Broadcast
	}
	data := r.ToBytes()
	const l3, l4 = wire.EthernetLen, wire.EthernetLen + wire.IPv4Len
	b := make([]byte, l4+wire.UDPLen+len(data))
	wire.PutIPv4(b[l3:], s.c.Addr, to, wire.ProtoUDP, 0xc0, 64, len(b)-l3, 0, true) // CS6: network control, as dnsmasq and ISC's
	wire.PutUDP(b[l4:], ServerPort, ClientPort, len(data))
	copy(b[l4+wire.UDPLen:], data)
	wire.PutL4Checksum(b[l4:], s.c.Addr, to, wire.ProtoUDP)
	fs := []frame.Frame{{Data: b}}
	if can && !mac.IsZero() && !mac.IsGroup() {
		direct.SendTo(mac, fs)
		return
	}
	s.c.Network.Send(fs)
}
