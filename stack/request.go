package stack

import (
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// maxSYN bounds the SYN that is kept while it waits: headers with all options. Data in a SYN (TCP Fast Open) is cut off; its sender repeats it.
const maxSYN = wire.IPv6Len + 64 + 60

// pendingTable holds the SYNs that wait for an answer of Handlers.TCP.
type pendingTable struct {
	mu     sync.Mutex
	m      map[flowKey]*request
	bySrc  map[netip.Addr]int
	max    int
	maxSrc int
}

func (t *pendingTable) init(limit, perSource int) {
	t.m = make(map[flowKey]*request)
	t.bySrc = make(map[netip.Addr]int)
	t.max, t.maxSrc = limit, perSource
}

func (t *pendingTable) has(k *flowKey) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.m[*k] != nil
}

func (t *pendingTable) remove(r *request) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.m[r.key] != r {
		return
	}
	delete(t.m, r.key)
	if t.bySrc[r.src.Addr()]--; t.bySrc[r.src.Addr()] <= 0 {
		delete(t.bySrc, r.src.Addr())
	}
}

func (t *pendingTable) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.m)
	clear(t.bySrc)
}

// request is a SYN that waits for its answer; it implements TCPRequest.
type request struct {
	g        *Gateway
	key      flowKey
	src, dst netip.AddrPort
	syn      []byte // the IP packet
	ip       wire.IP
	answered atomic.Bool
}

// request offers a SYN to Handlers.TCP, unless it is a retransmission of one that still waits.
func (g *Gateway) request(p *Packet, key flowKey) {
	if g.cfg.Handlers.TCP == nil {
		g.reset(p)
		return
	}
	hdr := p.IP.HdrLen + tcpHeaderLen(p.L4())
	if hdr > maxSYN {
		g.drops.Add(frame.DropMalformed, 1)
		return
	}
	src := p.IP.Src
	t := &g.pending
	t.mu.Lock()
	if t.m[key] != nil || g.flows.get(&key) != nil { // the latter: answered since Transmit looked
		t.mu.Unlock()
		return
	}
	if g.mem.full() {
		t.mu.Unlock()
		g.drops.Add(frame.DropMemory, 1)
		return
	}
	if len(t.m) >= t.max || t.bySrc[src] >= t.maxSrc {
		t.mu.Unlock()
		g.drops.Add(frame.DropDialLimit, 1)
		return
	}
	r := &request{
		g: g, key: key, ip: p.IP,
		src: netip.AddrPortFrom(src, key.remotePort),
		dst: netip.AddrPortFrom(p.IP.Dst, key.localPort),
		syn: append([]byte(nil), p.Frame.Data[p.L3:p.L3+hdr]...),
	}
	r.ip.Len = hdr
	t.m[key] = r
	t.bySrc[src]++
	t.mu.Unlock()
	g.cfg.Handlers.TCP.HandleTCP(r)
}

func (r *request) Src() netip.AddrPort { return r.src }
func (r *request) Dst() netip.AddrPort { return r.dst }

// packet is the SYN as it came, with no Ethernet header.
func (r *request) packet() *Packet {
	return &Packet{Frame: frame.Frame{Data: r.syn}, IP: r.ip}
}

// answer is true for the first of the four answers.
func (r *request) answer() bool { return !r.answered.Swap(true) }

var errAnswered = errors.New("tcp request: answered twice; call one of Accept, Refuse, Unreachable and Ignore, once")

// Accept answers with a SYN-ACK. It does not wait for the container's ACK: what the user of the connection does first, a read or a write, waits
// for it, or gets the error that ended the handshake.
func (r *request) Accept() (Conn, error) {
	if !r.answer() {
		return nil, errAnswered
	}
	g := r.g
	if g.closed.Load() {
		return nil, r.fail(syscall.ENETDOWN)
	}
	pkt := inPacket(r.packet())
	defer pkt.DecRef()
	s, err := newIncomingSegment(r.key.id(), g.tcp.stack.Clock(), pkt)
	if err != nil {
		g.pending.remove(r)
		return nil, r.fail(syscall.EINVAL)
	}
	c := newConn(g, r.key, r.dst, r.src)
	c.passive = true
	h, terr := startHandshake(g.tcp.listen, s, parseSynSegmentOptions(s), &c.queue, c)
	segmentDecRef(s)
	if terr != nil {
		g.pending.remove(r)
		return nil, r.fail(errnoOf(terr))
	}
	c.setEndpoint(handshakeEndpoint(h))
	if !g.flows.put(c) {
		g.pending.remove(r)
		c.Reset()
		return nil, r.fail(syscall.EADDRINUSE)
	}
	g.pending.remove(r)
	if c.dead() { // while it was put
		g.flows.remove(c)
	}
	return c, nil
}

func (r *request) fail(err error) error {
	return opError("accept", r.dst, r.src, err)
}

func (r *request) Refuse() {
	if r.answer() {
		r.g.pending.remove(r)
		r.g.reset(r.packet())
	}
}

func (r *request) Unreachable(why Unreachable) {
	if r.answer() {
		r.g.pending.remove(r)
		if why == UnreachPort { // TCP's own word for it, which ends the container's connect at once
			r.g.reset(r.packet())
			return
		}
		r.g.sendError(&r.ip, r.syn, why, r.g.MTU())
	}
}

func (r *request) Ignore() {
	if r.answer() {
		r.g.pending.remove(r)
	}
}

// errnoOf is the errno of a netstack error.
func errnoOf(err tcpip.Error) error {
	switch err.(type) {
	case *tcpip.ErrConnectionReset, *tcpip.ErrAborted:
		return syscall.ECONNRESET
	case *tcpip.ErrConnectionRefused:
		return syscall.ECONNREFUSED
	case *tcpip.ErrConnectionAborted:
		return syscall.ECONNABORTED
	case *tcpip.ErrTimeout:
		return syscall.ETIMEDOUT
	case *tcpip.ErrHostUnreachable, *tcpip.ErrHostDown:
		return syscall.EHOSTUNREACH
	case *tcpip.ErrNetworkUnreachable, *tcpip.ErrNoNet:
		return syscall.ENETUNREACH
	case *tcpip.ErrClosedForSend:
		return syscall.EPIPE
	case *tcpip.ErrNotConnected, *tcpip.ErrInvalidEndpointState:
		return syscall.ENOTCONN
	case *tcpip.ErrPortInUse, *tcpip.ErrBadLocalAddress, *tcpip.ErrDuplicateAddress:
		return syscall.EADDRINUSE
	case *tcpip.ErrNoPortAvailable:
		return syscall.EADDRNOTAVAIL
	case *tcpip.ErrNoBufferSpace:
		return syscall.ENOBUFS
	case *tcpip.ErrMessageTooLong:
		return syscall.EMSGSIZE
	}
	return errors.New(err.String())
}
