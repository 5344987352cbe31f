package stack

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// TCP flags.
const (
	tcpFIN = 1 << iota
	tcpSYN
	tcpRST
	tcpPSH
	tcpACK
)

// timeWait bounds TIME-WAIT where processOnce does not end it, because somebody else had the endpoint.
const timeWait = time.Second

// flowShards spreads the table of connections over as many locks.
const flowShards = 64

// flowTable finds the connection of a segment.
type flowTable struct {
	shards [flowShards]struct {
		mu sync.RWMutex
		m  map[flowKey]*conn
		_  [24]byte // keeps neighbouring locks off one cache line
	}
}

func (t *flowTable) init() {
	for i := range t.shards {
		t.shards[i].m = make(map[flowKey]*conn)
	}
}

// shard picks by the container's port, which varies most.
func shard(k *flowKey) int { return int(k.remotePort^k.remotePort>>6^k.localPort) % flowShards }

func (t *flowTable) get(k *flowKey) *conn {
	s := &t.shards[shard(k)]
	s.mu.RLock()
	c := s.m[*k]
	s.mu.RUnlock()
	return c
}

// put is false when the key is taken by another connection that is alive.
func (t *flowTable) put(c *conn) bool {
	s := &t.shards[shard(&c.key)]
	s.mu.Lock()
	defer s.mu.Unlock()
	if o := s.m[c.key]; o != nil && !o.dead() {
		return false
	}
	s.m[c.key] = c
	return true
}

func (t *flowTable) remove(c *conn) {
	s := &t.shards[shard(&c.key)]
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.m[c.key] == c {
		delete(s.m, c.key)
	}
}

func (t *flowTable) all() (cs []*conn) {
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.RLock()
		for _, c := range s.m {
			cs = append(cs, c)
		}
		s.mu.RUnlock()
	}
	return cs
}

// sortTCP hands a segment to its connection, makes a request of a SYN, and refuses what belongs to neither.
func (g *Gateway) sortTCP(b *batch, p *Packet) {
	l4 := p.L4()
	if len(l4) < wire.TCPLen {
		g.drops.Add(frame.DropMalformed, 1)
		return
	}
	if off := tcpHeaderLen(l4); off < wire.TCPLen || off > len(l4) {
		g.drops.Add(frame.DropMalformed, 1)
		return
	}
	if p.Frame.Hdr.Flags&(wire.VirtioNeedsCsum|wire.VirtioDataValid) == 0 && !p.Frame.Superframe() &&
		wire.Fold(wire.Sum(l4, wire.PseudoSum(p.IP.Src, p.IP.Dst, wire.ProtoTCP, len(l4)))) != 0xffff {
		g.drops.Add(frame.DropChecksum, 1)
		return
	}
	srcPort, dstPort := tcpPorts(l4)
	key := flowKey{local: p.IP.Dst.As16(), remote: p.IP.Src.As16(), localPort: dstPort, remotePort: srcPort, v6: p.IP.Version == 6}
	syn := l4[13]&(tcpSYN|tcpACK|tcpRST) == tcpSYN

	c := g.flows.get(&key)
	if c != nil && (c.dead() || syn && c.endTimeWait()) {
		g.flows.remove(c)
		c = nil
	}
	if b.flow != c {
		g.flushFlow(b)
	}
	switch {
	case c != nil:
		if bareACK(l4) {
			if b.acked && !supersedes(l4, b.ack.L4()) {
				g.enqueue(c, &b.ack)
			}
			b.flow, b.ack, b.acked = c, *p, true
			return
		}
		if b.acked {
			g.enqueue(c, &b.ack)
			b.acked = false
		}
		if n := len(l4) - tcpHeaderLen(l4); n > 0 && !c.mayReceive(n, binary.BigEndian.Uint32(l4[4:])) {
			g.drops.Add(frame.DropMemory, 1)
		} else if g.enqueue(c, p) {
			b.flow = c
		}
	case syn:
		g.request(p, key)
	default:
		// A request whose SYN-ACK is out but whose connection is not in the table yet: netstack knows it already.
		if ep, ok := g.tcp.stack.FindTransportEndpoint(netProto(p.IP.Src), tcp.ProtocolNumber, key.id(), nicID).(*tcp.Endpoint); ok && ep != nil {
			pkt := inPacket(p)
			g.tcp.proto.QueuePacket(ep, key.id(), pkt)
			pkt.DecRef()
			return
		}
		if l4[13]&tcpRST == 0 && !g.pending.has(&key) {
			if !g.errs.take(p.IP.Src) {
				g.drops.Add(frame.DropServiceLimit, 1)
				return
			}
			g.reset(p)
		}
	}
}

