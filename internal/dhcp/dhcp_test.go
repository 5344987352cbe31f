package dhcp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/wire"
	"patchbay/ipam"
	"patchbay/stack"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/rfc1035label"
)

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

var (
	gw     = ip("10.88.0.1")
	prefix = netip.MustParsePrefix("10.88.0.0/24")
	mac1   = wire.MAC{2, 0, 0, 0, 0, 1}
	mac2   = wire.MAC{2, 0, 0, 0, 0, 2}
	zero   = ip("0.0.0.0")
)

// network takes what the server sends.
type network struct{ sent chan []byte }

func (n *network) Send(fs []frame.Frame) {
	for _, f := range fs {
		n.sent <- append([]byte(nil), f.Data...)
	}
}

// macNetwork can send to a MAC as well, and writes it down in the Ethernet header.
type macNetwork struct{ network }

func (n *macNetwork) SendTo(mac wire.MAC, fs []frame.Frame) {
	for _, f := range fs {
		b := append([]byte(nil), f.Data...)
		copy(b, mac[:])
		n.sent <- b
	}
}

type bed struct {
	t     testing.TB
	s     *Server
	n     *network
	pool  *ipam.Pool
	drops *frame.DropCounters
}

func newBed(t testing.TB, edit func(*Config, *PoolLeaser)) *bed {
	t.Helper()
	b := &bed{t: t, n: &network{make(chan []byte, 1000)}, drops: new(frame.DropCounters)}
	var err error
	if b.pool, err = ipam.NewPool(context.Background(), ipam.PoolConfig{Name: "n", Prefix: prefix}); err != nil {
		t.Fatal(err)
	}
	leaser := &PoolLeaser{Pool: b.pool}
	c := Config{Network: b.n, Addr: gw, Prefix: prefix, Leaser: leaser, Drops: b.drops, MTU: 1450, Domain: "n.patchbay.internal",
		Search: []string{"n.patchbay.internal", "corp.example"}}
	if edit != nil {
		edit(&c, leaser)
	}
	if b.s, err = New(c); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.s.Close() })
	return b
}

// packet is the frame a client with that MAC and address sends.
func packet(src wire.MAC, from, to netip.Addr, data []byte) stack.Packet {
	const l3, l4 = wire.EthernetLen, wire.EthernetLen + wire.IPv4Len
	b := make([]byte, l4+wire.UDPLen+len(data))
	wire.PutEthernet(b, wire.Broadcast, src, wire.EtherTypeIPv4)
	wire.PutIPv4(b[l3:], from, to, wire.ProtoUDP, 0, 64, len(b)-l3, 0, false)
	wire.PutUDP(b[l4:], ClientPort, ServerPort, len(data))
	copy(b[l4+wire.UDPLen:], data)
	wire.PutL4Checksum(b[l4:], from, to, wire.ProtoUDP)
	p, _ := wire.ParseIP(b[l3:], false)
	return stack.Packet{Frame: frame.Frame{Data: b}, L3: l3, IP: p}
}

func (b *bed) send(src wire.MAC, from netip.Addr, m *dhcpv4.DHCPv4) {
	b.s.HandlePackets([]stack.Packet{packet(src, from, broadcast, m.ToBytes())})
}

// reply waits for the next answer.
func (b *bed) reply() (to netip.Addr, m *dhcpv4.DHCPv4) {
	b.t.Helper()
	select {
	case f := <-b.n.sent:
		p, ok := wire.ParseIP(f[wire.EthernetLen:], false)
		l4 := f[wire.EthernetLen+wire.IPv4Len:]
		u, uok := wire.ParseUDP(l4)
		if !ok || !uok || p.Src != gw || u.SrcPort != 67 || u.DstPort != 68 || !wire.VerifyL4(&p, l4) || u.Len != len(l4) || p.Len != len(f)-wire.EthernetLen {
			b.t.Fatalf("bad packet %x", f)
		}
		m, err := dhcpv4.FromBytes(l4[wire.UDPLen:])
		if err != nil {
			b.t.Fatal(err)
		}
		if m.OpCode != dhcpv4.OpcodeBootReply || addr(m.ServerIdentifier()) != gw {
			b.t.Errorf("bad reply %s", m.Summary())
		}
		return p.Dst, m
	case <-time.After(10 * time.Second):
		b.t.Fatal("no reply")
		return
	}
}

