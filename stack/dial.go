package stack

import (
	"context"
	"fmt"
	"net/netip"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"patchbay/frame"
)

// DialTCP opens a connection into the network; see Network. A src without an address is the gateway's own, one without a port gets one.
func (g *Gateway) DialTCP(ctx context.Context, src, dst netip.AddrPort) (Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if !src.Addr().IsValid() || src.Addr().IsUnspecified() {
		src = netip.AddrPortFrom(g.Addr(version(dst.Addr())), src.Port())
	}
	if g.closed.Load() {
		return nil, opError("dial", src, dst, syscall.ENETDOWN)
	}
	if !g.onLink(dst.Addr()) || g.answersFor(dst.Addr()) || dst.Port() == 0 {
		return nil, opError("dial", src, dst, fmt.Errorf("destination is not a container's address on this network: %w", syscall.EHOSTUNREACH))
	}
	if !src.Addr().IsValid() || src.Addr().Is4() != dst.Addr().Is4() || g.isGroup(src.Addr()) {
		return nil, opError("dial", src, dst, fmt.Errorf("source is not a unicast address of the destination's IP version: %w", syscall.EADDRNOTAVAIL))
	}
	if g.mem.full() {
		g.drops.Add(frame.DropMemory, 1)
		return nil, opError("dial", src, dst, fmt.Errorf("the network's connections hold as much as they may: %w", syscall.ENOBUFS))
	}
	c := newConn(g, flowKey{}, src, dst)
	ep, terr := g.tcp.stack.NewEndpoint(tcp.ProtocolNumber, netProto(dst.Addr()), &c.queue)
	if terr != nil {
		return nil, opError("dial", src, dst, errnoOf(terr))
	}
	c.setEndpoint(ep.(*tcp.Endpoint))
	c.ep.SetOwner(c)
	// One client may talk to several published ports from one port of its own.
	c.ep.SocketOptions().SetReuseAddress(true)
	if terr := c.ep.Bind(tcpip.FullAddress{NIC: nicID, Addr: toAddress(src.Addr()), Port: src.Port()}); terr != nil {
		c.ep.Close()
		return nil, opError("dial", src, dst, errnoOf(terr))
	}
	if a, terr := c.ep.GetLocalAddress(); terr == nil {
		c.local = netip.AddrPortFrom(src.Addr(), a.Port)
	}
	c.key = makeKey(c.local, dst)
	c.id = c.key.id()
	if o := g.flows.get(&c.key); o != nil && o.endTimeWait() {
		g.flows.remove(o)
	}
	if !g.flows.put(c) {
		c.ep.Close()
		return nil, opError("dial", c.local, dst, syscall.EADDRINUSE)
	}
	switch terr := c.ep.Connect(tcpip.FullAddress{NIC: nicID, Addr: toAddress(dst.Addr()), Port: dst.Port()}).(type) {
	case *tcpip.ErrConnectStarted, nil:
	default:
		err := c.errFor("dial", terr)
		c.Close()
		g.flows.remove(c)
		return nil, err
	}
	for {
		switch c.ep.EndpointState() {
		case tcp.StateInitial, tcp.StateBound, tcp.StateConnecting, tcp.StateSynSent, tcp.StateSynRecv:
		case tcp.StateError, tcp.StateClose:
			err := error(syscall.ECONNABORTED)
			if terr := c.ep.LastError(); terr != nil {
				err = errnoOf(terr)
			}
			err = opError("dial", c.local, dst, err)
			c.Close()
			return nil, err
		default:
			return c, nil
		}
		select {
		case <-c.wr:
		case <-ctx.Done():
			c.Close()
			return nil, ctx.Err()
		}
	}
}

// version is 4 or 6.
func version(a netip.Addr) int {
	if a.Is4() {
		return 4
	}
	return 6
}
