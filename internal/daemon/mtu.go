package daemon

import (
	"patchbay/internal/api"
	"patchbay/tunnel"
)

// saveNetwork changes a network's record and writes it.
func (n *Node) saveNetwork(nw *network, change func(*networkRecord)) error {
	nw.saving.Lock()
	defer nw.saving.Unlock()
	n.mu.Lock()
	change(&nw.rec)
	rec := nw.rec
	n.mu.Unlock()
	rec.MTU = nw.MTU()
	return n.state.put(networkBucket, rec.Name, rec)
}

// record is a copy of a network's record as it is now.
func (n *Node) record(nw *network) networkRecord {
	n.mu.Lock()
	rec := nw.rec
	n.mu.Unlock()
	rec.MTU = nw.MTU()
	return rec
}

// tunnelMTU is what a network without peers can carry to some: the MTU of the interface that they will be reached by, less the tunnel's headers.
func (n *Node) tunnelMTU(spec *api.NetworkSpec) (int, error) {
	w, err := tunnel.ParseWire(string(spec.Wire))
	if err != nil {
		return 0, err
	}
	mtu, like := underlayMTU(n.cfg.Listen.Addr())
	return clampMTU(tunnel.InnerMTU(mtu, w, spec.Seal, like), spec), nil
}

// clampMTU keeps an MTU within what a network can have.
func clampMTU(mtu int, spec *api.NetworkSpec) int {
	lowest := api.MinMTU
	for _, p := range spec.Subnets {
		if p.Addr().Is6() {
			lowest = api.MinMTU6
		}
	}
	return min(max(mtu, lowest), api.MaxMTU)
}

// settleMTU has a network's MTU, unless one was asked for, follow what its peers' paths carry: down when that has stood for a while, up only while nothing is attached, since what is there would not hear of it and
// what comes later would send it too much.
func (n *Node) settleMTU(nw *network) {
	n.mu.Lock()
	auto, spec, attached, busy := nw.rec.AutoMTU, nw.rec.NetworkSpec, len(nw.attachments), n.busy()
	n.mu.Unlock()
	if !auto || busy != nil {
		return
	}
	want := 0
	for _, p := range n.peersOf(nw) {
		p.mu.Lock()
		if p.mtu > 0 && (want == 0 || p.mtu < want) {
			want = p.mtu
		}
		p.mu.Unlock()
	}
	if want == 0 {
		var err error
		if want, err = n.tunnelMTU(&spec); err != nil {
			return
		}
	}
	want = clampMTU(want, &spec)
	have := nw.MTU()
	if want == have || want > have && attached > 0 {
		return
	}
	err := nw.SetMTU(want)
	if err == nil {
		err = n.saveNetwork(nw, func(*networkRecord) {})
	}
	if err != nil {
		n.log.Warn("MTU stays", "network", nw.rec.Name, "mtu", have, "reason", err)
		return
	}
	n.log.Info("MTU follows the path", "network", nw.rec.Name, "mtu", want, "was", have)
}
