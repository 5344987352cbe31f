package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/api"
	"patchbay/internal/netns"
	"patchbay/internal/testbed"
	"patchbay/internal/testbed/probe"
	"patchbay/internal/wire"
)

// packets is a packet socket on an interface in a namespace: it sends frames made by hand and hears what arrives.
type packets struct {
	t  *testing.T
	fd int
}

// packets opens one.
func (s *space) packets(link string) *packets {
	s.t.Helper()
	h, err := netns.OpenPID(s.pid)
	if err != nil {
		s.t.Fatal(err)
	}
	defer h.Close()
	p := &packets{t: s.t, fd: -1}
	if err := h.Do(func() error { return p.open(link) }); err != nil {
		s.t.Fatalf("packet socket on %s of %d: %v", link, s.pid, err)
	}
	s.t.Cleanup(func() { unix.Close(p.fd) })
	return p
}

func (p *packets) open(link string) (err error) {
	const all = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL<<8&0xff00 // network order
	if p.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
		return err
	}
	if err := unix.SetsockoptInt(p.fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
		return err
	}
	_ = unix.SetsockoptInt(p.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 8<<20) // as much as there is to be had
	ifr, err := unix.NewIfreq(link)
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(p.fd, unix.SIOCGIFINDEX, ifr); err != nil {
		return err
	}
	index := int(ifr.Uint32())
	// Frames to others are heard as well, as a hostile one would.
	if err := unix.SetsockoptPacketMreq(p.fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &unix.PacketMreq{Ifindex: int32(index), Type: unix.PACKET_MR_PROMISC}); err != nil {
		return err
	}
	return unix.Bind(p.fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: index})
}

// send sends one frame.
func (p *packets) send(frame []byte) {
	p.t.Helper()
	for {
		_, err := unix.Write(p.fd, frame)
		switch err {
		case nil:
			return
		case unix.EAGAIN, unix.ENOBUFS, unix.EINTR:
			time.Sleep(time.Millisecond)
		default:
			p.t.Fatalf("send a frame: %v", err)
		}
	}
}

// listen calls f with each frame that arrives, until it says enough or nothing has come for so long.
func (p *packets) listen(quiet time.Duration, f func(frame []byte) (enough bool)) {
	p.t.Helper()
	buf := make([]byte, wire.MaxFrame)
	for {
		n, err := unix.Read(p.fd, buf)
		switch err {
		case nil:
			if f(buf[:n]) {
				return
			}
		case unix.EINTR:
		case unix.EAGAIN:
			fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
			if k, err := unix.Poll(fds, int(quiet.Milliseconds())); k == 0 && err == nil {
				return
			}
		default:
			p.t.Fatalf("hear a frame: %v", err)
		}
	}
}

// marked is how a frame is known again: by a number in the bytes behind its packet, where nobody looks.
type mark [16]byte

var marks atomic.Uint64

func newMark() (m mark) {
	copy(m[:], "patchmark")
	binary.BigEndian.PutUint32(m[12:], uint32(marks.Add(1)))
	return m
}

// heard is which of the marks arrive, until all have or nothing has come for so long.
func (p *packets) heard(quiet time.Duration, want ...mark) map[mark]bool {
	p.t.Helper()
	got := map[mark]bool{}
	p.listen(quiet, func(f []byte) bool {
		for _, m := range want {
			if bytes.Contains(f, m[:]) {
				got[m] = true
			}
		}
		return len(got) == len(want)
	})
	return got
}

// station is who a frame is from or to.
type station struct {
	mac      wire.MAC
	ip4, ip6 netip.Addr
}

// stationOf is an attachment as a station.
func stationOf(a api.Attachment) station {
	s := station{mac: a.MAC}
	for _, addr := range a.Addrs {
		if addr.Is4() {
			s.ip4 = addr
		} else {
			s.ip6 = addr
		}
	}
	return s
}

// crafted is a frame made by hand.
type crafted struct {
	what string
	data []byte
	mark mark
}

func craft(what string, dst, src wire.MAC, etherType uint16, payload []byte) crafted {
	b := make([]byte, wire.EthernetLen, 128)
	wire.PutEthernet(b, dst, src, etherType)
	m := newMark()
	return crafted{what: what, data: append(append(b, payload...), m[:]...), mark: m}
}

func udpPacket(src, dst netip.Addr, srcPort, dstPort uint16) []byte {
	const n = 8 + 12
	head, put := wire.IPv4Len, func(b []byte) { wire.PutIPv4(b, src, dst, wire.ProtoUDP, 0, 64, wire.IPv4Len+n, 1, true) }
	if src.Is6() {
		head, put = wire.IPv6Len, func(b []byte) { wire.PutIPv6(b, src, dst, wire.ProtoUDP, 0, 64, n) }
	}
	b := make([]byte, head+n)
	put(b)
	wire.PutUDP(b[head:], srcPort, dstPort, 12)
	wire.PutL4Checksum(b[head:], src, dst, wire.ProtoUDP)
	return b
}

func arpMessage(op uint16, senderMAC wire.MAC, senderIP netip.Addr, targetMAC wire.MAC, targetIP netip.Addr) []byte {
	b := make([]byte, wire.ARPLen)
	wire.PutARP(b, wire.ARP{Op: op, SenderMAC: senderMAC, SenderIP: senderIP, TargetMAC: targetMAC, TargetIP: targetIP})
	return b
}

func ndPacket(src, dst netip.Addr, nd wire.ND) []byte {
	b := make([]byte, wire.NDNeighborLen)
	return b[:wire.PutND(b, src, dst, nd)]
}

