package stack

import (
	"reflect"
	"sync"
	"sync/atomic"
	"unsafe"

	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"patchbay/frame"
)

// memory bounds what the connections of a gateway hold in their buffers together.
//
// A queue may hold half of what is free of three eighths of the limit (Choudhury and Hahne's dynamic thresholds): few busy connections get all they can use.
// Those that stall keep what they have, though, and a few of them would leave next to nothing. So there is a second part, of which a queue may hold 1/64 of what
// is free, at most 32 KiB; and a last eighth, of which each gets 4 KiB. At the default that is enough for 900 stalled queues with 32 KiB, and for 3000 in all.
// With more the limit is reached, and SYNs wait.
type memory struct {
	limit int64
	_     [56]byte // keeps total, which moves, off the line of what does not
	total atomic.Int64
}

// Bounds of what a queue may hold when the first part is used up.
const (
	minShare = minBuffer
	maxShare = 32 << 10
)

// room is the most one queue may hold now.
func (m *memory) room() int {
	used := m.total.Load()
	if free := (m.limit*3/8 - used) / 2; free > maxShare {
		return int(free)
	}
	return int(min(max((m.limit*7/8-used)/64, minShare), maxShare))
}

// full reports whether the limit is reached.
func (m *memory) full() bool { return m.total.Load() >= m.limit }

// holdings is what one connection holds.
type holdings struct {
	mu       sync.Mutex   // makes reading the endpoint and noting it one step; held for nanoseconds
	counted  int64        // what memory.total has of this connection
	send     atomic.Int64 // bytes not yet acknowledged, when last counted
	backlog  atomic.Int64 // bytes of conn.backlog
	rcvNxt   atomic.Uint32
	wantRoom atomic.Bool // a writer waits for its queue to become shorter than the threshold, of which netstack knows nothing
}

// count brings the gateway's sum up to date. It is called when segments have been processed and after each operation of the user, not for each segment.
func (c *conn) count() {
	h, m := &c.mem, &c.g.mem
	h.mu.Lock()
	var send, receive int64
	dead := c.dead()
	if !dead {
		send = int64(sendUsed(c.ep))
	}
	if !dead || !c.closed.Load() { // what arrived can be read after the end, until Close
		receive = int64(receiveMemUsed(c.ep))
	}
	old := h.counted
	h.counted = send + receive
	h.send.Store(send)
	h.mu.Unlock()
	if d := send + receive - old; d != 0 {
		m.total.Add(d)
	}
	if h.wantRoom.Load() && (dead || c.sendRoom() > int(send)) && h.wantRoom.CompareAndSwap(true, false) {
		c.hasRoom()
	}
}

// sendRoom is how many more bytes may be queued for the container.
func (c *conn) sendRoom() int {
	return c.g.mem.room() - int(c.mem.send.Load())
}

// mayWrite bounds what a writer may queue now. When it is nothing, the writer is woken once there is room.
func (c *conn) mayWrite() int {
	if n := c.sendRoom(); n > 0 {
		return n
	}
	if c.mem.wantRoom.CompareAndSwap(false, true) {
		c.g.drops.Add(frame.DropMemory, 1)
	}
	c.count() // the queue may have emptied before it was known that somebody waits
	return max(c.sendRoom(), 0)
}

// mayReceive reports whether a segment with n bytes of data, the first numbered seq, may be kept. What is refused is lost, and sent again by its sender: the
// threshold may be below a window that was announced when there was more room.
func (c *conn) mayReceive(n int, seq uint32) bool {
	m := &c.g.mem
	used := int64(receiveMemUsed(c.ep)) + c.mem.backlog.Load() + int64(n)
	if used <= int64(m.room()) {
		return true
	}
	// Where there is nothing to read, only this segment can bring the connection on: what it holds lies behind a gap, or it holds nothing.
	return int32(seq-c.mem.rcvNxt.Load()) <= 0 && receiveBufferUsed(c.ep) == 0 && m.total.Load()+used < m.limit
}

// mayGrow reports whether receive buffers may grow beyond what they start with.
func (m *memory) mayGrow() bool { return m.room() >= initialBuffer }

// TCPMemory is how many bytes the connections hold now, sent and not acknowledged or received and not read. It exceeds Config.TCP.MaxMemory by no more than
// what one Transmit call for each container brings.
func (g *Gateway) TCPMemory() int64 { return g.mem.total.Load() }

// sweepMemory counts again whatever connections there are, when it matters: one that ended without an event is found here.
func (g *Gateway) sweepMemory() {
	if g.mem.total.Load() < g.mem.limit/4 {
		return
	}
	for _, c := range g.flows.all() {
		c.count()
		if c.dead() {
			g.flows.remove(c)
		}
	}
}

// Where in a tcp.Endpoint the lock and the length of its send queue are. TestNetstackVersion guards the layout.
var sendQueueAt, sendUsedAt = sendQueueLayout()

func sendQueueLayout() (lock, used uintptr) {
	q, ok := reflect.TypeFor[tcp.Endpoint]().FieldByName("sndQueueInfo")
	l, ok1 := q.Type.FieldByName("sndQueueMu")
	s, ok2 := q.Type.FieldByName("TCPSndBufState")
	u, ok3 := s.Type.FieldByName("SndBufUsed")
	if !ok || !ok1 || !ok2 || !ok3 || u.Type.Kind() != reflect.Int {
		panic("stack: tcp.Endpoint of this gVisor has no sndQueueInfo.SndBufUsed; see linkname.go")
	}
	return q.Offset + l.Offset, q.Offset + s.Offset + u.Offset
}

// sendUsed is how many bytes ep holds that were written and not acknowledged.
func sendUsed(ep *tcp.Endpoint) int {
	lock := unsafe.Add(unsafe.Pointer(ep), sendQueueAt)
	sendQueueLock(lock)
	n := *(*int)(unsafe.Add(unsafe.Pointer(ep), sendUsedAt))
	sendQueueUnlock(lock)
	return n
}
