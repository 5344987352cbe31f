package tunnel

import (
	"patchbay/frame"
	"patchbay/internal/offload"
	"patchbay/internal/wire"
	"patchbay/tunnel/udp"
	"patchbay/tunnel/vxlan"
)

// wireFormat is how frames travel to one peer and from it. It is safe for concurrent use.
type wireFormat interface {
	// send adds the datagrams of fs to b, with the index of each frame as its tag, and returns how many frames it could not make datagrams of, each
	// counted in drops. fs is lent until b is sent.
	send(b *udp.Batch, path *udp.Path, fs []frame.Frame, drops *frame.DropCounters) (refused int)
	// receive appends the frames in one datagram, whose VXLAN header has been checked, to fs. They point into it. What it cannot make frames of it
	// counts in drops.
	receive(d *datagram, fs []frame.Frame, drops *frame.DropCounters) []frame.Frame
}

// datagram is one from a peer.
type datagram struct {
	data  []byte
	outer udp.ECN
	size  int // what the kernel said of the segments of an inner superframe, or 0
	mtu   int // of inner IP packets on the way from the peer, taken to be that on the way there
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

func (w *vxlanWire) send(b *udp.Batch, path *udp.Path, fs []frame.Frame, drops *frame.DropCounters) (refused int) {
	var seg offload.Segmenter
	for i := range fs {
		f := &fs[i]
		n, ok := seg.Reset(f)
		switch {
		case !ok || len(f.Data) < wire.EthernetLen:
			drops.Add(frame.DropMalformed, 1)
			refused++
			continue
		case seg.MaxLen() > longestFrame:
			drops.Add(frame.DropTooBig, 1)
			refused++
			continue
		}
		flow, ecn := wire.FlowHash(f.Data), innerECN(f.Data)
		for range n {
			head := b.Head(vxlan.HeaderLen + seg.HeadLen())
			copy(head, w.header[:])
			payload := seg.Next(head[vxlan.HeaderLen:])
			b.Add(path, flow, ecn, i, head, payload)
		}
	}
	return refused
}

func (w *vxlanWire) receive(d *datagram, fs []frame.Frame, drops *frame.DropCounters) []frame.Frame {
	f := frame.Frame{Data: d.data[vxlan.HeaderLen:len(d.data):len(d.data)]}
	if d.outer != ecnNone && !carryECN(f.Data, d.outer) {
		drops.Add(frame.DropECN, 1)
		return fs
	}
	f.Hdr = unfinished(f.Data, d.mtu, d.size)
	if !f.Hdr.Validate(f.Data) {
		drops.Add(frame.DropBadHdr, 1)
		return fs
	}
	return append(fs, f)
}
