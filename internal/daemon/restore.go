package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"patchbay/internal/api"
	"patchbay/internal/edge"
	"patchbay/internal/netns"
	"patchbay/nat"
	"patchbay/tap"
)

const (
	// reopeners is how many namespaces are entered at once: each takes a process of some 15 ms of CPU.
	reopeners = 4
	// reopenWithin bounds one attempt: whoever lives in the namespace can stop the process that is sent in.
	reopenWithin = 10 * time.Second
	// reopenPause is the first pause before what failed is tried again. The next ones are twice as long each, up to reopenSeldom.
	reopenPause  = time.Second
	reopenSeldom = time.Minute
)

// errEnded is in the chain when an attachment's namespace cannot be found any more.
var errEnded = errors.New("its namespace has ended")

// restore brings back what is on disk. Networks and reservations are there when it returns; devices come in the background.
func (n *Node) restore(ctx context.Context, from *inheritance) error {
	recs, attachments, err := n.state.load()
	if err != nil {
		return err
	}
	peers, err := n.state.loadPeers()
	if err != nil {
		return err
	}
	n.vteps.hold(from.sockets())
	defer n.vteps.resume()
	var reopen []*attachment
	for i := range recs {
		rec := recs[i]
		live, err := n.open(ctx, &rec, true, nil)
		if err != nil {
			return fmt.Errorf("restore: %w", err)
		}
		nw := newNetwork(rec)
		nw.Network = live
		n.mu.Lock()
		n.networks[rec.Name] = nw
		n.mu.Unlock()
		n.restorePeers(nw, peers[rec.Name], from) // before there is anybody who would miss them
		for _, r := range attachments[rec.Name] {
			a, err := n.restoreAttachment(ctx, nw, r, from)
			if err != nil {
				// The others are worth more than a start that fails.
				n.log.Error("attachment is not restored", "network", rec.Name, "name", r.Name, "error", err)
				if err := n.state.remove(attachmentBucket, attachmentKey(rec.Name, r.Name)); err != nil {
					return err
				}
				continue
			}
			if r.Lifetime == api.LifetimeNamespace && a.Lost() == nil {
				a.left = true
				reopen = append(reopen, a)
			}
		}
		n.inheritFlows(nw, from)
		if err := nw.ReconcileLeases(ctx); err != nil {
			return err
		}
	}
	n.background.Go(func() { n.reopenAll(reopen) })
	return nil
}

// restorePeers brings the peers of a network back: at the address that they had last, for names are looked up in the background, which may take its time. Those that are not to be had
// now are tried again.
func (n *Node) restorePeers(nw *network, recs []peerRecord, from *inheritance) {
	nw.peering.Lock()
	defer nw.peering.Unlock()
	for _, r := range recs {
		p := n.newPeer(nw, r)
		if err := n.claimPeer(p); err != nil {
			n.log.Error("peer is not restored", "network", nw.rec.Name, "peer", r.Host, "error", err)
			continue
		}
		p.sessions = from.sessionsOf(nw.rec.Name, n.peerKey(nw, r.Host, r.Port))
		if r.Last.IsValid() {
			if err := p.connect(n.ctx); err != nil {
				n.log.Warn("peer is not there yet", "network", nw.rec.Name, "peer", r.Host, "reason", err)
			}
			p.mu.Lock()
			p.mtu = 0 // settled when it is looked at first: by then everybody is there
			p.mu.Unlock()
		}
		p.look()
		p.wake()
	}
}

// restoreAttachment reserves what the attachment had, and arranges for its device to come.
func (n *Node) restoreAttachment(ctx context.Context, nw *network, rec attachmentRecord, from *inheritance) (*attachment, error) {
	a, err := n.reserve(ctx, nw, rec)
	if err != nil {
		return nil, err
	}
	n.inherit(a, from)
	for _, p := range rec.Ports {
		s, err := nat.ParseSpec(p.Spec)
		if err != nil {
			n.log.Error("published ports are not restored", "name", rec.Name, "ports", p.Spec, "error", err)
			continue
		}
		if live, err := n.publish(a, s, p.Origin, p.ID, from.published(p.ID)...); err == nil && live.err != nil {
			n.log.Warn("published ports are not open", "name", rec.Name, "ports", p.Spec, "error", live.err)
		}
	}
	n.mu.Lock()
	a.written = true
	n.mu.Unlock()
	switch rec.Lifetime {
	case api.LifetimeSession:
		n.background.Go(func() { n.awaitHolder(a) })
	case api.LifetimeStream:
		l := from.stream(attachmentKey(nw.rec.Name, rec.Name))
		if l == nil {
			if l, err = api.ListenStream(rec.Stream); err != nil {
				return nil, errors.Join(err, a.remove())
			}
		}
		n.listenStream(a, l, from.machine(attachmentKey(nw.rec.Name, rec.Name)))
	}
	return a, nil
}

// awaitHolder ends the attachment of a client that has died while no node ran, or dies before it has come back.
func (n *Node) awaitHolder(a *attachment) {
	n.mu.Lock()
	id := a.rec.Holder
	n.mu.Unlock()
	if id != nil {
		if fd, err := holderFD(id); err == nil {
			defer unix.Close(fd)
			for {
				p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
				// Looked up now and then only to see the node end, or the client come: then its connection tells.
				if k, err := unix.Poll(p, 200); k > 0 || (err != nil && !errors.Is(err, unix.EINTR)) {
					break
				}
				n.mu.Lock()
				back := a.session > 0
				n.mu.Unlock()
				if back || n.ctx.Err() != nil {
					return
				}
			}
		}
	}
	n.mu.Lock()
	back := a.session > 0
	n.mu.Unlock()
	if !back && n.ctx.Err() == nil {
		n.log.Info("attachment's client is gone", "network", a.network.rec.Name, "name", a.Name())
		a.end()
	}
}

