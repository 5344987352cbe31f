package offload

import (
	"bytes"
	"encoding/binary"

	"patchbay/frame"
	"patchbay/internal/wire"
)

const (
	// openRuns is how many flows are followed at a time. A batch is at most some dozens of frames; the oldest run is
	// closed when one more flow appears.
	openRuns = 8
	// maxTCPRun bounds the pieces of a superframe well below IOV_MAX (1024).
	maxTCPRun = 256
	// maxUDPRun is UDP_MAX_SEGMENTS of kernels before 6.10, which also bounds what a receiver takes.
	maxUDPRun = 64
	// maxIP is the longest IP packet a superframe may be.
	maxIP = 65535
	// maxRunHead is the longest head of a merged frame: Ethernet, one VLAN tag, IPv6, TCP with all its options.
	maxRunHead = wire.EthernetLen + wire.VLANTagLen + wire.IPv6Len + 60
)

// Coalescer merges segments of one batch into superframes. What it puts together, Segmenter takes apart into the very same frames, but for Ethernet
// padding and for the identification of IPv4 packets that may not be fragmented, where it has no meaning (RFC 6864) and where senders
// that leave it constant are merged too.
//
// Frames of one flow keep their order; frames of different flows may change places. The zero Coalescer is ready.
type Coalescer struct {
	fs    []frame.Frame
	items []item
	runs  []run
	heads [][maxRunHead]byte
	open  [openRuns]int // indices of runs that may still grow, most recently begun last
	nOpen int
}

// item is what is known of one frame of the batch.
type item struct {
	pay, end uint32 // payload within the frame
	next     int32  // next frame of the same run, or -1
}

// run is one frame of the result: a single frame as it came, or several to be joined.
type run struct {
	first, last int32 // frames of the batch
	n           int32 // frames
	head        int32 // index in heads when n > 1
	key         uint64
	seg         segment // the first frame
	size        int     // payload bytes of each frame but the last
	total       int     // bytes of IP packet when joined
	nextSeq     uint32
	idStep      uint16
	flags       uint8 // of TCP, joined
	checked     bool  // the first frame's checksums are known to be right
	full        bool  // nothing may follow
}

// segment is the parsed form of a frame that may take part in a run.
type segment struct {
	l3, l4, pay, end int
	v4, tcp          bool
	flags            uint8
	seq              uint32
	id               uint16
}

// Coalesce takes a lent batch and returns how many frames it becomes for a port with the given capabilities: Gather describes each of them. Superframes
// and frames that fit no run stay as they are, in whatever form they came.
func (c *Coalescer) Coalesce(fs []frame.Frame, caps frame.Caps) int {
	c.fs, c.runs, c.items, c.nOpen = fs, c.runs[:0], c.items[:0], 0
	mergeable := caps&frame.CapCsum != 0 && caps&(frame.CapTSO4|frame.CapTSO6|frame.CapUSO) != 0 && len(fs) > 1
	merged := 0
	for i := range fs {
		c.items = append(c.items, item{next: -1})
		var s segment
		var key uint64
		known := false
		if mergeable {
			s, key, known = parse(&fs[i])
		}
		if !known {
			// Whatever it is may belong to any flow and must not be overtaken.
			c.nOpen = 0
			c.begin(i, run{full: true})
			continue
		}
		c.items[i].pay, c.items[i].end = uint32(s.pay), uint32(s.end)
		slot := c.find(key)
		if slot >= 0 {
			r := &c.runs[c.open[slot]]
			if c.extend(r, i, &s) {
				if r.n == 2 {
					r.head = int32(merged)
					merged++
				}
				if r.full {
					c.close(slot)
				}
				continue
			}
			c.close(slot)
		}
		c.begin(i, run{
			key: key, seg: s, size: s.end - s.pay, total: s.end - s.l3, nextSeq: s.seq + uint32(s.end-s.pay),
			flags: s.flags, full: !startable(&s, caps),
		})
	}
	if cap(c.heads) < merged {
		c.heads = make([][maxRunHead]byte, max(merged, len(fs)/2))
	}
	c.heads = c.heads[:cap(c.heads)]
	for i := range c.runs {
		if c.runs[i].n > 1 {
			c.build(&c.runs[i])
		}
	}
	return len(c.runs)
}

// Gather appends the pieces of frame i of the result to vec and returns its header: what a writev behind the header would send. The pieces
// are one head in c's memory and payloads in the lent frames, or the one lent frame as it came.
func (c *Coalescer) Gather(i int, vec [][]byte) (wire.VirtioNetHdr, [][]byte) {
	r := &c.runs[i]
	if r.n == 1 {
		f := &c.fs[r.first]
		return f.Hdr, append(vec, f.Data)
	}
	s := &r.seg
	hdr := wire.VirtioNetHdr{
		Flags: wire.VirtioNeedsCsum, GSOType: wire.GSOUDPL4, GSOSize: uint16(r.size), HdrLen: uint16(s.pay),
		CsumStart: uint16(s.l4), CsumOffset: wire.UDPChecksumOff,
	}
	if s.tcp {
		hdr.CsumOffset = wire.TCPChecksumOff
		hdr.GSOType = wire.GSOTCPv6
		if s.v4 {
			hdr.GSOType = wire.GSOTCPv4
		}
		if s.flags&wire.TCPCwr != 0 {
			hdr.GSOType |= wire.GSOECN
		}
	}
	vec = append(vec, c.heads[r.head][:s.pay])
	for j := r.first; j >= 0; j = c.items[j].next {
		vec = append(vec, c.fs[j].Data[c.items[j].pay:c.items[j].end])
	}
	return hdr, vec
}

