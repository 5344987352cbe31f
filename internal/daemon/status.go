package daemon

import (
	"cmp"
	"context"
	"io"
	"maps"
	"slices"
	"strings"

	"patchbay/internal/api"
	"patchbay/internal/capture"
	"patchbay/internal/node"
)

// Networks implements api.Backend.
func (n *Node) Networks() []api.Network {
	out := make([]api.Network, 0, 8)
	for _, nw := range n.sorted() {
		out = append(out, n.describeNetwork(nw))
	}
	return out
}

// sorted is every network that is there, by name.
func (n *Node) sorted() []*network {
	n.mu.Lock()
	defer n.mu.Unlock()
	var all []*network
	for _, nw := range n.networks {
		if nw.Network != nil {
			all = append(all, nw)
		}
	}
	slices.SortFunc(all, func(a, b *network) int { return strings.Compare(a.rec.Name, b.rec.Name) })
	return all
}

// Network implements api.Backend.
func (n *Node) Network(name string) (api.Network, error) {
	nw, err := n.lookup(name)
	if err != nil {
		return api.Network{}, err
	}
	return n.describeNetwork(nw), nil
}

func (n *Node) describeNetwork(nw *network) api.Network {
	st, rec := nw.Status(), n.record(nw)
	out := api.Network{NetworkSpec: rec.NetworkSpec, ID: rec.ID, GatewayMAC: rec.GatewayMAC, Created: rec.Created, Origin: rec.Origin}
	if rec.VNI != 0 {
		out.Wire, out.Port = cmp.Or(rec.Wire, api.WireVXLAN), n.listenPort(nw)
	}
	for _, p := range st.Ports {
		out.Ports = append(out.Ports, describePort(p))
	}
	s := st.NAT
	out.Flows = api.Flows{
		TCP: s.TCPFlows, TCPOpening: s.HalfOpen + s.PublishedHalfOpen, UDP: s.UDPFlows, Ping: s.PingFlows, Published: s.PublishedFlows + s.UDPClients,
		PublishedPorts: s.PublishedPorts,
	}
	n.mu.Lock()
	out.Attachments = len(nw.attachments)
	n.mu.Unlock()
	return out
}

func describePort(p node.PortStatus) api.Port {
	return api.Port{
		Name: p.Name, RxFrames: p.RxFrames, RxBytes: p.RxBytes, TxFrames: p.TxFrames, TxBytes: p.TxBytes, Unicast: p.Unicast, Flooded: p.Flooded, Dropped: p.Dropped,
		TxRefused: p.TxRefused,
	}
}

// named is the network of that name, or all of them, in order, where there is none.
func (n *Node) named(name string) ([]*network, error) {
	if name == "" {
		return n.sorted(), nil
	}
	nw, err := n.lookup(name)
	if err != nil {
		return nil, err
	}
	return []*network{nw}, nil
}

// Attachments implements api.Backend.
func (n *Node) Attachments(name string) ([]api.Attachment, error) {
	nets, err := n.named(name)
	if err != nil {
		return nil, err
	}
	out := make([]api.Attachment, 0, 16)
	for _, nw := range nets {
		n.mu.Lock()
		as := slices.SortedFunc(maps.Values(nw.attachments), func(a, b *attachment) int { return strings.Compare(a.Name(), b.Name()) })
		n.mu.Unlock()
		for _, a := range as {
			out = append(out, n.describe(a))
		}
	}
	return out, nil
}

// Attachment implements api.Backend.
func (n *Node) Attachment(network, name string) (api.Attachment, error) {
	a, err := n.find(network, name)
	if err != nil {
		return api.Attachment{}, err
	}
	return n.describe(a), nil
}

// describe is a for the API.
func (n *Node) describe(a *attachment) api.Attachment {
	live := a.Status() // before Node.mu, since it waits for a plug that is under way
	n.mu.Lock()
	defer n.mu.Unlock()
	r := &a.rec
	out := api.Attachment{
		Network: a.network.rec.Name, Name: r.Name, Aliases: r.Aliases, Lifetime: r.Lifetime, State: api.StateWaiting, Addrs: a.Addrs(), MAC: a.MAC(), IfName: r.IfName,
		Device: r.Info.Kind.String(), PID: r.PID, NetNS: r.NetNS, Stream: r.Stream, Publish: []api.Publish{}, Rate: r.Rate, Trust: r.Trust, Pod: r.Pod, Since: r.Created, Up: a.since, Notes: r.Notes,
	}
	if r.Lifetime == api.LifetimeStream {
		out.Device = "stream"
	}
	if r.Holder != nil {
		out.Holder = r.Holder.PID
	}
	// Up is what would be so again after a crash; it is plugged a moment before.
	if live.Plugged && !a.since.IsZero() {
		out.State, out.Port, out.Caps, out.Traffic = api.StateUp, live.Port, live.Caps, describePort(live.Traffic)
	}
	if a.going {
		out.State = api.StateLeaving
	}
	for _, p := range a.publishes {
		out.Publish = append(out.Publish, p.describe())
	}
	return out
}

// FDB implements api.Backend.
func (n *Node) FDB(network string) ([]api.FDBEntry, error) {
	nw, err := n.lookup(network)
	if err != nil {
		return nil, err
	}
	out := make([]api.FDBEntry, 0, 16)
	for _, e := range nw.Status().FDB {
		out = append(out, api.FDBEntry{MAC: e.MAC, Port: e.Port, Age: e.Age.Seconds(), Static: e.Static})
	}
	slices.SortFunc(out, func(a, b api.FDBEntry) int {
		return cmp.Or(strings.Compare(a.Port, b.Port), slices.Compare(a.MAC[:], b.MAC[:]))
	})
	return out, nil
}

// Drops implements api.Backend.
func (n *Node) Drops(name string) ([]api.DropCount, error) {
	nets, err := n.named(name)
	if err != nil {
		return nil, err
	}
	out := make([]api.DropCount, 0, 16)
	for _, nw := range nets {
		for _, d := range nw.Status().Drops {
			out = append(out, api.DropCount{Network: nw.rec.Name, Reason: d.Reason, Count: d.Count, Meaning: d.Meaning})
		}
	}
	return out, nil
}

// Capture implements api.Backend.
func (n *Node) Capture(network string, spec api.CaptureSpec) (func(ctx context.Context, w io.Writer) error, error) {
	nw, err := n.lookup(network)
	if err != nil {
		return nil, err
	}
	c, err := nw.Capture(spec.Attachment, capture.Config{Filter: spec.Filter, SnapLen: spec.SnapLen, MaxFrames: spec.Count})
	if err != nil {
		return nil, refuse(api.CodeInvalid, err)
	}
	return c.Run, nil
}