func raPacket(t *testing.T, src station) []byte {
	t.Helper()
	b := make([]byte, 512)
	n, ok := wire.PutRA(b, wire.LinkLocal(src.mac), wire.AllNodes, &wire.RA{Lifetime: 1800, Link: src.mac})
	if !ok {
		t.Fatal("the advertisement does not fit")
	}
	return b[:n]
}

var (
	mdns4     = netip.MustParseAddr("224.0.0.251")
	mdns6     = netip.MustParseAddr("ff02::fb")
	broadcast = netip.MustParseAddr("255.255.255.255")
)

// etherTypeLocal is for experiments (IEEE 802).
const etherTypeLocal = 0x88b5

// honest is every kind of frame that a may send towards b.
func honest(a, b station) []crafted {
	solicit := wire.SolicitedNode(b.ip6)
	tagged := append([]byte{0, 5, byte(wire.EtherTypeARP >> 8), byte(wire.EtherTypeARP & 0xff)}, arpMessage(wire.ARPRequest, a.mac, a.ip4, wire.MAC{}, b.ip4)...)
	return []crafted{
		craft("unicast IPv4", b.mac, a.mac, wire.EtherTypeIPv4, udpPacket(a.ip4, b.ip4, 4000, 4001)),
		craft("unicast IPv6", b.mac, a.mac, wire.EtherTypeIPv6, udpPacket(a.ip6, b.ip6, 4000, 4001)),
		craft("broadcast", wire.Broadcast, a.mac, wire.EtherTypeIPv4, udpPacket(a.ip4, broadcast, 4000, 4001)),
		craft("ARP request", wire.Broadcast, a.mac, wire.EtherTypeARP, arpMessage(wire.ARPRequest, a.mac, a.ip4, wire.MAC{}, b.ip4)),
		craft("ARP reply", b.mac, a.mac, wire.EtherTypeARP, arpMessage(wire.ARPReply, a.mac, a.ip4, b.mac, b.ip4)),
		craft("gratuitous ARP", wire.Broadcast, a.mac, wire.EtherTypeARP, arpMessage(wire.ARPRequest, a.mac, a.ip4, wire.MAC{}, a.ip4)),
		craft("VLAN-tagged ARP", wire.Broadcast, a.mac, wire.EtherTypeVLAN, tagged),
		craft("neighbor solicitation", wire.MulticastMAC(solicit), a.mac, wire.EtherTypeIPv6, ndPacket(a.ip6, solicit, wire.ND{Type: wire.ICMPv6NeighborSol, Target: b.ip6, Link: a.mac})),
		craft("neighbor advertisement", wire.MulticastMAC(wire.AllNodes), a.mac, wire.EtherTypeIPv6, ndPacket(a.ip6, wire.AllNodes, wire.ND{Type: wire.ICMPv6NeighborAdv, Target: a.ip6, Link: a.mac, Override: true})),
		craft("mDNS over IPv4", wire.MulticastMAC(mdns4), a.mac, wire.EtherTypeIPv4, udpPacket(a.ip4, mdns4, 5353, 5353)),
		craft("mDNS over IPv6", wire.MulticastMAC(mdns6), a.mac, wire.EtherTypeIPv6, udpPacket(a.ip6, mdns6, 5353, 5353)),
		craft("another protocol to all", wire.Broadcast, a.mac, etherTypeLocal, []byte("for all")),
		craft("another protocol to one", b.mac, a.mac, etherTypeLocal, []byte("for one")),
		craft("unknown destination", wire.MAC{2, 0xde, 0xad, 0, 0, 1}, a.mac, etherTypeLocal, []byte("for nobody")),
	}
}

func marksOf(cs []crafted) (ms []mark) {
	for _, c := range cs {
		ms = append(ms, c.mark)
	}
	return ms
}

// drops is how often each reason has been counted on a network.
func (d *daemonProc) drops(network string) map[string]uint64 {
	d.t.Helper()
	ds, err := d.client().Drops(d.t.Context(), network)
	if err != nil {
		d.t.Fatal(err)
	}
	out := map[string]uint64{}
	for _, x := range ds {
		out[x.Reason] += x.Count
	}
	return out
}

// try makes the attempts in the namespace, all at once.
func (s *space) try(binary string, list ...probe.Attempt) []probe.Outcome {
	s.t.Helper()
	cmd := s.command(binary)
	cmd.Env = append(os.Environ(), probe.TryEnv(list...))
	out, err := cmd.Output()
	if err != nil {
		s.t.Fatalf("probe in %d: %v", s.pid, err)
	}
	return probe.Outcomes(s.t, out)
}

// serve has the probe answer on ports of the namespace until the test ends.
func (s *space) serve(addrs ...string) {
	s.t.Helper()
	h, err := netns.OpenPID(s.pid)
	if err != nil {
		s.t.Fatal(err)
	}
	defer h.Close()
	var server *probe.Server
	if err := h.Do(func() (err error) { server, err = probe.Serve(s.t.Context(), nil, addrs...); return err }); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(server.Close)
}

// attach attaches the namespace under the name and says what it got.
func (d *daemonProc) attach(network, name string, s *space, flags ...string) api.Attachment {
	d.t.Helper()
	d.do(append([]string{"attach", network, "--pid", fmt.Sprint(s.pid), "--name", name}, flags...)...)
	return d.inspect(network, name)
}

// newAttached makes a namespace and attaches it.
func (d *daemonProc) newAttached(network, name string, flags ...string) (*space, api.Attachment) {
	d.t.Helper()
	s := newSpace(d.t, d.login)
	return s, d.attach(network, name, s, flags...)
}

// startDaemonWithLogin starts a daemon of a user of its own.
func startDaemonWithLogin(t *testing.T) *daemonProc {
	t.Helper()
	return startDaemonOf(t, testbed.NewLogin(t))
}
