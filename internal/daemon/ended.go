package daemon

import (
	"time"

	"patchbay/internal/api"
	"patchbay/internal/netns"
)

// endedEvery is how often the node looks whether namespaces are still in use. The descriptor of a TAP keeps its namespace alive (tun_chr_open in the kernel's
// drivers/net/tun.c), so the interface does not end with the last process; somebody has to look.
const endedEvery = 500 * time.Millisecond

// watchNamespaces ends attachments whose namespaces nobody uses any more, until the node ends.
func (n *Node) watchNamespaces() {
	tick := time.NewTicker(endedEvery)
	defer tick.Stop()
	for {
		select {
		case <-n.ctx.Done():
			return
		case <-tick.C:
		}
		for _, u := range n.inNamespaces() {
			if !u.id.AliveAt(u.path) {
				u.a.moveOrEnd(u)
			}
		}
	}
}

// use is an attachment with what its namespace is known by.
type use struct {
	a    *attachment
	id   netns.Identity
	path string
}

// inNamespaces is every attachment that is plugged into a namespace of somebody else's.
func (n *Node) inNamespaces() (out []use) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.busy() != nil {
		return nil // the next node will look
	}
	for _, nw := range n.networks {
		for _, a := range nw.attachments {
			if a.lifetime == api.LifetimeNamespace && !a.going && !a.since.IsZero() && a.rec.Identity != nil {
				out = append(out, use{a: a, id: *a.rec.Identity, path: a.rec.NetNS})
			}
		}
	}
	return out
}

// moveOrEnd is called when u leads to the namespace no more. If another process is in there the attachment is known by that one from now on; otherwise it ends.
func (a *attachment) moveOrEnd(u use) {
	n := a.node
	log := n.log.With("network", a.network.rec.Name, "name", a.Name())
	p := u.id.Process()
	if p == nil {
		log.Info("attachment's namespace has ended")
		a.end()
		return
	}
	n.mu.Lock()
	a.rec.PID, a.rec.NetNS, a.rec.Identity = p.PID, "", p
	n.mu.Unlock()
	log.Info("attachment's namespace is known by another process now", "pid", p.PID)
	if err := a.save(); err != nil {
		log.Error("attachment is not saved", "error", err)
	}
}
