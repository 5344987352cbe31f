package nat

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Handing a NAT to another process. The sockets of the host's side are the same ones before and after, so a client that connects in between waits in a queue of
// the kernel and a datagram does too: Export (or ExportUDP) stops this process from looking at them, the other one takes them over with PublishFrom (or ImportUDP), and this one
// closes its own descriptors with the rest of it. If the other one does not get that far, Resume (or ResumeUDP) goes on as before.
//
// A poller must not close a socket that another process has without taking it out of its epoll set first: the kernel only does that by itself when the last
// descriptor of all processes is closed, and would report events that nobody can stop. Pausing and closing both take it out.

// Export stops p from taking connections and datagrams and returns its sockets, in the order of the range. Clients wait in the sockets' queues meanwhile. What came in before goes on, and so
// do a container's answers. The descriptors are lent: send them to the other process, do not close them, and call neither Close nor Resume while they are being sent. Idempotent.
func (p *Published) Export() ([]int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, fmt.Errorf("export %s: it is not published any more", p.spec)
	}
	fds := make([]int, 0, p.spec.Count)
	for i := range p.tcp {
		fds = append(fds, int(p.tcp[i].fd))
		p.n.streams.remove(int(p.tcp[i].fd))
	}
	for _, u := range p.udp {
		fds = append(fds, u.fd)
		p.n.packets.remove(u.fd)
	}
	p.exported = true
	return fds, nil
}

// Resume takes connections and datagrams again after an Export that led to nothing. Nobody else may look at the sockets any more. It does nothing for what is not exported.
func (p *Published) Resume() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return fmt.Errorf("resume %s: it is not published any more", p.spec)
	}
	if !p.exported {
		return nil
	}
	p.exported = false
	var errs []error
	for i := range p.tcp {
		errs = append(errs, p.n.streams.add(int(p.tcp[i].fd), unix.EPOLLIN, &p.tcp[i]))
	}
	for _, u := range p.udp {
		errs = append(errs, p.n.packets.add(u.fd, unix.EPOLLIN, u))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("resume %s: %w", p.spec, err)
	}
	return nil
}

// PublishFrom is Publish with the sockets that Export of another process gave for the same spec. It takes the descriptors over and closes them when it fails. Clients that wait are
// served at once, so call it when the container can be reached.
func (n *NAT) PublishFrom(s Spec, to []netip.Addr, fds []int) (*Published, error) {
	g := &givenSockets{fds: fds}
	defer g.close()
	return n.publish(s, to, g)
}

// givenSockets are descriptors on their way to a new owner. nil has none.
type givenSockets struct{ fds []int }

// take gives the i-th to the caller, who closes it; -1 when there is none.
func (g *givenSockets) take(i int) int {
	if g == nil {
		return -1
	}
	fd := g.fds[i]
	g.fds[i] = -1
	return fd
}

// close closes those that nobody took.
func (g *givenSockets) close() {
	for _, fd := range g.fds {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// adoptSocket holds that fd is a socket of that type bound for b, and makes it one of this process.
func adoptSocket(fd, typ int, b *binding) error {
	if err := wantSocket(fd, typ); err != nil {
		return err
	}
	if typ == unix.SOCK_STREAM {
		if on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || on == 0 {
			return errors.New("the socket handed over for it does not listen; publish it anew")
		}
	}
	at, want := localAddr(fd), b.host.Addr().Unmap().WithZone("")
	if at.Port() != b.host.Port() || at.Addr() != want && !(b.dual && at.Addr() == netip.IPv4Unspecified()) {
		return fmt.Errorf("the socket handed over for it is bound to %s; publish it anew", at)
	}
	return nil
}

// wantSocket holds that fd is a TCP or UDP socket, and sets the flags that every descriptor here has.
func wantSocket(fd, typ int) error {
	proto := unix.IPPROTO_TCP
	if typ == unix.SOCK_DGRAM {
		proto = unix.IPPROTO_UDP
	}
	got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	gotProto, err2 := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err := errors.Join(err, err2); err != nil {
		return fmt.Errorf("what was handed over for it is no socket (%w); publish it anew", err)
	}
	if got != typ || gotProto != proto {
		return fmt.Errorf("the socket handed over for it is of another kind (type %d, protocol %d); publish it anew", got, gotProto)
	}
	unix.CloseOnExec(fd)
	return unix.SetNonblock(fd, true)
}
