package udp

import (
	"encoding/binary"
	"math/bits"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/mmsg"
)

// Sizes of a Batch. What is full is sent.
const (
	maxMessages  = 64       // of one sendmmsg
	maxDatagrams = 512      // of a Batch; also bounds Socket.maxSegments
	maxIovs      = 1000     // pieces of them; one message may have 1024 (UIO_MAXIOV)
	headRoom     = 64 << 10 // bytes of heads
)

// ECN is the two lowest bits of the outer header's traffic class (RFC 3168).
type ECN uint8

// Batch collects datagrams and sends them in as few system calls as it can. It belongs to one goroutine; see Socket.Batch.
type Batch struct {
	s     *Socket
	drops *frame.DropCounters

	heads    [headRoom]byte
	headUsed int
	iovs     [maxIovs]unix.Iovec
	nIovs    int
	dgs      [maxDatagrams]datagram
	nDgs     int
	info     [maxMessages]message
	msgs     [maxMessages]mmsg.Msg
	ctls     [maxMessages]mmsg.Control
	nMsgs    int
	ports    uint64 // which of the Socket's ports the messages use

	order  [maxMessages]uint8 // messages of one port
	sorted [maxMessages]mmsg.Msg
	one    [1]mmsg.Msg

	lost  []uint64 // by tag, a bit
	nLost int
}

// datagram is where one starts among the iovecs, and which frames are lost with it.
type datagram struct {
	iov         int32
	tag, frames int32
}

// message is one mmsg.Msg: datagrams of one size.
type message struct {
	path  *Path
	port  uint8
	ecn   ECN
	open  bool // takes more
	dg, n int  // first datagram, and how many
	iov   int  // first iovec
	seg   int  // bytes of each datagram but the last
	bytes int
}

func newBatch(s *Socket) *Batch { return &Batch{s: s} }

// Batch takes a Batch for a sequence of Head, Add and one Send. Datagrams that cannot be sent are counted in drops. ok is false when the
// Socket is closed. It must be released, by the goroutine that took it and without waiting for anything in between.
func (s *Socket) Batch(drops *frame.DropCounters) (b *Batch, ok bool) {
	if s.gate.Add(1) < 0 {
		s.gate.Add(-1)
		return nil, false
	}
	b = s.pool.Get().(*Batch)
	b.drops = drops
	return b, true
}

// Release gives the Batch back. What was added and not sent is forgotten.
func (b *Batch) Release() {
	s := b.s
	b.reset()
	b.clearLost()
	s.pool.Put(b)
	s.gate.Add(-1)
}

// Head returns n bytes, at most 64 KiB, for the headers of the next datagram. They hold what an earlier use left and are valid until Send. Whatever
// has no room beside it is sent first. n may be 0.
func (b *Batch) Head(n int) []byte {
	if b.headUsed+n > headRoom || b.nIovs+2 > maxIovs || b.nDgs == maxDatagrams || b.nMsgs == maxMessages {
		b.Flush()
	}
	return b.heads[b.headUsed : b.headUsed+n : b.headUsed+n]
}

// Add queues one datagram to path: head, which the last Head returned, and payload. Either may be empty, but not both. flow chooses the port to send from, so
// that one flow keeps to one; tag names the caller's frame, counted from 0 and never falling between two Sends: a frame of which any datagram could
// not be sent is one drop. Datagrams with the same path, flow, ecn and length, added one after the other, travel as one message; one that is
// shorter may be the last of them.
func (b *Batch) Add(path *Path, flow uint32, ecn ECN, tag int, head, payload []byte) {
	b.AddShared(path, flow, ecn, tag, 1, head, payload)
}

// AddShared is Add for a datagram that is a part of several frames: those with the tags tag to tag+frames-1.
func (b *Batch) AddShared(path *Path, flow uint32, ecn ECN, tag, frames int, head, payload []byte) {
	n := len(head) + len(payload)
	port := uint8(0)
	if len(b.s.ports) > 1 && !path.cfg.OnePort {
		port = uint8(flow % uint32(len(b.s.ports)))
	}
	m := b.last()
	if m == nil || !m.open || n > m.seg || m.path != path || m.port != port || m.ecn != ecn || m.bytes+n > MaxTrain || m.n >= b.s.maxSegments {
		m = b.begin(path, port, ecn, n)
	}
	if n < m.seg {
		m.open = false
	}
	b.dgs[b.nDgs] = datagram{iov: int32(b.nIovs), tag: int32(tag), frames: int32(frames)}
	b.nDgs++
	if len(head) > 0 {
		b.iovs[b.nIovs] = mmsg.Iovec(head)
		b.nIovs++
		b.headUsed += len(head)
	}
	if len(payload) > 0 {
		b.iovs[b.nIovs] = mmsg.Iovec(payload)
		b.nIovs++
	}
	m.n++
	m.bytes += n
}

