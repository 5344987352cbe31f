package nat

import (
	"encoding/binary"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/mmsg"
	"patchbay/stack"
)

// Bounds of one send.
const (
	maxPayload  = 65507 // bytes of UDP payload in one IPv4 packet, and in one UDP_SEGMENT send
	maxSegments = 64    // segments of one UDP_SEGMENT send (UDP_MAX_SEGMENTS of older kernels)
	sendMsgs    = 64    // messages of one sendmmsg
	sendIovs    = 512   // pieces of them
	sendRetries = 3     // of a message whose error may be that of an earlier one
)

// sendItem is one packet on its way out: a datagram, or with seg > 0 a superframe of datagrams of seg bytes.
type sendItem struct {
	sock *packetSock
	dst  netip.AddrPort // on the host's side
	from netip.Addr     // address of the host to leave from, or the zero Addr
	data []byte
	seg  int
	tos  uint8
	ttl  uint8 // 0 for the host's default
	df   bool  // the container does path MTU discovery
	pkt  *stack.Packet
	next int // next item of the same socket, or -1
}

// goesWith reports whether o may be sent in one call with it.
func (it *sendItem) goesWith(o *sendItem) bool {
	return it.dst == o.dst && it.from == o.from && it.tos == o.tos && it.ttl == o.ttl && it.df == o.df
}

// datagrams is how many datagrams the item stands for.
func (it *sendItem) datagrams() int {
	if it.seg == 0 {
		return 1
	}
	return (len(it.data) + it.seg - 1) / it.seg
}

// sendGroup lists the items of one socket.
type sendGroup struct {
	sock       *packetSock
	head, tail int
}

// lane is the place in a group where the next item to one destination goes: behind the last, whatever other destinations came between. So
// a server that answers many clients in turns still sends each its datagrams in one call. Order is kept towards each destination.
type lane struct {
	dst   netip.AddrPort
	group int
	last  int
}

// laneLook is how many lanes are looked through, newest first, before an item starts one of its own: it bounds the work for a packet.
const laneLook = 16

// sendBatch is the scratch of one HandlePackets call. Items are collected, grouped by socket, and flushed.
type sendBatch struct {
	u      *udpNAT
	items  []sendItem
	groups []sendGroup
	lanes  []lane

	msgs  [sendMsgs]mmsghdr
	names [sendMsgs]mmsg.Sockaddr
	ctls  [sendMsgs]control
	iovs  [sendIovs]unix.Iovec
	// first and firstOff say where in the items message i starts; entry nmsgs is where the next build goes on.
	first    [sendMsgs + 1]int
	firstOff [sendMsgs + 1]int
	segs     [sendMsgs]int // segment size of message i, or 0 for a single datagram
	nmsgs    int
}

// sendPool keeps sendBatches between calls. It is a plain stack: there are as many as goroutines that read TAPs at once.
type sendPool struct {
	mu   sync.Mutex
	free []*sendBatch
}

func (p *sendPool) get(u *udpNAT) *sendBatch {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.free); n > 0 {
		b := p.free[n-1]
		p.free = p.free[:n-1]
		return b
	}
	return &sendBatch{u: u}
}

func (p *sendPool) put(b *sendBatch) {
	p.mu.Lock()
	p.free = append(p.free, b)
	p.mu.Unlock()
}

// add queues it behind the other items to its destination, or else of its socket.
func (b *sendBatch) add(it sendItem) {
	i := len(b.items)
	it.next = -1
	for l := len(b.lanes) - 1; l >= max(0, len(b.lanes)-laneLook); l-- {
		ln := &b.lanes[l]
		g := &b.groups[ln.group]
		if g.sock != it.sock || ln.dst != it.dst {
			continue
		}
		it.next = b.items[ln.last].next
		b.items[ln.last].next = i
		if g.tail == ln.last {
			g.tail = i
		}
		ln.last = i
		b.items = append(b.items, it)
		return
	}
	g := len(b.groups) - 1
	for g >= 0 && b.groups[g].sock != it.sock {
		g--
	}
	if g < 0 {
		g = len(b.groups)
		b.groups = append(b.groups, sendGroup{sock: it.sock, head: i, tail: i})
	} else {
		b.items[b.groups[g].tail].next = i
		b.groups[g].tail = i
	}
	b.items = append(b.items, it)
	b.lanes = append(b.lanes, lane{dst: it.dst, group: g, last: i})
}

// flush sends everything.
func (b *sendBatch) flush() {
	for i := range b.groups {
		b.send(&b.groups[i])
	}
	clear(b.items)
	clear(b.groups)
	b.items, b.groups, b.lanes = b.items[:0], b.groups[:0], b.lanes[:0]
}

