package tap

import (
	"encoding/binary"
	"testing"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// reverse swaps addresses and ports, as far as flowHash looks at them.
func reverse(f []byte) []byte {
	b := append([]byte(nil), f...)
	swap := func(i, j, n int) {
		for k := range n {
			b[i+k], b[j+k] = b[j+k], b[i+k]
		}
	}
	etherType, off, ok := wire.Payload(b)
	if !ok {
		return b
	}
	swap(0, 6, 6)
	l4 := 0
	switch {
	case etherType == wire.EtherTypeIPv4 && len(b) >= off+wire.IPv4Len:
		swap(off+12, off+16, 4)
		l4 = off + wire.IPv4Len
		if b[off] != 0x45 || binary.BigEndian.Uint16(b[off+6:])&0x3fff != 0 || (b[off+9] != wire.ProtoTCP && b[off+9] != wire.ProtoUDP) {
			return b
		}
	case etherType == wire.EtherTypeIPv6 && len(b) >= off+wire.IPv6Len:
		swap(off+8, off+24, 16)
		l4 = off + wire.IPv6Len
		if b[off+6] != wire.ProtoTCP && b[off+6] != wire.ProtoUDP {
			return b
		}
	default:
		return b
	}
	if len(b) >= l4+4 {
		swap(l4, l4+2, 2)
	}
	return b
}

func FuzzFlowHash(f *testing.F) {
	f.Add(udpFrame(64, 0).Data)
	f.Add(tcpFrame(100).Data)
	f.Add([]byte{})
	f.Add(make([]byte, wire.EthernetLen))
	v6 := make([]byte, wire.EthernetLen+wire.IPv6Len+wire.TCPLen)
	wire.PutEthernet(v6, macA, macB, wire.EtherTypeIPv6)
	v6[14], v6[20], v6[22], v6[55] = 0x60, wire.ProtoTCP, 0xfd, 80
	f.Add(v6)
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, r := flowHash(b), flowHash(reverse(b)); h != r {
			t.Errorf("there %x, back %x: %x", h, r, b)
		}
	})
}

// Flows must spread: a hash that puts everything on one queue would pass every other test.
func TestFlowHashSpreads(t *testing.T) {
	const queues, flows = 4, 4000
	var n [queues]int
	b := udpFrame(64, 0).Data
	for i := range flows {
		binary.BigEndian.PutUint16(b[wire.EthernetLen+wire.IPv4Len:], uint16(32768+i))
		n[flowHash(b)%queues]++
	}
	for q, m := range n {
		if m < flows/queues/2 || m > flows/queues*2 {
			t.Errorf("queue %d has %d of %d flows", q, m, flows)
		}
	}
}

// What a device yields is checked before anybody looks at it.
func TestTakeChecks(t *testing.T) {
	good := udpFrame(64, 0)
	rec := func(h wire.VirtioNetHdr, data []byte) []byte {
		b := make([]byte, wire.VirtioNetHdrLen)
		h.Encode(b)
		return append(b, data...)
	}
	bad := good.Hdr
	bad.CsumStart = 60000
	super := tcpFrame(5000)
	noSize := super.Hdr
	noSize.GSOSize = 0
	for _, c := range []struct {
		name string
		rec  []byte
		want frame.Drop
	}{
		{"good", rec(good.Hdr, good.Data), noDrop},
		{"superframe", rec(super.Hdr, super.Data), noDrop},
		{"longest", rec(wire.VirtioNetHdr{}, make([]byte, wire.MaxFrame)), noDrop},
		{"empty", nil, frame.DropMalformed},
		{"header alone", rec(good.Hdr, nil), frame.DropMalformed},
		{"short", rec(wire.VirtioNetHdr{}, make([]byte, wire.EthernetLen-1)), frame.DropMalformed},
		{"too long", rec(wire.VirtioNetHdr{}, make([]byte, wire.MaxFrame+1)), frame.DropMalformed},
		{"checksum outside", rec(bad, good.Data), frame.DropBadHdr},
		{"segments of nothing", rec(noSize, super.Data), frame.DropBadHdr},
	} {
		d := &Device{drops: new(frame.DropCounters), info: Info{VnetHdr: true}}
		r := &reader{d: d, hdrLen: wire.VirtioNetHdrLen}
		ok := r.take(c.rec)
		if ok != (c.want == noDrop) || ok != (len(r.fs) == 1) {
			t.Errorf("%s: taken: %v", c.name, ok)
		}
		if c.want != noDrop && d.drops.Get(c.want) != 1 || c.want == noDrop && d.drops.Total() != 0 {
			t.Errorf("%s: not counted as %v", c.name, c.want)
		}
	}
}
