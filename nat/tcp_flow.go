package nat

import (
	"errors"
	"io"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"patchbay/stack"
)

// tcpFlow is one TCP connection of a container joined to one of the host.
//
// Each direction ends by itself: a FIN is carried over as a FIN, and the flow ends when both have come. A reset, or an error of either side, ends both at once,
// with a reset to the other side.
type tcpFlow struct {
	t         *tcpNAT
	container netip.Addr
	host      *hostSock

	mu      sync.Mutex
	conn    stack.Conn // nil until the container's side is established
	aborted bool

	busy  atomic.Bool  // bytes moved since the last sweep
	left  atomic.Int32 // goroutines that are through
	ended atomic.Int32 // directions that have ended: 1 or 2
	quiet int          // sweeps without a byte; used by the sweep alone
	kept  bool         // keepalive is on; used by the sweep alone
}

// newFlow registers a flow for an established host socket, or returns nil when the NAT is closed. The caller holds a flows quota of the
// container, which the flow gives back at its end, and must call run, once.
func (t *tcpNAT) newFlow(container netip.Addr, fd int) *tcpFlow {
	f := &tcpFlow{t: t, container: container, host: newHostSock(fd)}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	t.live[f] = struct{}{}
	if len(t.live) == 1 {
		t.n.streams.armTick(sweepEvery)
	}
	return f
}

// run carries the flow until both directions have ended. conn is the container's side; err, if not nil, says why there is none.
func (f *tcpFlow) run(conn stack.Conn, err error) {
	if err != nil {
		f.host.reset()
		f.done()
		return
	}
	f.mu.Lock()
	f.conn = conn
	ok := !f.aborted && f.t.start()
	f.mu.Unlock()
	if !ok {
		conn.Reset()
		conn.Close()
		f.host.reset()
		f.done()
		return
	}
	go func() {
		f.download()
		f.leave()
	}()
	f.upload()
	f.leave()
}

// start counts the two goroutines of a flow, unless the NAT is closed.
func (t *tcpNAT) start() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return false
	}
	t.wg.Add(2)
	return true
}

// leave is called by each of the two goroutines at its end; the last one closes what is left and takes the flow off the books.
func (f *tcpFlow) leave() {
	if f.left.Add(1) == 2 {
		f.conn.Close()
		f.host.close()
		f.done()
	}
	f.t.wg.Done()
}

// done takes the flow off the books.
func (f *tcpFlow) done() {
	f.t.mu.Lock()
	delete(f.t.live, f)
	f.t.mu.Unlock()
	f.t.flows.give(f.container)
}

// abort ends the flow with a reset to both sides. It does not wait.
func (f *tcpFlow) abort() {
	f.mu.Lock()
	f.aborted = true
	conn := f.conn
	f.mu.Unlock()
	if conn != nil {
		conn.Reset()
	}
	f.host.reset()
}

// eof notes that a direction has ended with a FIN. When both have, the sockets are closed.
func (f *tcpFlow) eof() (both bool) {
	if f.ended.Add(1) < 2 {
		return false
	}
	f.host.close() // also ends a download that waits for a reset
	return true
}

// upload carries container → host.
func (f *tcpFlow) upload() {
	w := uploadWriter{f: f}
	if _, err := f.conn.WriteTo(&w); err != nil {
		f.abort()
		return
	}
	f.host.closeWrite()
	f.eof()
}

// uploadWriter writes to the host's socket and notes that the flow is alive.
type uploadWriter struct{ f *tcpFlow }

func (w *uploadWriter) Write(b []byte) (int, error) {
	w.f.busy.Store(true)
	return w.f.host.file.Write(b)
}

// download carries host → container.
func (f *tcpFlow) download() {
	big := false
	for {
		b, n, err := f.host.read(&f.t.bufs, big)
		if n > 0 {
			f.busy.Store(true)
			_, err = f.conn.Write(b.b[:n])
			big = n == len(b.b) || big && n > smallBuf/2
		}
		if b != nil {
			f.t.bufs.put(b)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			f.abort()
			return
		}
	}
	if f.conn.CloseWrite() != nil {
		f.abort()
		return
	}
	// A reset that comes behind the FIN is news to the container too.
	if !f.eof() && f.host.waitError() {
		f.abort()
	}
}

// sweepEvery is how often idle flows are looked for. An idle timeout is kept to this precision.
const sweepEvery = 15 * time.Second

// sweep ends flows that have been silent for too long, and turns on keepalive for those that live on. It runs on the loop.
func (t *tcpNAT) sweep() (next time.Duration) {
	idle := max(1, int((t.n.limits.TCPIdle+sweepEvery-1)/sweepEvery))
	half := max(1, int((t.n.limits.TCPHalfIdle+sweepEvery-1)/sweepEvery))
	t.mu.Lock()
	defer t.mu.Unlock()
	for f := range t.live {
		if f.busy.Swap(false) {
			f.quiet = 0
		} else {
			f.quiet++
		}
		if !f.kept {
			f.kept = true
			f.host.keepAlive()
		}
		if f.quiet > idle || f.ended.Load() == 1 && f.quiet > half {
			t.n.stats.idleEnded.Add(1)
			go f.abort() // not here: it takes locks of the stack
		}
	}
	if len(t.live) == 0 {
		return 0
	}
	return sweepEvery
}