// silent makes sure that nothing was answered, once the worker is done.
func (b *bed) silent() {
	b.t.Helper()
	b.s.idle.Wait()
	if len(b.n.sent) != 0 {
		b.t.Errorf("%d replies, want none", len(b.n.sent))
	}
}

func msg(t dhcpv4.MessageType, mac wire.MAC, mods ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	m, err := dhcpv4.New(dhcpv4.PrependModifiers(mods, dhcpv4.WithHwAddr(mac[:]), dhcpv4.WithMessageType(t))...)
	if err != nil {
		panic(err)
	}
	return m
}

func requested(a netip.Addr) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(a.AsSlice()))
}
func serverID(a netip.Addr) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptServerIdentifier(a.AsSlice()))
}
func ciaddr(a netip.Addr) dhcpv4.Modifier { return dhcpv4.WithClientIP(a.AsSlice()) }

// bound takes a client through DISCOVER and REQUEST.
func (b *bed) bound(mac wire.MAC, mods ...dhcpv4.Modifier) netip.Addr {
	b.t.Helper()
	b.send(mac, zero, msg(dhcpv4.MessageTypeDiscover, mac, mods...))
	_, offer := b.reply()
	if offer.MessageType() != dhcpv4.MessageTypeOffer {
		b.t.Fatalf("want an offer, got %s", offer.Summary())
	}
	b.send(mac, zero, msg(dhcpv4.MessageTypeRequest, mac, requested(addr(offer.YourIPAddr)), serverID(gw)))
	_, ack := b.reply()
	if ack.MessageType() != dhcpv4.MessageTypeAck || !ack.YourIPAddr.Equal(offer.YourIPAddr) {
		b.t.Fatalf("want an ACK for %s, got %s", offer.YourIPAddr, ack.Summary())
	}
	return addr(ack.YourIPAddr)
}

func TestNewClient(t *testing.T) {
	b := newBed(t, nil)
	d := msg(dhcpv4.MessageTypeDiscover, mac1, dhcpv4.WithOption(dhcpv4.OptClientIdentifier([]byte{1, 2, 3})), dhcpv4.WithOption(dhcpv4.OptHostName("guest")))
	b.send(mac1, zero, d)
	to, offer := b.reply()
	if to != broadcast || offer.TransactionID != d.TransactionID || offer.ClientHWAddr.String() != mac1.String() || offer.MessageType() != dhcpv4.MessageTypeOffer {
		t.Errorf("offer to %s: %s", to, offer.Summary())
	}
	a := addr(offer.YourIPAddr)
	if r, ok := b.pool.Holder(a); !ok || r.MAC != mac1 || time.Until(r.Expires) > time.Minute {
		t.Errorf("the offered address is not kept for a minute: %+v", r)
	}
	rq := msg(dhcpv4.MessageTypeRequest, mac1, requested(a), serverID(gw), dhcpv4.WithOption(dhcpv4.OptClientIdentifier([]byte{1, 2, 3})),
		dhcpv4.WithOption(dhcpv4.OptHostName("guest")))
	b.send(mac1, zero, rq)
	to, ack := b.reply()
	if to != broadcast || ack.TransactionID != rq.TransactionID || ack.MessageType() != dhcpv4.MessageTypeAck || addr(ack.YourIPAddr) != a {
		t.Errorf("ack to %s: %s", to, ack.Summary())
	}
	if r, _ := b.pool.Holder(a); time.Until(r.Expires) < 59*time.Minute || r.Hostname != "guest" {
		t.Errorf("lease %+v", r)
	}
	mtu, _ := dhcpv4.GetUint16(dhcpv4.OptionInterfaceMTU, ack.Options)
	for what, ok := range map[string]bool{
		"mask":        net.IP(ack.SubnetMask()).Equal(net.IP{255, 255, 255, 0}),
		"router":      len(ack.Router()) == 1 && addr(ack.Router()[0]) == gw,
		"DNS":         len(ack.DNS()) == 1 && addr(ack.DNS()[0]) == gw,
		"domain":      ack.DomainName() == "n.patchbay.internal",
		"search":      ack.DomainSearch() != nil && strings.Join(ack.DomainSearch().Labels, " ") == "n.patchbay.internal corp.example",
		"MTU":         mtu == 1450,
		"lease time":  ack.IPAddressLeaseTime(0) == time.Hour,
		"T1":          ack.IPAddressRenewalTime(0) == 30*time.Minute,
		"T2":          ack.IPAddressRebindingTime(0) > 50*time.Minute && ack.IPAddressRebindingTime(0) < time.Hour,
		"client id":   string(ack.Options[61]) == "\x01\x02\x03",
		"size":        len(ack.ToBytes()) <= minMessage,
		"no hostname": ack.HostName() == "",
	} {
		if !ok {
			t.Errorf("%s: %s", what, ack.Summary())
		}
	}
}