func (b *sendBatch) send(g *sendGroup) {
	s := g.sock
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, off := g.head, 0; i >= 0; {
		if s.closed {
			b.dropFrom(i)
			return
		}
		s.setDF(b.dfOf(&b.items[i]))
		i, off = b.build(s, i, off)
		b.transmit(s)
	}
}

// dfOf is what the socket should do with an item too long for its path.
func (b *sendBatch) dfOf(it *sendItem) dfMode {
	if it.df && !it.sock.ping {
		return dfSet
	}
	return dfKernel
}

// build makes messages of the items from item i, byte off, on, as many as fit one call and agree on fragmentation. It returns where
// the next call goes on.
func (b *sendBatch) build(s *packetSock, i, off int) (int, int) {
	b.nmsgs = 0
	iov := 0
	df := b.dfOf(&b.items[i])
	for i >= 0 && b.nmsgs < sendMsgs && iov < sendIovs && b.dfOf(&b.items[i]) == df {
		it := &b.items[i]
		m := b.nmsgs
		b.first[m], b.firstOff[m] = i, off
		seg := it.seg
		if seg == 0 {
			seg = len(it.data)
		}
		cut := seg > 0 && seg <= s.gsoMax && (it.seg > 0 || seg <= b.u.gsoFits(s))
		limit := seg
		if cut {
			limit = min(maxSegments, max(1, maxPayload/seg)) * seg
		}
		start, total := iov, 0
		for {
			cur := &b.items[i]
			n := min(len(cur.data)-off, limit-total)
			b.iovs[iov].SetLen(n)
			b.iovs[iov].Base = nil
			if n > 0 {
				b.iovs[iov].Base = &cur.data[off]
			}
			iov++
			total += n
			off += n
			if off < len(cur.data) {
				break // the rest is the next message's
			}
			i, off = cur.next, 0
			if i < 0 || !cut || total >= limit || total%seg != 0 || iov == sendIovs {
				break
			}
			// The next item joins when it is cut alike: of the same size, or shorter and then the last.
			if nx := &b.items[i]; len(nx.data) == 0 || !it.goesWith(nx) || nx.seg != seg && (nx.seg != 0 || len(nx.data) > seg) {
				break
			}
		}
		b.segs[m] = 0
		if total > seg {
			b.segs[m] = seg
		}
		b.header(s, m, it, b.iovs[start:iov])
		b.nmsgs++
	}
	b.first[b.nmsgs], b.firstOff[b.nmsgs] = i, off
	return i, off
}

// header fills message m.
func (b *sendBatch) header(s *packetSock, m int, it *sendItem, iovs []unix.Iovec) {
	h := &b.msgs[m].hdr
	h.Name = &b.names[m][0]
	h.Namelen = b.names[m].Put(it.dst, s.v6, 0)
	h.Iov = &iovs[0]
	h.SetIovlen(len(iovs))
	c := &b.ctls[m]
	c.n = 0
	if b.segs[m] > 0 {
		d := c.add(unix.SOL_UDP, unix.UDP_SEGMENT, 2)
		binary.NativeEndian.PutUint16(d, uint16(b.segs[m]))
	}
	v4 := it.dst.Addr().Is4()
	if it.tos != 0 {
		if v4 {
			c.addInt(unix.IPPROTO_IP, unix.IP_TOS, int(it.tos))
		} else {
			c.addInt(unix.IPPROTO_IPV6, unix.IPV6_TCLASS, int(it.tos))
		}
	}
	if it.ttl != 0 {
		if v4 {
			c.addInt(unix.IPPROTO_IP, unix.IP_TTL, int(it.ttl))
		} else {
			c.addInt(unix.IPPROTO_IPV6, unix.IPV6_HOPLIMIT, int(it.ttl))
		}
	}
	if it.from.IsValid() {
		c.addSource(it.from, s.v6)
	}
	h.Control = nil
	if c.n > 0 {
		h.Control = &c.bytes()[0]
	}
	h.SetControllen(c.n)
}

