package tunnel

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"patchbay/frame"
	"patchbay/tunnel/secure"
	"patchbay/tunnel/udp"
)

// Seal says that what travels between this node and a peer is encrypted and authenticated, and how the two know each other. The fields are those of secure.LinkConfig.
type Seal struct {
	// Identity is who this node is. Required.
	Identity *secure.Identity
	// Network is the network's name, the same on both nodes. Required.
	Network string
	// Host is what the peer was named by, without a port: its certificate must have it. Required.
	Host string
	// RekeyAfter and RekeyBytes are the age of a session and the bytes under it after which there is a new one; 0 means the defaults of package secure.
	RekeyAfter time.Duration
	RekeyBytes uint64
	// Sessions is what Peer.ExportSessions returned in the process before this one; nil for none. What cannot be used of it is in the log, and costs a handshake. AddPeer takes it out when it uses it: a second peer
	// with the same would seal under the same numbers.
	Sessions []byte
}

// seal is what a sealed peer has beside a clear one.
type seal struct {
	p    *Peer
	link *secure.Link

	fresh  atomic.Bool // there is a session that was not there before; for the prober
	warned atomic.Bool // of clear frames
	// handshakes is how many of the datagrams that were sent are of handshakes: the peer does not count those it receives.
	handshakes atomic.Uint64

	roam    roaming
	home    netip.AddrPort // where the peer was said to be; guarded by VTEP.mu
	movedAt int64          // ns of VTEP.now of the last move, 0 for none since it is home; the prober's
	away    *udp.Path      // to the last candidate that was sent anything, nil for none; the prober's

	stop context.CancelFunc // of the link's Run; nil when there is none; guarded by links.mu
	done chan struct{}
}

// links are the links of all sealed peers of a VTEP: they run while it does. The zero value is ready.
type links struct {
	mu  sync.Mutex
	ctx context.Context // of Run; nil while there is none

	// byID has the peer of each session that opens. It is copied on write, under ids.
	ids  sync.Mutex
	byID atomic.Pointer[map[uint32]*Peer]
}

