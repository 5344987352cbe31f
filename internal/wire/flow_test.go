package wire

import (
	"encoding/binary"
	"net/netip"
	"testing"
)

// flowFrame is a frame of one flow, as much of it as FlowHash looks at.
func flowFrame(proto uint8) []byte {
	b := make([]byte, EthernetLen+IPv4Len+TCPLen)
	PutEthernet(b, MAC{2, 0, 0, 0, 0, 1}, MAC{2, 0, 0, 0, 0, 2}, EtherTypeIPv4)
	PutIPv4(b[EthernetLen:], netip.AddrFrom4([4]byte{10, 0, 0, 1}), netip.AddrFrom4([4]byte{10, 0, 0, 2}), proto, 0, 64, len(b)-EthernetLen, 0, true)
	PutUDP(b[EthernetLen+IPv4Len:], 40000, 53, 4)
	return b
}

// reverse swaps addresses and ports, as far as FlowHash looks at them.
func reverse(f []byte) []byte {
	b := append([]byte(nil), f...)
	swap := func(i, j, n int) {
		for k := range n {
			b[i+k], b[j+k] = b[j+k], b[i+k]
		}
	}
	etherType, off, ok := Payload(b)
	if !ok {
		return b
	}
	swap(0, 6, 6)
	l4 := 0
	switch {
	case etherType == EtherTypeIPv4 && len(b) >= off+IPv4Len:
		swap(off+12, off+16, 4)
		l4 = off + IPv4Len
		if b[off] != 0x45 || binary.BigEndian.Uint16(b[off+6:])&0x3fff != 0 || (b[off+9] != ProtoTCP && b[off+9] != ProtoUDP) {
			return b
		}
	case etherType == EtherTypeIPv6 && len(b) >= off+IPv6Len:
		swap(off+8, off+24, 16)
		l4 = off + IPv6Len
		if b[off+6] != ProtoTCP && b[off+6] != ProtoUDP {
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
	f.Add(flowFrame(ProtoUDP))
	f.Add(flowFrame(ProtoTCP))
	f.Add([]byte{})
	f.Add(make([]byte, EthernetLen))
	v6 := make([]byte, EthernetLen+IPv6Len+TCPLen)
	PutEthernet(v6, MAC{2, 0, 0, 0, 0, 1}, MAC{2, 0, 0, 0, 0, 2}, EtherTypeIPv6)
	v6[14], v6[20], v6[22], v6[55] = 0x60, ProtoTCP, 0xfd, 80
	f.Add(v6)
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, r := FlowHash(b), FlowHash(reverse(b)); h != r {
			t.Errorf("there %x, back %x: %x", h, r, b)
		}
	})
}

// Flows must spread: a hash that puts everything on one queue would pass every other test.
func TestFlowHashSpreads(t *testing.T) {
	const queues, flows = 4, 4000
	var n [queues]int
	b := flowFrame(ProtoUDP)
	for i := range flows {
		binary.BigEndian.PutUint16(b[EthernetLen+IPv4Len:], uint16(32768+i))
		n[FlowHash(b)%queues]++
	}
	for q, m := range n {
		if m < flows/queues/2 || m > flows/queues*2 {
			t.Errorf("queue %d has %d of %d flows", q, m, flows)
		}
	}
}
