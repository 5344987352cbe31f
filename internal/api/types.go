package api

import (
	"net/netip"
	"time"

	"patchbay/frame"
	"patchbay/internal/edge"
	"patchbay/internal/netns"
	"patchbay/internal/wire"
	"patchbay/tap"
)

// Prefix is where the routes of this version of the contract begin.
const Prefix = "/v1"

// MaxBody bounds a request's body, and a line of a session, in bytes.
const MaxBody = 256 << 10

// Info is who answers.
type Info struct {
	Version  string    `json:"version"`
	PID      int       `json:"pid"`
	Started  time.Time `json:"started"`
	StateDir string    `json:"stateDir"`
	// Config is the path of the configuration file, or empty.
	Config string `json:"config,omitempty"`
	// Identity is what the node is known by on sealed networks: "certificate", "key" or nothing. Expires is when the certificate does.
	Identity string    `json:"identity,omitempty"`
	Expires  time.Time `json:"expires,omitzero"`
}

// NetworkSpec asks for a network. The zero value of every field but Name is its documented default.
type NetworkSpec struct {
	// Name is a DNS label (RFC 1123 §2.1), unique on the node.
	Name string `json:"name"`
	// Subnets are at most one IPv4 and one IPv6 prefix. Default: one of each that clashes with no route of the host and no other network.
	Subnets []netip.Prefix `json:"subnets,omitempty"`
	// Gateways are the gateway's addresses, each inside one of the subnets. Default: the first address of each.
	Gateways []netip.Addr `json:"gateways,omitempty"`
	// MTU in bytes of IP packet, 576 (IPv4 alone) or 1280 to 65521. Default 1500; with a VNI what the underlay carries towards the peers less the tunnel's headers, which
	// follows the paths.
	MTU int `json:"mtu,omitempty"`
	// Internal networks have no way out: names and DHCP, but no NAT, no default route, no published ports.
	Internal bool `json:"internal,omitempty"`
	// Isolate lets attachments reach the gateway alone, never each other.
	Isolate bool `json:"isolate,omitempty"`
	// VNI is the network's number on tunnels, 1 to 16777215, unique on the node. Default: none, it stays on this host.
	VNI uint32 `json:"vni,omitempty"`
	// Wire is how frames travel to peers that name no other. It wants a VNI. Default WireVXLAN.
	Wire Wire `json:"wire,omitempty"`
	// Seal says that nothing of the network leaves this host unencrypted, and nothing unauthenticated enters. It wants a VNI.
	Seal bool `json:"seal,omitempty"`
	// Group is a multicast group, ADDR%IFACE, to which kernels among the peers send their broadcast: this node listens to it on the interface. It wants a VNI. Default: none.
	Group string `json:"group,omitempty"`
	// Port is the UDP port of the network's tunnels, here and at its peers. It wants a VNI. Default: the daemon's.
	Port uint16 `json:"port,omitempty"`
	// IPRanges are the parts of the subnets that this node hands addresses out of, at most one a subnet: nodes that share a subnet must not give one address twice. Default: all of each.
	IPRanges []netip.Prefix `json:"ipRanges,omitempty"`
	// DNS are resolvers to ask, ADDR:PORT (see ParseResolver), instead of the host's resolv.conf.
	DNS []netip.AddrPort `json:"dns,omitempty"`
	// HostLoopback lets containers reach the host's loopback as host.patchbay.internal.
	HostLoopback bool `json:"hostLoopback,omitempty"`
	// LinkLocal lets containers reach 169.254.0.0/16 and the clouds' metadata addresses.
	LinkLocal bool `json:"linkLocal,omitempty"`
}

// Network is a network as it is: its spec with every default filled in, and its state.
type Network struct {
	NetworkSpec
	// ID is unique over time: a network that is removed and made again has another.
	ID string `json:"id"`
	// GatewayMAC is the gateway's; it stays over restarts.
	GatewayMAC wire.MAC  `json:"gatewayMAC"`
	Created    time.Time `json:"created"`
	// Origin is "api" or "config", for one that the configuration file names.
	Origin      string `json:"origin"`
	Attachments int    `json:"attachments"` // how many
	Ports       []Port `json:"ports"`       // of the switch
	Flows       Flows  `json:"flows"`
}

// Lifetime is when an attachment ends by itself.
type Lifetime string

