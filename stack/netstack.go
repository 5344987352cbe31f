package stack

import (
	"errors"
	"net/netip"
	"time"
	"unsafe"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/seqnum"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// nicID is the one interface of the netstack.
const nicID tcpip.NICID = 1

// Buffers a connection starts with, and the most that leaves room for: big enough for a request and the answer's first flight.
const (
	initialBuffer = 256 << 10
	minBuffer     = 4 << 10
)

// minRTO is the least retransmission timeout. A window often is one superframe here, and when that is lost nothing comes back that could tell
// of it sooner; netstack then sends two segments a timeout, as its RACK holds the lost ones for under way (SetPipe asks the SACK scoreboard
// alone). With the usual 200 ms that is a crawl of 20 Mbit/s at 1 % loss. Linux delays an ACK by no more than the larger of 40 ms and the round
// trip (tcp_send_delayed_ack), so 60 ms does not fire without need.
const minRTO = 60 * time.Millisecond

// netstack is gVisor's TCP above our link endpoint. Nothing enters through its IP layer: segments are handed to endpoints directly.
type netstack struct {
	stack  *gstack.Stack
	link   *link
	proto  queuer
	listen unsafe.Pointer // *listenContext
}

// queuer is the part of netstack's TCP protocol that hands a segment to the processor goroutine of an endpoint.
type queuer interface {
	QueuePacket(ep gstack.TransportEndpoint, id gstack.TransportEndpointID, pkt *gstack.PacketBuffer)
}

func (n *netstack) init(g *Gateway) error {
	c := &g.cfg.TCP
	s := gstack.New(gstack.Options{
		NetworkProtocols: []gstack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocolWithOptions(ipv6.Options{
			// Netstack is no host of the network, so it neither solicits routers nor reports groups.
			NDPConfigs: ipv6.NDPConfigurations{HandleRAs: ipv6.HandlingRAsDisabled},
		})},
		TransportProtocols: []gstack.TransportProtocolFactory{tcp.NewProtocol},
	})
	sack := tcpip.TCPSACKEnabled(true)
	moderate := tcpip.TCPModerateReceiveBufferOption(true)
	// There is no TIME-WAIT: a guest's kernel reuses a port as soon as it likes, and a SYN that meets our TIME-WAIT would be lost. The host's own socket behind
	// this connection keeps the real one. A guest whose FIN comes again, since our last acknowledgement was lost, gets a reset, which ends its LAST-ACK as well.
	timeWait := tcpip.TCPTimeWaitTimeoutOption(timeWait)
	cc := tcpip.CongestionControlOption(c.CongestionControl)
	rto := tcpip.TCPMinRTOOption(minRTO)
	snd := tcpip.TCPSendBufferSizeRangeOption{Min: minBuffer, Default: min(initialBuffer, c.SendBufferMax), Max: c.SendBufferMax}
	rcv := tcpip.TCPReceiveBufferSizeRangeOption{Min: minBuffer, Default: min(initialBuffer, c.ReceiveBufferMax), Max: c.ReceiveBufferMax}
	for _, o := range []tcpip.SettableTransportProtocolOption{&sack, &moderate, &rto, &timeWait, &cc, &snd, &rcv} {
		if err := s.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
			s.Destroy()
			return errors.New(err.String())
		}
	}
	n.link = &link{g: g}
	if err := s.CreateNIC(nicID, n.link); err != nil {
		s.Destroy()
		return errors.New(err.String())
	}
	s.SetSpoofing(nicID, true) // every destination in the world is a local address here
	s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: nicID}, {Destination: header.IPv6EmptySubnet, NIC: nicID}})
	n.stack = s
	n.proto = s.TransportProtocolInstance(tcp.ProtocolNumber).(queuer)
	n.listen = newListenContext(s, protocolFromStack(s), nil, seqnum.Size(rcv.Default), true, 0)
	return nil
}

func (n *netstack) close() {
	if n.stack != nil {
		n.stack.Destroy()
	}
}

func toAddress(a netip.Addr) tcpip.Address {
	if a.Is4() {
		return tcpip.AddrFrom4(a.As4())
	}
	return tcpip.AddrFrom16(a.As16())
}

func netProto(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return header.IPv4ProtocolNumber
	}
	return header.IPv6ProtocolNumber
}
