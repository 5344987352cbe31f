package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
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
	n.listenStream(a, l, nil)
	a.settle()
	if err := a.write(); err != nil {
		return undo(err)
	}
	return n.describe(a), nil
}

// giveWay is how long a machine that has sent something may take to end when another one connects: the next one may be faster than the end of the last.
const giveWay = time.Second

// listenStream serves the virtual machine that connects to l, and when that has gone the next one, until the attachment or the node ends. A second one is refused,
// unless the first has not sent a frame yet: whoever connects and says nothing does not keep a machine out.
// given is one that was connected to another node before, or nil.
func (n *Node) listenStream(a *attachment, l *net.UnixListener, given *givenMachine) {
	n.mu.Lock()
	a.listener = l
	n.mu.Unlock()
	ctx, cancel := context.WithCancel(n.ctx)
	a.serving.Go(func() {
		select {
		case <-a.detached:
			cancel()
			if err := api.CloseStream(l); err != nil {
				n.log.Warn("virtual machine's socket", "name", a.Name(), "error", err)
			}
		case <-n.ctx.Done():
			l.Close()
		}
		cancel()
	})
	a.serving.Go(func() {
		log := n.log.With("network", a.network.rec.Name, "name", a.Name())
		var now *machine
		if given != nil {
			now = n.startMachine(ctx, a, given, log)
		}
		for {
			conn, err := l.AcceptUnix()
			if errors.Is(err, os.ErrDeadlineExceeded) { // a takeover is under way
				select {
				case <-ctx.Done():
				case <-time.After(50 * time.Millisecond):
				}
				continue
			}
			if err != nil {
				if ctx.Err() == nil {
					log.Error("virtual machine's socket", "error", err)
				}
				break
			}
			if err := api.Admit(conn); err != nil {
				conn.Close()
				log.Warn("virtual machine", "reason", err)
				continue
			}
			if now != nil && !now.over(giveWay) {
				conn.Close()
				log.Warn("a second virtual machine is refused: there is one on this socket, which has to go first")
				continue
			}
			now = n.startMachine(ctx, a, &givenMachine{conn: conn}, log)
		}
		if now != nil {
			<-now.done
		}
	})
}

// machine is one connection.
type machine struct {
	leave context.CancelFunc // ends it while it has sent nothing
	done  chan struct{}      // closed when nothing of it is left
}

// startMachine serves what has connected on a goroutine of its own.
func (n *Node) startMachine(ctx context.Context, a *attachment, given *givenMachine, log *slog.Logger) *machine {
	silent, leave := context.WithCancel(ctx)
	m := &machine{leave: leave, done: make(chan struct{})}
	a.serving.Go(func() {
		defer close(m.done)
		defer leave()
		if err := n.serveMachine(ctx, silent, a, given); err != nil && ctx.Err() == nil {
			log.Warn("virtual machine", "reason", err)
		}
	})
	return m
}

// over reports whether the machine has gone, or goes within wait, or has had to because it has sent nothing.
func (m *machine) over(wait time.Duration) bool {
	m.leave()
	select {
	case <-m.done:
		return true
	case <-time.After(wait):
		return false
	}
}

// serveMachine is the life of one connection: the port is plugged when the machine has shown its MAC, for which it has until silent ends.
func (n *Node) serveMachine(ctx, silent context.Context, a *attachment, given *givenMachine) error {
	port, err := stream.New(stream.Config{Conn: given.conn, Pending: given.pending, MTU: a.network.rec.MTU})
	if err != nil {
		given.conn.Close()
		return err
	}
	mac := given.mac
	if mac.IsZero() {
		mac, err = port.First(silent)
	}
	if err != nil && silent.Err() != nil {
		err = errors.New("it has sent nothing, and another one has connected")
	}
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
	n.mu.Lock()
	a.machine = port
	n.mu.Unlock()
	lost := a.Lost()
	err = a.up()
	if err == nil {
		select {
		case <-lost:
		case <-ctx.Done():
		}
	}
	n.mu.Lock()
	a.since, a.machine = time.Time{}, nil
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
