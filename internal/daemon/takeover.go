package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/api"
	"patchbay/internal/wire"
	"patchbay/nat"
	"patchbay/tap"
)

// HandOver implements api.Backend. The node stops changing anything, stops reading its TAPs and accepting clients, sends what is not on disk and lets go of the state file. Frames and clients
// wait in the kernel's queues meanwhile.
func (n *Node) HandOver(send func(p api.Part, fds []int) error) (api.Handing, error) {
	n.mu.Lock()
	if err := n.busy(); err != nil {
		n.mu.Unlock()
		return nil, err
	}
	if n.freezing {
		n.mu.Unlock()
		return nil, errTakenOver
	}
	n.freezing = true
	n.mu.Unlock()
	n.changes.Wait() // each is a matter of moments: none waits for a client
	n.mu.Lock()
	n.freezing, n.frozen = false, true
	n.mu.Unlock()
	h := &handing{n: n}
	for _, nw := range n.sorted() {
		if err := h.network(nw, send); err != nil {
			h.Resume()
			return nil, err
		}
	}
	if err := n.vteps.handOver(send); err != nil {
		h.Resume()
		return nil, err
	}
	if err := n.handOverSessions(send); err != nil {
		h.Resume()
		return nil, err
	}
	h.closed = true
	if err := n.state.close(); err != nil {
		h.Resume()
		return nil, err
	}
	return h, nil
}

// handing is a node that waits for its successor.
type handing struct {
	n      *Node
	closed bool // the state file
}

// network hands over one network's devices and sockets.
func (h *handing) network(nw *network, send func(p api.Part, fds []int) error) error {
	h.n.mu.Lock()
	var as []*attachment
	for _, a := range nw.attachments {
		if !a.going {
			as = append(as, a)
		}
	}
	h.n.mu.Unlock()
	for _, a := range as {
		if err := h.attachment(a, send); err != nil {
			return fmt.Errorf("hand over %q of network %q: %w", a.Name(), nw.rec.Name, err)
		}
	}
	states, fds, err := nw.ExportUDP()
	if err != nil {
		return err
	}
	defer closeAll(fds)
	for len(states) > 0 {
		k := min(len(states), api.MaxPartFDs)
		b, err := json.Marshal(states[:k])
		if err != nil {
			return err
		}
		if err := send(api.Part{Kind: api.PartUDP, Network: nw.rec.Name, Flows: b}, fds[len(fds)-len(states):][:k]); err != nil {
			return err
		}
		states = states[k:]
	}
	return nil
}

// attachment hands over one attachment's device and sockets.
func (h *handing) attachment(a *attachment, send func(p api.Part, fds []int) error) error {
	part := api.Part{Network: a.network.rec.Name, Name: a.Name()}
	tp, err := a.Pause()
	if err != nil {
		return err
	}
	if tp != nil {
		defer tp.Close()
		p := part
		p.Kind, p.Info = api.PartTAP, &tp.Info
		if err := send(p, tp.FDs); err != nil {
			return err
		}
	}
	h.n.mu.Lock()
	l, publishes := a.listener, slices.Clone(a.publishes)
	h.n.mu.Unlock()
	if l != nil {
		fd, err := api.Handover(l)
		if err != nil {
			return err
		}
		_ = l.SetDeadline(time.Unix(1, 0)) // who connects now is the other node's; a listener that is closed has nobody
		defer unix.Close(fd)
		p := part
		p.Kind = api.PartStream
		if err := send(p, []int{fd}); err != nil {
			return err
		}
	}
	if err := h.machine(a, part, send); err != nil {
		return err
	}
	for _, pub := range publishes {
		if pub.live == nil {
			continue
		}
		fds, err := pub.live.Export()
		if err != nil {
			return err
		}
		p := part
		p.Kind, p.ID = api.PartPublish, pub.rec.ID
		for chunk := range slices.Chunk(fds, api.MaxPartFDs) {
			if err := send(p, chunk); err != nil {
				return err
			}
		}
	}
	return nil
}

// machineDrains is how long a virtual machine may take to read what waits for it.
const machineDrains = time.Second

// machine hands over the connection of a virtual machine. One that does not read loses it: it connects again.
func (h *handing) machine(a *attachment, part api.Part, send func(p api.Part, fds []int) error) error {
	h.n.mu.Lock()
	port := a.machine
	h.n.mu.Unlock()
	if port == nil {
		return nil
	}
	fd, pending, err := port.Export(machineDrains)
	if err != nil {
		h.n.log.Warn("virtual machine is not handed over", "network", part.Network, "name", part.Name, "reason", err)
		return nil
	}
	defer unix.Close(fd)
	part.Kind, part.Data, part.Info = api.PartMachine, pending, &tap.Info{MAC: a.MAC()}
	return send(part, []int{fd})
}

// Commit implements api.Handing.
func (h *handing) Commit() { close(h.n.takenOver) }

// TakenOver is closed when another node has taken over: this one is to be closed soon.
func (n *Node) TakenOver() <-chan struct{} { return n.takenOver }

