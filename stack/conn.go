package stack

import (
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// conn is a TCP connection, a thin layer over netstack's endpoint; it implements Conn.
//
// Netstack says what happened by calling NotifyEvent, often with the endpoint's lock held. Readers and writers that wait are woken through the
// channels rd and wr, each of which holds at most one wake-up.
type conn struct {
	g             *Gateway
	key           flowKey
	id            gstack.TransportEndpointID
	ep            *tcp.Endpoint
	queue         waiter.Queue
	entry         waiter.Entry
	local, remote netip.AddrPort

	rd, wr         chan struct{}
	room           atomic.Pointer[func()] // of NotifyRoom
	rdLine, wrLine deadline
	inline         atomic.Int32 // goroutines in process; they look at ready when they are done
	up             atomic.Bool  // ep is set
	ready          atomic.Bool  // there is something to read
	closed         atomic.Bool
	passive        bool        // the container opened it
	closeLater     atomic.Bool // Close was called while it shook hands
	reset          atomic.Bool
	dial           atomic.Pointer[dialing]
	fate           atomic.Pointer[error] // what ended the connection; netstack tells that only once

	// Segments that came while somebody had the endpoint's lock. Users of the endpoint count themselves in busy and look at the backlog
	// when they are done; so a segment needs no goroutine of netstack's to be woken for it.
	busy      atomic.Int32
	waiting   atomic.Int32 // length of backlog
	backlogMu sync.Mutex
	backlog   []*gstack.PacketBuffer

	src  sliceSource // what Write writes; here, so that it need not be allocated
	ack  heldACK
	mem  holdings
	pump pump
}

var _ AsyncConn = (*conn)(nil)

func newConn(g *Gateway, key flowKey, local, remote netip.AddrPort) *conn {
	c := &conn{g: g, key: key, id: key.id(), local: local, remote: remote, rd: make(chan struct{}, 1), wr: make(chan struct{}, 1)}
	c.entry.Init(c, waiter.ReadableEvents|waiter.WritableEvents|waiter.EventHUp|waiter.EventErr)
	c.queue.EventRegister(&c.entry)
	return c
}

// setEndpoint is called once the endpoint exists.
func (c *conn) setEndpoint(ep *tcp.Endpoint) {
	c.ep = ep
	c.up.Store(true)
	t := &c.g.cfg.TCP
	if t.KeepAliveIdle > 0 {
		idle := tcpip.KeepaliveIdleOption(t.KeepAliveIdle)
		every := tcpip.KeepaliveIntervalOption(t.KeepAliveInterval)
		c.ep.SetSockOpt(&idle)
		c.ep.SetSockOpt(&every)
		c.ep.SetSockOptInt(tcpip.KeepaliveCountOption, t.KeepAliveCount)
		c.ep.SocketOptions().SetKeepAlive(true)
	}
	if room := c.g.mem.room(); 2*room < min(initialBuffer, t.ReceiveBufferMax) { // half of a buffer is window
		c.ep.SocketOptions().SetReceiveBufferSize(int64(2*room), false)
	}
}

// dead reports whether the endpoint has left the stack.
func (c *conn) dead() bool {
	st := c.ep.EndpointState()
	return st == tcp.StateClose || st == tcp.StateError
}

// endTimeWait ends TIME-WAIT, and is true when it did; see netstack.init.
func (c *conn) endTimeWait() bool {
	if c.ep.EndpointState() != tcp.StateTimeWait || !c.ep.TryLock() {
		return false
	}
	if c.ep.EndpointState() == tcp.StateTimeWait {
		transitionToStateCloseLocked(c.ep)
	}
	c.ep.ResumeWork()
	return c.dead()
}

// enter is called before an operation of the endpoint, leave after it.
func (c *conn) enter() { c.busy.Add(1) }

func (c *conn) leave() {
	c.count()
	c.busy.Add(-1)
	if c.waiting.Load() > 0 {
		c.drain()
	}
}

// NotifyEvent implements waiter.EventListener. It may be called with the endpoint locked, so it only leaves word.
func (c *conn) NotifyEvent(mask waiter.EventMask) {
	if mask&(waiter.ReadableEvents|waiter.EventHUp|waiter.EventErr) != 0 {
		c.ready.Store(true)
		if c.inline.Load() == 0 {
			if c.pump.on.Load() {
				c.kick()
			} else {
				wake(c.rd)
			}
		}
	}
	if mask&(waiter.WritableEvents|waiter.EventHUp|waiter.EventErr) != 0 {
		c.hasRoom()
		if c.dial.Load() != nil && c.inline.Load() == 0 {
			go c.settle() // one of netstack's timers has the endpoint
		}
	}
	if c.closeLater.Load() && c.up.Load() && !c.connecting() {
		go c.closeNow()
	}
	if mask&waiter.EventHUp != 0 && c.up.Load() && c.dead() {
		c.g.flows.remove(c)
		c.count()
	}
}

// hasRoom tells who waits that the connection takes bytes again, or never will.
func (c *conn) hasRoom() {
	wake(c.wr)
	if f := c.room.Load(); f != nil {
		(*f)()
	}
}

// NotifyRoom sets what is called when TryWrite may take bytes again; see AsyncConn.
func (c *conn) NotifyRoom(f func()) bool { c.room.Store(&f); return true }

func wake(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

func (c *conn) LocalAddr() net.Addr  { return net.TCPAddrFromAddrPort(c.local) }
func (c *conn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.remote) }

// errFor turns netstack's answer to an operation into an error, and keeps what ended the connection for those who ask later.
func (c *conn) errFor(op string, err tcpip.Error) error {
	if c.closed.Load() {
		return opError(op, c.local, c.remote, net.ErrClosed)
	}
	switch err.(type) {
	case *tcpip.ErrClosedForReceive, *tcpip.ErrClosedForSend, *tcpip.ErrNotConnected, *tcpip.ErrInvalidEndpointState:
		if c.fate.Load() == nil && c.dead() {
			if last := c.ep.LastError(); last != nil {
				e := errnoOf(last)
				c.fate.CompareAndSwap(nil, &e)
			}
		}
	default:
		e := errnoOf(err)
		c.fate.CompareAndSwap(nil, &e)
	}
	if f := c.fate.Load(); f != nil {
		return opError(op, c.local, c.remote, *f)
	}
	if _, ok := err.(*tcpip.ErrClosedForReceive); ok {
		return io.EOF
	}
	return opError(op, c.local, c.remote, errnoOf(err))
}

func opError(op string, local, remote netip.AddrPort, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Source: net.TCPAddrFromAddrPort(local), Addr: net.TCPAddrFromAddrPort(remote), Err: err}
}

