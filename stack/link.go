package stack

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// link is netstack's interface. It carries IP packets only and resolves nothing: the Ethernet header is written here, from the gateway's
// table of neighbours. WritePackets is called with the endpoint's lock held, on whatever goroutine caused the packet.
type link struct {
	g          *Gateway
	dispatcher gstack.NetworkDispatcher
}

var (
	_ gstack.LinkEndpoint = (*link)(nil)
	_ gstack.GSOEndpoint  = (*link)(nil)
)

func (l *link) MTU() uint32                             { return uint32(l.g.MTU()) }
func (l *link) SetMTU(uint32)                           {}
func (l *link) MaxHeaderLength() uint16                 { return 0 }
func (l *link) LinkAddress() tcpip.LinkAddress          { return "" }
func (l *link) SetLinkAddress(tcpip.LinkAddress)        {}
func (l *link) Attach(d gstack.NetworkDispatcher)       { l.dispatcher = d }
func (l *link) IsAttached() bool                        { return l.dispatcher != nil }
func (l *link) Wait()                                   {}
func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }
func (l *link) AddHeader(*gstack.PacketBuffer)          {}
func (l *link) ParseHeader(*gstack.PacketBuffer) bool   { return true }
func (l *link) Close()                                  {}
func (l *link) SetOnCloseAction(func())                 {}
func (l *link) GSOMaxSize() uint32                      { return maxMTU }
func (l *link) SupportedGSO() gstack.SupportedGSO       { return gstack.HostGSOSupported }
func (l *link) Capabilities() gstack.LinkEndpointCapabilities {
	return gstack.CapabilityRXChecksumOffload
}

// WritePackets sends what netstack produced, superframes whole. A packet for a neighbour that is not known yet is held by the gateway.
func (l *link) WritePackets(pkts gstack.PacketBufferList) (int, tcpip.Error) {
	g := l.g
	t := g.tx.get()
	if t == nil {
		return 0, &tcpip.ErrNoBufferSpace{}
	}
	ps := pkts.AsSlice()
	for _, p := range ps {
		f := buildFrame(t, p)
		if c, ok := p.Owner.(*conn); ok {
			c.mem.rcvNxt.Store(header.TCP(p.TransportHeader().Slice()).AckNumber())
			if c.ack.hold(g, t, &f, p) {
				continue
			}
		}
		if g.address(&f) {
			t.add(f)
		} else {
			g.hold(&f)
		}
	}
	t.flush()
	g.tx.put(t)
	return len(ps), nil
}

// buildFrame copies p, an IP packet, behind room for an Ethernet header.
func buildFrame(t *tx, p *gstack.PacketBuffer) frame.Frame {
	f := frame.Frame{Data: t.room(wire.EthernetLen + p.Size())}
	at := f.Data[wire.EthernetLen:]
	views, skip := p.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		s := v.AsSlice()
		if skip >= len(s) {
			skip -= len(s)
			continue
		}
		at = at[copy(at, s[skip:]):]
		skip = 0
	}
	gso := &p.GSOOptions // netstack leaves the checksum of every packet of a connection with GSO open, of short ones too
	if gso.Type == gstack.GSONone {
		return f
	}
	if gso.NeedsCsum {
		f.Hdr.Flags = wire.VirtioNeedsCsum
		f.Hdr.CsumStart = wire.EthernetLen + gso.L3HdrLen
		f.Hdr.CsumOffset = gso.CsumOffset
	}
	if p.Data().Size() > int(gso.MSS) {
		f.Hdr.GSOType = wire.GSOTCPv4
		if gso.Type == gstack.GSOTCPv6 {
			f.Hdr.GSOType = wire.GSOTCPv6
		}
		f.Hdr.GSOSize = gso.MSS
		f.Hdr.HdrLen = uint16(len(f.Data) - p.Data().Size())
	}
	return f
}

// flowKey names a TCP connection as the gateway sees it: the container's end is remote.
type flowKey struct {
	local, remote         [16]byte
	localPort, remotePort uint16
	v6                    bool
}

func makeKey(local, remote netip.AddrPort) flowKey {
	return flowKey{local: local.Addr().As16(), remote: remote.Addr().As16(), localPort: local.Port(), remotePort: remote.Port(), v6: local.Addr().Is6()}
}

// tcpPorts are the source and destination port of the TCP header at the start of b.
func tcpPorts(b []byte) (src, dst uint16) {
	return binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
}

func (k *flowKey) id() gstack.TransportEndpointID {
	id := gstack.TransportEndpointID{LocalPort: k.localPort, RemotePort: k.remotePort}
	if k.v6 {
		id.LocalAddress, id.RemoteAddress = tcpip.AddrFrom16(k.local), tcpip.AddrFrom16(k.remote)
	} else {
		id.LocalAddress, id.RemoteAddress = tcpip.AddrFrom4([4]byte(k.local[12:])), tcpip.AddrFrom4([4]byte(k.remote[12:]))
	}
	return id
}