// Resume implements api.Handing: everything goes on as before. What cannot is in the log.
func (h *handing) Resume() {
	n := h.n
	var errs []error
	if h.closed {
		errs = append(errs, n.state.open())
	}
	for _, nw := range n.sorted() {
		n.mu.Lock()
		var as []*attachment
		for _, a := range nw.attachments {
			as = append(as, a)
		}
		n.mu.Unlock()
		for _, a := range as {
			errs = append(errs, a.Continue())
			n.mu.Lock()
			if a.machine != nil {
				a.machine.Resume()
			}
			l, publishes := a.listener, slices.Clone(a.publishes)
			n.mu.Unlock()
			if l != nil {
				l.SetUnlinkOnClose(true)
				_ = l.SetDeadline(time.Time{}) // as above
			}
			for _, p := range publishes {
				if p.live != nil {
					errs = append(errs, p.live.Resume())
				}
			}
		}
		errs = append(errs, nw.ResumeUDP())
	}
	n.vteps.resume()
	n.mu.Lock()
	n.frozen = false
	n.mu.Unlock()
	if err := errors.Join(errs...); err != nil {
		n.log.Error("after a takeover that failed, not everything goes on", "error", err)
	}
	n.endAbandoned()
}

// endAbandoned ends the attachments whose clients left while nothing could be changed.
func (n *Node) endAbandoned() {
	var gone []*attachment
	for _, nw := range n.sorted() {
		n.mu.Lock()
		for _, a := range nw.attachments {
			if a.abandoned {
				gone = append(gone, a)
				continue
			}
			if a.lifetime != api.LifetimeSession || a.rec.Holder == nil {
				continue
			}
			if fd, err := holderFD(a.rec.Holder); err == nil {
				unix.Close(fd)
			} else {
				gone = append(gone, a)
			}
		}
		n.mu.Unlock()
	}
	for _, a := range gone {
		a.end()
	}
}

// inheritance is what another node has handed over. What is taken out of it is the taker's; close closes the rest.
type inheritance struct {
	api       *net.UnixListener
	taps      map[string]*tap.Handle // by attachmentKey
	streams   map[string]*net.UnixListener
	machines  map[string]*givenMachine
	publishes map[string][]int // by id
	udp       map[string][]udpPart
	tunnels   map[netip.AddrPort][]int // by where they were asked to listen
	sessions  map[string][]byte        // of sealed peers, by attachmentKey of network and HOST:PORT
}

// givenMachine is a virtual machine that was connected to another node.
type givenMachine struct {
	conn    *net.UnixConn
	pending []byte
	mac     wire.MAC
}

// newGivenMachine takes fds over.
func newGivenMachine(p api.Part, fds []int) (*givenMachine, error) {
	if len(fds) != 1 || p.Info == nil {
		closeAll(fds)
		return nil, errors.New("the other node does not describe a virtual machine's connection; it is of another version")
	}
	f := os.NewFile(uintptr(fds[0]), "machine")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errors.New("a virtual machine's connection is no unix socket")
	}
	return &givenMachine{conn: u, pending: p.Data, mac: p.Info.MAC}, nil
}

type udpPart struct {
	states []nat.UDPFlowState
	fds    []int
}

// take reads what s hands over, to its end.
func (i *inheritance) take(s *api.Successor) error {
	for {
		p, fds, err := s.Next()
		if err != nil {
			return err
		}
		key := attachmentKey(p.Network, p.Name)
		switch p.Kind {
		case api.PartEnd:
			closeAll(fds)
			if i.api == nil {
				return errors.New("the other node keeps its socket; it is of another version")
			}
			return nil
		case api.PartAPI:
			i.api, err = api.ListenFD(fds)
		case api.PartStream:
			i.streams[key], err = api.ListenFD(fds)
		case api.PartMachine:
			var m *givenMachine
			if m, err = newGivenMachine(p, fds); err == nil {
				i.machines[key] = m
			}
		case api.PartTAP:
			if p.Info == nil {
				closeAll(fds)
				return fmt.Errorf("the other node does not describe %s; it is of another version", key)
			}
			i.taps[key] = &tap.Handle{Info: *p.Info, FDs: fds}
		case api.PartPublish:
			i.publishes[p.ID] = append(i.publishes[p.ID], fds...)
		case api.PartUDP:
			u := udpPart{fds: fds}
			err = json.Unmarshal(p.Flows, &u.states)
			i.udp[p.Network] = append(i.udp[p.Network], u)
		case api.PartSessions:
			closeAll(fds)
			i.sessions[key] = p.Data
		case api.PartTunnel:
			i.tunnels[p.Listen] = append(i.tunnels[p.Listen], fds...)
		default:
			closeAll(fds)
			return fmt.Errorf("the other node hands over %q, which this one does not know; it is of another version", p.Kind)
		}
		if err != nil {
			return err
		}
	}
}

// tap, stream, published and flows take something out. A nil inheritance has nothing.

func (i *inheritance) tap(key string) *tap.Handle {
	if i == nil {
		return nil
	}
	h := i.taps[key]
	delete(i.taps, key)
	return h
}

