package tunnel

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"patchbay/frame"
	"patchbay/tunnel/udp"
	"patchbay/tunnel/vxlan"
)

// ErrTaken is in the chain of the error of a peer that is one already.
var ErrTaken = errors.New("already a peer")

// ErrClosed is in the chain of the error of a call on a VTEP or Peer that was closed before.
var ErrClosed = errors.New("closed")

// PeerConfig names a peer. VNI and Remote are required, but for the port.
type PeerConfig struct {
	// VNI is the network, at most vxlan.MaxVNI.
	VNI uint32
	// Remote is the address and port that the remote VTEP listens on; port 0 is vxlan.Port. Datagrams always go there, whatever port the peer
	// sends from.
	Remote netip.AddrPort
	// NoCut does without UDP_SEGMENT towards this peer.
	NoCut bool
	// OnePort sends from the listening port alone, for a peer behind a NAT, or several of one network on one address.
	OnePort bool
	// OnMTU hears that the largest inner IP packet that gets through, in bytes, is another than was known. It is called from inside Transmit and must
	// not block or call the Peer.
	OnMTU func(inner int)
	// Drops is where the Peer counts what it could not deliver, either way; nil gives it its own.
	Drops *frame.DropCounters
}

// PeerStats are the counters of a Peer, seen from the switch: rx is what comes from the peer. A superframe towards the peer is one frame, and what
// comes from it are its segments. Bytes are of inner frames.
type PeerStats struct {
	RxFrames, RxBytes uint64
	TxFrames          uint64
	// Sent is what became of the frames towards the peer, in datagrams, since the remote address was set.
	Sent udp.PathStats
	// Cut tells whether the kernel cuts datagrams for this peer, or why not.
	Cut udp.CutState
	// Heard is when the last frame came from the peer, to within a batch; zero for never.
	Heard time.Time
}

// Peer is one remote VTEP as seen by one network. It is a vswitch.Port, and safe for concurrent use.
type Peer struct {
	v     *VTEP
	cfg   PeerConfig
	drops *frame.DropCounters
	wire  wireFormat
	path  atomic.Pointer[udp.Path]
	sink  atomic.Pointer[sinkBox]
	// gate counts Transmits under way; Close adds closing to it, which makes it negative for good.
	gate   atomic.Int64
	closed atomic.Bool

	// Counters of the two directions are written by different goroutines.
	_        [64]byte
	txFrames atomic.Uint64
	_        [64]byte
	rx       struct {
		frames, bytes atomic.Uint64
		heard         atomic.Int64 // nanoseconds of VTEP.now, 0 for never
	}
	pending batch // of the receiving goroutine
}

type sinkBox struct{ frame.Sink }

const closing = -1 << 40

// AddPeer makes a peer. Frames from it are dropped until Attach gives it a sink. The errors wrap ErrTaken and ErrClosed.
func (v *VTEP) AddPeer(cfg PeerConfig) (*Peer, error) {
	if cfg.VNI > vxlan.MaxVNI {
		return nil, fmt.Errorf("add peer %v: VNI %d: want 0 to %d", cfg.Remote, cfg.VNI, vxlan.MaxVNI)
	}
	if cfg.Drops == nil {
		cfg.Drops = new(frame.DropCounters)
	}
	p := &Peer{v: v, cfg: cfg, drops: cfg.Drops, wire: newVXLANWire(cfg.VNI)}
	path, err := p.newPath(cfg.Remote)
	if err != nil {
		return nil, fmt.Errorf("add peer of VNI %d: %w", cfg.VNI, err)
	}
	p.path.Store(path)
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.closed {
		return nil, fmt.Errorf("add peer %v: %w", path.Remote(), ErrClosed)
	}
	set := v.peers.Load()
	if set.exact[peerKey{cfg.VNI, path.Remote()}] != nil {
		return nil, fmt.Errorf("add peer %v to VNI %d: it is %w: remove it first", path.Remote(), cfg.VNI, ErrTaken)
	}
	v.peers.Store(newPeerSet(append(slices.Clone(set.all), p)))
	v.cfg.Log.Info("peer added", "vni", cfg.VNI, "remote", path.Remote())
	return p, nil
}

