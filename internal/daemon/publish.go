package daemon

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"

	"patchbay/internal/api"
	"patchbay/nat"
)

// publish is a range of published ports. Guarded by Node.mu.
type publish struct {
	rec  publishRecord
	a    *attachment
	live *nat.Published // nil: the ports could not be opened
	err  error          // why
}

// publish opens ports, or goes on with sockets that another node had, and puts them on a's list; id is the record's, or "" for a new one. It does not write them down.
func (n *Node) publish(a *attachment, s nat.Spec, origin, id string, inherited ...int) (*publish, error) {
	live, err := (*nat.Published)(nil), error(nil)
	if len(inherited) > 0 {
		live, err = a.PublishFrom(s, inherited)
	} else {
		live, err = a.Attachment.Publish(s)
	}
	p := &publish{rec: publishRecord{ID: cmp.Or(id, newID()[:8]), Spec: s.String(), Origin: origin}, a: a, live: live, err: err}
	if err != nil && id == "" {
		return nil, refuse(api.CodeInvalid, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for n.publishes[p.rec.ID] != nil {
		p.rec.ID = newID()[:8]
	}
	n.publishes[p.rec.ID] = p
	a.publishes = append(a.publishes, p)
	if !slices.Contains(a.rec.Ports, p.rec) { // as those that were on disk are
		a.rec.Ports = append(a.rec.Ports, p.rec)
	}
	return p, nil
}

// AddPublish implements api.Backend.
func (n *Node) AddPublish(_ context.Context, network, name string, spec api.PublishSpec) (api.Publish, error) {
	s, err := nat.ParseSpec(spec.Spec)
	if err != nil {
		return api.Publish{}, refuse(api.CodeInvalid, err)
	}
	a, err := n.find(network, name)
	if err != nil {
		return api.Publish{}, err
	}
	end, err := n.begin()
	if err != nil {
		return api.Publish{}, err
	}
	defer end()
	p, err := n.publish(a, s, originAPI, "")
	if err != nil {
		return api.Publish{}, err
	}
	if err := a.save(); err != nil {
		n.unpublish(p)
		return api.Publish{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return p.describe(), nil
}

// RemovePublish implements api.Backend.
func (n *Node) RemovePublish(_ context.Context, id string) error {
	end, err := n.begin()
	if err != nil {
		return err
	}
	defer end()
	n.mu.Lock()
	p := n.publishes[id]
	n.mu.Unlock()
	if p == nil {
		return api.Errorf(api.CodeNotFound, "`patchbay publish ls` shows those there are", "no published port has the id %.40q", id)
	}
	n.unpublish(p)
	return p.a.save()
}

// unpublish closes the ports and takes them off the lists.
func (n *Node) unpublish(p *publish) {
	n.mu.Lock()
	delete(n.publishes, p.rec.ID)
	p.a.publishes = slices.DeleteFunc(p.a.publishes, func(q *publish) bool { return q == p })
	p.a.rec.Ports = slices.DeleteFunc(slices.Clone(p.a.rec.Ports), func(r publishRecord) bool { return r.ID == p.rec.ID })
	n.mu.Unlock()
	if p.live != nil {
		if err := p.a.Unpublish(p.live); err != nil {
			n.log.Warn("unpublish", "ports", p.rec.Spec, "error", err)
		}
	}
}

// republish leads the ports to where the attachment's addresses are now. Ports that cannot be opened again say so in the list.
func (n *Node) republish(p *publish) {
	s, err := nat.ParseSpec(p.rec.Spec)
	if err != nil {
		return // it was parsed before
	}
	if p.live != nil {
		err = p.a.Unpublish(p.live)
	}
	live, perr := p.a.Attachment.Publish(s)
	if err = errors.Join(err, perr); err != nil {
		n.log.Warn("published ports are not open", "name", p.a.Name(), "ports", p.rec.Spec, "error", err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	p.live, p.err = live, err
}

// save writes a down as it is, if it is on disk at all.
func (a *attachment) save() error {
	a.node.mu.Lock()
	written := a.written
	a.node.mu.Unlock()
	if !written {
		return nil // Plug will
	}
	return a.write()
}

// Publishes implements api.Backend.
func (n *Node) Publishes() []api.Publish {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := make([]api.Publish, 0, len(n.publishes))
	for _, p := range n.publishes {
		if !p.a.going {
			out = append(out, p.describe())
		}
	}
	slices.SortFunc(out, func(a, b api.Publish) int {
		return cmp.Or(strings.Compare(a.Network, b.Network), strings.Compare(a.Attachment, b.Attachment), strings.Compare(a.Spec, b.Spec))
	})
	return out
}

// describe is p for the API; Node.mu is held.
func (p *publish) describe() api.Publish {
	out := api.Publish{ID: p.rec.ID, Network: p.a.network.rec.Name, Attachment: p.a.Name(), Spec: p.rec.Spec, Origin: p.rec.Origin}
	if p.err != nil {
		out.Error = p.err.Error()
	}
	return out
}
