package node

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/dns"
	"patchbay/internal/edge"
	"patchbay/internal/wire"
	"patchbay/ipam"
	"patchbay/nat"
	vswitch "patchbay/switch"
	"patchbay/tap"
)

// txQueueLen is how many frames of a container wait in each queue of its TAP. The kernel drops what is above it without a word to the sender, and each TCP flow may
// have two superframes there, so the kernel's own 500 made a thousand busy flows five to ten times slower. One flow alone never fills it: its socket's
// buffer is full before. It costs 64 KiB of kernel memory a queue.
const txQueueLen = 8192

// Container is a command attached to a network. See Network.Start.
type Container struct {
	network *Network
	name    string
	mac     wire.MAC // written under network.mu
	addrs   []netip.Addr
	started time.Time

	proc        *edge.Process
	published   []*nat.Published
	device      *tap.Device
	port        vswitch.PortID
	stopServe   context.CancelFunc
	stopPulls   []func() // of a shared loop
	stopSignals func()
	serving     sync.WaitGroup
	plugged     bool // in the zone; under network.mu

	downOnce sync.Once
	downErr  error
}

// Start brings a container up and returns when its command runs. ctx bounds the start alone. On error nothing is left.
func (n *Network) Start(ctx context.Context, cfg ContainerConfig) (_ *Container, err error) {
	c, err := n.reserve(cfg)
	if err != nil {
		return nil, err
	}
	defer n.starting.Done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(n.aborted, cancel)()
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	ifc, err := c.lease(ctx, cfg)
	if err != nil {
		return nil, err
	}
	for _, s := range cfg.Publish {
		p, err := n.nat.Publish(s, c.addrs)
		if err != nil {
			return nil, err
		}
		c.published = append(c.published, p)
	}
	spec := cfg.Process
	spec.Interfaces = []edge.Interface{ifc}
	spec.Hostname = cmp.Or(cfg.Hostname, c.name)
	spec.ResolvConf = []byte(dns.ResolvConf(n.gwAddrs, n.cfg.Name))
	spec.Hosts = c.hostsFile(spec.Hostname)
	if c.proc, err = edge.Start(ctx, spec, cfg.Stdio); err != nil {
		return nil, err
	}
	for _, note := range c.proc.Notes() {
		n.log.Warn("container", "name", c.name, "note", note)
	}
	if err := c.plug(c.proc.Devices()[0]); err != nil {
		return nil, err
	}
	if cfg.ForwardSignals {
		c.stopSignals = c.proc.ForwardSignals()
	}
	if err := c.proc.Release(); err != nil {
		return nil, err
	}
	n.log.Info("container up", "name", c.name, "addrs", c.addrs, "mac", c.mac, "port", c.port)
	return c, nil
}

// reserve takes the name, and adds to n.starting.
func (n *Network) reserve(cfg ContainerConfig) (*Container, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil, fmt.Errorf("network %q is being closed", n.cfg.Name)
	}
	name := strings.ToLower(cfg.Name)
	if name == "" {
		for name == "" || n.containers[name] != nil {
			n.serial++
			name = fmt.Sprintf("c%d", n.serial)
		}
	}
	if err := CheckName(name); err != nil {
		return nil, err
	}
	if name == gatewayName {
		return nil, fmt.Errorf("name %q is the gateway's on network %q; choose another with --name", name, n.cfg.Name)
	}
	if n.containers[name] != nil {
		return nil, fmt.Errorf("name %q is taken on network %q; choose another with --name", name, n.cfg.Name)
	}
	c := &Container{network: n, name: name, mac: cfg.MAC, started: time.Now()}
	n.containers[name] = c
	n.starting.Add(1)
	return c, nil
}

// lease gets the container its addresses and says how its interface is to look.
func (c *Container) lease(ctx context.Context, cfg ContainerConfig) (edge.Interface, error) {
	n := c.network
	ifc := edge.Interface{Name: "eth0", MTU: n.cfg.MTU, Queues: cfg.Queues, TxQueueLen: txQueueLen, ForcePlain: cfg.ForcePlain, Kind: cfg.Device}
	wanted := slices.Clone(cfg.Addrs)
	for _, pool := range n.pools {
		req := ipam.Request{Attachment: c.name, MAC: c.mac, Hostname: c.name}
		if i := slices.IndexFunc(wanted, pool.Prefix().Contains); i >= 0 {
			req.Addr = wanted[i]
			wanted = slices.Delete(wanted, i, i+1)
		}
		rec, err := pool.Lease(ctx, req)
		if err != nil {
			return ifc, err
		}
		c.addrs = append(c.addrs, rec.Addr)
		ifc.Addrs = append(ifc.Addrs, netip.PrefixFrom(rec.Addr, pool.Prefix().Bits()))
		if rec.Addr.Is4() {
			ifc.Gateway4 = pool.Gateway()
		} else {
			ifc.Gateway6 = pool.Gateway()
		}
	}
	if len(wanted) > 0 {
		return ifc, fmt.Errorf("address %s is in no subnet of network %q (%s), or the second of its kind; choose one inside", wanted[0], n.cfg.Name, joinPrefixes(n.subnets))
	}
	if c.mac.IsZero() {
		n.mu.Lock()
		c.mac = macOf(c.addrs[0])
		n.mu.Unlock()
	}
	ifc.MAC = c.mac
	return ifc, nil
}

