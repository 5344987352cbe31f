package tap

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
)

var (
	macA, macB = wire.MAC{2, 0, 0, 0, 0, 0xa}, wire.MAC{2, 0, 0, 0, 0, 0xb}
	ipA, ipB   = netip.MustParseAddr("10.7.0.1"), netip.MustParseAddr("10.7.0.2")
)

// udpFrame is a frame with a UDP datagram of n payload bytes and its checksum left to finish; cut into datagrams of gso bytes unless that is zero.
func udpFrame(n, gso int) frame.Frame {
	l4 := wire.EthernetLen + wire.IPv4Len
	b := make([]byte, l4+wire.UDPLen+n)
	wire.PutEthernet(b, macB, macA, wire.EtherTypeIPv4)
	wire.PutIPv4(b[wire.EthernetLen:], ipA, ipB, wire.ProtoUDP, 0, 64, len(b)-wire.EthernetLen, 1, true)
	binary.BigEndian.PutUint16(b[l4:], 5000)
	binary.BigEndian.PutUint16(b[l4+2:], 5001)
	binary.BigEndian.PutUint16(b[l4+4:], uint16(wire.UDPLen+n))
	binary.BigEndian.PutUint16(b[l4+6:], wire.Fold(wire.PseudoSum(ipA, ipB, wire.ProtoUDP, wire.UDPLen+n)))
	f := frame.Frame{Data: b}
	f.Hdr = wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum, CsumStart: uint16(l4), CsumOffset: wire.UDPChecksumOff}
	if gso > 0 {
		f.Hdr.GSOType, f.Hdr.GSOSize, f.Hdr.HdrLen = wire.GSOUDPL4, uint16(gso), uint16(l4+wire.UDPLen)
	}
	return f
}

// tcpFrame is a TCP superframe with n payload bytes.
func tcpFrame(n int) frame.Frame {
	l4 := wire.EthernetLen + wire.IPv4Len
	b := make([]byte, l4+wire.TCPLen+n)
	wire.PutEthernet(b, macB, macA, wire.EtherTypeIPv4)
	wire.PutIPv4(b[wire.EthernetLen:], ipA, ipB, wire.ProtoTCP, 0, 64, len(b)-wire.EthernetLen, 1, true)
	b[l4+12], b[l4+13] = 5<<4, wire.TCPAck
	binary.BigEndian.PutUint16(b[l4+wire.TCPChecksumOff:], wire.Fold(wire.PseudoSum(ipA, ipB, wire.ProtoTCP, len(b)-l4)))
	return frame.Frame{Data: b, Hdr: wire.VirtioNetHdr{
		Flags: wire.VirtioNeedsCsum, GSOType: wire.GSOTCPv4, GSOSize: 1460, HdrLen: uint16(l4 + wire.TCPLen),
		CsumStart: uint16(l4), CsumOffset: wire.TCPChecksumOff,
	}}
}

func batch(n int, f func() frame.Frame) (fs []frame.Frame) {
	for range n {
		fs = append(fs, f())
	}
	return fs
}

var transmitCases = []struct {
	name string
	oc   OpenConfig
	fs   []frame.Frame
}{
	{"small", OpenConfig{}, batch(1, func() frame.Frame { return udpFrame(64, 0) })},
	{"small32", OpenConfig{}, batch(32, func() frame.Frame { return udpFrame(64, 0) })},
	{"small32-unjoined", OpenConfig{Without: frame.CapUSO}, batch(32, func() frame.Frame { return udpFrame(64, 0) })},
	{"1400x32", OpenConfig{}, batch(32, func() frame.Frame { return udpFrame(1400, 0) })},
	{"1400x32-unjoined", OpenConfig{Without: frame.CapUSO}, batch(32, func() frame.Frame { return udpFrame(1400, 0) })},
	{"super", OpenConfig{}, batch(1, func() frame.Frame { return tcpFrame(44 * 1460) })},
	{"super-queues", OpenConfig{Queues: 4}, batch(1, func() frame.Frame { return tcpFrame(44 * 1460) })},
	{"super-plain", OpenConfig{Plain: true}, batch(1, func() frame.Frame { return tcpFrame(44 * 1460) })},
	{"uso-plain", OpenConfig{Plain: true}, batch(1, func() frame.Frame { return udpFrame(40*1000, 1000) })},
	{"small-plain", OpenConfig{Plain: true}, batch(1, func() frame.Frame { return udpFrame(64, 0) })},
}

// poolForgets: a count of allocations means nothing for what comes from a pool.
var poolForgets bool

func TestTransmitAllocatesNothing(t *testing.T) {
	ns := testbed.NewNS(t)
	for _, c := range transmitCases {
		d := open(t, ns, c.oc, IfConfig{})
		for i := range c.fs {
			if h := c.fs[i].Hdr; !h.Validate(c.fs[i].Data) || h != c.fs[i].Hdr {
				t.Fatalf("%s: frame %d does not pass its own validation", c.name, i)
			}
		}
		if n := testing.AllocsPerRun(200, func() { d.Transmit(c.fs) }); n != 0 && !poolForgets {
			t.Errorf("%s: %v allocations", c.name, n)
		}
		if s := d.Stats(); s.TxFrames != uint64(201*len(c.fs)) || d.Drops().Total() != 0 {
			t.Errorf("%s: %+v, %d drops", c.name, s, d.Drops().Total())
		}
		d.Close()
	}
}

// inject is a socket that puts frames on interface name of ns, as the container's kernel would: they are read from the TAP.
func inject(t testing.TB, ns *testbed.NS, name string) (send func(b []byte)) {
	t.Helper()
	fd := -1
	ns.Do(func() {
		var err error
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			t.Fatal(err)
		}
		out, err := Configure(IfConfig{Name: name})
		if err == nil {
			err = unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: out.Index})
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() { unix.Close(fd) })
	return func(b []byte) {
		if _, err := unix.Write(fd, b); err != nil {
			t.Fatal(err)
		}
	}
}

func TestServeAllocatesNothing(t *testing.T) {
	ns := testbed.NewNS(t)
	for _, plain := range []bool{false, true} {
		d := open(t, ns, OpenConfig{Name: "eth0", Plain: plain}, IfConfig{})
		send := inject(t, ns, "eth0")
		r, got := newReader(d, 0), 0
		sink := sinkFunc(func(fs []frame.Frame) { got += len(fs) })
		b := udpFrame(200, 0).Data
		const runs, burst = 100, 8
		if n := testing.AllocsPerRun(runs, func() {
			for range burst {
				send(b)
			}
			if _, err := r.fill(); err != nil {
				t.Fatal(err)
			}
			sink.Forward(r.fs)
		}); n != 0 {
			t.Errorf("plain %v: %v allocations", plain, n)
		}
		if got < (runs+1)*burst {
			t.Errorf("plain %v: read %d frames of %d", plain, got, (runs+1)*burst)
		}
		d.Close()
	}
}

func BenchmarkTransmit(b *testing.B) {
	for _, c := range transmitCases {
		b.Run(c.name, func(b *testing.B) {
			d := open(b, testbed.NewNS(b), c.oc, IfConfig{})
			n := 0
			for i := range c.fs {
				n += len(c.fs[i].Data)
			}
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				d.Transmit(c.fs)
			}
			b.StopTimer()
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(c.fs)), "ns/frame")
		})
	}
}