// The lifetimes.
const (
	// LifetimeSession ends with the client's connection: `patchbay run`.
	LifetimeSession Lifetime = "session"
	// LifetimeNamespace ends with the network namespace: `patchbay attach`.
	LifetimeNamespace Lifetime = "namespace"
	// LifetimeStream ends when it is detached: `patchbay attach --stream`.
	LifetimeStream Lifetime = "stream"
)

// AttachmentSpec asks for a container's membership in a network. The zero value of every field but Lifetime is its documented default.
type AttachmentSpec struct {
	// Name is a DNS label, unique on the network; containers find each other by it. Default: one is made up.
	Name string `json:"name,omitempty"`
	// Aliases are further names; several attachments may share one, and a resolver's answers rotate.
	Aliases []string `json:"aliases,omitempty"`
	// Lifetime is when it ends by itself. Required.
	Lifetime Lifetime `json:"lifetime"`
	// IfName is the interface inside, at most 15 bytes. Default: the first free ethN.
	IfName string `json:"ifname,omitempty"`
	// Addrs asks for addresses, at most one of each IP version. Default: the pool's next.
	Addrs []netip.Addr `json:"addrs,omitempty"`
	// MAC of the interface. Default: made from its first address; for a stream, the source of its first frame.
	MAC wire.MAC `json:"mac,omitzero"`
	// Publish are port specifications, [HOSTIP:]HOSTPORT[-END]:PORT[-END][/tcp|/udp].
	Publish []string `json:"publish,omitempty"`
	// Rate is how many bytes a second the network takes from it. Default: no limit.
	Rate int64 `json:"rate,omitempty"`
	// StormLimit is how many broadcast, multicast and unknown frames a second. Default 10000.
	StormLimit int `json:"stormLimit,omitempty"`
	// MACLimit is how many source MACs may be learned on its port. It matters with Trust alone. Default 16.
	MACLimit int `json:"macLimit,omitempty"`
	// Trust leaves source MACs and addresses unchecked: for a port behind which there is another switch or a router.
	Trust bool `json:"trust,omitempty"`
	// Pod says that nothing but the namespaces is there, for commands to join: `patchbay pod create`.
	Pod bool `json:"pod,omitempty"`
	// Device is how the interface reaches the switch. Default "auto".
	Device string `json:"device,omitempty"`
	// Queues of the TAP, 1 to 64. Default 1.
	Queues int `json:"queues,omitempty"`
	// Hostname inside, for /etc/hosts. Default: Name.
	Hostname string `json:"hostname,omitempty"`
	// PID is the process whose namespaces these are, for people and for `run --net container:NAME`. 0: the client's peer process.
	PID int `json:"pid,omitempty"`
	// NetNS is the path of the namespace, when it was named by one.
	NetNS string `json:"netns,omitempty"`
	// Stream is the path of the unix socket to listen on, for LifetimeStream.
	Stream string `json:"stream,omitempty"`
}

// Plan is what the edge is to do.
type Plan struct {
	// Network and Name are what the attachment is called.
	Network string `json:"network"`
	Name    string `json:"name"`
	// Interface is to be opened and configured inside.
	Interface edge.Interface `json:"interface"`
	// ResolvConf and Hosts are for /etc of a container that is made for this attachment.
	ResolvConf []byte `json:"resolvConf,omitempty"`
	Hosts      []byte `json:"hosts,omitempty"`
	Hostname   string `json:"hostname,omitempty"`
}

// Device is the answer to a Plan. Its descriptors travel beside it.
type Device struct {
	Info  tap.Info `json:"info"`
	Notes []string `json:"notes,omitempty"`
	// PID and Identity say where it is, so that the next node finds it again; Identity only for LifetimeNamespace.
	PID      int             `json:"pid,omitempty"`
	Identity *netns.Identity `json:"identity,omitempty"`
	// Error says why there is none.
	Error string `json:"error,omitempty"`
	FDs   []int  `json:"-"`
}

// Event is what the node says in a session after the Plan.
type Event struct {
	Kind       EventKind   `json:"kind"`
	Attachment *Attachment `json:"attachment,omitempty"` // with EventUp
	Error      *Error      `json:"error,omitempty"`      // with EventError
}

// EventKind is what happened.
type EventKind string

// The kinds of Event.
const (
	EventUp       EventKind = "up"       // frames flow, and everything is on disk
	EventError    EventKind = "error"    // it was not plugged, and nothing of it is left
	EventDetached EventKind = "detached" // it was taken away: close the descriptors
)

