package daemon

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"patchbay/frame"
	"patchbay/internal/api"
	"patchbay/internal/node"
	"patchbay/internal/wire"
	"patchbay/tunnel"
)

// MaxPeers bounds the peers of one network: each gets a copy of every broadcast.
const MaxPeers = 1024

const (
	// resolveWithin bounds a question to the resolver.
	resolveWithin = 3 * time.Second
	// peerLook is how often a peer is looked at.
	peerLook = time.Second
	// retryFirst is the pause before a peer that did not come up, or is silent, is tried again. The next ones are twice as long each, up to retrySeldom.
	retryFirst  = time.Second
	retrySeldom = 30 * time.Second
	// settleAfter is how long a smaller MTU must have stood before the network follows: while a path is searched it moves.
	settleAfter = 5 * time.Second
	// silence is how long a peer may say nothing before its name is looked up again, if it never answered.
	silence = 5 * time.Second
	// kernelSilence is that of a peer that answers no probes: it may just have nothing to say.
	kernelSilence = time.Minute
)

// peerRecord is a peer on disk, as it was asked for.
type peerRecord struct {
	api.PeerSpec
	Network string
	// Last is the address that it had last: after a restart it is there until its name says otherwise.
	Last    netip.AddrPort
	Created time.Time
	Origin  string
}

// stateKey is what the record is kept under.
func (r *peerRecord) stateKey() string { return r.Network + "/" + api.PeerRef(r.Host, r.Port) }

// peer is a peer of a network: in live, or on its way there.
type peer struct {
	node     *Node
	network  *network
	rec      peerRecord // FDB, Last and Origin change under mu
	cancel   context.CancelFunc
	ctx      context.Context
	done     chan struct{} // closed when nobody looks after it any more
	kick     chan struct{}
	looking  bool        // guarded by network.peering
	told     *resolution // where its name leads, for the first try; nil: to be asked
	sessions []byte      // of the node before, for the first try; guarded by mu

	saving sync.Mutex // held while rec is written
	gone   bool       // guarded by saving: it is on disk no more

	mu    sync.Mutex // of what follows; held while it connects
	live  *node.Peer // nil while it waits
	vtep  *vtep
	err   error // why it waits, or why its name leads nowhere
	since time.Time
	retry time.Time
	pause time.Duration
	mtu   int // that the network goes by
	seen  struct {
		mtu   int
		since time.Time
	}
	state tunnel.PeerState // as it was looked at last
}

// listenPort is the UDP port of a network's tunnels.
func (n *Node) listenPort(nw *network) uint16 { return cmp.Or(nw.rec.Port, n.cfg.Listen.Port()) }

// peerKey is what a peer of a network is found by: HOST:PORT.
func (n *Node) peerKey(nw *network, host string, port uint16) string {
	return api.PeerRef(host, cmp.Or(port, n.listenPort(nw)))
}

// AddPeer implements api.Backend.
func (n *Node) AddPeer(ctx context.Context, network string, spec api.PeerSpec) (api.Peer, error) {
	end, err := n.begin()
	if err != nil {
		return api.Peer{}, err
	}
	defer end()
	p, err := n.addPeer(ctx, network, spec, originAPI, time.Now().UTC(), nil)
	if err != nil {
		return api.Peer{}, err
	}
	return p.describe(), nil
}

func (n *Node) addPeer(ctx context.Context, network string, spec api.PeerSpec, origin string, created time.Time, told *resolution) (*peer, error) {
	host, _, err := api.ParsePeer(spec.Host)
	if err != nil {
		return nil, err
	}
	spec.Host = host
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	nw, err := n.lookup(network)
	if err != nil {
		return nil, err
	}
	ref := api.PeerRef(spec.Host, spec.Port)
	if nw.rec.VNI == 0 {
		return nil, api.Errorf(api.CodeInvalid, "make the network with --vni N, the same on all its nodes", "peer %q: network %q has no VNI", ref, nw.rec.Name)
	}
	if err := n.sealing(&nw.rec.NetworkSpec); err != nil {
		return nil, fmt.Errorf("peer %q: %w", ref, err)
	}
	nw.peering.Lock()
	defer nw.peering.Unlock()
	p := n.newPeer(nw, peerRecord{PeerSpec: spec, Network: nw.rec.Name, Created: created, Origin: origin})
	p.told = told
	if err := n.claimPeer(p); err != nil {
		return nil, err
	}
	if err := p.connect(ctx); err != nil && !transient(err) {
		n.dropPeer(p)
		return nil, fmt.Errorf("peer %q of network %q: %w", ref, nw.rec.Name, refuse(api.CodeInvalid, err))
	}
	if err := p.save(); err != nil {
		n.dropPeer(p)
		return nil, err
	}
	p.look()
	n.settleMTU(nw)
	n.log.Info("peer added", "network", nw.rec.Name, "peer", ref, "origin", origin)
	return p, nil
}

