package vswitch

import (
	"fmt"
	"net/netip"
	"sync/atomic"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// Port is the egress side of whatever is plugged into a switch.
type Port interface {
	// Transmit sends fs, in order, and returns how many frames were accepted; the others are dropped, and the port counts why.
	// fs is lent: neither the slice nor the bytes may be written to or kept after return, and other ports may be reading
	// them. It never waits for a peer: what does not fit now is dropped. It may be called from several goroutines at once.
	Transmit(fs []frame.Frame) int
	// Caps is what the port can take unfinished. The switch does not look at it: a port finishes what it cannot pass on.
	Caps() frame.Caps
}

// PortID names a port of one switch. Numbers start at 1 and are never used again.
type PortID uint32

// PortConfig says how the switch treats a port. The zero value is an open port that is trusted.
type PortConfig struct {
	// Name is for people and unique among the ports. Empty means "port" and the ID.
	Name string
	// Group is the split-horizon group: frames never go from a port to another of the same group. 0 is no group.
	Group int
	// Isolated ports exchange frames with ports that are not isolated only.
	Isolated bool
	// MAC binds the port to one source address, as a static FDB entry; frames from another source are dropped. Zero is unbound.
	MAC wire.MAC
	// Addrs binds the port to these source addresses: in IP packets, ARP senders and ND targets, VLAN-tagged ones too. Unspecified sources pass
	// where a host has none yet (DHCP, ARP probes, duplicate address detection, MLD). IPv6 link-local sources must be among Addrs; where none is,
	// the one made from MAC passes (EUI-64), or any if there is no MAC. A port with Addrs is a host: its router
	// advertisements, redirects, and answers of a DHCP server are dropped. Empty is unbound.
	Addrs []netip.Addr
	// MACLimit is how many sources may be learned on the port; frames from further ones are dropped. 0 is no limit but the table's.
	MACLimit int
	// StormLimit is how many frames a second the port may have flooded, in bursts of at most as many. 0 is no limit.
	StormLimit int
	// RateLimit is how many bytes a second the switch takes from the port, in bursts of at most a tenth of that, but at least two superframes.
	// 0 is no limit.
	RateLimit int64
}

func (c *PortConfig) validate() error {
	switch {
	case c.MAC.IsGroup():
		return fmt.Errorf("port %q: MAC %s is a group address; give one whose first byte is even, such as 02:…", c.Name, c.MAC)
	case c.MACLimit < 0 || c.StormLimit < 0 || c.RateLimit < 0:
		return fmt.Errorf("port %q: a limit is negative; 0 means none", c.Name)
	case c.Group < 0:
		return fmt.Errorf("port %q: split-horizon group %d is negative; 0 means none", c.Name, c.Group)
	}
	for _, a := range c.Addrs {
		if !a.IsValid() || a.IsMulticast() || a.IsUnspecified() {
			return fmt.Errorf("port %q: cannot bind it to %v; give unicast addresses", c.Name, a)
		}
	}
	return nil
}

// port is what the switch keeps for a Port. idx is its place in the port set and in FDB entries.
type port struct {
	id   PortID
	idx  int32
	cfg  PortConfig
	dev  Port
	bind atomic.Pointer[binding]

	storm, rate bucket

	// Counters of the two directions are written by different goroutines.
	_  [64]byte
	rx rxCounters
	_  [64]byte
	tx txCounters
}

type rxCounters struct {
	frames, bytes    atomic.Uint64
	unicast, flooded atomic.Uint64
	drops            frame.DropCounters
}

type txCounters struct {
	frames, bytes, refused atomic.Uint64
}

// transmit hands fs over and counts. It returns how many were accepted, taken to be the first ones.
func (q *port) transmit(fs []frame.Frame) int {
	n := min(max(q.dev.Transmit(fs), 0), len(fs))
	bytes := 0
	for i := range fs[:n] {
		bytes += len(fs[i].Data)
	}
	q.tx.frames.Add(uint64(n))
	q.tx.bytes.Add(uint64(bytes))
	if n < len(fs) {
		q.tx.refused.Add(uint64(len(fs) - n))
	}
	return n
}

// barred tells why frames may not go from p to q.
func (p *port) barred(q *port) (frame.Drop, bool) {
	switch {
	case p.cfg.Isolated && q.cfg.Isolated:
		return frame.DropIsolated, true
	case p.cfg.Group != 0 && p.cfg.Group == q.cfg.Group:
		return frame.DropSplitHorizon, true
	}
	return 0, false
}

// portSet is an immutable snapshot of the ports. byIdx has nil where no port is.
type portSet struct {
	byIdx []*port
	all   []*port
}

func (s *portSet) has(p *port) bool { return int(p.idx) < len(s.byIdx) && s.byIdx[p.idx] == p }

// with is a copy of s in which idx is p, or nothing.
func (s *portSet) with(idx int32, p *port) *portSet {
	n := &portSet{byIdx: make([]*port, max(len(s.byIdx), int(idx)+1)), all: make([]*port, 0, len(s.all)+1)}
	copy(n.byIdx, s.byIdx)
	n.byIdx[idx] = p
	for _, q := range n.byIdx {
		if q != nil {
			n.all = append(n.all, q)
		}
	}
	return n
}

// bucket is a token bucket as one word (GCRA): the time at which it would be full again. The zero bucket is never empty.
type bucket struct {
	full  atomic.Int64
	cost  float64 // nanoseconds of one token
	depth int64   // nanoseconds that full may be ahead of now
}

// limit allows perSecond tokens a second, and burst at once. It is called before the bucket is used.
func (b *bucket) limit(perSecond, burst float64) {
	if perSecond > 0 {
		b.cost = 1e9 / perSecond
		b.depth = int64(burst * b.cost)
	}
}

// take takes n tokens at the time now (nanoseconds), or none and returns false.
func (b *bucket) take(now int64, n int) bool {
	if b.cost == 0 {
		return true
	}
	d := int64(float64(n) * b.cost)
	for {
		old := b.full.Load()
		next := max(old, now) + d
		if next-now > b.depth {
			return false
		}
		if b.full.CompareAndSwap(old, next) {
			return true
		}
	}
}
