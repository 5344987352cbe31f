package daemon

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"patchbay/internal/api"
	"patchbay/internal/edge"
	"patchbay/internal/netns"
	"patchbay/nat"
)

// reopeners is how many namespaces are entered at once: each takes a process of some 15 ms of CPU.
const reopeners = 4

// restore brings back what is on disk. Networks and reservations are there when it returns; devices come in the background.
func (n *Node) restore(ctx context.Context, from *inheritance) error {
	recs, attachments, err := n.state.load()
	if err != nil {
		return err
	}
	var reopen []*attachment
	for i := range recs {
		rec := recs[i]
		live, err := n.open(ctx, &rec, true, nil)
		if err != nil {
			return fmt.Errorf("restore: %w", err)
		}
		nw := &network{Network: live, rec: rec, attachments: make(map[string]*attachment)}
		n.mu.Lock()
		n.networks[rec.Name] = nw
		n.mu.Unlock()
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
		n.listenStream(a, l)
	}
	return a, nil
}

// awaitHolder ends the attachment of a client that has died while no node ran, or dies before it has come back.
func (n *Node) awaitHolder(a *attachment) {
	id := a.rec.Holder
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

// reopenAll opens the interfaces again that an earlier node left in their namespaces.
func (n *Node) reopenAll(as []*attachment) {
	start := time.Now()
	var g errgroup.Group
	g.SetLimit(reopeners)
	for _, a := range as {
		g.Go(func() error {
			err := n.reopen(a)
			if err != nil && n.ctx.Err() == nil {
				n.log.Info("attachment is gone", "network", a.network.rec.Name, "name", a.Name(), "reason", err)
				a.end()
			}
			return nil
		})
	}
	_ = g.Wait() // none fails
	if len(as) > 0 {
		n.log.Info("interfaces opened again", "attachments", len(as), "took", time.Since(start))
	}
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
	if err != nil {
		return nil, err
	}
	if rec.Identity != nil {
		if err := rec.Identity.Matches(t); err != nil {
			t.Close()
			return nil, err
		}
	}
	return t, nil
}

// reopen plugs one attachment again.
func (n *Node) reopen(a *attachment) error {
	t, err := openTarget(&a.rec)
	if err != nil {
		return err
	}
	defer t.Close()
	ifc := a.Interface()
	ifc.Name, ifc.Persist, ifc.Reopen = a.rec.IfName, true, true
	hs, notes, err := edge.OpenIn(n.ctx, t, []edge.Interface{ifc})
	if err != nil {
		return err
	}
	for _, note := range notes {
		n.log.Warn("interface", "name", a.Name(), "note", note)
	}
	return a.plug(hs[0])
}
