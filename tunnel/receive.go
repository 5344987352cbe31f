package tunnel

import (
	"net/netip"

	"patchbay/frame"
	"patchbay/tunnel/secure"
	"patchbay/tunnel/superframe"
	"patchbay/tunnel/udp"
	"patchbay/tunnel/vxlan"
)

// maxPending is how many frames of one peer are forwarded at a time, at most: as many as a switch takes at once.
const maxPending = 256

// receiver is the scratch of Run.
type receiver struct {
	touched []*Peer // peers with frames to forward
	d       datagram
	pool    superframe.Pool // of all peers
	now     int64           // of the batch
	aad     [superframe.AADLen]byte
}

// batch is what has come from one peer in the batch that is being handled.
type batch struct {
	fs     []frame.Frame
	listed bool // in touched
	heard  bool // what has come is the peer's, as far as can be known
	mtu    int  // innerMTU
	// datagrams are those of the batch that are not counted yet.
	datagrams int
	streams   streams
}

// handler is the VTEP as package udp sees it.
type handler VTEP

// Receive hands the frames in ts to the sinks of their peers.
func (h *handler) Receive(ts []udp.Train) {
	v := (*VTEP)(h)
	v.epoch.Add(1)
	// The snapshot is loaded after epoch is odd: see Peer.Close.
	set := v.peers.Load()
	var last lookup
	now := v.now()
	v.rx.now = now
	for i := range ts {
		v.receive(set, &ts[i], &last)
	}
	for _, p := range v.rx.touched {
		p.count()
		p.forward()
		p.pending.streams.expire(now)
		if p.pending.heard && p.rx.heard.Swap(now) == 0 {
			v.kick() // its state has changed
		}
		p.pending.listed, p.pending.heard = false, false
	}
	clear(v.rx.touched)
	v.rx.touched = v.rx.touched[:0]
	v.epoch.Add(1)
}

// lookup is the answer to the last look into the set of peers: datagrams of one peer come in a row.
type lookup struct {
	valid bool
	vni   uint32
	from  netip.AddrPort
	peer  *Peer
	why   frame.Drop
}

// receive takes one train apart. Each of its datagrams may be of another network, and on another wire: the first byte tells.
func (v *VTEP) receive(set *peerSet, t *udp.Train, last *lookup) {
	d := &v.rx.d
	*d = datagram{outer: udp.ECN(t.TOS & 3)}
	step := t.Size
	if step < len(t.Data) && t.Data[0] != superframe.Type && t.Data[0] != secure.HandshakeType && uncut(t.Data) {
		step, d.size = len(t.Data), t.Size
	}
	for data := t.Data; ; {
		if len(data) > 0 && data[0] == superframe.Type {
			if data = data[v.receiveSuper(set, data, t, last):]; len(data) == 0 {
				return
			}
			continue
		}
		d.data = data[:min(step, len(data))]
		if len(data) > 0 && data[0] == secure.HandshakeType {
			v.receiveHandshake(set, d.data, t.From, last)
		} else if p := v.sender(set, d.data, t.From, last); p != nil {
			p.touch()
			p.pending.heard = true
			p.pending.datagrams++
			p.receiveVXLAN(d)
			if len(p.pending.fs) >= maxPending {
				p.forward()
			}
		}
		if data = data[len(d.data):]; len(data) == 0 {
			return // an empty datagram is one, too
		}
	}
}

// sender is the peer that a VXLAN datagram came from; where there is none, or one that seals, it is counted as dropped.
func (v *VTEP) sender(set *peerSet, datagram []byte, from netip.AddrPort, last *lookup) *Peer {
	vni, why, ok := vxlan.Parse(datagram)
	if !ok {
		v.drops.Add(why, 1)
		return nil
	}
	p := v.find(set, vni, from, last)
	if p != nil && p.seal != nil {
		p.unsealed()
		return nil
	}
	return p
}

// find is the peer of network vni at from; where there is none a datagram is counted as dropped.
func (v *VTEP) find(set *peerSet, vni uint32, from netip.AddrPort, last *lookup) *Peer {
	if !last.valid || vni != last.vni || from != last.from {
		*last = lookup{valid: true, vni: vni, from: from}
		last.peer, last.why = set.find(vni, from)
	}
	if last.peer == nil {
		v.drops.Add(last.why, 1)
	}
	return last.peer
}

// touch is called for each datagram that seems to be from the peer, before anything else is done with it.
func (p *Peer) touch() {
	if !p.pending.listed {
		p.pending.listed = true
		p.pending.mtu = p.innerMTU()
		p.v.rx.touched = append(p.v.rx.touched, p)
	}
}

// count makes the datagrams of the batch part of the peer's.
func (p *Peer) count() {
	p.rx.datagrams.Add(uint64(p.pending.datagrams))
	p.pending.datagrams = 0
	p.noteSuper()
}

// forward hands over what has come from the peer.
func (p *Peer) forward() {
	if len(p.pending.streams.all) > 0 {
		defer p.pending.streams.release()
	}
	fs := p.pending.fs
	if len(fs) == 0 {
		return
	}
	bytes := 0
	for i := range fs {
		bytes += len(fs[i].Data)
	}
	p.rx.frames.Add(uint64(len(fs)))
	p.rx.bytes.Add(uint64(bytes))
	if s := p.sink.Load(); s != nil {
		s.Forward(fs)
	} else {
		p.drops.Add(frame.DropPortDown, len(fs))
	}
	p.pending.fs = fs[:0]
}