func (b *Batch) last() *message {
	if b.nMsgs == 0 {
		return nil
	}
	return &b.info[b.nMsgs-1]
}

func (b *Batch) begin(path *Path, port uint8, ecn ECN, seg int) *message {
	m := &b.info[b.nMsgs]
	b.nMsgs++
	*m = message{path: path, port: port, ecn: ecn, dg: b.nDgs, iov: b.nIovs, seg: seg, open: path.cuts()}
	b.ports |= 1 << port
	return m
}

// Send sends what was added and returns how many frames, by their tags, lost a datagram since the last Send; each is one drop. It never waits.
func (b *Batch) Send() (lost int) {
	b.Flush()
	lost = b.nLost
	b.clearLost()
	return lost
}

func (b *Batch) clearLost() {
	if b.nLost > 0 {
		clear(b.lost)
		b.nLost = 0
	}
}

func (b *Batch) reset() {
	b.headUsed, b.nIovs, b.nDgs, b.nMsgs, b.ports = 0, 0, 0, 0, 0
}

// Flush sends what was added, so that nothing of it is referred to any more. What is lost thereby is Send's to report.
func (b *Batch) Flush() {
	if b.nMsgs == 0 {
		return
	}
	for i := range b.nMsgs {
		b.finish(i)
	}
	for i := range b.nMsgs {
		b.order[i] = uint8(i)
	}
	if b.ports&(b.ports-1) == 0 {
		b.transmit(b.s.ports[b.info[0].port], b.msgs[:b.nMsgs], b.order[:b.nMsgs])
	} else {
		for ports := b.ports; ports != 0; ports &= ports - 1 {
			b.transmitPort(uint8(bits.TrailingZeros64(ports)))
		}
	}
	b.reset()
}

func (b *Batch) transmitPort(port uint8) {
	n := 0
	for i := range b.nMsgs {
		if b.info[i].port == port {
			b.sorted[n], b.order[n] = b.msgs[i], uint8(i)
			n++
		}
	}
	b.transmit(b.s.ports[port], b.sorted[:n], b.order[:n])
}

// finish makes message i what the kernel takes.
func (b *Batch) finish(i int) {
	m, h := &b.info[i], &b.msgs[i].Hdr
	h.Name, h.Namelen = &m.path.name[0], m.path.nameLen
	h.Iov = &b.iovs[m.iov]
	h.SetIovlen(b.iovEnd(m.dg+m.n-1) - m.iov)
	c := &b.ctls[i]
	c.Reset()
	if m.n > 1 {
		binary.NativeEndian.PutUint16(c.Add(unix.SOL_UDP, unix.UDP_SEGMENT, 2), uint16(m.seg))
	}
	addECN(c, m)
	c.Attach(h)
}

func addECN(c *mmsg.Control, m *message) {
	switch {
	case m.ecn == 0:
	case m.path.remote.Addr().Is4():
		binary.NativeEndian.PutUint32(c.Add(unix.IPPROTO_IP, unix.IP_TOS, 4), uint32(m.ecn))
	default:
		binary.NativeEndian.PutUint32(c.Add(unix.IPPROTO_IPV6, unix.IPV6_TCLASS, 4), uint32(m.ecn))
	}
}

// iovEnd is the iovec behind those of datagram d.
func (b *Batch) iovEnd(d int) int {
	if d+1 < b.nDgs {
		return int(b.dgs[d+1].iov)
	}
	return b.nIovs
}

// Lose counts the frames with the tags tag to tag+frames-1 as lost, those that are not already: a datagram of theirs cannot be sent.
func (b *Batch) Lose(tag, frames int, why frame.Drop) {
	for end := tag + frames; tag < end; tag++ {
		word, bit := int(tag)/64, uint64(1)<<(tag%64)
		for word >= len(b.lost) {
			b.lost = append(b.lost, 0)
		}
		if b.lost[word]&bit == 0 {
			b.lost[word] |= bit
			b.nLost++
			b.drops.Add(why, 1)
		}
	}
}
