package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/api"
	"patchbay/internal/node"
	"patchbay/tunnel"
)

// errOwn is in the chain when a peer is this node itself.
var errOwn = errors.New("that is this node itself; leave it out of its own list of peers")

// transient reports whether an error of connect may go away by itself: names that lead nowhere now, an underlay that is away.
func transient(err error) bool {
	var dns *net.DNSError
	return errors.As(err, &dns) || errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.ENETDOWN) || errors.Is(err, context.DeadlineExceeded) ||
		errors.Is(err, unix.ENODEV)
}

// resolution is where a name leads.
type resolution struct {
	addrs []netip.Addr
	err   error
}

// resolve asks where a name leads.
func (n *Node) resolve(ctx context.Context, host string) *resolution {
	ctx, cancel := context.WithTimeout(ctx, resolveWithin)
	defer cancel()
	addrs, err := n.cfg.Resolve(ctx, host)
	if err == nil && len(addrs) == 0 {
		err = &net.DNSError{Err: "no address", Name: host, IsNotFound: true}
	}
	return &resolution{addrs, err}
}

// resolve is where the peer's host is, at the peer's port. One goroutine at a time calls it: whoever adds the peer, then whoever looks after it.
func (p *peer) resolve(ctx context.Context) (out []netip.AddrPort, err error) {
	port := cmp.Or(p.rec.Port, p.node.listenPort(p.network))
	if a, err := netip.ParseAddr(p.rec.Host); err == nil {
		return []netip.AddrPort{netip.AddrPortFrom(a, port)}, nil
	}
	r := p.told
	if p.told = nil; r == nil {
		r = p.node.resolve(ctx, p.rec.Host)
	}
	if r.err != nil {
		return nil, fmt.Errorf("its name leads nowhere now: %w", r.err)
	}
	for _, a := range r.addrs {
		if ap := netip.AddrPortFrom(a.Unmap(), port); !slices.Contains(out, ap) {
			out = append(out, ap)
		}
	}
	return out, nil
}