func (n *Node) newPeer(nw *network, rec peerRecord) *peer {
	p := &peer{node: n, network: nw, rec: rec, done: make(chan struct{}), kick: make(chan struct{}, 1), since: time.Now()}
	p.ctx, p.cancel = context.WithCancel(n.ctx)
	return p
}

// claimPeer puts p into its network's table.
func (n *Node) claimPeer(p *peer) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	nw := p.network
	key := n.peerKey(nw, p.rec.Host, p.rec.Port)
	switch err := n.busy(); {
	case err != nil:
		return err
	case n.networks[nw.rec.Name] != nw:
		return api.Errorf(api.CodeNotFound, "`patchbay network ls` shows those there are", "network %q has been removed", nw.rec.Name)
	case nw.peers[key] != nil:
		return api.Errorf(api.CodeConflict, "remove it first with `patchbay peer rm "+nw.rec.Name+" "+key+"`", "network %q has a peer %s already", nw.rec.Name, key)
	case len(nw.peers) >= MaxPeers:
		return api.Errorf(api.CodeExhausted, "remove one; in a network of this size not every node need be every other's peer", "network %q has %d peers, which is the limit", nw.rec.Name, MaxPeers)
	}
	nw.peers[key] = p
	return nil
}

// dropPeer takes p out again, of a network that nobody else changes.
func (n *Node) dropPeer(p *peer) {
	p.stop()
	n.mu.Lock()
	delete(p.network.peers, n.peerKey(p.network, p.rec.Host, p.rec.Port))
	n.mu.Unlock()
}

