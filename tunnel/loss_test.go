package tunnel

import (
	"math"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	"patchbay/tunnel/udp"
)

func TestLosses(t *testing.T) {
	const s = int64(time.Second)
	var l losses
	var c counts
	now := s
	add := func(sent, received uint64) bool {
		now += s
		c.sent += sent
		c.received += received
		return l.add(c, now)
	}
	if add(5, 3); l.share() != 0 {
		t.Error("one count says something")
	}
	// What is under way when counts are taken comes later.
	for i := range 20 {
		late := uint64(i % 2 * 10)
		add(100, 95-late+uint64(1-i%2)*10)
	}
	if got := l.share(); math.Abs(got-0.05) > 0.011 {
		t.Errorf("loss is %v, want 0.05", got)
	}
	for range lossWindow {
		add(100, 100)
	}
	if got := l.share(); got != 0 {
		t.Errorf("loss of long ago counts: %v", got)
	}
	now -= s - 1
	if add(10, 0) {
		t.Error("counts are taken every nanosecond")
	}
	if add(100, 0); l.share() == 0 {
		t.Error("loss is not seen")
	}
	c.received = 3
	if add(100, 0); l.share() != 0 {
		t.Error("counts of two lives are compared")
	}
	if c.sent = 5; add(0, 0) {
		t.Error("an answer that was overtaken counts")
	}
	if add(2000, 2100); l.share() != 0 {
		t.Errorf("more came than was sent: a loss of %v", l.share())
	}
}

func TestLossyCounts(t *testing.T) {
	for _, c := range []struct {
		name                             string
		single, cut, messages, singleGot uint64
		cutGot                           uint64
		want                             bool
	}{
		{"all that is cut", 20, 1350, 30, 20, 0, true},
		{"nearly all", 20, 1350, 30, 20, 60, true},
		{"all but the first of each", 20, 1350, 30, 20, 30, true},
		{"all but the first of each of two", 20, 60, 30, 20, 30, false},
		{"half", 20, 1350, 30, 20, 675, false},
		{"none", 20, 1350, 30, 20, 1350, false},
		{"everything", 20, 1350, 30, 0, 0, false},
		{"much of everything", 20, 1350, 30, 10, 0, false},
		{"a connection that starts again and again", 3, 8, 4, 3, 0, true},
	} {
		d := counts{sent: c.single + c.cut, cut: c.cut, messages: c.messages, received: c.singleGot + c.cutGot}
		if got := d.lossy(); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

// A suspicion takes two looks, and a long packet that gets through between them.
func TestCutWatch(t *testing.T) {
	const s = int64(time.Second)
	bad, good := counts{sent: 105, cut: 100, messages: 5, received: 5}, counts{sent: 105, cut: 100, messages: 5, received: 105}
	few := counts{sent: 4, cut: 2, messages: 1, received: 2}
	for _, c := range []struct {
		name   string
		steps  []counts
		proves bool // the long packet passes
		search bool // the path's MTU is in doubt
		hint   bool
		want   bool
	}{
		{"twice", []counts{bad, bad}, true, false, false, true},
		{"once", []counts{bad}, true, false, false, false},
		{"with others between", []counts{bad, few, few, bad}, true, false, false, true},
		{"good between", []counts{bad, good, bad}, true, false, false, false},
		{"a narrow path", []counts{bad, bad, bad}, false, false, false, false},
		{"a path in doubt", []counts{bad, bad, bad}, true, true, false, false},
		{"once, and the peer says so too", []counts{few}, false, false, true, true},
		{"a path in doubt, and the peer says so too", []counts{bad}, false, true, true, false},
		{"nothing, and the peer says so too", []counts{good, {sent: 5, received: 5}}, true, false, true, false},
		{"little by little", []counts{few, few, few, few, few, few, few, few, few, few}, true, false, false, true},
	} {
		var w cutWatch
		pmtu := search{due: 1 << 60}
		if c.search {
			pmtu.state = searchBetween
		}
		now, total, got := s, counts{sent: 1000, received: 900}, false
		w.add(total, now, &pmtu, false)
		for _, d := range c.steps {
			now += s
			total = counts{total.sent + d.sent, total.cut + d.cut, total.messages + d.messages, total.received + d.received}
			got = got || w.add(total, now, &pmtu, c.hint)
			if pmtu.due == 0 && c.proves {
				pmtu.proved = now + s/2
			}
		}
		if got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

// Where whatever was cut gets lost and single datagrams do not, the kernel is to cut no more, and what hung goes on.
//
//	[c1] ── switch ── VTEP [a] ── [relay] ── [b] VTEP ── switch ── [c2]
func TestBrokenOffload(t *testing.T) {
	for _, w := range []Wire{WireVXLAN, WirePatchbay} {
		t.Run(w.String(), func(t *testing.T) {
			testbed.Leaks(t)
			r := newRelay(t, 1500)
			pa, pb, ca, cb := r.nodes(t, w)
			testbed.Eventually(t, tardy+probeShy, func() bool { return pa.Stats().State == PeerUp })
			transfer(t, ca, cb, "10.1.0.2", 4<<20)
			if s := pa.Stats(); s.Cut != udp.CutOn || s.Sent.CutDatagrams <= s.Sent.CutMessages {
				t.Fatalf("cut: %v, %+v", s.Cut, s.Sent)
			}
			r.set(relayFaults{trains: true})
			began := time.Now()
			transfer(t, ca, cb, "10.1.0.2", 4<<20)
			s := pa.Stats()
			if s.Cut != udp.CutLossy || s.MTU != pb.Stats().MTU {
				t.Errorf("cut: %v, MTU %d", s.Cut, s.MTU)
			}
			t.Logf("4 MiB after %v; loss %.2f", time.Since(began).Round(10*time.Millisecond), s.Loss)
		})
	}
}

// A path that loses what is long has a small MTU, not a bad offload.
func TestNarrowPathIsNoBrokenOffload(t *testing.T) {
	testbed.Leaks(t)
	r := newRelay(t, 1500)
	pa, _, ca, cb := r.nodes(t, WireVXLAN)
	testbed.Eventually(t, tardy+probeShy, func() bool { return pa.Stats().State == PeerUp })
	transfer(t, ca, cb, "10.1.0.2", 4<<20)
	r.set(relayFaults{longer: 1372})
	super := frame.Frame{Data: partial(packet(false, wire.ProtoTCP, 0, 30000), false)}
	super.Hdr = wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum, GSOType: wire.GSOTCPv4, GSOSize: 1400, CsumStart: 34, CsumOffset: 16}
	testbed.Eventually(t, 4*tardy, func() bool {
		pa.Transmit([]frame.Frame{super})
		time.Sleep(5 * time.Millisecond)
		m := pa.Stats().MTU
		return m <= 1350 && m > 1350-2*searchGrain
	})
	transfer(t, ca, cb, "10.1.0.2", 4<<20)
	if s := pa.Stats(); s.Cut != udp.CutOn {
		t.Errorf("cut: %v", s.Cut)
	}
}
