package udp

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync/atomic"
	"time"

	"patchbay/internal/mmsg"
)

// PathConfig says how to send to one address. The zero value is fine.
type PathConfig struct {
	// NoCut has each datagram sent by itself (no UDP_SEGMENT), for a path on which cutting does harm.
	NoCut bool
	// OnePort sends from the listening port alone, for a peer behind a NAT or one that tells its peers by their ports.
	OnePort bool
	// OnMTU hears that the path's MTU in bytes of IP packet is another than was known. It is called from whoever sends, and must not block.
	OnMTU func(mtu int)
}

// CutState tells whether a Path has datagrams cut by the kernel, and if not, why.
type CutState uint32

// The states of a Path.
const (
	CutOn      CutState = iota // UDP_SEGMENT is used
	CutOff                     // switched off by PathConfig.NoCut
	CutMissing                 // the kernel has no UDP_SEGMENT
	CutRefused                 // the kernel refused it on this route; tried again after Config.RetryCut
	CutLossy                   // SuspendCut: loss that looks like an offload bug; tried again likewise
)

func (c CutState) String() string {
	switch c {
	case CutOn:
		return "on"
	case CutOff:
		return "off"
	case CutMissing:
		return "missing"
	case CutRefused:
		return "refused"
	case CutLossy:
		return "lossy"
	}
	return "unknown"
}

// Path is the way to one remote address and port. It stays what it is; for another address make another one. Nothing needs to be closed.
type Path struct {
	s       *Socket
	cfg     PathConfig
	remote  netip.AddrPort
	name    mmsg.Sockaddr
	nameLen uint32
	scope   uint32 // interface of a link-local address

	cut   atomic.Uint32 // CutState
	retry atomic.Int64  // when CutRefused and CutLossy end, in nanoseconds of Socket.now
	mtu   atomic.Int64  // last known, or 0
	asked atomic.Int64  // when the MTU was last asked for after a refusal

	calls, datagrams, bytes   atomic.Uint64
	cutMessages, cutDatagrams atomic.Uint64
}

// PathStats are the counters of a Path. Bytes are of UDP payload. Messages are what the kernel was given, Datagrams what it made of them.
// CutMessages are those of the messages that had several datagrams, and CutDatagrams all of theirs.
type PathStats struct {
	Messages, Datagrams, Bytes uint64
	CutMessages, CutDatagrams  uint64
}

// NewPath makes the way to remote. It fails where the Socket cannot speak to such an address: IPv6 from one that listens on an IPv4 address, and the
// other way round, a group address, or a zone that is no interface.
func (s *Socket) NewPath(remote netip.AddrPort, cfg PathConfig) (*Path, error) {
	addr := remote.Addr().Unmap()
	switch {
	case !addr.IsValid() || addr.IsUnspecified() || addr.IsMulticast() || remote.Port() == 0:
		return nil, fmt.Errorf("peer %v: want the unicast address and port of one host", remote)
	case addr.Is6() && !s.v6:
		return nil, fmt.Errorf("peer %v: %v has no IPv6: listen on an IPv6 address or on [::]", remote, s.local)
	case addr.Is4() && s.v6 && !s.dual:
		return nil, fmt.Errorf("peer %v: %v has no IPv4: listen on an IPv4 address or on [::]", remote, s.local)
	}
	p := &Path{s: s, cfg: cfg, remote: netip.AddrPortFrom(addr.WithZone(""), remote.Port())}
	if z := addr.Zone(); z != "" {
		if n, err := strconv.ParseUint(z, 10, 32); err == nil {
			p.scope = uint32(n)
		} else if i, err := net.InterfaceByName(z); err == nil {
			p.scope = uint32(i.Index)
		} else {
			return nil, fmt.Errorf("peer %v: there is no interface %q", remote, z)
		}
	}
	p.nameLen = p.name.Put(p.remote, s.v6, p.scope)
	switch {
	case cfg.NoCut:
		p.cut.Store(uint32(CutOff))
	case s.maxSegments == 0:
		p.cut.Store(uint32(CutMissing))
	}
	return p, nil
}

// Remote is where the Path leads. IPv4 addresses are never v4-mapped.
func (p *Path) Remote() netip.AddrPort { return p.remote }

// Cut is whether the kernel cuts datagrams for this Path.
func (p *Path) Cut() CutState { return CutState(p.cut.Load()) }

// SuspendCut has each datagram sent by itself for Config.RetryCut, because what was cut seems to get lost on the way.
func (p *Path) SuspendCut() { p.suspend(CutLossy) }

func (p *Path) suspend(why CutState) {
	for {
		switch was := p.cut.Load(); CutState(was) {
		case CutOff, CutMissing:
			return
		default:
			p.retry.Store(p.s.now() + int64(p.s.cfg.RetryCut))
			if p.cut.CompareAndSwap(was, uint32(why)) {
				return
			}
		}
	}
}

// cuts reports whether several datagrams may go in one message now.
func (p *Path) cuts() bool {
	was := p.cut.Load()
	switch CutState(was) {
	case CutOn:
		return true
	case CutRefused, CutLossy:
		return p.s.now() >= p.retry.Load() && p.cut.CompareAndSwap(was, uint32(CutOn))
	}
	return false
}

// Stats reads the counters, one after the other while traffic goes on.
func (p *Path) Stats() PathStats {
	return PathStats{CutMessages: p.cutMessages.Load(), CutDatagrams: p.cutDatagrams.Load(), Messages: p.calls.Load(), Datagrams: p.datagrams.Load(), Bytes: p.bytes.Load()}
}

// MTU asks the kernel for the largest IP packet, in bytes, that gets to the remote address in one piece, as far as it knows: by the route and by what
// ICMP has told it lately. It does not wait for anybody. Without a route there is an error.
func (p *Path) MTU() (int, error) {
	n, err := p.s.meter.ask(p)
	if err != nil {
		return 0, fmt.Errorf("path MTU to %v: %w", p.remote.Addr(), err)
	}
	p.mtu.Store(int64(n))
	return n, nil
}

// KnownMTU is what MTU said last, or 0.
func (p *Path) KnownMTU() int { return int(p.mtu.Load()) }

// Fits reports the longest datagram, in bytes, that fits an IP packet of mtu bytes on this Path.
func (p *Path) Fits(mtu int) int {
	if p.remote.Addr().Is4() {
		return mtu - ipv4Overhead
	}
	return mtu - ipv6Overhead
}

// Bytes of IP and UDP header, without options.
const (
	ipv4Overhead = 20 + 8
	ipv6Overhead = 40 + 8
)

// tooBig is called when the kernel has refused a datagram for its length: the path's MTU is asked for, at most once a second.
func (p *Path) tooBig() {
	now, last := p.s.now(), p.asked.Load()
	if last != 0 && now-last < int64(time.Second) || !p.asked.CompareAndSwap(last, max(now, 1)) {
		return
	}
	was := p.mtu.Load()
	if n, err := p.MTU(); err == nil && int64(n) != was && p.cfg.OnMTU != nil {
		p.cfg.OnMTU(n)
	}
}
