package stack

import (
	"encoding/binary"
	"net/netip"
	"sync"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// txScratch is how many bytes of frames one tx holds: one superframe and room to gather small frames behind it.
const txScratch = 2 * wire.MaxFrame

// tx is what one goroutine needs to send: an ingress handle of the gateway's port and room to build frames in.
type tx struct {
	sink frame.Sink
	buf  []byte
	fs   []frame.Frame
}

// txList keeps the tx's that nobody uses just now, the last one used on top. No lock is held while one is in use.
type txList struct {
	mu      sync.Mutex
	newSink func() frame.Sink
	free    []*tx
}

func (l *txList) connect(newSink func() frame.Sink) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.newSink = newSink
}

// get is nil before Connect.
func (l *txList) get() *tx {
	l.mu.Lock()
	if n := len(l.free); n > 0 {
		t := l.free[n-1]
		l.free = l.free[:n-1]
		l.mu.Unlock()
		return t
	}
	newSink := l.newSink
	l.mu.Unlock()
	if newSink == nil {
		return nil
	}
	return &tx{sink: newSink(), buf: make([]byte, 0, txScratch)}
}

func (l *txList) put(t *tx) {
	clear(t.fs)
	t.fs, t.buf = t.fs[:0], t.buf[:0]
	l.mu.Lock()
	l.free = append(l.free, t)
	l.mu.Unlock()
}

// room returns n bytes to build one frame in, after flushing when there is not as much left. n is at most wire.MaxFrame.
func (t *tx) room(n int) []byte {
	if cap(t.buf)-len(t.buf) < n {
		t.flush()
	}
	l := len(t.buf)
	t.buf = t.buf[:l+n]
	return t.buf[l : l+n : l+n]
}

func (t *tx) add(f frame.Frame) { t.fs = append(t.fs, f) }

func (t *tx) flush() {
	if len(t.fs) > 0 {
		t.sink.Forward(t.fs)
		clear(t.fs)
	}
	t.fs, t.buf = t.fs[:0], t.buf[:0]
}

// Send puts IP packets on the network; see Network.
func (g *Gateway) Send(fs []frame.Frame) {
	t := g.tx.get()
	if t == nil {
		g.drops.Add(frame.DropNoPort, len(fs))
		return
	}
	defer g.tx.put(t)
	mtu := g.MTU()
	start := 0 // of the run of frames that can go as they are
	for i := range fs {
		f := &fs[i]
		if g.address(f) && (f.Superframe() || len(f.Data) <= wire.EthernetLen+mtu) {
			continue
		}
		if start < i {
			t.sink.Forward(fs[start:i])
		}
		start = i + 1
		if len(f.Data) > wire.EthernetLen+mtu && !f.Superframe() && len(f.Data) >= wire.EthernetLen+wire.IPv4Len {
			if mac, ok := g.macFor(packetDst(f.Data)); ok {
				g.sendFragments(t, f, mac)
				continue
			}
		}
		g.hold(f)
	}
	if start < len(fs) {
		t.sink.Forward(fs[start:])
	}
}

// address writes f's Ethernet header. It is false when the destination's MAC is not known or there is no destination.
func (g *Gateway) address(f *frame.Frame) bool {
	mac, ok := g.macFor(packetDst(f.Data))
	if !ok {
		return false
	}
	wire.PutEthernet(f.Data, mac, g.mac, etherTypeOf(f.Data))
	return true
}

// sendOne sends a packet built by the gateway itself. d has room for the Ethernet header in front.
func (g *Gateway) sendOne(d []byte) {
	fs := [1]frame.Frame{{Data: d}}
	g.Send(fs[:])
}

// sendTo sends a packet to a MAC that is known already, such as the asker's.
func (g *Gateway) sendTo(d []byte, mac wire.MAC, etherType uint16) {
	t := g.tx.get()
	if t == nil {
		g.drops.Add(frame.DropNoPort, 1)
		return
	}
	wire.PutEthernet(d, mac, g.mac, etherType)
	t.add(frame.Frame{Data: d})
	t.flush()
	g.tx.put(t)
}

// packetDst is the destination of the IP packet behind the Ethernet header, or the zero Addr when there is none.
func packetDst(d []byte) netip.Addr {
	if len(d) >= wire.EthernetLen+wire.IPv4Len {
		switch p := d[wire.EthernetLen:]; p[0] >> 4 {
		case 4:
			return netip.AddrFrom4([4]byte(p[16:20]))
		case 6:
			if len(p) >= wire.IPv6Len {
				return netip.AddrFrom16([16]byte(p[24:40]))
			}
		}
	}
	return netip.Addr{}
}

func etherTypeOf(d []byte) uint16 {
	if d[wire.EthernetLen]>>4 == 4 {
		return wire.EtherTypeIPv4
	}
	return wire.EtherTypeIPv6
}

// macFor is the MAC that packets for ip go to: by rule for groups, else what SetNeighbor, ARP or ND told.
func (g *Gateway) macFor(ip netip.Addr) (wire.MAC, bool) {
	if mac, ok := g.nb.lookup(ip); ok {
		return mac, true
	}
	switch {
	case !ip.IsValid():
		return wire.MAC{}, false
	case ip == limitedBroadcast || ip == g.bcast4:
		return wire.Broadcast, true
	case !ip.IsMulticast():
		return wire.MAC{}, false
	case ip.Is4():
		b := ip.As4()
		return wire.MAC{0x01, 0x00, 0x5e, b[1] & 0x7f, b[2], b[3]}, true
	}
	b := ip.As16()
	return wire.MAC{0x33, 0x33, b[12], b[13], b[14], b[15]}, true
}

// finishChecksum completes a checksum that was left to the device (virtio NEEDS_CSUM) in place.
func finishChecksum(f *frame.Frame) bool {
	if f.Hdr.Flags&wire.VirtioNeedsCsum == 0 {
		return true
	}
	start, at := int(f.Hdr.CsumStart), int(f.Hdr.CsumStart)+int(f.Hdr.CsumOffset)
	if at+2 > len(f.Data) || start > len(f.Data) {
		return false
	}
	// The field holds the pseudo-header's sum already, so summing over it finishes the job.
	sum := ^wire.Fold(wire.Sum(f.Data[start:], 0))
	if sum == 0 {
		sum = 0xffff // UDP: zero means "none"; the same value to everybody else
	}
	binary.BigEndian.PutUint16(f.Data[at:], sum)
	f.Hdr.Flags &^= wire.VirtioNeedsCsum
	return true
}
