package nat

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/stack"
)

// Config is what New needs. Every field but Network may be zero, which means the default named with it.
type Config struct {
	// Network is the container network this NAT serves. Required.
	Network stack.Network
	// Subnets are the network's own prefixes, which are never reached through NAT.
	Subnets []netip.Prefix
	// Internal refuses every destination: the network has no way out.
	Internal bool
	// HostLoopback lets containers reach the host's 127.0.0.1 and ::1 as Network.HostAlias. Default: refused.
	HostLoopback bool
	// AllowLinkLocal lets containers reach 169.254.0.0/16 and the clouds' other metadata addresses. Default: refused.
	AllowLinkLocal bool
	// OpenUDP lets anyone on the host's side answer to a container's UDP port, not only the addresses it has sent to: endpoint-independent
	// filtering, which some peer-to-peer programs want. Default: address-dependent filtering (RFC 4787 REQ-8).
	OpenUDP bool
	// OneThread has the loop of TCP move streams from the host to containers by itself, whatever their size, where else a goroutine takes over: for machines with so few cores that those who
	// use the streams need the others.
	OneThread bool
	// Limits bound everything that a container or client can make grow.
	Limits Limits
	// Drops counts what was refused, by reason. Default: counters of its own, see NAT.Drops.
	Drops *frame.DropCounters
	// Logger gets state changes. Default: none.
	Logger *slog.Logger
	// Journal notes TCP flows so that they can be reset for their containers after a crash; see ResetOrphans. It serves this NAT alone and is the caller's to close,
	// after NAT.Close. Default: none.
	Journal *Journal
	// Clock is the time that idle timeouts and caches go by. Default: time.Now.
	Clock func() time.Time
}

// Loops is how many threads of a NAT block in epoll_wait.
const Loops = 2

// Limits are the bounds of a NAT. Zero fields take the default in brackets. What is per container is counted by its address, and a container has
// three: IPv4, IPv6 and link-local. Flows are fewer where the limit of open files is too low for them; see fit.
//
// What outside clients can make grow is counted apart from what containers can, so that neither uses up the other's.
type Limits struct {
	TCPFlows              int // of containers to the host's side, established and connecting [16384]
	TCPFlowsPerContainer  int // [4096]
	HalfOpen              int // connects on the host that wait for an answer [1024]
	HalfOpenPerContainer  int // [256]
	UDPFlows              int // [16384]
	UDPFlowsPerContainer  int // [4096]
	PingFlows             int // [1024]
	PingFlowsPerContainer int // [256]

	PublishedFlows                int // connections through published TCP ports, established and connecting [as TCPFlows]
	PublishedFlowsPerContainer    int // [as TCPFlowsPerContainer]
	PublishedHalfOpen             int // of them, those that wait for the container's answer [as HalfOpen]
	PublishedHalfOpenPerContainer int // [as HalfOpenPerContainer]
	UDPClients                    int // of published UDP ports; when full, the oldest one that was never answered makes room [as UDPFlows]
	UDPClientsPerContainer        int // [as UDPFlowsPerContainer]

	DialTimeout time.Duration // for a host's or container's answer to a SYN [60 s]
	TCPIdle     time.Duration // established and silent; RFC 5382 REQ-5 asks for at least 2 h 4 min [2 h 4 min]
	TCPHalfIdle time.Duration // silent with one direction closed; REQ-5 [4 min]
	UDPIdle     time.Duration // RFC 4787 REQ-5 [5 min]
	UDPNewIdle  time.Duration // not answered yet; REQ-5 asks for at least 2 min [2 min]
	UDPDNSIdle  time.Duration // has sent to port 53 alone, which REQ-5 lets have less [30 s]
	PingIdle    time.Duration // RFC 5508 REQ-2 [60 s]
}

func (l Limits) withDefaults() Limits {
	n := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	t := func(v *time.Duration, d time.Duration) {
		if *v <= 0 {
			*v = d
		}
	}
	n(&l.TCPFlows, 16384)
	n(&l.TCPFlowsPerContainer, 4096)
	n(&l.HalfOpen, 1024)
	n(&l.HalfOpenPerContainer, 256)
	n(&l.UDPFlows, 16384)
	n(&l.UDPFlowsPerContainer, 4096)
	n(&l.PingFlows, 1024)
	n(&l.PingFlowsPerContainer, 256)
	n(&l.PublishedFlows, l.TCPFlows)
	n(&l.PublishedFlowsPerContainer, l.TCPFlowsPerContainer)
	n(&l.PublishedHalfOpen, l.HalfOpen)
	n(&l.PublishedHalfOpenPerContainer, l.HalfOpenPerContainer)
	n(&l.UDPClients, l.UDPFlows)
	n(&l.UDPClientsPerContainer, l.UDPFlowsPerContainer)
	t(&l.DialTimeout, 60*time.Second)
	t(&l.TCPIdle, 2*time.Hour+4*time.Minute)
	t(&l.TCPHalfIdle, 4*time.Minute)
	t(&l.UDPIdle, 5*time.Minute)
	t(&l.UDPNewIdle, 2*time.Minute)
	t(&l.UDPDNSIdle, 30*time.Second)
	t(&l.PingIdle, 60*time.Second)
	return l
}

