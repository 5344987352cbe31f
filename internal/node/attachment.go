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

	"patchbay/frame"
	"patchbay/internal/api"
	"patchbay/internal/dns"
	"patchbay/internal/edge"
	"patchbay/internal/wire"
	"patchbay/ipam"
	"patchbay/nat"
	vswitch "patchbay/switch"
	"patchbay/tap"
	"patchbay/tunnel"
)

// txQueueLen is how many frames of a container wait in each queue of its TAP. The kernel drops what is above it without a word to the sender, and each TCP flow may
// have two superframes there, so the kernel's own 500 made a thousand busy flows five to ten times slower. One flow alone never fills it: its socket's
// buffer is full before. It costs 64 KiB of kernel memory a queue.
const txQueueLen = 8192

// Attachment is a container's membership in a network. It is made by Network.Reserve, gets frames with Plug, and ends with Close. It is safe for concurrent use.
type Attachment struct {
	network *Network
	cfg     AttachConfig // as asked for
	name    string
	mac     wire.MAC // written under network.mu
	addrs   []netip.Addr
	created time.Time

	mu        sync.Mutex // of what follows; taken before network.mu
	closed    bool
	published []*nat.Published
	link      *link // nil while it is not plugged
	mortal    bool  // its device persists no more

	// entry is what the zone and the neighbour table know: under network.mu.
	plugged bool

	downOnce sync.Once
	downErr  error
}

// Device is what an Attachment is plugged with: a tap.Device, or a stream.Port.
type Device interface {
	vswitch.Port
	Drops() *frame.DropCounters
	// Close ends whatever reads from it, waits for that and for each Transmit under way. Idempotent.
	Close() error
}

// link is a plugged device with all that goes with it.
type link struct {
	device    Device
	info      tap.Info
	port      vswitch.PortID
	since     time.Time
	serve     func(*link, context.Context) error // starts the reading, again after Pause
	stopServe context.CancelFunc
	stopPulls []func() // of a shared loop
	serving   sync.WaitGroup
	paused    bool
	lost      chan struct{} // closed when the device ended by itself
	loseOnce  sync.Once
}

// Reserve takes a name and leases addresses, and opens the published ports. On error nothing is left. ctx bounds the call alone.
func (n *Network) Reserve(ctx context.Context, cfg AttachConfig) (_ *Attachment, err error) {
	a, err := n.reserveName(cfg)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.Close())
		}
	}()
	if err := a.lease(ctx); err != nil {
		return nil, err
	}
	for _, s := range cfg.Publish {
		if _, err := a.Publish(s); err != nil {
			return nil, err
		}
	}
	return a, nil
}

// reserveName puts a new attachment into the network's table.
func (n *Network) reserveName(cfg AttachConfig) (*Attachment, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil, n.closing()
	}
	name := strings.ToLower(cfg.Name)
	if name == "" {
		for name == "" || n.attachments[name] != nil {
			n.serial++
			name = fmt.Sprintf("c%d", n.serial)
		}
	}
	for _, s := range append([]string{name}, cfg.Aliases...) {
		if err := api.CheckName(s); err != nil {
			return nil, err
		}
		if strings.EqualFold(s, gatewayName) {
			return nil, fmt.Errorf("name %q is the gateway's on network %q; choose another with --name", s, n.cfg.Name)
		}
	}
	if n.attachments[name] != nil {
		return nil, fmt.Errorf("name %q is taken on network %q: %w; choose another with --name", name, n.cfg.Name, ErrTaken)
	}
	a := &Attachment{network: n, cfg: cfg, name: name, mac: cfg.MAC, created: cmp.Or(cfg.Created, time.Now())}
	n.attachments[name] = a
	return a, nil
}

