package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"

	"patchbay/internal/api"
	"patchbay/tunnel"
	"patchbay/tunnel/vxlan"
)

// DefaultListen is where tunnels listen unless Config says otherwise: every address, IPv4 and IPv6.
var DefaultListen = netip.AddrPortFrom(netip.IPv6Unspecified(), vxlan.Port)

// ParseListen reads ADDR or ADDR:PORT. The port is that of VXLAN if not given.
func ParseListen(s string) (netip.AddrPort, error) {
	ap, err := netip.ParseAddrPort(s)
	if a, aerr := netip.ParseAddr(s); aerr == nil {
		ap, err = netip.AddrPortFrom(a, vxlan.Port), nil
	}
	if a := ap.Addr(); err != nil || a.IsMulticast() || a.Is4In6() || ap.Port() == 0 {
		return netip.AddrPort{}, fmt.Errorf("%.70q is no address to listen at; write ADDR or ADDR:PORT, such as 192.0.2.1, [::]:4789 or 0.0.0.0:8472", s)
	}
	return ap, nil
}

// vteps are this host's ends of the tunnels, one a UDP port, there as long as a peer uses them.
type vteps struct {
	n  *Node
	mu sync.Mutex
	by map[uint16]*vtep
	// held is true while a node restores: nothing is received before all peers are there, since what comes for others would be lost.
	held bool
	// given are the sockets of the node before, by where it was asked to listen.
	given map[netip.AddrPort][]int
}

type vtep struct {
	*tunnel.VTEP
	port  uint16
	users int
	stop  context.CancelFunc // nil while it does not receive
	heard map[string]bool    // groups that it is a member of
	done  chan error         // of Run
}

// run starts to receive.
func (v *vtep) run() {
	var ctx context.Context
	ctx, v.stop = context.WithCancel(context.Background())
	v.done = make(chan error, 1)
	done := v.done
	go func() { done <- v.Run(ctx) }()
}

// halt stops to receive: what comes waits in the socket.
func (v *vtep) halt() error {
	if v.stop == nil {
		return nil
	}
	v.stop()
	v.stop = nil
	return <-v.done
}

// open is the VTEP at a port, which is opened for its first user. Each open is followed by a release.
func (vs *vteps) open(port uint16) (*vtep, error) {
	vs.mu.Lock()
	defer vs.mu.Unlock()
	if v := vs.by[port]; v != nil {
		v.users++
		return v, nil
	}
	listen := netip.AddrPortFrom(vs.n.cfg.Listen.Addr(), port)
	given := vs.given[listen]
	delete(vs.given, listen) // whatever comes of it they are taken over
	t, err := tunnel.Listen(tunnel.Config{Listen: listen, FDs: given, Log: vs.n.log})
	if listen.Addr() == netip.IPv6Unspecified() && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)) { // a host without IPv6
		t, err = tunnel.Listen(tunnel.Config{Listen: netip.AddrPortFrom(netip.IPv4Unspecified(), port), Log: vs.n.log})
	}
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return nil, &api.Error{
			Code: api.CodeConflict, Message: fmt.Sprintf("UDP port %d, where tunnels listen, is another program's", port),
			Remedy: "give the network another with --port, or the daemon with --listen", Err: err,
		}
	case err != nil:
		return nil, err
	}
	v := &vtep{VTEP: t, port: port, users: 1, heard: make(map[string]bool)}
	vs.by[port] = v
	if !vs.held {
		v.run()
	}
	vs.n.log.Info("tunnels open", "listen", t.LocalAddr())
	return v, nil
}

// join has the VTEP hear a network's multicast group, until it is closed. On a socket of the node before it is a member already.
func (vs *vteps) join(v *vtep, group string) error {
	if group == "" {
		return nil
	}
	addr, name, err := api.ParseGroup(group)
	if err != nil {
		return err
	}
	vs.mu.Lock()
	defer vs.mu.Unlock()
	if v.heard[group] {
		return nil
	}
	ifc, err := net.InterfaceByName(name)
	if err != nil {
		return fmt.Errorf("group %s: %w: %w", group, unix.ENODEV, err)
	}
	if err := v.Join(addr, ifc.Index); err != nil && !errors.Is(err, unix.EADDRINUSE) {
		return err
	}
	v.heard[group] = true
	return nil
}

// release gives up what open gave.
func (vs *vteps) release(v *vtep) {
	vs.mu.Lock()
	defer vs.mu.Unlock()
	if v.users--; v.users > 0 || vs.by[v.port] != v {
		return
	}
	delete(vs.by, v.port)
	vs.end(v)
}

