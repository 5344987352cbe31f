package stream

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/offload"
	"patchbay/internal/wire"
)

// Defaults of Config.
const (
	DefaultBufferBytes = 1 << 20
	DefaultMTU         = 1500
)

// prefixLen is the length in front of each frame.
const prefixLen = 4

// batchFrames bounds what the sink is given at once.
const batchFrames = 64

// ErrFraming is in the chain of Serve's error when the stream makes no sense any more.
var ErrFraming = errors.New("the stream is out of step")

// Config makes a Port. Conn is required; the zero value of every other field is its documented default.
type Config struct {
	// Conn is the stream.
	Conn net.Conn
	// MTU in bytes of IP packet: longer frames are dropped as too big. Default DefaultMTU.
	MTU int
	// BufferBytes bounds the frames that wait while as many are being written. Default DefaultBufferBytes, which is twenty milliseconds at 400 Mbit/s.
	BufferBytes int
	// Pending is what has been read of Conn already: what Export of another process gave. Default: nothing.
	Pending []byte
	// Drops is where drops are counted. Default: counters of its own.
	Drops *frame.DropCounters
}

// Stats are the counters of a Port, seen from the switch: rx is what the switch receives from it.
type Stats struct {
	RxFrames, RxBytes uint64
	TxFrames, TxBytes uint64 // written into the buffer
}

// Port is a port over a stream. It implements vswitch.Port. Safe for concurrent use.
type Port struct {
	conn   net.Conn
	maxLen int // of a finished frame, without a VLAN tag
	limit  int // bytes of a buffer
	drops  *frame.DropCounters
	pool   sync.Pool // of *offload.Segmenter

	mu     sync.Mutex
	buf    []byte // waits to be written
	busy   bool   // something is being written
	paused bool   // by Export
	closed bool
	broken error         // why the writing ended, unless Close ended it
	wake   chan struct{} // has room for one: buf is not empty
	writer sync.WaitGroup

	serving  sync.Mutex // held by Serve and First
	in       []byte     // read and not yet handed over: in[start:end]
	start    int
	end      int
	bad      error // once the framing was
	rxFrames atomic.Uint64
	rxBytes  atomic.Uint64
	txFrames atomic.Uint64
	txBytes  atomic.Uint64

	closeOnce sync.Once
}

// New takes over c.Conn and starts writing.
func New(c Config) (*Port, error) {
	if c.Conn == nil {
		return nil, errors.New("stream: Config.Conn is nil; give a connection")
	}
	if c.MTU == 0 {
		c.MTU = DefaultMTU
	}
	if c.BufferBytes == 0 {
		c.BufferBytes = DefaultBufferBytes
	}
	if c.MTU < 68 || c.BufferBytes < prefixLen+wire.MaxFrame {
		return nil, fmt.Errorf("stream: MTU %d and a buffer of %d bytes make no sense; use an MTU of 68 at least and a buffer of %d at least", c.MTU, c.BufferBytes, prefixLen+wire.MaxFrame)
	}
	if most := prefixLen + wire.MaxFrame; len(c.Pending) >= most {
		return nil, fmt.Errorf("stream: %d bytes that were read before make no sense; less than %d can be left over", len(c.Pending), most)
	}
	if c.Drops == nil {
		c.Drops = new(frame.DropCounters)
	}
	p := &Port{
		conn: c.Conn, maxLen: wire.EthernetLen + c.MTU, limit: c.BufferBytes, drops: c.Drops, wake: make(chan struct{}, 1),
		pool: sync.Pool{New: func() any { return new(offload.Segmenter) }}, in: make([]byte, 2*(prefixLen+wire.MaxFrame)),
	}
	p.end = copy(p.in, c.Pending)
	p.writer.Go(p.write)
	return p, nil
}

// Caps is nothing: whatever is unfinished Transmit finishes.
func (p *Port) Caps() frame.Caps { return 0 }

// Drops is where the Port counts what it could not deliver.
func (p *Port) Drops() *frame.DropCounters { return p.drops }

// Stats reads the counters.
func (p *Port) Stats() Stats {
	return Stats{RxFrames: p.rxFrames.Load(), RxBytes: p.rxBytes.Load(), TxFrames: p.txFrames.Load(), TxBytes: p.txBytes.Load()}
}