// lease gets the attachment its addresses, and from them its MAC.
func (a *Attachment) lease(ctx context.Context) error {
	n := a.network
	var addrs []netip.Addr
	wanted := slices.Clone(a.cfg.Addrs)
	for _, pool := range n.pools {
		req := ipam.Request{Attachment: a.name, MAC: a.mac, Hostname: a.name}
		if i := slices.IndexFunc(wanted, pool.Prefix().Contains); i >= 0 {
			req.Addr = wanted[i]
			wanted = slices.Delete(wanted, i, i+1)
		}
		rec, err := pool.Lease(ctx, req)
		if err != nil {
			return err
		}
		addrs = append(addrs, rec.Addr)
	}
	if len(wanted) > 0 {
		return fmt.Errorf("address %s is in no subnet of network %q (%s), or the second of its kind; choose one inside", wanted[0], n.cfg.Name, joinPrefixes(n.subnets))
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	a.addrs = addrs
	if a.mac.IsZero() && !a.cfg.LateMAC {
		a.mac = macOf(addrs[0])
	}
	return nil
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

// Interface is what is to be opened inside the container, and how it is to be configured.
func (a *Attachment) Interface() edge.Interface {
	n := a.network
	ifc := edge.Interface{
		Name: a.cfg.IfName, MAC: a.mac, MTU: n.MTU(), Queues: a.cfg.Queues, TxQueueLen: txQueueLen, ForcePlain: a.cfg.ForcePlain, Kind: a.cfg.Device,
	}
	if n.cfg.VNI != 0 && n.cfg.Wire == tunnel.WirePatchbay {
		ifc.GSOMaxSize = tunnel.GSOMaxSize
	}
	for i, pool := range n.pools {
		ifc.Addrs = append(ifc.Addrs, netip.PrefixFrom(a.addrs[i], pool.Prefix().Bits()))
		switch {
		case n.cfg.Internal: // no way out, so no route to it
		case a.addrs[i].Is4():
			ifc.Gateway4 = pool.Gateway()
		default:
			ifc.Gateway6 = pool.Gateway()
		}
	}
	return ifc
}

// ResolvConf is /etc/resolv.conf for a container that has no other network.
func (a *Attachment) ResolvConf() []byte {
	return []byte(dns.ResolvConf(a.network.gwAddrs, a.network.cfg.Name))
}

// Hostname is what the container is to call itself.
func (a *Attachment) Hostname() string { return cmp.Or(a.cfg.Hostname, a.name) }

// Hosts is the container's /etc/hosts: loopback and itself. Every other name comes from the resolver, so that it is never stale.
func (a *Attachment) Hosts() []byte {
	var b strings.Builder
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	for _, addr := range a.addrs {
		fmt.Fprintf(&b, "%s\t%s", addr, a.Hostname())
		if a.name != strings.ToLower(a.Hostname()) {
			fmt.Fprintf(&b, " %s", a.name)
		}
		b.WriteByte('\n')
	}
	return []byte(b.String())
}

// Publish opens host ports that lead to the attachment. They are closed with the Published, or with the attachment.
func (a *Attachment) Publish(s nat.Spec) (*nat.Published, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return nil, fmt.Errorf("publish %s: %q is being detached from network %q", s, a.name, a.network.cfg.Name)
	}
	if a.network.cfg.Internal {
		return nil, fmt.Errorf("publish %s: network %q is internal, so nothing outside reaches it; use a network without --internal", s, a.network.cfg.Name)
	}
	p, err := a.network.nat.Publish(s, a.addrs)
	if err != nil {
		return nil, err
	}
	a.published = append(a.published, p)
	return p, nil
}

// Unpublish closes what Publish opened.
func (a *Attachment) Unpublish(p *nat.Published) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.published = slices.DeleteFunc(a.published, func(q *nat.Published) bool { return q == p })
	return p.Close()
}

// PlugTAP plugs a TAP or packet socket that was opened inside the container. It takes the descriptors of h over, on error too.
func (a *Attachment) PlugTAP(h *tap.Handle) error {
	dev, err := tap.New(tap.Config{Info: h.Info, FDs: h.FDs})
	if err != nil {
		return errors.Join(err, h.Close())
	}
	h.FDs = nil // they are the device's, and closed with it: a second close could meet somebody else's
	return a.plug(dev, h.Info, func(l *link, ctx context.Context) error { return a.serveTAP(ctx, l, dev) })
}

