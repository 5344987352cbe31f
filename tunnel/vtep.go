package tunnel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"patchbay/frame"
	"patchbay/internal/wire"
	"patchbay/tunnel/udp"
	"patchbay/tunnel/vxlan"
)

// DefaultPorts is how many ports a VTEP sends from unless Config says otherwise: enough for a few queues and paths of the underlay to share the
// load, few enough that datagrams still go out many at a time.
const DefaultPorts = 4

// Config says where a VTEP listens. The zero value is port 4789 of every address, both IP versions.
type Config struct {
	// Listen is the address and port; port 0 is vxlan.Port, the zero address takes both IP versions.
	Listen netip.AddrPort
	// Ports is how many ports datagrams are sent from, chosen by the inner flow; 0 means DefaultPorts, 1 is the listening port alone.
	Ports int
	// Buffer, NoCut, NoJoin and Spin are those of udp.Config.
	Buffer        int
	NoCut, NoJoin bool
	Spin          time.Duration
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Drops is where the VTEP counts what belongs to no peer; nil gives it its own.
	Drops *frame.DropCounters
	// Log hears of peers that come and go; nil means slog.Default.
	Log *slog.Logger
	// FDs are the descriptors of another VTEP's Export, to go on with instead of opening any. They are taken over, on error too.
	FDs []int
}

// VTEP is this host's end of the tunnels. It is safe for concurrent use.
type VTEP struct {
	cfg   Config
	sock  *udp.Socket
	drops *frame.DropCounters
	start time.Time
	peers atomic.Pointer[peerSet]
	// epoch is odd while a received batch is being handled; Peer.Close waits for that.
	epoch atomic.Uint64
	rx    receiver

	links    links
	instance uint64        // random, of this start
	kicks    chan struct{} // has the prober look

	mu     sync.Mutex // guards closed and changes of peers
	closed bool
}