// Transmit implements vswitch.Port: it appends fs to the buffer and returns how many found room.
func (p *Port) Transmit(fs []frame.Frame) (sent int) {
	seg := p.pool.Get().(*offload.Segmenter)
	defer p.pool.Put(seg)
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range fs {
		if why, ok := p.append(&fs[i], seg); !ok {
			p.drops.Add(why, 1)
			continue
		}
		p.txFrames.Add(1)
		p.txBytes.Add(uint64(len(fs[i].Data)))
		sent++
	}
	if sent > 0 {
		select {
		case p.wake <- struct{}{}:
		default:
		}
	}
	return sent
}

// append adds one frame to the buffer, whole or not at all; p.mu is held.
func (p *Port) append(f *frame.Frame, seg *offload.Segmenter) (why frame.Drop, ok bool) {
	switch {
	case p.closed:
		return frame.DropPortDown, false
	case p.paused:
		return frame.DropTxBusy, false
	}
	if len(f.Data) < wire.EthernetLen || len(f.Data) > wire.MaxFrame {
		return frame.DropMalformed, false
	}
	was := len(p.buf)
	if f.Hdr == (wire.VirtioNetHdr{}) {
		if len(f.Data) > p.maxLen && p.tooBig(f.Data) {
			return frame.DropTooBig, false
		}
		if was+prefixLen+len(f.Data) > p.limit {
			return frame.DropTxBusy, false
		}
		p.buf = binary.BigEndian.AppendUint32(p.buf, uint32(len(f.Data)))
		p.buf = append(p.buf, f.Data...)
		return 0, true
	}
	n, ok := seg.Reset(f)
	if !ok {
		return frame.DropMalformed, false
	}
	if !f.Superframe() && len(f.Data) > p.maxLen && p.tooBig(f.Data) {
		return frame.DropTooBig, false
	}
	for range n {
		if len(p.buf)+prefixLen+seg.MaxLen() > p.limit {
			p.buf = p.buf[:was]
			return frame.DropTxBusy, false
		}
		at := len(p.buf)
		p.buf = seg.Append(append(p.buf, 0, 0, 0, 0))
		binary.BigEndian.PutUint32(p.buf[at:], uint32(len(p.buf)-at-prefixLen))
	}
	return 0, true
}

// tooBig looks closer at a frame above the MTU: a VLAN tag does not count.
func (p *Port) tooBig(data []byte) bool {
	_, off, ok := wire.Payload(data)
	return !ok || len(data)-off > p.maxLen-wire.EthernetLen
}

// write empties the buffer into the connection until Close or an error. Two buffers change places, so that neither is ever allocated again once both have grown.
func (p *Port) write() {
	var spare []byte
	for range p.wake {
		for {
			p.mu.Lock()
			p.buf, spare = spare[:0], p.buf
			p.busy = len(spare) > 0
			p.mu.Unlock()
			if len(spare) == 0 {
				break
			}
			if _, err := p.conn.Write(spare); err != nil {
				p.fail(err)
				p.conn.Close() // so that Serve ends, and says why
				return
			}
		}
	}
}

// Export stops taking frames, waits until those that it has taken are written, for at most wait, and returns a duplicate of the connection's descriptor with what has been read of it and not
// handed over, for New in another process (Config.Pending). Serve must not be running. Resume undoes it; a process that has handed the connection over closes the Port, which the
// peer does not notice.
func (p *Port) Export(wait time.Duration) (fd int, pending []byte, err error) {
	sc, ok := p.conn.(syscall.Conn)
	if !ok {
		return -1, nil, fmt.Errorf("stream: %T has no descriptor to hand over", p.conn)
	}
	p.mu.Lock()
	p.paused = true
	p.mu.Unlock()
	for end := time.Now().Add(wait); ; time.Sleep(100 * time.Microsecond) {
		p.mu.Lock()
		idle, closed := len(p.buf) == 0 && !p.busy, p.closed
		p.mu.Unlock()
		switch {
		case closed:
			return -1, nil, fmt.Errorf("stream: hand over: %w", net.ErrClosed)
		case idle:
			p.serving.Lock()
			pending = bytes.Clone(p.in[p.start:p.end])
			p.serving.Unlock()
			rc, err := sc.SyscallConn()
			if err == nil {
				if cerr := rc.Control(func(own uintptr) { fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 3) }); cerr != nil {
					err = cerr
				}
			}
			if err != nil {
				p.Resume()
				return -1, nil, fmt.Errorf("stream: hand over: %w", err)
			}
			return fd, pending, nil
		case time.Now().After(end):
			p.Resume()
			return -1, nil, fmt.Errorf("stream: hand over: the peer does not read what waits for it (%w)", context.DeadlineExceeded)
		}
	}
}

// Resume takes frames again after an Export that led to nothing.
func (p *Port) Resume() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.paused = false
}