// Serving is a Device that reads by itself, all of it on one goroutine.
type Serving interface {
	Device
	Serve(ctx context.Context, sink frame.Sink) error
}

// Adopt gives an attachment of LateMAC the MAC of its machine, and unless an IPv6 address was asked for the one that the machine makes of its MAC and a /64 (RFC 4862 §5.5.3), since it
// will use no other. It must not be plugged.
func (a *Attachment) Adopt(ctx context.Context, mac wire.MAC) error {
	n := a.network
	addrs := a.Addrs()
	for i, pool := range n.pools {
		p := pool.Prefix()
		if !p.Addr().Is6() || p.Bits() != 64 || slices.ContainsFunc(a.cfg.Addrs, p.Contains) {
			continue
		}
		b, id := p.Addr().As16(), wire.LinkLocal(mac).As16()
		copy(b[8:], id[8:])
		own := netip.AddrFrom16(b)
		if own == addrs[i] {
			continue
		}
		if err := pool.Release(ctx, a.name); err != nil {
			return err
		}
		rec, err := pool.Lease(ctx, ipam.Request{Attachment: a.name, MAC: mac, Hostname: a.name, Addr: own})
		if err != nil { // somebody has it: any other is as good as none
			if rec, err = pool.Lease(ctx, ipam.Request{Attachment: a.name, MAC: mac, Hostname: a.name}); err != nil {
				return err
			}
		}
		addrs[i] = rec.Addr
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	a.mac, a.addrs = mac, addrs
	return nil
}

// PlugServing plugs a device of another kind. It takes dev over, on error too.
func (a *Attachment) PlugServing(dev Serving) error {
	n := a.network
	return a.plug(dev, tap.Info{MAC: a.mac, MTU: n.MTU()}, func(l *link, ctx context.Context) error {
		sink := a.sink(l.port)
		l.serving.Go(func() { a.ended(l, ctx, 0, dev.Serve(ctx, sink)) })
		return nil
	})
}

// plug connects dev to the switch: from here on frames flow. It takes dev over, on error too.
func (a *Attachment) plug(dev Device, info tap.Info, serve func(*link, context.Context) error) (err error) {
	n := a.network
	a.mu.Lock()
	defer a.mu.Unlock()
	if d, ok := dev.(*tap.Device); ok && a.mortal { // of an earlier process, which has let it persist
		if err := d.SetPersist(false); err != nil {
			return errors.Join(err, dev.Close())
		}
	}
	if a.closed || a.link != nil {
		return errors.Join(fmt.Errorf("attachment %q on network %q: it is being detached, or plugged already", a.name, n.cfg.Name), dev.Close())
	}
	l := &link{device: dev, info: info, since: time.Now(), serve: serve, lost: make(chan struct{})}
	a.link = l
	defer func() {
		if err != nil {
			err = errors.Join(err, a.unplug())
		}
	}()
	var port vswitch.Port = dev
	if n.line != nil {
		port = n.line.port(a.name, dev)
	}
	pc := vswitch.PortConfig{
		Name: a.name, Isolated: n.cfg.Isolate, StormLimit: a.cfg.StormLimit, RateLimit: a.cfg.Rate, MACLimit: a.cfg.MACLimit,
	}
	if !a.cfg.Trust {
		pc.MAC, pc.Addrs = a.mac, a.addrs
	}
	if l.port, err = n.sw.AddPort(port, pc); err != nil {
		return err
	}
	for _, addr := range a.addrs {
		n.gw.SetNeighbor(addr, a.mac)
	}
	ctx, stop := context.WithCancel(context.Background())
	l.stopServe = stop
	if err := serve(l, ctx); err != nil {
		return err
	}
	a.resetOrphans()
	n.mu.Lock()
	a.plugged = true
	n.publishZone()
	n.mu.Unlock()
	n.log.Info("attachment up", "network", n.cfg.Name, "name", a.name, "addrs", a.addrs, "mac", a.mac, "port", l.port)
	return nil
}

// resetOrphans ends the TCP connections that an earlier process carried for the container. a.mu is held.
func (a *Attachment) resetOrphans() {
	for _, addr := range append(slices.Clone(a.addrs), wire.LinkLocal(a.mac)) {
		if k := a.network.nat.ResetOrphans(addr); k > 0 {
			a.network.log.Info("connections of an earlier process are reset", "network", a.network.cfg.Name, "name", a.name, "addr", addr, "connections", k)
		}
	}
}

// sink is the switch as the device of port sees it.
func (a *Attachment) sink(port vswitch.PortID) frame.Sink {
	var sink frame.Sink = a.network.sw.Ingress(port)
	if a.network.line != nil {
		sink = a.network.line.sink(a.name, sink)
	}
	return sink
}

// enterLoop takes one of the places that NAT's loop has for TAPs.
func (n *Network) enterLoop() bool {
	for {
		in := n.inLoop.Load()
		if int(in) >= n.cfg.LoopTAPs {
			return false
		}
		if n.inLoop.CompareAndSwap(in, in+1) {
			return true
		}
	}
}

// serveTAP starts the reading of every queue.
func (a *Attachment) serveTAP(ctx context.Context, l *link, dev *tap.Device) error {
	n := a.network
	for q := range dev.Queues() {
		sink := a.sink(l.port)
		if dev.Queues() > 1 || !n.enterLoop() {
			l.serving.Go(func() { a.ended(l, ctx, q, dev.Serve(ctx, q, sink)) })
			continue
		}
		p, err := dev.Pull(q, sink)
		if err != nil {
			n.inLoop.Add(-1)
			return err
		}
		unwatch, err := n.nat.Watch(p.FD(), p.Step, func(err error) { a.ended(l, ctx, q, err) })
		if err != nil {
			p.Close()
			n.inLoop.Add(-1)
			return err
		}
		l.stopPulls = append(l.stopPulls, func() { unwatch(); p.Close(); n.inLoop.Add(-1) })
	}
	return nil
}

// stopReading ends the reading of every queue, and returns when nothing of it goes on. The link may be served again.
func (l *link) stopReading() {
	l.stopServe()
	for _, stop := range l.stopPulls {
		stop()
	}
	l.stopPulls = nil
	l.serving.Wait()
}

// ended notes that a queue is read no more.
func (a *Attachment) ended(l *link, ctx context.Context, queue int, err error) {
	if err == nil || ctx.Err() != nil || errors.Is(err, tap.ErrClosed) {
		return
	}
	a.network.log.Info("device ended", "network", a.network.cfg.Name, "name", a.name, "queue", queue, "reason", err)
	l.loseOnce.Do(func() { close(l.lost) })
}

// Lost is closed when the device has ended by itself: its namespace is gone, or its virtual machine. It is nil while the attachment is not plugged.
func (a *Attachment) Lost() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.link == nil {
		return nil
	}
	return a.link.lost
}

