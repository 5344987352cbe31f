package tunnel

import (
	"net/netip"

	"patchbay/frame"
	"patchbay/tunnel/udp"
	"patchbay/tunnel/vxlan"
)

// maxPending is how many frames of one peer are forwarded at a time, at most: as many as a switch takes at once.
const maxPending = 256

// receiver is the scratch of Run.
type receiver struct {
	touched []*Peer // peers with frames to forward
	d       datagram
}

// batch is what has come from one peer in the batch that is being handled.
type batch struct {
	fs    []frame.Frame
	heard bool // in touched
	mtu   int  // innerMTU
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
	for i := range ts {
		v.receive(set, &ts[i], &last)
	}
	now := v.now()
	for _, p := range v.rx.touched {
		p.forward()
		p.pending.heard = false
		p.rx.heard.Store(now)
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

// receive takes one train apart. Each of its datagrams may be of another network.
func (v *VTEP) receive(set *peerSet, t *udp.Train, last *lookup) {
	d := &v.rx.d
	*d = datagram{outer: udp.ECN(t.TOS & 3)}
	step := t.Size
	if step < len(t.Data) && uncut(t.Data) {
		step, d.size = len(t.Data), t.Size
	}
	for data := t.Data; ; {
		d.data = data[:min(step, len(data))]
		if p := v.sender(set, d.data, t.From, last); p != nil {
			if !p.pending.heard {
				p.pending.heard = true
				p.pending.mtu = p.innerMTU()
				v.rx.touched = append(v.rx.touched, p)
			}
			d.mtu = p.pending.mtu
			p.pending.fs = p.wire.receive(d, p.pending.fs, p.drops)
			if len(p.pending.fs) >= maxPending {
				p.forward()
			}
		}
		if data = data[len(d.data):]; len(data) == 0 {
			return // an empty datagram is one, too
		}
	}
}

// sender is the peer that a datagram came from; where there is none it is counted as dropped.
func (v *VTEP) sender(set *peerSet, datagram []byte, from netip.AddrPort, last *lookup) *Peer {
	vni, why, ok := vxlan.Parse(datagram)
	if !ok {
		v.drops.Add(why, 1)
		return nil
	}
	if !last.valid || vni != last.vni || from != last.from {
		*last = lookup{valid: true, vni: vni, from: from}
		last.peer, last.why = set.find(vni, from)
	}
	if last.peer == nil {
		v.drops.Add(last.why, 1)
	}
	return last.peer
}

// forward hands over what has come from the peer.
func (p *Peer) forward() {
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
