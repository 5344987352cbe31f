package tunnel

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"

	"patchbay/frame"
	"patchbay/internal/offload"
	"patchbay/internal/wire"
	"patchbay/tunnel/secure"
	"patchbay/tunnel/superframe"
	"patchbay/tunnel/udp"
)

// superWire is what our own nodes speak among themselves (package superframe), clear or sealed.
type superWire struct {
	vni     uint32
	link    *secure.Link  // of a sealed peer, else nil
	cut     bool          // superframes never go whole
	seq     atomic.Uint64 // of the last clear message; begins with a random number
	adapt   adaptation
	senders sync.Pool // of *superSender

	// messages are all that were sent, many those of several datagrams, crossed those that were sent while another Transmit was under way and may have overtaken them.
	messages, many, crossed atomic.Uint64
}

func newSuperWire(p *Peer) *superWire {
	w := &superWire{vni: p.cfg.VNI, cut: p.cfg.Wire != WirePatchbay}
	if p.seal != nil {
		w.link = p.seal.link
	}
	w.adapt.inSegments.Store(w.cut)
	w.seq.Store(rand.Uint64())
	w.senders.New = func() any { return &superSender{w: w} }
	return w
}

// superSender is the scratch of one Transmit.
type superSender struct {
	w    *superWire
	p    *Peer
	b    *udp.Batch
	path *udp.Path
	mtu  int // of inner IP packets
	room int // bytes of a message in one datagram
	own  int // bytes of them that are not the seal's

	pack superframe.Packer
	cut  superframe.Cutter
	seg  offload.Segmenter

	// front stands in front of the body of a message that pack has not made.
	front [longestSYN]byte

	// session is what messages are sealed under; nil where they are clear. sealed holds those that wait in b.
	session *secure.Session
	sealed  []byte
	aad     [superframe.AADLen]byte

	messages, many uint64
}

// longestSYN is the longest frame that is copied to edit it.
const longestSYN = 2048

// fits is how many bytes of a message go in one datagram.
func (p *Peer) fits(path *udp.Path) int {
	return min(path.Fits(p.pathMTU(path)), udp.MaxDatagram) - superframe.HeaderLen
}

func (w *superWire) send(p *Peer, b *udp.Batch, path *udp.Path, fs []frame.Frame) (refused int) {
	s := w.senders.Get().(*superSender)
	s.p, s.b, s.path, s.mtu, s.room = p, b, path, p.innerMTU(), max(p.fits(path), superframe.MinRoom)
	s.own = s.room
	if w.link != nil {
		if s.session = w.link.Session(); s.session == nil {
			s.end()
			w.senders.Put(s)
			p.drops.Add(frame.DropNoSession, len(fs))
			return len(fs)
		}
		s.own -= secure.Overhead
	}
	before := p.gate.Load()
	segments := w.adapt.segments()
	for i := 0; i < len(fs); {
		f := &fs[i]
		switch s.class(f) {
		case classMalformed:
			p.drops.Add(frame.DropMalformed, 1)
			refused++
			i++
		case classTooLong:
			p.tooBig(f.Data, s.mtu)
			refused++
			i++
		case classSYN:
			s.sendSYN(i, f)
			i++
		case classSuper:
			if segments {
				s.sendSegments(i, f)
				i++
				continue
			}
			fallthrough
		default:
			i += s.sendPacked(i, fs[i:], segments)
		}
	}
	w.messages.Add(s.messages)
	w.many.Add(s.many)
	if before > 1 || p.gate.Load() > 1 {
		w.crossed.Add(2 * s.messages) // these, or as many of the other's
	}
	s.end()
	w.senders.Put(s)
	return refused
}

// class is what a frame needs.
type class uint8

const (
	classPlain class = iota
	classSuper
	classSYN // opens a connection: its MSS is clamped
	classTooLong
	classMalformed
)

func (s *superSender) class(f *frame.Frame) class {
	n := len(f.Data)
	if f.Superframe() {
		if _, ok := s.seg.Reset(f); !ok || n > wire.MaxFrame {
			return classMalformed
		}
		if tooLong(f.Data, s.seg.MaxLen(), s.mtu) {
			return classTooLong
		}
		return classSuper
	}
	switch {
	case n < wire.EthernetLen, n > wire.MaxFrame, f.Hdr.Flags&wire.VirtioNeedsCsum != 0 && int(f.Hdr.CsumStart)+int(f.Hdr.CsumOffset)+2 > n:
		return classMalformed
	case tooLong(f.Data, n, s.mtu):
		return classTooLong
	case n <= longestSYN-superframe.RecordLen:
		if _, _, syn := synTCP(f.Data); syn {
			return classSYN
		}
	}
	return classPlain
}

// sendPacked sends the first of fs, which are those from index i on, and those behind it that need nothing else and have the same ECN codepoint. It returns how many.
func (s *superSender) sendPacked(i int, fs []frame.Frame, segments bool) int {
	ecn, n := innerECN(fs[0].Data), 1
	for ; n < len(fs) && innerECN(fs[n].Data) == ecn; n++ {
		if c := s.class(&fs[n]); c != classPlain && (c != classSuper || segments) {
			break
		}
	}
	for s.pack.Reset(fs[:n], s.own); s.pack.Next(); {
		first, frames := s.pack.Frames()
		s.message(ecn, i+first, frames, s.pack.Front(), s.pack.Body(), true)
	}
	return n
}