// Pause stops reading from the attachment's device and for a TAP returns duplicates of its descriptors, which are the caller's, for another process to go on: what its container sends waits in the
// interface's queues. What is for the container is still delivered. There are none when it is not plugged, or with another device.
func (a *Attachment) Pause() (*tap.Handle, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.link == nil {
		return nil, nil
	}
	var fds []int
	dev, ok := a.link.device.(*tap.Device)
	if ok {
		var err error
		if fds, err = dev.Dup(); err != nil {
			return nil, err
		}
	}
	a.link.stopReading()
	a.link.paused = true
	if !ok {
		return nil, nil
	}
	return &tap.Handle{Info: a.link.info, FDs: fds}, nil
}

// Continue reads again after Pause. It does nothing when the attachment is not paused.
func (a *Attachment) Continue() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.link == nil || !a.link.paused {
		return nil
	}
	a.link.paused = false
	ctx, stop := context.WithCancel(context.Background())
	a.link.stopServe = stop
	return a.link.serve(a.link, ctx)
}

// PublishFrom is Publish with sockets that another process has handed over (nat.Published.Export). It takes fds over, on error too.
func (a *Attachment) PublishFrom(s nat.Spec, fds []int) (*nat.Published, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p, err := a.network.nat.PublishFrom(s, a.addrs, fds)
	if err != nil {
		return nil, err
	}
	a.published = append(a.published, p)
	return p, nil
}