// newSeal makes the link of a sealed peer.
func (p *Peer) newSeal(cfg *Seal) (*seal, error) {
	s := &seal{p: p, home: p.cfg.Remote}
	var err error
	s.link, err = secure.NewLink(secure.LinkConfig{
		Identity: cfg.Identity, Network: cfg.Network, VNI: p.cfg.VNI, Host: cfg.Host, RekeyAfter: cfg.RekeyAfter, RekeyBytes: cfg.RekeyBytes,
		Send: p.sendHandshake, OnSession: s.onSession, Log: p.v.cfg.Log,
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// inherit goes on with the sessions of a predecessor. From here on datagrams may come under them, so that the peer has to be ready.
func (s *seal) inherit(cfg *Seal) {
	sessions := cfg.Sessions
	if cfg.Sessions = nil; sessions == nil {
		return
	}
	if err := s.link.Import(sessions); err != nil {
		s.p.v.cfg.Log.Warn("sessions are not taken over, new ones will be made", "vni", s.p.cfg.VNI, "peer", cfg.Host, "reason", err)
	}
}

// onSession keeps links.byID. It is called with a lock of the link held.
func (s *seal) onSession(id uint32, up bool) {
	ls := &s.p.v.links
	ls.ids.Lock()
	owner := ls.owner(id)
	if up == (owner == nil) && (up || owner == s.p) {
		next := map[uint32]*Peer{}
		if have := ls.byID.Load(); have != nil {
			next = maps.Clone(*have)
		}
		if delete(next, id); up {
			next[id] = s.p
		}
		ls.byID.Store(&next)
	}
	ls.ids.Unlock()
	switch {
	case !up:
	case owner != nil && owner != s.p: // once in 2^32; the other was first
		go s.link.Rekey()
	default:
		s.fresh.Store(true)
		s.p.v.kick()
	}
}

// owner is the peer of a session that opens; nil for none.
func (ls *links) owner(id uint32) *Peer {
	if m := ls.byID.Load(); m != nil {
		return (*m)[id]
	}
	return nil
}

// startLink has the link make sessions, if the VTEP runs. Nothing but the link's Run and close waits for it.
func (ls *links) startLink(s *seal) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if ls.ctx == nil || s.stop != nil {
		return
	}
	ctx, stop := context.WithCancel(ls.ctx)
	done := make(chan struct{})
	s.stop, s.done = stop, done
	go func() {
		defer close(done)
		if err := s.link.Run(ctx); !errors.Is(err, context.Canceled) {
			s.p.v.cfg.Log.Error("sealed link", "vni", s.p.cfg.VNI, "error", err) // there is no other error but for two Runs at once
		}
	}()
}

// stopLink ends what startLink has started, and waits for it.
func (ls *links) stopLink(s *seal) {
	ls.mu.Lock()
	stop, done := s.stop, s.done
	s.stop = nil
	ls.mu.Unlock()
	if stop != nil {
		stop()
		<-done
	}
}

// runLinks starts the links of all peers, and of those to come, until the function that it returns has been called.
func (v *VTEP) runLinks(ctx context.Context) (stop func()) {
	v.links.mu.Lock()
	v.links.ctx = ctx
	v.links.mu.Unlock()
	for _, p := range v.Peers() {
		if p.seal != nil {
			v.links.startLink(p.seal)
		}
	}
	return func() {
		v.links.mu.Lock()
		v.links.ctx = nil
		v.links.mu.Unlock()
		for _, p := range v.Peers() {
			if p.seal != nil {
				v.links.stopLink(p.seal)
			}
		}
	}
}

// close ends the link.
func (s *seal) close() {
	s.p.v.links.stopLink(s)
	s.link.Close()
}

// sendHandshake sends one datagram of a handshake to the peer.
func (p *Peer) sendHandshake(d []byte) error {
	if p.gate.Add(1) < 0 {
		p.gate.Add(-1)
		return fmt.Errorf("peer %v: %w", p.Remote(), ErrClosed)
	}
	defer p.gate.Add(-1)
	b, ok := p.v.sock.Batch(&p.unsaid)
	if !ok {
		return fmt.Errorf("peer %v: %w", p.Remote(), ErrClosed)
	}
	head := b.Head(len(d))
	copy(head, d)
	b.Add(p.path.Load(), 0, ecnNone, 0, head, nil)
	if b.Send() == 0 {
		p.seal.handshakes.Add(1)
	}
	b.Release()
	return nil
}

// receiveHandshake gives one datagram of a handshake to the link of the peer that it came from.
func (v *VTEP) receiveHandshake(set *peerSet, d []byte, from netip.AddrPort, last *lookup) {
	vni, ok := secure.HandshakeVNI(d)
	if !ok {
		v.drops.Add(frame.DropTunnelHeader, 1)
		return
	}
	switch p := v.find(set, vni, from, last); {
	case p == nil:
	case p.seal == nil:
		p.drops.Add(frame.DropNoSession, 1)
	default:
		p.seal.link.Deliver(d)
	}
}

// unsealed counts a clear frame in the name of a sealed peer.
func (p *Peer) unsealed() {
	p.drops.Add(frame.DropUnsealed, 1)
	if !p.seal.warned.Swap(true) {
		p.v.cfg.Log.Warn("clear frames on a sealed network are dropped: the peer does not seal, or somebody forges", "vni", p.cfg.VNI, "remote", p.Remote())
	}
}

// tick does what is due of a sealed peer, for the prober, and reports whether there are keys, and how long that was all. state is that of the last tick.
func (s *seal) tick(now int64, state PeerState) (keys bool, wait time.Duration) {
	wait = s.follow(now, state)
	return s.link.Session() != nil, wait
}

// ExportSessions takes the sessions of a sealed peer out, as opaque bytes with their keys, for a VTEP of another process that goes on with them (Seal.Sessions): hand them over a unix socket and never write them
// down. From here on nothing is sealed or opened; if the takeover fails, another Run makes new ones. End Run first. A clear peer has nil.
func (p *Peer) ExportSessions() ([]byte, error) {
	if p.seal == nil {
		return nil, nil
	}
	b, err := p.seal.link.Export()
	if err != nil {
		return nil, fmt.Errorf("peer %v: %w", p.Remote(), err)
	}
	return b, nil
}