// flushFlow has netstack process the segments of one connection that were gathered.
func (g *Gateway) flushFlow(b *batch) {
	c := b.flow
	if c == nil {
		return
	}
	b.flow = nil
	if b.acked {
		b.acked = false
		g.enqueue(c, &b.ack)
		b.ack = Packet{}
	}
	c.process()
}

// bareACK reports whether a segment is an acknowledgement and nothing else: no data, no flag but ACK, no option but a timestamp as every kernel writes it.
func bareACK(l4 []byte) bool {
	const timestamps = 0x0101080a // NOP, NOP, kind 8, 10 bytes
	if l4[13] != tcpACK {
		return false
	}
	switch off := tcpHeaderLen(l4); off {
	case wire.TCPLen:
		return len(l4) == off
	case wire.TCPLen + 12:
		return len(l4) == off && binary.BigEndian.Uint32(l4[wire.TCPLen:]) == timestamps
	}
	return false
}

// supersedes reports whether a bare acknowledgement makes an earlier one needless: it acknowledges more. One that does not is a duplicate, which means loss, or news of the window.
func supersedes(l4, earlier []byte) bool {
	return binary.BigEndian.Uint32(l4[4:]) == binary.BigEndian.Uint32(earlier[4:]) && int32(binary.BigEndian.Uint32(l4[8:])-binary.BigEndian.Uint32(earlier[8:])) > 0
}

// tcpHeaderLen is what the TCP header l4 begins with says of its own length, in bytes.
func tcpHeaderLen(l4 []byte) int { return int(l4[12]>>4) * 4 }

// inPacket copies the IP packet of p into a buffer of netstack's, sized to it.
func inPacket(p *Packet) *gstack.PacketBuffer {
	v := buffer.NewView(p.IP.Len)
	_, _ = v.Write(p.Frame.Data[p.L3 : p.L3+p.IP.Len]) // the view was made for as much
	pkt := gstack.NewPacketBuffer(gstack.PacketBufferOptions{Payload: buffer.MakeWithView(v)})
	pkt.NetworkProtocolNumber = netProto(p.IP.Src)
	pkt.NetworkHeader().Consume(p.IP.HdrLen)
	pkt.TransportProtocolNumber = tcp.ProtocolNumber
	pkt.TransportHeader().Consume(tcpHeaderLen(p.L4()))
	pkt.NICID = nicID
	pkt.RXChecksumValidated = true
	return pkt
}

// enqueue gives a segment to c's endpoint. It is true when process must be called after; false when somebody else has the endpoint and will
// look at the backlog.
func (g *Gateway) enqueue(c *conn, p *Packet) bool {
	pkt := inPacket(p)
	if c.waiting.Load() == 0 && c.ep.TryLock() {
		c.queueLocked(pkt)
		c.ep.ResumeWork()
		return true
	}
	c.backlogMu.Lock()
	full := len(c.backlog) >= maxBacklog
	if !full {
		c.backlog = append(c.backlog, pkt)
		c.waiting.Add(1)
		c.mem.backlog.Add(int64(pkt.Data().Size()))
	}
	c.backlogMu.Unlock()
	if full {
		pkt.DecRef()
		g.drops.Add(frame.DropTxBusy, 1)
	}
	c.drain()
	return false
}

// maxBacklog bounds the segments that wait while somebody has the endpoint, which is for microseconds.
const maxBacklog = 256

// queueLocked moves pkt into the endpoint's queue of segments and gives it back. The endpoint is locked.
func (c *conn) queueLocked(pkt *gstack.PacketBuffer) {
	s, err := newIncomingSegment(c.id, c.g.tcp.stack.Clock(), pkt)
	pkt.DecRef()
	if err != nil {
		c.g.drops.Add(frame.DropMalformed, 1)
		return
	}
	if !enqueueSegment(c.ep, s) {
		c.g.drops.Add(frame.DropTxBusy, 1) // more than the receive buffer, which the peer was told not to send
	}
	segmentDecRef(s)
}

