package node

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"patchbay/internal/bypass"
	"patchbay/internal/edge"
)

// Container is a command of this process that is attached to a network. See Network.Start.
type Container struct {
	*Attachment
	proc        *edge.Process
	bypass      *bypass.Supervisor // nil without edge.Spec.Bypass
	stopSignals func()

	endOnce sync.Once
	endErr  error
}

// Start brings a container up and returns when its command runs. ctx bounds the start alone. On error nothing is left.
func (n *Network) Start(ctx context.Context, cfg ContainerConfig) (_ *Container, err error) {
	if err := n.begin(); err != nil {
		return nil, err
	}
	defer n.starting.Done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(n.aborted, cancel)()
	if cfg.IfName == "" {
		cfg.IfName = "eth0"
	}
	a, err := n.Reserve(ctx, cfg.AttachConfig)
	if err != nil {
		return nil, err
	}
	c := &Container{Attachment: a}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	spec := cfg.Process
	spec.Interfaces = []edge.Interface{a.Interface()}
	spec.Hostname, spec.ResolvConf, spec.Hosts = a.Hostname(), a.ResolvConf(), a.Hosts()
	if c.proc, err = edge.Start(ctx, spec, cfg.Stdio); err != nil {
		return nil, err
	}
	for _, note := range c.proc.Notes() {
		n.log.Warn("container", "name", c.name, "note", note)
	}
	if err := c.PlugTAP(c.proc.Devices()[0]); err != nil {
		return nil, err
	}
	if cfg.ForwardSignals {
		c.stopSignals = c.proc.ForwardSignals()
	}
	if err := c.proc.Release(); err != nil {
		return nil, err
	}
	if err := c.serveBypass(); err != nil {
		return nil, err
	}
	n.mu.Lock()
	n.containers[c] = struct{}{}
	n.mu.Unlock()
	return c, nil
}

// serveBypass begins to answer for the connections of a command that has them stopped.
func (c *Container) serveBypass() error {
	b := c.proc.TakeBypass()
	if b == nil {
		return nil
	}
	n := c.network
	s, err := bypass.New(bypass.Config{
		Listener: b.Listener, Network: b.Network, Allow: n.nat.Direct, MaxWaiting: n.cfg.Limits.HalfOpenPerContainer, Logger: n.log.With("container", c.name),
	})
	if err != nil {
		return errors.Join(fmt.Errorf("bypass: %w", err), b.Listener.Close())
	}
	c.bypass = s
	return nil
}

// countBypass keeps the counters of a container that ends.
func (n *Network) countBypass(st bypass.Stats) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.bypassed == nil {
		n.bypassed = new(bypass.Stats)
	}
	n.bypassed.Add(st)
}

// bypassStats sums the counters of all containers; nil when none ever had a bypass.
func (n *Network) bypassStats() *bypass.Stats {
	n.mu.Lock()
	defer n.mu.Unlock()
	var sum *bypass.Stats
	add := func(st bypass.Stats) {
		if sum == nil {
			sum = new(bypass.Stats)
		}
		sum.Add(st)
	}
	if n.bypassed != nil {
		add(*n.bypassed)
	}
	for c := range n.containers {
		if c.bypass != nil {
			add(c.bypass.Stats())
		}
	}
	return sum
}

// begin adds to n.starting, unless the network is being closed.
func (n *Network) begin() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return n.closing()
	}
	n.starting.Add(1)
	return nil
}

// PID is its edge process's id, whose namespaces are the container's.
func (c *Container) PID() int { return c.proc.PID() }

// Signal sends the command a signal. A command that is gone is no error.
func (c *Container) Signal(s unix.Signal) error { return c.proc.Signal(s) }

// Wait blocks until the command has ended, takes the container down and returns how the command ended.
func (c *Container) Wait() (edge.Status, error) {
	st, err := c.proc.Wait()
	if derr := c.Close(); err == nil && derr != nil {
		err = derr
	}
	return st, err
}

// Close ends the command if it still runs and takes the container off the network. Idempotent; it returns when nothing is left.
func (c *Container) Close() error {
	c.endOnce.Do(func() {
		var errs []error
		if c.proc != nil {
			errs = append(errs, c.proc.Close())
		}
		if c.bypass != nil {
			errs = append(errs, c.bypass.Close())
			c.network.countBypass(c.bypass.Stats())
		}
		if c.stopSignals != nil {
			c.stopSignals()
		}
		errs = append(errs, c.Attachment.Close())
		n := c.network
		n.mu.Lock()
		delete(n.containers, c)
		n.mu.Unlock()
		c.endErr = errors.Join(errs...)
	})
	return c.endErr
}
