package nat

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// How orphans are told. The gateway answers no more than Config.ICMPErrorRate stray segments of one container in a second (1000), and each probe brings one.
const (
	probesPerContainer = 400  // a second
	probesPerSecond    = 2000 // of all containers
)

// probeAfter are the times of the probes of one orphan after the container was plugged. The interface may come up later than its port, the first ARP may be lost, and Linux
// answers one such segment in half a second for each connection (net.ipv4.tcp_invalid_ratelimit).
var probeAfter = [...]time.Duration{0, 700 * time.Millisecond, 2 * time.Second, 5 * time.Second, 12 * time.Second}

// ResetOrphans ends, for the container that has address a, the TCP connections that a process before this one carried and that Config.Journal knows of. It is to be called
// once the container can be reached (for each of its addresses, the link-local one too), and returns at once with how many there are.
//
// Their sequence numbers are known to nobody but the container, and a reset with a wrong one is ignored. So each is sent an acknowledgement out of window, which the container's
// TCP answers with what it does expect (RFC 9293 §3.10.7.4); that segment belongs to no connection of the gateway, which answers it with a reset that
// fits (§3.10.7.1). A container that does not know the connection either answers with a reset, which nobody minds.
func (n *NAT) ResetOrphans(a netip.Addr) int {
	os, err := n.journal.take(a, n.now())
	if err != nil {
		n.log.Warn("flows of a process that is gone may hang until their containers give up", "err", err)
	}
	if len(os) == 0 {
		return 0
	}
	n.log.Info("resetting connections of a process that is gone", "container", a, "connections", len(os))
	n.tcp.spawn(func() { n.probe(n.tcp.ctx, os) })
	return len(os)
}

// probe sends the probes of one container's orphans and takes them off the journal. When ctx ends they stay in it.
func (n *NAT) probe(ctx context.Context, os []orphan) {
	own := pacer{every: time.Second / probesPerContainer}
	start := time.Now()
	for _, after := range probeAfter {
		if !sleep(ctx, time.Until(start.Add(after))) {
			return
		}
		for i := range os {
			if !own.wait(ctx) || !n.probes.wait(ctx) {
				return
			}
			n.stats.probes.Add(1)
			n.net.Send([]frame.Frame{{Data: strayACK(os[i].peer, os[i].container)}})
		}
	}
	for i := range os {
		n.journal.remove(os[i].slot)
	}
}

// strayACK is an acknowledgement that fits no connection but by accident, with room for the Ethernet header in front.
func strayACK(src, dst netip.AddrPort) []byte {
	hdr, version := wire.IPv4Len, 4
	if src.Addr().Is6() {
		hdr, version = wire.IPv6Len, 6
	}
	b := make([]byte, wire.EthernetLen+hdr+wire.TCPLen)
	ip, l4 := b[wire.EthernetLen:], b[wire.EthernetLen+hdr:]
	if version == 6 {
		wire.PutIPv6(ip, src.Addr(), dst.Addr(), wire.ProtoTCP, 0, 64, wire.TCPLen)
	} else {
		wire.PutIPv4(ip, src.Addr(), dst.Addr(), wire.ProtoTCP, 0, 64, hdr+wire.TCPLen, 0, true)
	}
	wire.PutTCP(l4, wire.TCP{SrcPort: src.Port(), DstPort: dst.Port(), Seq: rand.Uint32(), Ack: rand.Uint32(), Flags: wire.TCPAck})
	wire.PutL4Checksum(l4, src.Addr(), dst.Addr(), wire.ProtoTCP)
	return b
}

// pacer spaces events. Safe for concurrent use.
type pacer struct {
	every time.Duration
	mu    sync.Mutex
	next  time.Time
}

// pacerSlack is how far events may bunch: a sleep is not worth less.
const pacerSlack = 5 * time.Millisecond

// wait blocks until the next event may be. It is false when ctx ends first.
func (p *pacer) wait(ctx context.Context) bool {
	p.mu.Lock()
	now := time.Now()
	if early := now.Add(-pacerSlack); p.next.Before(early) {
		p.next = early
	}
	p.next = p.next.Add(p.every)
	d := p.next.Sub(now)
	p.mu.Unlock()
	return sleep(ctx, d)
}

// sleep is false when ctx ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