// Run says which frames of the batch became frame i of the result: the index of the first, and how many.
func (c *Coalescer) Run(i int) (first, n int) { return int(c.runs[i].first), int(c.runs[i].n) }

func (c *Coalescer) begin(i int, r run) {
	r.first, r.last, r.n, r.head = int32(i), int32(i), 1, -1
	if !r.full {
		if c.nOpen == openRuns {
			c.close(0)
		}
		c.open[c.nOpen] = len(c.runs)
		c.nOpen++
	}
	c.runs = append(c.runs, r)
}

func (c *Coalescer) find(key uint64) int {
	for i := range c.nOpen {
		if c.runs[c.open[i]].key == key {
			return i
		}
	}
	return -1
}

func (c *Coalescer) close(slot int) {
	copy(c.open[slot:c.nOpen], c.open[slot+1:c.nOpen])
	c.nOpen--
}

// parse finds the headers of a finished or partially checksummed TCP or UDP frame. key is the same for all frames of a flow. known is false for a
// frame whose flow cannot be told.
func parse(f *frame.Frame) (s segment, key uint64, known bool) {
	d := f.Data
	if f.Superframe() {
		return s, 0, false
	}
	etherType, l3, ok := wire.Payload(d)
	if !ok {
		return s, 0, false
	}
	s.l3 = l3
	ip := d[l3:]
	var proto uint8
	switch etherType {
	case wire.EtherTypeIPv4:
		// No options and no fragments: more-fragments and offset are zero. The reserved bit must be too.
		if len(ip) < wire.IPv4Len || ip[0] != 0x45 || binary.BigEndian.Uint16(ip[6:])&0xbfff != 0 {
			return s, 0, false
		}
		proto, s.v4, s.l4 = ip[9], true, l3+wire.IPv4Len
		s.end = l3 + int(binary.BigEndian.Uint16(ip[2:]))
		s.id = binary.BigEndian.Uint16(ip[4:])
		key = binary.BigEndian.Uint64(ip[12:])
	case wire.EtherTypeIPv6:
		if len(ip) < wire.IPv6Len || ip[0]>>4 != 6 {
			return s, 0, false
		}
		proto, s.l4 = ip[6], l3+wire.IPv6Len
		s.end = s.l4 + int(binary.BigEndian.Uint16(ip[4:]))
		key = binary.BigEndian.Uint64(ip[8:])*3 + binary.BigEndian.Uint64(ip[16:])*5 +
			binary.BigEndian.Uint64(ip[24:])*7 + binary.BigEndian.Uint64(ip[32:])*11
	default:
		return s, 0, false
	}
	if s.end > len(d) || s.l4 > s.end {
		return s, 0, false
	}
	l4 := d[s.l4:s.end]
	switch proto {
	case wire.ProtoTCP:
		t, ok := wire.ParseTCP(l4)
		if !ok {
			return s, 0, false
		}
		s.tcp, s.seq, s.flags, s.pay = true, t.Seq, t.Flags, s.l4+t.HdrLen
	case wire.ProtoUDP:
		u, ok := wire.ParseUDP(l4)
		if !ok || u.Len != len(l4) {
			return s, 0, false
		}
		s.pay = s.l4 + wire.UDPLen
	default:
		return s, 0, false
	}
	// A collision of two flows costs a merge, never correctness: extend compares the headers.
	key = (key^uint64(binary.BigEndian.Uint32(l4))<<16)*0x9e3779b97f4a7c15 + uint64(proto)
	return s, key, true
}

// startable reports whether a run may begin with s.
func startable(s *segment, caps frame.Caps) bool {
	if s.pay == s.end {
		return false
	}
	if !s.tcp {
		return caps&frame.CapUSO != 0
	}
	want := frame.CapTSO6
	if s.v4 {
		want = frame.CapTSO4
	}
	if s.flags&wire.TCPCwr != 0 {
		want |= frame.CapECN
	}
	// The first frame's flags but CWR are those of all; FIN and PSH may stand on the last alone.
	return caps&want == want && s.flags&^(wire.TCPCwr|wire.TCPEce) == wire.TCPAck && s.end-s.pay >= wire.MinTCPSegment
}

