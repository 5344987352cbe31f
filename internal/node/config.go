package node

import (
	"errors"
	"log/slog"
	"net/netip"
	"runtime"
	"time"

	"patchbay/internal/edge"
	"patchbay/internal/wire"
	"patchbay/ipam"
	"patchbay/nat"
	"patchbay/tap"
	"patchbay/tunnel"
)

// NetworkConfig describes a network. The zero value of every field but Name is its documented default.
type NetworkConfig struct {
	// Name is the network's DNS label.
	Name string
	// Subnets are at most one IPv4 and one IPv6 prefix. Default: one of each that no route of the host clashes with.
	Subnets []netip.Prefix
	// Taken are prefixes that a default must not overlap: those of the process's other networks.
	Taken []netip.Prefix
	// Restored says that the network was here before: its Subnets are not held against the host's routes again, which may have changed since.
	Restored bool
	// Gateways are the gateway's addresses, each in one of Subnets. Default: the first of each.
	Gateways []netip.Addr
	// GatewayMAC is the gateway's. Default: a random one.
	GatewayMAC wire.MAC
	// Internal networks have no NAT and no published ports; the gateway serves names and DHCP alone, and the resolver forwards nothing.
	Internal bool
	// Isolate lets attachments reach the gateway alone.
	Isolate bool
	// JournalDir is where TCP flows through NAT are noted, so that the next process can reset them after a crash of this one. Default: nowhere.
	JournalDir string
	// Leases is where addresses are kept. Default: in memory.
	Leases ipam.Store
	// VNI is the network's number on tunnels. Default: none, it can have no peers. With one, the gateway is in the split-horizon group of the peers: each node has its own, with
	// the same address, and it never crosses a tunnel.
	VNI uint32
	// Wire is how frames travel to most of its peers: on WirePatchbay containers are told to make superframes that fit (tunnel.GSOMaxSize).
	Wire tunnel.Wire
	// Seal says that nothing clear leaves the network or enters it: a peer without a seal is refused.
	Seal bool
	// Ranges are the parts of Subnets that addresses nobody asked for come from, at most one a subnet. Default: all of each.
	Ranges []netip.Prefix
	// MTU in bytes of IP packet: 576 (IPv4 alone) or 1280 (both) to 65521, which is the most a TAP takes. Below 1280 the default subnets are IPv4 alone. Default 1500. SetMTU changes it.
	MTU int
	// HostLoopback lets containers reach the host's loopback as host.patchbay.internal.
	HostLoopback bool
	// AllowLinkLocal lets containers reach 169.254.0.0/16 and the clouds' metadata addresses.
	AllowLinkLocal bool
	// DNS are resolvers to ask instead of the host's resolv.conf.
	DNS []netip.AddrPort
	// Others are the further networks that whoever has the address on this one is on: their names are known to it as well. It must not block. Default: none.
	Others func(client netip.Addr) []*Network
	// LoopTAPs is how many TAPs the thread reads that serves NAT's TCP sockets, of attachments with one queue and in the order they come; further ones have a thread for each queue. Default: none. See
	// FewCores.
	LoopTAPs int
	// TCPMemory bounds what netstack holds for all connections together, in bytes: 1 MiB at least. Default 64 MiB; see stack.TCPConfig.MaxMemory.
	TCPMemory int
	// Limits bound what containers can make grow.
	Limits nat.Limits
	// Logger gets state changes. Default: none.
	Logger *slog.Logger
}

// AttachConfig asks for a membership in a network. The zero value of a field is its documented default.
type AttachConfig struct {
	// Name is a DNS label, unique on the network. Default: one is made up from the first free number.
	Name string
	// Aliases are further DNS labels it is found by; others may have them too.
	Aliases []string
	// Hostname inside. Default: Name.
	Hostname string
	// IfName is the interface inside.
	IfName string
	// Addrs asks for addresses, at most one of each IP version. Default: the pool's next.
	Addrs []netip.Addr
	// MAC of the interface. Default: made from its first address, so that a new holder of the address is reached at once.
	MAC wire.MAC
	// LateMAC leaves the MAC open until PlugServing says it: for virtual machines, which bring their own.
	LateMAC bool
	// Publish are port specifications as nat.ParseSpec reads them.
	Publish []nat.Spec
	// Queues of the TAP. Default 1.
	Queues int
	// Device is how the container's interface reaches the switch. The zero value is a TAP; tap.KindAuto takes a packet socket where there is none to be had.
	Device tap.Kind
	// ForcePlain opens the TAP without a virtio header, as a sandbox that refuses it would.
	ForcePlain bool
	// Rate, StormLimit and MACLimit are as in vswitch.PortConfig. Default: none.
	Rate       int64
	StormLimit int
	MACLimit   int
	// Trust leaves the source addresses of its frames unchecked.
	Trust bool
	// Created is when it was first made. Default: now.
	Created time.Time
}

// ContainerConfig describes one container. The zero value of a field is its documented default.
type ContainerConfig struct {
	AttachConfig
	// Process is what to run, and how. Its Interfaces, ResolvConf, Hosts and Hostname are filled in here.
	Process edge.Spec
	// ForwardSignals passes the signals sent to this process on to the command. At most one container of a process can have it.
	ForwardSignals bool
	// Stdio are the command's standard streams.
	Stdio edge.Stdio
}

// ErrTaken is in the chain when a name is another attachment's.
var ErrTaken = errors.New("two attachments cannot share it")

// FewCores is the LoopTAPs for this machine. Where there are two cores a thread for each TAP wakes another core for every frame that has no company, and the client and the server need the cores as well; so the TAPs
// of a container, or of two that talk to each other, share one (ADR 5). With more containers one thread would be less than the cores can do.
func FewCores() int {
	if runtime.NumCPU() <= 2 {
		return 2
	}
	return 0
}
