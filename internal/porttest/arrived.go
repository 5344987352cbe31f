package porttest

import (
	"encoding/binary"
	"fmt"
	"time"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// arrived collects what came out at the far end.
type arrived struct {
	mtu       int
	ids       map[flow][]uint32       // datagrams, in order
	lens      map[flow]map[uint32]int // bytes of payload of each
	stream    map[flow]stream         // TCP
	datagrams int
}

// stream is which of the first bytes of a TCP flow have come out, and how many.
type stream struct {
	seen []bool
	n    int
}

// maxStream is how many bytes the suite sends on one flow at most.
const maxStream = 1 << 18

func newArrived(mtu int) *arrived {
	return &arrived{mtu: mtu, ids: map[flow][]uint32{}, lens: map[flow]map[uint32]int{}, stream: map[flow]stream{}}
}

// add takes a frame apart and checks all that can be checked of it alone. Frames that are not the suite's are none of its business.
func (a *arrived) add(f *frame.Frame) error {
	et, l3, ok := wire.Payload(f.Data)
	if !ok || et != wire.EtherTypeIPv4 && et != wire.EtherTypeIPv6 {
		return nil
	}
	ip, ok := wire.ParseIP(f.Data[l3:], f.Superframe())
	if !ok {
		return fmt.Errorf("a frame of %d bytes came out with a broken IP header: % x", len(f.Data), head(f.Data))
	}
	l4 := f.Data[l3+ip.HdrLen : l3+ip.Len]
	if ip.Proto != wire.ProtoUDP && ip.Proto != wire.ProtoTCP || len(l4) < wire.UDPLen || binary.BigEndian.Uint16(l4[2:]) != dstPort {
		return nil
	}
	fl := flow{ip.Version == 6, binary.BigEndian.Uint16(l4)}
	if !f.Superframe() && ip.Len > a.mtu {
		return fmt.Errorf("%v: a packet of %d bytes came out that is no superframe; the MTU is %d", fl, ip.Len, a.mtu)
	}
	if f.Hdr.Flags&(wire.VirtioNeedsCsum|wire.VirtioDataValid) == 0 {
		if got := wire.Fold(wire.Sum(l4, wire.PseudoSum(ip.Src, ip.Dst, ip.Proto, len(l4)))); got != 0xffff {
			return fmt.Errorf("%v: a packet of %d bytes came out with a wrong checksum and without VirtioNeedsCsum", fl, ip.Len)
		}
	}
	if ip.Proto == wire.ProtoTCP {
		return a.addTCP(fl, l4)
	}
	payload, size := l4[wire.UDPLen:], len(l4)-wire.UDPLen
	if f.Hdr.GSO() == wire.GSOUDPL4 {
		size = int(f.Hdr.GSOSize)
	} else if got := int(binary.BigEndian.Uint16(l4[4:])); got != len(l4) {
		return fmt.Errorf("%v: a datagram of %d bytes came out with length %d in its UDP header", fl, len(l4), got)
	}
	for len(payload) > 0 {
		n := min(size, len(payload))
		if err := a.addDatagram(fl, payload[:n]); err != nil {
			return err
		}
		payload = payload[n:]
	}
	return nil
}

func (a *arrived) addDatagram(fl flow, p []byte) error {
	if len(p) < 8 || binary.BigEndian.Uint32(p) != udpMagic {
		return fmt.Errorf("%v: a datagram came out that was never sent: % x", fl, head(p))
	}
	id := binary.BigEndian.Uint32(p[4:])
	if want := datagram(id, len(p)); string(want) != string(p) {
		return fmt.Errorf("%v: datagram %d came out with other bytes than were sent; was it kept after Transmit returned?", fl, id)
	}
	if a.lens[fl] == nil {
		a.lens[fl] = map[uint32]int{}
	}
	if _, twice := a.lens[fl][id]; twice {
		return fmt.Errorf("%v: datagram %d came out twice", fl, id)
	}
	a.ids[fl] = append(a.ids[fl], id)
	a.lens[fl][id] = len(p)
	a.datagrams++
	return nil
}

func (a *arrived) addTCP(fl flow, seg []byte) error {
	hdr := int(seg[12]>>4) * 4
	if hdr < wire.TCPLen || hdr > len(seg) {
		return fmt.Errorf("%v: a TCP segment came out with a header of %d bytes", fl, hdr)
	}
	off := int(binary.BigEndian.Uint32(seg[4:]))
	p := seg[hdr:]
	st := a.stream[fl]
	if st.seen == nil {
		st.seen = make([]bool, maxStream)
	}
	if off+len(p) > maxStream {
		return fmt.Errorf("%v: bytes from %d on came out that were never sent", fl, off)
	}
	for i, c := range p {
		switch {
		case c != tcpByte(off+i):
			return fmt.Errorf("%v: byte %d of the stream came out as %#x, want %#x", fl, off+i, c, tcpByte(off+i))
		case st.seen[off+i]:
			return fmt.Errorf("%v: byte %d of the stream came out twice", fl, off+i)
		}
		st.seen[off+i] = true
	}
	st.n += len(p)
	a.stream[fl] = st
	return nil
}

// ordered checks that the datagrams of each flow came in the order of their numbers.
func (a *arrived) ordered() error {
	for fl, ids := range a.ids {
		for i := 1; i < len(ids); i++ {
			if ids[i] <= ids[i-1] {
				return fmt.Errorf("%v: datagram %d came out behind %d", fl, ids[i], ids[i-1])
			}
		}
	}
	return nil
}

// readUntil reads the far end until done, and then for what is too much.
func (h *Harness) readUntil(a *arrived, done func() bool) error {
	end := time.Now().Add(h.Patience)
	for !done() {
		if time.Now().After(end) {
			return fmt.Errorf("after %v only %d datagrams and %d streams have come out", h.Patience, a.datagrams, len(a.stream))
		}
		fs := h.Read(50 * time.Millisecond)
		for i := range fs {
			if err := a.add(&fs[i]); err != nil {
				return err
			}
		}
	}
	return nil
}

func head(b []byte) []byte { return b[:min(len(b), 64)] }