func (p *Peer) newPath(remote netip.AddrPort) (*udp.Path, error) {
	if remote.Port() == 0 {
		remote = netip.AddrPortFrom(remote.Addr(), vxlan.Port)
	}
	if remote == p.v.LocalAddr() {
		return nil, fmt.Errorf("peer %v is this host's own end: leave it out of the list of peers", remote)
	}
	cfg := udp.PathConfig{NoCut: p.cfg.NoCut, OnePort: p.cfg.OnePort}
	if p.cfg.OnMTU != nil {
		addr := remote.Addr()
		cfg.OnMTU = func(mtu int) { p.cfg.OnMTU(InnerMTU(mtu, addr)) }
	}
	path, err := p.v.sock.NewPath(remote, cfg)
	if err == nil {
		_, _ = path.MTU() // without a route it stays unknown
	}
	return path, err
}

// SetRemote moves the peer to another address, where it has gone or its name leads now. Frames under way go to either. The errors wrap ErrTaken, when another
// peer of the network is there, and ErrClosed; then nothing has changed.
func (p *Peer) SetRemote(remote netip.AddrPort) error {
	path, err := p.newPath(remote)
	if err != nil {
		return fmt.Errorf("move peer of VNI %d: %w", p.cfg.VNI, err)
	}
	v := p.v
	v.mu.Lock()
	defer v.mu.Unlock()
	was := p.Remote()
	set := v.peers.Load()
	switch other := set.exact[peerKey{p.cfg.VNI, path.Remote()}]; {
	case p.closed.Load():
		return fmt.Errorf("move peer %v: %w", was, ErrClosed)
	case other == p:
		return nil
	case other != nil:
		return fmt.Errorf("move peer %v to %v: that is %w of VNI %d", was, path.Remote(), ErrTaken, p.cfg.VNI)
	}
	p.path.Store(path)
	v.peers.Store(newPeerSet(set.all))
	v.cfg.Log.Info("peer moved", "vni", p.cfg.VNI, "from", was, "to", path.Remote())
	return nil
}

// Attach says where frames from the peer go: to the Ingress of its port. Only the goroutine of Run calls it.
func (p *Peer) Attach(sink frame.Sink) { p.sink.Store(&sinkBox{sink}) }

// VNI is the network.
func (p *Peer) VNI() uint32 { return p.cfg.VNI }

// Remote is the address and port that datagrams go to.
func (p *Peer) Remote() netip.AddrPort { return p.path.Load().Remote() }

// Caps is nothing: every frame is finished here.
func (p *Peer) Caps() frame.Caps { return 0 }

// Drops is where the Peer counts what it could not deliver.
func (p *Peer) Drops() *frame.DropCounters { return p.drops }

// MTU is the largest inner IP packet in bytes that gets to the peer, as far as the kernel knows now. It fails without a route.
func (p *Peer) MTU() (int, error) {
	path := p.path.Load()
	n, err := path.MTU()
	if err != nil {
		return 0, fmt.Errorf("peer %v: %w", path.Remote(), err)
	}
	return InnerMTU(n, path.Remote().Addr()), nil
}

// innerMTU is MTU as it was last known, without asking.
func (p *Peer) innerMTU() int {
	path := p.path.Load()
	mtu := path.KnownMTU()
	if mtu == 0 {
		mtu = 1500
	}
	return InnerMTU(mtu, path.Remote().Addr())
}

// SuspendCut does without UDP_SEGMENT for a while; see udp.Path.SuspendCut.
func (p *Peer) SuspendCut() { p.path.Load().SuspendCut() }

// Stats reads the counters, one after the other while traffic goes on.
func (p *Peer) Stats() PeerStats {
	path := p.path.Load()
	s := PeerStats{
		RxFrames: p.rx.frames.Load(), RxBytes: p.rx.bytes.Load(), TxFrames: p.txFrames.Load(),
		Sent: path.Stats(), Cut: path.Cut(),
	}
	if ns := p.rx.heard.Load(); ns != 0 {
		s.Heard = p.v.start.Add(time.Duration(ns))
	}
	return s
}

// Close removes the peer. It returns when no Transmit on it and no Forward to its sink is under way; later ones drop (DropPortDown). Idempotent. It must
// not be called from inside either.
func (p *Peer) Close() {
	v := p.v
	v.mu.Lock()
	defer v.mu.Unlock()
	if p.closed.Swap(true) {
		return
	}
	v.peers.Store(newPeerSet(slices.DeleteFunc(slices.Clone(v.peers.Load().all), func(q *Peer) bool { return q == p })))
	v.settle()
	p.gate.Add(closing)
	for p.gate.Load() != closing {
		time.Sleep(50 * time.Microsecond)
	}
	v.cfg.Log.Info("peer removed", "vni", p.cfg.VNI, "remote", p.Remote())
}
