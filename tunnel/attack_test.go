package tunnel

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	"patchbay/tunnel/secure"
	"patchbay/tunnel/superframe"
)

// A man in the middle has all that goes between two nodes, and gives back what he likes: nothing of it is taken, all of it is counted, and the tunnel goes on.
func TestManInTheMiddle(t *testing.T) {
	testbed.Leaks(t)
	r := newRelay(t, 1500)
	var mu sync.Mutex
	var seen [2][][]byte // by who sent them
	record := func(from int, d []byte) {
		mu.Lock()
		defer mu.Unlock()
		if len(seen[from]) < 3000 {
			seen[from] = append(seen[from], d)
		}
	}
	r.record.Store(&record)
	ids := certificates(t, []string{"blue"}, "a.test", "b.test")
	a, b, ca, cb := r.sealedNodes(t, WirePatchbay, &Seal{Identity: ids[0], Network: "blue", Host: "b.test"}, &Seal{Identity: ids[1], Network: "blue", Host: "a.test"})
	testbed.Eventually(t, tardy+10*time.Second, isSealed(a, b))
	// A transfer may go in messages of several parts but for its first: what has to be in one datagram is sent one at a time.
	ping(t, ca, "10.1.0.2", "-c", "100", "-i", "0.005")
	transfer(t, ca, cb, "10.1.0.2", 1<<20)
	transfer(t, cb, ca, "10.1.0.1", 1<<20)
	r.record.Store(nil)
	mu.Lock()
	taken := seen
	mu.Unlock()
	nodes := [2]*Peer{a, b}
	// A message is sealed as one and then cut, so its last part may hold a few bytes of the seal alone.
	sealed := func(d []byte) bool {
		least := superframe.HeaderLen
		if d[3] == 0 {
			least += secure.Overhead
		}
		return len(d) > least && d[0] == superframe.Type && d[1] == 1
	}
	for i, ds := range taken {
		n := 0
		for _, d := range ds {
			switch {
			case sealed(d):
				n++
			case d[0] != secure.HandshakeType:
				t.Fatalf("end %d has sent what is neither sealed nor a handshake: % x", i, d)
			}
		}
		if n < 100 {
			t.Fatalf("%d sealed datagrams of end %d", n, i)
		}
	}
	// What is in hand is tried on both ends, a few at a time, so that none is lost in a full buffer: each has to be dropped for a reason.
	for _, x := range []struct {
		name string
		make func(from int, d []byte) (to int, forged []byte)
		why  []frame.Drop
	}{
		{"replayed", func(from int, d []byte) (int, []byte) { return 1 - from, d }, []frame.Drop{frame.DropReplayed}},
		{"reflected", func(from int, d []byte) (int, []byte) { return from, d }, []frame.Drop{frame.DropUnauthentic, frame.DropReplayed}},
		{"a later number", func(from int, d []byte) (int, []byte) { return 1 - from, later(d, 1<<40) }, []frame.Drop{frame.DropUnauthentic}},
		{"a bit flipped, under a later number", func(from int, d []byte) (int, []byte) {
			d = later(d, 1<<41)
			d[superframe.HeaderLen+rand.IntN(len(d)-superframe.HeaderLen)] ^= 1 << rand.IntN(8)
			return 1 - from, d
		}, []frame.Drop{frame.DropUnauthentic}},
		{"another session", func(from int, d []byte) (int, []byte) {
			d = slices.Clone(d)
			d[4] ^= 0x55
			return 1 - from, d
		}, []frame.Drop{frame.DropNoSession}},
		{"cut short", func(from int, d []byte) (int, []byte) { return 1 - from, d[:len(d)-1] }, []frame.Drop{frame.DropTunnelHeader, frame.DropReplayed}},
		{"the seal taken off", func(from int, d []byte) (int, []byte) {
			d = later(d, 1<<42)
			d[1] = 0
			binary.BigEndian.PutUint32(d[4:], 9)
			return 1 - from, d
		}, []frame.Drop{frame.DropUnsealed}},
		{"VXLAN", func(from int, d []byte) (int, []byte) { return 1 - from, wrap(9, packet(false, wire.ProtoUDP, 0, 200)) }, []frame.Drop{frame.DropUnsealed}},
		{"patchbay, clear", func(from int, d []byte) (int, []byte) {
			return 1 - from, messageOf(9, rand.Uint64(), recordOf(superframe.KindFrame, packet(false, wire.ProtoUDP, 0, 200)))
		}, []frame.Drop{frame.DropUnsealed}},
	} {
		tried, before := 0, counted(nodes[:], x.why)
		rx := a.Stats().RxFrames + b.Stats().RxFrames
		for from, ds := range taken {
			for _, d := range ds {
				// Of messages in several parts those in one datagram alone: the others wait for parts that do not come.
				if !sealed(d) || d[3] != 0 || tried >= 100*(from+1) {
					continue
				}
				to, forged := x.make(from, slices.Clone(d))
				r.inject(to, forged)
				if tried++; tried%20 == 0 {
					time.Sleep(time.Millisecond)
				}
			}
		}
		testbed.Eventually(t, tardy, func() bool { return counted(nodes[:], x.why)-before >= uint64(tried) })
		if n := counted(nodes[:], x.why) - before; n != uint64(tried) || tried < 150 {
			t.Errorf("%s: %d of %d were dropped as %v, and at least 150 had to be tried", x.name, n, tried, x.why)
		}
		// Nobody sends on the network, but for what the kernels of the containers say of themselves now and then.
		if n := a.Stats().RxFrames + b.Stats().RxFrames - rx; n > 10 {
			t.Errorf("%s: %d frames have been taken", x.name, n)
		}
	}
	// Handshakes of before, and parts of messages: none changes anything.
	for from, ds := range taken {
		for k, d := range ds {
			if !sealed(d) || d[3] != 0 {
				r.inject(1-from, d)
				r.inject(from, d)
			}
			if k%20 == 0 {
				time.Sleep(time.Millisecond)
			}
		}
	}
	ping(t, ca, "10.1.0.2")
	transfer(t, ca, cb, "10.1.0.2", 1<<20)
	transfer(t, cb, ca, "10.1.0.1", 1<<20)
	if !isSealed(a, b)() || a.Remote() != r.peerA || b.Remote() != r.peerB {
		t.Errorf("after all that %+v and %+v", a.Stats(), b.Stats())
	}
}

