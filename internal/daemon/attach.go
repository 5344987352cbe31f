package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/api"
	"patchbay/internal/netns"
	"patchbay/internal/node"
	"patchbay/internal/spin"
	"patchbay/internal/wire"
	"patchbay/nat"
	"patchbay/stream"
	"patchbay/tap"
)

// attachment is a membership with what the node knows about it.
type attachment struct {
	*node.Attachment
	node     *Node
	network  *network
	lifetime api.Lifetime
	asked    api.AttachmentSpec // as it was first asked for, and so what may change
	serving  sync.WaitGroup     // of listener

	disk sync.Mutex // one writer of the record at a time; taken before Node.mu

	// Guarded by Node.mu.
	rec       attachmentRecord
	written   bool // to disk, or about to be
	publishes []*publish
	since     time.Time     // since when it is plugged; zero while it is not
	queues    int           // of its device
	detached  chan struct{} // closed when it is being taken away
	going     bool
	abandoned bool              // its session has ended while nothing could be changed
	listener  *net.UnixListener // of LifetimeStream
	reopening sync.Mutex        // held while the interface that an earlier node left is opened, or removed
	left      bool              // there may be such an interface, and it is not plugged; guarded by reopening
	machine   *stream.Port      // the virtual machine that is connected
	inherited bool              // plugged with what another node handed over, and not seen its client yet
	session   int               // which Attaching is its client's now: one that has been replaced has no say any more
}

// attachConfig is what the room below wants to know.
func (r *attachmentRecord) attachConfig() (node.AttachConfig, error) {
	c := node.AttachConfig{
		Name: r.Name, Aliases: r.Aliases, Hostname: r.Hostname, IfName: r.IfName, Addrs: r.Addrs, MAC: r.MAC, Queues: r.Queues, Rate: r.Rate,
		StormLimit: cmp.Or(r.StormLimit, DefaultStormLimit), MACLimit: cmp.Or(r.MACLimit, DefaultMACLimit), Trust: r.Trust, Created: r.Created,
		LateMAC: r.Lifetime == api.LifetimeStream,
	}
	if err := c.Device.UnmarshalText([]byte(cmp.Or(r.Device, tap.KindAuto.String()))); err != nil {
		return c, api.Errorf(api.CodeInvalid, "", "attachment %q: %w", r.Name, err)
	}
	return c, nil
}

// reserve makes an attachment that is not plugged: name, addresses and published ports are its own. On error nothing is left.
func (n *Node) reserve(ctx context.Context, nw *network, rec attachmentRecord) (*attachment, error) {
	cfg, err := rec.attachConfig()
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	err = n.busy()
	if cfg.Name == "" {
		cfg.Name = n.freeName()
	}
	if err == nil && len(nw.attachments) >= n.cfg.MaxAttachments {
		err = api.Errorf(api.CodeExhausted, "detach some, or use another network", "network %q has %d attachments, which is its limit", nw.rec.Name, n.cfg.MaxAttachments)
	}
	n.mu.Unlock()
	if err != nil {
		return nil, err
	}
	live, err := nw.Reserve(ctx, cfg)
	if err != nil {
		return nil, refuse(api.CodeInvalid, err)
	}
	a := &attachment{Attachment: live, node: n, network: nw, lifetime: rec.Lifetime, asked: rec.AttachmentSpec, rec: rec, detached: make(chan struct{})}
	a.rec.Name, a.rec.Addrs, a.rec.MAC = live.Name(), live.Addrs(), live.MAC()
	n.mu.Lock()
	nw.attachments[live.Name()] = a
	n.mu.Unlock()
	return a, nil
}

// freeName is a name for who gave none: free on every network, since the container may join others under the same one. Node.mu is held.
func (n *Node) freeName() string {
	for {
		n.serial++
		name := fmt.Sprintf("c%d", n.serial)
		taken := false
		for _, nw := range n.networks {
			taken = taken || nw.attachments[name] != nil
		}
		if !taken {
			return name
		}
	}
}

