package stack

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// Config describes a gateway. MAC and Addrs are required; every other field's zero value is the default named with it.
type Config struct {
	// MAC is the gateway's own, a unicast address.
	MAC wire.MAC
	// Addrs are the gateway's addresses, each with its subnet: at most one of IPv4 and one of IPv6, at least one in all.
	Addrs []netip.Prefix
	// HostAliases are addresses that mean "the host". Those inside a subnet are answered for in ARP and ND; packets to them go to
	// the handlers as to any other address. The first of each IP version is what HostAlias returns.
	HostAliases []netip.Addr
	// MTU is the network's, in bytes of IP packet: 1280 (576 without IPv6) to 65535. Default 1500. SetMTU changes it.
	MTU int
	// Handlers is who gets what the gateway sorts out.
	Handlers Handlers
	// RA is what the gateway advertises to IPv6 hosts.
	RA RAConfig
	// Reassembly bounds the memory that fragments may take.
	Reassembly ReassemblyConfig
	// TCP is how netstack's connections are tuned.
	TCP TCPConfig
	// MaxNeighbors bounds the addresses learned by ARP and ND; static ones do not count. Default 4096.
	MaxNeighbors int
	// ICMPErrorRate bounds the ICMP errors, and resets for segments that belong to no connection, sent to one source address in a second, with a burst of a
	// tenth of it. One container's flood takes nothing of another's. Default 1000.
	ICMPErrorRate int
	// Drops counts what is not delivered, by reason. Default: counters of its own, see Gateway.Drops.
	Drops *frame.DropCounters
	// Logger gets state changes. Default: none.
	Logger *slog.Logger
}

// RAConfig is what router advertisements say (RFC 4861, RFC 8106). They are sent when the gateway has an IPv6 address and Off is false.
type RAConfig struct {
	// Off silences router advertisements.
	Off bool
	// NoRouter advertises prefix and resolvers, but not the gateway as a default router: the network has no way out.
	NoRouter bool
	// Prefix is announced as on-link and fit for autoconfiguration (the latter when it is a /64). Default: the subnet of the
	// gateway's IPv6 address.
	Prefix netip.Prefix
	// NoPrefix leaves the prefix option out.
	NoPrefix bool
	// Lifetime is how long a host may use the gateway as its default router; the prefix and the resolvers live as long. Default 30 min.
	Lifetime time.Duration
	// Interval is the time between unsolicited advertisements. Default 200 s.
	Interval time.Duration
	// RDNSS are the resolvers, at most 8; DNSSL are the search domains, at most 8.
	RDNSS []netip.Addr
	DNSSL []string
}

// ReassemblyConfig bounds the fragments that wait for their siblings.
type ReassemblyConfig struct {
	// MaxBytes bounds all of them together. Default 4 MiB. Above it fragments are dropped as frag-limit.
	MaxBytes int
	// MaxBytesPerSource bounds those of one source address. Default a quarter of MaxBytes.
	MaxBytesPerSource int
	// Timeout is how long the first fragment that arrived waits for the rest. Default 30 s, as Linux.
	Timeout time.Duration
}

// TCPConfig tunes the connections between containers and the gateway.
type TCPConfig struct {
	// SendBufferMax and ReceiveBufferMax bound one connection's buffers, in bytes; both start small and grow with what the
	// connection moves. Default 8 MiB each.
	SendBufferMax, ReceiveBufferMax int
	// MaxMemory bounds what all connections together hold in their buffers, in bytes, 1 MiB or more. Few connections may use what they like of
	// three eighths of it, the rest is shared out, so that stalled connections leave room for others. A segment that would go over is lost, a write waits,
	// and at the limit SYNs are ignored; all are counted as memory. Default 64 MiB, enough for 3000 queues that all stall.
	MaxMemory int
	// MaxHalfOpen bounds the SYNs that wait for an answer from Handlers.TCP, MaxHalfOpenPerSource those of one container, so that
	// none can use up all. Above either a SYN is dropped as dial-limit. Default 16384 and 4096.
	MaxHalfOpen, MaxHalfOpenPerSource int
	// KeepAliveIdle, KeepAliveInterval and KeepAliveCount find containers that vanished. Default 5 min, 30 s, 4. A negative
	// KeepAliveIdle sends none.
	KeepAliveIdle, KeepAliveInterval time.Duration
	KeepAliveCount                   int
	// CongestionControl is "cubic" (default) or "reno".
	CongestionControl string
}

// Limits that the formats impose or that no installation should have to touch.
const (
	minMTU4 = 576
	minMTU6 = 1280
	maxMTU  = 65535
)

func (c *Config) withDefaults() error {
	if c.MAC.IsGroup() || c.MAC.IsZero() {
		return fmt.Errorf("gateway MAC %s: not a unicast address; give one such as 02:00:5e:10:00:01", c.MAC)
	}
	if len(c.Addrs) == 0 {
		return errors.New("gateway: no address; give one such as 10.88.0.1/16")
	}
	var n4, n6 int
	for _, p := range c.Addrs {
		a := p.Addr()
		if !p.IsValid() || a.Is4In6() || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() {
			return fmt.Errorf("gateway address %s: want a unicast address with its prefix length, such as 10.88.0.1/16", p)
		}
		if a.Is4() {
			n4++
		} else {
			n6++
		}
	}
	if n4 > 1 || n6 > 1 {
		return fmt.Errorf("gateway addresses %v: want at most one of each IP version", c.Addrs)
	}
	for _, a := range c.HostAliases {
		if !a.IsValid() || a.Is4In6() || a.IsMulticast() || a.IsUnspecified() {
			return fmt.Errorf("host alias %s: not a unicast address", a)
		}
	}
	def(&c.MTU, 1500)
	lowest := minMTU4
	if n6 > 0 {
		lowest = minMTU6
	}
	if c.MTU < lowest || c.MTU > maxMTU {
		return fmt.Errorf("gateway MTU %d: want %d to %d", c.MTU, lowest, maxMTU)
	}
	def(&c.MaxNeighbors, 4096)
	def(&c.ICMPErrorRate, 1000)
	def(&c.Reassembly.MaxBytes, 4<<20)
	def(&c.Reassembly.MaxBytesPerSource, c.Reassembly.MaxBytes/4)
	def(&c.Reassembly.Timeout, 30*time.Second)
	def(&c.RA.Lifetime, 30*time.Minute)
	def(&c.RA.Interval, 200*time.Second)
	if len(c.RA.RDNSS) > 8 || len(c.RA.DNSSL) > 8 {
		return fmt.Errorf("router advertisement: %d resolvers and %d search domains; at most 8 of each fit", len(c.RA.RDNSS), len(c.RA.DNSSL))
	}
	def(&c.TCP.SendBufferMax, 8<<20)
	def(&c.TCP.ReceiveBufferMax, 8<<20)
	def(&c.TCP.MaxMemory, 64<<20)
	if c.TCP.MaxMemory < 1<<20 {
		return fmt.Errorf("gateway TCP memory %d: want at least %d bytes (1 MiB), or 0 for the default", c.TCP.MaxMemory, 1<<20)
	}
	def(&c.TCP.MaxHalfOpen, 16384)
	def(&c.TCP.MaxHalfOpenPerSource, 4096)
	def(&c.TCP.KeepAliveIdle, 5*time.Minute)
	def(&c.TCP.KeepAliveInterval, 30*time.Second)
	def(&c.TCP.KeepAliveCount, 4)
	def(&c.TCP.CongestionControl, "cubic")
	if c.Drops == nil {
		c.Drops = new(frame.DropCounters)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// def gives *v the default d when it is zero.
func def[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}
