package stack

import (
	"context"
	"io"
	"net"
	"net/netip"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// Packet is one IP packet that a container sent through the gateway: parsed once, reassembled if it came in fragments. It is
// lent like the frame it came in.
type Packet struct {
	// Frame is the whole frame. Frame.Hdr says what is unfinished: a UDP superframe carries GSOUDPL4 and its segment size, and
	// a packet with VirtioNeedsCsum has only the pseudo-header's sum in its checksum field.
	Frame frame.Frame
	// L3 is the offset of the IP header in Frame.Data.
	L3 int
	// IP describes the header at L3. It is never a fragment.
	IP wire.IP
}

// L4 is the transport header and what follows, without Ethernet padding.
func (p *Packet) L4() []byte { return p.Frame.Data[p.L3+p.IP.HdrLen : p.L3+p.IP.Len] }

// PacketHandler takes packets of one protocol off the gateway. HandlePackets is called on the goroutine that read the frames,
// runs to completion, never waits for a peer, and keeps nothing of ps. It may be called from several goroutines at once.
type PacketHandler interface {
	HandlePackets(ps []Packet)
}

// TCPHandler is offered every inbound connection attempt that container makes, before its handshake is answered. HandleTCP must
// not block: it starts what it needs and answers r later, from any goroutine, exactly once.
type TCPHandler interface {
	HandleTCP(r TCPRequest)
}

// TCPRequest is a SYN that waits for its answer. Exactly one of Accept, Refuse, Unreachable and Ignore is called, once; it may be called
// from any goroutine. Retransmissions of the SYN while it waits are swallowed.
type TCPRequest interface {
	Src() netip.AddrPort // the container's
	Dst() netip.AddrPort // where it wants to go
	// Accept answers with SYN-ACK and returns when the handshake is complete, or with the error that ended it.
	Accept() (Conn, error)
	// Refuse answers with RST: connection refused.
	Refuse()
	// Unreachable answers with ICMP.
	Unreachable(why Unreachable)
	// Ignore answers nothing: the container's SYN times out, as it would on a wire that swallows it.
	Ignore()
}

// Handlers is who gets what the gateway sorts out. A nil field refuses: TCP with a reset, the others as port or protocol unreachable.
type Handlers struct {
	TCP  TCPHandler    // connections to any address, the gateway's own included
	UDP  PacketHandler // datagrams to any address, the gateway's own included where LocalUDP has nobody for the port
	ICMP PacketHandler // echo requests to any address but the gateway's own; ICMPv6 too
	// LocalUDP is keyed by destination port: datagrams to the gateway's own addresses, and broadcast for DHCP.
	LocalUDP map[uint16]PacketHandler
}

// Unreachable is why a destination cannot be had; the gateway turns it into ICMP or ICMPv6 type and code.
type Unreachable uint8

// The reasons a container may be told.
const (
	UnreachNet        Unreachable = iota // no route
	UnreachHost                          // no answer from the last hop
	UnreachPort                          // nobody listens (UDP)
	UnreachProhibited                    // policy forbids it
	UnreachTooBig                        // needs fragmentation; carries the MTU
)

// Conn is a TCP connection between a container and the gateway. Beside net.Conn it can move bytes without a second copy and
// end in each of the ways TCP ends. LocalAddr is the side the container believes it talks to, RemoteAddr the container's.
// One reader and one writer may use it at once.
type Conn interface {
	net.Conn
	// WriteTo writes what arrives from the container to w until the container's FIN (nil) or an error. w is given each
	// stretch of received bytes as it lies in the stack. See TryWriter for a w that need not wake a goroutine.
	io.WriterTo
	// ReadFrom sends what r yields to the container until r's io.EOF (nil) or an error. It does not send a FIN.
	io.ReaderFrom
	// CloseWrite sends a FIN behind the bytes already written.
	CloseWrite() error
	// Reset ends the connection with RST at once, whatever is still queued. Idempotent.
	Reset()
}

// TryWriter is a writer that can say "not now". When the w of Conn.WriteTo is one, what arrives is given to TryWrite on the goroutine that read it off
// the network, without waking another; only when TryWrite does not take everything is the rest written with Write, on the goroutine that called
// WriteTo. The two are never called at the same time.
type TryWriter interface {
	io.Writer
	// TryWrite takes as much of b as it can at once, n bytes; fewer than len(b) with a nil error means that Write would wait. It must not
	// block, nor call methods of the Conn.
	TryWrite(b []byte) (n int, err error)
}

// AsyncConn is a Conn that needs no goroutine to wait on it. Those of a Gateway are such.
type AsyncConn interface {
	Conn
	// Pump gives what arrives to w.TryWrite, on whatever goroutine brings it, and returns at once. When w takes less than it was given, with a nil error,
	// nothing more comes until Resume. TryWrite may be called with locks of the stack held: it must not block nor call methods of the Conn. end is called
	// once, without a lock held, after the container's FIN (nil) or an error of either side; not after Close or Reset. Call Pump once, and neither Read nor WriteTo
	// after it.
	Pump(w interface {
		TryWrite(b []byte) (n int, err error)
	}, end func(error))
	// Resume says that w takes bytes again. It moves what has arrived on the caller's goroutine.
	Resume()
	// TryWrite queues as much of b as there is room for and does not block. n < len(b) with a nil error means that Write would wait.
	TryWrite(b []byte) (n int, err error)
	// NotifyRoom has f called after a TryWrite that took less than it was given, once there is room again or an error to learn; it may be called more often than that. f may be called
	// on any goroutine, also before TryWrite has returned, and with locks of the stack held: it must not block nor call methods of the Conn. Call NotifyRoom once; what was short
	// before that is to be tried again. It is false for a Conn that cannot tell, which never calls f.
	NotifyRoom(f func()) bool
}

// Network is what the services behind the gateway (nat, dns, dhcp) need of it. *Gateway implements it.
type Network interface {
	// Send puts IP packets on the network. fs[i].Data[14:] is an IP packet, complete but for what fs[i].Hdr says (offsets in
	// Hdr count from the start of Data); the gateway writes the Ethernet header into Data[:14]. fs is lent. A packet whose
	// destination has no known MAC starts resolution and is held briefly, in a bounded queue, or dropped as unresolved.
	Send(fs []frame.Frame)
	// SendUnreachable answers packet p with the ICMP error for why, rate-limited. mtu is used by UnreachTooBig alone.
	SendUnreachable(p *Packet, why Unreachable, mtu int)
	// DialTCP begins to open a connection into the network from src, which may be any unicast address (the true client of a published port), to
	// dst, and does not wait for it. done is called once, with no lock held, on whatever goroutine learns the outcome: the one that reads the network, so it must not
	// block, or the caller's before DialTCP returns. Its error is syscall.ECONNREFUSED when the container refuses, ctx.Err() when ctx ends first, and syscall.EADDRINUSE when src
	// has a connection to dst. What ctx does once done was called does not matter.
	DialTCP(ctx context.Context, src, dst netip.AddrPort, done func(Conn, error))
	// Addr is the gateway's own address of IP version 4 or 6, or the zero Addr.
	Addr(version int) netip.Addr
	// HostAlias is the address that means "the host" on this network, of IP version 4 or 6, or the zero Addr.
	HostAlias(version int) netip.Addr
	// MTU is the network's, in bytes of IP packet.
	MTU() int
}
