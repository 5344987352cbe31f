package node

import (
	"net/netip"
	"testing"
	"time"

	"patchbay/internal/testbed"
	"patchbay/internal/testbed/probe"
	"patchbay/nat"
	"patchbay/tap"
)

// bulk is how many bytes a transfer has.
func bulk() int64 {
	if testing.Short() {
		return 20 << 20
	}
	return 200 << 20
}

// move makes one transfer and holds every byte of it against what was sent.
func move(t *testing.T, from *agent, tr transfer) {
	t.Helper()
	m := from.do(ask{Transfer: &tr}).Transfer
	for _, d := range []struct {
		name string
		got  received
		sent string
		want int64
	}{{"up", m.Up, m.UpS, tr.Up}, {"down", m.Down, m.DownS, tr.Down}} {
		if d.got.Err != "" || d.got.Bytes != d.want || d.got.Wrong >= 0 || d.got.Sum != d.sent {
			t.Errorf("%s: %d of %d bytes, first wrong one at %d, sha256 %s, of what was sent %s; %s", d.name, d.got.Bytes, d.want, d.got.Wrong, d.got.Sum, d.sent, d.got.Err)
		}
		if d.got.Longest >= stall {
			t.Errorf("%s: %v without a byte", d.name, d.got.Longest)
		}
	}
	t.Logf("%d MB up, %d MB down in %v: %.0f Mbit/s; longest pause up %v, down %v", tr.Up>>20, tr.Down>>20, m.Elapsed.Round(time.Millisecond),
		float64(tr.Up+tr.Down)*8/1e6/m.Elapsed.Seconds(), m.Up.Longest.Round(time.Millisecond), m.Down.Longest.Round(time.Millisecond))
}

// outsideTransfers is an external machine with a transfer server on its port 7.
func outsideTransfers(t *testing.T) *testbed.External {
	t.Helper()
	ext := testbed.NewExternal(t, "external")
	newOutsider(t, ext.NS).do(ask{Listen: ":7"})
	return ext
}

// TestBulkWithFaults sends 200 MB each way through NAT while the container's line loses, doubles and reorders frames in both directions, and then both ways
// at once: not a byte is wrong, and no direction pauses for ten seconds.
func TestBulkWithFaults(t *testing.T) {
	testbed.Leaks(t)
	ext := outsideTransfers(t)
	n := newNet(t, NetworkConfig{})
	f := &faults{Faults: testbed.Faults{Loss: 0.01, Dup: 0.01, Reorder: 0.01, Seed: 1}}
	n.line = f
	b := newBox(t, n, ContainerConfig{AttachConfig: AttachConfig{Name: "box", Publish: specs(t, "8007:7")}})
	t.Cleanup(f.close)
	b.do(ask{Listen: ":7"})
	size := bulk()
	for _, c := range []struct {
		name string
		a    netip.Addr
	}{{"v4", ext.Addr4}, {"v6", ext.Addr6}} {
		addr := netip.AddrPortFrom(c.a, 7).String()
		t.Run(c.name+"/up", func(t *testing.T) { move(t, b.agent, transfer{Addr: addr, Up: size, Seed: 1}) })
		t.Run(c.name+"/down", func(t *testing.T) { move(t, b.agent, transfer{Addr: addr, Down: size, Seed: 2}) })
		t.Run(c.name+"/both", func(t *testing.T) { move(t, b.agent, transfer{Addr: addr, Up: size / 4, Down: size / 4, Seed: 3}) })
	}
	client := newOutsider(t, ext.NS)
	for _, c := range []struct {
		name string
		a    netip.Addr
	}{{"v4", ext.HostAddr4}, {"v6", ext.HostAddr6}} {
		addr := netip.AddrPortFrom(c.a, 8007).String()
		t.Run("published/"+c.name+"/up", func(t *testing.T) { move(t, client, transfer{Addr: addr, Up: size / 4, Seed: 4}) })
		t.Run("published/"+c.name+"/down", func(t *testing.T) { move(t, client, transfer{Addr: addr, Down: size / 4, Seed: 5}) })
	}
	in, out := f.count()
	t.Logf("from the container: %+v; to the container: %+v", in, out)
	for _, c := range []testbed.FaultCount{in, out} {
		if c.Lost == 0 || c.Duplicated == 0 || c.Reordered == 0 {
			t.Errorf("nothing went wrong on the line: %+v", c)
		}
	}
}

