package stack

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// pump moves what arrives on a connection to the writer of Pump or WriteTo. Whoever holds mu does the moving, usually the goroutine that read
// the segments off the network.
//
// Nothing is lost between goroutines because of two orders: ready is set before mu is tried, and looked at again after mu was let go.
type pump struct {
	on     atomic.Bool // Pump or WriteTo is under way
	kicked atomic.Bool // a goroutine is on its way to push

	mu    sync.Mutex
	w     interface{ TryWrite([]byte) (int, error) }
	end   func(error) // of Pump; nil for WriteTo, which is woken instead
	moved int64
	done  bool  // nothing more will come
	err   error // why, nil for a FIN
	full  bool  // the last TryWrite did not take everything
}

var errFull = errors.New("the writer takes no more just now")

// Write implements io.Writer for Endpoint.Read, which calls it with the endpoint locked.
func (p *pump) Write(b []byte) (int, error) {
	n, err := p.w.TryWrite(b)
	p.moved += int64(n)
	switch {
	case err != nil:
		p.err, p.done = err, true
		return n, err
	case n < len(b):
		p.full = true
		return n, errFull
	}
	return n, nil
}

// push gives everything that has arrived to TryWrite. c.pump.mu is held.
func (c *conn) push() {
	p := &c.pump
	for !p.done && !p.full {
		c.ready.Store(false)
		before := p.moved
		c.busy.Add(1) // without leave: whoever called looks at the backlog
		_, err := c.ep.Read(p, tcpip.ReadOptions{})
		if n := int(p.moved - before); n > 0 && c.g.mem.mayGrow() {
			c.ep.ModerateRecvBuf(n)
		}
		c.busy.Add(-1)
		if p.done || p.full {
			return
		}
		switch err.(type) {
		case nil:
			continue // a FIN may be behind what was read, and was announced together with it
		case *tcpip.ErrWouldBlock, *tcpip.ErrBadBuffer:
			return
		case *tcpip.ErrNotConnected:
			if c.connecting() {
				return
			}
			if !c.dead() {
				continue
			}
		}
		p.done = true
		if e := c.errFor("read", err); !errors.Is(e, io.EOF) {
			p.err = e
		}
	}
}

// deliver is called when something may have arrived, with no lock held. It pushes, unless somebody is at it already, who will look again.
func (c *conn) deliver() {
	p := &c.pump
	for p.on.Load() && c.ready.Load() {
		if !p.mu.TryLock() {
			return
		}
		if !p.on.Load() {
			p.mu.Unlock()
			return
		}
		c.push()
		full, done, end, err := p.full, p.done, p.end, p.err
		if done && end != nil {
			p.on.Store(false)
		}
		p.mu.Unlock()
		switch {
		case end == nil && (done || full):
			wake(c.rd)
			return
		case done:
			if !c.closed.Load() {
				end(err)
			}
			return
		case full:
			return
		}
	}
}

// kick has another goroutine deliver, where the caller must not: the endpoint is locked.
func (c *conn) kick() {
	if c.pump.kicked.CompareAndSwap(false, true) {
		go func() {
			c.pump.kicked.Store(false)
			c.deliver()
			c.count()
			c.drain()
		}()
	}
}

// afterSegments follows netstack's processing of segments, on the goroutine that processed them.
func (c *conn) afterSegments() {
	c.deliver()
	c.inline.Add(-1)
	c.settle()
	if c.ready.Load() {
		c.announce()
	}
}

// announce tells whoever waits for it that there is something to read.
func (c *conn) announce() {
	if c.pump.on.Load() {
		c.deliver()
	} else {
		wake(c.rd)
	}
}

// Pump gives what arrives to w on the goroutine that brings it; see AsyncConn.
func (c *conn) Pump(w interface{ TryWrite([]byte) (int, error) }, end func(error)) {
	c.start(w, end)
	c.deliver()
	c.count()
	c.drain()
}