func TestRequests(t *testing.T) {
	for _, c := range []struct {
		what string
		from netip.Addr
		m    func(held netip.Addr) *dhcpv4.DHCPv4
		want dhcpv4.MessageType // none: silence
		to   func(held netip.Addr) netip.Addr
		drop frame.Drop
	}{
		{what: "renew", m: func(a netip.Addr) *dhcpv4.DHCPv4 { return msg(dhcpv4.MessageTypeRequest, mac1, ciaddr(a)) },
			want: dhcpv4.MessageTypeAck, to: func(a netip.Addr) netip.Addr { return a }},
		{what: "reboot", m: func(a netip.Addr) *dhcpv4.DHCPv4 { return msg(dhcpv4.MessageTypeRequest, mac1, requested(a)) },
			want: dhcpv4.MessageTypeAck},
		{what: "reboot with another's address", m: func(netip.Addr) *dhcpv4.DHCPv4 {
			return msg(dhcpv4.MessageTypeRequest, mac1, requested(ip("10.88.0.77")))
		}, want: dhcpv4.MessageTypeNak},
		{what: "reboot on another network", m: func(netip.Addr) *dhcpv4.DHCPv4 {
			return msg(dhcpv4.MessageTypeRequest, mac1, requested(ip("192.168.1.7")))
		}, want: dhcpv4.MessageTypeNak},
		{what: "rebind on another network", m: func(netip.Addr) *dhcpv4.DHCPv4 {
			return msg(dhcpv4.MessageTypeRequest, mac1, ciaddr(ip("192.168.1.7")))
		}, want: dhcpv4.MessageTypeNak},
		{what: "the gateway's address", m: func(netip.Addr) *dhcpv4.DHCPv4 { return msg(dhcpv4.MessageTypeRequest, mac1, requested(gw)) },
			want: dhcpv4.MessageTypeNak},
		{what: "another server's offer", m: func(a netip.Addr) *dhcpv4.DHCPv4 {
			return msg(dhcpv4.MessageTypeRequest, mac1, requested(a), serverID(ip("10.88.0.9")))
		}, drop: frame.DropNotForGateway},
		{what: "through a relay", m: func(a netip.Addr) *dhcpv4.DHCPv4 {
			return msg(dhcpv4.MessageTypeRequest, mac1, requested(a), dhcpv4.WithGatewayIP(net.IP{10, 88, 0, 9}))
		}, drop: frame.DropNotForGateway},
		{what: "request of nothing", m: func(netip.Addr) *dhcpv4.DHCPv4 { return msg(dhcpv4.MessageTypeRequest, mac1) },
			drop: frame.DropMalformed},
		{what: "inform", m: func(a netip.Addr) *dhcpv4.DHCPv4 { return msg(dhcpv4.MessageTypeInform, mac1, ciaddr(a)) },
			want: dhcpv4.MessageTypeAck, to: func(a netip.Addr) netip.Addr { return a }},
		{what: "inform from elsewhere", m: func(netip.Addr) *dhcpv4.DHCPv4 {
			return msg(dhcpv4.MessageTypeInform, mac1, ciaddr(ip("192.168.1.7")))
		}, drop: frame.DropNotForGateway},
		{what: "in another's name", m: func(netip.Addr) *dhcpv4.DHCPv4 { return msg(dhcpv4.MessageTypeDiscover, mac2) }, drop: frame.DropSpoofMAC},
		{what: "a reply", m: func(netip.Addr) *dhcpv4.DHCPv4 {
			m := msg(dhcpv4.MessageTypeDiscover, mac1)
			m.OpCode = dhcpv4.OpcodeBootReply
			return m
		}, drop: frame.DropMalformed},
		{what: "BOOTP", m: func(netip.Addr) *dhcpv4.DHCPv4 {
			return msg(0, mac1, dhcpv4.WithoutOption(dhcpv4.OptionDHCPMessageType))
		}, drop: frame.DropMalformed},
	} {
		t.Run(c.what, func(t *testing.T) {
			b := newBed(t, nil)
			if _, err := b.pool.Lease(context.Background(), ipam.Request{Attachment: "x", Addr: ip("10.88.0.77")}); err != nil {
				t.Fatal(err)
			}
			held := b.bound(mac1)
			m := c.m(held)
			b.send(mac1, held, m)
			if c.want == dhcpv4.MessageTypeNone {
				b.silent()
				if b.drops.Get(c.drop) != 1 {
					t.Errorf("not counted as %s", c.drop)
				}
				return
			}
			to, r := b.reply()
			wantTo := broadcast
			if c.to != nil {
				wantTo = c.to(held)
			}
			if r.MessageType() != c.want || to != wantTo || r.TransactionID != m.TransactionID {
				t.Errorf("to %s (want %s): %s", to, wantTo, r.Summary())
			}
			if _, leased := r.Options[51]; leased != (c.want == dhcpv4.MessageTypeAck && m.MessageType() == dhcpv4.MessageTypeRequest) {
				t.Errorf("lease time present: %v: %s", leased, r.Summary())
			}
			if c.want == dhcpv4.MessageTypeNak && addr(r.YourIPAddr).IsValid() {
				t.Errorf("a NAK with an address: %s", r.Summary())
			}
		})
	}
}

