package stack

import (
	"net/netip"
	"sync"
	"time"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// How neighbours are resolved and aged. The times are RFC 4861's defaults, which Linux's ARP follows too.
const (
	neighborTTL    = 60 * time.Second // a dynamic entry is confirmed again after that, while it stays in use
	neighborProbes = 3                // requests, one a second, before a neighbour counts as gone
	heldFrames     = 8                // frames that wait for one neighbour
	heldBytes      = 2 << 20          // frames that wait for all neighbours, in bytes
)

// neighbor is one address of the network.
type neighbor struct {
	mac     wire.MAC
	known   bool
	static  bool
	fresh   time.Time // when a dynamic entry was last confirmed
	probed  time.Time // when it was last asked for
	probes  int       // requests since it was last confirmed
	waiting []frame.Frame
}

// neighbors is the table of MACs by address: what the node set, and a bounded number learned by ARP and ND.
type neighbors struct {
	mu      sync.RWMutex
	m       map[netip.Addr]*neighbor
	max     int // dynamic entries
	dynamic int
	held    int // bytes waiting
}

func (n *neighbors) init(limit int) {
	n.m = make(map[netip.Addr]*neighbor)
	n.max = limit
}

func (n *neighbors) lookup(ip netip.Addr) (wire.MAC, bool) {
	n.mu.RLock()
	defer n.mu.RUnlock()
	e := n.m[ip]
	if e == nil || !e.known {
		return wire.MAC{}, false
	}
	return e.mac, true
}

func (n *neighbors) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.m)
	n.dynamic, n.held = 0, 0
}

// remove takes e out and returns how many frames waited for it. n.mu is held.
func (n *neighbors) remove(ip netip.Addr, e *neighbor) int {
	delete(n.m, ip)
	if !e.static {
		n.dynamic--
	}
	for _, f := range e.waiting {
		n.held -= len(f.Data)
	}
	return len(e.waiting)
}

// SetNeighbor tells the gateway that ip lives at mac. Such an entry does not age, and no ARP or ND message changes it.
func (g *Gateway) SetNeighbor(ip netip.Addr, mac wire.MAC) {
	g.nb.mu.Lock()
	e := g.nb.m[ip]
	if e == nil {
		e = &neighbor{}
		g.nb.m[ip] = e
	} else if !e.static {
		g.nb.dynamic--
	}
	e.mac, e.known, e.static = mac, true, true
	waiting := e.take(&g.nb)
	g.nb.mu.Unlock()
	g.Send(waiting)
}

// DelNeighbor forgets ip, static or learned.
func (g *Gateway) DelNeighbor(ip netip.Addr) {
	g.nb.mu.Lock()
	n := 0
	if e := g.nb.m[ip]; e != nil {
		n = g.nb.remove(ip, e)
	}
	g.nb.mu.Unlock()
	g.drops.Add(frame.DropUnresolved, n)
}

// take removes what waits for e. n.mu is held.
func (e *neighbor) take(n *neighbors) []frame.Frame {
	w := e.waiting
	e.waiting = nil
	for _, f := range w {
		n.held -= len(f.Data)
	}
	return w
}

// learn is called with what an ARP or ND message says. It makes a new entry only if create, else confirms one that exists.
func (g *Gateway) learn(ip netip.Addr, mac wire.MAC, create bool) {
	if mac.IsGroup() || mac.IsZero() || !g.validSource(ip) {
		return
	}
	now := time.Now()
	g.nb.mu.RLock()
	e := g.nb.m[ip]
	current := e != nil && (e.static || e.known && e.mac == mac && now.Sub(e.fresh) < neighborTTL/2)
	g.nb.mu.RUnlock()
	if current || e == nil && !create {
		return
	}
	g.nb.mu.Lock()
	e = g.nb.m[ip]
	if e == nil {
		if e = g.nb.insert(ip); e == nil {
			g.nb.mu.Unlock()
			return
		}
	}
	var waiting []frame.Frame
	if !e.static {
		e.mac, e.known, e.fresh, e.probes = mac, true, now, 0
		waiting = e.take(&g.nb)
	}
	g.nb.mu.Unlock()
	g.Send(waiting)
}

// insert makes a dynamic entry, in place of one that nothing waits for when the table is full. It is nil when that fails. n.mu is held.
func (n *neighbors) insert(ip netip.Addr) *neighbor {
	if n.dynamic >= n.max {
		found := false
		looked := 0
		for old, e := range n.m { // map order is random, so this is random replacement
			if !e.static && len(e.waiting) == 0 {
				n.remove(old, e)
				found = true
				break
			}
			if looked++; looked > 64 {
				break
			}
		}
		if !found {
			return nil
		}
	}
	e := &neighbor{}
	n.m[ip] = e
	n.dynamic++
	return e
}

// hold keeps a copy of f until its destination's MAC is known, and asks for it.
func (g *Gateway) hold(f *frame.Frame) {
	ip := packetDst(f.Data)
	if !ip.IsValid() {
		g.drops.Add(frame.DropMalformed, 1)
		return
	}
	if !g.onLink(ip) || g.answersFor(ip) {
		g.drops.Add(frame.DropUnresolved, 1)
		return
	}
	now := time.Now()
	g.nb.mu.Lock()
	e := g.nb.m[ip]
	if e == nil {
		e = g.nb.insert(ip)
	}
	if e == nil || e.known || g.nb.held+len(f.Data) > heldBytes {
		resolved := e != nil && e.known // meanwhile
		g.nb.mu.Unlock()
		if t := g.tx.get(); t != nil && resolved && g.address(f) {
			t.sink.Forward([]frame.Frame{*f})
			g.tx.put(t)
			return
		} else if t != nil {
			g.tx.put(t)
		}
		g.drops.Add(frame.DropUnresolved, 1)
		return
	}
	lost := 0
	if len(e.waiting) >= heldFrames { // the oldest goes, as in Linux's unres_qlen
		g.nb.held -= len(e.waiting[0].Data)
		e.waiting = append(e.waiting[:0], e.waiting[1:]...)
		lost = 1
	}
	e.waiting = append(e.waiting, frame.Frame{Hdr: f.Hdr, Data: append([]byte(nil), f.Data...)})
	g.nb.held += len(f.Data)
	ask := e.probes == 0
	if ask {
		e.probes, e.probed = 1, now
	}
	g.nb.mu.Unlock()
	g.drops.Add(frame.DropUnresolved, lost)
	if ask {
		g.solicit(ip)
	}
}

// ageNeighbors asks again for neighbours that did not answer, confirms those in use, and forgets those that are gone.
func (g *Gateway) ageNeighbors(now time.Time) {
	var ask []netip.Addr
	lost := 0
	g.nb.mu.Lock()
	for ip, e := range g.nb.m {
		if e.static || e.known && now.Sub(e.fresh) < neighborTTL || now.Sub(e.probed) < time.Second-50*time.Millisecond {
			continue
		}
		if e.probes >= neighborProbes {
			lost += g.nb.remove(ip, e)
			continue
		}
		e.probes++
		e.probed = now
		ask = append(ask, ip)
	}
	g.nb.mu.Unlock()
	g.drops.Add(frame.DropUnresolved, lost)
	for _, ip := range ask {
		g.solicit(ip)
	}
}

// solicit asks the network who has ip.
func (g *Gateway) solicit(ip netip.Addr) {
	if ip.Is4() {
		g.sendARPRequest(ip)
	} else {
		g.sendNS(ip)
	}
}
