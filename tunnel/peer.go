package tunnel

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
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
	// Wire is how frames travel to the peer.
	Wire Wire
	// NoCut does without UDP_SEGMENT towards this peer.
	NoCut bool
	// OnePort sends from the listening port alone, for a peer behind a NAT, or several of one network on one address.
	OnePort bool
	// OnMTU hears that the largest inner IP packet that gets through, in bytes, is another than was known. It is called from inside Transmit, or by the goroutines of Run, and must
	// not block or call the Peer.
	OnMTU func(inner int)
	// OnTooBig gets, at most 100 times a second, a frame that was dropped because an IP packet in it, or a segment of it, is longer than mtu bytes, the most that gets to the peer:
	// somebody is to tell the sender (RFC 1191, RFC 8201). The frame is lent. It is called from inside Transmit and must not block or call the Peer.
	OnTooBig func(f []byte, mtu int)
	// Seal has everything sealed, both ways; nil is clear. A sealed peer is never sent anything clear, nor is anything clear taken from it. Frames travel as on WirePatchbay; with WireVXLAN superframes
	// are always cut into segments first. Such a peer is followed to another address when it is heard and answers there.
	Seal *Seal
	// OnState hears of each change of PeerStats.State. A peer that has started anew is PeerDown and PeerUp in a row. It is called by the goroutines of Run and must not block or close
	// the Peer.
	OnState func(PeerState)
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
	// Heard is when the last frame or message came from the peer, to within a batch; zero for never.
	Heard time.Time
	// State is whether the peer is there, and Since when it has been so.
	State PeerState
	Since time.Time
	// RTT is the smoothed round-trip time of probes (RFC 6298 §2); 0 while unknown. It contains the time that both hosts take to wake up.
	RTT time.Duration
	// Loss is the share of the datagrams sent in the last ten seconds or so that did not arrive, by the peer's own count; 0 while unknown.
	Loss float64
	// Reordered is how many messages from the peer came after at least three later ones, or in parts out of order; on WirePatchbay alone.
	Reordered uint64
	// Wire is PeerConfig.Wire. Mode is "superframes" or "segments" on WirePatchbay, and empty on WireVXLAN.
	// ModeChanges is how often the mode has changed.
	Wire        Wire
	Mode        string
	ModeChanges uint64
	// MTU is the largest inner IP packet in bytes that gets to the peer, as was last known; 0 while unknown.
	MTU int
	// Sealed is whether what travels is encrypted and authenticated: of a sealed peer, whether there are keys. Handshakes is how many led to keys. SealError says in one line why the last handshake failed; empty after one that did not.
	Sealed     bool
	Handshakes uint64
	SealError  string
}

// Peer is one remote VTEP as seen by one network. It is a vswitch.Port, and safe for concurrent use.
type Peer struct {
	v     *VTEP
	cfg   PeerConfig
	drops *frame.DropCounters
	wire  wireFormat
	seal  *seal // nil for a clear peer
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
		frames, bytes, datagrams atomic.Uint64
		lost, reordered          atomic.Uint64 // messages; on WirePatchbay
		heard                    atomic.Int64  // nanoseconds of VTEP.now, 0 for never
	}
	pending batch // of the receiving goroutine

	hurried    atomic.Bool // the next probe is to go soon, with what has got lost
	live       liveness
	sentBefore atomic.Uint64      // datagrams, on earlier paths
	unsaid     frame.DropCounters // control messages that could not be sent: of no interest but to tests
	limit      atomic.Int64       // live.pmtu.limit, for the data plane
	tuning     sync.Mutex         // held while OnMTU is told
	told       atomic.Int64       // inner MTU that OnMTU knows
	routeAsked atomic.Int64       // nanoseconds of VTEP.now
	bigs       perSecond          // OnTooBig
	replies    perSecond
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
	p := &Peer{v: v, cfg: cfg, drops: cfg.Drops}
	path, err := p.newPath(cfg.Remote)
	if err != nil {
		return nil, fmt.Errorf("add peer of VNI %d: %w", cfg.VNI, err)
	}
	if cfg.Seal != nil {
		if p.seal, err = p.newSeal(cfg.Seal); err != nil {
			return nil, fmt.Errorf("add peer %v: %w", path.Remote(), err)
		}
		p.live.state = PeerHandshake
	}
	p.wire = newWire(p)
	p.path.Store(path)
	p.told.Store(int64(p.innerMTU()))
	p.live.since = v.now()
	if p.seal != nil {
		p.seal.inherit(cfg.Seal)
	}
	if err := v.admit(p); err != nil {
		if p.seal != nil {
			p.seal.close()
		}
		return nil, err
	}
	if p.seal != nil {
		v.links.startLink(p.seal)
	}
	v.cfg.Log.Info("peer added", "vni", cfg.VNI, "remote", path.Remote())
	v.kick()
	return p, nil
}

// admit makes p one of the peers.
func (v *VTEP) admit(p *Peer) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	remote := p.Remote()
	if v.closed {
		return fmt.Errorf("add peer %v: %w", remote, ErrClosed)
	}
	set := v.peers.Load()
	if set.exact[peerKey{p.cfg.VNI, remote}] != nil {
		return fmt.Errorf("add peer %v to VNI %d: it is %w: remove it first", remote, p.cfg.VNI, ErrTaken)
	}
	v.peers.Store(newPeerSet(append(slices.Clone(set.all), p)))
	return nil
}

