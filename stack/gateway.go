package stack

import (
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// Gateway is a network's way out. It is a switch port (Transmit, Caps) and what the services behind it use (Network). Make it with New,
// give it its way into the switch with Connect, end it with Close. Safe for concurrent use.
type Gateway struct {
	cfg   Config
	mac   wire.MAC
	drops *frame.DropCounters
	log   *slog.Logger

	own4, own6 netip.Addr   // zero when the gateway has none
	link6      netip.Addr   // link-local, from the MAC; zero without IPv6
	net4, net6 netip.Prefix // subnets, masked
	bcast4     netip.Addr   // directed broadcast of net4
	aliases    map[netip.Addr]struct{}
	mtu        atomic.Int64

	tx    txList
	nb    neighbors
	frags reassembly
	errs  sourceTokens           // ICMP errors and resets
	ras   tokens                 // answers to router solicitations
	ra    atomic.Pointer[[]byte] // a router advertisement, complete but for its destination; nil where there is none
	ipID  atomic.Uint32

	tcp     netstack
	later   func(Later) bool // of DelayACKs, or nil
	flows   flowTable
	mem     memory
	pending pendingTable

	batches sync.Pool // *batch

	closed atomic.Bool
	stop   chan struct{}
	done   chan struct{}
}

var _ Network = (*Gateway)(nil)

// New makes a gateway and starts its housekeeping. Nothing leaves it before Connect.
func New(cfg Config) (*Gateway, error) {
	g, err := newGateway(cfg)
	if err != nil {
		return nil, err
	}
	if err := g.tcp.init(g); err != nil {
		return nil, fmt.Errorf("gateway: start netstack: %w", err)
	}
	go g.housekeeping()
	return g, nil
}

// newGateway makes a gateway without TCP and without goroutines.
func newGateway(cfg Config) (*Gateway, error) {
	if err := cfg.withDefaults(); err != nil {
		return nil, err
	}
	g := &Gateway{
		cfg:   cfg,
		mac:   cfg.MAC,
		drops: cfg.Drops,
		log:   cfg.Logger,
		stop:  make(chan struct{}),
		done:  make(chan struct{}),
	}
	g.mtu.Store(int64(cfg.MTU))
	g.aliases = make(map[netip.Addr]struct{}, len(cfg.HostAliases))
	for _, a := range cfg.HostAliases {
		g.aliases[a] = struct{}{}
	}
	for _, p := range cfg.Addrs {
		if p.Addr().Is4() {
			g.own4, g.net4 = p.Addr(), p.Masked()
			g.bcast4 = broadcast4(g.net4)
		} else {
			g.own6, g.net6 = p.Addr(), p.Masked()
			g.link6 = linkLocal(g.mac)
		}
	}
	g.batches.New = func() any { return new(batch) }
	g.nb.init(cfg.MaxNeighbors)
	g.frags.init(cfg.Reassembly, g.drops)
	g.errs.init(cfg.ICMPErrorRate, max(cfg.ICMPErrorRate/10, 1))
	g.ras.init(20, 20)
	if g.own6.IsValid() && !cfg.RA.Off {
		pkt, err := g.buildRA(cfg.MTU)
		if err != nil {
			return nil, err
		}
		g.ra.Store(&pkt)
	}
	g.flows.init()
	g.mem.limit = int64(cfg.TCP.MaxMemory)
	g.pending.init(cfg.TCP.MaxHalfOpen, cfg.TCP.MaxHalfOpenPerSource)
	return g, nil
}

// Connect gives the gateway its way into the switch. newSink makes one ingress handle of the gateway's port; it is called when a goroutine has
// something to send and every handle made so far is in use, so there are as many as ever sent at once. Call it once, before the first frame.
func (g *Gateway) Connect(newSink func() frame.Sink) {
	g.tx.connect(newSink)
	if g.ra.Load() != nil {
		g.sendRA(allNodes, wire.MAC{0x33, 0x33, 0, 0, 0, 1})
	}
}

// Close ends every connection with a reset and stops all goroutines. The gateway's port must be detached from the switch before. Idempotent.
func (g *Gateway) Close() error {
	if g.closed.Swap(true) {
		<-g.done
		return nil
	}
	close(g.stop)
	<-g.done
	g.pending.close()
	for _, c := range g.flows.all() {
		c.Reset()
	}
	g.tcp.close()
	g.nb.close()
	g.frags.close()
	return nil
}

// Caps is everything: the gateway takes superframes and unfinished checksums as they are.
func (g *Gateway) Caps() frame.Caps { return frame.CapAll }

// Drops is where the gateway counts what it does not deliver.
func (g *Gateway) Drops() *frame.DropCounters { return g.drops }

// MAC is the gateway's own address.
func (g *Gateway) MAC() wire.MAC { return g.mac }

// MTU is the network's, in bytes of IP packet.
func (g *Gateway) MTU() int { return int(g.mtu.Load()) }

// SetMTU changes the network's MTU: what the gateway sends from now on is cut to it, and hosts that listen to router advertisements are told at once. The bounds are those of
// Config.MTU; on error nothing has changed.
func (g *Gateway) SetMTU(mtu int) error {
	cfg := g.cfg
	cfg.MTU = mtu
	if err := cfg.withDefaults(); err != nil {
		return err
	}
	if g.ra.Load() != nil {
		pkt, err := g.buildRA(mtu)
		if err != nil {
			return err
		}
		g.ra.Store(&pkt)
	}
	if g.mtu.Swap(int64(mtu)) != int64(mtu) && g.ra.Load() != nil {
		g.sendRA(allNodes, wire.MAC{0x33, 0x33, 0, 0, 0, 1})
	}
	return nil
}

// Addr is the gateway's own address of IP version 4 or 6, or the zero Addr.
func (g *Gateway) Addr(version int) netip.Addr {
	switch version {
	case 4:
		return g.own4
	case 6:
		return g.own6
	}
	return netip.Addr{}
}

// HostAlias is the first address given that means "the host", of IP version 4 or 6, or the zero Addr.
func (g *Gateway) HostAlias(version int) netip.Addr {
	for _, a := range g.cfg.HostAliases {
		if a.Is4() == (version == 4) {
			return a
		}
	}
	return netip.Addr{}
}

// isOwn reports whether a is one of the gateway's own unicast addresses.
func (g *Gateway) isOwn(a netip.Addr) bool { return a == g.own4 || a == g.own6 || a == g.link6 }

// answersFor reports whether ARP and ND requests for a are answered with the gateway's MAC.
func (g *Gateway) answersFor(a netip.Addr) bool {
	if g.isOwn(a) {
		return true
	}
	_, ok := g.aliases[a]
	return ok
}

// onLink reports whether a is an address of the network that may have a MAC.
func (g *Gateway) onLink(a netip.Addr) bool {
	if a.Is4() {
		return g.own4.IsValid() && g.net4.Contains(a) && a != g.bcast4
	}
	return g.own6.IsValid() && (g.net6.Contains(a) || a.IsLinkLocalUnicast())
}

// validSource reports whether a container may send from a. That it is the container's own is for the switch to enforce.
func (g *Gateway) validSource(a netip.Addr) bool {
	return g.onLink(a) && !g.answersFor(a) && !(a.Is4() && a == g.net4.Addr() && g.net4.Bits() < 31)
}

// isGroup reports whether a means more than one receiver.
func (g *Gateway) isGroup(a netip.Addr) bool {
	return a.IsMulticast() || a == limitedBroadcast || a == g.bcast4
}

// housekeeping ages what has a lifetime and sends unsolicited router advertisements (RFC 4861 §6.2.4: the first few soon).
func (g *Gateway) housekeeping() {
	defer close(g.done)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	nextRA := time.Now().Add(16 * time.Second)
	initial := 3
	for {
		select {
		case <-g.stop:
			return
		case <-tick.C:
		}
		now := time.Now()
		g.frags.expire(now)
		g.ageNeighbors(now)
		g.sweepMemory()
		if g.ra.Load() != nil && !now.Before(nextRA) {
			g.sendRA(allNodes, wire.MAC{0x33, 0x33, 0, 0, 0, 1})
			nextRA = now.Add(g.cfg.RA.Interval)
			if initial--; initial > 0 {
				nextRA = now.Add(16 * time.Second)
			}
		}
	}
}

var (
	limitedBroadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})
	allNodes         = netip.MustParseAddr("ff02::1")
	allRouters       = netip.MustParseAddr("ff02::2")
)

// broadcast4 is the directed broadcast address of p, or the zero Addr for a /31 or /32, which has none.
func broadcast4(p netip.Prefix) netip.Addr {
	if p.Bits() >= 31 {
		return netip.Addr{}
	}
	a := p.Masked().Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		a[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(a)
}

// linkLocal is the address fe80::/64 with the modified EUI-64 of m (RFC 4291 appendix A).
func linkLocal(m wire.MAC) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
}