// sendSegments sends the segments of a superframe, which class has just looked at, as messages of their own.
func (s *superSender) sendSegments(i int, f *frame.Frame) {
	n, ok := s.seg.Reset(f)
	if !ok {
		return // class has seen that it is
	}
	ecn := innerECN(f.Data)
	for range n {
		front := superframe.RecordLen + s.seg.HeadLen()
		payload := s.seg.Next(s.front[superframe.RecordLen:front])
		superframe.PutRecord(s.front[:], superframe.KindFrame, s.seg.HeadLen()+len(payload))
		s.message(ecn, i, 1, front, payload, false)
	}
}

// sendSYN sends a copy with its MSS lowered and its checksum finished, since frames are lent.
func (s *superSender) sendSYN(i int, f *frame.Frame) {
	front := superframe.RecordLen + len(f.Data)
	superframe.PutRecord(s.front[:], superframe.KindFrame, len(f.Data))
	clampCopy(s.front[superframe.RecordLen:front], f, s.mtu)
	head := min(front, s.own)
	s.message(innerECN(f.Data), i, 1, head, s.front[head:front:front], false)
}

// message sends one message: front bytes of pack's making, or of s.front, and body. The frames with the tags tag to tag+frames-1 are lost with it.
func (s *superSender) message(ecn udp.ECN, tag, frames, front int, body []byte, packed bool) {
	s.messages++
	if s.session != nil {
		s.seal(ecn, tag, frames, front, body, packed)
		return
	}
	h := superframe.Header{Channel: s.w.vni, Seq: s.w.seq.Add(1), Total: uint32(front + len(body))}
	for s.begin(h, front, body); s.cut.More(); {
		head := s.b.Head(s.cut.HeadLen())
		if s.cut.First() {
			if packed {
				s.pack.Put(head[superframe.HeaderLen:])
			} else {
				copy(head[superframe.HeaderLen:], s.front[:front])
			}
		}
		s.b.AddShared(s.path, 0, ecn, tag, frames, head, s.cut.Next(head))
	}
}

// begin begins to cut a message.
func (s *superSender) begin(h superframe.Header, front int, body []byte) {
	if int(h.Total) > s.room {
		s.many++
	}
	s.cut.Begin(h, front, body, s.room)
}

// sealedRoom is how many bytes of sealed messages wait to be sent, at most: two of the longest, so that they stay in the cache.
const sealedRoom = 2 * (superframe.MaxMessage + secure.Overhead)

// seal is message for a sealed peer: the message is copied together, sealed where it lies, and cut.
func (s *superSender) seal(ecn udp.ECN, tag, frames, front int, body []byte, packed bool) {
	if s.sealed == nil {
		s.sealed = make([]byte, 0, sealedRoom)
	}
	if len(s.sealed)+front+len(body)+secure.Overhead > cap(s.sealed) {
		s.b.Flush()
		s.sealed = s.sealed[:0]
	}
	seq, ok := s.session.Next()
	if !ok {
		s.b.Lose(tag, frames, frame.DropNoSession)
		return
	}
	at := len(s.sealed)
	m := s.sealed[at:at]
	if packed {
		m = s.pack.Append(m)
	} else {
		m = append(append(m, s.front[:front]...), body...)
	}
	h := superframe.Header{Sealed: true, Channel: s.session.ID(), Seq: seq, Total: uint32(len(m) + secure.Overhead)}
	m = s.session.Seal(m[:0], seq, h.AppendAAD(s.aad[:0]), m)
	s.sealed = s.sealed[:at+len(m)]
	for s.begin(h, 0, m); s.cut.More(); {
		head := s.b.Head(s.cut.HeadLen())
		s.b.AddShared(s.path, 0, ecn, tag, frames, head, s.cut.Next(head))
	}
}

// end forgets what belongs to one Transmit. What was sealed has to be sent before others use the scratch.
func (s *superSender) end() {
	if s.session != nil {
		s.b.Flush()
		s.sealed = s.sealed[:0]
	}
	s.p, s.b, s.path, s.session, s.messages, s.many = nil, nil, nil, nil, 0, 0
}

// sendControl implements wireFormat. Without keys nothing is sent.
func (w *superWire) sendControl(b *udp.Batch, path *udp.Path, c control, size int) {
	const heads = superframe.HeaderLen + superframe.RecordLen
	seal := 0
	var session *secure.Session
	h := superframe.Header{Channel: w.vni}
	if w.link == nil {
		h.Seq = w.seq.Add(1)
	} else {
		ok := false
		if session = w.link.Session(); session != nil {
			h.Seq, ok = session.Next()
		}
		if !ok {
			return
		}
		h.Sealed, h.Channel, seal = true, session.ID(), secure.Overhead
	}
	size = max(size, heads+controlLen+seal)
	head := b.Head(size)
	w.messages.Add(1)
	h.Total = uint32(size - superframe.HeaderLen)
	h.Put(head)
	body := head[superframe.HeaderLen : size-seal]
	superframe.PutRecord(body, superframe.KindControl, len(body)-superframe.RecordLen)
	c.put(body[superframe.RecordLen:])
	clear(body[superframe.RecordLen+controlLen:])
	if session != nil {
		session.Seal(body[:0], h.Seq, h.AppendAAD(nil), body)
	}
	b.AddShared(path, 0, ecnNone, 0, 1, head, nil)
}
