package nat

import (
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/stack"
)

// tcpFlow is one TCP connection of a container joined to one of the host. It has no goroutine of its own while nothing is stuck:
//
//   - what the container sends is written to the host's socket on the goroutine that read it off the network (TryWrite), and where the socket is
//     full, on the loop when it no longer is;
//   - what the host sends is read and given to the container's connection on the loop. Where that is full, it goes on when the connection says that it takes bytes again, on the loop
//     (Config.OneThread), or on a goroutine that lives until the host's socket is drained.
//
// Each direction ends by itself: a FIN is carried over as a FIN, and the flow ends when both have come. A reset, or an error of either side, ends both at once,
// with a reset to the other side.
type tcpFlow struct {
	t         *tcpNAT
	quota     *quota // holds one of container, given back at the end
	container netip.Addr
	conn      stack.AsyncConn
	to        netip.AddrPort // outbound: where the host's socket is connected to, and
	port      uint16         // from which port; 0 for a published one
	slot      int32          // of the journal, or -1

	// rd and wr guard fd: against use after close, nothing more. They are held for one system call and never together with a lock of the stack
	// being waited for: TryWrite is called with such a lock held. close takes both, in this order.
	rd, wr sync.Mutex
	fd     int
	closed bool
	outOn  bool // EPOLLOUT is asked for; under wr
	wrote  int8 // calls of TryWrite, up to 2; under wr

	down   atomic.Int32 // who reads fd: downIdle and so on
	again  func()       // goOn, once waits has been true
	readOn atomic.Bool  // a FIN, a reset or urgent data has been announced: a read that brings less than it asks for is not the last
	rest   *buf         // what the container has not taken, from restAt on, or nil; used by who is downBusy
	restAt int
	roomed atomic.Bool // the container has taken bytes since giveRest last tried

	ended atomic.Int32 // directions that have ended: 2 is the end
	first atomic.Int32 // whose FIN came first: 0, fromContainer, fromHost
	over  atomic.Bool  // taken off the books

	busy   atomic.Bool // bytes moved since the last sweep
	proven atomic.Bool // bytes moved at all, so the container's handshake is complete
	quiet  int         // sweeps without a byte; used by the sweep alone
	kept   bool        // keepalive is on; used by the sweep alone
}

const (
	fromContainer = 1 + iota
	fromHost
)

// flowEvents are what a flow's socket is watched for. Edge-triggered, so that nothing needs to be switched off while a goroutine reads. EPOLLOUT joins
// them once the socket was full: before that it would be one useless wake-up for every connection. EPOLLPRI, since a read stops in front of urgent data.
const flowEvents = unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLPRI | unix.EPOLLET&0xffffffff

// newFlow registers a flow for an established host socket, or returns nil when the NAT is closed; the socket is closed then. The caller
// has taken one of q for the container, and a slot of the journal, both of which the flow gives back at its end.
func (t *tcpNAT) newFlow(q *quota, container netip.Addr, fd int, conn stack.Conn, slot int32) *tcpFlow {
	f := &tcpFlow{t: t, quota: q, container: container, fd: fd, conn: async(conn), slot: slot}
	t.mu.Lock()
	if !t.closed {
		t.live[f] = struct{}{}
		t.wg.Add(1)
		first := len(t.live) == 1
		t.mu.Unlock()
		if first {
			t.n.streams.armTick(sweepEvery)
		}
		return f
	}
	t.mu.Unlock()
	conn.Reset()
	conn.Close()
	t.n.journal.remove(slot)
	resetSock(fd)
	unix.Close(fd)
	q.give(container)
	return nil
}

// start lets the bytes flow. watched says that the poller has the socket already.
func (f *tcpFlow) start(watched bool) {
	var err error
	f.wr.Lock()
	switch {
	case f.closed:
	case watched:
		err = f.t.n.streams.rewatch(f.fd, flowEvents, f)
	default:
		err = f.t.n.streams.add(f.fd, flowEvents, f)
	}
	f.wr.Unlock()
	if err != nil {
		f.abort()
		return
	}
	f.conn.Pump(f, f.containerEnd)
}

// startWith is start for a host's socket that the poller does not have yet and that probably has something to say, as a client has that was let in. What it has is in the frame
// that ends the container's handshake, and the loop is not woken for it.
func (f *tcpFlow) startWith() {
	b := f.t.bufs.get(false)
	f.down.Store(downBusy)
	f.download(b.b, 1)
	f.t.bufs.put(b)
	f.start(false)
}