// usable keeps what is not this node, and refuses when nothing is left.
func (p *peer) usable(all []netip.AddrPort) (out []netip.AddrPort, err error) {
	for _, a := range all {
		if a.Port() != p.node.listenPort(p.network) || !ownAddr(p.node.cfg.Listen.Addr(), a.Addr()) {
			out = append(out, a)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("peer address %s: %w", all[0].Addr(), errOwn)
	}
	return out, nil
}

// connect makes the peer live. On error it waits, and the error is kept.
func (p *peer) connect(ctx context.Context) (err error) {
	n, nw := p.node, p.network
	p.mu.Lock()
	last := p.rec.Last
	p.mu.Unlock()
	addrs := []netip.AddrPort{netip.AddrPortFrom(last.Addr(), cmp.Or(p.rec.Port, n.listenPort(nw)))}
	if !last.IsValid() {
		addrs, err = p.resolve(ctx) // without a lock: it may take its time
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	defer func() {
		p.err = err
		if err != nil {
			p.rec.Last = netip.AddrPort{} // the next try asks
			p.again()
		}
	}()
	if err != nil {
		return err
	}
	if addrs, err = p.usable(addrs); err != nil {
		return err
	}
	seal, err := p.seal()
	if err != nil {
		return err
	}
	w, err := tunnel.ParseWire(string(p.wire()))
	if err != nil {
		return err
	}
	v, err := n.vteps.open(n.listenPort(nw))
	if err != nil {
		return err
	}
	if err := n.vteps.join(v, nw.rec.Group); err != nil {
		n.vteps.release(v)
		return err
	}
	var errs []error
	for _, a := range addrs {
		live, err := nw.AddPeer(v.VTEP, node.PeerConfig{
			Name: api.PeerRef(p.rec.Host, a.Port()), Remote: a, Wire: w, Seal: seal, NoCut: p.rec.NoOffload, OnePort: p.rec.OnePort, FDB: p.rec.FDB,
			OnMTU: func(int) { p.wake() }, OnState: func(tunnel.PeerState) { p.wake() },
		})
		if err == nil {
			p.live, p.vtep, p.pause, p.rec.Last = live, v, 0, a
			p.mtu, _ = live.MTU() // 0 without a route
			return nil
		}
		errs = append(errs, err)
	}
	n.vteps.release(v)
	return errors.Join(errs...)
}

// again puts the next try off. p.mu is held.
func (p *peer) again() {
	p.pause = min(max(2*p.pause, retryFirst), retrySeldom)
	p.retry = time.Now().Add(p.pause)
}

// wake has the peer looked at now. It does not block.
func (p *peer) wake() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// look starts to look after the peer, until stop.
func (p *peer) look() {
	p.looking = true
	p.node.background.Go(func() {
		defer close(p.done)
		t := time.NewTicker(peerLook)
		defer t.Stop()
		for {
			select {
			case <-p.ctx.Done():
				return
			case <-t.C:
			case <-p.kick:
			}
			p.node.mu.Lock()
			err := p.node.busy()
			p.node.mu.Unlock()
			if err == nil {
				p.step()
			}
		}
	})
}

// step is one look: a peer that waits is tried again, one that is silent is looked for where its name leads now, and the MTU follows the path.
func (p *peer) step() {
	p.mu.Lock()
	live, due := p.live, !time.Now().Before(p.retry)
	p.mu.Unlock()
	if live == nil {
		if !due {
			return
		}
		if err := p.connect(p.ctx); err != nil {
			p.node.log.Info("peer is not there yet", "network", p.network.rec.Name, "peer", p.rec.Host, "reason", err)
			return
		}
		p.saved()
		p.node.settleMTU(p.network)
		return
	}
	mtu, _ := live.MTU() // 0 without a route
	st := live.Stats()
	if st.MTU > 0 {
		mtu = st.MTU
	}
	p.mu.Lock()
	was := p.state
	p.state = st.State
	if p.seen.mtu != mtu {
		p.seen.mtu, p.seen.since = mtu, time.Now()
	}
	changed := mtu > 0 && mtu != p.mtu && (p.mtu == 0 || time.Since(p.seen.since) >= settleAfter)
	if changed {
		p.mtu = mtu
	}
	p.mu.Unlock()
	if was != st.State {
		p.node.log.Info("peer", "network", p.network.rec.Name, "peer", p.rec.Host, "state", st.State, "was", was)
	}
	if changed {
		p.node.settleMTU(p.network)
	}
	quiet := st.State == tunnel.PeerDown || (st.State == tunnel.PeerNew || st.State == tunnel.PeerHandshake) && time.Since(st.Since) > silence
	kernel := st.State == tunnel.PeerHeard && time.Since(st.Heard) > kernelSilence
	switch {
	case !quiet && !kernel:
		p.mu.Lock()
		p.pause, p.retry, p.err = 0, time.Time{}, nil
		p.mu.Unlock()
	case due:
		p.follow(live, kernel)
	}
}

// follow looks the name of a silent peer up again and moves the peer to where it leads: where it has several addresses, to the next one, unless it may stay.
func (p *peer) follow(live *node.Peer, stay bool) {
	if _, err := netip.ParseAddr(p.rec.Host); err == nil {
		return
	}
	addrs, err := p.resolve(p.ctx)
	if err == nil {
		addrs, err = p.usable(addrs)
	}
	if err == nil {
		now := live.Remote()
		i := slices.Index(addrs, now) // the next one, or the first
		if to := addrs[(i+1)%len(addrs)]; to != now && (i < 0 || !stay) {
			if err = live.SetRemote(to); err == nil {
				live.Flush()
				p.mu.Lock()
				p.rec.Last = to
				p.mu.Unlock()
				p.saved()
				p.node.log.Info("peer has moved", "network", p.network.rec.Name, "peer", p.rec.Host, "from", now, "to", to)
			}
		}
	}
	p.mu.Lock()
	p.err = err
	p.again()
	p.mu.Unlock()
}

// save writes the record as it is, unless the peer has been removed.
func (p *peer) save() error {
	p.saving.Lock()
	defer p.saving.Unlock()
	p.mu.Lock()
	rec := p.rec
	p.mu.Unlock()
	if p.gone {
		return nil
	}
	return p.node.state.put(peerBucket, rec.stateKey(), rec)
}

// saved is save where nobody waits for the answer.
func (p *peer) saved() {
	if err := p.save(); err != nil {
		p.node.log.Warn("peer is not on disk as it is", "network", p.network.rec.Name, "peer", p.rec.Host, "error", err)
	}
}

// stop ends the peer: no frame passes when it returns.
func (p *peer) stop() {
	p.cancel()
	if p.looking {
		<-p.done
	}
	p.mu.Lock()
	live, v := p.live, p.vtep
	p.live, p.vtep = nil, nil
	p.mu.Unlock()
	if live != nil {
		if err := live.Close(); err != nil {
			p.node.log.Warn("peer closed", "network", p.network.rec.Name, "peer", p.rec.Host, "error", err)
		}
	}
	if v != nil {
		p.node.vteps.release(v)
	}
}