// fail has Transmit take nothing more, and ends write. The first one's reason counts: nil is Close.
func (p *Port) fail(why error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed {
		p.closed, p.broken = true, why
		close(p.wake)
	}
}

// closedBy is why the connection was closed at this end: the error of a write, net.ErrClosed for Close, or nil when it was not.
func (p *Port) closedBy() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case !p.closed:
		return nil
	case p.broken == nil:
		return net.ErrClosed
	}
	return fmt.Errorf("stream: %w", p.broken)
}

// First waits for the first frame and returns its source; the frame stays for Serve. It blocks until there is one, ctx ends (its error), the stream does (io.EOF, or why it failed) or Close is
// called (net.ErrClosed).
func (p *Port) First(ctx context.Context) (wire.MAC, error) {
	p.serving.Lock()
	defer p.serving.Unlock()
	defer p.until(ctx)()
	for {
		data, _, err := p.frame(p.start)
		if err != nil {
			return wire.MAC{}, err
		}
		if data != nil {
			return wire.Src(data), nil
		}
		if err := p.fill(ctx); err != nil {
			return wire.MAC{}, err
		}
	}
}

// Serve hands what the peer sends to sink until ctx ends (nil), Close (nil) or the stream fails, in either direction. The peer's end of the stream is io.EOF.
func (p *Port) Serve(ctx context.Context, sink frame.Sink) error {
	p.serving.Lock()
	defer p.serving.Unlock()
	defer p.until(ctx)()
	fs := make([]frame.Frame, 0, batchFrames)
	for {
		fs = fs[:0]
		bytes := 0
		var bad error
		for len(fs) < batchFrames {
			data, next, err := p.frame(p.start)
			if err != nil {
				bad = err
				break
			}
			if data == nil {
				break
			}
			fs = append(fs, frame.Frame{Data: data})
			p.start = next
			bytes += len(data)
		}
		if len(fs) > 0 {
			p.rxFrames.Add(uint64(len(fs)))
			p.rxBytes.Add(uint64(bytes))
			sink.Forward(fs)
		}
		switch {
		case bad != nil:
			return bad
		case ctx.Err() != nil:
			return nil
		case len(fs) == batchFrames:
			continue
		}
		if err := p.fill(ctx); err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
	}
}

// frame is the frame at offset at of what was read, or nil when it is not there as a whole. Bad framing is counted the first time: there is no second one in a stream.
func (p *Port) frame(at int) (data []byte, next int, err error) {
	if p.bad != nil {
		return nil, at, p.bad
	}
	if p.end-at < prefixLen {
		return nil, at, nil
	}
	n := binary.BigEndian.Uint32(p.in[at:])
	if n < wire.EthernetLen || n > wire.MaxFrame {
		p.drops.Add(frame.DropMalformed, 1)
		p.bad = fmt.Errorf("stream: a frame of %d bytes: %w; is it QEMU's framing that the peer speaks?", n, ErrFraming)
		return nil, at, p.bad
	}
	next = at + prefixLen + int(n)
	if next > p.end {
		return nil, at, nil
	}
	return p.in[at+prefixLen : next : next], next, nil
}

// fill reads more. There is always room: what is left over is less than one frame.
func (p *Port) fill(ctx context.Context) error {
	if p.start > 0 {
		p.end = copy(p.in, p.in[p.start:p.end])
		p.start = 0
	}
	n, err := p.conn.Read(p.in[p.end:])
	p.end += n
	if n > 0 {
		return nil
	}
	if why := p.closedBy(); why != nil {
		return why
	}
	if err == nil || errors.Is(err, io.EOF) {
		return io.EOF
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("stream: %w", err)
}

// until has reads fail when ctx ends. The returned function puts it right again.
func (p *Port) until(ctx context.Context) (stop func()) {
	set := make(chan struct{})
	undo := context.AfterFunc(ctx, func() {
		defer close(set)
		_ = p.conn.SetReadDeadline(time.Unix(1, 0))
	})
	return func() {
		if !undo() {
			<-set                                   // or it would be set after it was cleared, and fail the next read
			_ = p.conn.SetReadDeadline(time.Time{}) // a connection that is closed needs none
		}
	}
}

// Close ends Serve, First and the writing, and closes the connection. What waits in the buffer is lost. Idempotent.
func (p *Port) Close() error {
	p.closeOnce.Do(func() {
		p.fail(nil)
		p.conn.Close()
		p.writer.Wait()
		p.serving.Lock() // Serve has returned
		defer p.serving.Unlock()
	})
	return nil
}