// transmit sends the built messages. s.mu is held.
func (b *sendBatch) transmit(s *packetSock) {
	for m, tries := 0, 0; m < b.nmsgs; {
		n, errno := sendmmsg(s.fd, b.msgs[m:b.nmsgs])
		if errno == 0 {
			m += n
			tries = 0
			continue
		}
		switch errno {
		case unix.EINTR:
			continue
		case unix.EAGAIN, unix.ENOBUFS:
			// The host's own queue is full: what a kernel would drop at its queue too. Waiting here would hold up every other flow of the TAP.
			for ; m < b.nmsgs; m++ {
				b.dropMsg(m)
			}
			return
		case unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EPROTO, unix.EOPNOTSUPP, unix.EACCES, unix.ENOPROTOOPT, unix.EHOSTDOWN:
			// Very likely the news of an earlier packet, which the loop takes from the error queue; this one has not been sent yet.
			if tries++; tries <= sendRetries {
				continue
			}
		case unix.EMSGSIZE, unix.EINVAL, unix.EIO:
			if b.segs[m] > 0 {
				s.gsoMax = min(s.gsoMax, b.segs[m]-1)
				if errno == unix.EIO {
					s.gsoMax = 0 // the host's interface cannot complete the checksums
				}
				b.oneByOne(s, m)
				m++
				tries = 0
				continue
			}
		}
		b.refused(s, m, errno)
		m++
		tries = 0
	}
}

// oneByOne sends each datagram of message m, which the host would not cut, by itself. It is rare, and done without regard to speed.
func (b *sendBatch) oneByOne(s *packetSock, m int) {
	seg := b.segs[m]
	var one [1]mmsghdr
	var ctl control
	one[0] = b.msgs[m]
	// The same control messages without UDP_SEGMENT, which was added first.
	skip := unix.CmsgSpace(2)
	ctl.n = copy(ctl.bytes(), b.ctls[m].bytes()[skip:b.ctls[m].n])
	one[0].hdr.Control = nil
	if ctl.n > 0 {
		one[0].hdr.Control = &ctl.bytes()[0]
	}
	one[0].hdr.SetControllen(ctl.n)
	var iov unix.Iovec
	one[0].hdr.Iov = &iov
	one[0].hdr.SetIovlen(1)
	i, off := b.first[m], b.firstOff[m]
	for i != b.first[m+1] || off != b.firstOff[m+1] {
		it := &b.items[i]
		n := min(seg, len(it.data)-off)
		iov.Base = &it.data[off]
		iov.SetLen(n)
		for try := 0; ; try++ {
			_, errno := sendmmsg(s.fd, one[:])
			if errno == 0 {
				break
			}
			if try < sendRetries && errno != unix.EAGAIN && errno != unix.ENOBUFS && errno != unix.EMSGSIZE {
				continue
			}
			b.refuse(s, it, 1, errno)
			break
		}
		if off += n; off >= len(it.data) {
			i, off = it.next, 0
		}
	}
}

// refused tells the container that the host did not take message m.
func (b *sendBatch) refused(s *packetSock, m int, errno unix.Errno) {
	it := &b.items[b.first[m]]
	b.refuse(s, it, b.msgDatagrams(m), errno)
}

func (b *sendBatch) refuse(s *packetSock, it *sendItem, n int, errno unix.Errno) {
	b.u.drops.Add(frame.DropHostSend, n)
	why, mtu := stack.UnreachNet, 0
	switch errno {
	case unix.EAGAIN, unix.ENOBUFS:
		return
	case unix.EMSGSIZE:
		b.u.drainErrors(s)
		why, mtu = stack.UnreachTooBig, int(s.mtu.Load())
		if mtu == 0 {
			mtu = 1280
		}
	case unix.EHOSTUNREACH, unix.EHOSTDOWN:
		why = stack.UnreachHost
	case unix.EACCES, unix.EPERM:
		why = stack.UnreachProhibited
	case unix.ECONNREFUSED:
		return // the error queue says it better
	}
	b.u.net.SendUnreachable(it.pkt, why, mtu)
}

// msgDatagrams is how many datagrams message m carries.
func (b *sendBatch) msgDatagrams(m int) int {
	if b.segs[m] == 0 {
		return 1
	}
	n := 0
	for i, off := b.first[m], b.firstOff[m]; i != b.first[m+1] || off != b.firstOff[m+1]; {
		it := &b.items[i]
		end := len(it.data)
		if i == b.first[m+1] {
			end = b.firstOff[m+1]
		}
		n += (end - off + b.segs[m] - 1) / b.segs[m]
		if i == b.first[m+1] {
			break
		}
		i, off = it.next, 0
	}
	return n
}

func (b *sendBatch) dropMsg(m int) { b.u.drops.Add(frame.DropHostSend, b.msgDatagrams(m)) }

// dropFrom counts item i and what follows it as lost because its socket was closed meanwhile.
func (b *sendBatch) dropFrom(i int) {
	for ; i >= 0; i = b.items[i].next {
		b.u.drops.Add(frame.DropNoFlow, b.items[i].datagrams())
	}
}