func (p *Peer) newPath(remote netip.AddrPort) (*udp.Path, error) {
	if remote.Port() == 0 {
		remote = netip.AddrPortFrom(remote.Addr(), vxlan.Port)
	}
	if remote == p.v.LocalAddr() {
		return nil, fmt.Errorf("peer %v is this host's own end: leave it out of the list of peers", remote)
	}
	// On the patchbay wire one port keeps the order of messages, and their parts together.
	cfg := udp.PathConfig{NoCut: p.cfg.NoCut, OnePort: p.cfg.OnePort || p.cfg.Wire == WirePatchbay || p.cfg.Seal != nil}
	cfg.OnMTU = func(int) { p.retune() }
	path, err := p.v.sock.NewPath(remote, cfg)
	if err == nil {
		_, _ = path.MTU() // without a route it stays unknown
	}
	return path, err
}

// SetRemote moves the peer to another address, where it has gone or its name leads now. Frames under way go to either. The errors wrap ErrTaken, when another
// peer of the network is there, and ErrClosed; then nothing has changed.
func (p *Peer) SetRemote(remote netip.AddrPort) error { return p.move(remote, true) }

// move is SetRemote. said is whether the peer was said to be there, and has not merely been heard there.
func (p *Peer) move(remote netip.AddrPort, said bool) error {
	path, err := p.newPath(remote)
	if err != nil {
		return fmt.Errorf("move peer of VNI %d: %w", p.cfg.VNI, err)
	}
	v := p.v
	v.mu.Lock()
	defer v.mu.Unlock()
	was := p.Remote()
	if said && p.seal != nil {
		p.seal.home = path.Remote()
	}
	set := v.peers.Load()
	switch other := set.exact[peerKey{p.cfg.VNI, path.Remote()}]; {
	case p.closed.Load():
		return fmt.Errorf("move peer %v: %w", was, ErrClosed)
	case other == p:
		return nil
	case other != nil:
		return fmt.Errorf("move peer %v to %v: that is %w of VNI %d", was, path.Remote(), ErrTaken, p.cfg.VNI)
	}
	p.sentBefore.Add(p.path.Load().Stats().Datagrams)
	p.path.Store(path)
	p.live.mu.Lock()
	p.live.move()
	p.live.mu.Unlock()
	p.limit.Store(0)
	v.kick()
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

// Caps is nothing on the VXLAN wire, where every frame is finished here, and everything on the patchbay wire and where frames are sealed.
func (p *Peer) Caps() frame.Caps {
	if p.cfg.Wire == WirePatchbay || p.seal != nil {
		return frame.CapAll
	}
	return 0
}

// Drops is where the Peer counts what it could not deliver.
func (p *Peer) Drops() *frame.DropCounters { return p.drops }

// MTU is the largest inner IP packet in bytes that gets to the peer, as far as the kernel knows now and probes have found out. It fails without a route.
func (p *Peer) MTU() (int, error) {
	path := p.path.Load()
	if _, err := path.MTU(); err != nil {
		return 0, fmt.Errorf("peer %v: %w", path.Remote(), err)
	}
	return p.innerMTU(), nil
}

// innerMTU is MTU as it was last known, without asking.
func (p *Peer) innerMTU() int {
	path := p.path.Load()
	return p.inner(p.pathMTU(path), path)
}

// pathMTU is the largest IP packet in bytes that is thought to get through.
func (p *Peer) pathMTU(path *udp.Path) int {
	mtu := path.KnownMTU()
	if mtu == 0 {
		mtu = 1500
	}
	if limit := int(p.limit.Load()); limit != 0 {
		mtu = min(mtu, limit)
	}
	return mtu
}

// inner is InnerMTU on this peer's wire.
func (p *Peer) inner(pathMTU int, path *udp.Path) int {
	return InnerMTU(pathMTU, p.cfg.Wire, p.seal != nil, path.Remote().Addr())
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
	if path.KnownMTU() != 0 {
		s.MTU = p.innerMTU()
	}
	s.Reordered, s.Wire = p.rx.reordered.Load(), p.cfg.Wire
	if w, ok := p.wire.(*superWire); ok {
		s.Mode, s.ModeChanges = w.adapt.mode(), w.adapt.changes.Load()
	}
	if p.seal != nil {
		st := p.seal.link.Stats()
		s.Sealed, s.Handshakes, s.SealError = st.Sealed, st.Handshakes, st.LastError
	}
	p.live.mu.Lock()
	s.State, s.Since, s.RTT, s.Loss = p.live.state, p.v.start.Add(time.Duration(p.live.since)), p.live.rtt, p.live.loss.share()
	p.live.mu.Unlock()
	return s
}

// Close removes the peer. It returns when no Transmit on it and no Forward to its sink is under way; later ones drop (DropPortDown). Idempotent. It must
// not be called from inside either.
func (p *Peer) Close() {
	if p.leave() && p.seal != nil {
		p.seal.close()
	}
}

// leave is Close but for the link. It is false when the peer has been closed before.
func (p *Peer) leave() bool {
	v := p.v
	v.mu.Lock()
	defer v.mu.Unlock()
	if p.closed.Swap(true) {
		return false
	}
	v.peers.Store(newPeerSet(slices.DeleteFunc(slices.Clone(v.peers.Load().all), func(q *Peer) bool { return q == p })))
	v.settle()
	p.gate.Add(closing)
	for p.gate.Load() != closing {
		time.Sleep(50 * time.Microsecond)
	}
	v.cfg.Log.Info("peer removed", "vni", p.cfg.VNI, "remote", p.Remote())
	return true
}