// later is a copy of a datagram under a number n behind its own.
func later(d []byte, n uint64) []byte {
	d = slices.Clone(d)
	binary.BigEndian.PutUint64(d[8:], binary.BigEndian.Uint64(d[8:])+n)
	return d
}

// counted is how often peers, or their VTEPs, have dropped something for one of some reasons.
func counted(ps []*Peer, why []frame.Drop) (n uint64) {
	for _, p := range ps {
		for _, d := range why {
			n += p.Drops().Get(d) + p.v.Drops().Get(d)
		}
	}
	return n
}

// Where the two ends do not agree who may be here, nothing ever passes, the reason is told, and what is clear is counted.
func TestSealRefuses(t *testing.T) {
	testbed.Leaks(t)
	ids := certificates(t, []string{"blue"}, "a.test", "b.test")
	other := certificates(t, []string{"blue"}, "a.test", "b.test")
	for _, c := range []struct {
		name   string
		a, b   *Seal
		clearB bool
	}{
		{name: "another network", a: &Seal{Identity: sharedKey(t, testKey), Network: "blue", Host: "b"}, b: &Seal{Identity: sharedKey(t, testKey), Network: "green", Host: "a"}},
		{name: "another key", a: &Seal{Identity: sharedKey(t, testKey), Network: "blue", Host: "b"}, b: &Seal{Identity: sharedKey(t, testKey+"x"), Network: "blue", Host: "a"}},
		{name: "another CA", a: &Seal{Identity: ids[0], Network: "blue", Host: "b.test"}, b: &Seal{Identity: other[1], Network: "blue", Host: "a.test"}},
		{name: "another host", a: &Seal{Identity: ids[0], Network: "blue", Host: "c.test"}, b: &Seal{Identity: ids[1], Network: "blue", Host: "a.test"}},
		{name: "a key against a certificate", a: &Seal{Identity: ids[0], Network: "blue", Host: "b.test"}, b: &Seal{Identity: sharedKey(t, testKey), Network: "blue", Host: "a.test"}},
		{name: "sealed against clear", a: &Seal{Identity: ids[0], Network: "blue", Host: "b.test"}, clearB: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := newRelay(t, 1500)
			a, b, ca, cb := r.sealedNodes(t, WirePatchbay, c.a, c.b)
			_ = cb
			if out, err := ca.Command(testbed.Tool(t, "ping"), "-c", "5", "-i", "0.2", "-W", "1", "10.1.0.2").CombinedOutput(); err == nil {
				t.Errorf("it gets through: %s", out)
			}
			told := func() bool { return a.Stats().SealError != "" && (c.clearB || b.Stats().SealError != "") }
			if !c.clearB {
				testbed.Eventually(t, tardy+20*time.Second, told)
				t.Logf("a: %s", a.Stats().SealError)
				t.Logf("b: %s", b.Stats().SealError)
			}
			for _, p := range []*Peer{a, b} {
				if s := p.Stats(); s.Sealed || s.RxFrames != 0 || p.cfg.Seal != nil && (s.State != PeerHandshake || s.TxFrames != 0) {
					t.Errorf("%+v", s)
				}
			}
			if a.Drops().Get(frame.DropNoSession) == 0 {
				t.Error("what was sent without keys is not counted")
			}
			if c.clearB {
				clearly := b.Transmit([]frame.Frame{{Data: packet(false, wire.ProtoUDP, 0, 200)}})
				testbed.Eventually(t, tardy, func() bool { return a.Drops().Get(frame.DropUnsealed) > 0 })
				if clearly != 1 || b.Drops().Get(frame.DropNoSession) == 0 {
					t.Errorf("the clear end has sent %d and counted no handshake", clearly)
				}
			}
		})
	}
}
