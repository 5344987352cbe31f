package node

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"patchbay/frame"
	"patchbay/internal/api"
	"patchbay/internal/bypass"
	"patchbay/internal/dhcp"
	"patchbay/internal/dns"
	"patchbay/internal/wire"
	"patchbay/ipam"
	"patchbay/nat"
	"patchbay/stack"
	vswitch "patchbay/switch"
	"patchbay/tap"
)

// DefaultMTU is what containers expect: the jumbo MTUs that other tools need for speed break programs that trust them.
const DefaultMTU = 1500

// MinMTU and MaxMTU are what a network takes, in bytes of IP packet: what every IPv4 host can receive (RFC 791), and the most a TAP has.
const (
	MinMTU = 576
	MaxMTU = tap.MaxMTU
)

// gatewayName is what the gateway's port is called.
const gatewayName = "gateway"

// Network is one switch with a gateway and its services: one broadcast domain. See the package documentation.
type Network struct {
	cfg     NetworkConfig
	log     *slog.Logger
	subnets []netip.Prefix
	pools   []*ipam.Pool // one a subnet
	gwAddrs []netip.Addr

	sw     *vswitch.Switch
	gwPort vswitch.PortID
	gw     *stack.Gateway
	nat    *nat.NAT
	inLoop atomic.Int32 // TAPs that nat's loop reads
	flows  *nat.Journal // nil: TCP flows are not noted
	dns    *dns.Server
	dhcp   *dhcp.Server        // nil without IPv4
	drops  *frame.DropCounters // of the gateway and everything behind it

	starting sync.WaitGroup     // Starts under way; added to under mu
	abort    context.CancelFunc // ends them
	aborted  context.Context

	mtu atomic.Int64

	mu          sync.Mutex
	closed      bool
	peers       map[*Peer]struct{}
	keepLeases  bool // Shutdown: what is in the store stays
	serial      int  // numbers the attachments that were given no name
	attachments map[string]*Attachment
	containers  map[*Container]struct{}
	bypassed    *bypass.Stats       // of containers that are no more; nil: none ever had a bypass
	gone        *frame.DropCounters // of devices that are no more

	line line // nil but in tests

	stopNAT context.CancelFunc
	natDone chan error

	closeOnce sync.Once
	closeErr  error
}

// line is put between a container's device and the switch, each way, by tests that inject faults.
type line interface {
	port(container string, p vswitch.Port) vswitch.Port
	sink(container string, s frame.Sink) frame.Sink
}

// lateTCP and latePackets let the gateway, which wants its handlers when it is made, have handlers that want the gateway when they are made. They are filled in before the
// gateway is connected to the switch, so before the first frame.
type (
	lateTCP     struct{ stack.TCPHandler }
	latePackets struct{ stack.PacketHandler }
)

// NewNetwork makes a network and starts its services. The caller closes it. Nothing of the host is changed: its sockets are all the host sees of it.
func NewNetwork(ctx context.Context, cfg NetworkConfig) (_ *Network, err error) {
	if err := api.CheckName(cfg.Name); err != nil {
		return nil, fmt.Errorf("network: %w", err)
	}
	if cfg.MTU == 0 {
		cfg.MTU = DefaultMTU
	}
	n := &Network{
		cfg: cfg, log: cfg.Logger,
		attachments: make(map[string]*Attachment), peers: make(map[*Peer]struct{}), containers: make(map[*Container]struct{}), drops: new(frame.DropCounters), gone: new(frame.DropCounters),
	}
	n.mtu.Store(int64(cfg.MTU))
	n.aborted, n.abort = context.WithCancel(context.Background())
	if n.log == nil {
		n.log = slog.New(slog.DiscardHandler)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("network %q: %w", cfg.Name, err)
			n.Close()
		}
	}()
	if err := n.openPools(ctx); err != nil {
		return nil, err
	}
	if err := n.openGateway(); err != nil {
		return nil, err
	}
	n.sw = vswitch.New(vswitch.Config{})
	gateway := vswitch.PortConfig{Name: gatewayName, MAC: n.gw.MAC()}
	if cfg.VNI != 0 {
		gateway.Group = peerGroup
	}
	n.gwPort, err = n.sw.AddPort(n.gw, gateway)
	if err != nil {
		return nil, err
	}
	n.gw.Connect(func() frame.Sink { return n.sw.Ingress(n.gwPort) })
	natCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	n.stopNAT, n.natDone = stop, make(chan error, 1)
	go func() { n.natDone <- n.nat.Run(natCtx) }()
	n.log.Info("network up", "network", cfg.Name, "subnets", n.subnets, "gateway", n.gwAddrs, "mtu", cfg.MTU)
	return n, nil
}

