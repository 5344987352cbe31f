package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"patchbay/internal/testbed"
	"patchbay/internal/wire"
)

// dropsText is what `patchbay drops` says about a reason: its count, and what it means.
func (d *daemonProc) dropsText(network, reason string) (line string) {
	d.t.Helper()
	for l := range strings.Lines(d.do("drops", network)) {
		if strings.Contains(l, reason) {
			return strings.TrimSpace(l)
		}
	}
	return ""
}

// What an attachment may not say of itself, and that it may when it is trusted.
//
//	[a: speaks] ┐
//	            lab ── daemon
//	[b: hears]  ┘
func TestAntiSpoofing(t *testing.T) {
	testbed.Leaks(t)
	d := startDaemonWithLogin(t)
	d.do("network", "create", "lab", "--subnet", "10.66.0.0/24", "--subnet", "fd66::/64")
	sa, aa := d.newAttached("lab", "a")
	sb, ab := d.newAttached("lab", "b")
	st, at := d.newAttached("lab", "trusted", "--trust")
	nw, err := d.client().Network(t.Context(), "lab")
	if err != nil {
		t.Fatal(err)
	}
	b := stationOf(ab)
	gw := station{mac: nw.GatewayMAC, ip4: nw.Gateways[0], ip6: nw.Gateways[1]}
	lies := func(s station) map[string][]crafted {
		another := wire.MAC{2, 0xbe, 0xef, 0, 0, 1}
		free4, free6 := gw.ip4.Next().Next().Next().Next().Next().Next().Next(), gw.ip6.Next().Next().Next().Next().Next().Next().Next()
		return map[string][]crafted{
			"spoof-mac": {
				craft("another source MAC", b.mac, another, wire.EtherTypeIPv4, udpPacket(s.ip4, b.ip4, 4000, 4001)),
				craft("another sender MAC in ARP", wire.Broadcast, s.mac, wire.EtherTypeARP, arpMessage(wire.ARPReply, another, s.ip4, b.mac, b.ip4)),
			},
			"spoof-ip": {
				craft("another source address", b.mac, s.mac, wire.EtherTypeIPv4, udpPacket(free4, b.ip4, 4000, 4001)),
				craft("another IPv6 source address", b.mac, s.mac, wire.EtherTypeIPv6, udpPacket(free6, b.ip6, 4000, 4001)),
				craft("ARP for the gateway's address", wire.Broadcast, s.mac, wire.EtherTypeARP, arpMessage(wire.ARPReply, s.mac, gw.ip4, b.mac, b.ip4)),
				craft("neighbor advertisement for the gateway's address", wire.MulticastMAC(wire.AllNodes), s.mac, wire.EtherTypeIPv6,
					ndPacket(wire.LinkLocal(s.mac), wire.AllNodes, wire.ND{Type: wire.ICMPv6NeighborAdv, Target: gw.ip6, Link: s.mac, Override: true, Router: true})),
				craft("router advertisement", wire.MulticastMAC(wire.AllNodes), s.mac, wire.EtherTypeIPv6, raPacket(t, s)),
				craft("answer of a DHCP server", wire.Broadcast, s.mac, wire.EtherTypeIPv4, udpPacket(s.ip4, broadcast, 67, 68)),
			},
		}
	}
	pb := sb.packets("eth0")
	pa := sa.packets("eth0")
	for reason, frames := range lies(stationOf(aa)) {
		for _, f := range frames {
			before := d.drops("lab")[reason]
			pa.send(f.data)
			if !testbed.Wait(10*time.Second, func() bool { return d.drops("lab")[reason] == before+1 }) {
				t.Errorf("%s: %s counts %d, want %d", f.what, reason, d.drops("lab")[reason], before+1)
			}
		}
		if l := d.dropsText("lab", reason); !strings.Contains(l, fmt.Sprint(len(frames))) || len(strings.Fields(l)) < 6 {
			t.Errorf("`patchbay drops` says of %s: %q", reason, l)
		}
		for m := range pb.heard(quiet, marksOf(frames)...) {
			for _, f := range frames {
				if f.mark == m {
					t.Errorf("b hears: %s", f.what)
				}
			}
		}
	}
	// A bridge or router says all that of its own right. What claims the gateway's MAC or an address that a static entry binds is another matter, so the sender is its own here.
	pt := st.packets("eth0")
	for _, frames := range lies(stationOf(at)) {
		for _, f := range frames {
			pt.send(f.data)
		}
		got := pb.heard(5*time.Second, marksOf(frames)...)
		for _, f := range frames {
			if !got[f.mark] {
				t.Errorf("sent by the trusted one, b does not hear: %s", f.what)
			}
		}
	}
	if fdb := d.do("fdb", "lab"); !strings.Contains(fdb, "02:be:ef:00:00:01") || !strings.Contains(fdb, "learned") || !strings.Contains(fdb, "static") {
		t.Errorf("fdb:\n%s", fdb)
	}
}