// Fit is l with its defaults filled in, and no more flows than this process can have descriptors for: that there are fewer than l says is told to log, once where the result is what NATs are made with. It is what
// each NAT does by itself.
func (l Limits) Fit(log *slog.Logger) Limits {
	l = l.withDefaults()
	// The soft limit is the hard one already: Go's runtime has raised it, and puts it back for the programs it starts unless somebody sets it once more.
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err == nil && l.fit(int(min(files.Cur, 1<<30))) {
		log.Warn("fewer flows than the limits say, since each needs a descriptor", "open files", files.Cur, "tcp", l.TCPFlows, "published tcp", l.PublishedFlows, "udp", l.UDPFlows,
			"remedy", "raise the hard limit of open files (ulimit -Hn, LimitNOFILE=)")
	}
	return l
}

// fit makes flows few enough for a process that may have files open, so that no container takes the descriptors which published ports, the resolver and
// the flows of others need, unless a container's share is to be all of them. What one kind of flow has no use for, the next has. It reports whether it had to.
func (l *Limits) fit(files int) (less bool) {
	kinds := [...]struct {
		total, each *int
		most        int
	}{
		{&l.TCPFlows, &l.TCPFlowsPerContainer, files * 5 / 16}, {&l.PublishedFlows, &l.PublishedFlowsPerContainer, files * 3 / 16},
		{&l.UDPFlows, &l.UDPFlowsPerContainer, files * 3 / 16}, {&l.PingFlows, &l.PingFlowsPerContainer, files * 1 / 16},
	}
	unused := 0
	for _, k := range kinds {
		unused += max(k.most-*k.total, 0)
	}
	for _, k := range kinds {
		more := min(max(*k.total-k.most, 0), unused)
		unused -= more
		if most := max(k.most+more, 4); *k.total > most {
			share := most / 4
			if *k.each >= *k.total { // one container is to have all
				share = most
			}
			*k.total, *k.each, less = most, min(*k.each, share), true
		}
	}
	return less
}

// NAT carries the flows of one container network. It implements stack.TCPHandler. Safe for concurrent use.
type NAT struct {
	net    stack.Network
	limits Limits
	drops  *frame.DropCounters
	log    *slog.Logger
	now    func() time.Time
	hosts  *hostAddrs
	policy *policy

	streams *poller // TCP: connects and listeners
	packets *poller // UDP and ICMP sockets; apart, so that a flood of datagrams does not delay connects

	tcp  *tcpNAT
	udp  *udpNAT
	icmp *icmpNAT

	openUDP   bool // Config.OpenUDP
	oneThread bool // Config.OneThread
	journal   *Journal
	probes    pacer // of orphans

	pubMu     sync.Mutex
	published map[*Published]struct{}
	pubClosed bool

	stats     stats
	closeOnce sync.Once
}

// New makes a NAT; nothing is served until Run. It opens no socket but those of its loops.
func New(cfg Config) (*NAT, error) {
	if cfg.Network == nil {
		return nil, errors.New("nat: Config.Network is nil; give the gateway")
	}
	n := &NAT{net: cfg.Network, limits: cfg.Limits, drops: cfg.Drops, log: cfg.Logger, now: cfg.Clock, openUDP: cfg.OpenUDP, oneThread: cfg.OneThread, published: make(map[*Published]struct{}),
		journal: cfg.Journal, probes: pacer{every: time.Second / probesPerSecond}}
	if n.drops == nil {
		n.drops = new(frame.DropCounters)
	}
	if n.log == nil {
		n.log = slog.New(slog.DiscardHandler)
	}
	if n.now == nil {
		n.now = time.Now
	}
	n.limits = n.limits.Fit(n.log)
	n.hosts = newHostAddrs(n.now)
	n.policy = &policy{network: n.net, internal: cfg.Internal, subnets: cfg.Subnets, hostLoopback: cfg.HostLoopback, allowLinkLocal: cfg.AllowLinkLocal, hosts: n.hosts}
	var err error
	if n.streams, err = newPoller(); err != nil {
		return nil, err
	}
	if n.packets, err = newPoller(); err != nil {
		n.streams.close()
		return nil, err
	}
	n.tcp = newTCP(n)
	n.streams.setTick(n.tcp.tick)
	if n.udp, err = newUDP(n); err == nil {
		n.icmp, err = newICMP(n)
	}
	if err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// Run serves until ctx ends or Close is called (nil), or a loop fails. Call it once.
func (n *NAT) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	errs := make(chan error, 2)
	for _, p := range []*poller{n.streams, n.packets} {
		go func() { errs <- p.run(ctx) }()
	}
	err := <-errs
	cancel()
	return errors.Join(err, <-errs)
}

// Close ends every flow and listener, and Run. Idempotent.
func (n *NAT) Close() error {
	n.closeOnce.Do(func() {
		n.closePublished()
		if n.icmp != nil {
			n.icmp.close()
		}
		if n.udp != nil {
			n.udp.close()
		}
		n.packets.close()
		n.tcp.close()
		n.streams.close()
	})
	return nil
}

// UDP is the handler for datagrams to any address but the gateway's own.
func (n *NAT) UDP() stack.PacketHandler { return n.udp }

// ICMP is the handler for echo requests to any address but the gateway's own.
func (n *NAT) ICMP() stack.PacketHandler { return n.icmp }

// Drops are the counters of what was refused.
func (n *NAT) Drops() *frame.DropCounters { return n.drops }