// extend appends frame i to run r if Segmenter would give both back.
func (c *Coalescer) extend(r *run, i int, s *segment) bool {
	n := s.end - s.pay
	a, b := c.fs[r.first].Data, c.fs[i].Data
	f := &r.seg
	if n == 0 || n > r.size || r.total+n > maxIP || f.l3 != s.l3 || f.l4 != s.l4 || f.pay != s.pay || f.v4 != s.v4 || f.tcp != s.tcp {
		return false
	}
	limit := int32(maxUDPRun)
	if s.tcp {
		limit = maxTCPRun
		if s.seq != r.nextSeq || s.flags&^(wire.TCPFin|wire.TCPPsh) != r.flags&^wire.TCPCwr {
			return false
		}
	}
	if r.n >= limit {
		return false
	}
	// Ethernet and IP headers, but for length, identification and checksum.
	l3, l4 := s.l3, s.l4
	idStep := r.idStep
	if s.v4 {
		if !bytes.Equal(a[:l3+2], b[:l3+2]) || !bytes.Equal(a[l3+6:l3+10], b[l3+6:l3+10]) || !bytes.Equal(a[l3+12:l4], b[l3+12:l4]) {
			return false
		}
		if r.n == 1 {
			idStep = s.id - f.id
			if idStep != 1 && (idStep != 0 || a[l3+6]&0x40 == 0) {
				return false
			}
		}
		if s.id != f.id+idStep*uint16(r.n) {
			return false
		}
	} else if !bytes.Equal(a[:l3+4], b[:l3+4]) || !bytes.Equal(a[l3+6:l4], b[l3+6:l4]) {
		return false
	}
	// Transport header, but for sequence number, flags, checksum and UDP length.
	if s.tcp {
		if !bytes.Equal(a[l4:l4+4], b[l4:l4+4]) || !bytes.Equal(a[l4+8:l4+13], b[l4+8:l4+13]) ||
			!bytes.Equal(a[l4+14:l4+16], b[l4+14:l4+16]) || !bytes.Equal(a[l4+18:s.pay], b[l4+18:s.pay]) {
			return false
		}
	} else if !bytes.Equal(a[l4:l4+4], b[l4:l4+4]) {
		return false
	}
	if !r.checked {
		if !intact(&c.fs[r.first], f) {
			r.full = true
			return false
		}
		r.checked = true
	}
	if !intact(&c.fs[i], s) {
		return false
	}
	c.items[r.last].next = int32(i)
	r.last = int32(i)
	r.n++
	r.idStep = idStep
	r.total += n
	r.nextSeq += uint32(n)
	r.flags |= s.flags & (wire.TCPFin | wire.TCPPsh)
	r.full = n < r.size || s.flags&(wire.TCPFin|wire.TCPPsh) != 0 && s.tcp
	return true
}

// intact verifies the checksums that a merge would replace.
func intact(f *frame.Frame, s *segment) bool {
	d := f.Data
	if s.v4 && wire.Fold(wire.Sum(d[s.l3:s.l4], 0)) != 0xffff {
		return false
	}
	if f.Hdr.Flags&wire.VirtioNeedsCsum != 0 {
		field := wire.UDPChecksumOff
		if s.tcp {
			field = wire.TCPChecksumOff
		}
		// A partial checksum is taken on trust, as the receiver would have; but one that belongs to a packet in a
		// tunnel cannot be carried by a superframe.
		return f.Hdr.UnfinishedL4(s.l4) && int(f.Hdr.CsumOffset) == field
	}
	if !s.tcp && d[s.l4+6] == 0 && d[s.l4+7] == 0 {
		return false // no checksum; Segmenter would make one
	}
	if f.Hdr.Flags&wire.VirtioDataValid != 0 {
		return true
	}
	return wire.Fold(wire.Sum(d[s.l4:s.end], pseudo(d, s, s.end-s.l4))) == 0xffff
}

// pseudo is the sum of the pseudo-header for n bytes of upper layer, from the headers in d.
func pseudo(d []byte, s *segment, n int) uint64 {
	acc := uint64(n) + uint64(wire.ProtoUDP)
	if s.tcp {
		acc = uint64(n) + uint64(wire.ProtoTCP)
	}
	if s.v4 {
		return wire.Sum(d[s.l3+12:s.l3+20], acc)
	}
	return wire.Sum(d[s.l3+8:s.l3+40], acc)
}

// build writes the head of a joined run.
func (c *Coalescer) build(r *run) {
	s := &r.seg
	h := c.heads[r.head][:s.pay]
	copy(h, c.fs[r.first].Data)
	n := r.total - (s.l4 - s.l3)
	ip, l4 := h[s.l3:], h[s.l4:]
	if s.v4 {
		binary.BigEndian.PutUint16(ip[2:], uint16(r.total))
		ip[10], ip[11] = 0, 0
		binary.BigEndian.PutUint16(ip[10:], ^wire.Fold(wire.Sum(ip[:wire.IPv4Len], 0)))
	} else {
		binary.BigEndian.PutUint16(ip[4:], uint16(n))
	}
	sum := wire.Fold(pseudo(h, s, n))
	if s.tcp {
		l4[13] = r.flags
		binary.BigEndian.PutUint16(l4[wire.TCPChecksumOff:], sum)
		return
	}
	binary.BigEndian.PutUint16(l4[4:], uint16(n))
	binary.BigEndian.PutUint16(l4[wire.UDPChecksumOff:], sum)
}
