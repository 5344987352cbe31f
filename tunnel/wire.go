package tunnel

import (
	"net/netip"

	"patchbay/frame"
	"patchbay/internal/offload"
	"patchbay/internal/wire"
	"patchbay/tunnel/udp"
	"patchbay/tunnel/vxlan"
)

// wireFormat is how frames travel to one peer and from it. It is safe for concurrent use.
type wireFormat interface {
	// send adds the datagrams of fs to p to b, with the index of each frame as its tag, and returns how many frames it could not make datagrams of, each
	// counted. fs is lent until b is sent.
	send(p *Peer, b *udp.Batch, path *udp.Path, fs []frame.Frame) (refused int)
	// sendControl adds a control message, in one datagram of size bytes, or of as few as it takes where that is more.
	sendControl(b *udp.Batch, path *udp.Path, c control, size int)
}

func newWire(p *Peer) wireFormat {
	if p.cfg.Wire == WirePatchbay || p.seal != nil {
		return newSuperWire(p)
	}
	return newVXLANWire(p.cfg.VNI)
}

// datagram is one from a peer.
type datagram struct {
	data  []byte
	outer udp.ECN
	size  int // what the kernel said of the segments of an inner superframe, or 0
}

// vxlanWire is what a kernel speaks: one finished frame a datagram.
type vxlanWire struct {
	header [vxlan.HeaderLen]byte
}

func newVXLANWire(vni uint32) *vxlanWire {
	w := &vxlanWire{}
	vxlan.Put(w.header[:], vni)
	return w
}

func (w *vxlanWire) send(p *Peer, b *udp.Batch, path *udp.Path, fs []frame.Frame) (refused int) {
	var seg offload.Segmenter
	mtu := p.innerMTU()
	for i := range fs {
		f := &fs[i]
		n, ok := seg.Reset(f)
		switch {
		case !ok || len(f.Data) < wire.EthernetLen:
			p.drops.Add(frame.DropMalformed, 1)
			refused++
			continue
		case seg.MaxLen() > longestFrame || tooLong(f.Data, seg.MaxLen(), mtu):
			p.tooBig(f.Data, mtu)
			refused++
			continue
		}
		flow, ecn := wire.FlowHash(f.Data), innerECN(f.Data)
		if n == 1 && !f.Superframe() {
			if _, _, syn := synTCP(f.Data); syn {
				b.Add(path, flow, ecn, i, w.clamped(b, f, mtu), nil)
				continue
			}
		}
		for range n {
			head := b.Head(vxlan.HeaderLen + seg.HeadLen())
			copy(head, w.header[:])
			payload := seg.Next(head[vxlan.HeaderLen:])
			b.Add(path, flow, ecn, i, head, payload)
		}
	}
	return refused
}

// tooLong reports whether a frame whose longest segment has maxLen bytes holds an IP packet, or a segment of one, of more than mtu bytes. What is not IP may be as long.
func tooLong(data []byte, maxLen, mtu int) bool {
	if maxLen <= mtu+wire.EthernetLen {
		return false
	}
	_, off, ok := wire.Payload(data)
	return ok && maxLen-off > mtu
}

// clamped is the datagram of a SYN with its MSS lowered and its checksum finished. It is a copy, since frames are lent.
func (w *vxlanWire) clamped(b *udp.Batch, f *frame.Frame, mtu int) []byte {
	head := b.Head(vxlan.HeaderLen + len(f.Data))
	copy(head, w.header[:])
	clampCopy(head[vxlan.HeaderLen:], f, mtu)
	return head
}

// clampCopy copies a SYN, which has been found sound, to dst, with its MSS lowered and its checksum finished.
func clampCopy(dst []byte, f *frame.Frame, mtu int) {
	syn := frame.Frame{Hdr: f.Hdr, Data: dst}
	copy(syn.Data, f.Data)
	partial := f.Hdr.Flags&wire.VirtioNeedsCsum != 0
	clampMSS(syn.Data, mtu, partial)
	if partial {
		var scratch [wire.MaxHeaders]byte
		done, _, _ := offload.Finish(&syn, scratch[:0])
		copy(syn.Data, done)
	}
}

// receiveVXLAN adds the frame in one datagram, whose VXLAN header has been checked, to what has come from the peer. It points into the datagram.
func (p *Peer) receiveVXLAN(d *datagram) {
	f := frame.Frame{Data: d.data[vxlan.HeaderLen:len(d.data):len(d.data)]}
	if isControl(f.Data) {
		p.handleControl(f.Data[wire.EthernetLen:], len(d.data), netip.AddrPort{})
		return
	}
	if d.outer != ecnNone && !carryECN(f.Data, d.outer) {
		p.drops.Add(frame.DropECN, 1)
		return
	}
	f.Hdr = unfinished(f.Data, p.pending.mtu, d.size)
	if !f.Hdr.Validate(f.Data) {
		p.drops.Add(frame.DropBadHdr, 1)
		return
	}
	if !f.Superframe() {
		clampMSS(f.Data, p.pending.mtu, f.Hdr.Flags&wire.VirtioNeedsCsum != 0)
	}
	p.pending.fs = append(p.pending.fs, f)
}
