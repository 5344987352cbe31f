package nat

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/mmsg"
	"patchbay/internal/wire"
	"patchbay/stack"
)

var (
	apA4 = netip.MustParseAddrPort("192.0.2.1:1111")
	apB4 = netip.MustParseAddrPort("10.88.0.2:2222")
	apA6 = netip.MustParseAddrPort("[2001:db8::1]:1111")
	apB6 = netip.MustParseAddrPort("[fd88::2]:2222")
)

// checkUDP fails t unless ip is a sound datagram from src to dst with the payload data.
func checkUDP(t *testing.T, ip []byte, src, dst netip.AddrPort, data []byte) {
	t.Helper()
	p, ok := wire.ParseIP(ip, false)
	if !ok || p.Src != src.Addr() || p.Dst != dst.Addr() || p.Proto != wire.ProtoUDP || p.Len != len(ip) {
		t.Fatalf("IP header: %+v, %v", p, ok)
	}
	u := ip[p.HdrLen:]
	if binary.BigEndian.Uint16(u) != src.Port() || binary.BigEndian.Uint16(u[2:]) != dst.Port() || int(binary.BigEndian.Uint16(u[4:])) != len(u) {
		t.Fatalf("UDP header % x", u[:8])
	}
	if s := wire.Fold(wire.Sum(u, wire.PseudoSum(p.Src, p.Dst, wire.ProtoUDP, len(u)))); s != 0xffff {
		t.Errorf("UDP checksum: %#x", s)
	}
	if !bytes.Equal(u[8:], data) {
		t.Error("the payload is another")
	}
}

func TestUDPFrame(t *testing.T) {
	for _, a := range [][2]netip.AddrPort{{apA4, apB4}, {apA6, apB6}} {
		for _, n := range []int{0, 1, 2, 1400, 1401} {
			data := pattern(n)
			buf := append(make([]byte, headroom), data...)
			f := udpFrame(buf, n, a[0], a[1], 0, 0)
			if !f.Hdr.Validate(f.Data) {
				t.Errorf("%d bytes: the header %+v does not fit", n, f.Hdr)
			}
			finishUDP(&f)
			if f.Hdr != (wire.VirtioNetHdr{}) {
				t.Error("not finished")
			}
			checkUDP(t, f.Data[wire.EthernetLen:], a[0], a[1], data)
		}
		buf := make([]byte, headroom+5000)
		f := udpFrame(buf, 5000, a[0], a[1], 0, 1400)
		if binary.BigEndian.PutUint16(f.Data[12:], map[bool]uint16{true: 0x800, false: 0x86dd}[a[0].Addr().Is4()]); !f.Hdr.Validate(f.Data) || f.Hdr.GSOSize != 1400 || f.Hdr.GSO() != wire.GSOUDPL4 {
			t.Errorf("superframe header %+v", f.Hdr)
		}
	}
}

// Fragments put together are the packet, none is above the MTU, and all but the last are multiples of 8 bytes.
func TestAppendFragments(t *testing.T) {
	for _, a := range [][2]netip.AddrPort{{apA4, apB4}, {apA6, apB6}} {
		for _, mtu := range []int{1280, 1281, 1500, 9000} {
			for _, n := range []int{mtu, 2 * mtu, 65507} {
				data := pattern(n)
				f := udpFrame(append(make([]byte, headroom), data...), n, a[0], a[1], 0, 0)
				finishUDP(&f)
				room := make([]byte, fragRoom(len(f.Data), mtu))
				fs, _ := appendFragments(nil, room, &f, mtu, 7)
				hdr := ipHdrLen(a[0].Addr())
				whole := append([]byte(nil), f.Data[wire.EthernetLen:wire.EthernetLen+hdr]...)
				for i := range fs {
					ip := fs[i].Data[wire.EthernetLen:]
					p, ok := wire.ParseIP(ip, false)
					if !ok || !p.IsFragment() || p.FragID != 7 || p.Len > mtu || p.Len != len(ip) || p.FragOff != len(whole)-hdr || p.MoreFrags == (i == len(fs)-1) {
						t.Fatalf("fragment %d of %d: %+v, %v", i, len(fs), p, ok)
					}
					whole = append(whole, ip[p.HdrLen:p.Len]...)
				}
				if !bytes.Equal(whole[hdr:], f.Data[wire.EthernetLen+hdr:]) {
					t.Fatalf("%d bytes at MTU %d do not come together", n, mtu)
				}
			}
		}
	}
}

