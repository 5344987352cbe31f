package nat

import (
	"errors"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/frame"
)

const (
	// udpSweepEvery is how often idle flows are looked for, and so how late one may be closed.
	udpSweepEvery = 2 * time.Second
	// flowPeers bounds the peers one flow remembers; totalPeers, those of all flows beyond the first of each. Above it an older one is forgotten.
	flowPeers  = 1024
	totalPeers = 1 << 16
)

// flow joins one container endpoint to one socket of the host (RFC 4787: endpoint-independent mapping, REQ-1). For echo the endpoint's
// port is the identifier.
type flow struct {
	packetSock
	tab *flowTable
	src netip.AddrPort // the container's endpoint

	seen     atomic.Int64 // time of the last packet, Unix nanoseconds
	answered atomic.Bool
	lasting  atomic.Bool // has sent to another port than 53
	paused   atomic.Bool // off the loop; see ExportUDP

	// Peers are the host-side addresses the container has sent to: only they may answer (REQ-8, address-dependent filtering).
	peersMu sync.Mutex
	last    netip.Addr // the one sent to last
	peers   map[netip.Addr]struct{}
}

// sent notes a packet to peer.
func (f *flow) sent(peer netip.AddrPort, now int64) {
	f.seen.Store(now)
	if peer.Port() != 53 && !f.lasting.Load() {
		f.lasting.Store(true)
	}
	a := peer.Addr()
	f.peersMu.Lock()
	if f.last != a {
		f.learn(a)
	}
	f.peersMu.Unlock()
}

// learn adds peer a. f.peersMu is held. The first peer is f.last alone, and costs nothing: most flows never have another.
func (f *flow) learn(a netip.Addr) {
	first := f.last
	f.last = a
	if !first.IsValid() {
		return
	}
	if f.peers == nil {
		f.peers = map[netip.Addr]struct{}{first: {}}
	}
	if _, ok := f.peers[a]; ok {
		return
	}
	u := f.tab.u
	if n := u.peers.Add(1); len(f.peers) >= flowPeers || n > totalPeers {
		u.peers.Add(-1)
		for old := range f.peers { // any one: the map's order is random, so none can be kept out on purpose
			delete(f.peers, old)
			break
		}
	}
	f.peers[a] = struct{}{}
}

// admits reports whether a packet from peer may come in.
func (f *flow) admits(peer netip.Addr) bool {
	if f.tab.u.n.openUDP && !f.ping {
		return true
	}
	f.peersMu.Lock()
	defer f.peersMu.Unlock()
	if f.last == peer {
		return true
	}
	_, ok := f.peers[peer]
	return ok
}

// origin implements sockOwner.
func (f *flow) origin(peer netip.AddrPort) (src, dst netip.AddrPort, ok bool) {
	if !f.admits(peer.Addr()) {
		return src, dst, false
	}
	return f.src, netip.AddrPortFrom(f.tab.u.inside(peer.Addr(), peer.Addr()), peer.Port()), true
}

// ready implements pollHandler: the socket has datagrams or errors.
func (f *flow) ready(events uint32) {
	u := f.tab.u
	if events&unix.EPOLLERR != 0 {
		u.drainErrors(&f.packetSock)
	}
	if events&unix.EPOLLIN == 0 {
		return
	}
	now := u.now().UnixNano()
	var from, src netip.AddrPort // the last peer, and how the container knows it
	for range recvRounds {
		n, _ := u.rx.recv(&f.packetSock)
		for i := range n {
			var r received
			if !u.rx.at(i, &r) {
				u.drops.Add(frame.DropMalformed, 1)
				continue
			}
			if r.peer != from || !src.IsValid() {
				if !f.admits(r.peer.Addr()) {
					u.drops.Add(frame.DropNoFlow, 1)
					continue
				}
				from, src = r.peer, netip.AddrPortFrom(u.inside(r.peer.Addr(), f.src.Addr()), r.peer.Port())
				f.seen.Store(now)
				if !f.answered.Load() {
					f.answered.Store(true)
				}
			}
			if f.ping {
				u.rx.queueEcho(u, f, &r, src.Addr())
			} else {
				u.rx.queueUDP(u, &r, src, f.src)
			}
		}
		u.rx.flush(u)
		if n < recvMsgs {
			return
		}
	}
}

// flowTable holds the flows of one kind by container endpoint. Safe for concurrent use.
type flowTable struct {
	u     *udpNAT
	quota *quota
	idle  func(f *flow) time.Duration
	open  func(f *flow) (frame.Drop, error) // opens f.packetSock for f.src

	mu     sync.RWMutex
	m      map[netip.AddrPort]*flow
	closed bool
}

func newFlowTable(u *udpNAT, total, each int, idle func(f *flow) time.Duration) *flowTable {
	return &flowTable{u: u, quota: newQuota(total, each), idle: idle, m: make(map[netip.AddrPort]*flow)}
}

