package dhcp

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"patchbay/frame"
	"patchbay/internal/wire"
	"patchbay/stack"
)

// Ports of the protocol, both UDP.
const (
	ServerPort = 67
	ClientPort = 68
)

const maxRequest = 1500 // bytes of the longest message read

// Network is what the server needs of a gateway; stack.Network has it.
type Network interface {
	Send(fs []frame.Frame)
}

// MACSender is a Network that can send to a MAC before its address is known. fs is as in stack.Network.Send.
type MACSender interface {
	SendTo(mac wire.MAC, fs []frame.Frame)
}

// Config configures a Server. Network, Addr, Prefix and Leaser are required; the zero value of every other field is its documented default.
type Config struct {
	Network Network
	Addr    netip.Addr   // the server's own address, which is the gateway's
	Prefix  netip.Prefix // the network's subnet
	Leaser  Leaser

	Router netip.Addr // default Addr
	// NoRouter tells clients of no router: the network has no way out.
	NoRouter bool
	DNS      []netip.Addr // IPv4; default Addr
	Domain   string       // the client's own domain; default none
	Search   []string     // where it looks for short names; default Domain
	MTU      int          // bytes of IP packet; default 1500

	LeaseTime time.Duration // default 1 h
	OfferTime time.Duration // how long an offered address is kept, LeaseTime at most; default 1 min
	MaxQueue  int           // requests waiting, in all; of one MAC, an eighth of it, at least 1. Default 64

	Drops  *frame.DropCounters // default: counters of its own
	Logger *slog.Logger        // gets what went wrong with the Leaser; default: none
}

// request is a message waiting for the worker.
type request struct {
	mac  wire.MAC
	data []byte
}

// Server is the DHCP server of one network. It is safe for concurrent use.
type Server struct {
	c      Config
	ctx    context.Context // ends with Close
	cancel context.CancelFunc

	mu      sync.Mutex
	queue   []request
	working bool
	closed  bool
	mtu     int
	idle    sync.WaitGroup
}

// New makes a server. The error is one line that names the setting.
func New(c Config) (*Server, error) {
	switch {
	case c.Network == nil || c.Leaser == nil:
		return nil, errors.New("dhcp: needs a Network and a Leaser")
	case !c.Addr.Is4() || !c.Prefix.Contains(c.Addr):
		return nil, fmt.Errorf("dhcp: server address %s is not in the network's IPv4 subnet %s: give one that is", c.Addr, c.Prefix)
	}
	c.Router = cmp.Or(c.Router, c.Addr)
	if !c.Router.Is4() {
		return nil, fmt.Errorf("dhcp: router %s is not IPv4: give one that is", c.Router)
	}
	if len(c.DNS) == 0 {
		c.DNS = []netip.Addr{c.Addr}
	}
	c.DNS = slices.Clone(c.DNS)
	for _, a := range c.DNS {
		if !a.Is4() {
			return nil, fmt.Errorf("dhcp: resolver %s is not IPv4: give one that is", a)
		}
	}
	if len(c.Search) == 0 && c.Domain != "" {
		c.Search = []string{c.Domain}
	}
	c.MTU = cmp.Or(c.MTU, 1500)
	if c.MTU < 68 || c.MTU > 65535 {
		return nil, fmt.Errorf("dhcp: MTU %d: want 68 to 65535", c.MTU)
	}
	c.LeaseTime = cmp.Or(c.LeaseTime, time.Hour)
	c.OfferTime = min(cmp.Or(c.OfferTime, time.Minute), c.LeaseTime)
	c.MaxQueue = cmp.Or(c.MaxQueue, 64)
	if c.Drops == nil {
		c.Drops = new(frame.DropCounters)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{c: c, mtu: c.MTU}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s, nil
}

// SetMTU changes what clients are told from now on, in bytes of IP packet.
func (s *Server) SetMTU(mtu int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mtu = mtu
}

// networkMTU is what clients are told.
func (s *Server) networkMTU() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mtu
}

// Close drops what waits, ends a call of the Leaser in progress, and returns when the worker has. Idempotent.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed, s.queue = true, nil
	s.mu.Unlock()
	s.cancel()
	s.idle.Wait()
	return nil
}

// HandlePackets implements stack.PacketHandler for datagrams to port 67 of the gateway's address and of the broadcast address.
func (s *Server) HandlePackets(ps []stack.Packet) {
	for i := range ps {
		p := &ps[i]
		l4 := p.L4()
		u, ok := wire.ParseUDP(l4)
		if !ok || p.IP.Version != 4 || p.L3 < wire.EthernetLen || p.Frame.Superframe() || u.Len > maxRequest {
			s.c.Drops.Add(frame.DropMalformed, 1)
			continue
		}
		h := &p.Frame.Hdr
		if h.Flags&wire.VirtioDataValid == 0 && !h.UnfinishedL4(p.L3+p.IP.HdrLen) && !wire.VerifyL4(&p.IP, l4) {
			s.c.Drops.Add(frame.DropChecksum, 1)
			continue
		}
		s.enqueue(wire.Src(p.Frame.Data), l4[wire.UDPLen:u.Len])
	}
}

// enqueue copies data and sees to it that somebody works.
func (s *Server) enqueue(mac wire.MAC, data []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	mine := 0
	for i := range s.queue {
		if s.queue[i].mac == mac {
			mine++
		}
	}
	if s.closed || len(s.queue) >= s.c.MaxQueue || mine >= max(s.c.MaxQueue/8, 1) {
		s.c.Drops.Add(frame.DropServiceLimit, 1)
		return
	}
	s.queue = append(s.queue, request{mac, slices.Clone(data)})
	if !s.working {
		s.working = true
		s.idle.Go(s.work)
	}
}

// work answers what is queued, and ends when nothing is.
func (s *Server) work() {
	for {
		s.mu.Lock()
		if len(s.queue) == 0 {
			s.working, s.queue = false, nil
			s.mu.Unlock()
			return
		}
		r := s.queue[0]
		s.queue = s.queue[1:]
		s.mu.Unlock()
		s.serve(r)
	}
}
