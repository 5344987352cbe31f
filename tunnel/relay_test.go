package tunnel

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"patchbay/internal/testbed"
)

// relayFaults are the probabilities, for each datagram, of what goes wrong on the way.
type relayFaults struct {
	loss, dup, reorder float64
	// longer loses every datagram of more bytes than this; 0 loses none for that.
	longer int
	// trains loses what the sender left to be cut, as a faulty offload would: the relay gets it whole.
	trains bool
}

// relay is a host between two others that hands on datagrams, and loses, doubles and reorders them:
//
//	[a] eth0 10.9.1.1 ── 10.9.1.254 [relay] 10.9.2.254 ── 10.9.2.2 eth0 [b]
//
// Each end has the relay for its peer.
type relay struct {
	a, b         *testbed.NS
	peerA, peerB netip.AddrPort // whom a and b have for a peer
	faults       atomic.Pointer[relayFaults]
	passed, lost atomic.Uint64

	cs [2]*net.UDPConn // towards a and b
	// record, if set, sees what a (0) and b (1) send; it owns d.
	record atomic.Pointer[func(from int, d []byte)]
}

func newRelay(t testing.TB, mtu int) *relay {
	t.Helper()
	r := &relay{a: testbed.NewNS(t, "a"), b: testbed.NewNS(t, "b"), peerA: netip.MustParseAddrPort("10.9.1.254:4789"), peerB: netip.MustParseAddrPort("10.9.2.254:4789")}
	r.set(relayFaults{})
	mid := testbed.NewNS(t, "relay")
	cs := &r.cs
	for i, ns := range []*testbed.NS{r.a, r.b} {
		port := fmt.Sprintf("eth%d", i)
		testbed.Veth(t, ns, "eth0", mid, port)
		run(t, ns, "ip", "link", "set", "eth0", "mtu", fmt.Sprint(mtu))
		run(t, mid, "ip", "link", "set", port, "mtu", fmt.Sprint(mtu))
		testbed.AddAddrs(t, ns, "eth0", netip.MustParsePrefix(fmt.Sprintf("10.9.%d.%d/24", i+1, i+1)))
		testbed.AddAddrs(t, mid, port, netip.MustParsePrefix(fmt.Sprintf("10.9.%d.254/24", i+1)))
		pc, err := mid.ListenPacket("udp4", fmt.Sprintf("10.9.%d.254:4789", i+1))
		if err != nil {
			t.Fatal(err)
		}
		cs[i] = pc.(*net.UDPConn)
		cs[i].SetReadBuffer(4 << 20)
		rc, err := cs[i].SyscallConn()
		if err == nil {
			err = rc.Control(func(fd uintptr) {
				if err := unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_GRO, 1); err != nil {
					t.Fatal(err)
				}
			})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	for i := range cs {
		to := netip.MustParseAddrPort(fmt.Sprintf("10.9.%d.%d:4789", 2-i, 2-i))
		wg.Go(func() { r.pass(i, to) })
	}
	t.Cleanup(func() { cs[0].Close(); cs[1].Close(); wg.Wait() })
	return r
}

func (r *relay) set(f relayFaults) { r.faults.Store(&f) }

// inject sends a datagram to an end, as if the other one had.
func (r *relay) inject(to int, d []byte) {
	r.cs[to].WriteToUDPAddrPort(d, netip.MustParseAddrPort(fmt.Sprintf("10.9.%d.%d:4789", to+1, to+1)))
}

// pass hands on what one end sends.
func (r *relay) pass(from int, to netip.AddrPort) {
	in, out := r.cs[from], r.cs[1-from]
	buf, oob := make([]byte, 1<<16), make([]byte, 64)
	var held []byte // until another has overtaken it
	for {
		n, k, _, _, err := in.ReadMsgUDPAddrPort(buf, oob)
		if err != nil {
			return
		}
		size := n
		if ms, _ := unix.ParseSocketControlMessage(oob[:k]); len(ms) > 0 && ms[0].Header.Type == unix.UDP_GRO {
			size = int(binary.NativeEndian.Uint32(ms[0].Data))
		}
		f := r.faults.Load()
		for d := range slices.Chunk(buf[:n], max(size, 1)) {
			if rand.Float64() < f.loss || f.longer > 0 && len(d) > f.longer || f.trains && size < n {
				r.lost.Add(1)
				continue
			}
			r.passed.Add(1)
			if record := r.record.Load(); record != nil {
				(*record)(from, slices.Clone(d))
			}
			if held == nil && rand.Float64() < f.reorder {
				held = append([]byte(nil), d...)
				continue
			}
			out.WriteToUDPAddrPort(d, to)
			if rand.Float64() < f.dup {
				out.WriteToUDPAddrPort(d, to)
			}
			if held != nil {
				out.WriteToUDPAddrPort(held, to)
				held = nil
			}
		}
	}
}

// nodes plugs a network into each end, with a container on each.
func (r *relay) nodes(t testing.TB, w Wire) (a, b *Peer, ca, cb *testbed.NS) {
	t.Helper()
	return r.sealedNodes(t, w, nil, nil)
}

// sealedNodes is nodes with seals.
func (r *relay) sealedNodes(t testing.TB, w Wire, sa, sb *Seal) (a, b *Peer, ca, cb *testbed.NS) {
	t.Helper()
	na, nb := newNetwork(newVTEP(t, r.a, Config{}), 9), newNetwork(newVTEP(t, r.b, Config{}), 9)
	a, b = na.peer(t, PeerConfig{Remote: r.peerA, Wire: w, Seal: sa}), nb.peer(t, PeerConfig{Remote: r.peerB, Wire: w, Seal: sb})
	mtu, err := a.MTU()
	if err != nil {
		t.Fatal(err)
	}
	return a, b, na.container(t, 1, mtu, "10.1.0.1/24"), nb.container(t, 2, mtu, "10.1.0.2/24")
}
