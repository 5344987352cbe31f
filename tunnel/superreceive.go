package tunnel

import (
	"net/netip"

	"patchbay/frame"
	"patchbay/internal/wire"
	"patchbay/tunnel/superframe"
	"patchbay/tunnel/udp"
)

// maxLent is how many bytes of messages that were put together wait for the end of a batch, about.
const maxLent = 512 << 10

// receiveSuper takes what the rest of a train begins with, a datagram of the patchbay wire or all those of one message, and returns how many bytes that is.
func (v *VTEP) receiveSuper(set *peerSet, rest []byte, t *udp.Train, last *lookup) (used int) {
	used = min(t.Size, len(rest))
	h, why, ok := superframe.Parse(rest[:used])
	if !ok {
		v.drops.Add(why, 1)
		return used
	}
	p, st := v.streamOf(set, &h, t.From, last)
	if p == nil {
		return used
	}
	m, used := st.r.Add(&h, rest, t.Size, t.TOS&3, v.rx.now)
	p.pending.datagrams += (used + t.Size - 1) / t.Size
	if m == nil {
		return used
	}
	if (!h.Sealed || p.open(st, m, t.From, used)) && st.r.Accept(m.Header.Seq) {
		p.receiveMessage(m, t.From)
	}
	if len(p.pending.fs) >= maxPending || st.r.Lent() >= maxLent {
		p.forward()
	}
	return used
}

// streamOf is the peer that a datagram of the patchbay wire is from, and the stream it is part of: the address tells with a clear one, the session with a sealed one, wherever it comes from. Where there is
// none, or the peer seals and the datagram is clear, it is counted as dropped.
func (v *VTEP) streamOf(set *peerSet, h *superframe.Header, from netip.AddrPort, last *lookup) (*Peer, *stream) {
	if h.Sealed {
		p := v.links.owner(h.Channel)
		if p == nil {
			v.drops.Add(frame.DropNoSession, 1)
			return nil, nil
		}
		p.touch()
		return p, p.stream(h.Channel)
	}
	p := v.find(set, h.Channel, from, last)
	switch {
	case p == nil:
		return nil, nil
	case p.seal != nil:
		p.unsealed()
		return nil, nil
	}
	p.touch()
	p.pending.heard = true
	return p, p.stream(0)
}

// open opens a sealed message in place. size is how many bytes came from there with the last of it.
func (p *Peer) open(st *stream, m *superframe.Message, from netip.AddrPort, size int) bool {
	plain, why, ok := p.seal.link.Open(m.Header.Channel, m.Header.Seq, m.Header.AppendAAD(p.v.rx.aad[:0]), m.Data)
	if !ok {
		p.drops.Add(why, 1)
		return false
	}
	m.Data = plain
	p.pending.heard = true
	if m.Header.Seq >= st.top {
		st.top = m.Header.Seq
		p.seal.genuine(from, size, p.v.rx.now)
	}
	return true
}

// receiveMessage adds the frames of a message to what has come from the peer. They point into it.
func (p *Peer) receiveMessage(m *superframe.Message, from netip.AddrPort) {
	rs, ok := superframe.ParseRecords(m.Data)
	if !ok {
		p.drops.Add(frame.DropMalformed, 1)
		return
	}
	for rs.Next() {
		switch rs.Kind {
		case superframe.KindFrame, superframe.KindUnfinished:
			f, why, ok := rs.Frame()
			if !ok {
				p.drops.Add(why, 1)
				continue
			}
			p.receiveFrame(f, udp.ECN(m.Mark))
		case superframe.KindControl:
			p.handleControl(rs.Body, superframe.HeaderLen+int(m.Header.Total), from)
		default:
			p.drops.Add(frame.DropUnknownRecord, 1)
		}
	}
}

// receiveFrame adds one frame, which has been checked, to what has come from the peer.
func (p *Peer) receiveFrame(f frame.Frame, outer udp.ECN) {
	if outer != ecnNone && !carryECN(f.Data, outer) {
		p.drops.Add(frame.DropECN, 1)
		return
	}
	if !f.Superframe() {
		clampMSS(f.Data, p.pending.mtu, f.Hdr.Flags&wire.VirtioNeedsCsum != 0)
	}
	p.pending.fs = append(p.pending.fs, f)
}