// openPools settles the subnets: those asked for, checked against the host's routes, or such as clash with none.
func (n *Network) openPools(ctx context.Context) error {
	var host ipam.Host
	n.subnets = n.cfg.Subnets
	for i, p := range n.subnets {
		for _, q := range n.subnets[:i] {
			if p.Overlaps(q) {
				return fmt.Errorf("subnets %s and %s overlap; give one of them another address", q, p)
			}
			if p.Addr().Is4() == q.Addr().Is4() {
				return fmt.Errorf("subnets %s and %s are of the same IP version; a network has at most one of each", q, p)
			}
		}
		if n.cfg.Restored {
			continue
		}
		if err := host.CheckSubnet(p); err != nil {
			return err
		}
	}
	if len(n.subnets) == 0 {
		p4, err := host.ChooseSubnet(n.cfg.Taken...)
		if err != nil {
			return err
		}
		n.subnets = append(n.subnets, p4)
		if n.cfg.MTU >= 1280 {
			p6, err := host.ChooseSubnet6(nil, n.cfg.Taken...)
			if err != nil {
				return err
			}
			n.subnets = append(n.subnets, p6)
		}
	}
	gateways, ranges := slices.Clone(n.cfg.Gateways), slices.Clone(n.cfg.Ranges)
	for _, p := range n.subnets {
		pc := ipam.PoolConfig{Name: n.cfg.Name, Prefix: p, Store: n.cfg.Leases}
		if i := slices.IndexFunc(gateways, p.Contains); i >= 0 {
			pc.Gateway = gateways[i]
			gateways = slices.Delete(gateways, i, i+1)
		}
		if i := slices.IndexFunc(ranges, p.Overlaps); i >= 0 {
			pc.Range = ranges[i]
			ranges = slices.Delete(ranges, i, i+1)
		}
		pool, err := ipam.NewPool(ctx, pc)
		if err != nil {
			return err
		}
		n.pools = append(n.pools, pool)
		n.gwAddrs = append(n.gwAddrs, pool.Gateway())
	}
	if len(gateways) > 0 {
		return fmt.Errorf("gateway %s is in no subnet (%s), or the second of its kind; choose one inside", gateways[0], joinPrefixes(n.subnets))
	}
	if len(ranges) > 0 {
		return fmt.Errorf("range %s is in no subnet (%s), or the second of its kind; choose one inside", ranges[0], joinPrefixes(n.subnets))
	}
	return nil
}

// openGateway makes the gateway and what lives behind it.
func (n *Network) openGateway() error {
	mac := n.cfg.GatewayMAC
	if mac.IsZero() {
		var err error
		if mac, err = randomMAC(); err != nil {
			return err
		}
	}
	c := stack.Config{MAC: mac, MTU: n.cfg.MTU, Drops: n.drops, Logger: n.log, TCP: stack.TCPConfig{MaxMemory: n.cfg.TCPMemory}}
	var aliases []netip.Addr
	for _, p := range n.pools {
		c.Addrs = append(c.Addrs, netip.PrefixFrom(p.Gateway(), p.Prefix().Bits()))
		if a := p.HostAlias(); a.IsValid() {
			aliases = append(aliases, a)
		}
		if p.Gateway().Is6() {
			c.RA.RDNSS = append(c.RA.RDNSS, p.Gateway())
		}
	}
	c.HostAliases = aliases
	c.RA.NoRouter = n.cfg.Internal
	c.RA.DNSSL = []string{dns.SearchDomain(n.cfg.Name)}
	var tcp lateTCP
	var udp, icmp, names, leases latePackets
	c.Handlers = stack.Handlers{TCP: &tcp, UDP: &udp, ICMP: &icmp, LocalUDP: map[uint16]stack.PacketHandler{53: &names, 67: &leases}}
	var err error
	if n.gw, err = stack.New(c); err != nil {
		return err
	}
	if n.cfg.JournalDir != "" {
		if n.flows, err = nat.OpenJournal(n.cfg.JournalDir, 0); err != nil {
			return err
		}
	}
	n.nat, err = nat.New(nat.Config{
		Journal: n.flows,
		Network: n.gw, Subnets: n.subnets, Internal: n.cfg.Internal, HostLoopback: n.cfg.HostLoopback, AllowLinkLocal: n.cfg.AllowLinkLocal, Limits: n.cfg.Limits,
		Drops: n.drops, Logger: n.log, OneThread: n.cfg.LoopTAPs > 0,
	})
	if err != nil {
		return err
	}
	n.gw.DelayACKs(n.nat.Later)
	resolver := dns.Config{Network: n.gw, Local: n.cfg.Internal, Upstreams: n.cfg.DNS, Drops: n.drops, Logger: n.log}
	if n.cfg.Others != nil {
		resolver.Others = n.otherResolvers
	}
	if n.dns, err = dns.New(resolver); err != nil {
		return err
	}
	if err := n.openDHCP(&leases); err != nil {
		return err
	}
	n.publishZone()
	udp.PacketHandler, icmp.PacketHandler, names.PacketHandler = n.nat.UDP(), n.nat.ICMP(), n.dns
	tcp.TCPHandler = &router{network: n}
	return nil
}

