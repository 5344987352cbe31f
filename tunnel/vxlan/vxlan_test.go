package vxlan

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/porttest"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
)

func TestMain(m *testing.M) { testbed.Main(m) }

func TestPut(t *testing.T) {
	for vni, want := range map[uint32]string{
		0: "\x08\x00\x00\x00\x00\x00\x00\x00", 42: "\x08\x00\x00\x00\x00\x00\x2a\x00", MaxVNI: "\x08\x00\x00\x00\xff\xff\xff\x00", 0x123456: "\x08\x00\x00\x00\x12\x34\x56\x00",
	} {
		b := bytes.Repeat([]byte{0xee}, 10)
		Put(b, vni)
		if string(b) != want+"\xee\xee" {
			t.Errorf("VNI %d: % x", vni, b)
		}
	}
}

func TestOverhead(t *testing.T) {
	for addr, want := range map[string]int{"192.0.2.1": 50, "::ffff:192.0.2.1": 50, "2001:db8::1": 70} {
		if got := Overhead(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: %d", addr, got)
		}
	}
}

// headers are datagrams of VNI 42 and what becomes of them.
var headers = []struct {
	name string
	hdr  uint64
	pay  int // bytes behind the header
	why  frame.Drop
	ok   bool
}{
	{"plain", 0x08000000_00002a00, 60, 0, true},
	{"shortest frame", 0x08000000_00002a00, 14, 0, true},
	{"no flags", 0x00000000_00002a00, 60, frame.DropTunnelHeader, false},
	{"all flags", 0xff000000_00002a00, 60, frame.DropTunnelHeader, false},
	{"group policy", 0x88000000_00002a00, 60, frame.DropTunnelHeader, false},
	{"group policy with a group", 0x88000007_00002a00, 60, frame.DropTunnelHeader, false},
	{"GPE", 0x0c000003_00002a00, 60, frame.DropTunnelHeader, false},
	{"GPE, OAM", 0x0d000003_00002a00, 60, frame.DropTunnelHeader, false},
	{"remote checksum", 0x08200000_00002a00, 60, frame.DropTunnelHeader, false},
	{"reserved, first byte", 0x09000000_00002a00, 60, frame.DropTunnelHeader, false},
	{"reserved, middle", 0x08000100_00002a00, 60, frame.DropTunnelHeader, false},
	{"reserved, last byte", 0x08000000_00002a01, 60, frame.DropTunnelHeader, false},
	{"reserved, last byte's highest", 0x08000000_00002a80, 60, frame.DropTunnelHeader, false},
	{"no frame", 0x08000000_00002a00, 0, frame.DropMalformed, false},
	{"short frame", 0x08000000_00002a00, 13, frame.DropMalformed, false},
}

// datagram is a broadcast frame of an experimental EtherType behind a header, with id in its payload where there is room.
func datagram(hdr uint64, pay int, id byte) []byte {
	b := make([]byte, HeaderLen+60)
	binary.BigEndian.PutUint64(b, hdr)
	wire.PutEthernet(b[HeaderLen:], wire.Broadcast, wire.MAC{2, 0, 0, 0, 9, id}, 0x88b5)
	b[HeaderLen+wire.EthernetLen] = id
	return b[:HeaderLen+pay]
}

func TestParse(t *testing.T) {
	for _, c := range headers {
		vni, why, ok := Parse(datagram(c.hdr, c.pay, 0))
		if ok != c.ok || why != c.why || ok && vni != 42 {
			t.Errorf("%s: VNI %d, %v, %v", c.name, vni, why, ok)
		}
	}
	for n := range HeaderLen {
		if _, why, ok := Parse(make([]byte, n)); ok || why != frame.DropTunnelHeader {
			t.Errorf("%d bytes: %v, %v", n, why, ok)
		}
	}
}

// Linux's own vxlan device takes and drops the very same datagrams:
//
//	[a] UDP ── veth ── [b] vxlan id 42
func TestParseAgreesWithLinux(t *testing.T) {
	testbed.Leaks(t)
	a, b := testbed.NewNS(t, "a"), testbed.NewNS(t, "b")
	testbed.Veth(t, a, "eth0", b, "eth0")
	testbed.AddAddrs(t, a, "eth0", netip.MustParsePrefix("10.0.0.1/24"))
	testbed.AddAddrs(t, b, "eth0", netip.MustParsePrefix("10.0.0.2/24"))
	if out, err := b.Command(testbed.Tool(t, "ip"), "link", "add", "vx0", "type", "vxlan", "id", "42", "local", "10.0.0.2", "remote", "10.0.0.1", "dstport", fmt.Sprint(Port)).CombinedOutput(); err != nil {
		testbed.Lacking(t, "the kernel has no vxlan device: %s", out)
	}
	testbed.Up(t, b, "vx0")
	read := porttest.PacketReader(t, b, "vx0")
	var c net.Conn
	var err error
	a.Do(func() { c, err = net.Dial("udp", fmt.Sprintf("10.0.0.2:%d", Port)) })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	seen := map[byte]bool{}
	wait := func(id byte) {
		testbed.Eventually(t, 10*time.Second, func() bool {
			for _, f := range read(20 * time.Millisecond) {
				if len(f.Data) >= wire.EthernetLen && f.Data[12] == 0x88 && f.Data[13] == 0xb5 {
					seen[f.Data[11]] = true
				}
			}
			return seen[id]
		})
	}
	for i, h := range headers {
		if _, err := c.Write(datagram(h.hdr, h.pay, byte(i+1))); err != nil {
			t.Fatal(err)
		}
		// One that certainly gets through shows that the kernel is done with the one before.
		if _, err := c.Write(datagram(headers[0].hdr, 60, byte(i+101))); err != nil {
			t.Fatal(err)
		}
		wait(byte(i + 101))
		if seen[byte(i+1)] != h.ok {
			t.Errorf("%s: Linux takes it: %v, we do: %v", h.name, seen[byte(i+1)], h.ok)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, h := range headers {
		f.Add(datagram(h.hdr, h.pay, 1))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		vni, why, ok := Parse(b)
		if !ok {
			if why != frame.DropTunnelHeader && why != frame.DropMalformed {
				t.Errorf("dropped for %v", why)
			}
			return
		}
		// What is taken is what Put writes, bit for bit, and an Ethernet header behind it.
		var h [HeaderLen]byte
		Put(h[:], vni)
		if len(b) < HeaderLen+wire.EthernetLen || !bytes.Equal(h[:], b[:HeaderLen]) || vni > MaxVNI {
			t.Errorf("taken as VNI %d: % x", vni, b)
		}
	})
}