// Attach implements api.Backend.
func (n *Node) Attach(ctx context.Context, network string, spec api.AttachmentSpec, peer api.Caller) (api.Attaching, error) {
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	end, err := n.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	nw, err := n.lookup(network)
	if err != nil {
		return nil, err
	}
	specs, err := parsePublishes(spec.Publish)
	if err != nil {
		return nil, err
	}
	rec := attachmentRecord{AttachmentSpec: spec, Created: time.Now().UTC()}
	rec.Publish = nil
	if spec.Lifetime == api.LifetimeSession {
		// A client that has ended already has no identity; its connection then says so.
		rec.Holder, _ = netns.IdentifyProcess(peer.PID)
	}
	a, err := n.reserve(ctx, nw, rec)
	if err != nil {
		return nil, err
	}
	for _, s := range specs {
		if _, err := n.publish(a, s, originAttach, ""); err != nil {
			return nil, errors.Join(err, a.remove())
		}
	}
	n.applyRules(a)
	return n.attaching(a), nil
}

// Resume implements api.Backend.
func (n *Node) Resume(_ context.Context, network, name string, peer api.Caller) (api.Attaching, error) {
	a, err := n.find(network, name)
	if err != nil {
		return nil, err
	}
	holder, _ := netns.IdentifyProcess(peer.PID)
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.busy(); err != nil {
		return nil, err
	}
	if a.lifetime != api.LifetimeSession {
		return nil, api.Errorf(api.CodeConflict, "only `patchbay run` resumes", "attachment %q has no client", a.rec.Name)
	}
	if h := a.rec.Holder; h != nil && (holder == nil || *h != *holder) && a.session > 0 {
		return nil, api.Errorf(api.CodeConflict, "detach it first", "attachment %q is process %d's", a.rec.Name, h.PID)
	}
	a.rec.Holder = holder
	return n.attachingLocked(a), nil
}

// find finds an attachment by its names.
func (n *Node) find(network, name string) (*attachment, error) {
	nw, err := n.lookup(network)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if a := nw.attachments[strings.ToLower(name)]; a != nil && !a.going {
		return a, nil
	}
	return nil, api.Errorf(api.CodeNotFound, "`patchbay ps` shows those there are", "network %q has no attachment %.70q", nw.rec.Name, name)
}

// attaching is an api.Attaching.
type attaching struct {
	a       *attachment
	session int
	plugged bool // of one goroutine, the session's
}

func (n *Node) attaching(a *attachment) *attaching {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.attachingLocked(a)
}

func (n *Node) attachingLocked(a *attachment) *attaching {
	a.session++
	a.abandoned = false
	return &attaching{a: a, session: a.session}
}

// Plan implements api.Attaching.
func (t *attaching) Plan() api.Plan {
	a := t.a
	p := api.Plan{
		Network: a.network.rec.Name, Name: a.Name(), Interface: a.Interface(), ResolvConf: a.ResolvConf(), Hosts: a.Hosts(), Hostname: a.Hostname(),
	}
	p.Interface.Persist = a.lifetime == api.LifetimeNamespace
	return p
}

// Detached implements api.Attaching.
func (t *attaching) Detached() <-chan struct{} { return t.a.detached }

