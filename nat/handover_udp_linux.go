package nat

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/frame"
)

// UDPFlowState is what another process must know of a UDP flow beside its socket. Its JSON names are part of what a node and its successor say to each other.
type UDPFlowState struct {
	Container netip.AddrPort `json:"container"`
	Peers     []netip.Addr   `json:"peers,omitempty"` // who may answer, the one sent to last at the end
	Idle      time.Duration  `json:"idle"`            // since the last packet of either direction, in nanoseconds
	Answered  bool           `json:"answered,omitempty"`
	Lasting   bool           `json:"lasting,omitempty"` // not DNS alone
}

// ExportUDP stops all UDP flows of containers from taking datagrams of the host's side, and returns what they are and duplicates of their sockets, in the same order; the caller closes the
// duplicates. Datagrams wait in the sockets meanwhile; what containers send goes on. Flows that begin later are not among them, and end with this NAT, as do pings.
// The error is for want of descriptors: then nothing is exported.
func (n *NAT) ExportUDP() (states []UDPFlowState, fds []int, err error) {
	t := n.udp.flows
	now := n.now().UnixNano()
	for _, f := range t.all() {
		fd, err := t.pause(f)
		if err != nil {
			for _, fd := range fds {
				unix.Close(fd)
			}
			return nil, nil, errors.Join(fmt.Errorf("export UDP flows: %w; raise the limit of open files (ulimit -n, LimitNOFILE=)", err), n.ResumeUDP())
		}
		if fd >= 0 {
			states, fds = append(states, f.state(now)), append(fds, fd)
		}
	}
	return states, fds, nil
}

// ResumeUDP takes datagrams again after an ExportUDP that led to nothing. Nobody else may look at the sockets any more.
func (n *NAT) ResumeUDP() error {
	t := n.udp.flows
	var errs []error
	for _, f := range t.all() {
		errs = append(errs, t.resume(f))
	}
	return errors.Join(errs...)
}

// ImportUDP takes over the flows that ExportUDP of another process gave, with the descriptors. It returns how many there are; the error says why others are not, whose sockets it has closed: a flow of a
// container that has one from the same port already, or that is above the limits. Datagrams that wait are passed on at once, so call it when the containers can be reached.
func (n *NAT) ImportUDP(states []UDPFlowState, fds []int) (imported int, err error) {
	g := &givenSockets{fds: fds}
	defer g.close()
	if len(states) != len(fds) {
		return 0, fmt.Errorf("import UDP flows: %d sockets for %d flows; give what ExportUDP returned", len(fds), len(states))
	}
	now := n.now().UnixNano()
	refused := 0
	for i := range states {
		if e := n.udp.flows.adopt(&states[i], g.take(i), now); e != nil {
			if refused++; err == nil {
				err = e
			}
		}
	}
	if refused > 0 {
		return len(states) - refused, fmt.Errorf("import UDP flows: %d of %d begin anew, the first because %w", refused, len(states), err)
	}
	return len(states), nil
}

// all are the flows of this moment.
func (t *flowTable) all() []*flow {
	t.mu.RLock()
	defer t.mu.RUnlock()
	fs := make([]*flow, 0, len(t.m))
	for _, f := range t.m {
		fs = append(fs, f)
	}
	return fs
}

// pause takes f off the loop and returns a duplicate of its socket, or -1 when it has ended meanwhile. It must not run on the loop.
func (t *flowTable) pause(f *flow) (int, error) {
	// While it is in the table, its descriptor is its own. The lock is held for one flow at a time, since packets wait for it.
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.m[f.src] != f {
		return -1, nil
	}
	fd, err := unix.FcntlInt(uintptr(f.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	t.u.loop.remove(f.fd)
	f.paused.Store(true)
	return fd, nil
}

// resume puts a paused flow back on the loop.
func (t *flowTable) resume(f *flow) error {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.m[f.src] != f || !f.paused.Swap(false) {
		return nil
	}
	return t.u.loop.add(f.fd, unix.EPOLLIN, f)
}

func (f *flow) state(now int64) UDPFlowState {
	s := UDPFlowState{Container: f.src, Idle: time.Duration(max(0, now-f.seen.Load())), Answered: f.answered.Load(), Lasting: f.lasting.Load()}
	f.peersMu.Lock()
	defer f.peersMu.Unlock()
	for a := range f.peers {
		if a != f.last {
			s.Peers = append(s.Peers, a)
		}
	}
	if f.last.IsValid() {
		s.Peers = append(s.Peers, f.last)
	}
	return s
}

// adopt makes a flow of what another process said of it and its socket, which it closes when it fails.
func (t *flowTable) adopt(s *UDPFlowState, fd int, now int64) error {
	f := &flow{tab: t, src: s.Container}
	f.owner = f
	err := wantSocket(fd, unix.SOCK_DGRAM)
	if err == nil {
		err = f.adoptUDP(fd, false)
	}
	if err == nil && (!s.Container.IsValid() || s.Container.Port() == 0 || f.v6 != s.Container.Addr().Is6() || f.dual) {
		err = fmt.Errorf("the socket is of another IP version")
	}
	if err != nil {
		unix.Close(fd)
		return fmt.Errorf("%s: %w", s.Container, err)
	}
	f.seen.Store(now - int64(max(0, s.Idle)))
	f.answered.Store(s.Answered)
	f.lasting.Store(s.Lasting)
	f.peersMu.Lock()
	for _, a := range s.Peers {
		if f.last != a && a.IsValid() {
			f.learn(a)
		}
	}
	f.peersMu.Unlock()
	if drop := t.insert(f); drop != 0 {
		f.closeSock()
		f.forgetPeers()
		return fmt.Errorf("%s: it may have no more (%s), or has another flow from that port", s.Container, drop)
	}
	return nil
}

// insert puts a flow that has its socket in the table and on the loop. It returns 0 or the reason against it.
func (t *flowTable) insert(f *flow) frame.Drop {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed || t.m[f.src] != nil || !t.quota.take(f.src.Addr()) {
		return frame.DropFlowLimit
	}
	if err := t.u.loop.add(f.fd, unix.EPOLLIN, f); err != nil {
		t.quota.give(f.src.Addr())
		return frame.DropFlowLimit
	}
	t.m[f.src] = f
	t.u.loop.armTick(udpSweepEvery)
	return 0
}
