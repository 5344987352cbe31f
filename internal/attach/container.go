package attach

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"patchbay/internal/api"
	"patchbay/internal/edge"
	"patchbay/tap"
)

// retryFirst and retryLast are how long to wait before the node is looked for again: short at first, since a supervisor has the next one up in a moment.
const (
	retryFirst = 20 * time.Millisecond
	retryLast  = time.Second
)

// Config says what to run where. Client, Networks and Process.Argv are required.
type Config struct {
	Client *api.Client
	// Networks are joined in order, as eth0, eth1, …; the first that has a way out gets the default route.
	Networks []string
	// Spec is how. MAC and Rate are for the first network, and Publish for the first that has a way out; of Addrs each network gets those in its subnets.
	Spec api.AttachmentSpec
	// Process is what to run. Its Interfaces, ResolvConf, Hosts and Hostname are filled in here.
	Process edge.Spec
	Stdio   edge.Stdio
	// ForwardSignals passes the signals sent to this process on to the command.
	ForwardSignals bool
	// Logger gets what the person at the terminal should know: the node that went and came. Default: none.
	Logger *slog.Logger
}

// Container is a command on a node's networks.
type Container struct {
	cfg         Config
	log         *slog.Logger
	proc        *edge.Process
	members     []*member
	stopSignals func()

	ctx       context.Context
	cancel    context.CancelFunc
	following sync.WaitGroup
	endOnce   sync.Once
	endErr    error
}

// member is the container's membership in one network.
type member struct {
	c       *Container
	network string
	spec    api.AttachmentSpec // as it came to be, for a node that does not know it
	session *api.Session
	handle  *tap.Handle // this process's own descriptors
}

// Start attaches to the networks, starts the process and returns when the command runs. ctx bounds the start alone. On error nothing is left.
func Start(ctx context.Context, cfg Config) (_ *Container, err error) {
	c := &Container{cfg: cfg, log: cfg.Logger}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	c.ctx, c.cancel = context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	process := cfg.Process
	if err := c.join(ctx, &process); err != nil {
		return nil, err
	}
	if c.proc, err = edge.Start(ctx, process, cfg.Stdio); err != nil {
		for _, m := range c.members {
			_ = m.session.Fail(err.Error()) // what went wrong here is what matters
		}
		return nil, err
	}
	for i, h := range c.proc.Devices() {
		m := c.members[i]
		m.handle = h
		if err := m.up(c.proc.PID()); err != nil {
			return nil, err
		}
	}
	if cfg.ForwardSignals {
		c.stopSignals = c.proc.ForwardSignals()
	}
	if err := c.proc.Release(); err != nil {
		return nil, err
	}
	for _, m := range c.members {
		c.following.Go(m.follow)
	}
	return c, nil
}

// join reserves a place on each network and fills in what the container gets of them.
func (c *Container) join(ctx context.Context, process *edge.Spec) error {
	left := slices.Clone(c.cfg.Spec.Addrs)
	routed4, routed6, resolves := false, false, false
	publishing, err := c.publishing(ctx)
	if err != nil {
		return err
	}
	for i, network := range c.cfg.Networks {
		spec := c.cfg.Spec
		spec.Lifetime, spec.IfName = api.LifetimeSession, fmt.Sprintf("eth%d", i)
		if len(c.cfg.Networks) > 1 {
			if spec.Addrs, left, err = c.addrsOf(ctx, network, left); err != nil {
				return err
			}
		}
		if i != publishing {
			spec.Publish = nil
		}
		if i > 0 {
			spec.MAC, spec.Rate = [6]byte{}, 0
			spec.Name = c.members[0].spec.Name
		}
		s, err := c.cfg.Client.Attach(ctx, network, spec)
		if err != nil {
			return err
		}
		p := s.Plan()
		spec.Name = p.Name
		m := &member{c: c, network: p.Network, spec: spec, session: s}
		c.members = append(c.members, m)
		ifc := p.Interface
		ifc.Gateway4, routed4 = once(ifc.Gateway4, routed4)
		ifc.Gateway6, routed6 = once(ifc.Gateway6, routed6)
		process.Interfaces = append(process.Interfaces, ifc)
		if i == 0 {
			process.ResolvConf, process.Hosts, process.Hostname = p.ResolvConf, p.Hosts, p.Hostname
		}
		// Each resolver knows the names of all the container's networks, but only one with a way out knows others.
		if out := p.Interface.Gateway4.IsValid() || p.Interface.Gateway6.IsValid(); out && !resolves {
			process.ResolvConf, resolves = p.ResolvConf, true
		}
	}
	if len(c.cfg.Networks) > 1 && len(left) > 0 {
		return fmt.Errorf("address %s is in no subnet of the networks; choose one inside", left[0])
	}
	return nil
}

