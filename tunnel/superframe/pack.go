package superframe

import (
	"patchbay/frame"
	"patchbay/internal/offload"
	"patchbay/internal/wire"
)

// Packer makes messages of the frames of one Transmit:
//
//	p.Reset(fs, room)
//	for p.Next() {
//		h := superframe.Header{Channel: vni, Seq: next(), Total: uint32(p.Len())}
//		for c.Begin(h, p.Front(), p.Body(), room); c.More(); {
//			head := make([]byte, c.HeadLen())
//			if c.First() {
//				p.Put(head[superframe.HeaderLen:])
//			}
//			payload := c.Next(head)
//			// send head, payload
//		}
//	}
//
// A superframe is a message of its own. Other frames share a message as long as it stays one datagram. Order is kept. Nothing is copied but frames that share a message, all but the last of them,
// and headers in which a checksum is finished.
//
// A frame whose checksum is to be finished travels as it is where its virtio header has room in the datagram, so that no end computes it; else it is finished here.
type Packer struct {
	fs   []frame.Frame
	room int

	first, n int // the frames of the message
	front    int // bytes that Put writes
	body     []byte
}

// Reset begins with fs, which Validate has found sound, each of wire.EthernetLen to wire.MaxFrame bytes. They are referred to until the message that they are part of is sent. room is how many bytes of a
// message go in one datagram, at least MinRoom.
func (p *Packer) Reset(fs []frame.Frame, room int) {
	*p = Packer{fs: fs, room: max(room, MinRoom)}
}

// MinRoom is the least room of a datagram: MaxMessage has to fit MaxFragments of them.
const MinRoom = (MaxMessage+SealRoom)/MaxFragments + 1

// Next makes the next message; false when there is none.
func (p *Packer) Next() bool {
	p.first += p.n
	if p.n = 0; p.first >= len(p.fs) {
		p.fs, p.body = nil, nil
		return false
	}
	size := 0
	for i := p.first; i < len(p.fs); i++ {
		f := &p.fs[i]
		n := RecordLen + len(f.Data)
		if whole(f, p.room) {
			n += wire.VirtioNetHdrLen
		}
		if p.n > 0 && (size+n > p.room || f.Superframe()) {
			break
		}
		size += n
		if p.n++; size > p.room || f.Superframe() {
			break
		}
	}
	// All but the last frame are copied, and of the last one what stands in front of what can stay where it is.
	last := &p.fs[p.first+p.n-1]
	p.body = last.Data
	switch {
	case p.n > 1 && len(last.Data) < shortest:
		p.body = nil
	case !whole(last, p.room):
		p.body = last.Data[finished(last):]
	}
	p.front = size - len(p.body)
	return true
}

// shortest is how many bytes a frame that shares a datagram must have for it to be worth a piece of its own in the system call.
const shortest = 256

// whole reports whether f travels with its virtio header: a superframe does, and one with a checksum to finish where that costs no second datagram, or where the bytes up to the checksum do not fit
// the first.
func whole(f *frame.Frame, room int) bool {
	return f.Superframe() || f.Hdr.Flags&wire.VirtioNeedsCsum != 0 && (RecordLen+wire.VirtioNetHdrLen+len(f.Data) <= room || RecordLen+finished(f) > room)
}

// finished is how many bytes of f, which is no superframe, are written anew to finish it.
func finished(f *frame.Frame) int {
	if f.Hdr.Flags&wire.VirtioNeedsCsum == 0 {
		return 0
	}
	return min(int(f.Hdr.CsumStart)+int(f.Hdr.CsumOffset)+2, len(f.Data))
}

// Frames are those of the message: n of them, beginning with fs[first].
func (p *Packer) Frames() (first, n int) { return p.first, p.n }

// Len is the length of the message in bytes, at most MaxMessage.
func (p *Packer) Len() int { return p.front + len(p.body) }

// Front is how many bytes of the message Put writes. They fit the first datagram.
func (p *Packer) Front() int { return p.front }

// Body is the rest of the message. It points into a frame.
func (p *Packer) Body() []byte { return p.body }

// Put writes the first Front bytes of the message to b.
func (p *Packer) Put(b []byte) {
	at := 0
	for i := p.first; i < p.first+p.n; i++ {
		f := &p.fs[i]
		kind, n := KindFrame, len(f.Data)
		full := whole(f, p.room)
		if full {
			kind, n = KindUnfinished, n+wire.VirtioNetHdrLen
		}
		PutRecord(b[at:], kind, n)
		at += RecordLen
		if full {
			f.Hdr.Encode(b[at:])
			at += wire.VirtioNetHdrLen
		}
		rest := f.Data
		if !full && f.Hdr.Flags&wire.VirtioNeedsCsum != 0 {
			if head, tail, ok := offload.Finish(f, b[at:at:len(b)]); ok {
				at += len(head)
				rest = tail
			}
		}
		if i < p.first+p.n-1 || p.body == nil {
			at += copy(b[at:], rest)
		}
	}
}

// Append appends the whole message to b, for one who seals it.
func (p *Packer) Append(b []byte) []byte {
	at := len(b)
	b = append(b, make([]byte, p.front)...)
	p.Put(b[at:])
	return append(b, p.body...)
}

// Cutter cuts a message into fragments; see Packer. The message is front bytes that the caller writes, and body.
type Cutter struct {
	h     Header
	front int
	body  []byte
	step  int
	more  bool
}

// Begin begins with a message whose h.Total is front and body together, at most room times MaxFragments. Index and Last are the Cutter's to set. front is at most room, the bytes of a message that go in
// one datagram.
func (c *Cutter) Begin(h Header, front int, body []byte, room int) {
	h.Index, h.Last = 0, uint8((int(h.Total)-1)/room)
	*c = Cutter{h: h, front: front, body: body, step: room, more: true}
}

// More reports whether there are fragments left.
func (c *Cutter) More() bool { return c.more }

// First reports whether the next fragment is the first, whose head has the front of the message behind the header.
func (c *Cutter) First() bool { return c.h.Index == 0 }

// HeadLen is the length of the next fragment's head: its header, and for the first one the front of the message.
func (c *Cutter) HeadLen() int { return HeaderLen + c.front }

// Next writes the next fragment's header into head and returns its payload, which points into the body.
func (c *Cutter) Next(head []byte) (payload []byte) {
	c.h.Put(head)
	n := min(c.step-c.front, len(c.body))
	c.front = 0
	payload, c.body = c.body[:n], c.body[n:]
	if c.more = c.h.Index < c.h.Last; c.more {
		c.h.Index++
	}
	return payload
}
