package stack

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// pump moves what arrives on a connection to the writer of WriteTo. Whoever holds mu does the moving: the goroutine that read the segments off
// the network, as long as the writer takes everything at once, else the goroutine that is in WriteTo.
type pump struct {
	mu    sync.Mutex
	on    atomic.Bool // WriteTo runs with a TryWriter
	w     TryWriter
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
		_, err := c.ep.Read(p, tcpip.ReadOptions{})
		if n := int(p.moved - before); n > 0 {
			c.ep.ModerateRecvBuf(n)
		}
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
		if e := c.errFor("read", err); e != io.EOF {
			p.err = e
		}
	}
}

// deliver pushes on the goroutine that processed segments, or wakes who waits for them.
func (c *conn) deliver() {
	if c.ready.Load() && c.pump.on.Load() && c.pump.mu.TryLock() {
		c.push()
		more := c.pump.done || c.pump.full
		c.pump.mu.Unlock()
		if more {
			wake(c.rd)
		}
	}
	c.inline.Add(-1)
	if c.ready.Load() {
		wake(c.rd)
	}
}

// pumpBuffers are what WriteTo and ReadFrom copy through where they have to.
var pumpBuffers = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// WriteTo writes what arrives to w until the container's FIN or an error.
func (c *conn) WriteTo(w io.Writer) (int64, error) {
	if t, ok := w.(TryWriter); ok {
		return c.pushTo(t)
	}
	buf := pumpBuffers.Get().(*[64 << 10]byte)
	defer pumpBuffers.Put(buf)
	var total int64
	for {
		n, err := c.Read(buf[:])
		if n > 0 {
			m, werr := w.Write(buf[:n])
			total += int64(m)
			if werr != nil {
				return total, werr
			}
		}
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

func (c *conn) pushTo(w TryWriter) (int64, error) {
	p := &c.pump
	p.mu.Lock()
	p.w, p.moved, p.done, p.err, p.full = w, 0, false, nil, false
	p.on.Store(true)
	defer p.mu.Unlock()
	defer p.on.Store(false)
	for {
		c.enter()
		c.push()
		c.leave()
		if p.full {
			if err := c.pushSlow(w); err != nil {
				return p.moved, err
			}
			continue
		}
		if p.done {
			return p.moved, p.err
		}
		p.mu.Unlock()
		err := c.wait("read", c.rd, &c.rdLine)
		p.mu.Lock()
		if err == nil && c.closed.Load() {
			err = opError("read", c.local, c.remote, net.ErrClosed)
		}
		if err != nil && !p.done {
			return p.moved, err
		}
	}
}

// pushSlow waits for w with one buffer of what has arrived. c.pump.mu is held all the time, so that nobody overtakes.
func (c *conn) pushSlow(w io.Writer) error {
	p := &c.pump
	buf := pumpBuffers.Get().(*[64 << 10]byte)
	defer pumpBuffers.Put(buf)
	n, err := c.Read(buf[:])
	p.full = false
	if n > 0 {
		m, werr := w.Write(buf[:n])
		p.moved += int64(m)
		if werr != nil {
			return werr
		}
	}
	if err == io.EOF {
		p.done, err = true, nil
	}
	return err
}

// ReadFrom sends what r yields until its end or an error.
func (c *conn) ReadFrom(r io.Reader) (int64, error) {
	buf := pumpBuffers.Get().(*[64 << 10]byte)
	defer pumpBuffers.Put(buf)
	var total int64
	for {
		n, err := r.Read(buf[:])
		if n > 0 {
			m, werr := c.Write(buf[:n])
			total += int64(m)
			if werr != nil {
				return total, werr
			}
		}
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}
