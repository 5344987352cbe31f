package tunnel

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/porttest"
	"patchbay/internal/testbed"
)

// queue is a sink that keeps some frames for porttest, and allocates nothing when nobody takes them.
type queue chan frame.Frame

func (q queue) Forward(fs []frame.Frame) {
	for i := range fs {
		if len(q) == cap(q) { // before the copy
			continue
		}
		q <- frame.Frame{Hdr: fs[i].Hdr, Data: slices.Clone(fs[i].Data)}
	}
}

func (q queue) read(wait time.Duration) (fs []frame.Frame) {
	deadline := time.After(wait)
	select {
	case f := <-q:
		fs = append(fs, f)
	case <-deadline:
		return nil
	}
	for len(fs) < 256 {
		select {
		case f := <-q:
			fs = append(fs, f)
		default:
			return fs
		}
	}
	return fs
}

// A peer is a switch port like any other, whose far end is the sink at the other host.
func TestConformance(t *testing.T) {
	for _, c := range []struct {
		name, remote string
		cfg          Config
		peer         PeerConfig
	}{
		{"IPv4", "10.9.0.2:4789", Config{}, PeerConfig{}},
		{"IPv6", "[fd09::2]:4789", Config{}, PeerConfig{}},
		{"one by one", "10.9.0.2:4789", Config{Ports: 1, NoCut: true, NoJoin: true}, PeerConfig{}},
		{"one port", "10.9.0.2:4789", Config{}, PeerConfig{OnePort: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			porttest.Run(t, func(t *testing.T) *porttest.Harness {
				a, b := underlay(t, 1600)
				remote := netip.MustParseAddrPort(c.remote)
				ping(t, a, remote.Addr().String()) // while a neighbour is unknown, the kernel keeps but a few superframes for it
				va, vb := newVTEP(t, a, c.cfg), newVTEP(t, b, c.cfg)
				c.peer.VNI, c.peer.Remote = 5, remote
				p := addPeer(t, va, c.peer)
				back := remote.Addr().Prev()
				q := make(queue, 1024)
				addPeer(t, vb, PeerConfig{VNI: 5, Remote: netip.AddrPortFrom(back, 0)}).Attach(q)
				return &porttest.Harness{Port: p, Read: q.read, Close: p.Close, Drops: p.Drops().Total, AllocFree: true}
			})
		})
	}
}

// The VTEP's own Close ends Transmit as well.
func TestVTEPClose(t *testing.T) {
	testbed.Leaks(t)
	a, _ := underlay(t, 1500)
	v := newVTEP(t, a, Config{})
	p := addPeer(t, v, PeerConfig{VNI: 1, Remote: netip.MustParseAddrPort("10.9.0.2:4789")})
	v.Close()
	v.Close()
	if n := p.Transmit(make([]frame.Frame, 3)); n != 0 || p.Drops().Get(frame.DropPortDown) != 3 {
		t.Errorf("took %d, dropped %d", n, p.Drops().Get(frame.DropPortDown))
	}
	if _, err := v.AddPeer(PeerConfig{VNI: 2, Remote: netip.MustParseAddrPort("10.9.0.2:4789")}); err == nil {
		t.Error("a closed VTEP takes a peer")
	}
	if len(v.Peers()) != 0 {
		t.Error("a closed VTEP has peers")
	}
}
