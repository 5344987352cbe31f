package tunnel

import (
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
)

// door is an address of a box: what is sent there gets in, and what goes out of it comes from there.
type door struct {
	c    *net.UDPConn
	at   netip.AddrPort
	dead bool // nothing gets in any more
	// in is what got in, in bytes; out how many bytes went out.
	in  []int
	out int
}

// box stands between two sealed nodes, as a NAT or somebody on the way does, and chooses what address each is seen at:
//
//	[a] 127.0.0.1 ── b1 b2 v [box] a1 a2 ── 127.0.0.2 [b]
type box struct {
	a, b         *Peer
	fromA, fromB collector // what has come

	mu                sync.Mutex
	a1, a2, b1, b2, v *door
	seenA, seenB      *door // where what each sends comes out
	// onAway, if set, is called with mu held before what a has sent to b2 goes on; false loses it.
	onAway func() bool
}

func newBox(t *testing.T) *box {
	t.Helper()
	testbed.Leaks(t)
	ns := testbed.NewNS(t, "box")
	x := &box{}
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	nodeA, nodeB := netip.MustParseAddrPort("127.0.0.1:4789"), netip.MustParseAddrPort("127.0.0.2:4789")
	open := func(addr string, node netip.AddrPort, seen **door) *door {
		c, err := ns.ListenPacket("udp4", addr)
		if err != nil {
			t.Fatal(err)
		}
		d := &door{c: c.(*net.UDPConn), at: netip.MustParseAddrPort(addr)}
		t.Cleanup(func() { c.Close() })
		wg.Go(func() {
			for buf := make([]byte, 1<<16); ; {
				n, err := d.c.Read(buf)
				if err != nil {
					return
				}
				x.pass(d, buf[:n], node, seen)
			}
		})
		return d
	}
	x.mu.Lock()
	x.a1, x.a2 = open("127.0.2.1:4789", nodeA, &x.seenB), open("127.0.2.2:4789", nodeA, &x.seenB)
	x.b1, x.b2 = open("127.0.1.1:4789", nodeB, &x.seenA), open("127.0.1.2:4789", nodeB, &x.seenA)
	x.v = open("127.0.1.66:4789", nodeB, &x.seenA)
	x.v.dead = true
	x.seenA, x.seenB = x.a1, x.b1
	x.mu.Unlock()

	sa, sb := sealPair(t)
	x.a = addPeer(t, newVTEP(t, ns, Config{Listen: nodeA}), PeerConfig{VNI: 9, Remote: x.b1.at, Wire: WirePatchbay, Seal: sa})
	x.b = addPeer(t, newVTEP(t, ns, Config{Listen: nodeB}), PeerConfig{VNI: 9, Remote: x.a1.at, Wire: WirePatchbay, Seal: sb})
	x.a.Attach(&x.fromB)
	x.b.Attach(&x.fromA)
	testbed.Eventually(t, tardy+10*time.Second, isSealed(x.a, x.b))
	return x
}

// pass hands on what got in.
func (x *box) pass(d *door, p []byte, node netip.AddrPort, seen **door) {
	x.mu.Lock()
	defer x.mu.Unlock()
	d.in = append(d.in, len(p))
	if d.dead || d == x.b2 && x.onAway != nil && !x.onAway() {
		return
	}
	(*seen).out += len(p)
	(*seen).c.WriteToUDPAddrPort(p, node)
}

// do changes what the box does.
func (x *box) do(f func()) {
	x.mu.Lock()
	defer x.mu.Unlock()
	f()
}

// send has a peer send a frame.
func send(t *testing.T, p *Peer) {
	t.Helper()
	if p.Transmit([]frame.Frame{{Data: packet(false, wire.ProtoUDP, 0, 100)}}) != 1 {
		t.Error("not sent")
	}
}

// passes sees to it that frames get through, both ways.
func (x *box) passes(t *testing.T) {
	t.Helper()
	a, b := x.fromA.len(), x.fromB.len()
	for range 10 {
		send(t, x.a)
		send(t, x.b)
	}
	testbed.Eventually(t, tardy, func() bool { return x.fromA.len() >= a+10 && x.fromB.len() >= b+10 })
	if n := x.a.seal.link.Stats().Handshakes; n > 2 {
		t.Errorf("it took %d handshakes", n)
	}
}

// Somebody on the way has all that one end sends come from the address of a third, who is to get the tunnel's traffic for it: he gets a challenge now and then, no more in all than came in his name, and what is meant for the
// peer goes where the peer is.
func TestRoamingIsNotARedirection(t *testing.T) {
	x := newBox(t)
	x.do(func() { x.seenB = x.v })
	for range 150 {
		send(t, x.b)
		for range 5 {
			send(t, x.a)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if x.a.Remote() != x.b1.at {
		t.Errorf("it has moved to %v", x.a.Remote())
	}
	testbed.Eventually(t, tardy, func() bool { return x.fromA.len() == 150*5 && x.fromB.len() == 150 })
	x.do(func() {
		bytes := 0
		for _, n := range x.v.in {
			bytes += n
		}
		if len(x.v.in) == 0 || slices.Max(x.v.in) > challengeLen || bytes > x.v.out || len(x.v.in) > 20 {
			t.Errorf("the third has got datagrams of %v bytes, for %d that came in his name", x.v.in, x.v.out)
		}
		x.seenB = x.b1
	})
	x.passes(t)
	if x.a.Remote() != x.b1.at {
		t.Errorf("it has moved to %v", x.a.Remote())
	}
}

// A NAT that forgets its mapping is followed in about a round trip, also where nothing gets to the old address any more, and where the first challenges are lost. Where nobody sends anything it takes the next probe.
func TestRoamsBehindNAT(t *testing.T) {
	for _, c := range []struct {
		lost int
		idle bool
		most time.Duration
	}{
		{0, false, 200 * time.Millisecond},
		{2, false, 2*challengeEvery + 500*time.Millisecond},
		{1, true, 2*probeEvery + 500*time.Millisecond},
	} {
		x := newBox(t)
		n := 0
		x.do(func() {
			x.seenB, x.b1.dead = x.b2, true
			x.onAway = func() bool { n++; return n > c.lost }
		})
		began := time.Now()
		testbed.Eventually(t, 2*tardy, func() bool {
			if !c.idle {
				send(t, x.a)
				send(t, x.b)
			}
			return x.a.Remote() == x.b2.at
		})
		took := time.Since(began)
		t.Logf("with %d challenges lost, idle %v, it took %v", c.lost, c.idle, took)
		if took > c.most && !raceEnabled {
			t.Errorf("it took %v, want at most %v", took, c.most)
		}
		x.passes(t)
	}
}

// Both ends roam before either has followed the other. Where the old addresses are dead, the second goes when the first is being asked: who answers has to do it where it was asked from.
func TestBothRoam(t *testing.T) {
	for _, dead := range []bool{false, true} {
		x := newBox(t)
		x.do(func() {
			x.seenB, x.b1.dead = x.b2, dead
			x.onAway = func() bool {
				x.seenA, x.a1.dead = x.a2, dead
				return true
			}
			if !dead {
				x.onAway()
			}
		})
		began := time.Now()
		testbed.Eventually(t, 2*tardy, func() bool {
			send(t, x.a)
			send(t, x.b)
			return x.a.Remote() == x.b2.at && x.b.Remote() == x.a2.at
		})
		took := time.Since(began)
		t.Logf("with old addresses dead %v it took %v", dead, took)
		if took > time.Second && !raceEnabled {
			t.Errorf("it took %v", took)
		}
		x.passes(t)
	}
}
