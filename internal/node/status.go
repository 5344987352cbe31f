package node

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"patchbay/frame"
	"patchbay/internal/bypass"
	"patchbay/internal/capture"
	"patchbay/internal/wire"
	"patchbay/nat"
	vswitch "patchbay/switch"
	"patchbay/tap"
)

// Status is a picture of a network at one moment, as people and JSON see it.
type Status struct {
	Name       string            `json:"name"`
	Subnets    []netip.Prefix    `json:"subnets"`
	Gateway    []netip.Addr      `json:"gateway"`
	MTU        int               `json:"mtu"`
	Containers []ContainerStatus `json:"containers"`
	Ports      []PortStatus      `json:"ports"`
	FDB        []FDBEntry        `json:"fdb"`
	NAT        nat.Stats         `json:"nat"`
	// Bypass counts connections on sockets of the host, of all containers; nil where none ever had that.
	Bypass *bypass.Stats `json:"bypass,omitempty"`
	Drops  []DropStatus  `json:"drops"`
}

// ContainerStatus is one attachment.
type ContainerStatus struct {
	Name  string       `json:"name"`
	MAC   wire.MAC     `json:"mac"`
	Addrs []netip.Addr `json:"addrs"`
	Caps  frame.Caps   `json:"caps"`
	// Device is how its interface reaches the switch: "tap" or "packet".
	Device tap.Kind      `json:"device"`
	Up     time.Duration `json:"up"`
}

// PortStatus is one port's counters, seen from the switch: rx is what it received from the port.
type PortStatus struct {
	Name     string `json:"name"`
	RxFrames uint64 `json:"rxFrames"`
	RxBytes  uint64 `json:"rxBytes"`
	TxFrames uint64 `json:"txFrames"`
	TxBytes  uint64 `json:"txBytes"`
	Unicast  uint64 `json:"unicast"` // received and sent on to one port
	Flooded  uint64 `json:"flooded"` // received and sent on to all others
	Dropped  uint64 `json:"dropped"` // received and not sent on
	// TxRefused were offered to the port and not taken.
	TxRefused uint64 `json:"txRefused"`
}

// FDBEntry is a MAC the switch knows.
type FDBEntry struct {
	MAC    wire.MAC      `json:"mac"`
	Port   string        `json:"port"`
	Age    time.Duration `json:"age"`
	Static bool          `json:"static"`
}

// DropStatus is one reason with its count over the whole network: ports, devices, the gateway and NAT.
type DropStatus struct {
	Reason  string `json:"reason"`
	Count   uint64 `json:"count"`
	Meaning string `json:"meaning"`
}

// Status takes a picture. Counters go on meanwhile.
func (n *Network) Status() Status {
	st := Status{Name: n.cfg.Name, Subnets: n.subnets, Gateway: n.gwAddrs, MTU: n.MTU(), NAT: n.nat.Stats(), Bypass: n.bypassStats()}
	var drops [frame.NumDrops]uint64
	count := func(d frame.Drop, c uint64) { drops[d] += c }
	n.drops.Each(count)
	n.gone.Each(count)
	for _, a := range n.Attachments() {
		a.mu.Lock()
		if l := a.link; l != nil {
			st.Containers = append(st.Containers, ContainerStatus{Name: a.name, MAC: a.mac, Addrs: a.addrs, Caps: l.device.Caps(), Device: l.info.Kind, Up: time.Since(l.since)})
			l.device.Drops().Each(count)
		}
		a.mu.Unlock()
	}
	for _, p := range n.Peers() {
		p.Drops().Each(count)
	}
	slices.SortFunc(st.Containers, func(a, b ContainerStatus) int { return a.Addrs[0].Compare(b.Addrs[0]) })
	n.switchStatus(&st, count)
	for d, c := range drops {
		if c > 0 {
			st.Drops = append(st.Drops, DropStatus{Reason: frame.Drop(d).String(), Count: c, Meaning: frame.Drop(d).Meaning()})
		}
	}
	return st
}

func portStatus(name string, s vswitch.Counters) PortStatus {
	return PortStatus{
		Name: name, RxFrames: s.RxFrames, RxBytes: s.RxBytes, TxFrames: s.TxFrames, TxBytes: s.TxBytes,
		Unicast: s.Unicast, Flooded: s.Flooded, Dropped: s.Dropped(), TxRefused: s.TxRefused,
	}
}

// switchStatus adds what the switch knows.
func (n *Network) switchStatus(st *Status, count func(frame.Drop, uint64)) {
	names := make(map[vswitch.PortID]string)
	for _, p := range n.sw.Ports() {
		names[p.ID] = p.Config.Name
		s := p.Stats
		st.Ports = append(st.Ports, portStatus(p.Config.Name, s))
	}
	for d, c := range n.sw.Stats().Total.Drops {
		count(d, c)
	}
	for _, e := range n.sw.FDB() {
		st.FDB = append(st.FDB, FDBEntry{MAC: e.MAC, Port: names[e.Port], Age: e.Age, Static: e.Static})
	}
}

// Attachments are those that are there now, plugged or not, by name.
func (n *Network) Attachments() []*Attachment {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.SortedFunc(maps.Values(n.attachments), func(a, b *Attachment) int { return strings.Compare(a.name, b.name) })
}

// AttachmentStatus is what a plugged attachment is.
type AttachmentStatus struct {
	Plugged bool
	Port    uint32
	Caps    frame.Caps
	Traffic PortStatus
}

// Status takes a picture. It waits for a Plug or Unplug that is under way.
func (a *Attachment) Status() (st AttachmentStatus) {
	a.mu.Lock()
	defer a.mu.Unlock()
	l := a.link
	if l == nil || l.port == 0 {
		return st
	}
	st = AttachmentStatus{Plugged: true, Port: uint32(l.port), Caps: l.device.Caps()}
	if s, ok := a.network.sw.PortStats(l.port); ok {
		st.Traffic = portStatus(a.name, s)
	}
	return st
}

// Capture prepares a capture of the whole network, or of one port: an attachment's by its name, or the gateway's. c.Switch and c.Port are filled in.
func (n *Network) Capture(port string, c capture.Config) (*capture.Capture, error) {
	c.Switch = n.sw
	if port != "" {
		for _, p := range n.sw.Ports() {
			if p.Config.Name == strings.ToLower(port) {
				c.Port = p.ID
			}
		}
		if c.Port == 0 {
			return nil, fmt.Errorf("network %q has no port %.70q now; attach it first", n.cfg.Name, port)
		}
	}
	return capture.New(c)
}
