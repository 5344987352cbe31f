package tunnel

import (
	"encoding/binary"
	"net/netip"

	"patchbay/frame"
	"patchbay/internal/wire"
	"patchbay/tunnel/udp"
	"patchbay/tunnel/vxlan"
)

// Control messages are how two of our nodes ask after each other. Version 1 is controlLen bytes, big endian, with any number of bytes behind it that say
// nothing (padding, to try what a path carries):
//
//	 0 version, 1          1 kind: 1 probe, 2 reply        2 flags
//	 4 number of the probe, which its reply repeats
//	 8 time of the probe on its sender's clock in ns, which its reply repeats
//	16 instance of this message's sender, a random number of its start
//	24 datagrams that this message's sender has sent to the other, this one not counted
//	32 datagrams that it has received from the other, in a reply the probe included
//	40 messages that it knows to have been lost on the way from the other
//	48 messages from the other that came after later ones
//	56 in a reply, how many bytes the probe's datagram had when it came; 0 in a probe
//	60 0: ignored by receivers
//
// Flag 1 (flagCutLost) says that this message's sender does without cutting (UDP_SEGMENT), because what it cut got lost. Flag 2 (flagBack), of sealed probes, is a challenge (roam.go): number and time are random, and the reply is
// wanted where the probe came from, which may not be where its receiver knows the sender to be. Other flags are 0 and ignored by receivers, as is byte 3.
//
// On the VXLAN wire it is the payload of an inner Ethernet frame of EtherType controlEtherType to controlMAC, which no bridge forwards (IEEE 802.1Q §8.6.3) and a kernel ignores; on
// the patchbay wire it is a record. Neither reaches a switch here, and no container can send one, since a switch forwards nothing to controlMAC.
const (
	controlVersion = 1
	controlLen     = 64

	controlProbe = 1
	controlReply = 2

	flagCutLost uint8 = 1
	flagBack    uint8 = 2

	// controlEtherType is IEEE's for local experiments (IEEE 802 §9.2.3).
	controlEtherType uint16 = 0x88b5
)

// controlMAC is the nearest bridge's group address.
var controlMAC = wire.MAC{0x01, 0x80, 0xc2, 0x00, 0x00, 0x0e}

// control is a message.
type control struct {
	kind      uint8
	flags     uint8
	seq       uint32
	time      int64
	instance  uint64
	sent      uint64
	received  uint64
	lost      uint64
	reordered uint64
	size      uint32
}

// put writes c into b[:controlLen].
func (c *control) put(b []byte) {
	b = b[:controlLen]
	clear(b)
	b[0], b[1], b[2] = controlVersion, c.kind, c.flags
	binary.BigEndian.PutUint32(b[4:], c.seq)
	binary.BigEndian.PutUint64(b[8:], uint64(c.time))
	binary.BigEndian.PutUint64(b[16:], c.instance)
	binary.BigEndian.PutUint64(b[24:], c.sent)
	binary.BigEndian.PutUint64(b[32:], c.received)
	binary.BigEndian.PutUint64(b[40:], c.lost)
	binary.BigEndian.PutUint64(b[48:], c.reordered)
	binary.BigEndian.PutUint32(b[56:], c.size)
}

// parse reads b; what is behind the message is not looked at. It is false for another version or kind, and when b is too short.
func (c *control) parse(b []byte) bool {
	if len(b) < controlLen || b[0] != controlVersion || b[1] != controlProbe && b[1] != controlReply {
		return false
	}
	*c = control{
		kind: b[1], flags: b[2], seq: binary.BigEndian.Uint32(b[4:]), time: int64(binary.BigEndian.Uint64(b[8:])), instance: binary.BigEndian.Uint64(b[16:]),
		sent: binary.BigEndian.Uint64(b[24:]), received: binary.BigEndian.Uint64(b[32:]), lost: binary.BigEndian.Uint64(b[40:]), reordered: binary.BigEndian.Uint64(b[48:]),
		size: binary.BigEndian.Uint32(b[56:]),
	}
	return true
}