// Plug implements api.Attaching.
func (t *attaching) Plug(_ context.Context, d api.Device) (api.Attachment, error) {
	h := &tap.Handle{Info: d.Info, FDs: d.FDs, Notes: d.Notes}
	if d.Error != "" {
		h.Close()
		t.Abort()
		return api.Attachment{}, api.Errorf(api.CodeInvalid, "", "%s", d.Error)
	}
	a, n := t.a, t.a.node
	if a.lifetime == api.LifetimeNamespace && d.Identity == nil {
		h.Close()
		t.Abort()
		return api.Attachment{}, api.Errorf(api.CodeInvalid, "give device.identity", "attachment %q: nobody says which namespace it is in", a.Name())
	}
	n.mu.Lock()
	inherited := a.inherited
	a.inherited = false
	a.rec.PID, a.rec.Identity, a.rec.Info, a.rec.Notes, a.rec.IfName = cmp.Or(d.PID, a.rec.PID), d.Identity, d.Info, d.Notes, d.Info.Name
	n.mu.Unlock()
	if inherited { // the client's descriptors are duplicates of those that are plugged already
		h.Close()
		t.plugged = true
		return n.describe(a), a.save()
	}
	if err := a.plug(h); err != nil {
		t.Abort()
		return api.Attachment{}, err
	}
	t.plugged = true
	return n.describe(a), nil
}

// Abort implements api.Attaching.
func (t *attaching) Abort() {
	if !t.plugged && t.current() {
		t.a.end()
	}
}

// Leave implements api.Attaching.
func (t *attaching) Leave() {
	if t.plugged && t.a.lifetime == api.LifetimeSession && t.current() {
		t.a.end()
	}
}

// current reports whether this is still the attachment's session: the client of one may have come again before the end of the old connection was seen. While the node ends,
// nobody's is: the client is about to come to the next one. If there comes none after all, endAbandoned ends it.
func (t *attaching) current() bool {
	n := t.a.node
	n.mu.Lock()
	defer n.mu.Unlock()
	if t.session != t.a.session || n.closed {
		return false
	}
	t.a.abandoned = n.frozen
	return !n.frozen
}

// plug plugs a device that was opened inside, writes the attachment down and watches it. It takes h over. On error the attachment is as before.
func (a *attachment) plug(h *tap.Handle) error {
	if err := a.Unplug(); err != nil { // of a session that is being replaced
		h.Close()
		return err
	}
	a.reading(len(h.FDs))
	if err := a.PlugTAP(h); err != nil {
		return refuse(api.CodeInvalid, err)
	}
	err := a.up()
	if err == nil && a.lifetime == api.LifetimeNamespace {
		// Not before: an interface that outlives everybody who knows of it could be taken away by nobody. A record of one that is gone does no harm.
		err = a.Persist()
	}
	if err != nil {
		if a.isGoing() { // and nobody may have been there to do that when it began to go
			err = errors.Join(err, a.ClearPersist())
		}
		return errors.Join(err, a.Unplug())
	}
	return nil
}

func (a *attachment) isGoing() bool {
	a.node.mu.Lock()
	defer a.node.mu.Unlock()
	return a.going
}

// up writes down that a is plugged, and watches over it.
func (a *attachment) up() error {
	n := a.node
	a.settle()
	if err := a.write(); err != nil {
		return err
	}
	lost := a.Lost()
	n.mu.Lock()
	defer n.mu.Unlock()
	if a.going || n.closed {
		return a.detachedMeanwhile()
	}
	a.since = time.Now()
	if a.lifetime != api.LifetimeStream { // whose socket outlives a machine
		n.background.Go(func() { a.watch(lost) })
	}
	return nil
}