// reopenAll opens the interfaces again that an earlier node left in their namespaces. It ends attachments whose interface or namespace is no more; what fails for another reason it tries
// again.
func (n *Node) reopenAll(as []*attachment) {
	if len(as) == 0 {
		return
	}
	start, all := time.Now(), len(as)
	as = n.reopenOnce(as)
	n.log.Info("interfaces opened again", "attachments", all-len(as), "of", all, "took", time.Since(start))
	for pause := reopenPause; len(as) > 0; pause = min(2*pause, reopenSeldom) {
		select {
		case <-n.ctx.Done():
			return
		case <-time.After(pause):
		}
		as = n.reopenOnce(as)
	}
}

// reopenOnce returns those that are to be tried again.
func (n *Node) reopenOnce(as []*attachment) (again []*attachment) {
	var g errgroup.Group
	g.SetLimit(reopeners)
	failed := make([]bool, len(as))
	for i, a := range as {
		g.Go(func() error {
			err := n.reopen(a)
			log := n.log.With("network", a.network.rec.Name, "name", a.Name(), "reason", err)
			switch {
			case err == nil || n.ctx.Err() != nil:
			case errors.Is(err, tap.ErrGone), errors.Is(err, errEnded):
				log.Warn("attachment is gone; if its interface is still there under another name or MAC, it is to be deleted by hand")
				a.end()
			default:
				log.Warn("interface is not opened again yet")
				failed[i] = true
			}
			return nil
		})
	}
	_ = g.Wait() // none fails
	for i, a := range as {
		if failed[i] {
			again = append(again, a)
		}
	}
	return again
}

// openTarget opens the namespace of a record, and makes sure it is the same as ever.
func openTarget(rec *attachmentRecord) (*netns.Target, error) {
	var t *netns.Target
	var err error
	if rec.NetNS != "" {
		t, err = netns.OpenTargetPath(rec.NetNS)
	} else {
		t, err = netns.OpenTarget(rec.PID)
	}
	if err == nil && rec.Identity != nil {
		if err = rec.Identity.Matches(t); err != nil {
			t.Close()
		}
	}
	switch {
	case err == nil:
		return t, nil
	case errors.Is(err, netns.ErrNoProcess), errors.Is(err, netns.ErrOther), errors.Is(err, netns.ErrNotNetNS), errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: %w", errEnded, err)
	}
	return nil, err
}

// findTarget is openTarget that also finds a namespace in which another process is left than the one that named it.
func (a *attachment) findTarget() (*netns.Target, error) {
	a.node.mu.Lock()
	rec := a.rec
	a.node.mu.Unlock()
	t, err := openTarget(&rec)
	if !errors.Is(err, errEnded) || rec.Identity == nil {
		return t, err
	}
	p := rec.Identity.Process()
	if p == nil {
		return nil, err
	}
	// An inode number may be another namespace's by now. What is opened in it is held against name and MAC.
	rec.PID, rec.NetNS, rec.Identity = p.PID, "", p
	if t, err = openTarget(&rec); err != nil {
		return nil, err
	}
	a.node.mu.Lock()
	a.rec.PID, a.rec.NetNS, a.rec.Identity = rec.PID, rec.NetNS, rec.Identity
	a.node.mu.Unlock()
	return t, nil
}

// openLeft opens the interface that an earlier node left. It stays persistent.
func (a *attachment) openLeft() (*tap.Handle, error) {
	t, err := a.findTarget()
	if err != nil {
		return nil, err
	}
	defer t.Close()
	ifc := a.Interface()
	ifc.Name, ifc.Persist, ifc.Reopen = a.rec.IfName, true, true
	ctx, cancel := context.WithTimeout(a.node.ctx, reopenWithin)
	defer cancel()
	hs, notes, err := edge.OpenIn(ctx, t, []edge.Interface{ifc})
	if err != nil {
		return nil, err
	}
	for _, note := range notes {
		a.node.log.Warn("interface", "name", a.Name(), "note", note)
	}
	return hs[0], nil
}

// reopen plugs one attachment again.
func (n *Node) reopen(a *attachment) error {
	a.reopening.Lock()
	defer a.reopening.Unlock()
	n.mu.Lock()
	going, err := a.going, n.busy()
	n.mu.Unlock()
	if going || err != nil {
		return err
	}
	h, err := a.openLeft()
	if err == nil {
		err = a.plug(h)
	}
	a.left = err != nil && !errors.Is(err, tap.ErrGone) && !errors.Is(err, errEnded)
	return err
}

// forgetLeft lets go, if it can be reached, the interface of an attachment that is taken away before it was opened again.
func (a *attachment) forgetLeft() {
	a.reopening.Lock()
	defer a.reopening.Unlock()
	if !a.left {
		return
	}
	a.left = false
	h, err := a.openLeft()
	if err == nil {
		err = errors.Join(h.SetPersist(false), h.Close())
	}
	if err != nil && !errors.Is(err, tap.ErrGone) && !errors.Is(err, errEnded) {
		a.node.log.Warn("interface is left in its namespace", "network", a.network.rec.Name, "name", a.Name(), "interface", a.rec.IfName, "reason", err)
	}
}