// publishing is the number of the network whose way in published ports take: the first that is not internal, or the first one, whose node then says that it publishes nothing.
func (c *Container) publishing(ctx context.Context) (int, error) {
	if len(c.cfg.Networks) < 2 || len(c.cfg.Spec.Publish) == 0 {
		return 0, nil
	}
	for i, name := range c.cfg.Networks {
		nw, err := c.cfg.Client.Network(ctx, name)
		if err != nil {
			return 0, err
		}
		if !nw.Internal {
			return i, nil
		}
	}
	return 0, nil
}

// once keeps the first gateway there is: a container has one default route.
func once(gw netip.Addr, routed bool) (netip.Addr, bool) {
	if routed {
		return netip.Addr{}, true
	}
	return gw, gw.IsValid()
}

// addrsOf takes those of addrs that are in the network's subnets.
func (c *Container) addrsOf(ctx context.Context, network string, addrs []netip.Addr) (in, left []netip.Addr, err error) {
	if len(addrs) == 0 {
		return nil, nil, nil
	}
	nw, err := c.cfg.Client.Network(ctx, network)
	if err != nil {
		return nil, nil, err
	}
	for _, a := range addrs {
		if slices.ContainsFunc(nw.Subnets, func(p netip.Prefix) bool { return p.Contains(a) }) {
			in = append(in, a)
		} else {
			left = append(left, a)
		}
	}
	return in, left, nil
}

// up hands the descriptors to the node, and notes what the attachment came to be.
func (m *member) up(pid int) error {
	at, err := m.session.Up(api.Device{Info: m.handle.Info, Notes: m.handle.Notes, PID: pid, FDs: m.handle.FDs})
	if err != nil {
		return err
	}
	m.spec.Addrs, m.spec.MAC = at.Addrs, at.MAC
	return nil
}

// follow stays with the node, and with the next one, until the attachment or the container ends.
func (m *member) follow() {
	for {
		switch e, err := m.session.Wait(m.c.ctx); {
		case m.c.ctx.Err() != nil:
			return
		case err == nil && e.Kind == api.EventDetached:
			m.c.log.Info("detached", "network", m.network, "name", m.spec.Name)
			m.letGo()
			return
		}
		m.c.log.Warn("the node is gone; waiting for the next one", "network", m.network, "name", m.spec.Name)
		gone := time.Now()
		if !m.again() {
			return
		}
		m.c.log.Warn("the node is back", "network", m.network, "name", m.spec.Name, "gap", time.Since(gone).Round(time.Millisecond))
	}
}

// letGo closes every descriptor of the interface but the command's own: there are none, so it vanishes.
func (m *member) letGo() {
	if err := m.c.proc.Detach(m.handle.Name); err != nil {
		m.c.log.Warn("detach", "network", m.network, "error", err)
	}
	if err := m.handle.Close(); err != nil {
		m.c.log.Warn("detach", "network", m.network, "error", err)
	}
}

// again finds the next node and gives it the descriptors. It reports false when the container ends, or the node will not have it.
func (m *member) again() bool {
	m.session.Close()
	var said string
	for wait := retryFirst; ; wait = min(wait*5/4, retryLast) {
		err := m.resume()
		if err == nil {
			return true
		}
		// The same refusal over and over is said once.
		if s := err.Error(); s != said && !errors.Is(err, api.ErrNoNode) {
			said = s
			m.c.log.Warn("the node does not take it back", "network", m.network, "name", m.spec.Name, "reason", err)
		}
		select {
		case <-m.c.ctx.Done():
			return false
		case <-time.After(wait):
		}
	}
}

// resume is one try.
func (m *member) resume() error {
	ctx, cancel := context.WithTimeout(m.c.ctx, 10*time.Second)
	defer cancel()
	s, err := m.c.cfg.Client.Resume(ctx, m.network, m.spec.Name)
	if api.CodeOf(err) == api.CodeNotFound && !errors.Is(err, api.ErrNoNode) {
		s, err = m.c.cfg.Client.Attach(ctx, m.network, m.spec)
	}
	if err != nil {
		return err
	}
	m.session = s
	if err := m.up(m.c.proc.PID()); err != nil {
		s.Close()
		return err
	}
	return nil
}

// Name is what the container is called on its first network.
func (c *Container) Name() string { return c.members[0].spec.Name }

// Wait blocks until the command has ended, takes the container down and returns how the command ended.
func (c *Container) Wait() (edge.Status, error) {
	st, err := c.proc.Wait()
	if derr := c.Close(); err == nil && derr != nil {
		err = derr
	}
	return st, err
}

// Close ends the command if it still runs, and its attachments. Idempotent.
func (c *Container) Close() error {
	c.endOnce.Do(func() {
		var errs []error
		c.cancel()
		if c.proc != nil {
			errs = append(errs, c.proc.Close())
		}
		if c.stopSignals != nil {
			c.stopSignals()
		}
		c.following.Wait()
		for _, m := range c.members {
			errs = append(errs, m.session.End()) // and not Close: who runs the same name next must find it free
			if m.handle != nil {
				errs = append(errs, m.handle.Close())
			}
		}
		c.endErr = errors.Join(errs...)
	})
	return c.endErr
}
