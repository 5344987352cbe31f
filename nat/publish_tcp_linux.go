package nat

import (
	"context"
	"errors"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/stack"
)

// tcpListener is one listening socket of a published range. It sits in the loop; it has no goroutine.
type tcpListener struct {
	p     *Published
	fd    int32 // -1 when closed
	index uint16
}

const (
	listenBacklog = 4096 // the kernel cuts it to net.core.somaxconn
	acceptBatch   = 64   // per readiness event, so that one busy port does not starve the others
)

func (p *Published) listenTCP(given *givenSockets) error {
	p.tcp = make([]tcpListener, p.spec.Count)
	for i := range p.tcp {
		p.tcp[i] = tcpListener{p: p, fd: -1, index: uint16(i)}
	}
	for i := range p.tcp {
		b := p.binding(i)
		fd := given.take(i)
		var err error
		if fd < 0 {
			fd, err = listen(b.host, b.dual)
		} else {
			if err = adoptSocket(fd, unix.SOCK_STREAM, &b); err != nil {
				unix.Close(fd)
			}
		}
		if err != nil {
			return p.bindError(&b, err)
		}
		noDelay(fd) // whom it accepts inherits that
		p.tcp[i].fd = int32(fd)
	}
	// Only a range that is whole is served.
	for i := range p.tcp {
		if err := p.n.streams.add(int(p.tcp[i].fd), unix.EPOLLIN, &p.tcp[i]); err != nil {
			return err
		}
	}
	return nil
}

// listen opens a nonblocking listener. The error is the bare one of the system call that failed.
func listen(host netip.AddrPort, dual bool) (int, error) {
	fd, err := bound(host, dual, unix.SOCK_STREAM)
	if err != nil {
		return -1, err
	}
	if err := unix.Listen(fd, listenBacklog); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// bound opens a nonblocking socket of type typ bound to host; dual makes an IPv6 socket take IPv4 too, or an IPv4 one where the host has no IPv6.
func bound(host netip.AddrPort, dual bool, typ int) (int, error) {
	sa, family, err := tcpSockaddr(host)
	if err != nil {
		return -1, err
	}
	fd, err := unix.Socket(family, typ|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if dual && errors.Is(err, unix.EAFNOSUPPORT) {
		return bound(netip.AddrPortFrom(netip.IPv4Unspecified(), host.Port()), false, typ)
	}
	if err != nil {
		return -1, err
	}
	if family == unix.AF_INET6 {
		only := 1
		if dual {
			only = 0
		}
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, only); err != nil {
			unix.Close(fd)
			return -1, err
		}
	}
	if typ == unix.SOCK_STREAM {
		// Old connections in TIME-WAIT must not keep a port from being published again; a listener still does.
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if err := unix.Bind(fd, sa); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func (l *tcpListener) close() {
	if l.fd >= 0 {
		l.p.n.streams.remove(int(l.fd))
		unix.Close(int(l.fd))
		l.fd = -1
	}
}

// ready is called on the loop when clients wait.
func (l *tcpListener) ready(uint32) {
	for range acceptBatch {
		fd, sa, err := unix.Accept4(int(l.fd), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		switch err {
		case nil:
			l.serve(fd, addrPort(sa))
		case unix.EAGAIN:
			return
		case unix.EMFILE, unix.ENFILE:
			l.p.n.tcp.shed(int(l.fd))
		case unix.ENOBUFS, unix.ENOMEM:
			l.p.n.drops.Add(frame.DropFlowLimit, 1)
			return
		default: // the client went away meanwhile; accept(2) lists a dozen ways to say so
		}
	}
}

// serve joins an accepted client to the container. It does not block.
func (l *tcpListener) serve(fd int, client netip.AddrPort) {
	n := l.p.n
	b := l.p.binding(int(l.index))
	src, dst := n.target(&b, client)
	t, container := n.tcp, dst.Addr()
	refuse := func() {
		resetSock(fd)
		unix.Close(fd)
	}
	if !t.pubFlows.take(container) {
		n.drops.Add(frame.DropFlowLimit, 1)
		refuse()
		return
	}
	if !t.pubHalfOpen.take(container) {
		t.pubFlows.give(container)
		n.drops.Add(frame.DropDialLimit, 1)
		refuse()
		return
	}
	t.dialInward(src, dst, func(conn stack.Conn, err error) {
		t.pubHalfOpen.give(container)
		if err != nil {
			t.pubFlows.give(container)
			refuse()
			return
		}
		slot := n.journal.put(addrPortOf(conn.RemoteAddr()), addrPortOf(conn.LocalAddr()), n.now())
		if f := t.newFlow(t.pubFlows, container, fd, conn, slot); f != nil {
			f.wrote = 2 // TCP_NODELAY is on
			f.startWith()
		}
	})
}

// addrPortOf is the address of one side of a TCP connection.
func addrPortOf(a net.Addr) netip.AddrPort {
	if a, ok := a.(*net.TCPAddr); ok {
		return a.AddrPort()
	}
	return netip.AddrPort{}
}

// inwardDial is a dial into the network that is under way.
type inwardDial struct {
	container netip.Addr
	cancel    context.CancelFunc
}

// dialInward connects to the container endpoint dst from src. It does not block; done is called as stack.Network says, within Limits.DialTimeout, or sooner when the container is forgotten or the NAT
// is closed. close waits for it.
func (t *tcpNAT) dialInward(src, dst netip.AddrPort, done func(stack.Conn, error)) {
	ctx, cancel := context.WithTimeout(t.ctx, t.n.limits.DialTimeout)
	d := &inwardDial{container: dst.Addr(), cancel: cancel}
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		cancel()
		done(nil, net.ErrClosed)
		return
	}
	t.inward[d] = struct{}{}
	t.wg.Add(1)
	t.mu.Unlock()
	end := func(conn stack.Conn, err error) {
		defer t.wg.Done()
		t.mu.Lock()
		delete(t.inward, d)
		t.mu.Unlock()
		done(conn, err)
		cancel()
	}
	t.n.net.DialTCP(ctx, src, dst, func(conn stack.Conn, err error) {
		if errors.Is(err, unix.EADDRINUSE) && src.Port() != 0 {
			// The client came from one port of its own to two published ports of one container port. Its address is still true.
			t.n.net.DialTCP(ctx, netip.AddrPortFrom(src.Addr(), 0), dst, end)
			return
		}
		end(conn, err)
	})
}

// shed takes one waiting client off listener and resets it, with the descriptor kept in reserve for this: the process has no other left, and
// a client that stays in the backlog would keep the loop awake and itself in the dark.
func (t *tcpNAT) shed(listener int) {
	t.n.drops.Add(frame.DropFlowLimit, 1)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.reserve >= 0 {
		unix.Close(t.reserve)
	}
	if fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC); err == nil {
		resetSock(fd)
		unix.Close(fd)
	}
	t.reserve = openReserve()
}

// openReserve opens a descriptor that holds a place; -1 when there is none.
func openReserve() int {
	fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1
	}
	return fd
}
