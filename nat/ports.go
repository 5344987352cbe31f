package nat

import (
	"net/netip"
	"sync"
	"time"
)

// recycler keeps a busy destination from using up the host's ports.
//
// When a container closes first, the host's socket goes through TIME-WAIT: for a minute that source port cannot be used for that destination, and
// there are 28,000 of them. Long before they run out the kernel's search for a free one takes milliseconds. But a connect from a port that was bound by number may take over
// a TIME-WAIT (with timestamps, RFC 6191; Linux tcp_twsk_unique). So the source ports of connections that ended so are remembered,
// and once a destination has many of them its next connection gets the oldest.
type recycler struct {
	depth int // recycleDepth, but for tests
	mu    sync.Mutex
	m     map[netip.AddrPort]*portQueue
}

type portQueue struct {
	ports []uint16 // oldest first
	used  time.Time
}

const (
	recycleDepth = 4096             // ports of a destination in TIME-WAIT from which on the oldest is taken again; so at 4,096 a second after one second
	recycleTries = 4                // ports tried before the destination is given up and the kernel chooses
	recycleDests = 256              // destinations watched; 8 KiB each at most
	recycleFor   = 60 * time.Second // how long TIME-WAIT lasts (TCP_TIMEWAIT_LEN)
)

// put remembers that port is in TIME-WAIT towards dst.
func (r *recycler) put(dst netip.AddrPort, port uint16, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	q := r.m[dst]
	if q == nil {
		if len(r.m) >= recycleDests {
			return // the kernel's own search has to do for this one
		}
		if r.m == nil {
			r.m = make(map[netip.AddrPort]*portQueue)
		}
		q = new(portQueue)
		r.m[dst] = q
	}
	q.used = now
	if len(q.ports) < 2*r.depth {
		q.ports = append(q.ports, port)
	}
}

// take returns the port to connect to dst from, or 0: the kernel's choice.
func (r *recycler) take(dst netip.AddrPort) uint16 {
	r.mu.Lock()
	defer r.mu.Unlock()
	q := r.m[dst]
	if q == nil || len(q.ports) < r.depth {
		return 0
	}
	p := q.ports[0]
	q.ports = q.ports[1:]
	return p
}

// forget drops what is known of dst: its peer sends no timestamps.
func (r *recycler) forget(dst netip.AddrPort) {
	r.mu.Lock()
	delete(r.m, dst)
	r.mu.Unlock()
}

// expire drops destinations that were not used for as long as TIME-WAIT lasts.
func (r *recycler) expire(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for dst, q := range r.m {
		if now.Sub(q.used) > recycleFor {
			delete(r.m, dst)
		}
	}
}