// controlMark is what the first eight bytes and the EtherType of a control frame are.
const controlMark = 0x0180c200000e << 16

// isControl reports whether an inner frame is a control frame.
func isControl(f []byte) bool {
	return len(f) >= wire.EthernetLen && binary.BigEndian.Uint64(f)>>16 == controlMark>>16 && binary.BigEndian.Uint16(f[12:]) == controlEtherType
}

// sendControl implements wireFormat.
func (w *vxlanWire) sendControl(b *udp.Batch, path *udp.Path, c control, size int) {
	size = max(size, vxlan.HeaderLen+wire.EthernetLen+controlLen)
	head := b.Head(size)
	n := copy(head, w.header[:])
	n += wire.PutEthernet(head[n:], controlMAC, controlSource(c.instance), controlEtherType)
	c.put(head[n:])
	clear(head[n+controlLen:])
	b.Add(path, 0, ecnNone, 0, head, nil)
}

// controlSource is what control frames come from: a locally administered address that stands for nobody. Each VTEP has its own, since a kernel that has several for peers learns it, and would log that it
// moves from one to the other.
func controlSource(instance uint64) wire.MAC {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], instance)
	return wire.MAC{0x02, b[0], b[1], b[2], b[3], b[4]}
}

// say sends a control message to the peer, in a datagram of size bytes, or as long as it takes. What cannot be sent is lost, as it might be on the way.
func (p *Peer) say(c control, size int) { p.sayOn(p.path.Load(), c, size) }

// sayOn is say on a path that need not be the peer's.
func (p *Peer) sayOn(path *udp.Path, c control, size int) {
	if p.gate.Add(1) < 0 {
		p.gate.Add(-1)
		return
	}
	defer p.gate.Add(-1)
	b, ok := p.v.sock.Batch(&p.unsaid)
	if !ok {
		return
	}
	c.instance = p.v.instance
	c.sent = p.sentCounts().sent
	c.received = p.rx.datagrams.Load()
	c.lost, c.reordered = p.rx.lost.Load(), p.rx.reordered.Load()
	if path.Cut() == udp.CutLossy {
		c.flags |= flagCutLost
	}
	p.wire.sendControl(b, path, c, size)
	b.Send()
	b.Release()
}

// handleControl takes a control message that came from the peer in a datagram of size bytes of UDP payload. from is where a sealed one came from. It runs on the receiving goroutine.
func (p *Peer) handleControl(msg []byte, size int, from netip.AddrPort) {
	var c control
	if !c.parse(msg) {
		p.drops.Add(frame.DropMalformed, 1)
		return
	}
	now := p.v.now()
	p.count() // what came before it counts
	p.learn(&c, now)
	answer := control{kind: controlReply, seq: c.seq, time: c.time, size: uint32(size)}
	switch {
	case c.kind == controlReply && p.seal != nil && p.seal.roam.answered(&c, from):
		p.v.kick()
	case c.kind == controlReply:
		if !p.live.reply(p, &c, now) {
			p.drops.Add(frame.DropNoFlow, 1)
		}
	case !p.live.probed(p, &c, now):
		p.drops.Add(frame.DropServiceLimit, 1)
	case c.flags&flagBack != 0 && p.seal != nil && p.seal.roam.owe(answer, from):
		p.v.kick()
	default:
		p.say(answer, 0)
	}
}

// sentCounts is what has been sent to the peer, handshakes aside; what of it was cut, on this path.
func (p *Peer) sentCounts() counts {
	s := p.path.Load().Stats()
	n := p.sentBefore.Load() + s.Datagrams
	if p.seal != nil {
		n -= min(n, p.seal.handshakes.Load())
	}
	return counts{sent: n, cut: s.CutDatagrams, messages: s.CutMessages}
}