func TestReleaseAndDecline(t *testing.T) {
	b := newBed(t, nil)
	a := b.bound(mac1)
	b.send(mac2, a, msg(dhcpv4.MessageTypeRelease, mac2, ciaddr(a), serverID(gw))) // not its own
	b.silent()
	if _, ok := b.pool.Holder(a); !ok {
		t.Fatal("another machine released the lease")
	}
	b.send(mac1, a, msg(dhcpv4.MessageTypeRelease, mac1, ciaddr(a), serverID(gw)))
	b.silent()
	if _, ok := b.pool.Holder(a); ok {
		t.Fatal("a released lease is held")
	}
	if again := b.bound(mac1); again != a {
		t.Errorf("had %s, got %s after the release", a, again)
	}
	b.send(mac1, zero, msg(dhcpv4.MessageTypeDecline, mac1, requested(a), serverID(gw)))
	b.silent()
	if again := b.bound(mac1, requested(a)); again == a {
		t.Errorf("%s was declined and given again", a)
	}
}

func TestAttachmentKeepsItsAddress(t *testing.T) {
	b := newBed(t, func(_ *Config, l *PoolLeaser) {
		l.Attachment = func(m wire.MAC) string {
			if m == mac1 {
				return "web"
			}
			return ""
		}
	})
	r, err := b.pool.Lease(context.Background(), ipam.Request{Attachment: "web", MAC: mac1, Hostname: "web"})
	if err != nil {
		t.Fatal(err)
	}
	if a := b.bound(mac1, requested(ip("10.88.0.99"))); a != r.Addr {
		t.Errorf("web has %s and was given %s", r.Addr, a)
	}
	b.send(mac1, zero, msg(dhcpv4.MessageTypeDiscover, mac1))
	if _, m := b.reply(); m.HostName() != "web" {
		t.Errorf("host name %q", m.HostName())
	}
	b.send(mac1, r.Addr, msg(dhcpv4.MessageTypeRelease, mac1, ciaddr(r.Addr)))
	b.send(mac1, r.Addr, msg(dhcpv4.MessageTypeDecline, mac1, requested(r.Addr)))
	b.silent()
	if h, ok := b.pool.Holder(r.Addr); !ok || !h.Expires.IsZero() {
		t.Errorf("the attachment's lease became %+v", h)
	}
}