// wait blocks until ch is signalled or the deadline d passes.
func (c *conn) wait(op string, ch chan struct{}, d *deadline) error {
	select {
	case <-ch:
		return nil
	default:
	}
	select {
	case <-ch:
		return nil
	case <-d.passed():
		return opError(op, c.local, c.remote, os.ErrDeadlineExceeded)
	}
}

// Read reads what has arrived, waiting for at least one byte.
func (c *conn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		if c.closed.Load() {
			return 0, opError("read", c.local, c.remote, net.ErrClosed)
		}
		if c.rdLine.over() {
			return 0, opError("read", c.local, c.remote, os.ErrDeadlineExceeded)
		}
		c.ready.Store(false)
		w := tcpip.SliceWriter(p)
		c.enter()
		res, err := c.ep.Read(&w, tcpip.ReadOptions{})
		if err == nil && c.g.mem.mayGrow() {
			c.ep.ModerateRecvBuf(res.Count)
		}
		c.leave()
		switch err.(type) {
		case nil:
			c.ready.Store(true) // there may be more
			return res.Count, nil
		case *tcpip.ErrWouldBlock:
		case *tcpip.ErrNotConnected: // still shaking hands, or just not any more
			if c.dead() {
				return 0, c.errFor("read", err)
			}
			if !c.connecting() {
				continue
			}
		default:
			return 0, c.errFor("read", err)
		}
		if err := c.wait("read", c.rd, &c.rdLine); err != nil {
			return 0, err
		}
	}
}

// connecting reports whether the handshake is under way.
func (c *conn) connecting() bool {
	switch c.ep.EndpointState() {
	case tcp.StateConnecting, tcp.StateSynSent, tcp.StateSynRecv, tcp.StateInitial, tcp.StateBound:
		return true
	}
	return false
}

// sliceSource is a tcpip.Payloader over bytes.
type sliceSource []byte

func (s *sliceSource) Len() int { return len(*s) }

func (s *sliceSource) Read(p []byte) (int, error) {
	if len(*s) == 0 {
		return 0, io.EOF
	}
	n := copy(p, *s)
	*s = (*s)[n:]
	return n, nil
}

// SuperPayload is how many bytes netstack sends as one superframe at MTU 1500, and a multiple of the segment size. Whoever copies a stream to a Conn does best
// to write this much, or a multiple, at a time: 64 KiB would make a superframe and a crumb, which costs as much as a superframe.
const SuperPayload = 45 * 1448

// writeSome queues what there is room for, at most one superframe.
func (c *conn) writeSome(p []byte) (int, tcpip.Error) {
	p = p[:min(len(p), SuperPayload, c.mayWrite())]
	if len(p) == 0 {
		return 0, &tcpip.ErrWouldBlock{}
	}
	c.src = p
	c.enter()
	n, err := c.ep.Write(&c.src, tcpip.WriteOptions{})
	c.leave()
	c.src = nil
	return int(n), err
}

