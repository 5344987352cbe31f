package nat

import (
	"net/netip"
	"time"
)

// forgetWait is how long Forget waits for what is being set up at that very moment; it takes microseconds.
const forgetWait = time.Second

// Forget ends all flows of the container that has address a: TCP connections of both directions with a reset to both ends, connects that wait, UDP and ping
// flows and the clients of its published UDP ports. When it returns their quotas and host ports are free. It is for a container that
// is gone: call it for each of its addresses once nothing more comes from there and before the address goes to another. Published ports stay open;
// close them first. Idempotent. It may wait for a handler of the loops, at most for a second, and must not be called on a loop.
func (n *NAT) Forget(a netip.Addr) {
	n.journal.forget(a)
	// Whoever sets a flow up holds a quota from its first step on, also while it is on no list: so this is over when none is held.
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		n.tcp.forget(a)
		n.udp.flows.forget(a)
		n.icmp.flows.forget(a)
		n.udp.pubs.forgetContainer(a)
		n.udp.errors.forget(a)
		held := 0
		for _, q := range []*quota{n.tcp.flows, n.tcp.pubFlows, n.udp.flows.quota, n.udp.pubs.quota, n.icmp.flows.quota} {
			held += q.heldBy(a)
		}
		if held == 0 {
			return
		}
		if time.Since(start) > forgetWait {
			n.log.Warn("flows outlive their container; they end when they have been idle", "addr", a, "flows", held)
			return
		}
	}
}

// forget ends the flows and connects of container a.
func (t *tcpNAT) forget(a netip.Addr) {
	var (
		ds []*tcpDial
		fs []*tcpFlow
	)
	t.mu.Lock()
	for d, next := t.dialing.first, (*tcpDial)(nil); d != nil; d = next {
		next = d.next
		if d.r.Src().Addr() == a {
			t.dialing.remove(d)
			ds = append(ds, d)
		}
	}
	for f := range t.live {
		if f.container == a {
			fs = append(fs, f)
		}
	}
	for d := range t.inward {
		if d.container == a {
			d.cancel()
		}
	}
	t.mu.Unlock()
	for _, d := range ds {
		t.abandon(d, t.n.streams.remove)
	}
	for _, f := range fs {
		f.abort()
	}
}

// forget closes the flows of container a. It must not run on the loop.
func (t *flowTable) forget(a netip.Addr) {
	var fs []*flow
	t.mu.Lock()
	for src, f := range t.m {
		if src.Addr() == a {
			delete(t.m, src)
			fs = append(fs, f)
		}
	}
	t.mu.Unlock()
	for _, f := range fs {
		t.u.loop.remove(f.fd)
		t.release(f)
	}
}

// forgetContainer takes the clients of container a out.
func (t *pubTable) forgetContainer(a netip.Addr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, c := range t.clients {
		if k.dst.Addr() == a {
			t.forget(c)
		}
	}
}