// finish closes both sides and takes the flow off the books. It does not wait. Idempotent.
func (f *tcpFlow) finish(reset bool) {
	if f.over.Swap(true) {
		return
	}
	f.rd.Lock()
	f.wr.Lock()
	f.closed = true
	f.t.n.streams.closing(f.fd)
	if reset {
		resetSock(f.fd)
	}
	unix.Close(f.fd)
	f.wr.Unlock()
	f.rd.Unlock()
	if reset {
		f.conn.Reset()
	}
	f.conn.Close()
	f.t.n.journal.remove(f.slot)
	f.t.mu.Lock()
	delete(f.t.live, f)
	f.t.mu.Unlock()
	f.quota.give(f.container)
	f.t.wg.Done()
}

// abort ends the flow with a reset to both sides.
func (f *tcpFlow) abort() { f.finish(true) }

// eof notes that a direction has ended with a FIN that was passed on. When both have, the flow ends.
func (f *tcpFlow) eof() {
	if f.ended.Add(1) == 2 {
		f.finish(false)
	}
}

// TryWrite writes what the container sent to the host's socket. It is called with locks of the stack held.
func (f *tcpFlow) TryWrite(b []byte) (int, error) {
	f.wr.Lock()
	defer f.wr.Unlock()
	if f.closed {
		return 0, unix.EPIPE
	}
	f.alive()
	if f.wrote < 2 {
		if f.wrote++; f.wrote == 2 { // the first finds nothing under way that Nagle's algorithm would have it wait for
			noDelay(f.fd)
		}
	}
	n, err := sysWrite(f.fd, b)
	if n == len(b) {
		return n, nil
	}
	if err != nil && !errors.Is(err, unix.EAGAIN) {
		return max(n, 0), err
	}
	if !f.outOn {
		f.outOn = true
		if err := f.t.n.streams.modify(f.fd, flowEvents|unix.EPOLLOUT); err != nil {
			return max(n, 0), err
		}
	}
	return max(n, 0), nil
}

// alive notes that bytes moved. The flags are read first so that a busy flow's cores do not fight for their cache line.
func (f *tcpFlow) alive() {
	if !f.busy.Load() {
		f.busy.Store(true)
	}
	if !f.proven.Load() {
		f.proven.Store(true)
	}
}

// containerEnd is called when the container has sent its FIN, and all before it is written (nil), or when either side failed.
func (f *tcpFlow) containerEnd(err error) {
	if err != nil {
		f.abort()
		return
	}
	f.first.CompareAndSwap(0, fromContainer) // before the host can answer
	if f.ended.Load() == 0 {                 // else the flow ends now, and its close sends the FIN
		f.wr.Lock()
		if !f.closed {
			_ = unix.Shutdown(f.fd, unix.SHUT_WR) // a peer that is gone needs no FIN
		}
		f.wr.Unlock()
	}
	f.eof()
}

// checkReset looks for a reset behind the host's FIN.
func (f *tcpFlow) checkReset() {
	f.rd.Lock()
	bad := !f.closed && sockErr(f.fd) != nil
	f.rd.Unlock()
	if bad {
		f.abort()
	}
}

func (f *tcpFlow) read(b []byte) (int, error) {
	f.rd.Lock()
	defer f.rd.Unlock()
	if f.closed {
		return 0, unix.EBADF
	}
	return sysRead(f.fd, b)
}

// keepAlive switches it on.
func (f *tcpFlow) keepAlive() {
	f.wr.Lock()
	defer f.wr.Unlock()
	if !f.closed {
		keepAlive(f.fd)
	}
}

// sweepEvery is how often idle flows are looked for. An idle timeout is kept to this precision.
const sweepEvery = 15 * time.Second

// sweep ends flows that have been silent for too long, and turns on keepalive for those that live on. It runs on the loop.
func (t *tcpNAT) sweep() (next time.Duration) {
	idle := max(1, int((t.n.limits.TCPIdle+sweepEvery-1)/sweepEvery))
	half := max(1, int((t.n.limits.TCPHalfIdle+sweepEvery-1)/sweepEvery))
	var silent []*tcpFlow
	t.mu.Lock()
	for f := range t.live {
		if f.busy.Swap(false) {
			f.quiet = 0
		} else {
			f.quiet++
		}
		if !f.kept {
			f.kept = true
			f.keepAlive()
		}
		if f.quiet > idle || f.ended.Load() == 1 && f.quiet > half {
			silent = append(silent, f)
		}
	}
	t.mu.Unlock()
	t.recycler.expire(t.n.now())
	for _, f := range silent {
		t.n.stats.idleEnded.Add(1)
		f.abort()
	}
	return sweepEvery
}