// otherResolvers are those of the client's further networks.
func (n *Network) otherResolvers(client netip.Addr) (out []*dns.Server) {
	for _, o := range n.cfg.Others(client) {
		out = append(out, o.dns)
	}
	return out
}

// openDHCP makes the DHCP server of the IPv4 subnet; without one there is nothing to hand out.
func (n *Network) openDHCP(h *latePackets) (err error) {
	h.PacketHandler = ignored{}
	for _, p := range n.pools {
		if !p.Prefix().Addr().Is4() {
			continue
		}
		n.dhcp, err = dhcp.New(dhcp.Config{
			Network: n.gw, Addr: p.Gateway(), Prefix: p.Prefix(), NoRouter: n.cfg.Internal, Leaser: &dhcp.PoolLeaser{Pool: p, Attachment: n.attachmentOf},
			Domain: dns.SearchDomain(n.cfg.Name), MTU: n.cfg.MTU, Drops: n.drops, Logger: n.log,
		})
		if err != nil {
			return err
		}
		h.PacketHandler = n.dhcp
	}
	return nil
}

// ignored is DHCP on a network that has no IPv4.
type ignored struct{}

// HandlePackets implements stack.PacketHandler.
func (ignored) HandlePackets([]stack.Packet) {}

// attachmentOf is whose MAC it is, or "".
func (n *Network) attachmentOf(mac wire.MAC) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, a := range n.attachments {
		if a.mac == mac {
			return a.name
		}
	}
	return ""
}

// router sorts connections: to the gateway's own addresses they are for its services, all others are NAT's.
type router struct{ network *Network }

// HandleTCP implements stack.TCPHandler.
func (r *router) HandleTCP(req stack.TCPRequest) {
	n := r.network
	dst := req.Dst()
	if a := dst.Addr(); a != n.gw.Addr(4) && a != n.gw.Addr(6) {
		n.nat.HandleTCP(req)
		return
	}
	if dst.Port() == 53 {
		n.dns.HandleTCP(req)
		return
	}
	req.Refuse()
}

// publishZone gives the resolver the names as they are now. n.mu is held, or nobody else knows n yet.
func (n *Network) publishZone() {
	z := dns.Zone{Network: n.cfg.Name, Subnets: n.subnets, Gateway: n.gwAddrs}
	for _, p := range n.pools {
		if a := p.HostAlias(); a.IsValid() {
			z.HostAlias = append(z.HostAlias, a)
		}
	}
	for _, a := range n.attachments {
		if a.plugged {
			z.Hosts = append(z.Hosts, dns.Host{Name: a.name, Aliases: a.cfg.Aliases, Addrs: a.addrs})
		}
	}
	n.dns.SetZone(&z)
}

// closing is why nothing more can be attached.
func (n *Network) closing() error { return fmt.Errorf("network %q is being closed", n.cfg.Name) }

// retire keeps the drops of a device that is no more, so that none is lost from the sums.
func (n *Network) retire(d interface{ Drops() *frame.DropCounters }) {
	d.Drops().Each(func(r frame.Drop, c uint64) { n.gone.Add(r, int(c)) })
}

// CloseUnused is Close when nothing is attached. Otherwise it changes nothing and names what is.
func (n *Network) CloseUnused() (left []string, ok bool) {
	n.mu.Lock()
	for name := range n.attachments {
		left = append(left, name)
	}
	n.closed = n.closed || len(left) == 0
	n.mu.Unlock()
	slices.Sort(left)
	if len(left) > 0 {
		return left, false
	}
	if err := n.Close(); err != nil {
		n.log.Warn("network closed", "network", n.cfg.Name, "error", err)
	}
	return nil, true
}

// Shutdown is Close that leaves the leases in the store: the process ends and the attachments do not.
func (n *Network) Shutdown() error {
	n.mu.Lock()
	n.keepLeases = true
	n.mu.Unlock()
	if n.flows != nil {
		n.flows.Freeze() // the containers live on and will have left when NAT ends its flows: the next process tells them
	}
	return n.Close()
}

// ResetOrphans ends, for the containers that are plugged, the TCP connections of earlier processes that have ended; plugging does it for those that follow. It reports whether there is an
// earlier process left that lives, and so has connections yet to be reset.
func (n *Network) ResetOrphans() (left bool) {
	left, err := n.flows.Refresh()
	if err != nil {
		n.log.Warn("flows of an earlier process may hang", "network", n.cfg.Name, "reason", err)
		left = false // looking again would not help
	}
	for _, a := range n.Attachments() {
		a.mu.Lock()
		if a.link != nil {
			a.resetOrphans()
		}
		a.mu.Unlock()
	}
	return left
}