// TestKindsOfTAP holds that a TAP without virtio header, one with four queues, a packet socket, and TAPs read by NAT's own loop reach everything and carry every byte.
func TestKindsOfTAP(t *testing.T) {
	testbed.Leaks(t)
	testbed.RequirePing(t)
	ext := outsideTransfers(t)
	for _, k := range []struct {
		name string
		cfg  ContainerConfig
		loop int
	}{
		{"plain", ContainerConfig{AttachConfig: AttachConfig{ForcePlain: true}}, 0},
		{"queues", ContainerConfig{AttachConfig: AttachConfig{Queues: 4}}, 2}, // which the loop leaves alone
		{"packet", ContainerConfig{AttachConfig: AttachConfig{Device: tap.KindPacket}}, 0},
		{"shared loop", ContainerConfig{}, 1},
		{"both in the loop", ContainerConfig{}, 2},
	} {
		t.Run(k.name, func(t *testing.T) {
			n := newNet(t, NetworkConfig{LoopTAPs: k.loop})
			k.cfg.Name, k.cfg.Publish = "box", specs(t, "8000:7000", "8000:7000/udp")
			b := newBox(t, n, k.cfg)
			peer := newBox(t, n, ContainerConfig{AttachConfig: AttachConfig{Name: "peer"}})
			peer.do(ask{Listen: ":7"})
			st := n.Status()
			if plain := st.Containers[0].Caps == 0; plain != k.cfg.ForcePlain {
				t.Errorf("capabilities of the device: %v", st.Containers[0].Caps)
			}
			if got := st.Containers[0].Device; got != k.cfg.Device {
				t.Errorf("the device is a %v, want a %v", got, k.cfg.Device)
			}
			reachEverything(t, n, b, ext)
			for _, a := range []string{
				netip.AddrPortFrom(ext.Addr4, 7).String(), netip.AddrPortFrom(ext.Addr6, 7).String(), peer.v4(7), peer.v6(7),
			} {
				t.Run(a, func(t *testing.T) {
					move(t, b.agent, transfer{Addr: a, Up: bulk() / 8, Down: bulk() / 8, Seed: 6})
				})
			}
		})
	}
}

func specs(t testing.TB, ss ...string) (out []nat.Spec) {
	for _, s := range ss {
		out = append(out, mustSpec(t, s))
	}
	return out
}

// reachEverything goes from b by every protocol to the outside, the gateway and, published, back in.
func reachEverything(t *testing.T, n *Network, b *box, ext *testbed.External) {
	t.Helper()
	s, err := probe.Serve(t.Context(), ext, netip.AddrPortFrom(ext.Addr4, 9).String(), netip.AddrPortFrom(ext.Addr6, 9).String())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var list []probe.Attempt
	for _, a := range []netip.Addr{ext.Addr4, ext.Addr6} {
		list = append(list, probe.Attempt{Net: "tcp", Addr: netip.AddrPortFrom(a, 9).String()}, probe.Attempt{Net: "udp", Addr: netip.AddrPortFrom(a, 9).String()},
			probe.Attempt{Net: "ping", Addr: a.String()})
	}
	for _, a := range n.gwAddrs {
		list = append(list, probe.Attempt{Net: "ping", Addr: a.String()})
	}
	list = append(list, probe.Attempt{Net: "name", Addr: "peer"})
	b.reach(list...)
	echo := newOutsider(t, ext.NS)
	b.do(ask{Probe: []string{":7000"}})
	for _, a := range []netip.Addr{ext.HostAddr4, ext.HostAddr6} {
		own := ext.Addr4
		if a.Is6() {
			own = ext.Addr6
		}
		for _, network := range []string{"tcp", "udp"} {
			for _, o := range echo.reach(probe.Attempt{Net: network, Addr: netip.AddrPortFrom(a, 8000).String()}) {
				if from, err := netip.ParseAddrPort(o.Said); err != nil || from.Addr().Unmap() != own {
					t.Errorf("%v: want the client's own address %s", o, own)
				}
			}
		}
	}
}