// get returns the flow of src, opening it if it must, or nil and the reason.
func (t *flowTable) get(src netip.AddrPort, now int64) (*flow, frame.Drop) {
	t.mu.RLock()
	f := t.m[src]
	if f != nil {
		f.seen.Store(now) // under the lock: sweep looks at it under the same, so a flow that was found here is not closed under its packet
	}
	t.mu.RUnlock()
	if f != nil {
		return f, 0
	}
	return t.add(src, now)
}

func (t *flowTable) add(src netip.AddrPort, now int64) (*flow, frame.Drop) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if f := t.m[src]; f != nil {
		f.seen.Store(now)
		return f, 0
	}
	if t.closed {
		return nil, frame.DropNoFlow
	}
	if !t.quota.take(src.Addr()) {
		return nil, frame.DropFlowLimit
	}
	f := &flow{tab: t, src: src}
	f.owner = f
	if drop, err := t.open(f); err != nil {
		t.quota.give(src.Addr())
		return nil, drop
	}
	f.seen.Store(now)
	if err := t.u.loop.add(f.fd, unix.EPOLLIN, f); err != nil {
		f.closeSock()
		t.quota.give(src.Addr())
		return nil, frame.DropFlowLimit
	}
	t.m[src] = f
	t.u.loop.armTick(udpSweepEvery)
	return f, 0
}

// sweep closes what was idle too long and returns how many flows are left. It runs on the loop.
func (t *flowTable) sweep(now time.Time) int {
	idle := func(f *flow) bool { return now.UnixNano()-f.seen.Load() > int64(t.idle(f)) }
	var dead []*flow
	t.mu.RLock() // so that looking through all of them holds up no packet
	for _, f := range t.m {
		if idle(f) {
			dead = append(dead, f)
		}
	}
	left := len(t.m)
	t.mu.RUnlock()
	for _, f := range dead {
		t.mu.Lock()
		if gone := idle(f) && t.m[f.src] == f; gone {
			delete(t.m, f.src)
		} else {
			f = nil
		}
		left = len(t.m)
		t.mu.Unlock()
		if f != nil {
			t.u.loop.removeHere(f.fd)
			t.release(f)
		}
	}
	return left
}

// release closes a flow that is out of the table and of the loop.
func (t *flowTable) release(f *flow) {
	f.closeSock()
	f.forgetPeers()
	t.quota.give(f.src.Addr())
}

func (f *flow) forgetPeers() {
	f.peersMu.Lock()
	defer f.peersMu.Unlock()
	f.tab.u.peers.Add(-int64(max(0, len(f.peers)-1)))
	f.peers, f.last = nil, netip.Addr{}
}

// close ends every flow. It must not run on the loop.
func (t *flowTable) close() {
	t.mu.Lock()
	t.closed = true
	m := t.m
	t.m = make(map[netip.AddrPort]*flow)
	t.mu.Unlock()
	for _, f := range m {
		t.u.loop.remove(f.fd)
		t.release(f)
	}
}

// udpIdle is how long a UDP flow may be silent.
func udpIdle(f *flow, l *Limits) time.Duration {
	switch {
	case !f.lasting.Load():
		return min(l.UDPDNSIdle, l.UDPIdle)
	case !f.answered.Load():
		return min(l.UDPNewIdle, l.UDPIdle)
	}
	return l.UDPIdle
}

// openUDPFlow opens the sockets of flows. The container's own port is kept when it is in [lo, hi], the ports that the host hands to anyone
// who asks for any: elsewhere a container could take a port that a service of the host wants.
func openUDPFlow(lo, hi uint16) func(f *flow) (frame.Drop, error) {
	return func(f *flow) (frame.Drop, error) {
		any := netip.IPv4Unspecified()
		if f.src.Addr().Is6() {
			any = netip.IPv6Unspecified()
		}
		if p := f.src.Port(); p >= lo && p <= hi && f.openUDP(netip.AddrPortFrom(any, p), false, false) == nil {
			return 0, nil
		}
		err := f.openUDP(netip.AddrPortFrom(any, 0), false, false)
		return openDrop(err), err
	}
}

// openDrop is the counter of a socket that the host did not give: it has no more, or has no such IP version.
func openDrop(err error) frame.Drop {
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL) {
		return frame.DropHostSend
	}
	return frame.DropFlowLimit
}

// ephemeralPorts is the host's net.ipv4.ip_local_port_range.
func ephemeralPorts() (lo, hi uint16) {
	lo, hi = 32768, 60999
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return lo, hi
	}
	f := strings.Fields(string(b))
	if len(f) != 2 {
		return lo, hi
	}
	l, err1 := strconv.ParseUint(f[0], 10, 16)
	h, err2 := strconv.ParseUint(f[1], 10, 16)
	if err1 != nil || err2 != nil || l < 1024 || h < l {
		return lo, hi
	}
	return uint16(l), uint16(h)
}