// ExportUDP stops NAT's UDP flows for another process, as ResumeUDP and ImportUDP go with it; see package nat.
func (n *Network) ExportUDP() ([]nat.UDPFlowState, []int, error) { return n.nat.ExportUDP() }

// ResumeUDP is described at ExportUDP.
func (n *Network) ResumeUDP() error { return n.nat.ResumeUDP() }

// ImportUDP is described at ExportUDP.
func (n *Network) ImportUDP(states []nat.UDPFlowState, fds []int) (int, error) {
	return n.nat.ImportUDP(states, fds)
}

// MTU is the network's now, in bytes of IP packet.
func (n *Network) MTU() int { return int(n.mtu.Load()) }

// SetMTU changes it: the gateway keeps to it from now on, and DHCP, router advertisements and new attachments are told. Containers that are attached keep what they have, and learn by
// ICMP where that is too much.
func (n *Network) SetMTU(mtu int) error {
	if mtu < MinMTU || mtu > MaxMTU {
		return fmt.Errorf("network %q: MTU %d is out of range; take one from %d to %d", n.cfg.Name, mtu, MinMTU, MaxMTU)
	}
	if err := n.gw.SetMTU(mtu); err != nil {
		return fmt.Errorf("network %q: %w", n.cfg.Name, err)
	}
	if n.dhcp != nil {
		n.dhcp.SetMTU(mtu)
	}
	n.mtu.Store(int64(mtu))
	return nil
}

// GatewayMAC is the gateway's.
func (n *Network) GatewayMAC() wire.MAC { return n.gw.MAC() }

// ReconcileLeases gives back every lease that is no attachment's and has no end of its own, as a crash leaves them.
func (n *Network) ReconcileLeases(ctx context.Context) error {
	n.mu.Lock()
	live := make(map[string]bool, len(n.attachments))
	for name := range n.attachments {
		live[name] = true
	}
	n.mu.Unlock()
	for _, p := range n.pools {
		timed := make(map[string]bool) // of DHCP, to machines that are no attachment
		for _, r := range p.Leases() {
			timed[r.Attachment] = !r.Expires.IsZero()
		}
		gone, err := p.Reconcile(ctx, func(id string) bool { return live[id] || timed[id] })
		if err != nil {
			return err
		}
		for _, r := range gone {
			n.log.Info("lease reclaimed", "network", n.cfg.Name, "addr", r.Addr, "attachment", r.Attachment)
		}
	}
	return nil
}

// Close ends every container, those that are being started too, every other attachment, and the network. Idempotent; it returns when nothing is left.
func (n *Network) Close() error {
	n.mu.Lock()
	n.closed = true
	n.mu.Unlock()
	n.abort()
	n.starting.Wait() // a Container belongs to its Start alone until that returns
	var left []interface{ Close() error }
	n.mu.Lock()
	for c := range n.containers {
		left = append(left, c)
	}
	for _, a := range n.attachments {
		left = append(left, a) // those of containers are closed twice, which is no harm
	}
	for p := range n.peers {
		left = append(left, p)
	}
	n.mu.Unlock()
	var errs []error
	for _, c := range left {
		errs = append(errs, c.Close())
	}
	n.closeOnce.Do(func() { n.closeErr = errors.Join(append(errs, n.closeServices())...) })
	return n.closeErr
}

// closeServices ends what is not a container, in the reverse order of its making.
func (n *Network) closeServices() error {
	var errs []error
	if n.stopNAT != nil {
		n.stopNAT()
		errs = append(errs, <-n.natDone)
	}
	if n.nat != nil {
		errs = append(errs, n.nat.Close())
	}
	if n.flows != nil {
		errs = append(errs, n.flows.Close())
	}
	if n.dns != nil {
		errs = append(errs, n.dns.Close())
	}
	if n.dhcp != nil {
		errs = append(errs, n.dhcp.Close())
	}
	if n.sw != nil && n.gwPort != 0 {
		errs = append(errs, n.sw.RemovePort(n.gwPort))
	}
	if n.gw != nil {
		errs = append(errs, n.gw.Close())
	}
	return errors.Join(errs...)
}

// randomMAC is a unicast, locally administered address (IEEE 802 §8.2).
func randomMAC() (m wire.MAC, err error) {
	if _, err := rand.Read(m[:]); err != nil {
		return m, fmt.Errorf("random MAC: %w", err)
	}
	m[0] = m[0]&^1 | 2
	return m, nil
}
