package node

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"

	"patchbay/internal/wire"
	vswitch "patchbay/switch"
	"patchbay/tunnel"
)

// peerGroup is the split-horizon group of a network's peers and its gateway. Of two peers neither needs the other's frames, since each has them from their source (full mesh, no
// loops). The gateway has the same address on every node: what it says (ARP, ND, router advertisements, DHCP) is for the containers of its own node, and theirs for it alone.
const peerGroup = 1

// Defaults of PeerConfig: a peer is a whole node, which limits each of its containers itself.
const (
	DefaultPeerMACLimit   = 8192
	DefaultPeerStormLimit = 50000
)

// PeerConfig describes a peer. Name and Remote are required; the zero value of every other field is its documented default.
type PeerConfig struct {
	// Name of the port on the switch. With a colon in it no attachment has it.
	Name string
	// Remote is the address and UDP port of the other node.
	Remote netip.AddrPort
	// Wire is how frames travel.
	Wire tunnel.Wire
	// Seal is that of tunnel.PeerConfig: a sealed network demands one.
	Seal *tunnel.Seal
	// NoCut and OnePort are those of tunnel.PeerConfig.
	NoCut, OnePort bool
	// FDB are MACs that live behind the peer.
	FDB []wire.MAC
	// MACLimit is how many MACs are learned behind the peer, StormLimit how many frames a second from it are flooded. Default DefaultPeerMACLimit and DefaultPeerStormLimit.
	MACLimit, StormLimit int
	// OnMTU hears that another inner MTU was found towards the peer. As tunnel.PeerConfig.OnMTU it must not block or call the Peer.
	OnMTU func(inner int)
	// OnState hears of each change of the state; likewise.
	OnState func(tunnel.PeerState)
}

// Peer is the node on another host as one port of a network's switch. It is safe for concurrent use.
type Peer struct {
	*tunnel.Peer
	network *Network
	name    string
	port    atomic.Uint32 // of the switch; 0 until it is plugged
	once    sync.Once
	err     error
}

// AddPeer makes a peer that v reaches. Frames flow when it returns. On an isolated network the peer is isolated like an attachment, so that nobody gets around isolation by way of another
// host. Sources behind the peer are learned, but for those that are a local attachment's or the gateway's: frames that claim them are dropped. What was learned is forgotten when the peer
// goes down or starts anew. The error has tunnel.ErrTaken in its chain when the network has a peer there.
func (n *Network) AddPeer(v *tunnel.VTEP, cfg PeerConfig) (_ *Peer, err error) {
	if n.cfg.VNI == 0 {
		return nil, fmt.Errorf("network %q has no VNI; make it with --vni, the same on all its nodes", n.cfg.Name)
	}
	if n.cfg.Seal && cfg.Seal == nil {
		return nil, fmt.Errorf("network %q is sealed, and peer %q is not: give it a seal", n.cfg.Name, cfg.Name)
	}
	p := &Peer{network: n, name: cfg.Name}
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil, n.closing()
	}
	n.peers[p] = struct{}{}
	n.mu.Unlock()
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	tp, err := v.AddPeer(tunnel.PeerConfig{
		VNI: n.cfg.VNI, Remote: cfg.Remote, Wire: cfg.Wire, Seal: cfg.Seal, NoCut: cfg.NoCut, OnePort: cfg.OnePort,
		OnMTU:    cfg.OnMTU,
		OnTooBig: n.gw.AnswerTooBig,
		OnState: func(s tunnel.PeerState) {
			if s == tunnel.PeerDown {
				n.sw.Flush(vswitch.PortID(p.port.Load())) // unlike RemovePort it waits for no Forward
			}
			if cfg.OnState != nil {
				cfg.OnState(s)
			}
		},
	})
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	p.Peer = tp
	n.mu.Unlock()
	id, err := n.sw.AddPort(tp, vswitch.PortConfig{
		Name: cfg.Name, Group: peerGroup, Isolated: n.cfg.Isolate,
		MACLimit: cmp.Or(cfg.MACLimit, DefaultPeerMACLimit), StormLimit: cmp.Or(cfg.StormLimit, DefaultPeerStormLimit),
	})
	if err != nil {
		return nil, err
	}
	p.port.Store(uint32(id))
	for _, m := range cfg.FDB {
		if err := n.sw.AddStatic(id, m); err != nil {
			return nil, err
		}
	}
	tp.Attach(n.sw.Ingress(id))
	n.log.Info("peer up", "network", n.cfg.Name, "peer", cfg.Name, "remote", tp.Remote(), "wire", cfg.Wire)
	return p, nil
}

// AddFDB says that mac lives behind the peer, for good.
func (p *Peer) AddFDB(mac wire.MAC) error {
	return p.network.sw.AddStatic(vswitch.PortID(p.port.Load()), mac)
}

// RemoveFDB takes AddFDB back.
func (p *Peer) RemoveFDB(mac wire.MAC) {
	p.network.sw.RemoveStatic(vswitch.PortID(p.port.Load()), mac)
}

// Flush forgets what was learned behind the peer: it is another one now.
func (p *Peer) Flush() { p.network.sw.Flush(vswitch.PortID(p.port.Load())) }

// Close takes the peer off the switch, forgets what was learned behind it and ends it. Idempotent; no frame passes when it returns. It must not be called from inside a callback.
func (p *Peer) Close() error {
	p.once.Do(func() {
		n := p.network
		n.mu.Lock()
		tp := p.Peer
		n.mu.Unlock()
		if id := p.port.Load(); id != 0 {
			p.err = n.sw.RemovePort(vswitch.PortID(id))
		}
		if tp != nil {
			tp.Close()
		}
		n.mu.Lock()
		delete(n.peers, p)
		n.mu.Unlock()
		if tp != nil {
			n.retire(tp)
		}
	})
	return p.err
}

// Peers are those that are there, in no order.
func (n *Network) Peers() (out []*Peer) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for p := range n.peers {
		if p.Peer != nil {
			out = append(out, p)
		}
	}
	return out
}
