package porttest

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// Addrs is what the suite's frames carry: from a station of the network to the far end.
type Addrs struct {
	SrcMAC, DstMAC wire.MAC
	Src4, Dst4     netip.Addr
	Src6, Dst6     netip.Addr
}

// defaultAddrs belong to nobody, so that a kernel at the far end answers nothing.
func defaultAddrs() Addrs {
	return Addrs{
		SrcMAC: wire.MAC{2, 0x70, 0x74, 0, 0, 1}, DstMAC: wire.MAC{2, 0x70, 0x74, 0, 0, 2},
		Src4: netip.MustParseAddr("198.51.100.1"), Dst4: netip.MustParseAddr("198.51.100.2"),
		Src6: netip.MustParseAddr("2001:db8:7074::1"), Dst6: netip.MustParseAddr("2001:db8:7074::2"),
	}
}

// dstPort marks the suite's packets; a flow is told by its source port.
const dstPort = 28787

const udpMagic = 0x70625054

// flow names one stream of packets.
type flow struct {
	v6   bool
	port uint16
}

func (f flow) String() string {
	if f.v6 {
		return fmt.Sprintf("IPv6 flow %d", f.port)
	}
	return fmt.Sprintf("IPv4 flow %d", f.port)
}

// packet puts Ethernet and IP headers before a transport segment and finishes or begins its checksum, whose field is at off.
func (a *Addrs) packet(v6 bool, proto uint8, seg []byte, off int, partial bool) frame.Frame {
	l4 := wire.EthernetLen + wire.IPv4Len
	src, dst, et := a.Src4, a.Dst4, wire.EtherTypeIPv4
	if v6 {
		l4 = wire.EthernetLen + wire.IPv6Len
		src, dst, et = a.Src6, a.Dst6, wire.EtherTypeIPv6
	}
	b := make([]byte, l4+len(seg))
	wire.PutEthernet(b, a.DstMAC, a.SrcMAC, et)
	if v6 {
		wire.PutIPv6(b[wire.EthernetLen:], src, dst, proto, 0, 64, len(seg))
	} else {
		wire.PutIPv4(b[wire.EthernetLen:], src, dst, proto, 0, 64, wire.IPv4Len+len(seg), 7, true)
	}
	copy(b[l4:], seg)
	pseudo := wire.PseudoSum(src, dst, proto, len(seg))
	f := frame.Frame{Data: b}
	if partial {
		binary.BigEndian.PutUint16(b[l4+off:], wire.Fold(pseudo))
		f.Hdr = wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum, CsumStart: uint16(l4), CsumOffset: uint16(off)}
		return f
	}
	sum := ^wire.Fold(wire.Sum(b[l4:], pseudo))
	if sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(b[l4+off:], sum)
	return f
}

// datagram is the payload of number id: magic, id and a pattern, n ≥ 8 bytes in all.
func datagram(id uint32, n int) []byte {
	b := make([]byte, n)
	binary.BigEndian.PutUint32(b, udpMagic)
	binary.BigEndian.PutUint32(b[4:], id)
	for i := 8; i < n; i++ {
		b[i] = byte(int(id) + i*3)
	}
	return b
}

func udpSegment(port uint16, payload []byte) []byte {
	b := make([]byte, wire.UDPLen, wire.UDPLen+len(payload))
	binary.BigEndian.PutUint16(b, port)
	binary.BigEndian.PutUint16(b[2:], dstPort)
	binary.BigEndian.PutUint16(b[4:], uint16(wire.UDPLen+len(payload)))
	return append(b, payload...)
}

// udp is a datagram with n ≥ 8 bytes of payload.
func (a *Addrs) udp(fl flow, id uint32, n int, partial bool) frame.Frame {
	return a.packet(fl.v6, wire.ProtoUDP, udpSegment(fl.port, datagram(id, n)), 6, partial)
}

// udpSuper is count datagrams of size bytes of payload, the last one half as long, in one frame.
func (a *Addrs) udpSuper(fl flow, id uint32, size, count int) frame.Frame {
	var payload []byte
	for i := range count {
		n := size
		if i == count-1 {
			n = max(size/2, 8)
		}
		payload = append(payload, datagram(id+uint32(i), n)...)
	}
	f := a.packet(fl.v6, wire.ProtoUDP, udpSegment(fl.port, payload), 6, true)
	f.Hdr.GSOType, f.Hdr.GSOSize, f.Hdr.HdrLen = wire.GSOUDPL4, uint16(size), f.Hdr.CsumStart+wire.UDPLen
	return f
}

// tcpByte is what a stream has at an offset.
func tcpByte(off int) byte { return byte(off) ^ byte(off>>8) ^ byte(off>>16) }

// tcp is n bytes of a stream at an offset, as one segment, or as a superframe of segments of mss bytes if mss is not 0.
func (a *Addrs) tcp(fl flow, off, n, mss int, partial bool) frame.Frame {
	const hdr = wire.TCPLen + 12
	b := make([]byte, hdr+n)
	binary.BigEndian.PutUint16(b, fl.port)
	binary.BigEndian.PutUint16(b[2:], dstPort)
	binary.BigEndian.PutUint32(b[4:], uint32(off))
	binary.BigEndian.PutUint32(b[8:], 1)
	b[12], b[13] = hdr/4<<4, 0x18 // ACK, PSH
	binary.BigEndian.PutUint16(b[14:], 0xffff)
	copy(b[wire.TCPLen:], []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 1}) // timestamps
	for i := range n {
		b[hdr+i] = tcpByte(off + i)
	}
	f := a.packet(fl.v6, wire.ProtoTCP, b, 16, partial || mss > 0)
	if mss > 0 {
		f.Hdr.GSOType, f.Hdr.GSOSize, f.Hdr.HdrLen = wire.GSOTCPv4, uint16(mss), f.Hdr.CsumStart+hdr
		if fl.v6 {
			f.Hdr.GSOType = wire.GSOTCPv6
		}
	}
	return f
}