func (vs *vteps) end(v *vtep) {
	addr := v.LocalAddr()
	err := v.Close()
	if herr := v.halt(); !errors.Is(herr, tunnel.ErrClosed) {
		err = errors.Join(err, herr)
	}
	if err != nil && !errors.Is(err, tunnel.ErrClosed) {
		vs.n.log.Warn("tunnels closed", "listen", addr, "error", err)
		return
	}
	vs.n.log.Info("tunnels closed", "listen", addr)
}

// hold has nothing received until resume; the sockets in given are used where they fit.
func (vs *vteps) hold(given map[netip.AddrPort][]int) {
	vs.mu.Lock()
	defer vs.mu.Unlock()
	vs.held, vs.given = true, given
}

// resume ends hold: everything receives.
func (vs *vteps) resume() {
	vs.mu.Lock()
	defer vs.mu.Unlock()
	vs.held, vs.given = false, nil // who gave them closes what is left
	for _, v := range vs.by {
		if v.stop == nil {
			v.run()
		}
	}
}

// handOver stops receiving and sends the sockets to a successor. On error, and when the successor does not come up, resume goes on.
func (vs *vteps) handOver(send func(p api.Part, fds []int) error) error {
	vs.mu.Lock()
	defer vs.mu.Unlock()
	vs.held = true // a peer that comes up now is the successor's
	for port, v := range vs.by {
		if err := v.halt(); err != nil {
			return err
		}
		fds, err := v.Export()
		if err != nil {
			return err
		}
		err = send(api.Part{Kind: api.PartTunnel, Listen: netip.AddrPortFrom(vs.n.cfg.Listen.Addr(), port)}, fds)
		closeAll(fds)
		if err != nil {
			return err
		}
	}
	return nil
}

// close closes all of them.
func (vs *vteps) close() {
	vs.mu.Lock()
	defer vs.mu.Unlock()
	for port, v := range vs.by {
		delete(vs.by, port)
		vs.end(v)
	}
}

// ownAddr reports whether packets to an address, at the port of this node's tunnels, are for this node itself, which listens at one of the host's addresses or at all.
func ownAddr(listen, a netip.Addr) bool {
	if !listen.IsUnspecified() {
		return a.WithZone("") == listen.WithZone("")
	}
	if a.IsLoopback() {
		return true
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return false // the peer will turn out to be deaf
	}
	for _, i := range addrs {
		if p, err := netip.ParsePrefix(i.String()); err == nil && p.Addr().Unmap() == a.WithZone("") {
			return true
		}
	}
	return false
}

// underlayMTU is the MTU in bytes of IP packet of the interface that tunnels leave by, as long as there is no peer whose route would tell, and an address of the IP version that is likely.
func underlayMTU(listen netip.Addr) (mtu int, like netip.Addr) {
	four, six := netip.AddrFrom4([4]byte{192, 0, 2, 1}), netip.MustParseAddr("2001:db8::1") // RFC 5737, RFC 3849: nobody's
	if !listen.IsUnspecified() {
		like = listen
	} else if listen.Is4() {
		six = netip.Addr{}
	}
	for _, to := range []netip.Addr{four, six} {
		if !to.IsValid() || like.IsValid() && like.Is4() != to.Is4() {
			continue
		}
		if n := routeMTU(listen, to); n > 0 {
			return n, to
		}
	}
	if !like.IsValid() {
		like = four
	}
	ifs, _ := net.Interfaces() // none is answered with a guess
	for _, i := range ifs {
		if i.Flags&net.FlagUp != 0 && i.Flags&net.FlagLoopback == 0 && (mtu == 0 || i.MTU < mtu) && holds(i, listen) {
			mtu = i.MTU
		}
	}
	if mtu == 0 {
		mtu = api.DefaultMTU
	}
	return mtu, like
}

// holds reports whether an interface has the address; each has an unspecified one.
func holds(i net.Interface, a netip.Addr) bool {
	if a.IsUnspecified() {
		return true
	}
	addrs, _ := i.Addrs()
	for _, x := range addrs {
		if p, err := netip.ParsePrefix(x.String()); err == nil && p.Addr().Unmap() == a.WithZone("") {
			return true
		}
	}
	return false
}

// routeMTU is the MTU of the route from an address to another, or 0 where there is none. Nothing is sent.
func routeMTU(from, to netip.Addr) (mtu int) {
	d := net.Dialer{}
	if !from.IsUnspecified() {
		d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
	}
	c, err := d.Dial("udp", netip.AddrPortFrom(to, 9).String())
	if err != nil {
		return 0
	}
	defer c.Close()
	raw, err := c.(*net.UDPConn).SyscallConn()
	if err != nil {
		return 0
	}
	_ = raw.Control(func(fd uintptr) { // then it stays 0
		if to.Is4() {
			mtu, _ = unix.GetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU)
		} else {
			mtu, _ = unix.GetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU)
		}
	})
	return mtu
}