// The bounds on what an attachment may send, each with its counter.
func TestLimits(t *testing.T) {
	testbed.Leaks(t)
	iperf3 := testbed.Tool(t, "iperf3")
	d := startDaemonWithLogin(t)
	d.do("network", "create", "lab", "--subnet", "10.66.0.0/24", "--subnet", "fd66::/64")
	sb, ab := d.newAttached("lab", "b")
	pb := sb.packets("eth0")
	b := stationOf(ab)

	t.Run("rate", func(t *testing.T) {
		const rate = 80e6 // bits a second
		slow, _ := d.newAttached("lab", "slow", "--rate", "80Mbit")
		server := sb.command(iperf3, "-s", "-1")
		if err := server.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = server.Process.Kill(); _ = server.Wait() })
		testbed.Eventually(t, 10*time.Second, func() bool { return strings.Contains(sb.do("ss", "-Htln"), ":5201") })
		var r struct {
			End struct {
				Received struct {
					Bits float64 `json:"bits_per_second"`
				} `json:"sum_received"`
			}
			Error string
		}
		out := slow.do("iperf3", "-c", b.ip4.String(), "-t", "3", "-J")
		if err := json.Unmarshal([]byte(out), &r); err != nil || r.Error != "" {
			t.Fatalf("iperf3: %v: %s", err, out)
		}
		// TCP makes up for losses, so a tenth of the rate is the least; a burst on top of the rate is the most.
		if got := r.End.Received.Bits; got < rate/10 || got > 1.2*rate {
			t.Errorf("%.0f Mbit/s came, want at most %.0f", got/1e6, rate/1e6)
		} else {
			t.Logf("%.0f of %.0f Mbit/s", got/1e6, rate/1e6)
		}
		if d.drops("lab")["rate"] == 0 {
			t.Error("nothing is counted as rate")
		}
		if got := d.do("inspect", "slow"); !strings.Contains(got, "rate") {
			t.Errorf("inspect says nothing of the rate:\n%s", got)
		}
	})
	t.Run("storm", func(t *testing.T) {
		const limit, sent = 50, 2000
		sa, aa := d.newAttached("lab", "loud", "--storm-limit", fmt.Sprint(limit))
		pa := sa.packets("eth0")
		a := stationOf(aa)
		pb.listen(quiet, func([]byte) bool { return false }) // what came before
		f := craft("broadcast", wire.Broadcast, a.mac, etherTypeLocal, []byte("storm"))
		began := time.Now()
		for range sent {
			pa.send(f.data)
		}
		heard := 0
		pb.listen(quiet, func(got []byte) bool {
			if bytes.Contains(got, f.mark[:]) {
				heard++
			}
			return false
		})
		most := limit + int(limit*time.Since(began).Seconds()) + 1
		if heard == 0 || heard > most {
			t.Errorf("%d of %d broadcasts were heard, want 1 to %d", heard, sent, most)
		}
		if n := d.drops("lab")["storm"]; n < uint64(sent-most) {
			t.Errorf("storm counts %d, want %d or more", n, sent-most)
		}
		// Unicast goes on.
		u := craft("unicast", b.mac, a.mac, etherTypeLocal, []byte("calm"))
		pa.send(u.data)
		if !pb.heard(5*time.Second, u.mark)[u.mark] {
			t.Error("a unicast frame is not heard during a storm")
		}
	})
	t.Run("MACs", func(t *testing.T) {
		const limit, tried = 4, 40
		sa, _ := d.newAttached("lab", "bridge", "--trust", "--mac-limit", fmt.Sprint(limit))
		pa := sa.packets("eth0")
		var frames []crafted
		for i := range tried {
			f := craft(fmt.Sprintf("from station %d", i), b.mac, wire.MAC{2, 0xca, 0xfe, 0, 0, byte(i)}, etherTypeLocal, []byte("one of many"))
			pa.send(f.data)
			frames = append(frames, f)
		}
		got := pb.heard(quiet, marksOf(frames)...)
		if len(got) == 0 || len(got) > limit {
			t.Errorf("frames of %d stations were heard, want 1 to %d", len(got), limit)
		}
		if n := d.drops("lab")["mac-limit"]; n < tried-limit {
			t.Errorf("mac-limit counts %d, want %d or more", n, tried-limit)
		}
	})
}
