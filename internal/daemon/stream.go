package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"patchbay/internal/api"
	"patchbay/stream"
)

// AttachStream implements api.Backend.
func (n *Node) AttachStream(ctx context.Context, network string, spec api.AttachmentSpec) (api.Attachment, error) {
	if err := spec.Validate(); err != nil {
		return api.Attachment{}, err
	}
	nw, err := n.lookup(network)
	if err != nil {
		return api.Attachment{}, err
	}
	specs, err := parsePublishes(spec.Publish)
	if err != nil {
		return api.Attachment{}, err
	}
	rec := attachmentRecord{AttachmentSpec: spec, Created: time.Now().UTC()}
	rec.Publish = nil
	a, err := n.reserve(ctx, nw, rec)
	if err != nil {
		return api.Attachment{}, err
	}
	undo := func(err error) (api.Attachment, error) { return api.Attachment{}, errors.Join(err, a.remove()) }
	for _, s := range specs {
		if _, err := n.publish(a, s, originAttach, ""); err != nil {
			return undo(err)
		}
	}
	n.applyRules(a)
	l, err := api.ListenStream(a.rec.Stream)
	if err != nil {
		return undo(err)
	}
	n.listenStream(a, l)
	if err := a.write(); err != nil {
		return undo(err)
	}
	return n.describe(a), nil
}

// listenStream serves one virtual machine after the other that connects to l, until the attachment or the node ends. A second one waits for the first to go.
func (n *Node) listenStream(a *attachment, l *net.UnixListener) {
	n.mu.Lock()
	a.listener = l
	n.mu.Unlock()
	ctx, cancel := context.WithCancel(n.ctx)
	n.background.Go(func() {
		select {
		case <-a.detached:
		case <-n.ctx.Done():
		}
		cancel()
		l.Close()
	})
	a.serving.Go(func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				if ctx.Err() == nil {
					n.log.Error("virtual machine's socket", "name", a.Name(), "error", err)
				}
				return
			}
			if err := n.serveMachine(ctx, a, conn); err != nil && ctx.Err() == nil {
				n.log.Warn("virtual machine", "network", a.network.rec.Name, "name", a.Name(), "reason", err)
			}
		}
	})
}

// serveMachine is the life of one connection: the port is plugged when the machine has shown its MAC.
func (n *Node) serveMachine(ctx context.Context, a *attachment, conn *net.UnixConn) error {
	if err := api.Admit(conn); err != nil {
		conn.Close()
		return err
	}
	port, err := stream.New(stream.Config{Conn: conn, MTU: a.network.rec.MTU})
	if err != nil {
		conn.Close()
		return err
	}
	mac, err := port.First(ctx)
	if err == nil && (mac.IsGroup() || mac.IsZero()) {
		err = fmt.Errorf("its first frame comes from %s, which is nobody's address", mac)
	}
	if err == nil && a.fixedMAC() && mac != a.MAC() {
		n.log.Warn("virtual machine has another MAC than --mac says, so its frames are dropped as spoofed", "name", a.Name(), "mac", mac, "want", a.MAC())
	} else if err == nil {
		err = a.adopt(ctx, mac)
	}
	if err == nil {
		err = a.PlugServing(port)
	} else {
		err = errors.Join(err, port.Close())
	}
	if err != nil {
		return err
	}
	lost := a.Lost()
	err = a.up()
	if err == nil {
		select {
		case <-lost:
		case <-ctx.Done():
		}
	}
	n.mu.Lock()
	a.since = time.Time{}
	n.mu.Unlock()
	return errors.Join(err, a.Unplug())
}

// fixedMAC reports whether the MAC was given by the one who attached.
func (a *attachment) fixedMAC() bool { return !a.asked.MAC.IsZero() }

// adopt takes the machine's MAC and the addresses that go with it over, and leads published ports there.
func (a *attachment) adopt(ctx context.Context, mac [6]byte) error {
	n := a.node
	before := a.Addrs()
	if err := a.Adopt(ctx, mac); err != nil {
		return err
	}
	n.mu.Lock()
	ports := slices.Clone(a.publishes)
	n.mu.Unlock()
	if slices.Equal(before, a.Addrs()) {
		return nil
	}
	for _, p := range ports {
		n.republish(p)
	}
	return nil
}
