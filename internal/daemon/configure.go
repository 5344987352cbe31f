package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"patchbay/internal/api"
	"patchbay/internal/config"
)

// Configure brings the node to what the file says: networks that are missing are made, those that an earlier file named and this one does not are removed, and ports are published as
// the rules say, now and whenever an attachment of that name comes. Networks and ports made through the API are left alone. On error everything is as before; the error names the
// file's line. Calls must not overlap.
func (n *Node) Configure(ctx context.Context, path string) (err error) {
	f, err := config.Load(path)
	if err != nil {
		return err
	}
	end, err := n.begin()
	if err != nil {
		return err
	}
	defer end()
	c := &reconciler{n: n, file: f}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.undoAll())
		}
	}()
	if err := c.check(); err != nil {
		return err
	}
	for _, step := range []func(context.Context) error{c.makeNetworks, c.makePeers, c.publishRules, c.removeNetworks} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// reconciler is one Configure.
type reconciler struct {
	n    *Node
	file *config.File
	undo []func() error

	create  []config.Network
	replace []config.Network // unused ones that are to be otherwise
	adopt   []config.Network // that are as they should be
	remove  []string
	again   []*peer // made through the API, of networks that are replaced
}

func (c *reconciler) errorf(line int, err error) error {
	return fmt.Errorf("%s:%d: %w", c.file.Path, line, err)
}

func (c *reconciler) undoAll() error {
	var errs []error
	for _, u := range slices.Backward(c.undo) {
		errs = append(errs, u())
	}
	return errors.Join(errs...)
}

// check compares the networks and refuses what cannot be done to those in use, before anything is changed.
func (c *reconciler) check() error {
	for _, want := range c.file.Networks {
		nw, err := c.n.lookup(want.Name)
		if err != nil {
			c.create = append(c.create, want)
			continue
		}
		have := c.n.record(nw)
		differs := difference(&want.NetworkSpec, &have.NetworkSpec)
		switch used := names(nw); {
		case differs == "":
			c.adopt = append(c.adopt, want)
		case len(used) > 0:
			return c.errorf(want.Line, api.Errorf(api.CodeConflict, "detach them, or change the file back", "network %q has another %s and is in use by %s", want.Name, differs, enumerate(used)))
		default:
			c.replace = append(c.replace, want)
		}
	}
	for _, nw := range c.n.sorted() {
		named := slices.ContainsFunc(c.file.Networks, func(w config.Network) bool { return w.Name == nw.rec.Name })
		if c.n.record(nw).Origin != originConfig || named {
			continue
		}
		if used := names(nw); len(used) > 0 {
			return fmt.Errorf("%s: %w", c.file.Path, api.Errorf(api.CodeConflict, "detach them, or name it again", "network %q is named no more and is in use by %s", nw.rec.Name, enumerate(used)))
		}
		c.remove = append(c.remove, nw.rec.Name)
	}
	return nil
}

// names are the attachments of a network.
func names(nw *network) (out []string) {
	for _, a := range nw.Attachments() {
		out = append(out, a.Name())
	}
	return out
}

// difference is the first setting that the network has and want does not, or "". What want leaves open is as it is.
func difference(want, have *api.NetworkSpec) string {
	switch {
	case len(want.Subnets) > 0 && !slices.Equal(want.Subnets, have.Subnets):
		return "subnet"
	case len(want.Gateways) > 0 && !slices.Equal(want.Gateways, have.Gateways):
		return "gateway"
	case want.MTU != 0 && want.MTU != have.MTU:
		return "mtu"
	case want.Internal != have.Internal:
		return "internal"
	case want.Isolate != have.Isolate:
		return "isolate"
	case want.VNI != have.VNI:
		return "vni"
	case cmp.Or(want.Wire, api.WireVXLAN) != cmp.Or(have.Wire, api.WireVXLAN):
		return "wire"
	case want.Seal != have.Seal:
		return "seal"
	case want.Group != have.Group:
		return "group"
	case want.Port != have.Port:
		return "port"
	case !slices.Equal(want.IPRanges, have.IPRanges):
		return "ipRange"
	case !slices.Equal(want.DNS, have.DNS):
		return "dns"
	case want.HostLoopback != have.HostLoopback:
		return "hostLoopback"
	case want.LinkLocal != have.LinkLocal:
		return "linkLocal"
	}
	return ""
}