// Listen makes a VTEP, in the network namespace of the calling thread. Nothing is received before Run.
func Listen(cfg Config) (*VTEP, error) {
	if cfg.Listen.Port() == 0 {
		cfg.Listen = netip.AddrPortFrom(cfg.Listen.Addr(), vxlan.Port)
	}
	if cfg.Ports == 0 {
		cfg.Ports = DefaultPorts
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Drops == nil {
		cfg.Drops = new(frame.DropCounters)
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	sock, err := udp.Listen(udp.Config{Listen: cfg.Listen, Ports: cfg.Ports, Buffer: cfg.Buffer, NoCut: cfg.NoCut, NoJoin: cfg.NoJoin, Spin: cfg.Spin, Now: cfg.Now, FDs: cfg.FDs})
	if err != nil {
		return nil, fmt.Errorf("tunnel: %w", err)
	}
	v := &VTEP{cfg: cfg, sock: sock, drops: cfg.Drops, start: cfg.Now(), instance: rand.Uint64() | 1, kicks: make(chan struct{}, 1)}
	v.peers.Store(&peerSet{})
	return v, nil
}

// Run receives and forwards until ctx is done or the VTEP is closed (nil). It blocks, and runs once at a time. The error of a Run that comes too late
// wraps ErrClosed.
func (v *VTEP) Run(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	var prober sync.WaitGroup
	prober.Go(func() { v.probe(ctx) })
	stopLinks := v.runLinks(ctx)
	defer prober.Wait()
	defer stopLinks()
	defer stop()
	switch err := v.sock.Serve(ctx, (*handler)(v)); {
	case errors.Is(err, udp.ErrClosed):
		return fmt.Errorf("tunnel at %v: %w", v.LocalAddr(), ErrClosed)
	case err != nil:
		return fmt.Errorf("tunnel: %w", err)
	}
	return nil
}

// LocalAddr is the address and port the VTEP listens on.
func (v *VTEP) LocalAddr() netip.AddrPort { return v.sock.LocalAddr() }

// Drops is where the VTEP counts datagrams that belong to no peer.
func (v *VTEP) Drops() *frame.DropCounters { return v.drops }

// Socket is the counters of the socket itself.
func (v *VTEP) Socket() udp.Stats { return v.sock.Stats() }

// MaxSegments is how many datagrams the kernel cuts out of one message; 0 where it cuts none.
func (v *VTEP) MaxSegments() int { return v.sock.MaxSegments() }

// Export duplicates the descriptors of the socket, for a VTEP of another process that goes on with them as Config.FDs; the caller closes them. End Run first: what comes between the end of Run here and the Run there
// waits in the kernel's buffer, and while two run, each gets a part. If the other one does not come up, another Run goes on here. The error of a VTEP that is closed wraps ErrClosed.
func (v *VTEP) Export() ([]int, error) {
	switch fds, err := v.sock.Export(); {
	case errors.Is(err, udp.ErrClosed):
		return nil, fmt.Errorf("hand over the tunnel at %v: %w", v.LocalAddr(), ErrClosed)
	case err != nil:
		return nil, fmt.Errorf("tunnel: %w", err)
	default:
		return fds, nil
	}
}

// Join makes the VTEP a member of a multicast group on the interface with number ifindex, for kernel peers that send broadcast to a group; see
// udp.Socket.Join. Towards such peers we replicate at the head end all the same.
func (v *VTEP) Join(group netip.Addr, ifindex int) error { return v.sock.Join(group, ifindex) }

// Peers is every peer, in no order.
func (v *VTEP) Peers() []*Peer { return slices.Clone(v.peers.Load().all) }

// Close closes every Peer and the socket, and ends Run. Idempotent. It must not be called from a sink or a Transmit.
func (v *VTEP) Close() error {
	v.mu.Lock()
	v.closed = true
	v.mu.Unlock()
	for _, p := range v.Peers() {
		p.Close()
	}
	return v.sock.Close()
}

// now is nanoseconds since the VTEP was made, never 0.
func (v *VTEP) now() int64 { return int64(v.cfg.Now().Sub(v.start)) + 1 }

// settle returns when the batch that is being handled, if any, is done with.
func (v *VTEP) settle() {
	for n, was := 0, v.epoch.Load(); was&1 == 1 && v.epoch.Load() == was; n++ {
		if n < 100 {
			runtime.Gosched()
		} else {
			time.Sleep(50 * time.Microsecond)
		}
	}
}

// peerKey finds a peer by what a datagram says. Port 0 is any.
type peerKey struct {
	vni  uint32
	from netip.AddrPort
}

// peerSet is an immutable snapshot of the peers.
type peerSet struct {
	all []*Peer
	// exact has every peer by its address and port; byAddr, with port 0, those that share their address with no other of their network.
	exact, byAddr map[peerKey]*Peer
	vnis          map[uint32]bool
}

func newPeerSet(all []*Peer) *peerSet {
	s := &peerSet{all: all, exact: map[peerKey]*Peer{}, byAddr: map[peerKey]*Peer{}, vnis: map[uint32]bool{}}
	for _, p := range all {
		remote := p.Remote()
		any := peerKey{p.cfg.VNI, netip.AddrPortFrom(remote.Addr(), 0)}
		s.exact[peerKey{p.cfg.VNI, remote}] = p
		if _, taken := s.byAddr[any]; taken {
			s.byAddr[any] = nil
		} else {
			s.byAddr[any] = p
		}
		s.vnis[p.cfg.VNI] = true
	}
	return s
}

// find is the peer that a datagram of network vni came from, or why there is none.
func (s *peerSet) find(vni uint32, from netip.AddrPort) (*Peer, frame.Drop) {
	if p := s.byAddr[peerKey{vni, netip.AddrPortFrom(from.Addr(), 0)}]; p != nil {
		return p, 0
	}
	if p := s.exact[peerKey{vni, from}]; p != nil {
		return p, 0
	}
	if s.vnis[vni] {
		return nil, frame.DropUnknownPeer
	}
	return nil, frame.DropUnknownVNI
}

// longestFrame is what one datagram can carry.
const longestFrame = min(udp.MaxDatagram-vxlan.HeaderLen, wire.MaxFrame)