func (i *inheritance) stream(key string) *net.UnixListener {
	if i == nil {
		return nil
	}
	l := i.streams[key]
	delete(i.streams, key)
	return l
}

func (i *inheritance) machine(key string) *givenMachine {
	if i == nil {
		return nil
	}
	m := i.machines[key]
	delete(i.machines, key)
	return m
}

func (i *inheritance) published(id string) []int {
	if i == nil {
		return nil
	}
	fds := i.publishes[id]
	delete(i.publishes, id)
	return fds
}

func (i *inheritance) flows(network string) []udpPart {
	if i == nil {
		return nil
	}
	parts := i.udp[network]
	delete(i.udp, network)
	return parts
}

// sessionsOf are the keys that the other node had with a sealed peer.
func (i *inheritance) sessionsOf(network, peer string) []byte {
	if i == nil {
		return nil
	}
	return i.sessions[attachmentKey(network, peer)]
}

// sockets are those of tunnels; what is not taken out of the map is closed with i.
func (i *inheritance) sockets() map[netip.AddrPort][]int {
	if i == nil {
		return nil
	}
	return i.tunnels
}

func (i *inheritance) close() {
	if i.api != nil {
		i.api.Close()
	}
	for _, h := range i.taps {
		_ = h.Close() // the other node has its own
	}
	for _, l := range i.streams {
		l.Close()
	}
	for _, m := range i.machines {
		m.conn.Close()
	}
	for _, fds := range i.publishes {
		closeAll(fds)
	}
	for _, fds := range i.tunnels {
		closeAll(fds)
	}
	for _, parts := range i.udp {
		for _, u := range parts {
			closeAll(u.fds)
		}
	}
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// TakeOver makes a node that replaces the one which answers at socket, with everything that one has. When it returns this node serves, and the other one has ended or is about to. On error the
// other one goes on as before.
func TakeOver(ctx context.Context, cfg Config, socket string) (*Node, *net.UnixListener, error) {
	client := api.NewClient(socket)
	info, err := client.Info(ctx)
	if err != nil {
		return nil, nil, err
	}
	if !sameDir(info.StateDir, cfg.StateDir) {
		return nil, nil, api.Errorf(api.CodeInvalid, "give --state-dir "+info.StateDir, "the node at %s keeps its state in %s, not in %s", socket, info.StateDir, cfg.StateDir)
	}
	s, err := client.TakeOver(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer s.Close()
	from := &inheritance{
		taps: make(map[string]*tap.Handle), streams: make(map[string]*net.UnixListener), machines: make(map[string]*givenMachine), publishes: make(map[string][]int), udp: make(map[string][]udpPart),
		tunnels: make(map[netip.AddrPort][]int), sessions: make(map[string][]byte),
	}
	if err := from.take(s); err != nil {
		from.close()
		return nil, nil, err
	}
	n, err := newNode(ctx, cfg, from)
	if err != nil {
		from.close()
		return nil, nil, err
	}
	l := from.api
	from.api = nil
	from.close() // of attachments that are not on disk
	if err := s.Done(); err != nil {
		// The old one may not have heard; two that serve would be worse than one that is slow to end.
		n.log.Warn("the node that was taken over", "reason", err)
	}
	return n, l, nil
}

// sameDir reports whether the directory of another process is the one that this process calls own. A relative path says nothing: that process may run elsewhere.
func sameDir(theirs, own string) bool {
	a, err := os.Stat(theirs)
	b, berr := os.Stat(own)
	return filepath.IsAbs(theirs) && err == nil && berr == nil && os.SameFile(a, b)
}

// orphanPoll is how often a node looks whether the one before it has ended.
const orphanPoll = 100 * time.Millisecond

// resetOrphans ends the connections through NAT that earlier processes carried, as these end: one that has been taken over says that it goes some time before it has gone, and may
// have been taken over while its own predecessor was still going. It returns when there is none left, or the node ends.
func (n *Node) resetOrphans() {
	t := time.NewTicker(orphanPoll)
	defer t.Stop()
	for {
		left := false
		for _, nw := range n.sorted() {
			if nw.ResetOrphans() {
				left = true
			}
		}
		if !left {
			return
		}
		select {
		case <-t.C:
		case <-n.ctx.Done():
			return
		}
	}
}

// inherit plugs the device that another node had, if it had one.
func (n *Node) inherit(a *attachment, from *inheritance) {
	h := from.tap(attachmentKey(a.network.rec.Name, a.Name()))
	if h == nil {
		return
	}
	if err := a.plug(h); err != nil {
		n.log.Error("device handed over", "network", a.network.rec.Name, "name", a.Name(), "error", err)
		return
	}
	n.mu.Lock()
	a.inherited = true
	n.mu.Unlock()
}

// inheritFlows goes on with the UDP flows of a network.
func (n *Node) inheritFlows(nw *network, from *inheritance) {
	for _, u := range from.flows(nw.rec.Name) {
		if _, err := nw.ImportUDP(u.states, u.fds); err != nil {
			n.log.Warn("UDP flows handed over", "network", nw.rec.Name, "reason", strings.ReplaceAll(err.Error(), "\n", "; "))
		}
	}
}