// findPeer finds one as people write it.
func (n *Node) findPeer(network, ref string) (*network, *peer, error) {
	host, port, err := api.ParsePeer(ref)
	if err != nil {
		return nil, nil, err
	}
	nw, err := n.lookup(network)
	if err != nil {
		return nil, nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.busy(); err != nil {
		return nil, nil, err
	}
	if p := nw.peers[n.peerKey(nw, host, port)]; p != nil {
		return nw, p, nil
	}
	return nil, nil, api.Errorf(api.CodeNotFound, "`patchbay peer ls "+nw.rec.Name+"` shows those there are", "network %q has no peer %q", nw.rec.Name, ref)
}

// RemovePeer implements api.Backend.
func (n *Node) RemovePeer(_ context.Context, network, ref string) error {
	end, err := n.begin()
	if err != nil {
		return err
	}
	defer end()
	nw, _, err := n.findPeer(network, ref)
	if err != nil {
		return err
	}
	nw.peering.Lock()
	defer nw.peering.Unlock()
	_, p, err := n.findPeer(network, ref) // whoever was here before may have taken it
	if err != nil {
		return err
	}
	p.saving.Lock()
	err = n.state.remove(peerBucket, p.rec.stateKey())
	p.gone = err == nil
	p.saving.Unlock()
	if err != nil {
		return err
	}
	n.dropPeer(p)
	n.settleMTU(nw)
	n.log.Info("peer removed", "network", nw.rec.Name, "peer", ref)
	return nil
}

// AddPeerFDB implements api.Backend.
func (n *Node) AddPeerFDB(_ context.Context, network, ref string, mac wire.MAC) (api.Peer, error) {
	return n.changeFDB(network, ref, func(p *peer, have []wire.MAC) ([]wire.MAC, error) {
		if slices.Contains(have, mac) {
			return nil, api.Errorf(api.CodeConflict, "it is there already", "static entry %s of peer %q", mac, ref)
		}
		if len(have) >= api.MaxPeerFDB {
			return nil, api.Errorf(api.CodeExhausted, "remove one", "peer %q has %d static entries, which is the limit", ref, len(have))
		}
		if p.live != nil {
			if err := p.live.AddFDB(mac); err != nil {
				return nil, refuse(api.CodeConflict, err)
			}
		}
		return append(slices.Clone(have), mac), nil
	})
}

// RemovePeerFDB implements api.Backend.
func (n *Node) RemovePeerFDB(_ context.Context, network, ref string, mac wire.MAC) (api.Peer, error) {
	return n.changeFDB(network, ref, func(p *peer, have []wire.MAC) ([]wire.MAC, error) {
		if !slices.Contains(have, mac) {
			return nil, api.Errorf(api.CodeNotFound, "`patchbay peer fdb ls "+network+" "+ref+"` shows those there are", "peer %q has no static entry %s", ref, mac)
		}
		if p.live != nil {
			p.live.RemoveFDB(mac)
		}
		return slices.DeleteFunc(slices.Clone(have), func(m wire.MAC) bool { return m == mac }), nil
	})
}

// changeFDB changes a peer's static entries on disk too. What change has done to the switch stays when the disk refuses, until the next start.
func (n *Node) changeFDB(network, ref string, change func(p *peer, have []wire.MAC) ([]wire.MAC, error)) (api.Peer, error) {
	end, err := n.begin()
	if err != nil {
		return api.Peer{}, err
	}
	defer end()
	nw, _, err := n.findPeer(network, ref)
	if err != nil {
		return api.Peer{}, err
	}
	nw.peering.Lock()
	defer nw.peering.Unlock()
	_, p, err := n.findPeer(network, ref)
	if err != nil {
		return api.Peer{}, err
	}
	p.mu.Lock()
	fdb, err := change(p, p.rec.FDB)
	if err == nil {
		p.rec.FDB = fdb
	}
	p.mu.Unlock()
	if err == nil {
		err = p.save()
	}
	if err != nil {
		return api.Peer{}, err
	}
	return p.describe(), nil
}

// Peers implements api.Backend.
func (n *Node) Peers(name string) ([]api.Peer, error) {
	nets, err := n.named(name)
	if err != nil {
		return nil, err
	}
	out := make([]api.Peer, 0, 16)
	for _, nw := range nets {
		for _, p := range n.peersOf(nw) {
			out = append(out, p.describe())
		}
	}
	return out, nil
}

// peersOf are a network's peers by host and port.
func (n *Node) peersOf(nw *network) []*peer {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := make([]*peer, 0, len(nw.peers))
	for _, key := range slices.Sorted(maps.Keys(nw.peers)) {
		out = append(out, nw.peers[key])
	}
	return out
}

// describe is p for the API.
func (p *peer) describe() api.Peer {
	p.mu.Lock()
	defer p.mu.Unlock()
	n, nw := p.node, p.network
	out := api.Peer{PeerSpec: p.rec.PeerSpec, Network: nw.rec.Name, State: api.PeerWaiting, Since: p.since, Created: p.rec.Created, Origin: p.rec.Origin}
	out.Port = cmp.Or(p.rec.Port, n.listenPort(nw))
	out.Wire = p.wire()
	out.FDB = slices.Clone(p.rec.FDB)
	if p.err != nil {
		out.Error = strings.ReplaceAll(p.err.Error(), "\n", "; ")
	}
	if p.live == nil {
		return out
	}
	st := p.live.Stats()
	out.Address = p.live.Remote()
	out.State, out.Since, out.Heard = api.PeerState(st.State.String()), st.Since, st.Heard
	out.RTT, out.Loss, out.Reordered = st.RTT.Seconds(), st.Loss, st.Reordered
	out.Mode, out.Offloads, out.MTU = st.Mode, st.Cut.String(), st.MTU
	out.Sealed, out.SealError, out.Handshakes = st.Sealed, st.SealError, st.Handshakes
	out.RxFrames, out.RxBytes, out.TxFrames, out.TxBytes = st.RxFrames, st.RxBytes, st.TxFrames, st.Sent.Bytes
	p.live.Drops().Each(func(d frame.Drop, c uint64) {
		out.Drops = append(out.Drops, api.DropCount{Network: nw.rec.Name, Reason: d.String(), Count: c, Meaning: d.Meaning()})
	})
	return out
}

// wire is how frames travel to p.
func (p *peer) wire() api.Wire {
	return cmp.Or(p.rec.Wire, p.network.rec.Wire, api.WireVXLAN)
}