// Attachment is a container's membership in a network as it is.
type Attachment struct {
	Network  string       `json:"network"`
	Name     string       `json:"name"`
	Aliases  []string     `json:"aliases,omitempty"`
	Lifetime Lifetime     `json:"lifetime"`
	State    State        `json:"state"`
	Addrs    []netip.Addr `json:"addrs"`
	MAC      wire.MAC     `json:"mac"`
	IfName   string       `json:"ifname"`
	Device   string       `json:"device"` // "tap", "packet" or "stream"
	Caps     frame.Caps   `json:"caps"`
	Port     uint32       `json:"port"` // of the switch
	PID      int          `json:"pid,omitempty"`
	Holder   int          `json:"holder,omitempty"` // the process whose end ends it: of LifetimeSession
	NetNS    string       `json:"netns,omitempty"`
	Stream   string       `json:"stream,omitempty"`
	Publish  []Publish    `json:"publish"`
	Rate     int64        `json:"rate,omitempty"`
	Trust    bool         `json:"trust,omitempty"`
	Pod      bool         `json:"pod,omitempty"`
	Traffic  Port         `json:"traffic"`
	Since    time.Time    `json:"since"`           // when it was made
	Up       time.Time    `json:"up,omitzero"`     // since when frames flow; after a restart of the node it begins anew
	Notes    []string     `json:"notes,omitempty"` // what was asked for and not had
}

// State is whether frames flow.
type State string

// The states.
const (
	StateUp      State = "up"      // frames flow
	StateLeaving State = "leaving" // it is being taken away; when it is gone, its name, addresses and ports are free
	StateWaiting State = "waiting" // for its client to come back after a restart of the node, or for its virtual machine
)

// Port is a port's counters, seen from the switch: rx is what it received from the port. rxFrames = unicast + flooded + dropped.
type Port struct {
	Name      string `json:"name"`
	RxFrames  uint64 `json:"rxFrames"`
	RxBytes   uint64 `json:"rxBytes"`
	TxFrames  uint64 `json:"txFrames"`
	TxBytes   uint64 `json:"txBytes"`
	Unicast   uint64 `json:"unicast"`   // received and sent on to one port
	Flooded   uint64 `json:"flooded"`   // received and sent on to all others
	Dropped   uint64 `json:"dropped"`   // received and not sent on
	TxRefused uint64 `json:"txRefused"` // offered to the port and not taken
}

// Flows counts what NAT carries.
type Flows struct {
	TCP            int `json:"tcp"`
	TCPOpening     int `json:"tcpOpening"` // of them, those that wait for an answer
	UDP            int `json:"udp"`
	Ping           int `json:"ping"`
	Published      int `json:"published"` // through published ports: connections and UDP clients
	PublishedPorts int `json:"publishedPorts"`
}

// Publish is a range of host ports that leads to an attachment.
type Publish struct {
	ID         string `json:"id"`
	Network    string `json:"network"`
	Attachment string `json:"attachment"`
	// Spec is [HOSTIP:]HOSTPORT[-END]:PORT[-END]/PROTO.
	Spec string `json:"spec"`
	// Origin is "attach", "api" or "config".
	Origin string `json:"origin"`
	// Error says why the ports are not open, after a restart that found one in use for instance.
	Error string `json:"error,omitempty"`
}

// PublishSpec asks for one.
type PublishSpec struct {
	Spec string `json:"spec"`
}

// FDBEntry is a MAC that a network's switch knows.
type FDBEntry struct {
	MAC    wire.MAC `json:"mac"`
	Port   string   `json:"port"`
	Age    float64  `json:"age"` // seconds since it was last heard
	Static bool     `json:"static"`
}

// DropCount is one reason of one network.
type DropCount struct {
	Network string `json:"network"`
	Reason  string `json:"reason"`
	Count   uint64 `json:"count"`
	Meaning string `json:"meaning"`
}

// CaptureSpec asks for a capture; the answer's body is a pcapng stream that ends when the client goes.
type CaptureSpec struct {
	// Attachment restricts it to frames of one port; "gateway" is the gateway's. Default: every frame of the network.
	Attachment string `json:"attachment,omitempty"`
	// Filter is a tcpdump expression.
	Filter string `json:"filter,omitempty"`
	// SnapLen is how many bytes of each frame are kept. Default: all.
	SnapLen int `json:"snaplen,omitempty"`
	// Count ends it after so many frames. Default: it goes on.
	Count int `json:"count,omitempty"`
}