// Persist lets the interface inside outlive the device, for the next node, unless ClearPersist has been called. Not being plugged is no error.
func (a *Attachment) Persist() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.mortal {
		return nil
	}
	return a.setPersist(true)
}

// ClearPersist lets the interface inside go when the device is closed, for good. Devices that are not persistent go anyway.
func (a *Attachment) ClearPersist() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.mortal = true
	return a.setPersist(false)
}

func (a *Attachment) setPersist(on bool) error {
	if a.link == nil {
		return nil
	}
	if d, ok := a.link.device.(*tap.Device); ok {
		return d.SetPersist(on)
	}
	return nil
}

// Unplug takes the device off the switch and closes it. Name, addresses and published ports stay, for another Plug. Not being plugged is no error.
func (a *Attachment) Unplug() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.unplug()
}

// unplug is Unplug; a.mu is held.
func (a *Attachment) unplug() error {
	n, l := a.network, a.link
	if l == nil {
		return nil
	}
	a.link = nil
	n.mu.Lock()
	if a.plugged {
		a.plugged = false
		n.publishZone()
	}
	n.mu.Unlock()
	var errs []error
	if l.stopServe != nil {
		l.stopReading()
	}
	if l.port != 0 {
		errs = append(errs, n.sw.RemovePort(l.port))
	}
	errs = append(errs, l.device.Close())
	n.retire(l.device)
	for _, addr := range a.addrs {
		n.nat.Forget(addr) // before the address can be somebody else's
		n.gw.DelNeighbor(addr)
	}
	if !a.mac.IsZero() {
		n.nat.Forget(wire.LinkLocal(a.mac)) // the one more that the switch lets pass
	}
	return errors.Join(errs...)
}

// Name is what the attachment is called on its network.
func (a *Attachment) Name() string { return a.name }

// Addrs are its addresses, at most one of each IP version.
func (a *Attachment) Addrs() []netip.Addr {
	a.network.mu.Lock()
	defer a.network.mu.Unlock()
	return slices.Clone(a.addrs)
}

// MAC is its interface's; zero while a virtual machine has not shown its own.
func (a *Attachment) MAC() wire.MAC {
	a.network.mu.Lock()
	defer a.network.mu.Unlock()
	return a.mac
}

// Close closes the published ports, takes the device off the network and gives name and addresses back. Idempotent; it returns when nothing is left.
func (a *Attachment) Close() error {
	a.downOnce.Do(func() { a.downErr = a.down() })
	return a.downErr
}

// down undoes Reserve and Plug in the reverse order.
func (a *Attachment) down() error {
	n := a.network
	a.mu.Lock()
	a.closed = true
	var errs []error
	for _, p := range a.published {
		errs = append(errs, p.Close())
	}
	a.published = nil
	errs = append(errs, a.unplug())
	a.mu.Unlock()
	n.mu.Lock()
	keep := n.keepLeases
	n.mu.Unlock()
	for _, p := range n.pools {
		if !keep {
			errs = append(errs, p.Release(context.Background(), a.name))
		}
	}
	n.mu.Lock()
	delete(n.attachments, a.name)
	n.mu.Unlock()
	n.log.Info("attachment down", "network", n.cfg.Name, "name", a.name)
	return errors.Join(errs...)
}