// Write queues all of p, waiting for room.
func (c *conn) Write(p []byte) (int, error) {
	done := 0
	for {
		if c.closed.Load() {
			return done, opError("write", c.local, c.remote, net.ErrClosed)
		}
		if done == len(p) {
			return done, nil
		}
		if c.wrLine.over() {
			return done, opError("write", c.local, c.remote, os.ErrDeadlineExceeded)
		}
		n, err := c.writeSome(p[done:])
		done += n
		switch err.(type) {
		case nil:
			if n > 0 {
				continue
			}
		case *tcpip.ErrWouldBlock:
		default:
			return done, c.errFor("write", err)
		}
		if err := c.wait("write", c.wr, &c.wrLine); err != nil {
			return done, err
		}
	}
}

// CloseWrite sends a FIN behind what was written.
func (c *conn) CloseWrite() error {
	for {
		if c.closed.Load() {
			return opError("close", c.local, c.remote, net.ErrClosed)
		}
		if !c.connecting() {
			break
		}
		// A FIN cannot precede the handshake; netstack would end the connection with an error.
		if err := c.wait("close", c.wr, &c.wrLine); err != nil {
			return err
		}
	}
	wake(c.wr)
	c.enter()
	err := c.ep.Shutdown(tcpip.ShutdownWrite)
	c.leave()
	switch err.(type) {
	case nil, *tcpip.ErrNotConnected:
		return nil
	default:
		return c.errFor("close", err)
	}
}

// Close ends both directions. What was written is still delivered; data that arrived and was not read makes it a reset, as it does on Linux.
func (c *conn) Close() error {
	if c.closed.Swap(true) {
		return nil
	}
	c.closeLater.Store(true)
	if !c.passive || !c.connecting() {
		c.closeNow()
	}
	c.ended()
	return nil
}

// closeNow does what Close put off. Netstack would abort a handshake, but a container that got our SYN-ACK is owed its FIN.
func (c *conn) closeNow() {
	if c.closeLater.CompareAndSwap(true, false) {
		c.enter()
		c.ep.Close()
		c.leave()
	}
}

// Reset ends the connection with RST at once.
func (c *conn) Reset() {
	if c.reset.Swap(true) {
		return
	}
	c.closed.Store(true)
	c.enter()
	if c.ep.EndpointState() == tcp.StateSynRecv {
		// Abort is silent then, but the container has our SYN-ACK and believes in the connection.
		c.ep.SocketOptions().SetLinger(tcpip.LingerOption{Enabled: true})
		c.ep.Close()
	} else {
		c.ep.Abort()
	}
	c.leave()
	c.ended()
}

// ended wakes all who wait and, when the endpoint is gone already, forgets the connection.
func (c *conn) ended() {
	wake(c.rd)
	wake(c.wr)
	if c.dead() {
		c.g.flows.remove(c)
	}
}

// SetDeadline sets both deadlines.
func (c *conn) SetDeadline(t time.Time) error {
	c.rdLine.set(t)
	c.wrLine.set(t)
	return nil
}

// SetReadDeadline bounds Read and WriteTo.
func (c *conn) SetReadDeadline(t time.Time) error { c.rdLine.set(t); return nil }

// SetWriteDeadline bounds Write, ReadFrom and CloseWrite.
func (c *conn) SetWriteDeadline(t time.Time) error { c.wrLine.set(t); return nil }

// KUID and KGID implement tcpip.PacketOwner: netstack notes in each packet of a connection whose it is.
func (c *conn) KUID() uint32 { return 0 }

// KGID is there for the same reason.
func (c *conn) KGID() uint32 { return 0 }

// deadline is a moment that ends waiting, as in net.Pipe. The zero deadline never comes.
type deadline struct {
	mu    sync.Mutex
	timer *time.Timer
	ch    chan struct{}
	past  atomic.Bool
}

func (d *deadline) over() bool { return d.past.Load() }

// passed is closed when the deadline has come.
func (d *deadline) passed() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ch == nil {
		d.ch = make(chan struct{})
	}
	return d.ch
}

func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	if d.past.Load() {
		d.past.Store(false)
		d.ch = nil
	}
	if t.IsZero() {
		return
	}
	if d.ch == nil {
		d.ch = make(chan struct{})
	}
	ch := d.ch
	wait := time.Until(t)
	if wait <= 0 {
		d.past.Store(true)
		close(ch)
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(wait, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.timer == timer {
			d.timer = nil
			d.past.Store(true)
			close(ch)
		}
	})
	d.timer = timer
}