func TestUnicast(t *testing.T) {
	n := &macNetwork{network{make(chan []byte, 10)}}
	b := newBed(t, func(c *Config, _ *PoolLeaser) { c.Network = n })
	b.n = &n.network
	peek := func() wire.MAC {
		f := <-n.sent
		n.sent <- f
		return wire.Dst(f)
	}
	b.send(mac1, zero, msg(dhcpv4.MessageTypeDiscover, mac1))
	if mac := peek(); mac != mac1 {
		t.Errorf("offer sent to %s", mac)
	}
	if to, m := b.reply(); to != addr(m.YourIPAddr) {
		t.Errorf("offer of %s sent to %s", m.YourIPAddr, to)
	}
	b.send(mac1, zero, msg(dhcpv4.MessageTypeDiscover, mac1, dhcpv4.WithBroadcast(true)))
	if to, _ := b.reply(); to != broadcast {
		t.Errorf("with the broadcast flag, sent to %s", to)
	}
	b.send(mac1, zero, msg(dhcpv4.MessageTypeRequest, mac1, requested(ip("10.99.0.1"))))
	if to, _ := b.reply(); to != broadcast {
		t.Errorf("NAK sent to %s", to)
	}
}

func TestLimits(t *testing.T) {
	t.Run("queue", func(t *testing.T) {
		gate := &gateLeaser{gate: make(chan struct{})}
		b := newBed(t, func(c *Config, _ *PoolLeaser) { c.Leaser, c.MaxQueue = gate, 16 })
		for i := range 40 {
			mac := wire.MAC{2, 0, 0, 0, 1, byte(i / 20)}
			b.send(mac, zero, msg(dhcpv4.MessageTypeDiscover, mac))
		}
		// One at most is with the leaser; of each MAC an eighth of 16 waits.
		if got := b.drops.Get(frame.DropServiceLimit); got < 35 || got > 36 {
			t.Errorf("%d dropped of 40", got)
		}
		close(gate.gate)
	})
	t.Run("guests", func(t *testing.T) {
		b := newBed(t, func(_ *Config, l *PoolLeaser) { l.MaxGuests = 3 })
		for i := range 5 {
			mac := wire.MAC{2, 0, 0, 0, 1, byte(i)}
			b.send(mac, zero, msg(dhcpv4.MessageTypeDiscover, mac))
			b.s.idle.Wait()
		}
		if len(b.n.sent) != 3 || b.drops.Get(frame.DropServiceLimit) != 2 {
			t.Errorf("%d offers, %d dropped", len(b.n.sent), b.drops.Get(frame.DropServiceLimit))
		}
	})
	t.Run("long replies", func(t *testing.T) {
		b := newBed(t, func(c *Config, _ *PoolLeaser) {
			c.Search = nil
			for i := range 20 {
				c.Search = append(c.Search, fmt.Sprintf("a-rather-long-domain-%d.example", i))
			}
		})
		b.send(mac1, zero, msg(dhcpv4.MessageTypeDiscover, mac1, dhcpv4.WithOption(dhcpv4.OptClientIdentifier(make([]byte, 200)))))
		_, m := b.reply()
		if n := len(m.ToBytes()); n > minMessage || m.DomainSearch() != nil || len(m.DNS()) != 1 {
			t.Errorf("%d bytes: %s", n, m.Summary())
		}
		b.send(mac1, zero, msg(dhcpv4.MessageTypeDiscover, mac1, dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(1400))))
		if _, m := b.reply(); m.DomainSearch() == nil || len(m.DomainSearch().Labels) != 20 {
			t.Errorf("a client that takes 1400 bytes got %s", m.Summary())
		}
	})
}