// Resume says that the writer of Pump takes bytes again; see AsyncConn.
func (c *conn) Resume() {
	p := &c.pump
	p.mu.Lock()
	p.full = false
	c.ready.Store(true)
	p.mu.Unlock()
	c.deliver()
	c.count()
	c.drain()
}

func (c *conn) start(w interface{ TryWrite([]byte) (int, error) }, end func(error)) {
	p := &c.pump
	p.mu.Lock()
	defer p.mu.Unlock()
	p.w, p.end, p.moved, p.done, p.err, p.full = w, end, 0, false, nil, false
	c.ready.Store(true)
	p.on.Store(true)
}

// pumpBuffers are what WriteTo and ReadFrom copy through where they have to.
var pumpBuffers = sync.Pool{New: func() any { return new([SuperPayload]byte) }}

// WriteTo writes what arrives to w until the container's FIN or an error.
func (c *conn) WriteTo(w io.Writer) (int64, error) {
	if t, ok := w.(TryWriter); ok {
		return c.pushTo(t)
	}
	return copyThrough(w, c)
}

// pushTo is WriteTo for a writer that can be given bytes from elsewhere. This goroutine sleeps until there is an end, or the writer is full.
func (c *conn) pushTo(w TryWriter) (int64, error) {
	p := &c.pump
	c.start(w, nil)
	defer p.on.Store(false)
	for {
		c.deliver()
		c.count()
		c.drain()
		p.mu.Lock()
		for p.full && !p.done {
			c.pushSlow(w)
		}
		moved, done, err := p.moved, p.done, p.err
		p.mu.Unlock()
		if done {
			return moved, err
		}
		if c.ready.Load() {
			continue
		}
		if err := c.wait("read", c.rd, &c.rdLine); err != nil {
			return moved, err
		}
		if c.closed.Load() {
			return moved, opError("read", c.local, c.remote, net.ErrClosed)
		}
	}
}

// pushSlow waits for w with one buffer of what has arrived. c.pump.mu is held all the time, so that nobody overtakes.
func (c *conn) pushSlow(w io.Writer) {
	p := &c.pump
	buf := pumpBuffers.Get().(*[SuperPayload]byte)
	defer pumpBuffers.Put(buf)
	n, err := c.Read(buf[:])
	p.full = false
	c.ready.Store(true)
	if n > 0 {
		m, werr := w.Write(buf[:n])
		p.moved += int64(m)
		if werr != nil {
			p.done, p.err = true, werr
			return
		}
	}
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		p.done = true
		if !errors.Is(err, io.EOF) {
			p.err = err
		}
	}
}

// TryWrite queues as much of b as there is room for; see AsyncConn.
func (c *conn) TryWrite(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		if c.closed.Load() {
			return done, opError("write", c.local, c.remote, net.ErrClosed)
		}
		n, err := c.writeSome(b[done:])
		done += n
		switch err.(type) {
		case nil:
			if n == 0 {
				return done, nil
			}
		case *tcpip.ErrWouldBlock:
			return done, nil
		default:
			return done, c.errFor("write", err)
		}
	}
	return done, nil
}

// ReadFrom sends what r yields until its end or an error.
func (c *conn) ReadFrom(r io.Reader) (int64, error) {
	return copyThrough(c, r)
}

// copyThrough moves what src yields to dst until src's end (nil) or an error. A reader or writer that could do more than Read and Write is not
// asked to, or it would ask the Conn back.
func copyThrough(dst io.Writer, src io.Reader) (int64, error) {
	buf := pumpBuffers.Get().(*[SuperPayload]byte)
	defer pumpBuffers.Put(buf)
	var total int64
	for {
		n, err := src.Read(buf[:])
		if n > 0 {
			m, werr := dst.Write(buf[:n])
			total += int64(m)
			if werr != nil {
				return total, werr
			}
		}
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}