// settle puts what a has of its own for good into its record.
func (a *attachment) settle() {
	n := a.node
	mac, addrs := a.MAC(), a.Addrs()
	if a.lifetime == api.LifetimeStream && !a.fixedMAC() {
		// The next machine may be another one, with another MAC and an IPv6 address made of that.
		mac = wire.MAC{}
		addrs = slices.DeleteFunc(addrs, func(addr netip.Addr) bool { return addr.Is6() && !slices.Contains(a.asked.Addrs, addr) })
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	a.rec.MAC, a.rec.Addrs = mac, addrs
}

// write puts the record on disk as it is, unless a is being taken away: what comes back from the disk must not be what was said to be gone.
func (a *attachment) write() error {
	n := a.node
	a.disk.Lock()
	defer a.disk.Unlock()
	n.mu.Lock()
	rec, going := a.rec, a.going
	rec.Ports = slices.Clone(rec.Ports)
	a.written = a.written || !going
	n.mu.Unlock()
	if going {
		return a.detachedMeanwhile()
	}
	return n.state.put(attachmentBucket, attachmentKey(a.network.rec.Name, rec.Name), rec)
}

func (a *attachment) detachedMeanwhile() error {
	return api.Errorf(api.CodeConflict, "attach it again", "attachment %q was detached meanwhile", a.Name())
}

// watch ends an attachment whose device has ended by itself.
func (a *attachment) watch(lost <-chan struct{}) {
	select {
	case <-lost:
		a.node.log.Info("attachment lost its interface", "network", a.network.rec.Name, "name", a.Name())
		a.end()
	case <-a.detached:
	case <-a.node.ctx.Done():
	}
}

// Detach implements api.Backend.
func (n *Node) Detach(_ context.Context, network, name string) error {
	end, err := n.begin()
	if err != nil {
		return err
	}
	defer end()
	a, err := n.find(network, name)
	if err != nil {
		return err
	}
	return a.remove()
}

// end is remove for those who have nobody to tell of an error.
func (a *attachment) end() {
	if err := a.remove(); err != nil {
		a.node.log.Error("detach", "error", err)
	}
}

// remove takes the attachment away. Its interface loses its persistence first, then it goes off the disk: a node that is killed in between leaves a record without an interface, which the
// next one cleans up, and not an interface that nobody knows of. Idempotent.
func (a *attachment) remove() error {
	n, nw := a.node, a.network
	n.mu.Lock()
	if a.going || n.closed || n.frozen {
		n.mu.Unlock()
		return nil
	}
	a.going = true
	close(a.detached)
	publishes := slices.Clone(a.publishes)
	a.since = time.Time{}
	n.mu.Unlock()
	var err error
	if a.lifetime == api.LifetimeNamespace {
		err = a.ClearPersist()
		a.forgetLeft()
	}
	a.disk.Lock()
	err = errors.Join(err, n.state.remove(attachmentBucket, attachmentKey(nw.rec.Name, a.Name())))
	a.disk.Unlock()
	err = errors.Join(err, a.Close())
	a.serving.Wait()
	a.reading(0)
	n.mu.Lock()
	if nw.attachments[a.Name()] == a { // the name is free since Close, and may be another's already
		delete(nw.attachments, a.Name())
	}
	for _, p := range publishes {
		delete(n.publishes, p.rec.ID)
	}
	n.mu.Unlock()
	if err != nil {
		return fmt.Errorf("detach %q from network %q: %w", a.Name(), nw.rec.Name, err)
	}
	return nil
}

// reading says how many TAP queues of the attachment have a thread each.
func (a *attachment) reading(queues int) {
	n := a.node
	n.mu.Lock()
	defer n.mu.Unlock()
	n.queues += queues - a.queues
	a.queues = queues
	spin.SetProcs(n.queues + nat.Loops*len(n.networks))
}

// holderFD is a pidfd of the process behind id, or an error when it is gone.
func holderFD(id *netns.Identity) (int, error) {
	fd, err := unix.PidfdOpen(id.PID, 0)
	if err != nil {
		return -1, err
	}
	// Between the two looks nobody else can have got the pid: the descriptor is of the process that has it now.
	now, err := netns.IdentifyProcess(id.PID)
	if err != nil || now.StartTime != id.StartTime {
		unix.Close(fd)
		return -1, errors.Join(err, unix.ESRCH)
	}
	return fd, nil
}

func parsePublishes(texts []string) ([]nat.Spec, error) {
	var specs []nat.Spec
	for _, t := range texts {
		s, err := nat.ParseSpec(t)
		if err != nil {
			return nil, refuse(api.CodeInvalid, err)
		}
		specs = append(specs, s)
	}
	return specs, nil
}