func TestICMPErrorPut(t *testing.T) {
	for _, a := range [][2]netip.AddrPort{{apB4, apA4}, {apB6, apA6}} {
		for _, n := range []int{0, 1, 500, 5000} {
			e := icmpError{from: a[1].Addr(), typ: 3, code: 3, proto: wire.ProtoUDP, ttl: 1, src: a[0], dst: a[1], data: pattern(n), dataLength: n}
			f := e.put(make([]byte, icmpErrorRoom))
			p, ok := wire.ParseIP(f.Data[wire.EthernetLen:], false)
			if !ok || p.Dst != a[0].Addr() || p.Src != a[1].Addr() || p.Len > 1280 || p.Version == 4 && p.Len > 576 {
				t.Fatalf("%d: %+v %v", n, p, ok)
			}
			m := f.Data[wire.EthernetLen+p.HdrLen:]
			var acc uint64
			if p.Version == 6 {
				acc = wire.PseudoSum(p.Src, p.Dst, wire.ProtoICMPv6, len(m))
			}
			if wire.Fold(wire.Sum(m, acc)) != 0xffff {
				t.Error("checksum")
			}
			q := m[8:]
			if hdr := ipHdrLen(p.Src); len(q) != hdr+8+min(n, len(q)-hdr-8) || q[0]>>4 != p.Version {
				t.Errorf("quote of %d bytes", len(q))
			}
		}
	}
}

// FuzzUDPPackets: whatever a container sends, what is taken for payload lies inside the packet.
func FuzzUDPPackets(f *testing.F) {
	for _, p := range []stack.Packet{udpPacket(apB4, apA4, pattern(20)), udpPacket(apB6, apA6, pattern(0)), echoPacket(apB4.Addr(), apA4.Addr(), 3, pattern(9)), echoPacket(apB6.Addr(), apA6.Addr(), 3, nil)} {
		f.Add(p.Frame.Data, uint8(0), uint16(0))
		f.Add(p.Frame.Data, wire.GSOUDPL4, uint16(7))
	}
	f.Fuzz(func(t *testing.T, data []byte, gso uint8, size uint16) {
		if len(data) < wire.EthernetLen {
			return
		}
		p := stack.Packet{Frame: frame.Frame{Data: data, Hdr: wire.VirtioNetHdr{GSOType: gso, GSOSize: size}}, L3: wire.EthernetLen}
		var ok bool
		if p.IP, ok = wire.ParseIP(data[p.L3:], p.Frame.Superframe()); !ok {
			return
		}
		l4 := p.L4()
		if d, drop, ok := udpPayload(&p, l4); ok && len(d) > len(l4)-wire.UDPLen || !ok && drop != frame.DropMalformed && drop != frame.DropBadHdr {
			t.Errorf("%d bytes of %d, %v", len(d), len(l4), drop)
		}
		if _, ok := echoRequest(&p, l4); ok && len(l4) < wire.ICMPLen {
			t.Error("too short for an echo request")
		}
	})
}

// FuzzControl: control messages and queued errors, however cut off.
func FuzzControl(f *testing.F) {
	var c control
	c.addInt(unix.SOL_UDP, unix.UDP_GRO, 1400)
	c.addSource(apA4.Addr(), false)
	c.addSource(apA6.Addr(), true)
	c.addInt(unix.IPPROTO_IPV6, unix.IPV6_HOPLIMIT, 60)
	f.Add(append([]byte(nil), c.bytes()[:c.n]...))
	var e control
	d := e.add(unix.IPPROTO_IP, unix.IP_RECVERR, 32)
	d[4], d[5], d[6] = eeOriginICMP, 3, 3
	var sa mmsg.Sockaddr
	sa.Put(apA4, false, 0)
	copy(d[16:], sa[:])
	f.Add(append([]byte(nil), e.bytes()[:e.n]...))
	f.Fuzz(func(t *testing.T, b []byte) {
		var aligned [64]uint64 // as the kernel's are
		buf := append((*(*[512]byte)(unsafe.Pointer(&aligned)))[:0], b[:min(len(b), 512)]...)
		var r received
		parseControl(buf, &r)
		parseHostError(buf)
	})
}

func TestControlRoundTrip(t *testing.T) {
	var c control
	c.addInt(unix.SOL_UDP, unix.UDP_GRO, 1400)
	c.addInt(unix.IPPROTO_IPV6, unix.IPV6_TCLASS, 0xb8)
	c.addInt(unix.IPPROTO_IP, unix.IP_TTL, 60)
	c.addSource(apA6.Addr(), true)
	var r received
	parseControl(c.bytes()[:c.n], &r)
	if r.seg != 1400 || r.tos != 0xb8 || r.ttl != 60 || r.local != apA6.Addr() {
		t.Errorf("%+v", r)
	}
	var e control
	d := e.add(unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 16+unix.SizeofSockaddrInet6)
	d[4], d[5], d[6] = eeOriginICMP6, 1, 4
	var sa mmsg.Sockaddr
	copy(d[16:], sa[:sa.Put(apA6, true, 0)])
	if he, ok := parseHostError(e.bytes()[:e.n]); !ok || he.typ != 1 || he.code != 4 || he.from != apA6.Addr() {
		t.Errorf("%+v %v", he, ok)
	}
}