// gateLeaser waits until the gate opens, or its context ends.
type gateLeaser struct{ gate chan struct{} }

var errGate = errors.New("closed")

func (g *gateLeaser) Lease(ctx context.Context, _ wire.MAC, _ netip.Addr, _ string, _ time.Duration) (Lease, error) {
	select {
	case <-g.gate:
		return Lease{}, errGate
	case <-ctx.Done():
		return Lease{}, ctx.Err()
	}
}
func (*gateLeaser) Release(context.Context, wire.MAC, netip.Addr) error { return nil }
func (*gateLeaser) Decline(context.Context, wire.MAC, netip.Addr) error { return nil }

func TestCloseEndsTheWorker(t *testing.T) {
	b := newBed(t, func(c *Config, _ *PoolLeaser) { c.Leaser = &gateLeaser{make(chan struct{})} })
	b.send(mac1, zero, msg(dhcpv4.MessageTypeDiscover, mac1))
	start := time.Now()
	b.s.Close()
	if d := time.Since(start); d > 2*time.Second {
		t.Errorf("Close took %v", d)
	}
	b.send(mac1, zero, msg(dhcpv4.MessageTypeDiscover, mac1))
	b.silent()
}

func TestBadConfig(t *testing.T) {
	ok := Config{Network: &network{}, Leaser: &gateLeaser{}, Addr: gw, Prefix: prefix}
	for what, edit := range map[string]func(*Config){
		"no network":      func(c *Config) { c.Network = nil },
		"no leaser":       func(c *Config) { c.Leaser = nil },
		"address outside": func(c *Config) { c.Addr = ip("10.99.0.1") },
		"IPv6 address":    func(c *Config) { c.Addr = ip("fd00::1") },
		"IPv6 resolver":   func(c *Config) { c.DNS = []netip.Addr{ip("fd00::1")} },
		"IPv6 router":     func(c *Config) { c.Router = ip("fd00::1") },
		"MTU":             func(c *Config) { c.MTU = 67 },
	} {
		c := ok
		edit(&c)
		if _, err := New(c); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// FuzzHandlePackets: whatever bytes come, nothing panics, every reply is well-formed and no longer than the client takes, and no more
// addresses are leased than there are clients.
func FuzzHandlePackets(f *testing.F) {
	for _, t := range []dhcpv4.MessageType{dhcpv4.MessageTypeDiscover, dhcpv4.MessageTypeRequest, dhcpv4.MessageTypeDecline, dhcpv4.MessageTypeRelease, dhcpv4.MessageTypeInform} {
		f.Add(msg(t, mac1).ToBytes())
		f.Add(msg(t, mac1, requested(ip("10.88.0.2")), serverID(gw), dhcpv4.WithOption(dhcpv4.OptHostName("x"))).ToBytes())
		f.Add(msg(t, mac1, ciaddr(ip("10.88.0.2")), dhcpv4.WithOption(dhcpv4.OptDomainSearch(&rfc1035label.Labels{Labels: []string{"a.b"}}))).ToBytes())
	}
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > maxRequest {
			data = data[:maxRequest]
		}
		b := newBed(t, nil)
		b.s.HandlePackets([]stack.Packet{packet(mac1, zero, broadcast, data)})
		b.s.idle.Wait()
		if len(b.n.sent) > 1 || len(b.pool.Leases()) > 1 {
			t.Errorf("%d replies, %d leases", len(b.n.sent), len(b.pool.Leases()))
		}
		if len(b.n.sent) == 1 {
			if _, m := b.reply(); len(m.ToBytes()) > 1500 {
				t.Errorf("a reply of %d bytes", len(m.ToBytes()))
			}
		}
	})
}
