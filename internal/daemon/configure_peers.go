package daemon

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"patchbay/internal/api"
	"patchbay/internal/config"
)

// addAgain makes peers as they were, of networks that were made anew.
func (n *Node) addAgain(ctx context.Context, peers []*peer) error {
	var errs []error
	for _, p := range peers {
		_, err := n.addPeer(ctx, p.rec.Network, p.rec.PeerSpec, p.rec.Origin, p.rec.Created, nil)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// makePeers brings the peers of the file's networks to what it says. Peers made through the API stay as they are, unless the file says something else of the same one.
func (c *reconciler) makePeers(ctx context.Context) error {
	n := c.n
	if err := n.addAgain(ctx, c.again); err != nil {
		return err
	}
	told := c.resolve(ctx)
	for _, want := range c.file.Networks {
		nw, err := n.lookup(want.Name)
		if err != nil {
			return c.errorf(want.Line, err)
		}
		missing := slices.Clone(want.Peers)
		for _, p := range n.peersOf(nw) {
			same := func(w config.Peer) bool {
				return n.peerKey(nw, w.Host, w.Port) == n.peerKey(nw, p.rec.Host, p.rec.Port)
			}
			i := slices.IndexFunc(missing, same)
			if i < 0 && p.rec.Origin != originConfig {
				continue
			}
			if i >= 0 && p.is(&missing[i].PeerSpec) {
				if err := c.adoptPeer(p); err != nil {
					return c.errorf(missing[i].Line, err)
				}
				missing = slices.Delete(missing, i, i+1)
				continue
			}
			if err := n.RemovePeer(ctx, want.Name, api.PeerRef(p.rec.Host, p.rec.Port)); err != nil {
				return c.errorf(want.Line, err)
			}
			c.undo = append(c.undo, func() error { return n.addAgain(context.WithoutCancel(ctx), []*peer{p}) })
		}
		for _, w := range missing {
			p, err := n.addPeer(ctx, want.Name, w.PeerSpec, originConfig, time.Now().UTC(), told[w.Host])
			if err != nil {
				return c.errorf(w.Line, err)
			}
			c.undo = append(c.undo, func() error {
				return n.RemovePeer(context.WithoutCancel(ctx), want.Name, api.PeerRef(p.rec.Host, p.rec.Port))
			})
		}
	}
	return nil
}

// resolvers is how many names of a file are asked for at once.
const resolvers = 64

// resolve asks for every name in the file at once: one after the other, those that lead nowhere would add up.
func (c *reconciler) resolve(ctx context.Context) map[string]*resolution {
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(resolvers)
	told := make(map[string]*resolution)
	for _, nw := range c.file.Networks {
		for _, p := range nw.Peers {
			_, err := netip.ParseAddr(p.Host)
			mu.Lock()
			_, asked := told[p.Host]
			if !asked && err != nil {
				told[p.Host] = nil
			}
			mu.Unlock()
			if asked || err == nil {
				continue
			}
			g.Go(func() error {
				r := c.n.resolve(ctx, p.Host)
				mu.Lock()
				told[p.Host] = r
				mu.Unlock()
				return nil
			})
		}
	}
	_ = g.Wait() // none fails
	return told
}

// is reports whether the peer is as s asks for.
func (p *peer) is(s *api.PeerSpec) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	have := &p.rec.PeerSpec
	return have.Wire == s.Wire && have.NoOffload == s.NoOffload && have.OnePort == s.OnePort && slices.Equal(have.FDB, s.FDB)
}

// adoptPeer notes that the file has the peer.
func (c *reconciler) adoptPeer(p *peer) error {
	was := p.rec.Origin
	if was == originConfig {
		return nil
	}
	if err := p.setOrigin(originConfig); err != nil {
		return err
	}
	c.undo = append(c.undo, func() error { return p.setOrigin(was) })
	return nil
}

func (p *peer) setOrigin(origin string) error {
	p.mu.Lock()
	p.rec.Origin = origin
	p.mu.Unlock()
	return p.save()
}