// drain processes the backlog, unless a user of the endpoint is busy, who will then do it.
func (c *conn) drain() {
	for c.waiting.Load() > 0 {
		if c.ep.TryLock() {
			c.backlogMu.Lock()
			for i, pkt := range c.backlog {
				c.queueLocked(pkt)
				c.backlog[i] = nil
			}
			c.backlog = c.backlog[:0]
			c.waiting.Store(0)
			c.mem.backlog.Store(0)
			c.backlogMu.Unlock()
			c.ep.ResumeWork()
			c.processOnce()
			continue
		}
		if c.busy.Load() > 0 {
			return
		}
		// One of netstack's timers has the endpoint. It looks at the endpoint's own queue when it is done.
		c.backlogMu.Lock()
		for i, pkt := range c.backlog {
			c.g.tcp.proto.QueuePacket(c.ep, c.id, pkt)
			pkt.DecRef()
			c.backlog[i] = nil
		}
		c.backlog = c.backlog[:0]
		c.waiting.Store(0)
		c.mem.backlog.Store(0)
		c.backlogMu.Unlock()
	}
}

// process runs netstack over the segments queued for c, on this goroutine, and then what the connection's user wants done with the result. A
// bare acknowledgement goes out last: the data it acknowledges is what somebody waits for.
func (c *conn) process() {
	c.processOnce()
	c.drain()
}

func (c *conn) processOnce() {
	c.busy.Add(1)
	c.inline.Add(1)
	c.ack.open()
	run(c.ep)
	c.afterSegments()
	if c.endTimeWait() { // here and not by a timer, which costs each connection a wake-up of another thread
		c.g.flows.remove(c)
	}
	c.flushACK()
	c.count()
	c.busy.Add(-1)
}

// run does what netstack's processor goroutine does with an endpoint that has segments.
func run(ep *tcp.Endpoint) {
	for range 4 { // handshake, data, TIME-WAIT, closed: each step may leave segments for the next
		st := ep.EndpointState()
		switch st {
		case tcp.StateConnecting, tcp.StateSynSent, tcp.StateSynRecv:
			handleConnecting(ep)
		case tcp.StateTimeWait:
			handleTimeWait(ep)
		case tcp.StateClose, tcp.StateError:
			drainClosingSegmentQueue(ep)
		case tcp.StateEstablished, tcp.StateFinWait1, tcp.StateFinWait2, tcp.StateCloseWait, tcp.StateLastAck, tcp.StateClosing:
			handleConnected(ep)
		}
		if ep.EndpointState() == st {
			return
		}
	}
}

// reset refuses a segment that belongs to no connection (RFC 9293 §3.10.7.1). Refused SYNs are not bounded by Config.ICMPErrorRate: each was asked
// for by name, and one that is not answered stalls its sender for a second.
func (g *Gateway) reset(p *Packet) {
	l4 := p.L4()
	seq, ack := binary.BigEndian.Uint32(l4[4:]), binary.BigEndian.Uint32(l4[8:])
	flags := l4[13]
	n := uint32(len(l4) - tcpHeaderLen(l4))
	if flags&tcpSYN != 0 {
		n++
	}
	if flags&tcpFIN != 0 {
		n++
	}
	if flags&tcpACK != 0 {
		g.sendRST(p.IP.Dst, p.IP.Src, l4, ack, 0, tcpRST)
	} else {
		g.sendRST(p.IP.Dst, p.IP.Src, l4, 0, seq+n, tcpRST|tcpACK)
	}
}

// sendRST answers the TCP header in l4.
func (g *Gateway) sendRST(src, dst netip.Addr, l4 []byte, seq, ack uint32, flags byte) {
	hdr := wire.IPv4Len
	if src.Is6() {
		hdr = wire.IPv6Len
	}
	r := make([]byte, wire.EthernetLen+hdr+wire.TCPLen)
	t := r[wire.EthernetLen+hdr:]
	copy(t[0:2], l4[2:4])
	copy(t[2:4], l4[0:2])
	binary.BigEndian.PutUint32(t[4:], seq)
	binary.BigEndian.PutUint32(t[8:], ack)
	t[12], t[13] = wire.TCPLen/4<<4, flags
	if src.Is6() {
		wire.PutIPv6(r[wire.EthernetLen:], src, dst, wire.ProtoTCP, 0, 64, wire.TCPLen)
	} else {
		wire.PutIPv4(r[wire.EthernetLen:], src, dst, wire.ProtoTCP, 0, 64, hdr+wire.TCPLen, 0, true)
	}
	binary.BigEndian.PutUint16(t[16:], ^wire.Fold(wire.Sum(t, wire.PseudoSum(src, dst, wire.ProtoTCP, wire.TCPLen))))
	g.sendOne(r)
}
