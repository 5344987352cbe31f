package stack

import (
	"slices"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// Later has something done a short while from now.
type Later interface {
	// Due is called once for each time that it was taken, on a goroutine that holds no lock.
	Due()
}

// DelayACKs has acknowledgements of less than one segment wait for the answer that is likely to follow, as a kernel's do (RFC 9293 §3.8.6.3): an answer then is one frame to the
// container, and not two. later has h.Due called a few milliseconds from now, at least 2 and at most 20; it is false, and h.Due is not called, where nobody could.
// Without DelayACKs every acknowledgement goes out at once. Call it before Connect.
func (g *Gateway) DelayACKs(later func(h Later) bool) { g.later = later }

// quickACKs is how many acknowledgements go out at once after one has waited in vain: whoever waits for them, with Nagle's algorithm, is not kept waiting each time.
const quickACKs = 16

// heldACK keeps back the bare acknowledgement that processing segments ends with until the data has been passed on, and, where DelayACKs says how, for a while longer. If the
// answer is quick, it carries the acknowledgement and the held one is not sent at all.
type heldACK struct {
	mu     sync.Mutex
	opened int // goroutines in process
	have   bool
	frame  frame.Frame
	ack    uint32 // of frame
	gap    bool   // frame tells of one, by SACK blocks
	buf    [wire.EthernetLen + wire.IPv6Len + 60]byte

	acked uint32 // the newest that was sent, alone or with data
	// What waits longer. Each wait has a number; one that Due finds under way and knows from the time before has lasted long enough.
	waits   bool // frame does
	second  bool // frame has taken the place of one that did: every second one goes out at once (RFC 9293 §3.8.6.3), or small segments that keep coming would never be acknowledged
	number  uint32
	queued  bool   // Due will be called
	queuedN uint32 // number as of then
	quick   int    // acknowledgements still to be sent at once
}

func (a *heldACK) open() {
	a.mu.Lock()
	a.opened++
	a.mu.Unlock()
}

// hold is called for each packet that the connection sends, in order, with its endpoint locked. It is true when f need not be sent now.
func (a *heldACK) hold(g *Gateway, t *tx, f *frame.Frame, p *gstack.PacketBuffer) bool {
	h := header.TCP(p.TransportHeader().Slice())
	bare := p.Data().Size() == 0 && len(f.Data) <= len(a.buf) && h.Flags() == header.TCPFlagAck
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.have && bare && (!a.waits || int32(h.AckNumber()-a.ack) <= 0) {
		// Two in a row: duplicates are a signal, so none is swallowed.
		a.have, a.waits = false, false
		a.acked = h.AckNumber()
		old := frame.Frame{Hdr: a.frame.Hdr, Data: slices.Clone(a.frame.Data)}
		if g.address(&old) {
			t.add(old)
		} else {
			g.hold(&old)
		}
		return false
	}
	second := a.have && a.waits
	a.have, a.waits, a.second = false, false, false // what f carries is newer
	if !bare || a.opened == 0 {
		a.acked = h.AckNumber()
		return false
	}
	a.frame = frame.Frame{Hdr: f.Hdr, Data: a.buf[:copy(a.buf[:], f.Data)]}
	a.have, a.ack, a.second = true, h.AckNumber(), second
	a.gap = !bareACK(h)
	return true
}

// flushACK is called when a goroutine leaves process. The last one sends what is held, unless it may wait.
func (c *conn) flushACK() {
	a := &c.ack
	a.mu.Lock()
	a.opened--
	if !a.have || a.waits || a.opened > 0 {
		a.mu.Unlock()
		return
	}
	if c.mayWait() {
		a.waits = true
		a.number++
		if a.queued || c.g.later(c) {
			if !a.queued {
				a.queued, a.queuedN = true, a.number
			}
			a.mu.Unlock()
			return
		}
		a.waits = false
	}
	c.sendACK()
}

// mayWait reports whether the held acknowledgement is of less than a segment, and an answer to be expected. What tells of loss never waits. c.ack.mu is held.
func (c *conn) mayWait() bool {
	a := &c.ack
	if c.g.later == nil || a.second || a.gap {
		return false
	}
	if a.quick > 0 {
		a.quick--
		return false
	}
	if n := int32(a.ack - a.acked); n <= 0 || int(n) >= min(c.g.MTU(), 1500)-wire.IPv6Len-60 {
		return false
	}
	st := c.ep.EndpointState()
	return st == tcp.StateEstablished || st == tcp.StateCloseWait
}

// Due implements Later: an acknowledgement that waits may have waited long enough.
func (c *conn) Due() {
	a := &c.ack
	a.mu.Lock()
	a.queued = false
	if a.waits && c.dead() { // a reset of the container's
		a.have, a.waits = false, false
	}
	if !a.waits {
		a.mu.Unlock()
		return
	}
	if a.number != a.queuedN && c.g.later(c) {
		a.queued, a.queuedN = true, a.number
		a.mu.Unlock()
		return
	}
	a.quick = quickACKs
	c.sendACK()
}

// sendACK sends what is held and unlocks c.ack.mu.
func (c *conn) sendACK() {
	a := &c.ack
	g := c.g
	a.have, a.waits = false, false
	a.acked = a.ack
	t := g.tx.get()
	if t == nil {
		a.mu.Unlock()
		return
	}
	f := frame.Frame{Hdr: a.frame.Hdr, Data: t.room(len(a.frame.Data))}
	copy(f.Data, a.frame.Data)
	a.mu.Unlock()
	if g.address(&f) {
		t.add(f)
		t.flush()
	} else {
		g.hold(&f)
	}
	g.tx.put(t)
}