// macOf is the MAC of whoever has address a on a network: unicast, locally administered (IEEE 802 §8.2), and the same each time. So when an address goes to
// another container, or to the same one after a restart, what its neighbours remember of it stays true; with another MAC they would send
// into the void until their entries have gone stale and failed, some eight seconds.
func macOf(a netip.Addr) (m wire.MAC) {
	if a.Is4() {
		b := a.As4()
		return wire.MAC{0x0a, 0x58, b[0], b[1], b[2], b[3]}
	}
	b := a.As16()
	sum := sha256.Sum256(b[:])
	copy(m[:], sum[:])
	m[0] = m[0]&^1 | 2
	return m
}

func joinPrefixes(ps []netip.Prefix) string {
	var s []string
	for _, p := range ps {
		s = append(s, p.String())
	}
	return strings.Join(s, ", ")
}

// hostsFile is the container's /etc/hosts: loopback and itself. Every other name comes from the resolver, so that it is never stale.
func (c *Container) hostsFile(hostname string) []byte {
	var b strings.Builder
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	for _, a := range c.addrs {
		fmt.Fprintf(&b, "%s\t%s", a, hostname)
		if c.name != strings.ToLower(hostname) {
			fmt.Fprintf(&b, " %s", c.name)
		}
		b.WriteByte('\n')
	}
	return []byte(b.String())
}

// plug connects the device to the switch: from here on frames flow.
func (c *Container) plug(h *tap.Handle) error {
	n := c.network
	dev, err := tap.New(tap.Config{Info: h.Info, FDs: h.FDs})
	if err != nil {
		return err
	}
	c.device = dev
	var port vswitch.Port = dev
	if n.line != nil {
		port = n.line.port(c.name, dev)
	}
	c.port, err = n.sw.AddPort(port, vswitch.PortConfig{Name: c.name, MAC: c.mac, Addrs: c.addrs})
	if err != nil {
		return err
	}
	for _, a := range c.addrs {
		n.gw.SetNeighbor(a, c.mac)
	}
	if err := c.serve(); err != nil {
		return err
	}
	n.mu.Lock()
	c.plugged = true
	n.publishZone()
	n.mu.Unlock()
	return nil
}

// serve starts the reading of every queue.
func (c *Container) serve() error {
	n, dev := c.network, c.device
	ctx, stop := context.WithCancel(context.Background())
	c.stopServe = stop
	for q := range dev.Queues() {
		var sink frame.Sink = n.sw.Ingress(c.port)
		if n.line != nil {
			sink = n.line.sink(c.name, sink)
		}
		ended := func(err error) {
			if ctx.Err() == nil && !errors.Is(err, tap.ErrClosed) {
				n.log.Warn("device ended", "name", c.name, "queue", q, "error", err)
			}
		}
		if !n.cfg.SharedLoop {
			c.serving.Go(func() {
				if err := dev.Serve(ctx, q, sink); err != nil {
					ended(err)
				}
			})
			continue
		}
		p, err := dev.Pull(q, sink)
		if err != nil {
			return err
		}
		unwatch, err := n.nat.Watch(p.FD(), p.Step, ended)
		if err != nil {
			p.Close()
			return err
		}
		c.stopPulls = append(c.stopPulls, func() { unwatch(); p.Close() })
	}
	return nil
}

// Name is what the container is called on its network.
func (c *Container) Name() string { return c.name }

// Addrs are its addresses, at most one of each IP version.
func (c *Container) Addrs() []netip.Addr { return slices.Clone(c.addrs) }

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
	c.downOnce.Do(func() { c.downErr = c.down() })
	return c.downErr
}

// down undoes Start in the reverse order.
func (c *Container) down() error {
	n := c.network
	var errs []error
	n.mu.Lock()
	c.plugged = false
	n.publishZone()
	n.mu.Unlock()
	for _, p := range c.published {
		errs = append(errs, p.Close())
	}
	if c.proc != nil {
		errs = append(errs, c.proc.Close())
	}
	if c.stopSignals != nil {
		c.stopSignals()
	}
	if c.stopServe != nil {
		c.stopServe()
		for _, stop := range c.stopPulls {
			stop()
		}
		c.serving.Wait()
	}
	if c.port != 0 {
		errs = append(errs, n.sw.RemovePort(c.port))
	}
	if c.device != nil {
		errs = append(errs, c.device.Close())
	}
	for _, a := range c.addrs {
		n.nat.Forget(a) // before the address can be somebody else's
		n.gw.DelNeighbor(a)
	}
	n.nat.Forget(wire.LinkLocal(c.mac)) // the one more that the switch lets pass
	for _, p := range n.pools {
		errs = append(errs, p.Release(context.Background(), c.name))
	}
	n.mu.Lock()
	delete(n.containers, c.name)
	n.mu.Unlock()
	n.log.Info("container down", "name", c.name)
	return errors.Join(errs...)
}
