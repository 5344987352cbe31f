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

// dialing is a connection that DialTCP has begun. Whoever takes it off the connection calls done.
type dialing struct {
	done func(Conn, error)
	stop func() bool // ends the watching of the dial's context
}

// DialTCP begins to open a connection into the network; see Network. A src without an address is the gateway's own, one without a port gets one.
func (g *Gateway) DialTCP(ctx context.Context, src, dst netip.AddrPort, done func(Conn, error)) {
	c, err := g.newDial(ctx, src, dst)
	if err != nil {
		done(nil, err)
		return
	}
	d := &dialing{done: done}
	d.stop = context.AfterFunc(ctx, func() {
		if c.dial.CompareAndSwap(d, nil) {
			c.Close()
			done(nil, ctx.Err())
		}
	})
	c.dial.Store(d)
	c.enter()
	terr := c.ep.Connect(tcpip.FullAddress{NIC: nicID, Addr: toAddress(dst.Addr()), Port: dst.Port()})
	c.leave()
	switch terr.(type) {
	case *tcpip.ErrConnectStarted, nil:
		c.settle()
	default:
		err := c.errFor("dial", terr)
		c.Close()
		g.flows.remove(c)
		if c.dial.CompareAndSwap(d, nil) {
			d.stop()
			done(nil, err)
		}
	}
	if ctx.Err() != nil && c.dial.CompareAndSwap(d, nil) { // it ended before there was a dial to end
		c.Close()
		done(nil, ctx.Err())
	}
}

// newDial makes the endpoint of a dial, and gives it its place in the table of connections.
func (g *Gateway) newDial(ctx context.Context, src, dst netip.AddrPort) (*conn, error) {
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
	return c, nil
}

// settle tells the one who dialed what came of it, once that is known. It is called with no lock held, after whatever may have changed the endpoint's state.
func (c *conn) settle() {
	d := c.dial.Load()
	if d == nil || c.connecting() || !c.dial.CompareAndSwap(d, nil) {
		return
	}
	d.stop()
	if !c.dead() {
		d.done(c, nil)
		return
	}
	err := error(syscall.ECONNABORTED)
	if terr := c.ep.LastError(); terr != nil {
		err = errnoOf(terr)
	}
	c.Close()
	d.done(nil, opError("dial", c.local, c.remote, err))
}

// version is 4 or 6.
func version(a netip.Addr) int {
	if a.Is4() {
		return 4
	}
	return 6
}