// makeNetworks makes those that are missing, and those that are to be otherwise anew.
func (c *reconciler) makeNetworks(ctx context.Context) error {
	n := c.n
	for _, want := range c.replace {
		nw, err := n.lookup(want.Name)
		if err != nil {
			return c.errorf(want.Line, err)
		}
		old, peers := n.record(nw), n.peersOf(nw)
		if old.AutoMTU {
			old.MTU = 0
		}
		if err := n.removeNetwork(ctx, want.Name); err != nil {
			return c.errorf(want.Line, err)
		}
		c.undo = append(c.undo, func() error {
			_, err := n.createNetwork(context.WithoutCancel(ctx), old.NetworkSpec, old.Origin)
			return errors.Join(err, n.addAgain(context.WithoutCancel(ctx), peers))
		})
		if want.VNI != 0 { // those of the file come from there
			c.again = append(c.again, slices.DeleteFunc(slices.Clone(peers), func(p *peer) bool { return p.rec.Origin == originConfig })...)
		}
	}
	for _, want := range slices.Concat(c.create, c.replace) {
		if _, err := n.createNetwork(ctx, want.NetworkSpec, originConfig); err != nil {
			return c.errorf(want.Line, err)
		}
		c.undo = append(c.undo, func() error { return n.removeNetwork(context.WithoutCancel(ctx), want.Name) })
	}
	for _, want := range c.adopt {
		if err := n.setOrigin(want.Name, originConfig); err != nil {
			return c.errorf(want.Line, err)
		}
	}
	return nil
}

// setOrigin notes whose a network is.
func (n *Node) setOrigin(name, origin string) error {
	nw, err := n.lookup(name)
	if err != nil {
		return err
	}
	if n.record(nw).Origin == origin {
		return nil
	}
	return n.saveNetwork(nw, func(rec *networkRecord) { rec.Origin = origin })
}

// publishRules closes what earlier rules opened and these do not, and opens what they do.
func (c *reconciler) publishRules(context.Context) error {
	n := c.n
	n.mu.Lock()
	old := n.rules
	var stale []*publish
	for _, p := range n.publishes {
		if p.rec.Origin == originConfig && !slices.ContainsFunc(c.file.Publish, p.follows) {
			stale = append(stale, p)
		}
	}
	n.rules = c.file.Publish
	n.mu.Unlock()
	c.undo = append(c.undo, func() error {
		n.mu.Lock()
		n.rules = old
		n.mu.Unlock()
		return nil
	})
	for _, p := range stale {
		n.unpublish(p)
		c.undo = append(c.undo, func() error { return n.follow(p.a, old) })
		if err := p.a.save(); err != nil {
			return err
		}
	}
	for _, nw := range n.sorted() {
		n.mu.Lock()
		var as []*attachment
		for _, a := range nw.attachments {
			as = append(as, a)
		}
		n.mu.Unlock()
		for _, a := range as {
			before := a.ruled()
			c.undo = append(c.undo, func() error {
				for _, p := range a.ruled() {
					if !slices.Contains(before, p) {
						n.unpublish(p)
					}
				}
				return a.save()
			})
			if err := n.follow(a, c.file.Publish); err != nil {
				return err
			}
		}
	}
	return nil
}

// follows reports whether r is the rule that p came from.
func (p *publish) follows(r config.Rule) bool {
	return r.Attachment == p.a.Name() && r.Network == p.a.network.rec.Name && r.Spec.String() == p.rec.Spec
}

// ruled are the ports of a that came from rules.
func (a *attachment) ruled() (out []*publish) {
	a.node.mu.Lock()
	defer a.node.mu.Unlock()
	for _, p := range a.publishes {
		if p.rec.Origin == originConfig {
			out = append(out, p)
		}
	}
	return out
}

// follow publishes what rules say of a and is not published yet.
func (n *Node) follow(a *attachment, rules []config.Rule) error {
	var errs []error
	changed := false
	for _, r := range rules {
		if r.Attachment != a.Name() || r.Network != a.network.rec.Name {
			continue
		}
		if slices.ContainsFunc(a.ruled(), func(p *publish) bool { return p.follows(r) && p.err == nil }) {
			continue
		}
		if _, err := n.publish(a, r.Spec, originConfig, ""); err != nil {
			errs = append(errs, fmt.Errorf("rule in line %d: %w", r.Line, err))
			continue
		}
		changed = true
	}
	if changed {
		errs = append(errs, a.save())
	}
	return errors.Join(errs...)
}

// applyRules publishes the ports that the configuration has for a new attachment. Ports that are in use do not keep it from coming up.
func (n *Node) applyRules(a *attachment) {
	n.mu.Lock()
	rules := n.rules
	n.mu.Unlock()
	if err := n.follow(a, rules); err != nil {
		n.log.Warn("published ports of the configuration are not open", "network", a.network.rec.Name, "name", a.Name(), "reason", err)
	}
}

// removeNetworks removes what is named no more.
func (c *reconciler) removeNetworks(ctx context.Context) error {
	for _, name := range c.remove {
		if err := c.n.removeNetwork(ctx, name); err != nil {
			return fmt.Errorf("%s: %w", c.file.Path, err)
		}
	}
	return nil
}
